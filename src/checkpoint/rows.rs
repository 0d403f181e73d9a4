//! Linears in whole numbers with a scale for each row, as THUDM and bitsandbytes store them.
//!
//! | layout | `M.weight` | scale of a row | w |
//! |---|---|---|---|
//! | THUDM int8 | int8 `[out, in]` | `M.weight_scale` `[out]` | `q * weight_scale` |
//! | THUDM int4 | int8 `[out, in / 2]`, the even column in the high nibble | `M.weight_scale` `[out]` | `q * weight_scale` |
//! | bitsandbytes, 8 bits | int8 `[out, in]` | `M.SCB` `[out]` | `q * SCB / 127` |
//!
//! These are the numbers that the weights stand for: THUDM's code rounds them to float16, bitsandbytes' rounds activations to 8
//! bits as well.

use super::{Checkpoint, Stored, refuse_non_finite};
use crate::error::{Error, Result};
use crate::model::config::RowScaled;
use crate::quant::{QuantTensor, RowInt8};
use crate::tensor::{DType, Shape};

/// 1 / 127 as bitsandbytes has it.
const SCB_UNIT: f32 = 7.874_016e-3;

const REMEDY: &str = "download the checkpoint again, all of it from one repository";

impl RowScaled {
    /// What stands in the place of `.weight` in the name of the scales.
    pub(super) fn scale_suffix(self) -> &'static str {
        match self {
            RowScaled::ThudmInt8 | RowScaled::ThudmInt4 => ".weight_scale",
            RowScaled::BnbInt8 => ".SCB",
        }
    }

    /// The shape of the codes of a weight.
    pub(super) fn codes(self, weight: Shape) -> Shape {
        let (out, input) = weight.rows_and_columns();
        match self {
            RowScaled::ThudmInt8 | RowScaled::BnbInt8 => Shape::new(&[out, input]),
            RowScaled::ThudmInt4 => Shape::new(&[out, input / 2]),
        }
    }
}

/// The name of the scales of the weight `name`.
pub(super) fn scales_of(name: &str, suffix: &str) -> String {
    format!("{}{suffix}", name.strip_suffix(".weight").unwrap_or(name))
}

/// The weight `name` of the extents `shape`, stored as `form`; its codes are used in place.
///
/// # Errors
/// Codes or scales are missing, have another type or size, or a scale is not finite.
pub(super) fn read(checkpoint: &Checkpoint, name: &str, form: RowScaled, shape: Shape) -> Result<Stored> {
    let (rows, _) = shape.rows_and_columns();
    expect(
        checkpoint,
        name,
        form.codes(shape),
        &|dtype| dtype == DType::I8,
        "int8",
    )?;
    let scales_name = scales_of(name, form.scale_suffix());
    let scales = checkpoint.tensor(&scales_name)?;
    expect(
        checkpoint,
        &scales_name,
        Shape::new(&[rows]),
        &DType::is_float,
        "floats",
    )?;
    let place = checkpoint.place(&scales_name);
    refuse_non_finite(&place, &scales)?;
    let mut scales = scales.to_dtype(DType::F32);
    if form == RowScaled::BnbInt8 {
        check_format(checkpoint, name)?;
        scales
            .as_mut_slice::<f32>()
            .iter_mut()
            .for_each(|scale| *scale *= SCB_UNIT);
    }
    let source_dtype = checkpoint.config().torch_dtype;
    let codes = checkpoint.bytes_of(name, form.codes(shape))?;
    let place = checkpoint.place(name);
    Ok(match form {
        RowScaled::ThudmInt4 => Stored::Quant(QuantTensor::from_int4_rows(
            &place,
            codes,
            &scales,
            shape,
            source_dtype,
        )?),
        RowScaled::ThudmInt8 | RowScaled::BnbInt8 => Stored::Int8(RowInt8 {
            codes,
            scales,
            source_dtype,
        }),
    })
}

fn expect(
    checkpoint: &Checkpoint,
    name: &str,
    shape: Shape,
    right: &dyn Fn(DType) -> bool,
    types: &str,
) -> Result<()> {
    let found = checkpoint.dtype(name).zip(checkpoint.shape(name));
    match found {
        Some((dtype, found)) if right(dtype) && found == shape => Ok(()),
        Some((dtype, found)) => {
            let expected = format!("{types} {shape}");
            Err(Error::input(
                checkpoint.place(name),
                format!("{dtype} {found}"),
                expected,
                REMEDY,
            ))
        }
        None => checkpoint.tensor(name).map(|_| ()),
    }
}

/// bitsandbytes' `weight_format` is 0 for codes in the order of rows; others were those of single kernels.
fn check_format(checkpoint: &Checkpoint, name: &str) -> Result<()> {
    let key = scales_of(name, ".weight_format");
    if !checkpoint.contains(&key) {
        return Ok(());
    }
    let format = checkpoint.tensor(&key)?;
    match format.bytes() {
        [0] => Ok(()),
        other => {
            let found = format!("weight_format {other:?}");
            let remedy = "save the model again with a newer bitsandbytes, or use the fp16 checkpoint";
            Err(Error::input(
                checkpoint.place(&key),
                found,
                "0, codes in the order of rows",
                remedy,
            ))
        }
    }
}
