//! LayerNorm over the last axis (Ba et al. 2016), as `torch.nn.LayerNorm`.

use super::parallel;
use super::real::{Real, sum, sum2, vectorized};

/// `y = (x - mean) * rstd * weight + bias` with `rstd = 1 / sqrt(var + eps)` over each row of `n`; keeps `mean` and
/// `rstd`, one a row, for the backward pass.
pub fn forward<T: Real>(x: &[T], weight: &[T], bias: &[T], eps: T, y: &mut [T], stats: &mut [T]) {
    let n = weight.len();
    let inverse = T::ONE / T::of(n as f64);
    // Rows of y and of the statistics advance together: the statistics are filled first, then read.
    parallel::rows(stats, 2, n / 4, |first, stats| {
        vectorized(
            #[inline(always)]
            || {
                for (i, stats) in stats.chunks_exact_mut(2).enumerate() {
                    let x = &x[(first + i) * n..][..n];
                    let mean = sum(x, |v| v) * inverse;
                    let variance = sum(x, |v| (v - mean) * (v - mean)) * inverse;
                    stats[0] = mean;
                    stats[1] = T::ONE / (variance + eps).sqrt();
                }
            },
        );
    });
    let stats = &*stats;
    parallel::rows(y, n, n / 4, |first, y| {
        vectorized(
            #[inline(always)]
            || {
                for (i, y) in y.chunks_exact_mut(n).enumerate() {
                    let row = first + i;
                    let (mean, rstd) = (stats[2 * row], stats[2 * row + 1]);
                    let x = &x[row * n..][..n];
                    for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                        *y = (x - mean) * rstd * w + b;
                    }
                }
            },
        );
    });
}

/// `dx = rstd * (g - mean(g) - xhat * mean(g * xhat))` with `g = dy * weight`, `xhat = (x - mean) * rstd`.
pub fn backward_input<T: Real>(dy: &[T], x: &[T], weight: &[T], stats: &[T], dx: &mut [T]) {
    let n = weight.len();
    let inverse = T::ONE / T::of(n as f64);
    parallel::rows(dx, n, n / 2, |first, dx| {
        vectorized(
            #[inline(always)]
            || {
                for (i, dx) in dx.chunks_exact_mut(n).enumerate() {
                    let row = first + i;
                    let (mean, rstd) = (stats[2 * row], stats[2 * row + 1]);
                    let (x, dy) = (&x[row * n..][..n], &dy[row * n..][..n]);
                    for ((g, &dy), &w) in dx.iter_mut().zip(dy).zip(weight) {
                        *g = dy * w;
                    }
                    let mean_g = sum(dx, |g| g) * inverse;
                    let mean_gx = sum2(dx, x, |g, x| g * ((x - mean) * rstd)) * inverse;
                    for (g, &x) in dx.iter_mut().zip(x) {
                        *g = rstd * (*g - mean_g - (x - mean) * rstd * mean_gx);
                    }
                }
            },
        );
    });
}

/// `dweight += Σ dy * xhat`, `dbias += Σ dy`, over the rows in order.
pub fn accumulate_parameters<T: Real>(dy: &[T], x: &[T], stats: &[T], dweight: &mut [T], dbias: &mut [T]) {
    let n = dweight.len();
    for ((dy, x), stats) in dy
        .chunks_exact(n)
        .zip(x.chunks_exact(n))
        .zip(stats.chunks_exact(2))
    {
        let (mean, rstd) = (stats[0], stats[1]);
        vectorized(
            #[inline(always)]
            || {
                for (((dw, db), &dy), &x) in dweight.iter_mut().zip(dbias.iter_mut()).zip(dy).zip(x) {
                    *dw += dy * ((x - mean) * rstd);
                    *db += dy;
                }
            },
        );
    }
}
