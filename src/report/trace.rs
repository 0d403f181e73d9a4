//! From the points of a series to what a line of so many pixels can show, and nothing less.

use super::series::Point;

/// A piece of a curve without a gap: places in pixels and values.
pub(super) type Piece = Vec<(f64, f64)>;

/// A curve as it is drawn.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Trace {
    /// The pieces between gaps.
    pub pieces: Vec<Piece>,
    /// Where values are not finite.
    pub gaps: Vec<Gap>,
}

/// Neighbouring values that are not finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Gap {
    /// From and to, in pixels.
    pub from: f64,
    pub to: f64,
    /// The same in steps.
    pub first: u64,
    pub last: u64,
    /// How many values.
    pub count: usize,
}

/// Cuts a series at the values that are not finite and thins each piece: of the points that fall on one column of pixels,
/// the first, the lowest, the highest and the last stay. The picture is that of all points, spikes included, and its size
/// is bounded by its width.
pub(super) fn trace(points: &[Point], place: impl Fn(u64) -> f64) -> Trace {
    let mut trace = Trace::default();
    let mut piece: Piece = Vec::new();
    for (i, point) in points.iter().enumerate() {
        let x = place(point.step);
        if point.value.is_finite() {
            piece.push((x, point.value));
            continue;
        }
        trace.end_piece(&mut piece);
        let follows = i > 0 && !points[i - 1].value.is_finite();
        match trace.gaps.last_mut() {
            // Gaps that touch the same pixel are drawn as one.
            Some(gap) if follows || x - gap.to < 1.0 => {
                (gap.to, gap.last) = (x, point.step);
                gap.count += 1;
            }
            _ => trace.gaps.push(Gap {
                from: x,
                to: x,
                first: point.step,
                last: point.step,
                count: 1,
            }),
        }
    }
    trace.end_piece(&mut piece);
    trace
}

impl Trace {
    fn end_piece(&mut self, piece: &mut Piece) {
        let piece = std::mem::take(piece);
        let (Some(first), Some(last)) = (piece.first(), piece.last()) else {
            return;
        };
        // Pieces that lie in one column together are one upright stroke.
        let column = first.0.floor();
        if column == last.0.floor()
            && let Some(before) = self.pieces.last_mut()
            && before.iter().all(|point| point.0.floor() == column)
        {
            before.extend(piece);
            *before = thinned(before);
            return;
        }
        self.pieces.push(thinned(&piece));
    }
}

/// The first, lowest, highest and last point of each column, in their order.
fn thinned(piece: &[(f64, f64)]) -> Piece {
    let mut out = Piece::new();
    for column in piece.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
        let mut keep = [0, 0, 0, column.len() - 1];
        for (i, point) in column.iter().enumerate() {
            if point.1 < column[keep[1]].1 {
                keep[1] = i;
            }
            if point.1 > column[keep[2]].1 {
                keep[2] = i;
            }
        }
        keep.sort_unstable();
        let mut last = None;
        for i in keep.into_iter().filter(|i| last.replace(*i) != Some(*i)) {
            out.push(column[i]);
        }
    }
    out
}

/// The exponential moving average of TensorBoard: `m_n = w m_{n-1} + (1 - w) x_n`, divided by `1 - w^n` so that it does not
/// start at zero. It begins anew after a value that is not finite.
pub(super) fn smoothed(points: &[Point], weight: f64) -> Vec<Point> {
    let (mut mean, mut share) = (0.0, 1.0);
    points
        .iter()
        .map(|point| {
            if !point.value.is_finite() {
                (mean, share) = (0.0, 1.0);
                return *point;
            }
            mean = weight * mean + (1.0 - weight) * point.value;
            share *= weight;
            Point {
                step: point.step,
                value: mean / (1.0 - share),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(values: impl IntoIterator<Item = f64>) -> Vec<Point> {
        (1..)
            .zip(values)
            .map(|(step, value)| Point { step, value })
            .collect()
    }

    #[test]
    fn a_spike_among_a_hundred_thousand_stays() {
        let mut all = points((0..100_000).map(|i| f64::from(i % 7)));
        all[54_321].value = 1e6;
        all[77_777].value = -1e6;
        let trace = trace(&all, |step| step as f64 / 100_000.0 * 900.0);
        let drawn = trace.pieces.concat();
        assert!(drawn.len() <= 4 * 901, "{}", drawn.len());
        assert!(drawn.iter().any(|p| p.1 == 1e6) && drawn.iter().any(|p| p.1 == -1e6));
        assert!(drawn.windows(2).all(|w| w[0].0 <= w[1].0));
        assert_eq!(drawn.last().unwrap().1, all.last().unwrap().value);
    }

    #[test]
    fn a_gap_is_never_bridged() {
        let nan = f64::NAN;
        let all = points([1.0, 2.0, nan, nan, 3.0, nan, 4.0]);
        let trace = trace(&all, |step| 10.0 * step as f64);
        assert_eq!(
            trace.pieces,
            [
                vec![(10.0, 1.0), (20.0, 2.0)],
                vec![(50.0, 3.0)],
                vec![(70.0, 4.0)]
            ]
        );
        let gaps: Vec<_> = trace.gaps.iter().map(|g| (g.first, g.last, g.count)).collect();
        assert_eq!(gaps, [(3, 4, 2), (6, 6, 1)]);
    }

    #[test]
    fn gaps_everywhere_stay_small_and_keep_the_extremes() {
        let mut all = points((0..100_000).map(|i| if i % 2 == 0 { 1.0 } else { f64::NAN }));
        all[50_000].value = 99.0;
        let trace = trace(&all, |step| step as f64 / 100_000.0 * 900.0);
        assert!(trace.pieces.len() <= 2 * 901 && trace.gaps.len() <= 901);
        assert!(trace.pieces.concat().iter().any(|p| p.1 == 99.0));
        assert_eq!(trace.gaps.iter().map(|g| g.count).sum::<usize>(), 50_000);
    }

    #[test]
    fn smoothing_starts_at_the_value_and_again_after_a_gap() {
        let all = points([4.0, 2.0, f64::NAN, 8.0]);
        let smooth = smoothed(&all, 0.5);
        assert_eq!(smooth[0].value, 4.0);
        assert!((smooth[1].value - (0.25 * 4.0 + 0.5 * 2.0) / 0.75).abs() < 1e-12);
        assert!(smooth[2].value.is_nan());
        assert_eq!(smooth[3].value, 8.0);
    }
}
