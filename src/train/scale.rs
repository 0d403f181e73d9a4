//! Loss scaling for fp16.

use serde::{Deserialize, Serialize};

/// The factor of the loss that keeps small fp16 gradients above zero, as PyTorch's `GradScaler` moves it: halved when a
/// gradient overflows, doubled after 2000 steps without one.
///
/// A step that overflows is computed again with the smaller factor, so that no data goes by unused.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// The factor, a power of two.
    pub scale: f64,
    /// Steps since it last changed.
    pub good_steps: u64,
    /// Overflows so far.
    pub overflows: u64,
}

/// Steps without an overflow after which the factor doubles.
const GROWTH_INTERVAL: u64 = 2000;

impl Default for LossScale {
    fn default() -> Self {
        Self {
            scale: 65536.0,
            good_steps: 0,
            overflows: 0,
        }
    }
}

impl LossScale {
    /// A gradient overflowed. `false` when the factor is 1 already: then the gradient itself is not finite.
    pub fn shrink(&mut self) -> bool {
        if self.scale <= 1.0 {
            return false;
        }
        self.scale /= 2.0;
        self.good_steps = 0;
        self.overflows += 1;
        true
    }

    /// A step went well.
    pub fn advance(&mut self) {
        self.good_steps += 1;
        if self.good_steps == GROWTH_INTERVAL {
            self.scale *= 2.0;
            self.good_steps = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_moves_as_grad_scaler_does() {
        let mut scale = LossScale::default();
        assert!(scale.shrink());
        assert_eq!((scale.scale, scale.overflows), (32768.0, 1));
        for _ in 0..GROWTH_INTERVAL - 1 {
            scale.advance();
        }
        assert_eq!(scale.scale, 32768.0);
        scale.advance();
        assert_eq!((scale.scale, scale.good_steps), (65536.0, 0));
        scale.scale = 1.0;
        assert!(!scale.shrink());
    }
}
