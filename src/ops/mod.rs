//! Every operation once: its maths, its shapes, its checks, and one match on the device.
//!
//! Conventions: activations are `[rows, features]` with `rows = B S`; a weight is `[out, in]` as in PyTorch. Outputs come
//! last. An output is *written* unless its name says *accumulate* or its documentation *added to*: activation gradients
//! are written, parameter gradients are added to.
//!
//! Compute is in the type of the activations: on the CPU f32, or f64 in gradient checks; on a CUDA device f32, f16 or
//! bf16. Statistics, norms, biases, adapters and every gradient of a parameter are in the type of sums
//! ([`DType::accumulator`]). On the CPU a weight may be stored in another type and is then decoded tile by tile inside
//! the product; on a device dense weights are of the compute type.
//!
//! Indices (token ids, rows, positions) are checked here on the CPU. On a device they are checked before they are sent
//! there ([`crate::model::Workspace`]); a kernel that meets a wrong one writes NaN.

mod attention;
mod dora;
mod linear;
mod loss;
mod optim;
mod pointwise;
mod prefix;
mod quant;
mod rows;
mod transfer;

pub use attention::{Prefix, PrefixGradients, attention, attention_backward, attention_cached, rope};
pub use dora::{
    accumulate_column_products, accumulate_scaled_columns, dora_gain, row_squares, scale_columns,
};
pub use linear::{
    Adapter, Operand, accumulate_column_sums, linear, linear_adapted, linear_backward_input,
    linear_backward_input_adapted, matmul,
};
pub use loss::{HEAD_CHUNK, HeadRef, HeadScratch, STATISTICS, head_logits, head_loss, head_loss_backward};
pub use optim::{
    AdamW, Adamw8bitSlot, AdamwSlot, BLOCK_8BIT, Lion, LionSlot, Sgd, SgdSlot, Span, adamw, adamw_8bit, lion,
    non_finite, round_into, sgd, sum_of_squares, sum_of_squares_all, sums_of_squares, zero_all,
};
pub use pointwise::{
    accumulate_dropout, accumulate_noise, cast, dropout, dropout_rest, gelu, gelu_backward, layer_norm,
    layer_norm_backward_input, layer_norm_backward_parameters,
};
pub use prefix::{prefix_heads, prefix_heads_backward, tanh, tanh_backward};
pub use quant::{dequantize, place_int8, place_quantized, quantize};
pub use rows::{embedding, embedding_backward, embedding_from_host, gather_rows, scatter_rows};
pub use transfer::{fetch, fetch_range, store, store_range};

use half::{bf16, f16};

use crate::cpu;
use crate::cpu::real::Real;
use crate::error::{Error, Result};
use crate::quant::{Absmax, Order, QuantTensor, RowInt8};
use crate::tensor::{DType, Device, Tensor};

/// Runs `$cpu` with `$t` bound to the compute type of `$tensor`, or `$cuda`, which returns a `Result`, on its device.
macro_rules! on_device {
    ($operation:literal, $tensor:expr, $t:ident => $cpu:expr, cuda => $cuda:expr) => {
        match ($tensor.device(), $tensor.dtype()) {
            (Device::Cpu, DType::F32) => {
                type $t = f32;
                $cpu
            }
            (Device::Cpu, DType::F64) => {
                type $t = f64;
                $cpu
            }
            (Device::Cuda(_), DType::F32 | DType::F16 | DType::BF16) => $cuda?,
            (Device::Cpu, other) => return Err(mismatch($operation, other, "float32 or float64")),
            (Device::Cuda(_), other) => {
                return Err(mismatch($operation, other, "float32, float16 or bfloat16"));
            }
        }
    };
}
use on_device;

/// Runs one pass over the model with everything that computes kept ready, so that many small operations follow each other
/// without waiting.
pub fn pass<R: Send>(device: Device, f: impl FnOnce() -> R + Send) -> R {
    match device {
        Device::Cpu => cpu::parallel::attended(f),
        Device::Cuda(_) => f(),
    }
}

