//! Products with weights and between dense matrices.

use super::{WeightRef, check, check_elements, mismatch, on_device, weight};
use crate::cpu;
use crate::cpu::real::Real;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// `y [M, N] = x [M, K] Wᵀ + bias + alpha * residual [M, N]`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn linear(
    x: &Tensor,
    w: WeightRef<'_>,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    y: &mut Tensor,
) -> Result<()> {
    let (m, k) = x.shape().rows_and_columns();
    let (n, wk) = w.extents();
    check("linear", &[("x", x, m, wk), ("y", y, m, n)])?;
    debug_assert_eq!(k, wk);
    if let Some(b) = bias {
        check_elements("linear", "bias", b, x.dtype(), n)?;
    }
    if let Some((_, r)) = residual {
        check("linear", &[("y", y, m, n), ("residual", r, m, n)])?;
    }
    on_device!("linear", x, T => {
        let residual = residual.map(|(alpha, r)| (T::of(alpha), r.as_slice::<T>()));
        let w = weight("linear", w)?;
        cpu::linear::forward(x.as_slice::<T>(), w, 0..n, bias.map(Tensor::as_slice), residual, y.as_mut_slice());
    });
    Ok(())
}

/// `dx [M, K] = dy [M, N] W + alpha * residual [M, K]`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn linear_backward_input(
    dy: &Tensor,
    w: WeightRef<'_>,
    residual: Option<(f64, &Tensor)>,
    dx: &mut Tensor,
) -> Result<()> {
    let (m, _) = dy.shape().rows_and_columns();
    let (n, k) = w.extents();
    check("linear_backward_input", &[("dy", dy, m, n), ("dx", dx, m, k)])?;
    if let Some((_, r)) = residual {
        check(
            "linear_backward_input",
            &[("dx", dx, m, k), ("residual", r, m, k)],
        )?;
    }
    on_device!("linear_backward_input", dy, T => {
        let residual = residual.map(|(alpha, r)| (T::of(alpha), r.as_slice::<T>()));
        let w = weight("linear_backward_input", w)?;
        cpu::linear::backward_input(dy.as_slice::<T>(), w, 0..n, residual, dx.as_mut_slice());
    });
    Ok(())
}

/// A dense operand of [`matmul`]: the matrix, and whether it is used transposed.
pub type Operand<'a> = (&'a Tensor, bool);

/// `c [M, N] = alpha * op(a) op(b) + beta * c`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn matmul(alpha: f64, a: Operand<'_>, b: Operand<'_>, beta: f64, c: &mut Tensor) -> Result<()> {
    let extents = |(x, transposed): Operand<'_>| {
        let (rows, columns) = x.shape().rows_and_columns();
        if transposed {
            (columns, rows)
        } else {
            (rows, columns)
        }
    };
    let ((m, k), (bk, n)) = (extents(a), extents(b));
    let b_expected = if b.1 { (n, k) } else { (k, n) };
    debug_assert!(bk == k || c.elements() > 0);
    check(
        "matmul",
        &[
            ("c", c, m, n),
            (
                "a",
                a.0,
                a.0.shape().rows_and_columns().0,
                a.0.shape().rows_and_columns().1,
            ),
        ],
    )?;
    check(
        "matmul",
        &[("c", c, m, n), ("b", b.0, b_expected.0, b_expected.1)],
    )?;
    on_device!("matmul", c, T => cpu::linear::matmul(
        T::of(alpha),
        (a.0.as_slice::<T>(), a.1),
        (b.0.as_slice(), b.1),
        T::of(beta),
        c.as_mut_slice(),
        (m, n, k),
    ));
    Ok(())
}

/// `db [N]` is added `Σ_m dy [M, N]`: the gradient of a bias.
///
/// # Errors
/// Shapes or types do not fit.
pub fn accumulate_column_sums(dy: &Tensor, db: &mut Tensor) -> Result<()> {
    let (_, n) = dy.shape().rows_and_columns();
    check_elements("accumulate_column_sums", "db", db, dy.dtype(), n)?;
    on_device!("accumulate_column_sums", dy, T => {
        cpu::linear::accumulate_column_sums(dy.as_slice::<T>(), n, db.as_mut_slice());
    });
    Ok(())
}
