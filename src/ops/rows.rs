//! Rows of matrices by number: embeddings, labelled rows.

use super::{WeightRef, check, check_elements, check_indices, mismatch, on_device, weight};
use crate::cpu;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// `y [M, N] = w[ids]`, from an embedding `w [V, N]` of any floating-point type.
///
/// # Errors
/// Shapes or types do not fit, or an id lies outside the vocabulary.
pub fn embedding(w: &Tensor, ids: &Tensor, y: &mut Tensor) -> Result<()> {
    let (v, n) = w.shape().rows_and_columns();
    check_elements("embedding", "y", y, y.dtype(), ids.elements() * n)?;
    check_elements("embedding", "ids", ids, DType::I32, ids.elements())?;
    check_indices("embedding", "token id", ids.as_slice(), v)?;
    on_device!("embedding", y, T => {
        cpu::embedding::gather::<T>(weight("embedding", WeightRef::Dense(w))?, ids.as_slice(), y.as_mut_slice());
    });
    Ok(())
}

/// The gradient of [`embedding`]: `dw[ids] += dy`.
///
/// # Errors
/// Shapes or types do not fit, or an id lies outside the vocabulary.
pub fn embedding_backward(dy: &Tensor, ids: &Tensor, dw: &mut Tensor) -> Result<()> {
    let (v, n) = dw.shape().rows_and_columns();
    check(
        "embedding_backward",
        &[("dy", dy, ids.elements(), n), ("dw", dw, v, n)],
    )?;
    check_indices("embedding_backward", "token id", ids.as_slice(), v)?;
    on_device!("embedding_backward", dy, T => {
        cpu::embedding::scatter_add(dy.as_slice::<T>(), ids.as_slice(), n, dw.as_mut_slice());
    });
    Ok(())
}

/// `y [R, N] = x[rows]`.
///
/// # Errors
/// Shapes or types do not fit, or a row lies outside `x`.
pub fn gather_rows(x: &Tensor, rows: &Tensor, y: &mut Tensor) -> Result<()> {
    let (m, n) = x.shape().rows_and_columns();
    check("gather_rows", &[("x", x, m, n), ("y", y, rows.elements(), n)])?;
    check_indices("gather_rows", "row", rows.as_slice(), m)?;
    on_device!("gather_rows", x, T => {
        cpu::embedding::gather_rows(x.as_slice::<T>(), rows.as_slice(), n, y.as_mut_slice());
    });
    Ok(())
}

/// `y [M, N] = 0`, then `y[rows] = x [R, N]`; `rows` are distinct.
///
/// # Errors
/// Shapes or types do not fit, or a row lies outside `y`.
pub fn scatter_rows(x: &Tensor, rows: &Tensor, y: &mut Tensor) -> Result<()> {
    let (m, n) = y.shape().rows_and_columns();
    check("scatter_rows", &[("x", x, rows.elements(), n), ("y", y, m, n)])?;
    check_indices("scatter_rows", "row", rows.as_slice(), m)?;
    on_device!("scatter_rows", x, T => {
        cpu::embedding::scatter_rows(x.as_slice::<T>(), rows.as_slice(), n, y.as_mut_slice());
    });
    Ok(())
}
