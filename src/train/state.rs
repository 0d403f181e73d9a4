//! The checkpoints of a run: `checkpoints/step-000100/` holds a PEFT adapter, the optimizer's state and `state.json`.
//!
//! A checkpoint is written into a folder beside its place and renamed when it is whole, so whatever has a name of the
//! form `step-N` is complete; a kill at any moment leaves the ones before it untouched.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::LossScale;
use super::best::BestSoFar;
use super::watch::Watch;
use crate::checkpoint::atomic;
use crate::error::{Error, Result};

/// File of the optimizer's state inside a checkpoint.
pub const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";
const FORMAT: u32 = 2;
const UNFINISHED: &str = ".unfinished-";

/// `state.json`: where a run is, and what it must find unchanged to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Version of this file.
    pub format: u32,
    /// Optimizer steps done. Shuffling and dropout are functions of seed and step: there is no other generator state.
    pub step: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Fingerprint of the encoded training samples.
    pub data: String,
    /// Fingerprint of the base weights.
    pub base: String,
    /// Loss scaling, of a run in fp16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Steps left out because their loss or gradient was no number.
    #[serde(default)]
    pub skipped: u64,
    /// Those since the last good step.
    #[serde(default)]
    pub bad_in_a_row: u64,
    /// Tokens of all steps so far, padding not counted.
    pub tokens: u64,
    /// What is evaluated: samples, and how many of them are answered.
    pub evaluation: String,
    /// The numbers of the evaluation before the first step.
    pub eval_before: Map<String, Value>,
    /// Those of the last evaluation.
    pub eval_after: Map<String, Value>,
    /// The best evaluation so far.
    pub best: BestSoFar,
    /// What was watched to warn of it.
    #[serde(default)]
    pub watch: Watch,
    /// The keys of the configuration that decide the numbers.
    pub config: Map<String, Value>,
}

impl RunState {
    /// The state at the start of a run.
    pub fn new(total_steps: u64, data: String, base: String, config: Map<String, Value>) -> Self {
        Self {
            format: FORMAT,
            step: 0,
            total_steps,
            data,
            base,
            loss_scale: None,
            skipped: 0,
            bad_in_a_row: 0,
            tokens: 0,
            evaluation: String::new(),
            eval_before: Map::new(),
            eval_after: Map::new(),
            best: BestSoFar::default(),
            watch: Watch::default(),
            config,
        }
    }

    /// Takes the state of a checkpoint over for a run that evaluates as this one does. What was measured otherwise is not
    /// compared with what will be; every such change is told.
    pub fn go_on_from(
        mut self,
        checkpoint: RunState,
        keeps_best: bool,
        kept: &Checkpoints,
    ) -> (Self, Vec<String>) {
        let mut notes = Vec::new();
        let RunState {
            config, evaluation, ..
        } = &self;
        let metric = self.best.metric();
        let same_data = *evaluation == checkpoint.evaluation;
        let lost = keeps_best
            && checkpoint
                .best
                .step()
                .is_some_and(|step| kept.of_step(step).is_none());
        let mut state = RunState {
            config: config.clone(),
            evaluation: evaluation.clone(),
            ..checkpoint
        };
        if !same_data {
            notes.push(
                "the evaluation is another than before: earlier numbers are not compared with it".into(),
            );
            (state.eval_before, state.eval_after) = (Map::new(), Map::new());
        }
        if state.best.step().is_some() && (!same_data || lost || state.best.metric() != metric) {
            notes.push(format!(
                "the best so far counts from here on, by {}: {}",
                metric.name(),
                match (same_data, lost) {
                    (true, true) => "its checkpoint was not kept",
                    (true, false) => "it was measured by another number",
                    (false, _) => "it was measured on other data",
                }
            ));
            state.best = BestSoFar::new(metric);
        }
        if state.best.step().is_none() {
            state.best = BestSoFar::new(metric);
        }
        self = state;
        (self, notes)
    }

