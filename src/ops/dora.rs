//! DoRA (Liu et al. 2024): row norms of an adapted weight, and factors on columns.

use super::{WeightRef, check, check_elements, check_sums, dequantize, mismatch, on_device, weight};
use crate::cpu::real::Real;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};
use crate::{cpu, cuda};

/// `squares [N] = Σ_k w_ik²` of a weight `[N, K]`, in the type of sums. A weight in few bits on a device is decoded as a
/// whole on the way: this is asked once for each weight.
///
/// # Errors
/// Shapes, types or devices do not fit; the device has no room.
pub fn row_squares(w: WeightRef<'_>, squares: &mut Tensor) -> Result<()> {
    let (n, _) = w.extents();
    check_elements(
        "row_squares",
        "squares",
        squares,
        squares.dtype().accumulator(),
        n,
    )?;
    w.check_device("row_squares", squares.device())?;
    on_device!("row_squares", squares, T => {
        cpu::dora::row_squares::<T>(weight("row_squares", w)?, squares.as_mut_slice());
    }, cuda => match w {
        WeightRef::Dense(w) => cuda::dora::row_squares(w, squares),
        WeightRef::Quant(_) | WeightRef::Int8(_) => {
            let (n, k) = w.extents();
            let mut dense = Tensor::zeros_on(squares.device(), DType::F32, [n, k])?;
            dequantize(w, 0..n, &mut dense)?;
            cuda::dora::row_squares(&dense, squares)
        }
    });
    Ok(())
}

/// Row norms of `W + s B A` and what follows from them: `norm_i² = squares_i + Σ_j b_ij (2 s p_ji + s² q_ij)`,
/// `gain [N] = magnitude / norm`, `inverse [N] = 1 / norm`.
///
/// `squares [N] = |w_i|²`, `b [N, r]`, `p [r, N] = A Wᵀ`, `q [N, r] = B (A Aᵀ)`; everything in the type of sums. A norm of
/// 0 or one that rounding makes imaginary shows as an infinity or NaN in both results.
///
/// # Errors
/// Shapes or types do not fit.
pub fn dora_gain(
    magnitude: &Tensor,
    squares: &Tensor,
    b: &Tensor,
    (p, q): (&Tensor, &Tensor),
    s: f64,
    (gain, inverse): (&mut Tensor, &mut Tensor),
) -> Result<()> {
    let (n, r) = b.shape().rows_and_columns();
    check("dora_gain", &[("b", b, n, r), ("p", p, r, n), ("q", q, n, r)])?;
    for (name, tensor) in [
        ("magnitude", magnitude),
        ("squares", squares),
        ("gain", &*gain),
        ("inverse", &*inverse),
    ] {
        check_sums("dora_gain", name, tensor, n, b)?;
    }
    on_device!("dora_gain", b, T => cpu::dora::gain(
        magnitude.as_slice::<T>(),
        squares.as_slice(),
        b.as_slice(),
        (p.as_slice(), q.as_slice()),
        T::of(s),
        gain.as_mut_slice(),
        inverse.as_mut_slice(),
    ), cuda => cuda::dora::gain(magnitude, squares, b, (p, q), s, (gain, inverse)));
    Ok(())
}

/// `y [M, N] = (gain [N] + shift) x [M, N] + bias [N] + alpha * residual [M, N]`: every column with its own factor. Gain and
/// bias are of the type of sums.
///
/// # Errors
/// Shapes or types do not fit.
pub fn scale_columns(
    x: &Tensor,
    gain: &Tensor,
    shift: f64,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    y: &mut Tensor,
) -> Result<()> {
    scaled("scale_columns", x, gain, shift, bias, residual, false, y)
}

/// `y [M, N] += gain [N] x [M, N]`, column by column.
///
/// # Errors
/// Shapes or types do not fit.
pub fn accumulate_scaled_columns(x: &Tensor, gain: &Tensor, y: &mut Tensor) -> Result<()> {
    scaled("accumulate_scaled_columns", x, gain, 0.0, None, None, true, y)
}

fn scaled(
    operation: &'static str,
    x: &Tensor,
    gain: &Tensor,
    shift: f64,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    accumulate: bool,
    y: &mut Tensor,
) -> Result<()> {
    let (m, n) = x.shape().rows_and_columns();
    check(operation, &[("x", x, m, n), ("y", y, m, n)])?;
    check_sums(operation, "gain", gain, n, x)?;
    if let Some(bias) = bias {
        check_sums(operation, "bias", bias, n, x)?;
    }
    if let Some((_, r)) = residual {
        check(operation, &[("x", x, m, n), ("residual", r, m, n)])?;
    }
    if m == 0 {
        return Ok(());
    }
    on_device!("scale_columns", x, T => cpu::dora::scale_columns(
        x.as_slice::<T>(),
        gain.as_slice(),
        T::of(shift),
        bias.map(Tensor::as_slice),
        residual.map(|(alpha, r)| (T::of(alpha), r.as_slice())),
        accumulate,
        y.as_mut_slice(),
    ), cuda => cuda::dora::scale_columns(x, gain, shift, bias, residual, accumulate, y));
    Ok(())
}

/// `d [N]` is added `factor [N] Σ_m x y` of `x`, `y [M, N]`; factor and d are of the type of sums.
///
/// # Errors
/// Shapes or types do not fit.
pub fn accumulate_column_products(x: &Tensor, y: &Tensor, factor: &Tensor, d: &mut Tensor) -> Result<()> {
    let operation = "accumulate_column_products";
    let (m, n) = x.shape().rows_and_columns();
    check(operation, &[("x", x, m, n), ("y", y, m, n)])?;
    check_sums(operation, "factor", factor, n, x)?;
    check_sums(operation, "d", d, n, x)?;
    on_device!("accumulate_column_products", x, T => cpu::dora::accumulate_column_products(
        x.as_slice::<T>(),
        y.as_slice(),
        factor.as_slice(),
        d.as_mut_slice(),
    ), cuda => cuda::norm::accumulate_column_products(x, y, factor, d));
    Ok(())
}
