//! What a run looks out for, to warn of it once: a loss that does not move, gradients that are zero, batches without a
//! supervised token.

use serde::{Deserialize, Serialize};

use super::StepReport;

/// Losses that are averaged at the start and of late.
const WINDOW: usize = 20;
/// Less than this share of the loss is no movement.
const STILL: f64 = 1e-3;

/// A warning, with the step it was given at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Warning {
    /// 0: before the first step.
    pub step: u64,
    /// What is wrong, and what to do.
    pub text: String,
}

/// The losses at the start and of late, and what was said already. Part of every checkpoint: a resumed run warns of the same
/// things at the same steps.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Watch {
    first: Vec<f64>,
    last: Vec<f64>,
    said: Said,
    /// Every warning so far.
    pub warnings: Vec<Warning>,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
struct Said {
    still: bool,
    zero: bool,
    masked: bool,
}

impl Watch {
    /// Notes a warning; the text comes back to be printed. One that was given already is not repeated.
    pub fn warn(&mut self, step: u64, text: String) -> Option<String> {
        if self.warnings.iter().any(|w| w.text == text) {
            return None;
        }
        self.warnings.push(Warning {
            step,
            text: text.clone(),
        });
        Some(text)
    }

    /// Looks at a finished step.
    pub fn step(&mut self, report: &StepReport) -> Vec<String> {
        let mut texts = Vec::new();
        if report.masked > 0 && !self.said.masked {
            self.said.masked = true;
            texts.push(format!(
                "{} micro-batches of step {} had no supervised token and taught nothing: look for records whose answer was cut \
                 off",
                report.masked, report.step
            ));
        }
        if report.grad_norm == 0.0 && !self.said.zero {
            self.said.zero = true;
            texts.push(format!(
                "the gradient of step {} is zero: nothing is learnt; check what trains (--lora-target, --trainable-layers) and \
                 the data",
                report.step
            ));
        }
        if self.first.len() < WINDOW {
            self.first.push(report.loss);
        } else {
            if self.last.len() == WINDOW {
                self.last.remove(0);
            }
            self.last.push(report.loss);
        }
        if self.last.len() == WINDOW && !self.said.still && report.step >= 50 {
            let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
            let (then, now) = (mean(&self.first), mean(&self.last));
            // Asked once, at the first step where there is an answer.
            self.said.still = true;
            if (now - then).abs() < STILL * then.abs() {
                texts.push(format!(
                    "the loss does not move: {then:.5} over the first {WINDOW} steps, {now:.5} over the last; raise \
                     --learning-rate, or check that the data fits the model"
                ));
            }
        }
        texts
            .into_iter()
            .filter_map(|text| self.warn(report.step, text))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(losses: impl Iterator<Item = f64>) -> Vec<Warning> {
        let mut watch = Watch::default();
        for (step, loss) in (1..).zip(losses) {
            watch.step(&StepReport {
                step,
                loss,
                supervised: 1,
                grad_norm: 1.0,
                groups: Vec::new(),
                learning_rate: 1e-3,
                loss_scale: None,
                masked: 0,
            });
        }
        watch.warnings
    }

    #[test]
    fn a_loss_that_stands_still_is_warned_of_once_and_one_that_falls_is_not() {
        let still = steps((0..200).map(|i| 3.0 + 1e-4 * f64::from(i % 2)));
        assert_eq!(still.len(), 1);
        assert!(
            still[0].step == 50 && still[0].text.contains("does not move"),
            "{still:?}"
        );
        assert_eq!(steps((0..200).map(|i| 3.0 - 0.01 * f64::from(i))), []);
    }

    #[test]
    fn a_gradient_of_zero_and_masked_batches_are_warned_of_once() {
        let mut watch = Watch::default();
        for step in 1..5 {
            watch.step(&StepReport {
                step,
                loss: 1.0,
                supervised: 0,
                grad_norm: 0.0,
                groups: Vec::new(),
                learning_rate: 1e-3,
                loss_scale: None,
                masked: 2,
            });
        }
        assert_eq!(watch.warnings.len(), 2);
        assert!(watch.warnings.iter().all(|w| w.step == 1));
    }
}
