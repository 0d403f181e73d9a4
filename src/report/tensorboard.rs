//! TensorBoard event files, as `tensorboard --logdir RUN` reads them.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::event::{
    DT_STRING, Dimension, Event, PluginData, SESSION_START, SessionLog, Summary, SummaryMetadata,
    SummaryValue, TensorProto, TensorShape,
};
use crate::error::{Error, Result};

/// What TensorBoard looks for in the name of a file.
const PREFIX: &str = "events.out.tfevents.";

/// An open event file. Every event is one write of one whole record: a killed run leaves at worst one record that is cut,
/// which TensorBoard takes for the end of the file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Begins a new file in `dir`, which is made if need be, to go on after `step` (0: from the start). TensorBoard drops
    /// what earlier files of the folder say about later steps.
    ///
    /// # Errors
    /// The folder or the file cannot be written.
    pub fn open(dir: &Path, step: u64) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
        // TensorBoard reads files in the order of their names, and goes to the next one for good: the name of this file has to
        // come last whatever the clock says.
        let newest = files(dir)?.iter().filter_map(|path| seconds_of(path)).max();
        let seconds = (now() as u64).max(newest.map_or(0, |n| n + 1));
        let name = format!("{PREFIX}{seconds:010}.{}.{}.0", host(), std::process::id());
        let path = dir.join(name);
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(&path)
            .map_err(Error::io(&path, "create"))?;
        let mut writer = Self { path, file };
        writer.write(Event {
            file_version: Some("brain.Event:2".into()),
            ..Event::default()
        })?;
        if step > 0 || newest.is_some() {
            writer.write(Event {
                step: if step == 0 { 0 } else { number(step + 1) },
                session_log: Some(SessionLog {
                    status: SESSION_START,
                }),
                ..Event::default()
            })?;
        }
        Ok(writer)
    }

    /// Removes every event file of `dir`: a new run takes the place of an old one. A missing folder has none.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn remove_all(dir: &Path) -> Result<()> {
        for path in files(dir)? {
            fs::remove_file(&path).map_err(Error::io(&path, "remove"))?;
        }
        Ok(())
    }

    /// Writes one number. What is not finite is written as it is: TensorBoard shows `NaN`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<()> {
        self.summary(
            step,
            SummaryValue {
                tag: tag.into(),
                simple_value: Some(value as f32),
                ..SummaryValue::default()
            },
        )
    }

    /// Writes the numbers of a line of `metrics.jsonl` under the tags of the Hugging Face Trainer: `loss` is `train/loss`,
    /// `eval_loss` is `eval/loss`. `null` stands for a number that was not finite and is written as NaN; the step itself is
    /// not a curve.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn row(&mut self, step: u64, row: &Map<String, Value>) -> Result<()> {
        for (key, value) in row.iter().filter(|(key, _)| *key != "step") {
            let value = match value {
                Value::Null => f64::NAN,
                Value::Number(number) => number.as_f64().unwrap_or(f64::NAN),
                _ => continue,
            };
            let tag = match key.strip_prefix("eval_") {
                Some(metric) => format!("eval/{metric}"),
                None => format!("train/{key}"),
            };
            self.scalar(step, &tag, value)?;
        }
        Ok(())
    }

    /// Writes a text, which TensorBoard renders as Markdown.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, markdown: &str) -> Result<()> {
        let tensor = TensorProto {
            dtype: DT_STRING,
            tensor_shape: Some(TensorShape {
                dim: vec![Dimension { size: 1 }],
            }),
            string_val: vec![markdown.as_bytes().to_vec()],
        };
        self.summary(
            step,
            SummaryValue {
                tag: format!("{tag}/text_summary"),
                tensor: Some(tensor),
                metadata: Some(SummaryMetadata {
                    plugin_data: Some(PluginData {
                        plugin_name: "text".into(),
                    }),
                }),
                ..SummaryValue::default()
            },
        )
    }

    /// Brings what was written to the disk. Readers of this machine see it without.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::io(&self.path, "write"))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn summary(&mut self, step: u64, value: SummaryValue) -> Result<()> {
        self.write(Event {
            step: number(step),
            summary: Some(Summary { value: vec![value] }),
            ..Event::default()
        })
    }

    fn write(&mut self, event: Event) -> Result<()> {
        let frame = Event {
            wall_time: now(),
            ..event
        }
        .frame();
        self.file
            .write_all(&frame)
            .map_err(Error::io(&self.path, "write"))
    }
}

