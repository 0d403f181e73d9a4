//! Bars in a terminal, as wide as it is.

use std::io::IsTerminal;

/// How bars are drawn.
pub(super) struct Chart {
    width: usize,
    /// Eighths of a character, where a terminal shows them.
    fine: bool,
}

/// Where nobody says how wide it is.
const PAGE: usize = 80;

impl Chart {
    /// For standard output: bars of blocks as wide as the terminal, of `#` on a page of 80 columns if it is none.
    pub fn for_output() -> Self {
        let fine = std::io::stdout().is_terminal();
        let size = terminal_size::terminal_size_of(std::io::stdout()).filter(|_| fine);
        let width = size.map_or(PAGE, |(width, _)| usize::from(width.0).clamp(40, 160));
        Self { width, fine }
    }

    /// A line for each `(label, value)`, the longest bar for the largest value.
    pub fn lines(&self, rows: &[(String, f64)]) -> Vec<String> {
        let largest = rows.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        let labels = rows.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
        let room = self.width.saturating_sub(labels + 14).max(8);
        rows.iter()
            .map(|(label, value)| {
                let part = if largest > 0.0 { value / largest } else { 0.0 };
                let bar = self.bar(part, room);
                let line = format!("{label:>labels$}  {}  {bar}", figure(*value));
                line.trim_end().to_string()
            })
            .collect()
    }

    fn bar(&self, part: f64, room: usize) -> String {
        let length = part.clamp(0.0, 1.0) * room as f64;
        if !self.fine {
            return "#".repeat(length.round() as usize);
        }
        let eighths = (length * 8.0).round() as usize;
        let mut bar = "█".repeat(eighths / 8);
        bar.extend(['▏', '▎', '▍', '▌', '▋', '▊', '▉'].get((eighths % 8).wrapping_sub(1)));
        bar
    }
}

/// A number in nine columns.
pub(super) fn figure(x: f64) -> String {
    match x {
        0.0 => format!("{:>9}", 0),
        x if (1e-3..1e5).contains(&x.abs()) => format!("{x:>9.4}"),
        x => format!("{x:>9.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values() {
        let chart = Chart {
            width: 40,
            fine: false,
        };
        let rows = [
            ("0".to_string(), 1.0),
            ("10".to_string(), 0.5),
            ("2".to_string(), 0.0),
        ];
        let lines = chart.lines(&rows);
        let hashes: Vec<usize> = lines.iter().map(|line| line.matches('#').count()).collect();
        assert_eq!(hashes, [24, 12, 0]);
        assert!(lines.iter().all(|line| line.chars().count() <= 40), "{lines:?}");
        assert_eq!(lines[1].find("0.5"), lines[0].find("1.0"));
        let fine = Chart {
            width: 40,
            fine: true,
        };
        assert_eq!(fine.bar(0.5, 24).chars().count(), 12);
        assert_eq!(fine.bar(9.0 / 64.0, 8), "█▏");
        assert_eq!(chart.lines(&[("0".to_string(), 0.0)]), ["0          0"]);
    }
}
