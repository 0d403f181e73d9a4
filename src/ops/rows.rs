//! Rows of matrices by number: embeddings, labelled rows.

use super::{
    WeightRef, check, check_device, check_elements, check_index_tensor, check_indices, check_sums, fetch,
    mismatch, on_device, weight,
};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};
use crate::{cpu, cuda};
use half::{bf16, f16};

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

/// [`embedding`] on a device from a matrix in host memory: rows are gathered there, converted to y's type and copied in one
/// piece; the copy runs beside what the device was asked for before.
///
/// `staging` is page-locked memory ([`Tensor::zeros_pinned`]) of y's type with room for as many rows. Of a type that is not
/// y's, elements are rounded to nearest even, as [`Tensor::to_device_as`] does it.
///
/// # Errors
/// Shapes or types do not fit, an id lies outside the vocabulary, or the copy cannot be asked for.
pub fn embedding_from_host(w: &Tensor, ids: &[i32], staging: &mut Tensor, y: &mut Tensor) -> Result<()> {
    let (v, n) = w.shape().rows_and_columns();
    check_device("embedding_from_host", "w", w, Device::Cpu)?;
    check_elements("embedding_from_host", "y", y, y.dtype(), ids.len() * n)?;
    if let Some(id) = ids.iter().find(|&&id| id < 0 || id as usize >= v) {
        let found = format!("token id {id}");
        return Err(mismatch(
            "embedding_from_host",
            found,
            format!("token id in 0..{v}"),
        ));
    }
    staging.resize(y.shape())?;
    staging.arrive()?;
    check_elements("embedding_from_host", "staging", staging, y.dtype(), y.elements())?;
    macro_rules! gather {
        ($from:ty, $to:ty, $convert:expr) => {
            cpu::embedding::gather_converted(
                w.as_slice::<$from>(),
                ids,
                n,
                staging.as_mut_slice::<$to>(),
                $convert,
            )
        };
    }
    match (w.dtype(), y.dtype()) {
        (DType::F32, DType::F32) => gather!(f32, f32, |x| x),
        (DType::F16, DType::F16) => gather!(f16, f16, |x| x),
        (DType::BF16, DType::BF16) => gather!(bf16, bf16, |x| x),
        (DType::F16, DType::F32) => gather!(f16, f32, f16::to_f32),
        (DType::BF16, DType::F32) => gather!(bf16, f32, bf16::to_f32),
        (DType::F32, DType::F16) => gather!(f32, f16, f16::from_f32),
        (DType::F32, DType::BF16) => gather!(f32, bf16, bf16::from_f32),
        (DType::F16, DType::BF16) => gather!(f16, bf16, |x: f16| bf16::from_f32(x.to_f32())),
        (DType::BF16, DType::F16) => gather!(bf16, f16, |x: bf16| f16::from_f32(x.to_f32())),
        (from, to) => {
            let found = format!("w {from}, y {to}");
            return Err(mismatch(
                "embedding_from_host",
                found,
                "float32, float16 or bfloat16",
            ));
        }
    }
    fetch(staging, y)
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
