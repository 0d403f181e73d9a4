//! Every operation once: its maths, its shapes, its checks, and one match on the device.
//!
//! Conventions: activations are `[rows, features]` with `rows = B S`; a weight is `[out, in]` as in PyTorch. Outputs come
//! last. An output is *written* unless its name says *accumulate* or its documentation *added to*: activation gradients
//! are written, parameter gradients are added to. Compute is in the type of the activations (f32; f64 in gradient
//! checks); a weight may be stored in another type and is then decoded tile by tile inside the product.

mod attention;
mod linear;
mod loss;
mod optim;
mod pointwise;
mod rows;

pub use attention::{attention, attention_backward, attention_cached, rope};
pub use linear::{Operand, accumulate_column_sums, linear, linear_backward_input, matmul};
pub use loss::{STATISTICS, head_loss, head_loss_backward};
pub use optim::{AdamW, adamw, sum_of_squares};
pub use pointwise::{
    accumulate_dropout, dropout, gelu, gelu_backward, layer_norm, layer_norm_backward_input,
    layer_norm_backward_parameters,
};
pub use rows::{embedding, embedding_backward, gather_rows, scatter_rows};

use half::{bf16, f16};

use crate::cpu;
use crate::cpu::real::Real;
use crate::error::{Error, Result};
use crate::quant::{Absmax, QuantTensor};
use crate::tensor::{DType, Device, Tensor};

/// Runs `$body` with `$t` bound to the compute type of `$tensor`, on its device.
macro_rules! on_device {
    ($operation:literal, $tensor:expr, $t:ident => $body:expr) => {
        match ($tensor.device(), $tensor.dtype()) {
            (Device::Cpu, DType::F32) => {
                type $t = f32;
                $body
            }
            (Device::Cpu, DType::F64) => {
                type $t = f64;
                $body
            }
            (_, other) => return Err(mismatch($operation, other, "float32 or float64")),
        }
    };
}
use on_device;

/// Runs one pass over the model with everything that computes kept ready, so that many small operations follow each other
/// without waiting.
pub fn pass<R: Send>(device: Device, f: impl FnOnce() -> R + Send) -> R {
    match device {
        Device::Cpu => cpu::parallel::attended(f),
    }
}

/// A weight matrix `[out, in]`, dense or in 4 bits.
#[derive(Debug, Clone, Copy)]
pub enum WeightRef<'a> {
    /// Any floating-point type.
    Dense(&'a Tensor),
    /// 4-bit codes with block scales.
    Quant(&'a QuantTensor),
}

impl WeightRef<'_> {
    /// `(out, in)`.
    pub fn extents(&self) -> (usize, usize) {
        match self {
            WeightRef::Dense(w) => w.shape().rows_and_columns(),
            WeightRef::Quant(w) => w.shape.rows_and_columns(),
        }
    }
}

fn weight<'a, T: Real>(operation: &'static str, w: WeightRef<'a>) -> Result<cpu::weight::Weight<'a, T>> {
    use cpu::weight::{BlockScales, Codes4, Elements};
    let (rows, columns) = w.extents();
    let elements = match w {
        WeightRef::Dense(w) => match w.dtype() {
            own if own == T::DTYPE => Elements::Own(w.as_slice::<T>()),
            DType::F32 => Elements::F32(w.as_slice()),
            DType::F16 => Elements::F16(w.as_slice::<f16>()),
            DType::BF16 => Elements::BF16(w.as_slice::<bf16>()),
            other => {
                return Err(mismatch(
                    operation,
                    other,
                    format!("a weight of type {} or narrower", T::DTYPE),
                ));
            }
        },
        WeightRef::Quant(w) => Elements::Codes4(Codes4 {
            codes: w.codes.as_slice(),
            table: w.table(),
            scales: match &w.absmax {
                Absmax::Flat(absmax) => BlockScales::Flat(absmax.as_slice()),
                Absmax::Nested {
                    codes,
                    nested_absmax,
                    offset,
                    code,
                } => BlockScales::Nested {
                    codes: codes.as_slice(),
                    code: code.as_slice(),
                    nested: nested_absmax.as_slice(),
                    offset: *offset,
                },
            },
        }),
    };
    Ok(cpu::weight::Weight {
        elements,
        rows,
        columns,
    })
}

fn mismatch(operation: &'static str, found: impl ToString, expected: impl ToString) -> Error {
    Error::Shape {
        operation,
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

/// Checks one `(name, tensor, rows, columns)` after the other; all have the type of the first.
fn check(operation: &'static str, tensors: &[(&str, &Tensor, usize, usize)]) -> Result<()> {
    let dtype = tensors.first().map(|t| t.1.dtype());
    for (name, tensor, rows, columns) in tensors {
        if tensor.shape().rows_and_columns() != (*rows, *columns) || Some(tensor.dtype()) != dtype {
            return Err(mismatch(
                operation,
                format!("{name} {} {}", tensor.dtype(), tensor.shape()),
                format!("{name} {} [{rows}, {columns}]", dtype.unwrap_or(DType::F32)),
            ));
        }
    }
    Ok(())
}

fn check_elements(
    operation: &'static str,
    name: &str,
    tensor: &Tensor,
    dtype: DType,
    elements: usize,
) -> Result<()> {
    if tensor.elements() == elements && tensor.dtype() == dtype {
        return Ok(());
    }
    let found = format!("{name} {} {}", tensor.dtype(), tensor.shape());
    Err(mismatch(
        operation,
        found,
        format!("{name} {dtype} of {elements} elements"),
    ))
}

/// Every index lies in `0..bound`.
fn check_indices(operation: &'static str, name: &str, indices: &[i32], bound: usize) -> Result<()> {
    match indices.iter().find(|&&i| i < 0 || i as usize >= bound) {
        None => Ok(()),
        Some(i) => Err(mismatch(
            operation,
            format!("{name} {i}"),
            format!("{name} in 0..{bound}"),
        )),
    }
}
