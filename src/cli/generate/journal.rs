//! `answers.jsonl.partial`: the answers so far, batch by batch, and what they are made from.
//!
//! The first line says what the run was given, each further line holds a batch whole. A kill cuts at most the last line, whose batch
//! is then answered again. The batches are planned from the input alone, so a run that goes on answers the very batches that
//! an uninterrupted one would.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// An answer's place: the line of its record, and its sample.
pub type Place = (usize, u64);

/// The answers of a batch, with their places.
pub type Answers = Vec<(Place, String)>;

/// How every journal begins. A file that begins otherwise is somebody's own.
const BEGINNING: &[u8] = b"{\"settings\":";

/// The open file.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// The answers of each batch that is done.
    done: Vec<Answers>,
    /// Is nothing in it but what this run wrote?
    own: bool,
}

impl Journal {
    /// The file for the answers that will be `output`.
    pub fn path(output: &Path) -> PathBuf {
        let mut name = output.as_os_str().to_os_string();
        name.push(".partial");
        PathBuf::from(name)
    }

    /// Opens the journal of `output`. With `resume` it goes on where an earlier run with the same `settings` stopped; with
    /// `overwrite` that run is forgotten.
    ///
    /// # Errors
    /// There are answers of an earlier run and neither flag is given, or `resume` with other settings; the file is no journal,
    /// and stays as it is; another process writes the journal; it cannot be written.
    pub fn open(output: &Path, settings: &Map<String, Value>, resume: bool, overwrite: bool) -> Result<Self> {
        let path = Self::path(output);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(Error::io(&path, "create"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let remedy = "wait for it, or give --output another name";
                return Err(Error::input(
                    path.display(),
                    "another run that writes it",
                    "one run at a time",
                    remedy,
                ));
            }
            // Some file systems know no locks: nothing is lost but this check.
            Err(TryLockError::Error(_)) => {}
        }
        let mut journal = Self {
            path,
            file,
            done: Vec::new(),
            own: false,
        };
        let kept = journal.read(settings, resume, overwrite)?;
        let cannot = |e| Error::io(&journal.path, "write")(e);
        journal.file.set_len(kept).map_err(cannot)?;
        journal.file.seek(std::io::SeekFrom::End(0)).map_err(cannot)?;
        if kept == 0 {
            journal.own = true;
            journal.append(&json!({ "settings": settings }))?;
        }
        Ok(journal)
    }

    /// Takes over what an earlier run left; returns how many bytes of it are kept.
    fn read(&mut self, settings: &Map<String, Value>, resume: bool, overwrite: bool) -> Result<u64> {
        let mut bytes = Vec::new();
        self.file
            .read_to_end(&mut bytes)
            .map_err(Error::io(&self.path, "read"))?;
        if !bytes.is_empty() && !bytes.starts_with(BEGINNING) {
            let remedy = "move it away, or give --output another name";
            return Err(self.wrong(
                "something else than a journal",
                "the answers of an earlier run",
                remedy,
            ));
        }
        // A line without its end was cut.
        let mut lines = bytes
            .split_inclusive(|&byte| byte == b'\n')
            .filter(|line| line.ends_with(b"\n"));
        let first: Option<Value> = lines.next().and_then(|line| serde_json::from_slice(line).ok());
        let Some(Value::Object(earlier)) = first.as_ref().and_then(|first| first.get("settings")) else {
            if bytes.contains(&b'\n') && !overwrite {
                let remedy = "move it away, or give --overwrite";
                return Err(self.wrong(
                    "a journal whose first line is damaged",
                    "the answers of an earlier run",
                    remedy,
                ));
            }
            return Ok(0);
        };
        let mut kept = bytes
            .iter()
            .position(|&byte| byte == b'\n')
            .map_or(0, |at| at + 1);
        let mut done = Vec::new();
        for line in lines {
            let Some(answers) = batch(line, done.len()) else {
                break;
            };
            done.push(answers);
            kept += line.len();
        }
        if done.is_empty() || (overwrite && !resume) {
            return Ok(0);
        }
        if !resume {
            let found = format!(
                "{} answers of an earlier run",
                done.iter().map(Vec::len).sum::<usize>()
            );
            let remedy = "--resume goes on with it, --overwrite begins again";
            return Err(self.wrong(&found, "none", remedy));
        }
        let names = earlier.keys().chain(settings.keys());
        if let Some(name) = names
            .into_iter()
            .find(|&name| earlier.get(name) != settings.get(name))
        {
            let words = |value: Option<&Value>| match value {
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
                None => "nothing".to_string(),
            };
            let found = format!("answers made with {name}: {}", words(earlier.get(name)));
            let expected = format!("{name}: {}, as now", words(settings.get(name)));
            let remedy = "go on with what the run began with, or begin again with --overwrite";
            return Err(self.wrong(&found, &expected, remedy));
        }
        self.done = done;
        Ok(kept as u64)
    }

