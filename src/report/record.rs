//! `run.json` and `samples.jsonl`: what a run was and what its model said.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::atomic;
use crate::error::{Error, Result};

/// The newest format of `run.json` that this program reads, and the one it writes.
pub const MAX_FORMAT: u32 = 1;

/// `run.json`: what a run was, as far as it has come.
///
/// Every field may be missing in the file, so that a field added later needs no new format; what a run does not know stays
/// empty, and the report leaves it out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunRecord {
    /// The format of this file, at most [`MAX_FORMAT`].
    pub format: u32,
    /// The program that trained.
    pub program: Program,
    /// How it stands.
    pub status: Status,
    /// What ended a failed run: its error, in one line.
    pub error: Option<String>,
    /// The method in words: `QLoRA (nf4), r 8, alpha 32`.
    pub method: String,
    /// The base model as the configuration names it.
    pub model: String,
    /// What computed: `cuda:0, NVIDIA GeForce RTX 4090`, `cpu, 8 threads`.
    pub device: String,
    /// The type of the activations: `bf16`.
    pub dtype: String,
    /// How many parameters there are and train.
    pub parameters: Parameters,
    /// Optimizer steps taken.
    pub steps: u64,
    /// Optimizer steps of the whole run.
    pub total_steps: u64,
    /// Tokens of all batches so far, padding not counted.
    pub tokens: u64,
    /// The clock.
    pub times: Times,
    /// SHA-256 of data files, base weights, tokenizer and result.
    pub hashes: Vec<Digest>,
    /// What it took, where it was measured.
    pub memory: Memory,
    /// Metrics of the evaluation before the first step: `eval_loss`, `eval_bleu-4`, ...; not finite: `null`.
    pub eval_before: Map<String, Value>,
    /// Metrics of the last evaluation.
    pub eval_after: Map<String, Value>,
    /// The best evaluation.
    pub best: Option<Best>,
    /// Steps after which the run was interrupted and went on.
    pub resumed_at: Vec<u64>,
    /// What the run warned of, in order.
    pub warnings: Vec<Warning>,
}

impl Default for RunRecord {
    fn default() -> Self {
        Self {
            format: MAX_FORMAT,
            program: Program::default(),
            status: Status::default(),
            error: None,
            method: String::new(),
            model: String::new(),
            device: String::new(),
            dtype: String::new(),
            parameters: Parameters::default(),
            steps: 0,
            total_steps: 0,
            tokens: 0,
            times: Times::default(),
            hashes: Vec::new(),
            memory: Memory::default(),
            eval_before: Map::new(),
            eval_after: Map::new(),
            best: None,
            resumed_at: Vec::new(),
            warnings: Vec::new(),
        }
    }
}

/// The program that trained.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Program {
    /// `0.1.0`.
    pub version: String,
    /// SHA-256 of the executable file, in hexadecimal.
    pub sha256: Option<String>,
}

/// How a run stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It trains, or was killed: a killed program cannot say so.
    #[default]
    Running,
    /// Every step was taken, or early stopping ended it as configured.
    Finished,
    /// Stopped by the user; everything is saved.
    Interrupted,
    /// Ended by an error; see [`RunRecord::error`].
    Failed,
}

/// How many parameters there are and train.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Parameters {
    /// Elements that train.
    pub trainable: u64,
    /// Elements of the base model and of what was added to it.
    pub total: u64,
}

/// The clock of a run; seconds are summed over interruptions, pauses not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Times {
    /// When the run began, in seconds since 1970 UTC.
    pub started: u64,
    /// When this record was written, in seconds since 1970 UTC.
    pub updated: u64,
    /// Loading, quantising, preparing data.
    pub preparing_seconds: f64,
    /// Training steps.
    pub training_seconds: f64,
    /// Evaluations.
    pub evaluating_seconds: f64,
}

/// A SHA-256 and what it is of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Digest {
    /// `training data`, `evaluation data`, `base`, `tokenizer`, `adapter`.
    pub of: String,
    /// The file or folder.
    pub path: String,
    /// Hexadecimal.
    pub sha256: String,
}

