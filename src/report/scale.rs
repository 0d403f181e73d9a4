//! Axes: from values to places, and the round values that are written beside them.

use super::number;

/// Values beyond this are drawn at it: differences stay finite.
const LIMIT: f64 = 1e300;

/// An axis from `low` at 0 to `high` at 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    /// Between ticks; `None` for a logarithmic axis.
    step: Option<f64>,
}

impl Scale {
    /// An axis that shows every value from `low` to `high`, widened to about `wanted` round values. It is logarithmic where
    /// the values are positive and `high` is at least `log_from` times `low`.
    pub(super) fn around(low: f64, high: f64, log_from: f64, wanted: usize) -> Self {
        let (low, high) = (low.clamp(-LIMIT, LIMIT), high.clamp(-LIMIT, LIMIT));
        if low > 0.0 && high / low >= log_from {
            return Self {
                low: 10f64.powf(low.log10().floor()),
                high: 10f64.powf(high.log10().ceil()),
                step: None,
            };
        }
        let (low, high) = if high - low > 1e-9 * low.abs().max(high.abs()) {
            (low, high)
        } else {
            // One value: it stands in the middle, or on the ground where that is zero.
            let around = if low == 0.0 { 1.0 } else { 0.5 * low.abs() };
            (if low == 0.0 { 0.0 } else { low - around }, high + around)
        };
        let step = round_step((high - low) / wanted.max(1) as f64);
        Self {
            low: (low / step + 1e-9).floor() * step,
            high: (high / step - 1e-9).ceil() * step,
            step: Some(step),
        }
    }

    /// The axis of steps with about `wanted` ticks, not widened: curves begin and end at the frame.
    pub(super) fn of_steps(first: u64, last: u64, wanted: usize) -> Self {
        // Beyond this, neighbouring steps are the same number.
        let (first, last) = (first.min(1 << 53), last.min(1 << 53));
        let lone = u64::from(first == last);
        let (low, high) = (
            first.saturating_sub(lone) as f64,
            last.saturating_add(lone) as f64,
        );
        Self {
            low,
            high,
            step: Some(round_step((high - low) / wanted.max(1) as f64).max(1.0)),
        }
    }

    /// Is it logarithmic?
    pub(super) fn is_logarithmic(&self) -> bool {
        self.step.is_none()
    }

    /// The place of a value: 0 at the low end, 1 at the high end.
    pub(super) fn place(&self, value: f64) -> f64 {
        let value = value.clamp(self.low, self.high);
        if self.is_logarithmic() {
            let low = self.low.log10();
            (value.log10() - low) / (self.high.log10() - low)
        } else {
            (value - self.low) / (self.high - self.low)
        }
    }

    /// The round values on the axis, each with its text; at most a dozen.
    pub(super) fn ticks(&self) -> Vec<(f64, String)> {
        let Some(step) = self.step else {
            let (first, last) = (self.low.log10().round() as i32, self.high.log10().round() as i32);
            let every = ((last - first) as usize).div_ceil(6).max(1);
            return (first..=last)
                .step_by(every)
                .map(|power| 10f64.powi(power))
                .map(|value| (value, number::short(value)))
                .collect();
        };
        let first = (self.low / step - 1e-6).ceil();
        let count = ((self.high / step + 1e-6).floor() - first).clamp(0.0, 100.0) as usize;
        (0..=count)
            .map(|i| first + i as f64)
            .map(|i| {
                (
                    i * step,
                    if i == 0.0 {
                        "0".into()
                    } else {
                        self.text(i * step, step)
                    },
                )
            })
            .collect()
    }

    /// The text of a tick: the same number of decimals all along the axis.
    fn text(&self, value: f64, step: f64) -> String {
        if self.low.abs().max(self.high.abs()) >= 1e7 || step < 1e-4 {
            return number::short(value);
        }
        let decimals = (-(step * (1.0 + 1e-9)).log10().floor()).max(0.0) as usize;
        number::grouped(&format!("{value:.decimals$}")).replace('-', "\u{2212}")
    }

    /// The axis for whole numbers: as [`Scale::ticks`], but no tick between them.
    pub(super) fn whole_ticks(&self) -> Vec<(f64, String)> {
        let mut ticks = self.ticks();
        ticks.retain(|(value, _)| value.fract() == 0.0);
        for (value, text) in &mut ticks {
            *text = number::count(*value as u64);
        }
        ticks
    }
}

/// The next of 1, 2, 5 times a power of ten.
fn round_step(raw: f64) -> f64 {
    let power = 10f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|f| f * power >= raw * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(low: f64, high: f64, wanted: usize) -> Vec<String> {
        let ticks = Scale::around(low, high, 1e3, wanted).ticks();
        ticks.into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn ticks_are_round_and_cover_the_values() {
        assert_eq!(texts(0.83, 3.91, 5), ["0", "1", "2", "3", "4"]);
        assert_eq!(
            texts(0.0, 2e-5, 5),
            ["0", "5e\u{2212}6", "1e\u{2212}5", "1.5e\u{2212}5", "2e\u{2212}5"]
        );
        assert_eq!(
            texts(-1.0, 1.0, 4),
            ["\u{2212}1.0", "\u{2212}0.5", "0", "0.5", "1.0"]
        );
        assert_eq!(texts(0.02, 900.0, 5), ["0.01", "0.1", "1", "10", "100", "1,000"]);
        assert_eq!(
            texts(32_768.0, 65_536.0, 4),
            ["30,000", "40,000", "50,000", "60,000", "70,000"]
        );
    }

    #[test]
    fn every_range_has_finite_places_and_few_ticks() {
        let ends = [
            -f64::MAX,
            -1e12,
            -1.0,
            -1e-300,
            0.0,
            f64::MIN_POSITIVE,
            1e-7,
            1.0,
            1.0 + 1e-15,
            1e6,
            f64::MAX,
        ];
        for (i, low) in ends.iter().enumerate() {
            for high in &ends[i..] {
                for log_from in [50.0, f64::INFINITY] {
                    let scale = Scale::around(*low, *high, log_from, 5);
                    let ticks = scale.ticks();
                    assert!((2..=13).contains(&ticks.len()), "{low:e} {high:e}: {ticks:?}");
                    for value in [*low, *high] {
                        let place = scale.place(value);
                        assert!(
                            (0.0..=1.0).contains(&place),
                            "{low:e} {high:e}: {place} {scale:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn one_step_has_an_axis() {
        let scale = Scale::of_steps(1, 1, 4);
        assert_eq!(scale.place(1.0), 0.5);
        let ticks: Vec<String> = scale.whole_ticks().into_iter().map(|(_, text)| text).collect();
        assert_eq!(ticks, ["0", "1", "2"]);
    }
}
