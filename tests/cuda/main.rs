//! Is the kernel the operation? Every operation on the CUDA device against the CPU in f64, on the same (rounded) inputs.
//!
//! With feature `emu` the device is emulated, with feature `cuda` it is a card; without either, or without a card, every
//! test says SKIPPED. Each case also asks that every output is written (they start as NaN), that nothing past the end is
//! (the emulator's memory has guard bytes; on a card compute-sanitizer looks), and that two runs give equal bits.
#![allow(missing_docs)]

mod attention;
#[path = "../common/mod.rs"]
mod common;
mod dora;
mod gemm;
mod int8;
mod lane_maps;
mod loss;
mod nf4;
mod norm;
mod optim;
mod pointwise;
mod prefix;
mod rows;
mod transfer;

use std::sync::OnceLock;

use glmtune::cuda;
use glmtune::rng::Stream;
use glmtune::tensor::{DType, Device, Shape, Tensor};

/// The types that a device computes in.
pub const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The CUDA device, or `None` with a loud line when there is none.
pub fn device() -> Option<Device> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    let why = WHY.get_or_init(|| cuda::describe(0).err().map(|e| e.to_string()));
    match why {
        None => Some(Device::Cuda(0)),
        Some(why) => {
            eprintln!("SKIPPED: no CUDA device: {why}");
            None
        }
    }
}

/// The distance between 1 and the next number of `dtype`.
pub fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON,
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => 2f64.powi(-10),
        DType::BF16 => 2f64.powi(-7),
        _ => 0.0,
    }
}

/// Normal numbers of deviation `scale`, rounded to `dtype`, on the host.
pub fn random(dtype: DType, shape: impl Into<Shape>, seed: u64, scale: f32) -> Tensor {
    let shape = shape.into();
    let stream = Stream::new(seed, 0x7465_7374);
    let values: Vec<f32> = (0..shape.elements() as u64)
        .map(|i| scale * stream.normal(i))
        .collect();
    Tensor::from_slice(&values, shape).to_dtype(dtype)
}

/// A host tensor whose every element is NaN: what is not written shows.
pub fn nan(dtype: DType, shape: impl Into<Shape>) -> Tensor {
    let mut tensor = Tensor::zeros(dtype, shape);
    tensor.bytes_mut().fill(0xff);
    tensor
}

/// A copy on the device.
pub fn up(device: Device, tensor: &Tensor) -> Tensor {
    tensor.to_device(device).unwrap()
}

/// A copy on the host.
pub fn down(tensor: &Tensor) -> Tensor {
    tensor.to_device(Device::Cpu).unwrap()
}

/// The same values in f64 on the host: the reference computes with these.
pub fn wide(tensor: &Tensor) -> Tensor {
    tensor.to_dtype(DType::F64)
}

/// Fails unless `got` (a device tensor) is `want` (f64, host) within what computing in `dtype` costs.
///
/// `atol = 2 eps √K scale`, `rtol = 2 eps`: an operand or intermediate rounded to `dtype` is off by at most `eps / 2` of
/// its size, `K` such terms of size `scale` add up like a random walk, and the result is rounded once more. Where nothing
/// but the output is rounded to `dtype` (sums stay in f32), K is 1.
#[track_caller]
pub fn assert_matches(what: &str, got: &Tensor, want: &Tensor, dtype: DType, k: usize, scale: f64) {
    let eps = epsilon(dtype);
    let (atol, rtol) = (2.0 * eps * (k as f64).sqrt() * scale, 2.0 * eps);
    common::assert_close(
        &format!("{what} {dtype}"),
        &down(got).to_f64_vec(),
        &want.to_f64_vec(),
        atol,
        rtol,
    );
}

/// Runs `f`, which makes device tensors, twice and demands equal bits; returns the first run's.
#[track_caller]
pub fn twice(what: &str, f: impl Fn() -> Vec<Tensor>) -> Vec<Tensor> {
    let (first, second) = (f(), f());
    for (i, (a, b)) in first.iter().zip(&second).enumerate() {
        assert!(
            down(a).bytes() == down(b).bytes(),
            "{what}: output {i} differs between two runs"
        );
    }
    first
}

#[test]
fn a_tensor_goes_to_the_device_and_back() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        let host = random(dtype, [7, 33], 1, 1.0);
        let there = up(device, &host);
        assert_eq!(there.device(), device);
        assert_eq!(down(&there).bytes(), host.bytes());
        let mut other = Tensor::zeros_on(device, dtype, [7, 33]).unwrap();
        assert!(down(&other).bytes().iter().all(|&byte| byte == 0));
        other.copy_from(&there).unwrap();
        assert_eq!(down(&other).bytes(), host.bytes());
        other.zero().unwrap();
        assert!(down(&other).bytes().iter().all(|&byte| byte == 0));
    }
    let half = random(DType::F16, [3, 5], 2, 1.0);
    let converted = half.to_device_as(device, DType::BF16).unwrap();
    assert_eq!(down(&converted).bytes(), half.to_dtype(DType::BF16).bytes());
}
