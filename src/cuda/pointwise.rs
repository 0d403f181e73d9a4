//! Launches of `cuda/pointwise.cu`: elementwise functions.

use std::ops::Range;

use super::sys::{
    Cast, Dropout, GLM_DROPOUT_ACCUMULATE, GLM_DROPOUT_REST, GLM_DROPOUT_WRITE, GLM_POINTWISE_THREADS,
    GeluBackward, GeluForward, Noise, Rope,
};
use super::{Grid, blocks, launch, launch_named, ordinal, size};
use crate::error::{Error, Result};
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

/// One thread for every 16 bytes of a tensor like `x`.
fn a_thread_for_16_bytes(operation: &'static str, x: &Tensor) -> Result<Grid> {
    a_thread_for_16_bytes_of(operation, x.elements(), x.dtype())
}

/// One thread for every 16 bytes of `elements` elements.
fn a_thread_for_16_bytes_of(operation: &'static str, elements: usize, dtype: DType) -> Result<Grid> {
    let per_block = GLM_POINTWISE_THREADS as usize * 16 / dtype.size();
    Ok(Grid {
        blocks: [blocks(operation, elements, per_block)?, 1, 1],
        threads: GLM_POINTWISE_THREADS,
        shared_bytes: 0,
    })
}

/// As [`crate::ops::gelu`].
pub(crate) fn gelu(x: &Tensor, y: &mut Tensor) -> Result<()> {
    let grid = a_thread_for_16_bytes("gelu_forward", x)?;
    let params = GeluForward {
        y: y.device_ptr_mut(),
        x: x.device_ptr(),
        n: x.elements() as u64,
    };
    // SAFETY: ops has checked that both have n elements of one type on one device.
    unsafe { launch(ordinal(x), "gelu_forward", x.dtype(), grid, &params) }
}

/// As [`crate::ops::gelu_backward`].
pub(crate) fn gelu_backward(x: &Tensor, d: &mut Tensor) -> Result<()> {
    let grid = a_thread_for_16_bytes("gelu_backward", x)?;
    let params = GeluBackward {
        d: d.device_ptr_mut(),
        x: x.device_ptr(),
        n: x.elements() as u64,
    };
    // SAFETY: ops has checked that both have n elements of one type on one device.
    unsafe { launch(ordinal(x), "gelu_backward", x.dtype(), grid, &params) }
}

/// As [`crate::ops::dropout`], or [`crate::ops::accumulate_dropout`].
pub(crate) fn dropout(x: &Tensor, p: f32, stream: Stream, accumulate: bool, y: &mut Tensor) -> Result<()> {
    let then = if accumulate {
        GLM_DROPOUT_ACCUMULATE
    } else {
        GLM_DROPOUT_WRITE
    };
    drop_out(x, p, stream, then, y)
}

/// As [`crate::ops::dropout_rest`].
pub(crate) fn dropout_rest(x: &Tensor, p: f32, stream: Stream, y: &mut Tensor) -> Result<()> {
    drop_out(x, p, stream, GLM_DROPOUT_REST, y)
}

fn drop_out(x: &Tensor, p: f32, stream: Stream, then: u32, y: &mut Tensor) -> Result<()> {
    let grid = a_thread_for_16_bytes("dropout", x)?;
    let params = Dropout {
        y: y.device_ptr_mut(),
        x: x.device_ptr(),
        n: x.elements() as u64,
        seed: stream.seed(),
        stream: stream.stream(),
        p,
        scale: (1.0 / (1.0 - f64::from(p))) as f32,
        then,
        reserved: 0,
    };
    // SAFETY: ops has checked that both have n elements of one type on one device.
    unsafe { launch(ordinal(x), "dropout", x.dtype(), grid, &params) }
}

/// As [`crate::ops::accumulate_noise`].
pub(crate) fn accumulate_noise(bound: f64, stream: Stream, y: &mut Tensor) -> Result<()> {
    let grid = a_thread_for_16_bytes("noise", y)?;
    let params = Noise {
        y: y.device_ptr_mut(),
        n: y.elements() as u64,
        seed: stream.seed(),
        stream: stream.stream(),
        bound: bound as f32,
        reserved: 0,
    };
    // SAFETY: y has n elements on its device.
    unsafe { launch(ordinal(y), "noise", y.dtype(), grid, &params) }
}

/// As [`crate::ops::cast`], between two different types.
pub(crate) fn cast(x: &Tensor, y: &mut Tensor) -> Result<()> {
    let suffix = |tensor: &Tensor| match tensor.dtype() {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => Err(Error::Shape {
            operation: "cast",
            found: other.to_string(),
            expected: "float32, float16 or bfloat16".into(),
        }),
    };
    let kernel = format!("cast_{}_{}", suffix(x)?, suffix(y)?);
    let narrow = if x.dtype().size() < y.dtype().size() {
        x
    } else {
        &*y
    };
    let grid = a_thread_for_16_bytes("cast", narrow)?;
    let params = Cast {
        y: y.device_ptr_mut(),
        x: x.device_ptr(),
        n: x.elements() as u64,
    };
    // SAFETY: ops has checked that both have n elements on one device; the kernel is that of their types.
    unsafe { launch_named(ordinal(x), "cast", &kernel, grid, &params) }
}

/// As [`crate::ops::round_into`], into F16 or BF16.
pub(crate) fn round_into(from: &Tensor, range: Range<usize>, to: &mut Tensor, at: usize) -> Result<()> {
    let kernel = match to.dtype() {
        DType::F16 => "cast_f32_f16",
        _ => "cast_f32_bf16",
    };
    let grid = a_thread_for_16_bytes_of("round_into", range.len(), to.dtype())?;
    let params = Cast {
        y: to.device_ptr_mut().wrapping_byte_add(at * to.dtype().size()),
        x: from
            .device_ptr()
            .wrapping_byte_add(range.start * size_of::<f32>()),
        n: range.len() as u64,
    };
    // SAFETY: ops has checked the types, that both lie on one device, and that the ranges lie within them.
    unsafe { launch_named(ordinal(from), "round_into", kernel, grid, &params) }
}

/// As [`crate::ops::rope`].
pub(crate) fn rope(
    qkv: &mut Tensor,
    positions: &Tensor,
    tables: &Tensor,
    heads: usize,
    inverse: bool,
) -> Result<()> {
    let (m, width) = qkv.shape().rows_and_columns();
    let m = size("rope", m)?.cast_unsigned();
    let grid = Grid {
        blocks: [m, 1, 1],
        threads: GLM_POINTWISE_THREADS,
        shared_bytes: 0,
    };
    let params = Rope {
        qkv: qkv.device_ptr_mut(),
        positions: positions.device_ptr().cast(),
        tables: tables.device_ptr().cast(),
        m,
        heads: size("rope", heads)?.cast_unsigned(),
        head_dim: size("rope", width / (3 * heads))?.cast_unsigned(),
        position_count: size("rope", tables.shape().rows_and_columns().0)?.cast_unsigned(),
        sign: if inverse { -1.0 } else { 1.0 },
        reserved: 0,
    };
    // SAFETY: ops has checked the shapes against each other; positions outside the tables are not read from them.
    unsafe { launch(ordinal(qkv), "rope", qkv.dtype(), grid, &params) }
}
