//! Learning-rate schedules, as `transformers.get_scheduler` with its default arguments defines them.

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
    /// Linear warm-up, then half a cosine to 0.
    #[default]
    Cosine,
    /// As `cosine`, with hard restarts; with transformers' default of one cycle the curve is the same.
    CosineWithRestarts,
    /// Linear warm-up, then linear (power 1) to 1e-7.
    Polynomial,
}

impl Scheduler {
    /// Every schedule, in the order of the help text.
    pub const ALL: [Scheduler; 6] = [
        Scheduler::Cosine,
        Scheduler::Linear,
        Scheduler::Constant,
        Scheduler::ConstantWithWarmup,
        Scheduler::CosineWithRestarts,
        Scheduler::Polynomial,
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
        }
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
            Scheduler::Cosine => (0.5 * (1.0 + (PI * progress).cos())).max(0.0),
            Scheduler::CosineWithRestarts if progress >= 1.0 => 0.0,
            Scheduler::CosineWithRestarts => (0.5 * (1.0 + (PI * progress.fract()).cos())).max(0.0),
            Scheduler::Polynomial => {
                const END: f64 = 1e-7;
                if update > self.total_steps {
                    return END / self.base;
                }
                ((self.base - END) * (1.0 - progress) + END) / self.base
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
            };
            if scheduler != Scheduler::Constant {
                assert_eq!(schedule.rate(0), 0.0, "{scheduler:?}");
            }
            assert!((schedule.rate(4) - 1e-3).abs() < 1e-15, "{scheduler:?}");
            if !matches!(scheduler, Scheduler::Constant | Scheduler::ConstantWithWarmup) {
                assert!(
                    schedule.rate(20) < 2e-7,
                    "{scheduler:?} ends at {}",
                    schedule.rate(20)
                );
            }
        }
    }

    #[test]
    fn the_warm_up_ratio_rounds_up() {
        assert_eq!(warmup_steps(None, 0.03, 50), 2);
        assert_eq!(warmup_steps(None, 0.0, 50), 0);
        assert_eq!(warmup_steps(Some(7), 0.03, 50), 7);
    }
}
