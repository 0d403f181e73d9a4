//! Launches of `cuda/norm.cu`: LayerNorm, and sums over rows.

use super::sys::{
    AddPartials, ColumnProducts, ColumnSums, GLM_COLUMN_THREADS, GLM_NORM_HELD, GLM_NORM_THREADS,
    LayerNormBackwardInput, LayerNormBackwardParameters, LayerNormForward,
};
use super::{Grid, SCRATCH, blocks, check_scratch, device, launch, launch_named, ordinal, size};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Rows that one block of a sum over rows takes at least: fewer would be partial sums without end.
const PART: usize = 64;
/// Parts that the rows are cut into at most.
const PARTS: usize = 64;

/// One block for each row of `x`, which it holds in registers.
fn a_block_for_a_row(operation: &'static str, x: &Tensor) -> Result<Grid> {
    let (m, n) = x.shape().rows_and_columns();
    let (held, most) = (GLM_NORM_HELD as usize, GLM_NORM_THREADS as usize);
    if n > held * most {
        return Err(Error::Shape {
            operation,
            found: format!("rows of {n}"),
            expected: format!("at most {}", held * most),
        });
    }
    let threads = n.div_ceil(held).next_multiple_of(32).max(32);
    Ok(Grid {
        blocks: [size(operation, m)?.cast_unsigned(), 1, 1],
        threads: size(operation, threads)?.cast_unsigned(),
        // What block_sum asks for.
        shared_bytes: 32 * size_of::<f32>() as u32,
    })
}

/// As [`crate::ops::layer_norm`].
pub(crate) fn layer_norm(
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
    eps: f64,
    y: &mut Tensor,
    stats: &mut Tensor,
) -> Result<()> {
    let operation = "layer_norm_forward";
    let (m, n) = x.shape().rows_and_columns();
    let grid = a_block_for_a_row(operation, x)?;
    let params = LayerNormForward {
        y: y.device_ptr_mut(),
        stats: stats.device_ptr_mut().cast(),
        x: x.device_ptr(),
        weight: w.device_ptr().cast(),
        bias: b.device_ptr().cast(),
        m: size(operation, m)?.cast_unsigned(),
        n: size(operation, n)?.cast_unsigned(),
        eps: eps as f32,
        reserved: 0,
    };
    // SAFETY: ops has checked shapes, types and devices against x.
    unsafe { launch(ordinal(x), operation, x.dtype(), grid, &params) }
}

/// As [`crate::ops::layer_norm_backward_input`].
pub(crate) fn layer_norm_backward_input(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    stats: &Tensor,
    dx: &mut Tensor,
) -> Result<()> {
    let operation = "layer_norm_backward_input";
    let (m, n) = x.shape().rows_and_columns();
    let grid = a_block_for_a_row(operation, x)?;
    let params = LayerNormBackwardInput {
        dx: dx.device_ptr_mut(),
        dy: dy.device_ptr(),
        x: x.device_ptr(),
        weight: w.device_ptr().cast(),
        stats: stats.device_ptr().cast(),
        m: size(operation, m)?.cast_unsigned(),
        n: size(operation, n)?.cast_unsigned(),
    };
    // SAFETY: ops has checked shapes, types and devices against x.
    unsafe { launch(ordinal(x), operation, x.dtype(), grid, &params) }
}

/// How a sum over the rows of a matrix is cut: by its size alone, so that every device adds in the same order.
struct Parts {
    rows: u32,
    count: u32,
    grid: Grid,
}

/// The cut for `outputs` sums of the columns of `x`.
fn parts(operation: &'static str, x: &Tensor, outputs: usize) -> Result<Parts> {
    let (m, n) = x.shape().rows_and_columns();
    let bytes = outputs * n * size_of::<f32>();
    check_scratch(operation, bytes)?;
    let most = PARTS.min(SCRATCH / bytes.max(1));
    let rows = m.div_ceil(most).max(PART);
    let strip = 32 * 16 / x.dtype().size();
    let warps = GLM_COLUMN_THREADS as usize / 32;
    let count = blocks(operation, m, rows)?;
    Ok(Parts {
        rows: size(operation, rows)?.cast_unsigned(),
        count,
        grid: Grid {
            blocks: [blocks(operation, n, strip)?, count, 1],
            threads: GLM_COLUMN_THREADS,
            shared_bytes: (warps * outputs * strip * size_of::<f32>()) as u32,
        },
    })
}