/// A weight matrix `[out, in]`, dense or in few bits.
#[derive(Debug, Clone, Copy)]
pub enum WeightRef<'a> {
    /// Any floating-point type.
    Dense(&'a Tensor),
    /// 4-bit codes with block scales.
    Quant(&'a QuantTensor),
    /// 8-bit codes with a scale for each row.
    Int8(&'a RowInt8),
}

impl WeightRef<'_> {
    /// `(out, in)`.
    pub fn extents(&self) -> (usize, usize) {
        match self {
            WeightRef::Dense(w) => w.shape().rows_and_columns(),
            WeightRef::Quant(w) => w.shape.rows_and_columns(),
            WeightRef::Int8(w) => w.shape().rows_and_columns(),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        self.tensor().device()
    }

    fn tensor(&self) -> &Tensor {
        match self {
            WeightRef::Dense(w) => w,
            WeightRef::Quant(w) => &w.codes,
            WeightRef::Int8(w) => &w.codes,
        }
    }

    fn check_device(&self, operation: &'static str, device: Device) -> Result<()> {
        check_device(operation, "weight", self.tensor(), device)
    }
}

fn weight<'a, T: Real>(operation: &'static str, w: WeightRef<'a>) -> Result<cpu::weight::Weight<'a, T>> {
    use cpu::weight::{BlockScales, Codes4, Codes8, Elements};
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
        WeightRef::Quant(w) if w.order != Order::Rows => {
            return Err(mismatch(
                operation,
                "4-bit codes in the order of a device",
                "that of rows",
            ));
        }
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
        WeightRef::Int8(w) => Elements::Codes8(Codes8 {
            codes: bytemuck::cast_slice(w.codes.bytes()),
            scales: w.scales.as_slice(),
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

/// Checks one `(name, tensor, rows, columns)` after the other; all have the type and the device of the first.
fn check(operation: &'static str, tensors: &[(&str, &Tensor, usize, usize)]) -> Result<()> {
    let Some((_, first, ..)) = tensors.first() else {
        return Ok(());
    };
    let (dtype, device) = (first.dtype(), first.device());
    for (name, tensor, rows, columns) in tensors {
        if tensor.shape().rows_and_columns() != (*rows, *columns) || tensor.dtype() != dtype {
            return Err(mismatch(
                operation,
                format!("{name} {} {}", tensor.dtype(), tensor.shape()),
                format!("{name} {dtype} [{rows}, {columns}]"),
            ));
        }
        check_device(operation, name, tensor, device)?;
    }
    Ok(())
}

fn check_device(operation: &'static str, name: &str, tensor: &Tensor, device: Device) -> Result<()> {
    if tensor.device() == device {
        return Ok(());
    }
    let found = format!("{name} on {}", tensor.device());
    Err(mismatch(operation, found, format!("{name} on {device}")))
}

/// [`check`] of one tensor of the type of sums, beside `of` of the compute type.
fn check_sums(
    operation: &'static str,
    name: &str,
    tensor: &Tensor,
    elements: usize,
    of: &Tensor,
) -> Result<()> {
    check_device(operation, name, tensor, of.device())?;
    check_elements(operation, name, tensor, of.dtype().accumulator(), elements)
}

/// [`check`] of one tensor of indices, beside `of` of the compute type.
fn check_index_tensor(
    operation: &'static str,
    name: &str,
    tensor: &Tensor,
    elements: usize,
    of: &Tensor,
) -> Result<()> {
    check_device(operation, name, tensor, of.device())?;
    check_elements(operation, name, tensor, DType::I32, elements)
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

/// Every index lies in `0..bound`; not checked on a device.
fn check_indices(operation: &'static str, name: &str, indices: &Tensor, bound: usize) -> Result<()> {
    if indices.device() != Device::Cpu {
        return Ok(());
    }
    match indices
        .as_slice::<i32>()
        .iter()
        .find(|&&i| i < 0 || i as usize >= bound)
    {
        None => Ok(()),
        Some(i) => Err(mismatch(
            operation,
            format!("{name} {i}"),
            format!("{name} in 0..{bound}"),
        )),
    }
}