    /// Reads the state of a checkpoint.
    ///
    /// # Errors
    /// The file cannot be read, or another version of the program wrote it.
    pub fn read(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join(STATE);
        let text = fs::read(&path).map_err(Error::io(&path, "read"))?;
        let state: Self = serde_json::from_slice(&text).map_err(|e| {
            Error::input(
                path.display(),
                e,
                "the state of a run",
                "resume from an older checkpoint: remove this folder",
            )
        })?;
        if state.format != FORMAT {
            let remedy = "resume with the version of glmtune that wrote it";
            return Err(Error::input(
                path.display(),
                format!("format {}", state.format),
                format!("format {FORMAT}"),
                remedy,
            ));
        }
        Ok(state)
    }

    /// Checks that the run of this state may go on as `now`: same data, same base, same configuration.
    ///
    /// # Errors
    /// Something differs; all differences are named.
    pub fn check_continues_as(&self, now: &RunState, place: &Path) -> Result<()> {
        let mut differences = Vec::new();
        let mut keys: Vec<&String> = self.config.keys().chain(now.config.keys()).collect();
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            let text =
                |config: &Map<String, Value>| config.get(key).map_or("unset".to_string(), Value::to_string);
            if self.config.get(key) != now.config.get(key) {
                differences.push(format!(
                    "{key} was {} and is {}",
                    text(&self.config),
                    text(&now.config)
                ));
            }
        }
        if self.base != now.base {
            differences.push("the base weights (--model) differ".into());
        }
        if self.data != now.data {
            differences
                .push("the training samples (--data, its columns or lengths, the tokenizer) differ".into());
        }
        if differences.is_empty() && self.total_steps != now.total_steps {
            differences.push(format!(
                "the run had {} steps and has {}",
                self.total_steps, now.total_steps
            ));
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::input(
            format!("{}: resume", place.display()),
            differences.join(", "),
            "the run that was interrupted",
            "give the same flags and files, or start again with --overwrite",
        ))
    }
}

/// The `checkpoints` folder of a run.
#[derive(Debug, Clone)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// The checkpoints under `output`, of which the newest `keep` are kept.
    pub fn new(output: &Path, keep: usize) -> Self {
        Self {
            dir: output.join("checkpoints"),
            keep: keep.max(1),
        }
    }

    /// Every complete checkpoint with its step, oldest first.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let mut found = Vec::new();
        if !self.dir.exists() {
            return Ok(found);
        }
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir, "read"))? {
            let path = entry.map_err(Error::io(&self.dir, "read"))?.path();
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            if let Some(step) = name.strip_prefix("step-").and_then(|step| step.parse().ok()) {
                found.push((step, path));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Saves a checkpoint: `write` fills a new folder, which gets its name only when all of it is on disk; then the
    /// oldest checkpoints beyond the limit are removed, but never the best one.
    ///
    /// # Errors
    /// Something cannot be written; the earlier checkpoints stay.
    pub fn save(&self, state: &RunState, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let name = name_of(state.step);
        let unfinished = self.dir.join(format!("{UNFINISHED}{name}"));
        let place = self.dir.join(&name);
        if place.exists() {
            // A run repeats itself to the bit: what is there is what would be written.
            return Ok(place);
        }
        fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir, "create"))?;
        self.remove_unfinished()?;
        let filled = fs::create_dir(&unfinished)
            .map_err(Error::io(&unfinished, "create"))
            .and_then(|()| {
                write(&unfinished)?;
                let text = serde_json::to_vec_pretty(state)
                    .unwrap_or_else(|e| panic!("a state is always JSON: {e}"));
                atomic::write(&unfinished.join(STATE), &text)?;
                sync(&unfinished)
            });
        if let Err(error) = filled {
            // The message about the write matters more than one about the clean-up; the next save cleans up again.
            let _ = fs::remove_dir_all(&unfinished);
            return Err(error);
        }
        fs::rename(&unfinished, &place).map_err(Error::io(&place, "name"))?;
        sync(&self.dir)?;
        let all = self.list()?;
        for (step, old) in &all[..all.len().saturating_sub(self.keep)] {
            if state.best.step() != Some(*step) {
                self.remove(old)?;
            }
        }
        Ok(place)
    }

    /// The checkpoint of a step, if it is there.
    pub fn of_step(&self, step: u64) -> Option<PathBuf> {
        let place = self.dir.join(name_of(step));
        place.is_dir().then_some(place)
    }

    /// Removes a checkpoint: first its name goes, so that a kill on the way leaves no half of one under it.
    fn remove(&self, place: &Path) -> Result<()> {
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let going = self.dir.join(format!("{UNFINISHED}{name}"));
        if going.exists() {
            fs::remove_dir_all(&going).map_err(Error::io(&going, "remove"))?;
        }
        fs::rename(place, &going).map_err(Error::io(place, "rename"))?;
        fs::remove_dir_all(&going).map_err(Error::io(&going, "remove"))
    }

    /// Removes what a kill left half written.
    fn remove_unfinished(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir).map_err(Error::io(&self.dir, "read"))? {
            let path = entry.map_err(Error::io(&self.dir, "read"))?.path();
            if path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED))
            {
                fs::remove_dir_all(&path).map_err(Error::io(&path, "remove"))?;
            }
        }
        Ok(())
    }

    /// Removes every checkpoint, whole or half written, and nothing else.
    ///
    /// # Errors
    /// A checkpoint cannot be removed.
    pub fn clear(&self) -> Result<()> {
        if !self.dir.exists() {
            return Ok(());
        }
        for (_, place) in self.list()? {
            self.remove(&place)?;
        }
        self.remove_unfinished()
    }
}

