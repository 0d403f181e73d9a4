//! Elementwise functions.

use super::parallel;
use super::real::{Real, vectorized};
use crate::rng::Stream;

/// Elements of one task's row when a flat array is cut.
const STRIP: usize = 1024;

/// sqrt(2 / π) and the cubic coefficient of the tanh form of GELU (Hendrycks and Gimpel 2016).
const A: f64 = 0.797_884_560_802_865_4;
const B: f64 = 0.044_715;

/// The logistic function of 2u with u = A (x + B x³): `0.5 (1 + tanh u)` without its cancellation.
#[inline(always)]
fn gate<T: Real>(x: T) -> T {
    let u = T::of(A) * (x + T::of(B) * x * x * x);
    T::ONE / (T::ONE + (-(u + u)).exp())
}

/// `y = 0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`.
pub fn gelu<T: Real>(x: &[T], y: &mut [T]) {
    parallel::rows(y, STRIP.min(x.len().max(1)), STRIP * 2, |first, y| {
        let at = first * STRIP;
        let x = &x[at..at + y.len()];
        vectorized(
            #[inline(always)]
            || {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = x * gate(x);
                }
            },
        );
    });
}

/// `dx = dy * gelu'(x)`, in place: `d` holds dy and becomes dx.
pub fn gelu_backward<T: Real>(x: &[T], d: &mut [T]) {
    parallel::rows(d, STRIP.min(x.len().max(1)), STRIP * 3, |first, d| {
        let at = first * STRIP;
        let x = &x[at..at + d.len()];
        vectorized(
            #[inline(always)]
            || {
                for (d, &x) in d.iter_mut().zip(x) {
                    let s = gate(x);
                    let slope = T::of(A) * (T::ONE + T::of(3.0 * B) * x * x);
                    *d *= s + (x + x) * s * (T::ONE - s) * slope;
                }
            },
        );
    });
}

/// What [`dropout`] does with what it has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// `y = d`.
    Write,
    /// `y += d`.
    Accumulate,
    /// `y = x - d`.
    Rest,
}

/// `d = mask * x / (1 - p)` (inverted dropout); element `i` is kept when the stream's uniform `i` is at least `p`.
pub fn dropout<T: Real>(x: &[T], p: f32, stream: Stream, dropped: Dropped, y: &mut [T]) {
    let scale = T::of(1.0 / (1.0 - f64::from(p)));
    parallel::rows(y, STRIP.min(x.len().max(1)), STRIP * 4, |first, y| {
        let at = first * STRIP;
        for (block, y) in y.chunks_mut(4).enumerate() {
            let at = at + 4 * block;
            let bits = stream.block((at / 4) as u64);
            for ((y, &x), bits) in y.iter_mut().zip(&x[at..]).zip(bits) {
                let kept = (bits >> 8) as f32 * (1.0 / 16_777_216.0) >= p;
                let value = if kept { x * scale } else { T::ZERO };
                *y = match dropped {
                    Dropped::Write => value,
                    Dropped::Accumulate => *y + value,
                    Dropped::Rest => x - value,
                };
            }
        }
    });
}

/// `y += bound (2 u - 1)`, with `u` the stream's uniforms: noise in `[-bound, bound)`.
pub fn accumulate_noise<T: Real>(bound: f64, stream: Stream, y: &mut [T]) {
    let bound = T::of(bound);
    parallel::rows(y, STRIP.min(y.len().max(1)), STRIP * 4, |first, y| {
        for (block, y) in y.chunks_mut(4).enumerate() {
            let bits = stream.block((first * STRIP / 4 + block) as u64);
            for (y, bits) in y.iter_mut().zip(bits) {
                let u = (bits >> 8) as f32 * (1.0 / 16_777_216.0);
                *y += bound * T::of_f32(2.0 * u - 1.0);
            }
        }
    });
}
