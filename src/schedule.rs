//! Learning-rate schedules, as `transformers.get_scheduler` defines them.

use std::f64::consts::PI;

/// The shape of the learning rate over a run. Names as in transformers (`SchedulerType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// The base rate, always; warm-up is ignored.
    Constant,
    /// Linear warm-up, then the base rate.
    ConstantWithWarmup,
    /// Linear warm-up, then linear to 0.
    Linear,
    /// Linear warm-up, then half a cosine to [`Schedule::min_lr_ratio`] (above 0: transformers' `cosine_with_min_lr`).
    #[default]
    #[serde(alias = "cosine_with_min_lr")]
    Cosine,
    /// Linear warm-up, then half a cosine to 0, with hard restarts; with transformers' default of one cycle there is none.
    CosineWithRestarts,
    /// Linear warm-up, then `(1 - progress)^power` down to [`Schedule::min_lr_ratio`], or 1e-7 when that is 0.
    Polynomial,
    /// Linear warm-up over w updates, then `sqrt(w / update)`; without warm-up `sqrt(10000 / (10000 + update))`.
    InverseSqrt,
}

impl Scheduler {
    /// Every schedule, in the order of the help text.
    pub const ALL: [Scheduler; 7] = [
        Scheduler::Cosine,
        Scheduler::Linear,
        Scheduler::Constant,
        Scheduler::ConstantWithWarmup,
        Scheduler::CosineWithRestarts,
        Scheduler::Polynomial,
        Scheduler::InverseSqrt,
    ];

    /// The name in transformers.
    pub const fn name(self) -> &'static str {
        match self {
            Scheduler::Constant => "constant",
            Scheduler::ConstantWithWarmup => "constant_with_warmup",
            Scheduler::Linear => "linear",
            Scheduler::Cosine => "cosine",
            Scheduler::CosineWithRestarts => "cosine_with_restarts",
            Scheduler::Polynomial => "polynomial",
            Scheduler::InverseSqrt => "inverse_sqrt",
        }
    }

    /// Does [`Schedule::min_lr_ratio`] mean something to it?
    pub const fn has_minimum(self) -> bool {
        matches!(self, Scheduler::Cosine | Scheduler::Polynomial)
    }

    /// Does [`Schedule::power`] mean something to it?
    pub const fn has_power(self) -> bool {
        matches!(self, Scheduler::Polynomial)
    }
}

/// A schedule with its numbers filled in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The shape.
    pub scheduler: Scheduler,
    /// The learning rate at the top.
    pub base: f64,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// The rate at the end, in units of the base rate, from 0 to below 1; where [`Scheduler::has_minimum`].
    pub min_lr_ratio: f64,
    /// The exponent, above 0, where [`Scheduler::has_power`]; 1 is a straight line.
    pub power: f64,
}

impl Default for Schedule {
    /// transformers' defaults: no warm-up, down to 0, power 1; of no steps.
    fn default() -> Self {
        Self {
            scheduler: Scheduler::default(),
            base: 0.0,
            warmup_steps: 0,
            total_steps: 0,
            min_lr_ratio: 0.0,
            power: 1.0,
        }
    }
}

impl Schedule {
    /// The rate of update number `update`, counted from 0 (so 0 is the first, which has rate 0 under warm-up).
    pub fn rate(&self, update: u64) -> f64 {
        self.base * self.factor(update)
    }

    fn factor(&self, update: u64) -> f64 {
        if self.scheduler == Scheduler::Constant {
            return 1.0;
        }
        if update < self.warmup_steps {
            return update as f64 / self.warmup_steps.max(1) as f64;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = (update - self.warmup_steps) as f64 / decay_steps;
        match self.scheduler {
            Scheduler::Constant | Scheduler::ConstantWithWarmup => 1.0,
            Scheduler::Linear => (self.total_steps.saturating_sub(update) as f64 / decay_steps).max(0.0),
            Scheduler::Cosine => {
                let cosine = 0.5 * (1.0 + (PI * progress).cos());
                (cosine * (1.0 - self.min_lr_ratio) + self.min_lr_ratio).max(0.0)
            }
            Scheduler::CosineWithRestarts if progress >= 1.0 => 0.0,
            Scheduler::CosineWithRestarts => (0.5 * (1.0 + (PI * progress.fract()).cos())).max(0.0),
            Scheduler::Polynomial => {
                let end = match self.min_lr_ratio {
                    0.0 => 1e-7,
                    ratio => ratio * self.base,
                };
                if update > self.total_steps {
                    return end / self.base;
                }
                ((self.base - end) * (1.0 - progress).powf(self.power) + end) / self.base
            }
            Scheduler::InverseSqrt => {
                let scale = match self.warmup_steps {
                    0 => 10_000,
                    steps => steps,
                };
                let shifted = update + (scale - self.warmup_steps);
                1.0 / (shifted as f64 / scale as f64).sqrt()
            }
        }
    }
}

/// Warm-up steps of a run: `steps` when given, else `ceil(ratio * total)` as transformers counts.
pub fn warmup_steps(steps: Option<u64>, ratio: f64, total_steps: u64) -> u64 {
    steps.unwrap_or((ratio * total_steps as f64).ceil() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warm_up_starts_at_zero_and_every_decay_ends_low() {
        for scheduler in Scheduler::ALL {
            let schedule = Schedule {
                scheduler,
                base: 1e-3,
                warmup_steps: 4,
                total_steps: 20,
                ..Schedule::default()
            };
            if scheduler != Scheduler::Constant {
                assert_eq!(schedule.rate(0), 0.0, "{scheduler:?}");
            }
            assert!((schedule.rate(4) - 1e-3).abs() < 1e-15, "{scheduler:?}");
            let last = schedule.rate(20);
            match scheduler {
                Scheduler::Constant | Scheduler::ConstantWithWarmup => assert_eq!(last, 1e-3),
                Scheduler::InverseSqrt => assert!((last - 1e-3 / 5f64.sqrt()).abs() < 1e-15),
                _ => assert!(last < 2e-7, "{scheduler:?} ends at {last}"),
            }
            let least = Schedule {
                min_lr_ratio: 0.25,
                ..schedule
            };
            let reaches = (least.rate(20) - 0.25e-3).abs() < 1e-15;
            assert_eq!(reaches, scheduler.has_minimum(), "{scheduler:?}");
            let bent = Schedule {
                power: 3.0,
                ..schedule
            };
            assert_eq!(
                bent.rate(12) != schedule.rate(12),
                scheduler.has_power(),
                "{scheduler:?}"
            );
        }
    }

    #[test]
    fn the_warm_up_ratio_rounds_up() {
        assert_eq!(warmup_steps(None, 0.03, 50), 2);
        assert_eq!(warmup_steps(None, 0.0, 50), 0);
        assert_eq!(warmup_steps(Some(7), 0.03, 50), 7);
    }
}
