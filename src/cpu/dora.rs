//! DoRA (Liu et al. 2024): row norms of an adapted weight, and factors on columns.

use super::parallel;
use super::real::{Real, sum, vectorized};
use super::weight::Weight;

/// `squares_i = Σ_k w_ik²`.
pub fn row_squares<T: Real>(weight: Weight<'_, T>, squares: &mut [T]) {
    let k = weight.columns;
    parallel::rows(squares, 1, k / 2, |first, squares| {
        let mut row = vec![T::ZERO; k];
        for (i, square) in squares.iter_mut().enumerate() {
            weight.decode(first + i..first + i + 1, 0..k, &mut row);
            *square = vectorized(
                #[inline(always)]
                || sum(&row, |w| w * w),
            );
        }
    });
}

/// `norm_i² = squares_i + Σ_j b_ij (2 s p_ji + s² q_ij)`, then `gain = magnitude / norm` and `inverse = 1 / norm`.
///
/// `p = A Wᵀ [r, N]` and `q = B (A Aᵀ) [N, r]`: with them this is `|w_i + s Σ_j b_ij a_j|`.
pub fn gain<T: Real>(
    magnitude: &[T],
    squares: &[T],
    b: &[T],
    (p, q): (&[T], &[T]),
    s: T,
    gain: &mut [T],
    inverse: &mut [T],
) {
    let n = magnitude.len();
    let r = b.len() / n.max(1);
    let two = T::ONE + T::ONE;
    for i in 0..n {
        let mut square = squares[i];
        for j in 0..r {
            square += b[i * r + j] * (two * s * p[j * n + i] + s * s * q[i * r + j]);
        }
        inverse[i] = T::ONE / square.sqrt();
        gain[i] = magnitude[i] * inverse[i];
    }
}

/// `y [M, N] = (gain + shift) x + bias + alpha * residual`, column by column, or `y += gain x` when `accumulate`.
pub fn scale_columns<T: Real>(
    x: &[T],
    gain: &[T],
    shift: T,
    bias: Option<&[T]>,
    residual: Option<(T, &[T])>,
    accumulate: bool,
    y: &mut [T],
) {
    let n = gain.len();
    parallel::rows(y, n, n / 2, |first, rows| {
        for (i, y) in rows.chunks_exact_mut(n).enumerate() {
            let at = (first + i) * n;
            for (j, y) in y.iter_mut().enumerate() {
                let mut value = (gain[j] + shift) * x[at + j];
                if let Some(bias) = bias {
                    value += bias[j];
                }
                if let Some((alpha, residual)) = residual {
                    value += alpha * residual[at + j];
                }
                *y = if accumulate { *y + value } else { value };
            }
        }
    });
}

/// `d_j += factor_j Σ_m x_mj y_mj`, over the rows in order.
pub fn accumulate_column_products<T: Real>(x: &[T], y: &[T], factor: &[T], d: &mut [T]) {
    let n = d.len();
    let m = x.len() / n.max(1);
    parallel::rows(d, 1, m / 2, |first, d| {
        let mut sums = vec![T::ZERO; d.len()];
        for row in 0..m {
            let at = row * n + first;
            for ((sum, &x), &y) in sums.iter_mut().zip(&x[at..]).zip(&y[at..]) {
                *sum += x * y;
            }
        }
        for ((d, sum), &factor) in d.iter_mut().zip(sums).zip(&factor[first..]) {
            *d += sum * factor;
        }
    });
}