/// The grid that adds partial sums to `outputs` rows of `n`.
fn a_thread_for_a_column(operation: &'static str, n: usize, outputs: u32) -> Result<Grid> {
    Ok(Grid {
        blocks: [blocks(operation, n, GLM_COLUMN_THREADS as usize)?, outputs, 1],
        threads: GLM_COLUMN_THREADS,
        shared_bytes: 0,
    })
}

/// As [`crate::ops::layer_norm_backward_parameters`].
pub(crate) fn layer_norm_backward_parameters(
    dy: &Tensor,
    x: &Tensor,
    stats: &Tensor,
    dw: &mut Tensor,
    db: &mut Tensor,
) -> Result<()> {
    let operation = "layer_norm_backward_parameters";
    let (m, n) = x.shape().rows_and_columns();
    let parts = parts(operation, x, 2)?;
    let scratch = device(ordinal(x))?.scratch()?;
    let params = LayerNormBackwardParameters {
        partials: scratch.pointer().cast(),
        dy: dy.device_ptr(),
        x: x.device_ptr(),
        stats: stats.device_ptr().cast(),
        m: size(operation, m)?.cast_unsigned(),
        n: size(operation, n)?.cast_unsigned(),
        rows_per_part: parts.rows,
        reserved: 0,
    };
    let sums = AddPartials {
        first: dw.device_ptr_mut().cast(),
        second: db.device_ptr_mut().cast(),
        partials: params.partials,
        n: params.n,
        parts: parts.count,
    };
    let columns = a_thread_for_a_column(operation, n, 2)?;
    // SAFETY: ops has checked shapes, types and devices against x; `parts` that the partial sums fit the scratch memory.
    unsafe {
        launch(ordinal(x), operation, x.dtype(), parts.grid, &params)?;
        launch_named(ordinal(x), operation, "add_partials", columns, &sums)
    }
}

/// As [`crate::ops::accumulate_column_sums`].
pub(crate) fn accumulate_column_sums(dy: &Tensor, db: &mut Tensor) -> Result<()> {
    let operation = "column_sums";
    let (m, n) = dy.shape().rows_and_columns();
    let parts = parts(operation, dy, 1)?;
    let scratch = device(ordinal(dy))?.scratch()?;
    let params = ColumnSums {
        partials: scratch.pointer().cast(),
        dy: dy.device_ptr(),
        m: size(operation, m)?.cast_unsigned(),
        n: size(operation, n)?.cast_unsigned(),
        rows_per_part: parts.rows,
        reserved: 0,
    };
    let sums = AddPartials {
        first: db.device_ptr_mut().cast(),
        second: std::ptr::null_mut(),
        partials: params.partials,
        n: params.n,
        parts: parts.count,
    };
    let columns = a_thread_for_a_column(operation, n, 1)?;
    // SAFETY: ops has checked shape, type and device of db; `parts` that the partial sums fit the scratch memory.
    unsafe {
        launch(ordinal(dy), operation, dy.dtype(), parts.grid, &params)?;
        launch_named(ordinal(dy), operation, "add_partials", columns, &sums)
    }
}

/// As [`crate::ops::accumulate_column_products`].
pub(crate) fn accumulate_column_products(
    x: &Tensor,
    y: &Tensor,
    factor: &Tensor,
    d: &mut Tensor,
) -> Result<()> {
    let operation = "column_products";
    let (m, n) = x.shape().rows_and_columns();
    let parts = parts(operation, x, 1)?;
    let scratch = device(ordinal(x))?.scratch()?;
    let params = ColumnProducts {
        partials: scratch.pointer().cast(),
        x: x.device_ptr(),
        y: y.device_ptr(),
        factor: factor.device_ptr().cast(),
        m: size(operation, m)?.cast_unsigned(),
        n: size(operation, n)?.cast_unsigned(),
        rows_per_part: parts.rows,
        reserved: 0,
    };
    let sums = AddPartials {
        first: d.device_ptr_mut().cast(),
        second: std::ptr::null_mut(),
        partials: params.partials,
        n: params.n,
        parts: parts.count,
    };
    let columns = a_thread_for_a_column(operation, n, 1)?;
    // SAFETY: ops has checked shapes, types and devices against x; `parts` that the partial sums fit the scratch memory.
    unsafe {
        launch(ordinal(x), operation, x.dtype(), parts.grid, &params)?;
        launch_named(ordinal(x), operation, "add_partials", columns, &sums)
    }
}
