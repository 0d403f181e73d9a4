//! The folder of a run, read.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::record::{RunRecord, Sample};
use super::series::{Series, lines, read_metrics, series};
use crate::error::{Error, Result};

/// What the folder of a run holds for a report.
#[derive(Debug, Clone, PartialEq)]
pub struct RunFiles {
    /// The folder's own name.
    pub name: String,
    /// `run.json`.
    pub record: RunRecord,
    /// The lines of `metrics.jsonl`.
    pub rows: Vec<Map<String, Value>>,
    /// The same as curves.
    pub series: Vec<Series>,
    /// `samples.jsonl`; empty if there is none.
    pub samples: Vec<Sample>,
    /// `run.toml`; empty if there is none.
    pub config: String,
}

impl RunFiles {
    /// Reads a folder.
    ///
    /// # Errors
    /// The folder is not that of a run; a file of it is damaged.
    pub fn read(dir: &Path) -> Result<Self> {
        check_is_run(dir)?;
        let rows = read_metrics(&dir.join("metrics.jsonl"))?;
        let samples = optional(dir.join("samples.jsonl"), |path| {
            lines(path, |line| serde_json::from_slice(line))
        })?;
        let config = optional(dir.join("run.toml"), |path| {
            let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        })?;
        // `.` and `..` have a name too, once they are resolved.
        let resolved = dir.canonicalize().map_err(Error::io(dir, "open"))?;
        Ok(Self {
            name: resolved
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
            record: RunRecord::read(&dir.join("run.json"))?,
            series: series(&rows),
            rows,
            samples,
            config,
        })
    }
}

/// Says what is given when it is no run.
fn check_is_run(dir: &Path) -> Result<()> {
    let expected = "the folder of a run";
    if !dir.exists() {
        let remedy = "give what --output named when training";
        return Err(Error::input(dir.display(), "nothing", expected, remedy));
    }
    if !dir.is_dir() {
        let remedy = "give the folder that holds run.json";
        return Err(Error::input(dir.display(), "a file", expected, remedy));
    }
    for name in ["run.json", "metrics.jsonl"] {
        if !dir.join(name).is_file() {
            let found = format!("no {name} in it");
            let remedy = match dir.parent() {
                Some(parent) if dir.join("state.json").is_file() || parent.join("run.json").is_file() => {
                    "that is a part of a run: give the folder above it"
                }
                _ => "give what --output named when training",
            };
            return Err(Error::input(dir.display(), found, expected, remedy));
        }
    }
    Ok(())
}

/// Reads a file that may be missing.
fn optional<T: Default>(path: PathBuf, read: impl Fn(&Path) -> Result<T>) -> Result<T> {
    if path.is_file() {
        read(&path)
    } else {
        Ok(T::default())
    }
}
