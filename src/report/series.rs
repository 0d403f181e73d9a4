//! `metrics.jsonl` as curves: every key that ever held a number is a series over the steps.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// One value of a series.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// The optimizer step.
    pub step: u64,
    /// The value; NaN where the file says `null`: the number was not finite.
    pub value: f64,
}

/// The values of one key, by ascending step.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// The key in `metrics.jsonl`.
    pub name: String,
    /// A step whose line lacks the key is no point; a step whose value is `null` is one with NaN.
    pub points: Vec<Point>,
}

impl Series {
    /// The last value that is a number.
    pub fn last_finite(&self) -> Option<Point> {
        self.points
            .iter()
            .rev()
            .find(|point| point.value.is_finite())
            .copied()
    }
}

/// Reads the lines of `metrics.jsonl`, in their order. A last line without its end was cut by a kill and is left out.
///
/// # Errors
/// The file is missing; a line is not a JSON object with a `step`.
pub fn read_metrics(path: &Path) -> Result<Vec<Map<String, Value>>> {
    lines(path, |line| {
        let row: Map<String, Value> = serde_json::from_slice(line)?;
        match row.get("step").and_then(Value::as_u64) {
            Some(_) => Ok(row),
            None => Err(serde::de::Error::custom("an object without a step")),
        }
    })
}

/// Reads a file of one JSON value a line; empty lines and a cut last line are left out.
pub(super) fn lines<T>(
    path: &Path,
    parse: impl Fn(&[u8]) -> std::result::Result<T, serde_json::Error>,
) -> Result<Vec<T>> {
    let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
    let whole = bytes.ends_with(b"\n");
    let mut lines = bytes.split(|byte| *byte == b'\n').enumerate().peekable();
    let mut rows = Vec::new();
    while let Some((i, line)) = lines.next() {
        let cut = lines.peek().is_none() && !whole;
        if line.trim_ascii().is_empty() {
            continue;
        }
        match parse(line) {
            Ok(row) => rows.push(row),
            Err(_) if cut => {}
            Err(error) => {
                return Err(Error::input(
                    format!("{}:{}", path.display(), i + 1),
                    error,
                    "one JSON object of a run a line",
                    "remove the line; only the last one can be cut by a kill",
                ));
            }
        }
    }
    Ok(rows)
}

/// The series of all rows, in the order in which their keys first appear. Of equal steps the later line wins, key by key.
pub(super) fn series(rows: &[Map<String, Value>]) -> Vec<Series> {
    let mut found: Map<String, Value> = Map::new();
    let mut all: Vec<Series> = Vec::new();
    for row in rows {
        let Some(step) = row.get("step").and_then(Value::as_u64) else {
            continue;
        };
        for (key, value) in row.iter().filter(|(key, _)| *key != "step") {
            let value = match value {
                Value::Number(number) => number.as_f64().unwrap_or(f64::NAN),
                Value::Null => f64::NAN,
                _ => continue,
            };
            let number = found.get(key).and_then(Value::as_u64).unwrap_or_else(|| {
                found.insert(key.clone(), all.len().into());
                all.push(Series {
                    name: key.clone(),
                    points: Vec::new(),
                });
                all.len() as u64 - 1
            });
            all[number as usize].points.push(Point { step, value });
        }
    }
    for series in &mut all {
        // Stable: among equal steps the order of the file stays, and the last one is kept.
        series.points.sort_by_key(|point| point.step);
        series.points.reverse();
        series.points.dedup_by_key(|point| point.step);
        series.points.reverse();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Series>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, text).unwrap();
        Ok(series(&read_metrics(&path)?))
    }

    #[test]
    fn null_is_a_point_and_a_missing_key_is_none() {
        let all =
            read("{\"step\":1,\"loss\":2.0}\n{\"step\":2,\"loss\":null}\n{\"step\":3,\"eval_loss\":1}\n")
                .unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].points.len(), 2);
        assert!(all[0].points[1].value.is_nan());
        assert_eq!(all[0].last_finite(), Some(Point { step: 1, value: 2.0 }));
        assert_eq!(all[1].points, [Point { step: 3, value: 1.0 }]);
    }

    #[test]
    fn the_later_line_of_a_step_wins() {
        let all =
            read("{\"step\":2,\"loss\":5}\n{\"step\":1,\"loss\":3}\n{\"step\":2,\"loss\":4}\n").unwrap();
        let values: Vec<(u64, f64)> = all[0].points.iter().map(|p| (p.step, p.value)).collect();
        assert_eq!(values, [(1, 3.0), (2, 4.0)]);
    }

    #[test]
    fn a_cut_last_line_is_left_out_and_any_other_is_named() {
        assert_eq!(
            read("{\"step\":1,\"loss\":3}\n{\"step\":2,\"lo").unwrap()[0]
                .points
                .len(),
            1
        );
        let message = read("{\"step\":1}\n{\"ste\n{\"step\":2}\n")
            .unwrap_err()
            .to_string();
        assert!(message.contains("metrics.jsonl:2: found"), "{message}");
        let message = read("{\"loss\":1}\n").unwrap_err().to_string();
        assert!(message.contains("an object without a step"), "{message}");
    }
}
