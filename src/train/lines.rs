//! Files of JSON lines that belong to steps: `metrics.jsonl`, `samples.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::atomic;
use crate::error::{Error, Result};

/// The open file; every line is written whole, in one call.
#[derive(Debug)]
pub struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens the file to go on after `step`; `None` begins it anew. Lines of later steps, and a line that a kill cut in half,
    /// are removed.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn open(path: &Path, step: Option<u64>) -> Result<Self> {
        let mut kept = Vec::new();
        if let Some(step) = step.filter(|_| path.exists()) {
            let file = File::open(path).map_err(Error::io(path, "open"))?;
            for line in BufReader::new(file).split(b'\n') {
                let line = line.map_err(Error::io(path, "read"))?;
                let row: Option<Value> = serde_json::from_slice(&line).ok();
                if row
                    .and_then(|row| row["step"].as_u64())
                    .is_some_and(|s| s <= step)
                {
                    kept.extend_from_slice(&line);
                    kept.push(b'\n');
                }
            }
        }
        atomic::write(path, &kept)?;
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .map_err(Error::io(path, "open"))?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
        })
    }

    /// Appends one line, an object with a `step`. Numbers that are not finite become `null`, as JSON wants.
    ///
    /// # Errors
    /// The line cannot be written.
    pub fn write(&mut self, row: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(row).unwrap_or_else(|e| panic!("a row is always JSON: {e}"));
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io(&self.path, "write"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn going_on_drops_later_steps_and_half_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut lines = JsonLines::open(&path, None).unwrap();
        for step in 1..=5u64 {
            lines.write(&serde_json::json!({"step": step})).unwrap();
        }
        lines.file.write_all(b"{\"step\":").unwrap();
        JsonLines::open(&path, Some(3)).unwrap();
        assert_eq!(
            std::fs::read_to_string(&path).unwrap(),
            "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n"
        );
        JsonLines::open(&path, None).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }
}
