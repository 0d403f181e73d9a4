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
    match weight {
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

/// Puts `new` (F32, on the host) in the place of `weight`, in the form that this has: its type, or its kind of 4 bits,
/// quantised from the type that it was once quantised from. `place` is what an error names.
///
/// # Errors
/// A number is not finite, or the device has no room.
pub(super) fn replace(weight: &mut Weight, new: &Tensor, place: &str) -> Result<()> {
    *weight = match weight {
        Weight::Dense(Param { value, .. }) => {
            let device = value.device();
            let new = new.to_dtype(value.dtype());
            // Largest numbers of F32 have no place in F16.
            crate::checkpoint::refuse_non_finite(place, &new)?;
            Weight::Dense(Param::frozen(new.into_device(device)?))
        }
        Weight::Quant(old) => {
            let source = match old.source_dtype.is_float() {
                true => new.to_dtype(old.source_dtype),
                false => new.clone(),
            };
            let double_quant = matches!(old.absmax, Absmax::Nested { .. });
            let device = old.codes.device();
            let new = ops::quantize(place, &source, old.quant_type, double_quant, device)?;
            Weight::Quant(Box::new(new))
        }
    };
    Ok(())
}
