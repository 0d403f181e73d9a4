//! What is gathered at one position while the vocabulary goes by, panel by panel.

/// `ln Σ e^x`, of numbers that come one after another.
#[derive(Debug, Clone, Copy)]
struct LogSum {
    largest: f64,
    /// `Σ e^(x - largest)`.
    sum: f64,
}

impl LogSum {
    const EMPTY: Self = Self {
        largest: f64::NEG_INFINITY,
        sum: 0.0,
    };

    /// Makes `x` the largest if it is; returns what sums of the form of `sum` have to be multiplied by.
    fn raise(&mut self, x: f64) -> f64 {
        if x <= self.largest {
            return 1.0;
        }
        let factor = (self.largest - x).exp();
        self.largest = x;
        self.sum *= factor;
        factor
    }

    fn value(self) -> f64 {
        self.largest + self.sum.ln()
    }
}

/// Both models at one position: l the reference's logits, k the result's.
#[derive(Debug, Clone)]
pub(super) struct Tally {
    /// The largest `|l - k|`.
    pub largest: f64,
    /// `Σ |l - k|`.
    pub differences: f64,
    sum: f64,
    squares: f64,
    classes: usize,
    /// The largest logit of each and its class; of equals the first.
    best: [(f32, usize); 2],
    log_sums: [LogSum; 2],
    /// `Σ e^(l - largest) (l - k)`.
    weighted: f64,
    label: Option<usize>,
    /// The logits of the label.
    told: [f64; 2],
    /// What the adapters do here, where they are.
    pub effect: Effect,
}

/// Sums over classes, and over positions, with b the logits of the reference without its adapters.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Effect {
    /// `Σ (l - b)²`: what the adapters do.
    pub moved: f64,
    /// `Σ (k - l) (l - b)`: what of the result's error lies along it.
    pub along: f64,
    /// `Σ (k - l)²`: the error.
    pub error: f64,
}

impl Effect {
    pub fn add(&mut self, other: Self) {
        self.moved += other.moved;
        self.along += other.along;
        self.error += other.error;
    }
}

/// A logit that is no number: which of the models', and of which class.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NotANumber {
    /// 0 is the reference, 1 the result, 2 the reference without its adapters.
    pub model: usize,
    pub class: usize,
    pub value: f32,
}

impl Tally {
    /// `label` is the token that is predicted here, if it counts in the loss.
    pub fn new(label: Option<usize>) -> Self {
        Self {
            largest: 0.0,
            differences: 0.0,
            sum: 0.0,
            squares: 0.0,
            classes: 0,
            best: [(f32::NEG_INFINITY, 0); 2],
            log_sums: [LogSum::EMPTY; 2],
            weighted: 0.0,
            label,
            told: [0.0; 2],
            effect: Effect::default(),
        }
    }

    /// The logits of the next classes, from `first` on; those of the reference without its adapters are added to [`Self::effect`].
    ///
    /// # Errors
    /// One of them is not finite.
    pub fn add(&mut self, first: usize, logits: [&[f32]; 2], base: Option<&[f32]>) -> Result<(), NotANumber> {
        for (model, logits) in logits.into_iter().chain(base).enumerate() {
            if let Some(i) = logits.iter().position(|x| !x.is_finite()) {
                return Err(NotANumber {
                    model,
                    class: first + i,
                    value: logits[i],
                });
            }
            let Some(best) = self.best.get_mut(model) else {
                continue;
            };
            for (i, &x) in logits.iter().enumerate() {
                if x > best.0 {
                    *best = (x, first + i);
                }
            }
        }
        self.weighted *= self.log_sums[0].raise(self.best[0].0.into());
        self.log_sums[1].raise(self.best[1].0.into());
        let [l, k] = self.log_sums;
        let (mut sums, mut weighted) = ([0.0; 2], 0.0);
        for (&x, &y) in logits[0].iter().zip(logits[1]) {
            let (x, y) = (f64::from(x), f64::from(y));
            let (difference, p) = (x - y, (x - l.largest).exp());
            self.largest = self.largest.max(difference.abs());
            self.differences += difference.abs();
            self.sum += x;
            self.squares += x * x;
            sums[0] += p;
            sums[1] += (y - k.largest).exp();
            weighted += p * difference;
        }
        self.weighted += weighted;
        for ((&l, &k), &b) in logits[0].iter().zip(logits[1]).zip(base.unwrap_or_default()) {
            let [l, k, b] = [l, k, b].map(f64::from);
            self.effect.add(Effect {
                moved: (l - b) * (l - b),
                along: (k - l) * (l - b),
                error: (k - l) * (k - l),
            });
        }
        self.classes += logits[0].len();
        for (log_sum, sum) in self.log_sums.iter_mut().zip(sums) {
            log_sum.sum += sum;
        }
        if let Some(label) = self
            .label
            .and_then(|label| label.checked_sub(first))
            .filter(|&i| i < logits[0].len())
        {
            self.told = logits.map(|logits| f64::from(logits[label]));
        }
        Ok(())
    }

