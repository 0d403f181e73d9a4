//! The weight of a linear, changed as a whole: what PiSSA leaves, what merging makes.

use crate::error::Result;
use crate::nn::{Param, Weight};
use crate::ops;
use crate::quant::{Absmax, RowInt8};
use crate::tensor::{DType, Device, Tensor};

/// A copy in F32 on the host, decoded if it is in few bits.
///
/// # Errors
/// It cannot be copied from the device.
pub(super) fn decoded(weight: &Weight) -> Result<Tensor> {
    let there = weight.on(weight.beside())?;
    match there.as_ref().unwrap_or(weight) {
        Weight::Dense(param) => Ok(param.value.to_device(Device::Cpu)?.to_dtype(DType::F32)),
        Weight::Quant(weight) => Ok(ops::place_quantized((**weight).clone(), Device::Cpu)?.dequantize()),
        Weight::Int8(weight) => Ok(ops::place_int8((**weight).clone(), Device::Cpu)?.dequantize()),
    }
}

/// `w [out, in] += scale * b [out, r] a [r, in]`, all F32 on the host: the same bits for every device.
///
/// # Errors
/// Shapes do not fit.
pub(super) fn add_product(w: &mut Tensor, scale: f64, b: &Tensor, a: &Tensor) -> Result<()> {
    ops::matmul(scale, (b, false), (a, false), 1.0, w)
}

/// Rows of a weight that are changed at once. The kernels of a product round rows at the edge of a cut as they please, so
/// whoever changes a weight in pieces cuts it at multiples of this.
pub(super) const ROWS: usize = 256;

/// `w += scale * b a` for `w [n, in]`, rows of a weight from `first` on (a multiple of [`ROWS`]) in F32 on the host; b
/// `[out, r]` and a `[r, in]` are the factors of the whole weight, in any type of floats.
///
/// # Errors
/// Shapes do not fit.
pub(super) fn add_rows(w: &mut Tensor, first: usize, scale: f64, b: &Tensor, a: &Tensor) -> Result<()> {
    assert!(first.is_multiple_of(ROWS), "rows from {first}");
    let (count, columns) = w.shape().rows_and_columns();
    let a = &a.to_dtype(DType::F32);
    for start in (0..count).step_by(ROWS) {
        let n = ROWS.min(count - start);
        let b = b.rows(first + start..first + start + n).to_dtype(DType::F32);
        if count <= ROWS {
            return add_product(w, scale, &b, a);
        }
        let mut piece = w.rows(start..start + n);
        add_product(&mut piece, scale, &b, a)?;
        w.as_mut_slice::<f32>()[start * columns..(start + n) * columns].copy_from_slice(piece.as_slice());
    }
    Ok(())
}

/// Gives every row of `w`, the rows of a weight from `first` on, the length that `magnitude [out]` says. A row of zeros becomes
/// NaN, as in PEFT, and is refused later.
pub(super) fn stretch_rows(w: &mut Tensor, first: usize, magnitude: &Tensor) {
    let (_, input) = w.shape().rows_and_columns();
    let rows = w.as_mut_slice::<f32>().chunks_exact_mut(input);
    for (row, m) in rows.zip(&magnitude.to_f64_vec()[first..]) {
        let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let factor = m / square.sqrt();
        row.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
    }
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
        Weight::Int8(old) => {
            let device = old.codes.beside();
            Weight::Int8(Box::new(ops::place_int8(RowInt8::quantize(place, new)?, device)?))
        }
    };
    *weight = if waits { new.into_host()? } else { new };
    Ok(())
}
