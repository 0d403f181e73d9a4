//! Head and cross-entropy together, over labelled rows only and one chunk of the vocabulary at a time.

use std::ops::Range;

use super::linear;
use super::parallel;
use super::real::{Real, max, sum, vectorized};
use super::weight::Weight;

/// Running softmax statistics of a row: the largest logit, the sum of exponentials relative to it, the target's logit.
pub const STATISTICS: usize = 3;

/// The chunk of the vocabulary whose logits `[R, chunk]` fit into `capacity` elements.
pub fn chunk(capacity: usize, rows: usize, vocabulary: usize) -> usize {
    (capacity / rows.max(1)).clamp(1, vocabulary)
}

/// `Σ_r -ln softmax(x_r Wᵀ)[target_r]` for `x [R, K]`.
///
/// `logits` is scratch; the whole vocabulary when it is large enough, else one chunk after the other (online softmax,
/// Milakov and Gimelshein 2018).
pub fn forward<T: Real>(
    x: &[T],
    weight: Weight<'_, T>,
    targets: &[i32],
    logits: &mut [T],
    statistics: &mut [T],
) -> f64 {
    let rows = targets.len();
    for s in statistics.chunks_exact_mut(STATISTICS) {
        s.copy_from_slice(&[T::of(f64::NEG_INFINITY), T::ZERO, T::ZERO]);
    }
    let width = chunk(logits.len(), rows, weight.rows);
    for start in (0..weight.rows).step_by(width) {
        let part = start..(start + width).min(weight.rows);
        let logits = &mut logits[..rows * part.len()];
        linear::forward(x, weight, part.clone(), None, None, logits);
        let logits = &*logits;
        parallel::rows(statistics, STATISTICS, part.len(), |first, statistics| {
            for (i, s) in statistics.chunks_exact_mut(STATISTICS).enumerate() {
                let row = first + i;
                let logits = &logits[row * part.len()..][..part.len()];
                vectorized(
                    #[inline(always)]
                    || {
                        let top = max(logits);
                        // `!(top <= s[0])` also takes a NaN over.
                        let new = if top <= s[0] { s[0] } else { top };
                        let total = sum(logits, |z| (z - new).exp());
                        let old = if s[1] == T::ZERO {
                            T::ZERO
                        } else {
                            s[1] * (s[0] - new).exp()
                        };
                        (s[0], s[1]) = (new, old + total);
                    },
                );
                if part.contains(&(targets[row] as usize)) {
                    s[2] = logits[targets[row] as usize - part.start];
                }
            }
        });
    }
    statistics
        .chunks_exact(STATISTICS)
        .map(|s| (s[0] + s[1].ln() - s[2]).to_f64())
        .sum()
}

/// Where the gradients go.
pub struct Gradients<'a, T> {
    /// `dx [R, K]`, written.
    pub dx: &'a mut [T],
    /// `dW [V, K]`, added to, when the head trains.
    pub dweight: Option<&'a mut [T]>,
}

/// The gradient of `scale *` [`forward`], with its `statistics`: `dlogits = scale (softmax - onehot)`, `dx = dlogits W`,
/// `dW += dlogitsᵀ x`. Logits are computed again unless `logits` still holds all of them.
pub fn backward<T: Real>(
    x: &[T],
    weight: Weight<'_, T>,
    targets: &[i32],
    scale: T,
    logits: &mut [T],
    statistics: &[T],
    gradients: Gradients<'_, T>,
) {
    let rows = targets.len();
    let k = weight.columns;
    let Gradients { dx, mut dweight } = gradients;
    dx.fill(T::ZERO);
    let width = chunk(logits.len(), rows, weight.rows);
    for start in (0..weight.rows).step_by(width) {
        let part: Range<usize> = start..(start + width).min(weight.rows);
        let logits = &mut logits[..rows * part.len()];
        if width < weight.rows {
            linear::forward(x, weight, part.clone(), None, None, logits);
        }
        parallel::rows(logits, part.len(), part.len(), |first, logits| {
            for (i, logits) in logits.chunks_exact_mut(part.len()).enumerate() {
                let row = first + i;
                let s = &statistics[row * STATISTICS..];
                let (top, inverse) = (s[0], scale / s[1]);
                vectorized(
                    #[inline(always)]
                    || {
                        for z in logits.iter_mut() {
                            *z = (*z - top).exp() * inverse;
                        }
                    },
                );
                if part.contains(&(targets[row] as usize)) {
                    logits[targets[row] as usize - part.start] += -scale;
                }
            }
        });
        linear::accumulate_input(logits, weight, part.clone(), part.len(), rows, dx);
        if let Some(dweight) = dweight.as_deref_mut() {
            let dweight = &mut dweight[part.start * k..part.end * k];
            linear::matmul(
                T::ONE,
                (logits, true),
                (x, false),
                T::ONE,
                dweight,
                (part.len(), k, rows),
            );
        }
    }
}