    /// The variance of l over the classes.
    pub fn variance(&self) -> f64 {
        let n = self.classes as f64;
        let mean = self.sum / n;
        (self.squares / n - mean * mean).max(0.0)
    }

    /// Do both find the same class most probable?
    pub fn agrees(&self) -> bool {
        self.best[0].1 == self.best[1].1
    }

    /// `KL(softmax l || softmax k) = E(l - k) - (ln Σ e^l - ln Σ e^k)`, in nats.
    pub fn divergence(&self) -> f64 {
        let [l, k] = self.log_sums;
        let kl = self.weighted / l.sum - (l.value() - k.value());
        // A divergence is not negative; what rounding takes below 0 is 0. `max` would also turn a NaN into 0.
        if kl < 0.0 { 0.0 } else { kl }
    }

    /// `-ln p(label)` of both models, where there is a label.
    pub fn losses(&self) -> Option<[f64; 2]> {
        self.label?;
        Some([0, 1].map(|model| self.log_sums[model].value() - self.told[model]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that look like logits.
    fn logits(seed: u32, n: usize) -> Vec<f32> {
        let value = |i: usize| ((i as u32 + 1).wrapping_mul(seed) >> 12) as f32 / (1 << 20) as f32;
        (0..n).map(|i| 9.0 * value(i) - 6.0).collect()
    }

    fn softmax(x: &[f32]) -> Vec<f64> {
        let sum: f64 = x.iter().map(|&x| f64::from(x).exp()).sum();
        x.iter().map(|&x| f64::from(x).exp() / sum).collect()
    }

    #[test]
    fn panels_come_to_what_the_formulas_say_of_the_whole() {
        let [l, k, b] = [2_654_435_761, 2_246_822_519, 3_266_489_917].map(|seed| logits(seed, 100));
        let mut tally = Tally::new(Some(73));
        for first in (0..100).step_by(17) {
            let panel = first..(first + 17).min(100);
            tally
                .add(first, [&l[panel.clone()], &k[panel.clone()]], Some(&b[panel]))
                .unwrap();
        }
        let (p, q) = (softmax(&l), softmax(&k));
        let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-12, "{got} {want}");
        let differences = l.iter().zip(&k).map(|(l, k)| f64::from(*l) - f64::from(*k));
        near(
            tally.largest,
            differences.clone().fold(0.0, |most, d| d.abs().max(most)),
        );
        near(tally.differences, differences.map(f64::abs).sum());
        near(
            tally.divergence(),
            p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum(),
        );
        let [of_l, of_k] = tally.losses().unwrap();
        near(of_l, -p[73].ln());
        near(of_k, -q[73].ln());
        let mean = l.iter().map(|&x| f64::from(x)).sum::<f64>() / 100.0;
        let variance = l.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / 100.0;
        near(tally.variance(), variance);
        let sum = |of: fn(f64, f64, f64) -> f64| -> f64 {
            let all = l.iter().zip(&k).zip(&b);
            all.map(|((l, k), b)| of((*l).into(), (*k).into(), (*b).into()))
                .sum()
        };
        near(tally.effect.moved, sum(|l, _, b| (l - b).powi(2)));
        near(tally.effect.along, sum(|l, k, b| (k - l) * (l - b)));
        near(tally.effect.error, sum(|l, k, _| (k - l).powi(2)));
        let best = |x: &[f32]| (0..100).max_by(|&i, &j| x[i].total_cmp(&x[j])).unwrap();
        assert_eq!(tally.agrees(), best(&l) == best(&k));
    }

    #[test]
    fn a_model_is_at_no_distance_from_itself_and_no_number_is_found() {
        let l = logits(2_654_435_761, 64);
        let mut tally = Tally::new(None);
        tally.add(0, [&l, &l], None).unwrap();
        assert_eq!(
            (tally.largest, tally.differences, tally.divergence()),
            (0.0, 0.0, 0.0)
        );
        assert!(tally.agrees() && tally.losses().is_none());
        for (model, value) in [(0, f32::NAN), (1, f32::INFINITY), (2, f32::NAN)] {
            let mut logits = [l.clone(), l.clone(), l.clone()];
            logits[model][5] = value;
            let found = Tally::new(None)
                .add(32, [&logits[0], &logits[1]], Some(&logits[2]))
                .unwrap_err();
            assert_eq!((found.model, found.class), (model, 37));
        }
    }
}