/// A step as the format holds it.
fn number(step: u64) -> i64 {
    i64::try_from(step).unwrap_or(i64::MAX)
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |d| d.as_secs_f64())
}

/// The event files of a folder.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir, "read"))? {
        let path = entry.map_err(Error::io(dir, "read"))?.path();
        let name = path.file_name().map(OsString::from).unwrap_or_default();
        if name.to_string_lossy().starts_with(PREFIX) && path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

/// The time in the name of an event file.
fn seconds_of(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    name.split('.').next()?.parse().ok()
}

/// The name of this machine, in letters that a file name can hold.
fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("COMPUTERNAME").ok())
        .unwrap_or_default();
    let plain = |c: &char| c.is_ascii_alphanumeric() || *c == '-' || *c == '_';
    let name: String = name.trim().chars().filter(plain).take(63).collect();
    if name.is_empty() { "localhost".into() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(writer: &EventWriter) -> Vec<Event> {
        Event::read_all(&fs::read(writer.path()).unwrap())
    }

    #[test]
    fn numbers_and_texts_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("tensorboard");
        let mut writer = EventWriter::open(&dir, 0).unwrap();
        writer.scalar(1, "train/loss", 0.0).unwrap();
        writer.scalar(2, "train/loss", f64::NAN).unwrap();
        writer.scalar(3, "train/loss", f64::INFINITY).unwrap();
        writer.text(3, "samples", "**问** 你好").unwrap();
        writer.flush().unwrap();

        let events = read(&writer);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert!(events.iter().all(|event| event.wall_time > 1.5e9));
        let value = |event: &Event| event.summary.as_ref().unwrap().value[0].clone();
        let scalars: Vec<f32> = events[1..4]
            .iter()
            .map(|e| value(e).simple_value.unwrap())
            .collect();
        assert!(scalars[0] == 0.0 && scalars[1].is_nan() && scalars[2] == f32::INFINITY);
        assert_eq!(
            events[1..].iter().map(|e| e.step).collect::<Vec<_>>(),
            [1, 2, 3, 3]
        );
        let text = value(&events[4]);
        assert_eq!(text.tag, "samples/text_summary");
        assert_eq!(text.tensor.unwrap().string_val[0], "**问** 你好".as_bytes());
        assert_eq!(text.metadata.unwrap().plugin_data.unwrap().plugin_name, "text");
    }

    #[test]
    fn a_row_of_metrics_becomes_the_trainer_s_tags() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::open(dir.path(), 0).unwrap();
        let row = r#"{"step": 7, "loss": 1.5, "grad_norm": null, "eval_loss": 2, "eval_bleu-4": 30.5, "note": "x"}"#;
        writer.row(7, &serde_json::from_str(row).unwrap()).unwrap();
        let events = read(&writer);
        let seen: Vec<(String, f32)> = events[1..]
            .iter()
            .map(|event| event.summary.as_ref().unwrap().value[0].clone())
            .map(|value| (value.tag, value.simple_value.unwrap()))
            .collect();
        let names: Vec<&str> = seen.iter().map(|(tag, _)| tag.as_str()).collect();
        assert_eq!(
            names,
            ["train/loss", "train/grad_norm", "eval/loss", "eval/bleu-4"]
        );
        assert_eq!((seen[0].1, seen[2].1, seen[3].1), (1.5, 2.0, 30.5));
        assert!(seen[1].1.is_nan());
    }

    #[test]
    fn going_on_begins_a_later_file_that_voids_later_steps() {
        let dir = tempfile::tempdir().unwrap();
        let first = EventWriter::open(dir.path(), 0).unwrap();
        assert!(read(&first).iter().all(|event| event.session_log.is_none()));
        let second = EventWriter::open(dir.path(), 5).unwrap();
        assert!(first.path() < second.path());
        let start = read(&second)[1].clone();
        assert_eq!(
            (start.step, start.session_log.unwrap().status),
            (6, SESSION_START)
        );
        let third = EventWriter::open(dir.path(), 0).unwrap();
        assert!(second.path() < third.path());
        assert_eq!(read(&third)[1].step, 0);
        EventWriter::remove_all(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_cut_record_ends_the_file_and_costs_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::open(dir.path(), 0).unwrap();
        writer.scalar(1, "train/loss", 2.0).unwrap();
        writer.scalar(2, "train/loss", 1.0).unwrap();
        let bytes = fs::read(writer.path()).unwrap();
        for cut in 1..30 {
            assert_eq!(Event::read_all(&bytes[..bytes.len() - cut]).len(), 2);
        }
    }
}
