//! The number types that the CPU computes in.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use crate::tensor::Element;

/// f32, in which models run, or f64, in which gradients are checked.
pub trait Real:
    Element
    + Debug
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
    + Sum
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Rounded to nearest.
    fn of(x: f64) -> Self;
    /// Exact, from a stored weight.
    fn of_f32(x: f32) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Square root.
    fn sqrt(self) -> Self;
    /// e^x, without branches so that loops over it vectorise; NaN stays NaN. At most 2 ulp off in f32.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
}

impl Real for f64 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn of_f32(x: f32) -> Self {
        f64::from(x)
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }

    fn tanh(self) -> Self {
        f64::tanh(self)
    }
}

impl Real for f32 {
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn of_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }

    /// e^x = 2^n e^r with n = round(x / ln 2) and r = x - n ln 2 (ln 2 in two parts, Cody and Waite), e^r by its Taylor
    /// polynomial of degree 7, whose remainder on |r| <= ln(2)/2 is below 2^-27.
    #[inline(always)]
    fn exp(self) -> Self {
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
        const ROUND: f32 = 12_582_912.0;
        const LN2_HIGH: f32 = 355.0 / 512.0;
        const LN2_LOW: f32 = -2.121_944_4E-4;
        // Comparisons, not min and max: those would turn NaN into a number.
        let x = if self > 88.0 { 88.0 } else { self };
        let x = if x < -87.0 { -87.0 } else { x };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * LN2_HIGH - n * LN2_LOW;
        let mut p = 1.0 / 5040.0;
        p = p * r + 1.0 / 720.0;
        p = p * r + 1.0 / 120.0;
        p = p * r + 1.0 / 24.0;
        p = p * r + 1.0 / 6.0;
        p = p * r + 0.5;
        p = p * r + 1.0;
        p = p * r + 1.0;
        let scale = f32::from_bits(
            ((shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32) + 127).cast_unsigned() << 23,
        );
        let y = p * scale;
        let y = if self > 88.0 { y * (self * f32::MAX) } else { y };
        if self < -87.0 { 0.0 } else { y }
    }
    #[inline(always)]
    fn ln(self) -> Self {
        f32::ln(self)
    }

    fn tanh(self) -> Self {
        f32::tanh(self)
    }
}

/// Sum in 16 lanes: as fast as the vector unit, and the same bits whatever its width.
#[inline(always)]
pub fn sum<T: Real>(x: &[T], f: impl Fn(T) -> T) -> T {
    let mut lanes = [T::ZERO; 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane += f(v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane += f(v);
    }
    fold(lanes)
}

/// `Σ f(x_i, y_i)` in 16 lanes.
#[inline(always)]
pub fn sum2<T: Real>(x: &[T], y: &[T], f: impl Fn(T, T) -> T) -> T {
    let n = x.len().min(y.len());
    let (x, y) = (&x[..n], &y[..n]);
    let mut lanes = [T::ZERO; 16];
    let split = n / 16 * 16;
    for (a, b) in x[..split].chunks_exact(16).zip(y[..split].chunks_exact(16)) {
        for i in 0..16 {
            lanes[i] += f(a[i], b[i]);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(x[split..].iter().zip(&y[split..])) {
        *lane += f(a, b);
    }
    fold(lanes)
}

#[inline(always)]
fn fold<T: Real>(mut lanes: [T; 16]) -> T {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            let upper = lanes[i + half];
            lanes[i] += upper;
        }
    }
    lanes[0]
}

/// The largest element, NaN when there is one, `-inf` when there is none.
#[inline(always)]
pub fn max<T: Real>(x: &[T]) -> T {
    let mut lanes = [T::of(f64::NEG_INFINITY); 16];
    let chunks = x.chunks_exact(16);
    let rest = chunks.remainder();
    // `!(a <= b)` is true for NaN on either side: a NaN enters a lane and only leaves it for another NaN.
    let larger = |lane: T, v: T| {
        if lane >= v || lane.to_f64().is_nan() {
            lane
        } else {
            v
        }
    };
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, v);
        }
    }
    for (lane, &v) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, v);
    }
    lanes.into_iter().reduce(larger).unwrap_or(T::ZERO)
}

/// Runs a loop with the widest vector instructions of this machine.
///
/// The arithmetic is the same everywhere (no fused multiply-add is introduced), so results do not depend on it.
#[inline(always)]
pub fn vectorized<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_and_keeps_nan_and_infinities() {
        let mut worst = 0.0f64;
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let want = f64::from(x).exp();
            let ulp = f64::from(f32::EPSILON) * want / 2.0;
            worst = worst.max((f64::from(Real::exp(x)) - want).abs() / ulp);
        }
        assert!(worst < 4.0, "{worst} half-ulps");
        assert!(Real::exp(f32::NAN).is_nan());
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(0.0f32), 1.0);
        assert_eq!(Real::exp(200.0f32), f32::INFINITY);
    }

    #[test]
    fn max_and_sum_do_not_lose_a_nan() {
        for at in [0, 5, 16, 33] {
            let mut x = vec![1.0f32; 40];
            x[at] = f32::NAN;
            assert!(max(&x).is_nan(), "{at}");
            assert!(sum(&x, |v| v).is_nan());
        }
        assert_eq!(max(&[1.0f32, 7.0, -2.0]), 7.0);
    }
}
