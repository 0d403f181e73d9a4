//! Weights in few bits: quantising, on their way to a device and back, decoding.

use super::{WeightRef, check_device, check_elements, mismatch, on_device, weight};
use crate::cuda;
use crate::error::Result;
use crate::quant::{Order, QuantTensor, QuantType, RowInt8};
use crate::tensor::{DType, Device, Tensor};
use std::ops::Range;

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
        // Something is not finite: below, the CPU says what and where. Or the code has scales of rows, which it alone makes.
    }
    let host = source.to_device(Device::Cpu)?;
    place_quantized(
        QuantTensor::quantize_named(place, &host, quant_type, double_quant)?,
        device,
    )
}

/// `weight` on `device`: on the CPU in the order of rows, and mapped where it was mapped; on a CUDA device in the order that
/// the kernels read.
///
/// # Errors
/// The device has no room, or no kernel for the shape; the weight waits in host memory in the order of a device.
pub fn place_quantized(weight: QuantTensor, device: Device) -> Result<QuantTensor> {
    match (weight.order, weight.codes.device(), device) {
        (Order::Rows, Device::Cpu, Device::Cpu) => Ok(weight),
        (Order::Rows, Device::Cpu, Device::Cuda(ordinal)) => cuda::nf4::place(&weight, ordinal),
        (Order::Groups, Device::Cpu, _) => {
            let found = "codes of the host in the order of a device";
            Err(mismatch("place_quantized", found, "that of rows"))
        }
        (Order::Groups, from, to) if from == to => Ok(weight),
        _ => place_quantized(cuda::nf4::fetch(&weight)?, device),
    }
}

/// `weight` on `device`.
///
/// # Errors
/// The device has no room, or a copy fails.
pub fn place_int8(weight: RowInt8, device: Device) -> Result<RowInt8> {
    Ok(RowInt8 {
        codes: weight.codes.into_device(device)?,
        scales: weight.scales.into_device(device)?,
        ..weight
    })
}

/// `out [rows, K]`: these rows of a weight `[N, K]` in few bits, `table[code] * absmax` or `code * scale`, rounded once to out's
/// type. Rows of a 4-bit weight on a device begin at multiples of 32.
///
/// # Errors
/// Shapes, types or devices do not fit.
pub fn dequantize(w: WeightRef<'_>, rows: Range<usize>, out: &mut Tensor) -> Result<()> {
    let (n, k) = w.extents();
    if rows.end > n || rows.start > rows.end {
        return Err(mismatch(
            "dequantize",
            format!("rows {rows:?}"),
            format!("rows in 0..{n}"),
        ));
    }
    check_elements("dequantize", "out", out, out.dtype(), rows.len() * k)?;
    check_device("dequantize", "out", out, w.device())?;
    on_device!("dequantize", out, T => {
        weight::<T>("dequantize", w)?.decode(rows, 0..k, out.as_mut_slice());
    }, cuda => match w {
        WeightRef::Quant(w) => cuda::nf4::dequantize(w, rows, out),
        WeightRef::Int8(w) => cuda::int8::dequantize(w, rows, out),
        WeightRef::Dense(w) => Err(mismatch("dequantize", format!("a weight of {}", w.dtype()), "one in few bits")),
    });
    Ok(())
}