    fn wrong(&self, found: &str, expected: &str, remedy: &str) -> Error {
        Error::input(self.path.display(), found, expected, remedy)
    }

    /// The answers of the batches that are done: the first ones of the plan.
    pub fn done(&self) -> &[Answers] {
        &self.done
    }

    /// Adds a batch.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn push(&mut self, answers: Answers) -> Result<()> {
        let rows: Vec<Value> = answers
            .iter()
            .map(|((line, sample), answer)| json!({"line": line, "sample": sample, "predict": answer}))
            .collect();
        self.append(&json!({"batch": self.done.len(), "answers": rows}))?;
        self.done.push(answers);
        Ok(())
    }

    fn append(&mut self, line: &Value) -> Result<()> {
        let cannot = |e| Error::io(&self.path, "write")(e);
        self.file
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| self.file.sync_data())
            .map_err(cannot)
    }

    /// Removes the file: the answers are in their own.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn finish(self) -> Result<()> {
        std::fs::remove_file(&self.path).map_err(Error::io(&self.path, "remove"))
    }
}

/// A run that ends before its first batch leaves nothing behind.
impl Drop for Journal {
    fn drop(&mut self) {
        if self.own && self.done.is_empty() {
            // Nothing to report to: the failure that led here is already on its way to the user.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The answers of a line, if it is that of batch `number`.
fn batch(line: &[u8], number: usize) -> Option<Answers> {
    let line: Value = serde_json::from_slice(line).ok()?;
    let rows = line.get("answers")?.as_array()?;
    let answer = |row: &Value| {
        let line = usize::try_from(row.get("line")?.as_u64()?).ok()?;
        let place = (line, row.get("sample")?.as_u64()?);
        Some((place, row.get("predict")?.as_str()?.to_string()))
    };
    let answers = rows.iter().map(answer).collect();
    (line.get("batch")?.as_u64()? == number as u64)
        .then_some(answers)
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(seed: u64) -> Map<String, Value> {
        Map::from_iter([("seed".to_string(), seed.into())])
    }

    #[test]
    fn a_cut_line_is_dropped_and_other_settings_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("answers.jsonl");
        let path = Journal::path(&output);
        let open = |seed, resume, overwrite| Journal::open(&output, &settings(seed), resume, overwrite);
        // A run that left nothing is in nobody's way.
        drop(open(1, false, false).unwrap());
        assert!(!path.exists());
        let first = vec![((1, 0), "甲".to_string()), ((2, 0), "乙\n".to_string())];
        let second = vec![((3, 0), "丙".to_string())];
        let mut journal = open(2, false, false).unwrap();
        journal.push(first.clone()).unwrap();
        journal.push(second.clone()).unwrap();
        let line = open(2, true, false).unwrap_err().to_string();
        assert!(line.contains("one run at a time"), "{line}");
        drop(journal);
        let line = open(2, false, false).unwrap_err().to_string();
        assert!(line.contains("3 answers") && line.contains("--resume"), "{line}");
        let line = open(3, true, false).unwrap_err().to_string();
        assert!(
            line.contains("made with seed: 2") && line.contains("seed: 3, as now"),
            "{line}"
        );

        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        let mut journal = open(2, true, false).unwrap();
        assert_eq!(journal.done(), [first]);
        journal.push(second).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        journal.finish().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn another_file_of_that_name_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("answers.jsonl");
        let path = Journal::path(&output);
        for work in ["years of work\n", "years of work", "{\"prompt\": 1}\n"] {
            std::fs::write(&path, work).unwrap();
            for (resume, overwrite) in [(false, false), (true, false), (false, true), (true, true)] {
                let line = Journal::open(&output, &settings(1), resume, overwrite).unwrap_err();
                assert!(
                    line.to_string().contains("something else than a journal"),
                    "{line}"
                );
            }
            assert_eq!(std::fs::read_to_string(&path).unwrap(), work);
        }
    }
}