/// Peak memory, where it was measured.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// Resident memory of the process at its highest.
    pub peak_host_bytes: Option<u64>,
    /// Memory of the device at its highest.
    pub peak_device_bytes: Option<u64>,
    /// What the memory is for, as far as it is known.
    pub parts: Vec<MemoryPart>,
}

/// Memory for one purpose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPart {
    /// `weights`, `trained parameters`, `optimizer`, `activations`.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// The best evaluation of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Best {
    /// After which optimizer step.
    pub step: u64,
    /// By which metric: `eval_loss`.
    pub metric: String,
    /// Its value there.
    pub value: f64,
    /// The checkpoint that was kept.
    pub checkpoint: Option<String>,
}

/// One warning of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// After which optimizer step; 0: before the first.
    pub step: u64,
    /// In one line.
    pub text: String,
}

/// A line of `samples.jsonl`: one answer of the model at one evaluation.
///
/// Answers of different steps belong together when suite and prompt are equal.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sample {
    /// After which optimizer step; 0: before training.
    pub step: u64,
    /// `None` for evaluation data; `forgetting` for the general prompts of the forgetting meter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suite: Option<String>,
    /// What was asked.
    pub prompt: String,
    /// What the data answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// What the model answered.
    pub prediction: String,
    /// What the base answers without what was trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// KL divergence from the base on this prompt, in nats a token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
}

impl RunRecord {
    /// Reads `run.json`.
    ///
    /// # Errors
    /// The file is missing, is not JSON of this form, or is of a newer format.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
        let remedy = "it was not written by glmtune, or is damaged";
        let value: Value = serde_json::from_slice(&bytes)
            .map_err(|e| Error::input(path.display(), e, "the JSON object of a run", remedy))?;
        if !value.is_object() {
            let found = "JSON that is no object";
            return Err(Error::input(
                path.display(),
                found,
                "the JSON object of a run",
                remedy,
            ));
        }
        // Before the fields: a newer format may have changed what they hold.
        if let Some(format) = value["format"].as_u64().filter(|f| *f > u64::from(MAX_FORMAT)) {
            return Err(Error::input(
                path.display(),
                format!("format {format}"),
                format!("at most {MAX_FORMAT}"),
                "use the glmtune that wrote it, or a newer one",
            ));
        }
        serde_json::from_value(value)
            .map_err(|e| Error::input(path.display(), e, "the fields of a run", remedy))
    }

    /// Writes `run.json`; an earlier one is replaced as a whole.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text =
            serde_json::to_vec_pretty(self).unwrap_or_else(|e| panic!("a run record is always JSON: {e}"));
        text.push(b'\n');
        atomic::write(path, &text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_the_file_and_missing_fields_are_empty() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        let mut record = RunRecord {
            status: Status::Interrupted,
            best: Some(Best {
                step: 3,
                metric: "eval_loss".into(),
                value: 1.5,
                checkpoint: None,
            }),
            ..RunRecord::default()
        };
        record.eval_before.insert("eval_loss".into(), f64::NAN.into());
        record.write(&path).unwrap();
        assert_eq!(RunRecord::read(&path).unwrap(), record);
        assert!(record.eval_before["eval_loss"].is_null());

        std::fs::write(&path, "{}").unwrap();
        assert_eq!(RunRecord::read(&path).unwrap(), RunRecord::default());
    }

    #[test]
    fn a_newer_format_and_a_damaged_file_are_refused_in_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        for (text, expected) in [
            (
                r#"{"format": 2, "method": 7}"#,
                "found format 2, expected at most 1",
            ),
            (r#"{"format": 1, "method": 7}"#, "expected the fields of a run"),
            (r#"{"format": "#, "expected the JSON object of a run"),
            ("[1]", "found JSON that is no object"),
        ] {
            std::fs::write(&path, text).unwrap();
            let message = RunRecord::read(&path).unwrap_err().to_string();
            assert!(message.contains(expected), "{text}: {message}");
        }
    }
}
