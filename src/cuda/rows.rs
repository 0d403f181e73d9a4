//! Launches of `cuda/rows.cu`: rows of matrices by number.

use super::sys::{EmbeddingBackward, GLM_ROWS_THREADS, GatherRows, ScatterRows};
use super::{Grid, blocks, launch, ordinal, size};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// A block for each of `rows` rows and each strip of their `n` columns, a thread for 16 bytes of `dtype`.
fn strips_of_rows(operation: &'static str, rows: usize, n: usize, dtype: DType) -> Result<Grid> {
    let strip = GLM_ROWS_THREADS as usize * 16 / dtype.size();
    Ok(Grid {
        blocks: [
            size(operation, rows)?.cast_unsigned(),
            blocks(operation, n, strip)?,
            1,
        ],
        threads: GLM_ROWS_THREADS,
        // One word for each warp, where a block looks for its row.
        shared_bytes: GLM_ROWS_THREADS / 32 * 4,
    })
}

/// As [`crate::ops::embedding`], of a weight in the compute type, or in f32 when it trains.
pub(crate) fn embedding(w: &Tensor, ids: &Tensor, y: &mut Tensor) -> Result<()> {
    if w.dtype() == y.dtype() {
        return gather("embedding", "gather_rows", w, ids, y);
    }
    if w.dtype() == DType::F32 {
        return gather("embedding", "gather_rounded", w, ids, y);
    }
    Err(Error::Shape {
        operation: "embedding",
        found: format!("w {}", w.dtype()),
        expected: format!("w {}, the compute type of this device, or float32", y.dtype()),
    })
}

/// As [`crate::ops::gather_rows`].
pub(crate) fn gather_rows(x: &Tensor, rows: &Tensor, y: &mut Tensor) -> Result<()> {
    gather("gather_rows", "gather_rows", x, rows, y)
}

fn gather(
    operation: &'static str,
    kernel: &'static str,
    x: &Tensor,
    rows: &Tensor,
    y: &mut Tensor,
) -> Result<()> {
    let (m, n) = x.shape().rows_and_columns();
    let params = GatherRows {
        y: y.device_ptr_mut(),
        x: x.device_ptr(),
        rows: rows.device_ptr().cast(),
        r: size(operation, rows.elements())?.cast_unsigned(),
        m: size(operation, m)?.cast_unsigned(),
        n: size(operation, n)?.cast_unsigned(),
        reserved: 0,
    };
    let grid = strips_of_rows(operation, rows.elements(), n, y.dtype())?;
    // SAFETY: ops has checked that y has a row for each number, and all devices; x is of the type that the kernel takes; a
    // number outside x is not read from it.
    unsafe { launch(ordinal(x), kernel, y.dtype(), grid, &params) }
}

/// As [`crate::ops::scatter_rows`].
pub(crate) fn scatter_rows(x: &Tensor, rows: &Tensor, y: &mut Tensor) -> Result<()> {
    let operation = "scatter_rows";
    let (m, n) = y.shape().rows_and_columns();
    let params = ScatterRows {
        y: y.device_ptr_mut(),
        x: x.device_ptr().cast(),
        rows: rows.device_ptr().cast(),
        r: size(operation, rows.elements())?.cast_unsigned(),
        m: size(operation, m)?.cast_unsigned(),
        n: size(operation, n)?.cast_unsigned(),
        reserved: 0,
    };
    let grid = strips_of_rows(operation, m, n, y.dtype())?;
    // SAFETY: ops has checked that x has a row for each number, and all types and devices.
    unsafe { launch(ordinal(y), operation, y.dtype(), grid, &params) }
}

/// As [`crate::ops::embedding_backward`].
pub(crate) fn embedding_backward(dy: &Tensor, ids: &Tensor, dw: &mut Tensor) -> Result<()> {
    let operation = "embedding_backward";
    let (v, n) = dw.shape().rows_and_columns();
    let params = EmbeddingBackward {
        dw: dw.device_ptr_mut().cast(),
        dy: dy.device_ptr(),
        ids: ids.device_ptr().cast(),
        m: size(operation, ids.elements())?.cast_unsigned(),
        v: size(operation, v)?.cast_unsigned(),
        n: size(operation, n)?.cast_unsigned(),
        reserved: 0,
    };
    let grid = strips_of_rows(operation, ids.elements(), n, dy.dtype())?;
    // SAFETY: ops has checked that dy has a row for each id, and all types and devices; an id outside dw is passed over.
    unsafe { launch(ordinal(dy), operation, dy.dtype(), grid, &params) }
}
