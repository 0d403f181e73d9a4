//! The data of a run: training and evaluation samples, and the batches of every step.

use super::fingerprint;
use crate::config::RunConfig;
use crate::data::batch::Batch;
use crate::data::collate::right_pad;
use crate::data::loader::{Loader, Validation, split};
use crate::data::preview::render_preview;
use crate::data::record::{Columns, read_records};
use crate::data::sample::{FirstTarget, Options, OverLength, Sample, encode_all};
use crate::error::Result;
use crate::model::ModelConfig;
use crate::tokenizer::Tokenizer;

/// Encoded samples and the order they come in.
#[derive(Debug)]
pub struct Inputs {
    training: Vec<Sample>,
    evaluation: Vec<Sample>,
    loader: Loader,
    micro_batch: usize,
    pad: u32,
    /// What the user should know: the shape of the records, every cut.
    notes: Vec<String>,
}

impl Inputs {
    /// Reads and encodes the data of `config`; no sample becomes longer than the model can take.
    ///
    /// # Errors
    /// The data cannot be read or encoded, or nothing is left to train on.
    pub fn prepare(config: &RunConfig, tokenizer: &Tokenizer, model: &ModelConfig) -> Result<Self> {
        let longest = model.max_sequence_length;
        let options = Options {
            first_target: if config.first_target == "answer" {
                FirstTarget::Answer
            } else {
                FirstTarget::Sop
            },
            max_source_length: config.max_source_length,
            max_target_length: config.max_target_length,
            max_length: Some(config.max_length.map_or(longest, |most| most.min(longest))),
            over_length: match config.over_length.as_str() {
                "drop" => OverLength::Drop,
                "error" => OverLength::Error,
                "official" => OverLength::Official,
                _ => OverLength::Cut,
            },
        };
        let columns = Columns {
            prompt: config.prompt_column.clone(),
            response: config.response_column.clone(),
            history: config.history_column.clone(),
        };
        let mut notes = Vec::new();
        let mut read = |path: &std::path::Path| -> Result<Vec<Sample>> {
            let (records, shape) = read_records(path, &columns)?;
            let (samples, report) = encode_all(tokenizer, &records, &options)?;
            notes.push(format!("{}: {shape}", path.display()));
            notes.push(report.to_string());
            Ok(samples)
        };
        let mut training = read(&config.data)?;
        let validation = match (config.val_size, config.val_ratio) {
            (Some(count), _) => Some(Validation::Count(count)),
            (None, Some(ratio)) => Some(Validation::Ratio(ratio)),
            (None, None) => None,
        };
        let evaluation = match (&config.eval_data, validation) {
            (Some(path), _) => read(path)?,
            (None, Some(validation)) => {
                let (kept, held_back) = split(training.len(), validation, config.seed)?;
                let pick = |which: &[usize]| which.iter().map(|&i| training[i].clone()).collect::<Vec<_>>();
                let evaluation = pick(&held_back);
                training = pick(&kept);
                notes.push(format!(
                    "{} samples to train on, {} to evaluate on",
                    training.len(),
                    evaluation.len()
                ));
                evaluation
            }
            (None, None) => Vec::new(),
        };
        let (micro_batch, accumulation) = (config.micro_batch_size, config.gradient_accumulation_steps);
        let loader = Loader::new(training.len(), micro_batch, accumulation, config.seed);
        Ok(Self {
            training,
            evaluation,
            loader,
            micro_batch,
            pad: tokenizer.special().pad,
            notes,
        })
    }

    /// What to tell the user before the first step.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Three samples as the model sees them.
    pub fn preview(&self, tokenizer: &Tokenizer) -> String {
        render_preview(tokenizer, &self.training)
    }

    /// Optimizer steps of one pass over the data.
    pub fn steps_per_epoch(&self) -> u64 {
        self.loader.steps_per_epoch()
    }

    /// The sequences of the largest micro-batch: as many as asked for, or all there are.
    pub fn widest(&self) -> usize {
        self.micro_batch
            .min(self.training.len().max(self.evaluation.len()))
    }

    /// The length of the longest sample, evaluation included.
    pub fn longest(&self) -> usize {
        self.training
            .iter()
            .chain(&self.evaluation)
            .map(|sample| sample.ids.len())
            .max()
            .unwrap_or(0)
    }

    /// The micro-batches of update number `update` (from 0), and their tokens without padding.
    pub fn step(&self, update: u64) -> (Vec<Batch>, usize) {
        let mut tokens = 0;
        let mut batches = Vec::new();
        for micro_batch in self.loader.step(update) {
            let samples: Vec<&Sample> = micro_batch.iter().map(|&i| &self.training[i]).collect();
            tokens += samples.iter().map(|sample| sample.ids.len()).sum::<usize>();
            batches.push(right_pad(&samples, self.pad, None));
        }
        (batches, tokens)
    }

    /// Is there anything to evaluate on?
    pub fn has_evaluation(&self) -> bool {
        !self.evaluation.is_empty()
    }

    /// The evaluation batches, samples of like length together.
    pub fn evaluation_batches(&self) -> impl Iterator<Item = Batch> {
        let mut samples: Vec<&Sample> = self.evaluation.iter().collect();
        samples.sort_by_key(|sample| sample.ids.len());
        let batches: Vec<Vec<&Sample>> = samples
            .chunks(self.micro_batch)
            .map(<[&Sample]>::to_vec)
            .collect();
        batches
            .into_iter()
            .map(|samples| right_pad(&samples, self.pad, None))
    }

    /// What tells the training samples from others: ids, labels and order.
    pub fn fingerprint(&self) -> String {
        fingerprint::of_bytes(|hash| {
            for sample in &self.training {
                hash(&(sample.ids.len() as u64).to_le_bytes());
                hash(bytemuck::cast_slice(&sample.ids));
                hash(bytemuck::cast_slice(&sample.labels));
            }
        })
    }
}
