//! 4-bit weights: quantising, on their way to a device and back, decoding.

use super::{WeightRef, check_device, check_elements, mismatch, on_device, weight};
use crate::cuda;
use crate::error::Result;
use crate::quant::{QuantTensor, QuantType};
use crate::tensor::{DType, Device, Tensor};

/// `source` in 4 bits on `device`, as [`place_quantized`] has it; quantised there, with the same bits everywhere. `place`
/// is what an error names.
///
/// # Errors
/// An element is not finite, the device has no room, or no kernel for the shape.
pub fn quantize(
    place: &str,
    source: &Tensor,
    quant_type: QuantType,
    double_quant: bool,
    device: Device,
) -> Result<QuantTensor> {
    let known = matches!(source.dtype(), DType::F32 | DType::F16 | DType::BF16);
    if known && device != Device::Cpu {
        let there = source.to_device(device)?;
        if let Some(weight) = cuda::nf4::quantize(&there, quant_type, double_quant)? {
            return Ok(weight);
        }
        // Something is not finite: below, the CPU says what and where.
    }
    let host = source.to_device(Device::Cpu)?;
    place_quantized(
        QuantTensor::quantize_named(place, &host, quant_type, double_quant)?,
        device,
    )
}

/// `weight` on `device`: on the CPU in bitsandbytes' order, and mapped where it was mapped; on a CUDA device in the order
/// that the kernels read (`cuda/nf4.cuh`).
///
/// # Errors
/// The device has no room, or no kernel for the shape.
pub fn place_quantized(weight: QuantTensor, device: Device) -> Result<QuantTensor> {
    match (weight.codes.device(), device) {
        (from, to) if from == to => Ok(weight),
        (Device::Cpu, Device::Cuda(ordinal)) => cuda::nf4::place(&weight, ordinal),
        _ => place_quantized(cuda::nf4::fetch(&weight)?, device),
    }
}

/// `out [N, K] = table[code] * absmax`, rounded once to out's type.
///
/// # Errors
/// Shapes or devices do not fit.
pub fn dequantize(w: &QuantTensor, out: &mut Tensor) -> Result<()> {
    let (n, k) = w.shape.rows_and_columns();
    check_elements("dequantize", "out", out, out.dtype(), n * k)?;
    check_device("dequantize", "out", out, w.codes.device())?;
    on_device!("dequantize", out, T => {
        weight::<T>("dequantize", WeightRef::Quant(w))?.decode(0..n, 0..k, out.as_mut_slice());
    }, cuda => cuda::nf4::dequantize(w, out));
    Ok(())
}
