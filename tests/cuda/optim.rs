//! The optimizer over many parameters at once, and the search for what is no number.

use glmtune::ops::{self, AdamwSlot};
use glmtune::tensor::{DType, Device, Tensor};

use super::{TYPES, assert_matches, device, down, random, twice, up, wide};

/// Around a vector, a block's pass and a chunk.
const SIZES: [usize; 10] = [1, 3, 4, 5, 1023, 1025, 16383, 16384, 16385, 40_000];

const FACTORS: ops::AdamW = ops::AdamW {
    clip: 0.7,
    decay: 0.99,
    one_minus_beta1: 0.1,
    beta2: 0.999,
    one_minus_beta2: 0.001,
    step_size: 0.01,
    sqrt_correction2: 0.3,
    epsilon: 1e-8,
};

fn parameters(seed: u64) -> Vec<Tensor> {
    let random = |(i, &n): (usize, &usize)| random(DType::F32, [n], seed + i as u64, 1.0);
    SIZES.iter().enumerate().map(random).collect()
}

/// Values, first and second moments after one step on `device`, every second parameter without decay.
fn step(device: Device) -> Vec<Tensor> {
    let on = |tensors: Vec<Tensor>| -> Vec<Tensor> { tensors.iter().map(|t| up(device, t)).collect() };
    let squares = parameters(40)
        .iter()
        .map(|m| {
            Tensor::from_slice(
                &m.as_slice::<f32>().iter().map(|x| x * x).collect::<Vec<_>>(),
                m.shape(),
            )
        })
        .collect();
    let (mut p, g, mut m, mut v) = (
        on(parameters(10)),
        on(parameters(20)),
        on(parameters(30)),
        on(squares),
    );
    let mut slots: Vec<AdamwSlot> = (p.iter_mut().zip(&g))
        .zip(m.iter_mut().zip(&mut v))
        .enumerate()
        .map(|(i, ((p, g), (m, v)))| AdamwSlot {
            p,
            g,
            m,
            v,
            decayed: i % 2 == 0,
        })
        .collect();
    ops::adamw_all(&mut slots, &FACTORS).unwrap();
    p.into_iter().chain(m).chain(v).collect()
}

#[test]
fn adamw() {
    let Some(device) = device() else { return };
    let got = twice("adamw", || step(device));
    for (i, (got, want)) in got.iter().zip(step(Device::Cpu)).enumerate() {
        // A card fuses products with sums: a few roundings less than on the CPU.
        assert_matches(&format!("adamw, output {i}"), got, &want, DType::F32, 4, 1.0);
    }
}

#[test]
fn sum_of_squares() {
    let Some(device) = device() else { return };
    let host = parameters(1);
    let there: Vec<Tensor> = host.iter().map(|x| up(device, x)).collect();
    let sum = |tensors: &[Tensor]| {
        let sum = ops::sum_of_squares_all(&tensors.iter().collect::<Vec<_>>()).unwrap();
        Tensor::from_slice(&[sum], [1])
    };
    let got = twice("sum_of_squares", || vec![sum(&there)]);
    let n: usize = SIZES.iter().sum();
    // Terms of one sign: the sum, which every rounding is a share of, is as large as their number.
    assert_matches("sum_of_squares", &got[0], &sum(&host), DType::F64, n, n as f64);
    for (i, (host, there)) in host.iter().zip(&there).enumerate() {
        let (want, got) = (sum(std::slice::from_ref(host)), sum(std::slice::from_ref(there)));
        let n = SIZES[i];
        assert_matches("sum_of_squares of one", &got, &want, DType::F64, n, n as f64);
    }
    // What is no number shows; what is one, though its square is not in F32, does not.
    for (value, is) in [
        (f32::NAN, f64::is_nan as fn(f64) -> bool),
        (f32::NEG_INFINITY, f64::is_infinite),
        (1e30, f64::is_finite),
    ] {
        let mut host = parameters(1);
        host[8].as_mut_slice::<f32>()[16384] = value;
        let there: Vec<Tensor> = host.iter().map(|x| up(device, x)).collect();
        assert!(is(sum(&there).as_slice::<f64>()[0]), "{value}");
    }
}

#[test]
fn zero_all() {
    let Some(device) = device() else { return };
    let mut tensors: Vec<Tensor> = parameters(1).iter().map(|x| up(device, x)).collect();
    ops::zero_all(&mut tensors.iter_mut().collect::<Vec<_>>()).unwrap();
    for tensor in &tensors {
        assert!(down(tensor).bytes().iter().all(|&byte| byte == 0));
    }
}

#[test]
fn parameters_of_several_devices_are_refused() {
    let Some(device) = device() else { return };
    let (host, there) = (random(DType::F32, [3], 1, 1.0), random(DType::F32, [3], 1, 1.0));
    let there = up(device, &there);
    assert!(ops::sum_of_squares_all(&[&there, &host]).is_err());
    assert!(ops::sum_of_squares_all(&[&host, &there]).is_err());
}

#[test]
fn non_finite() {
    let Some(device) = device() else { return };
    for dtype in TYPES {
        for n in [1, 7, 8, 2047, 2049, 70_000] {
            let mut values = random(dtype, [n], 1, 1.0).to_f64_vec();
            let find = |values: &[f64]| {
                let host = Tensor::from_slice(values, [n]);
                let want = ops::non_finite(&wide(&host.to_dtype(dtype))).unwrap();
                let got = ops::non_finite(&up(device, &host.to_dtype(dtype))).unwrap();
                assert_eq!(got, want, "{dtype} {n}");
                got
            };
            assert_eq!(find(&values), None);
            values[n - 1] = f64::NAN;
            assert_eq!(find(&values), Some((n - 1, 1)));
            values[n / 2] = f64::NEG_INFINITY;
            values[n / 3] = f64::INFINITY;
            assert_eq!(find(&values).map(|(first, _)| first), Some(n / 3));
        }
    }
}
