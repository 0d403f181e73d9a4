//! Launches of `cuda/dora.cu`: DoRA.

use std::ptr;

use super::sys::{DoraGain, GLM_DORA_THREADS, RowSquares, ScaleColumns};
use super::{Grid, blocks, launch, launch_named, ordinal, size};
use crate::error::Result;
use crate::tensor::Tensor;

/// As [`crate::ops::row_squares`], of a dense weight.
pub(crate) fn row_squares(w: &Tensor, squares: &mut Tensor) -> Result<()> {
    let operation = "row_squares";
    let (n, k) = w.shape().rows_and_columns();
    let grid = Grid {
        blocks: [size(operation, n)?.cast_unsigned(), 1, 1],
        threads: GLM_DORA_THREADS,
        // What block_sum asks for.
        shared_bytes: 32 * size_of::<f32>() as u32,
    };
    let params = RowSquares {
        squares: squares.device_ptr_mut().cast(),
        w: w.device_ptr(),
        n: size(operation, n)?.cast_unsigned(),
        k: size(operation, k)?.cast_unsigned(),
    };
    // SAFETY: ops has checked that there are n squares of f32 on the device of w.
    unsafe { launch(ordinal(w), operation, w.dtype(), grid, &params) }
}

/// As [`crate::ops::dora_gain`].
pub(crate) fn gain(
    magnitude: &Tensor,
    squares: &Tensor,
    b: &Tensor,
    (p, q): (&Tensor, &Tensor),
    s: f64,
    (gain, inverse): (&mut Tensor, &mut Tensor),
) -> Result<()> {
    let operation = "dora_gain";
    let (n, r) = b.shape().rows_and_columns();
    let grid = Grid {
        blocks: [blocks(operation, n, GLM_DORA_THREADS as usize)?, 1, 1],
        threads: GLM_DORA_THREADS,
        shared_bytes: 0,
    };
    let params = DoraGain {
        gain: gain.device_ptr_mut().cast(),
        inverse: inverse.device_ptr_mut().cast(),
        magnitude: magnitude.device_ptr().cast(),
        squares: squares.device_ptr().cast(),
        b: b.device_ptr().cast(),
        p: p.device_ptr().cast(),
        q: q.device_ptr().cast(),
        n: size(operation, n)?.cast_unsigned(),
        r: size(operation, r)?.cast_unsigned(),
        s: s as f32,
        reserved: 0,
    };
    // SAFETY: ops has checked that all are f32 of these extents on one device.
    unsafe { launch_named(ordinal(b), operation, operation, grid, &params) }
}

/// As [`crate::ops::scale_columns`], or [`crate::ops::accumulate_scaled_columns`].
pub(crate) fn scale_columns(
    x: &Tensor,
    gain: &Tensor,
    shift: f64,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    accumulate: bool,
    y: &mut Tensor,
) -> Result<()> {
    let operation = "scale_columns";
    let (m, n) = x.shape().rows_and_columns();
    let strip = GLM_DORA_THREADS as usize * 16 / x.dtype().size();
    let grid = Grid {
        blocks: [
            size(operation, m)?.cast_unsigned(),
            blocks(operation, n, strip)?,
            1,
        ],
        threads: GLM_DORA_THREADS,
        shared_bytes: 0,
    };
    let params = ScaleColumns {
        y: y.device_ptr_mut(),
        x: x.device_ptr(),
        gain: gain.device_ptr().cast(),
        bias: bias.map_or(ptr::null(), |bias| bias.device_ptr().cast()),
        residual: residual.map_or(ptr::null(), |(_, residual)| residual.device_ptr()),
        m: size(operation, m)?.cast_unsigned(),
        n: size(operation, n)?.cast_unsigned(),
        shift: shift as f32,
        alpha: residual.map_or(0.0, |(alpha, _)| alpha as f32),
        accumulate: accumulate.into(),
        reserved: 0,
    };
    // SAFETY: ops has checked shapes, types and devices against x.
    unsafe { launch(ordinal(x), operation, x.dtype(), grid, &params) }
}
