//! Rows of matrices by number: embeddings, labelled rows.

use super::{
    WeightRef, check, check_device, check_elements, check_index_tensor, check_indices, check_sums, mismatch,
    on_device, weight,
};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};
use crate::{cpu, cuda};

/// `y [M, N] = w[ids]`, from an embedding `w [V, N]` of any floating-point type.
///
/// # Errors
/// Shapes or types do not fit, or an id lies outside the vocabulary.
pub fn embedding(w: &Tensor, ids: &Tensor, y: &mut Tensor) -> Result<()> {
    let (v, n) = w.shape().rows_and_columns();
    check_device("embedding", "w", w, y.device())?;
    check_elements("embedding", "y", y, y.dtype(), ids.elements() * n)?;
    check_index_tensor("embedding", "ids", ids, ids.elements(), y)?;
    check_indices("embedding", "token id", ids, v)?;
    on_device!("embedding", y, T => {
        cpu::embedding::gather::<T>(weight("embedding", WeightRef::Dense(w))?, ids.as_slice(), y.as_mut_slice());
    }, cuda => cuda::rows::embedding(w, ids, y));
    Ok(())
}

/// The gradient of [`embedding`]: `dw[ids] += dy`.
///
/// # Errors
/// Shapes or types do not fit, or an id lies outside the vocabulary.
pub fn embedding_backward(dy: &Tensor, ids: &Tensor, dw: &mut Tensor) -> Result<()> {
    let (v, n) = dw.shape().rows_and_columns();
    check("embedding_backward", &[("dy", dy, ids.elements(), n)])?;
    check_sums("embedding_backward", "dw", dw, v * n, dy)?;
    check_index_tensor("embedding_backward", "ids", ids, ids.elements(), dy)?;
    check_indices("embedding_backward", "token id", ids, v)?;
    on_device!("embedding_backward", dy, T => {
        cpu::embedding::scatter_add(dy.as_slice::<T>(), ids.as_slice(), n, dw.as_mut_slice());
    }, cuda => cuda::rows::embedding_backward(dy, ids, dw));
    Ok(())
}

/// `y [R, N] = x[rows]`.
///
/// # Errors
/// Shapes or types do not fit, or a row lies outside `x`.
pub fn gather_rows(x: &Tensor, rows: &Tensor, y: &mut Tensor) -> Result<()> {
    let (m, n) = x.shape().rows_and_columns();
    check("gather_rows", &[("x", x, m, n), ("y", y, rows.elements(), n)])?;
    check_index_tensor("gather_rows", "rows", rows, rows.elements(), x)?;
    check_indices("gather_rows", "row", rows, m)?;
    on_device!("gather_rows", x, T => {
        cpu::embedding::gather_rows(x.as_slice::<T>(), rows.as_slice(), n, y.as_mut_slice());
    }, cuda => cuda::rows::gather_rows(x, rows, y));
    Ok(())
}

/// `y [M, N] = 0`, then `y[rows] = x [R, N]`; `rows` are distinct. `x` is of the type of sums.
///
/// # Errors
/// Shapes or types do not fit, or a row lies outside `y`.
pub fn scatter_rows(x: &Tensor, rows: &Tensor, y: &mut Tensor) -> Result<()> {
    let (m, n) = y.shape().rows_and_columns();
    check_sums("scatter_rows", "x", x, rows.elements() * n, y)?;
    check_index_tensor("scatter_rows", "rows", rows, rows.elements(), y)?;
    check_indices("scatter_rows", "row", rows, m)?;
    on_device!("scatter_rows", y, T => {
        cpu::embedding::scatter_rows(x.as_slice::<T>(), rows.as_slice(), n, y.as_mut_slice());
    }, cuda => cuda::rows::scatter_rows(x, rows, y));
    Ok(())
}
