//! The optimizer's arithmetic on slices.

use rayon::prelude::*;

use super::real::{Real, vectorized};

/// Elements per parallel task: small enough to share, large enough to be worth a task. The sums of
/// [`sum_of_squares`] are cut here as well, so their value does not depend on the number of threads.
const CHUNK: usize = 1 << 15;

/// The scalars of one AdamW step. Computed in f64 and rounded to f32 once, as PyTorch does with Python floats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwFactors {
    /// Every gradient is multiplied by this first: the clipping factor.
    pub clip: f32,
    /// `1 - lr * weight_decay`.
    pub decay: f32,
    /// `1 - beta1`.
    pub one_minus_beta1: f32,
    /// `beta2`.
    pub beta2: f32,
    /// `1 - beta2`.
    pub one_minus_beta2: f32,
    /// `lr / (1 - beta1^t)`.
    pub step_size: f32,
    /// `sqrt(1 - beta2^t)`.
    pub sqrt_correction2: f32,
    /// `eps`, added after the bias correction.
    pub epsilon: f32,
}

/// One AdamW step, in the order of `torch.optim.AdamW` on the CPU:
/// `g = clip g; p = decay p; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g g;
/// p -= step_size m / (sqrt(v) / sqrt_correction2 + eps)`.
///
/// `p`, `m` and `v` are updated in place; all four slices have one length.
pub fn adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], f: &AdamwFactors) {
    assert!(
        g.len() == p.len() && m.len() == p.len() && v.len() == p.len(),
        "adamw: slices of different lengths"
    );
    if p.len() <= CHUNK {
        return adamw_chunk(p, g, m, v, f);
    }
    p.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK))
        .zip(v.par_chunks_mut(CHUNK))
        .for_each(|(((p, g), m), v)| adamw_chunk(p, g, m, v, f));
}

fn adamw_chunk(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], f: &AdamwFactors) {
    vectorized(
        #[inline(always)]
        || {
            for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                let g = g * f.clip;
                *m += f.one_minus_beta1 * (g - *m);
                *v = *v * f.beta2 + f.one_minus_beta2 * g * g;
                let denominator = v.sqrt() / f.sqrt_correction2 + f.epsilon;
                *p = *p * f.decay - f.step_size * *m / denominator;
            }
        },
    );
}

/// `sum x^2` in f64. The order of the additions depends on the length only.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let chunk = |x: &[f32]| {
        vectorized(
            #[inline(always)]
            || {
                // Sixteen running sums: the compiler may use vector registers, and the order stays fixed.
                let mut sums = [0.0f64; 16];
                let (rows, rest) = x.as_chunks::<16>();
                for row in rows {
                    for (sum, &x) in sums.iter_mut().zip(row) {
                        *sum += f64::from(x) * f64::from(x);
                    }
                }
                sums.iter().sum::<f64>() + rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>()
            },
        )
    };
    if x.len() <= CHUNK {
        return chunk(x);
    }
    // Collected in order, then added in order: the same bits for every number of threads.
    let partial: Vec<f64> = x.par_chunks(CHUNK).map(chunk).collect();
    partial.iter().sum()
}

/// The index of the first element that is NaN or infinite, and how many there are.
pub fn non_finite<T: Real>(x: &[T]) -> Option<(usize, usize)> {
    let bad = |x: &T| !x.to_f64().is_finite();
    let first = x.iter().position(bad)?;
    Some((first, x[first..].iter().filter(|x| bad(x)).count()))
}