fn name_of(step: u64) -> String {
    format!("step-{step:06}")
}

/// Makes the names inside a folder durable.
fn sync(dir: &Path) -> Result<()> {
    fs::File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(Error::io(dir, "sync"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Metric;

    fn state(step: u64) -> RunState {
        let mut config = Map::new();
        config.insert("learning_rate".into(), 1e-4.into());
        RunState {
            step,
            ..RunState::new(10, "d".into(), "b".into(), config)
        }
    }

    fn names(checkpoints: &Checkpoints) -> Vec<u64> {
        checkpoints
            .list()
            .unwrap()
            .into_iter()
            .map(|(step, _)| step)
            .collect()
    }

    #[test]
    fn the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 2);
        for step in [1, 2, 3] {
            let place = checkpoints
                .save(&state(step), |dir| {
                    fs::write(dir.join("x"), b"x").map_err(Error::io(dir, "write"))
                })
                .unwrap();
            assert_eq!(RunState::read(&place).unwrap(), state(step));
        }
        assert_eq!(names(&checkpoints), [2, 3]);
    }

    #[test]
    fn the_best_is_kept_beside_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 1);
        let mut best = BestSoFar::new(Metric::Loss);
        best.update(2, 1.0, 0.0, Map::new());
        for step in 1..=4 {
            let state = RunState {
                best: if step < 2 {
                    BestSoFar::default()
                } else {
                    best.clone()
                },
                ..state(step)
            };
            checkpoints.save(&state, |_| Ok(())).unwrap();
        }
        assert_eq!(names(&checkpoints), [2, 4]);
        assert!(checkpoints.of_step(2).is_some() && checkpoints.of_step(3).is_none());
    }

    #[test]
    fn a_failed_or_killed_save_leaves_the_earlier_one() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 1);
        checkpoints.save(&state(1), |_| Ok(())).unwrap();
        let full = |dir: &Path| {
            fs::write(dir.join("half"), b"x").unwrap();
            Err(Error::io(dir, "write")(std::io::Error::from(
                std::io::ErrorKind::StorageFull,
            )))
        };
        assert!(checkpoints.save(&state(2), full).is_err());
        assert_eq!(names(&checkpoints), [1]);
        // As a kill would leave it.
        fs::create_dir(dir.path().join("checkpoints/.unfinished-step-000002")).unwrap();
        assert_eq!(names(&checkpoints), [1]);
        checkpoints.save(&state(2), |_| Ok(())).unwrap();
        assert_eq!(names(&checkpoints), [2]);
        assert_eq!(fs::read_dir(dir.path().join("checkpoints")).unwrap().count(), 1);
    }

    #[test]
    fn what_differs_is_named() {
        let before = state(3);
        let mut now = state(0);
        assert!(before.check_continues_as(&now, Path::new("out")).is_ok());
        now.config.insert("learning_rate".into(), 2e-4.into());
        now.base = "other".into();
        let message = before
            .check_continues_as(&now, Path::new("out"))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("learning_rate was 0.0001 and is 0.0002"),
            "{message}"
        );
        assert!(message.contains("base weights"), "{message}");
        assert!(!message.contains("samples"), "{message}");
    }
}
