//! The weight of a linear, changed as a whole: what PiSSA leaves, what merging makes.

use crate::error::Result;
use crate::nn::{Param, Weight};
use crate::ops;
use crate::quant::Absmax;
use crate::tensor::{DType, Device, Tensor};

/// A copy in F32 on the host, decoded if it is in 4 bits.
///
/// # Errors
/// It cannot be copied from the device.
pub(super) fn decoded(weight: &Weight) -> Result<Tensor> {
    let there = weight.on(weight.beside())?;
    match there.as_ref().unwrap_or(weight) {
        Weight::Dense(param) => Ok(param.value.to_device(Device::Cpu)?.to_dtype(DType::F32)),
        Weight::Quant(weight) => Ok(ops::place_quantized((**weight).clone(), Device::Cpu)?.dequantize()),
    }
}

/// `w [out, in] += scale * b [out, r] a [r, in]`, all F32 on the host: the same bits for every device.
///
/// # Errors
/// Shapes do not fit.
pub(super) fn add_product(w: &mut Tensor, scale: f64, b: &Tensor, a: &Tensor) -> Result<()> {
    ops::matmul(scale, (b, false), (a, false), 1.0, w)
}

/// Puts `new` (F32, on the host) in the place of `weight`, where that lies and in the form that it has: its type, or its kind of 4
/// bits, quantised from the type that it was once quantised from. `place` is what an error names.
///
/// # Errors
/// A number is not finite, or the device has no room.
pub(super) fn replace(weight: &mut Weight, new: &Tensor, place: &str) -> Result<()> {
    let waits = weight.waits();
    let new = match weight {
        Weight::Dense(Param { value, .. }) => {
            let new = new.to_dtype(value.dtype());
            // Largest numbers of F32 have no place in F16.
            if !new.is_planned() {
                crate::checkpoint::refuse_non_finite(place, &new)?;
            }
            Weight::Dense(Param::frozen(new.into_device(value.beside())?))
        }
        Weight::Quant(old) => {
            let source = match old.source_dtype.is_float() {
                true => new.to_dtype(old.source_dtype),
                false => new.clone(),
            };
            let double_quant = matches!(old.absmax, Absmax::Nested { .. });
            let device = old.codes.beside();
            let new = ops::quantize(place, &source, old.quant_type, double_quant, device)?;
            Weight::Quant(Box::new(new))
        }
    };
    *weight = if waits { new.into_host()? } else { new };
    Ok(())
}
