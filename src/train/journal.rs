//! Everything a run writes for people beside its checkpoints: `metrics.jsonl`, `samples.jsonl`, TensorBoard events,
//! `run.json` and `report.html`.

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};

use super::lines::JsonLines;
use super::state::RunState;
use crate::compute;
use crate::error::{Error, Result};
use crate::report::{self, Best, EventWriter, RunRecord, Sample, Status};
use crate::tensor::Device;

/// Files of a run folder that this room writes; a new run replaces them.
pub(super) const FILES: [&str; 4] = ["metrics.jsonl", "samples.jsonl", "run.json", "report.html"];

/// The open files.
pub(super) struct Journal {
    dir: PathBuf,
    metrics: JsonLines,
    samples: JsonLines,
    events: EventWriter,
    record: RunRecord,
    device: Device,
    /// When the stretch of time began that is added to the record next.
    since: Instant,
}

/// What a stretch of time was spent on.
#[derive(Debug, Clone, Copy)]
pub(super) enum Spent {
    Preparing,
    Training,
    Evaluating,
}

impl Journal {
    /// Opens the files of `dir` to go on after `step`; `None` begins anew. `record` says what the run is; what an earlier part of it
    /// has added up is carried on.
    pub fn open(
        dir: &Path,
        step: Option<u64>,
        mut record: RunRecord,
        device: Device,
        started: Instant,
    ) -> Result<Self> {
        let path = dir.join("run.json");
        record.times.started = now();
        // A record that is missing or damaged costs nothing but its sums: the run itself does not depend on it.
        if let Some((step, before)) = step.and_then(|step| Some((step, RunRecord::read(&path).ok()?))) {
            record.times = before.times;
            record.resumed_at = before.resumed_at;
            record.resumed_at.push(step);
        }
        if step.is_none() {
            EventWriter::remove_all(dir)?;
        }
        let mut journal = Self {
            dir: dir.to_path_buf(),
            metrics: JsonLines::open(&dir.join("metrics.jsonl"), step)?,
            samples: JsonLines::open(&dir.join("samples.jsonl"), step)?,
            events: EventWriter::open(dir, step.unwrap_or(0))?,
            record,
            device,
            since: started,
        };
        journal.spent(Spent::Preparing);
        journal.write()?;
        Ok(journal)
    }

    /// Ends a stretch of time.
    pub fn spent(&mut self, on: Spent) {
        let seconds = self.since.elapsed().as_secs_f64();
        self.since = Instant::now();
        let times = &mut self.record.times;
        *match on {
            Spent::Preparing => &mut times.preparing_seconds,
            Spent::Training => &mut times.training_seconds,
            Spent::Evaluating => &mut times.evaluating_seconds,
        } += seconds;
    }

    /// A line of numbers of `step`.
    pub fn row(&mut self, step: u64, row: &Map<String, Value>) -> Result<()> {
        self.metrics.write(row)?;
        self.events.row(step, row)
    }

    /// An answer.
    pub fn sample(&mut self, sample: &Sample) -> Result<()> {
        self.samples.write(sample)?;
        let quote = |text: &str| text.replace('\n', "\n> ");
        let markdown = format!("**{}**\n\n> {}", quote(&sample.prompt), quote(&sample.prediction));
        let tag = sample.suite.as_deref().unwrap_or("eval");
        self.events
            .text(sample.step, &format!("samples/{tag}"), &markdown)
    }

    /// Takes over how far the run has come; `best` is the checkpoint of the best evaluation.
    pub fn note(&mut self, state: &RunState, steps: u64, best: Option<PathBuf>) {
        let record = &mut self.record;
        (record.steps, record.total_steps) = (steps, state.total_steps);
        record.tokens = state.tokens;
        record.eval_before = state.eval_before.clone();
        record.eval_after = state.eval_after.clone();
        record.best = state
            .best
            .step()
            .zip(state.best.value())
            .map(|(step, value)| Best {
                step,
                metric: format!("eval_{}", state.best.metric().name()),
                value,
                checkpoint: best.map(|place| place.display().to_string()),
            });
        record.warnings = state
            .watch
            .warnings
            .iter()
            .map(|w| report::Warning {
                step: w.step,
                text: w.text.clone(),
            })
            .collect();
    }

    /// Writes `run.json`.
    pub fn write(&mut self) -> Result<()> {
        self.record.times.updated = now();
        self.record.memory.peak_host_bytes = peak_host_bytes();
        self.record.memory.peak_device_bytes = compute::peak_device_bytes(self.device);
        self.record.write(&self.dir.join("run.json"))
    }

    /// Ends the run as it ended, and writes the report. Of a run that failed, its own error is what matters: one in writing about it
    /// is passed over.
    pub fn end<T>(mut self, result: Result<T>) -> Result<T> {
        (self.record.status, self.record.error) = match &result {
            Ok(_) => (Status::Finished, None),
            Err(Error::Interrupted { .. }) => (Status::Interrupted, None),
            Err(error) => (Status::Failed, Some(error.to_string().replace('\n', " "))),
        };
        let written = self
            .write()
            .and_then(|()| self.events.flush())
            .and_then(|()| report::write(&self.dir));
        match result {
            Ok(value) => written.map(|_| value),
            Err(error) => Err(error),
        }
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |duration| duration.as_secs())
}

/// The most memory this process has held, as Linux counts it.
fn peak_host_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}
