//! The optimizer's arithmetic on slices.

use rayon::prelude::*;

use super::real::{Real, vectorized};
use crate::tensor::Element;

/// Elements per parallel task: small enough to share, large enough to be worth a task. The sums of
/// [`sum_of_squares`] are cut here as well, so their value does not depend on the number of threads.
const CHUNK: usize = 1 << 15;

/// The scalars of an AdamW step that all parameters share. Computed in f64 and rounded to f32 once, as PyTorch does with
/// Python floats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwFactors {
    /// Every gradient is multiplied by this first: the clipping factor.
    pub clip: f32,
    /// `1 - beta1`.
    pub one_minus_beta1: f32,
    /// `beta2`.
    pub beta2: f32,
    /// `1 - beta2`.
    pub one_minus_beta2: f32,
    /// `sqrt(1 - beta2^t)`.
    pub sqrt_correction2: f32,
    /// `eps`, added after the bias correction.
    pub epsilon: f32,
}

/// What an AdamW step is to one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwStep {
    /// `1 - lr * weight_decay`, or 1.
    pub decay: f32,
    /// `lr / (1 - beta1^t)`.
    pub size: f32,
}

impl AdamwFactors {
    /// One element's step, in the order of `torch.optim.AdamW` on the CPU.
    #[inline(always)]
    pub(super) fn step(&self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32, step: AdamwStep) {
        let g = g * self.clip;
        *m += self.one_minus_beta1 * (g - *m);
        *v = *v * self.beta2 + self.one_minus_beta2 * g * g;
        let denominator = v.sqrt() / self.sqrt_correction2 + self.epsilon;
        *p = *p * step.decay - step.size * *m / denominator;
    }
}

/// One AdamW step, in the order of `torch.optim.AdamW` on the CPU:
/// `g = clip g; p = decay p; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g g;
/// p -= step_size m / (sqrt(v) / sqrt_correction2 + eps)`.
///
/// `p`, `m` and `v` are updated in place; all four slices have one length.
pub fn adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: AdamwStep, f: &AdamwFactors) {
    assert!(
        g.len() == p.len() && m.len() == p.len() && v.len() == p.len(),
        "adamw: slices of different lengths"
    );
    if p.len() <= CHUNK {
        return adamw_chunk(p, g, m, v, step, f);
    }
    p.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK))
        .zip(v.par_chunks_mut(CHUNK))
        .for_each(|(((p, g), m), v)| adamw_chunk(p, g, m, v, step, f));
}

fn adamw_chunk(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: AdamwStep, f: &AdamwFactors) {
    vectorized(
        #[inline(always)]
        || {
            for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                f.step(p, g, m, v, step);
            }
        },
    );
}

/// Calls `f(p, g, m)` for every element.
fn with_one_moment(p: &mut [f32], g: &[f32], m: &mut [f32], f: impl Fn(&mut f32, f32, &mut f32) + Sync) {
    assert!(
        g.len() == p.len() && m.len() == p.len(),
        "an optimizer's step: slices of different lengths"
    );
    let chunk = |((p, g), m): ((&mut [f32], &[f32]), &mut [f32])| {
        vectorized(
            #[inline(always)]
            || {
                for ((p, &g), m) in p.iter_mut().zip(g).zip(m) {
                    f(p, g, m);
                }
            },
        );
    };
    if p.len() <= CHUNK {
        return chunk(((p, g), m));
    }
    p.par_chunks_mut(CHUNK)
        .zip(g.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK))
        .for_each(chunk);
}

/// The scalars of a step of stochastic gradient descent that all parameters share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdFactors {
    /// Every gradient is multiplied by this first: the clipping factor.
    pub clip: f32,
    /// What is left of the momentum of the step before.
    pub momentum: f32,
}

/// One step of `torch.optim.SGD` without dampening and Nesterov:
/// `g = clip g + weight_decay p; m = momentum m + g; p -= rate m`.
///
/// `p` and `m` are updated in place; without `m`, `p -= rate g`.
pub fn sgd(p: &mut [f32], g: &[f32], m: Option<&mut [f32]>, rate: f32, weight_decay: f32, f: &SgdFactors) {
    let gradient = |p: f32, g: f32| g * f.clip + weight_decay * p;
    match m {
        Some(m) => with_one_moment(
            p,
            g,
            m,
            #[inline(always)]
            |p, g, m| {
                *m = f.momentum * *m + gradient(*p, g);
                *p -= rate * *m;
            },
        ),
        None => {
            assert!(g.len() == p.len(), "sgd: slices of different lengths");
            p.par_chunks_mut(CHUNK)
                .zip(g.par_chunks(CHUNK))
                .for_each(|(p, g)| {
                    p.iter_mut()
                        .zip(g)
                        .for_each(|(p, &g)| *p -= rate * gradient(*p, g))
                });
        }
    }
}

/// The scalars of a Lion step that all parameters share.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LionFactors {
    /// Every gradient is multiplied by this first: the clipping factor.
    pub clip: f32,
    /// `beta1`.
    pub beta1: f32,
    /// `1 - beta1`.
    pub one_minus_beta1: f32,
    /// `beta2`.
    pub beta2: f32,
    /// `1 - beta2`.
    pub one_minus_beta2: f32,
}

/// One Lion step (Chen et al. 2023, arXiv 2302.06675, algorithm 2):
/// `g = clip g; p = decay p - rate sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g`, where sign(0) is 0.
///
/// `p` and `m` are updated in place.
pub fn lion(p: &mut [f32], g: &[f32], m: &mut [f32], rate: f32, decay: f32, f: &LionFactors) {
    with_one_moment(
        p,
        g,
        m,
        #[inline(always)]
        |p, g, m| {
            let g = g * f.clip;
            let mean = f.beta1 * *m + f.one_minus_beta1 * g;
            // 0 stays 0, and what is no number stays none.
            let sign = match mean {
                mean if mean > 0.0 => 1.0,
                mean if mean < 0.0 => -1.0,
                mean => mean,
            };
            *p = *p * decay - rate * sign;
            *m = f.beta2 * *m + f.one_minus_beta2 * g;
        },
    );
}

/// `to = round(from)`, element by element; both slices have one length.
pub fn round_into<T: Element>(from: &[f32], to: &mut [T], round: fn(f32) -> T) {
    assert!(from.len() == to.len(), "round_into: slices of different lengths");
    to.par_chunks_mut(CHUNK)
        .zip(from.par_chunks(CHUNK))
        .for_each(|(to, from)| to.iter_mut().zip(from).for_each(|(to, &from)| *to = round(from)));
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
