//! Are the adapters in the result?
//!
//! Few bits move logits, and an adapter may move them less than few bits are allowed to: a result that has lost it lies within the
//! bound. So the reference is run without its adapters too. With b those logits, l the reference's and k the result's, each as one
//! vector over positions and classes, the error of the result is split along the effect of the adapters and across it:
//!
//! `k - l = (share - 1) (l - b) + rest`, where `share = Σ (k - b) (l - b) / Σ (l - b)²`.
//!
//! A share of 1 is an adapter that is kept, 0 one that is lost, 2 one that went in twice. What roundings do points anywhere among
//! many dimensions, so nearly all of it is in the rest, and the share stays near 1 even where the rest is larger than the effect.

use super::tally::Effect;

/// What is kept of what adapters do to logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kept {
    /// The share, 1 being all; `None` where the adapters move no logit.
    pub share: Option<f64>,
    /// The root mean square of `l - b`: what they move.
    pub effect: f64,
    /// The root mean square of the rest: the error that has nothing to do with them.
    pub rest: f64,
}

impl Kept {
    /// From sums over `n` logits.
    pub(super) fn of(effect: &Effect, n: f64) -> Self {
        let Effect { moved, along, error } = *effect;
        let share = (moved > 0.0).then(|| 1.0 + along / moved);
        // The squared error less that of its part along the effect; rounding may take it below 0.
        let rest = match moved > 0.0 {
            true => error - along * (along / moved),
            false => error,
        };
        Self {
            share,
            effect: (moved / n).sqrt(),
            rest: if rest < 0.0 { 0.0 } else { (rest / n).sqrt() },
        }
    }

    /// Is the effect too small to tell from roundings? What is missing of it, or too much, has to be half as large as the rest,
    /// and no effect counts that is as small as sums in another order (`1e-5` of the `spread`).
    fn hides(&self, share: f64, spread: f64) -> bool {
        let clear = (share - 1.0).abs() * self.effect > 0.5 * self.rest && self.effect > 1e-5 * spread;
        !clear
    }

    /// Is it neither too small to tell nor there by a half to one and a half?
    pub fn is_lost(&self, spread: f64) -> bool {
        self.share
            .is_some_and(|share| !((share - 1.0).abs() <= 0.5 || self.hides(share, spread)))
    }

    /// Is the share what it should not be, but nothing that can be told from roundings?
    pub fn is_unclear(&self, spread: f64) -> bool {
        self.share
            .is_some_and(|share| (share - 1.0).abs() > 0.5 && self.hides(share, spread))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of logits of the base, the reference and the result.
    fn kept(logits: &[[f64; 3]]) -> Kept {
        let mut effect = Effect::default();
        for &[b, l, k] in logits {
            effect.add(Effect {
                moved: (l - b) * (l - b),
                along: (k - l) * (l - b),
                error: (k - l) * (k - l),
            });
        }
        Kept::of(&effect, logits.len() as f64)
    }

    #[test]
    fn the_error_is_split_along_the_effect_and_across_it() {
        // The effect is (1, 0), the result 0.25 of it and 0.5 across.
        let of = |k: [f64; 2]| kept(&[[2.0, 3.0, 2.0 + k[0]], [5.0, 5.0, 5.0 + k[1]]]);
        let found = of([0.25, 0.5]);
        assert_eq!(found.share, Some(0.25));
        assert_eq!(found.effect, 0.5f64.sqrt());
        assert_eq!(found.rest, 0.125f64.sqrt());
        assert!(found.is_lost(1.0) && !found.is_unclear(1.0));
        for (k, lost, unclear) in [
            ([1.0, 0.0], false, false),
            ([0.6, 9.0], false, false),
            ([0.0, 0.0], true, false),
            ([2.0, 0.5], true, false),
            ([0.0, 1.9], true, false),
            ([0.0, 2.1], false, true),
        ] {
            let found = of(k);
            assert_eq!(
                (found.is_lost(1.0), found.is_unclear(1.0)),
                (lost, unclear),
                "{k:?}"
            );
        }
        // An effect as small as the order of sums.
        assert!(!of([0.0, 0.0]).is_lost(1e5));
        let none = kept(&[[2.0, 2.0, 2.5]]);
        assert_eq!((none.share, none.rest), (None, 0.5));
        assert!(!none.is_lost(1.0) && !none.is_unclear(1.0));
    }
}
