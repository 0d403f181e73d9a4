//! The best evaluation of a run, and when to stop for want of a better one.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::Metric;

/// The best evaluation so far. Part of every checkpoint: a resumed run goes on counting.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct BestSoFar {
    metric: Metric,
    best: Option<(u64, f64)>,
    /// All numbers of that evaluation.
    row: Map<String, Value>,
    /// Evaluations since one was better by more than the threshold.
    since: u64,
}

impl BestSoFar {
    /// Nothing evaluated yet.
    pub fn new(metric: Metric) -> Self {
        Self {
            metric,
            ..Self::default()
        }
    }

    /// What it is measured by.
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// Takes an evaluation over, with all its numbers; is it the best? One that is no number never is.
    ///
    /// Patience begins anew when it is better by more than `threshold`, as in transformers' `EarlyStoppingCallback`.
    pub fn update(&mut self, step: u64, value: f64, threshold: f64, row: Map<String, Value>) -> bool {
        let beats = |threshold| match self.best {
            None => value.is_finite(),
            Some((_, old)) => self.metric.improves(value, old, threshold),
        };
        let (better, much_better) = (beats(0.0), beats(threshold));
        self.since = if much_better { 0 } else { self.since + 1 };
        if better {
            self.best = Some((step, value));
            self.row = row;
        }
        better
    }

    /// Its step.
    pub fn step(&self) -> Option<u64> {
        self.best.map(|(step, _)| step)
    }

    /// Its metric's value.
    pub fn value(&self) -> Option<f64> {
        self.best.map(|(_, value)| value)
    }

    /// All its numbers.
    pub fn row(&self) -> &Map<String, Value> {
        &self.row
    }

    /// Have `patience` evaluations gone by without a better one?
    pub fn is_stale(&self, patience: Option<u64>) -> bool {
        patience.is_some_and(|patience| self.since >= patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(best: &mut BestSoFar, step: u64, value: f64, threshold: f64) -> bool {
        best.update(step, value, threshold, Map::new())
    }

    #[test]
    fn patience_counts_evaluations_without_a_better_one() {
        let mut best = BestSoFar::new(Metric::Loss);
        assert!(!update(&mut best, 0, f64::NAN, 0.0), "NaN is never the best");
        assert!(update(&mut best, 1, 2.0, 0.0));
        assert!(!best.is_stale(Some(1)));
        assert!(
            update(&mut best, 2, 1.95, 0.1),
            "the best, though by less than the threshold"
        );
        assert!(best.is_stale(Some(1)), "which does not give new patience");
        assert!(!update(&mut best, 3, f64::NAN, 0.1));
        assert!(best.is_stale(Some(2)) && !best.is_stale(Some(3)) && !best.is_stale(None));
        assert!(update(&mut best, 4, 1.8, 0.1));
        assert_eq!((best.step(), best.value()), (Some(4), Some(1.8)));
        assert!(!best.is_stale(Some(1)));
    }

    #[test]
    fn higher_scores_are_better() {
        let mut best = BestSoFar::new(Metric::Bleu4);
        assert!(update(&mut best, 1, 10.0, 0.0));
        assert!(!update(&mut best, 2, 9.0, 0.0));
        assert!(update(&mut best, 3, 11.0, 0.0));
    }
}
