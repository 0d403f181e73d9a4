//! The data of a run: training and evaluation samples, and the batches of every step.

use std::collections::HashSet;

use super::fingerprint;
use crate::config::{DEFAULT_MAX_LENGTH, RunConfig};
use crate::data::batch::Batch;
use crate::data::collate::right_pad;
use crate::data::loader::{Loader, Validation, split};
use crate::data::preview::render_preview;
use crate::data::record::{Columns, read_records};
use crate::data::sample::{FirstTarget, Options, OverLength, Sample, encode_all};
use crate::error::Result;
use crate::model::ModelConfig;
use crate::rng::Stream;
use crate::tokenizer::Tokenizer;

/// Keeps the draws of replayed samples apart from everything else that is drawn from the same seed.
const REPLAY: u64 = 0x5245_504c << 32;

/// Encoded samples and the order they come in.
#[derive(Debug)]
pub struct Inputs {
    training: Vec<Sample>,
    /// General samples, of which each epoch sees `replayed`.
    replay: Vec<Sample>,
    replayed: usize,
    evaluation: Vec<Sample>,
    loader: Loader,
    seed: u64,
    micro_batch: usize,
    pad: u32,
    /// What the user should know: the shape of the records, every cut.
    notes: Vec<String>,
    warnings: Vec<String>,
}

impl Inputs {
    /// Reads and encodes the data of `config`; no sample becomes longer than the model was made for, unless that was asked for.
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
            max_length: Some(match config.max_length {
                // Asked for: positions are computed, not looked up.
                Some(most) if most != DEFAULT_MAX_LENGTH => most,
                most => most.unwrap_or(longest).min(longest),
            }),
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
        if let Some(most) = options.max_length.filter(|&most| most > longest) {
            notes.push(format!(
                "--max-length {most} is beyond the {longest} tokens that the model was made for"
            ));
        }
        let read = |path: &std::path::Path, notes: &mut Vec<String>| -> Result<Vec<Sample>> {
            let (records, shape) = read_records(path, &columns)?;
            let (samples, report) = encode_all(tokenizer, &records, &options)?;
            notes.push(format!("{}: {shape}", path.display()));
            notes.push(report.to_string());
            Ok(samples)
        };
        let mut training = read(&config.data, &mut notes)?;
        let validation = match (config.val_size, config.val_ratio) {
            (Some(count), _) => Some(Validation::Count(count)),
            (None, Some(ratio)) => Some(Validation::Ratio(ratio)),
            (None, None) => None,
        };
        let evaluation = match (&config.eval_data, validation) {
            (Some(path), _) => read(path, &mut notes)?,
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
        let replay = match &config.replay {
            Some(path) if config.replay_ratio > 0.0 => read(path, &mut notes)?,
            _ => Vec::new(),
        };
        let mut replayed = 0;
        if !replay.is_empty() {
            let share = config.replay_ratio;
            replayed = ((training.len() as f64 * share / (1.0 - share)).round() as usize).max(1);
            notes.push(format!(
                "{replayed} of {} general samples are mixed into each pass ({:.1} % of it)",
                replay.len(),
                100.0 * replayed as f64 / (replayed + training.len()) as f64
            ));
        }
        let warnings = leak(training.iter().chain(&replay), &evaluation)
            .into_iter()
            .collect();
        let (micro_batch, accumulation) = (config.micro_batch_size, config.gradient_accumulation_steps);
        let loader = Loader::new(training.len() + replayed, micro_batch, accumulation, config.seed);
        Ok(Self {
            training,
            replay,
            replayed,
            evaluation,
            loader,
            seed: config.seed,
            micro_batch,
            pad: tokenizer.special().pad,
            notes,
            warnings,
        })
    }

    /// What to tell the user before the first step.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What the user should be warned of.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Three samples as the model sees them.
    pub fn preview(&self, tokenizer: &Tokenizer) -> String {
        render_preview(tokenizer, &self.training)
    }

    /// Optimizer steps of one pass over the data.
    pub fn steps_per_epoch(&self) -> u64 {
        self.loader.steps_per_epoch()
    }

    /// Cuts steps into other micro-batches; a step has the same samples.
    pub fn regroup(&mut self, config: &RunConfig) {
        let (micro_batch, accumulation) = (config.micro_batch_size, config.gradient_accumulation_steps);
        let samples = self.training.len() + self.replayed;
        self.loader = Loader::new(samples, micro_batch, accumulation, config.seed);
        self.micro_batch = micro_batch;
    }

    /// The samples of a pass, or those to evaluate on if there are more.
    pub fn most(&self) -> usize {
        (self.training.len() + self.replayed).max(self.evaluation.len())
    }

    /// The sequences of the largest micro-batch: as many as asked for, or all there are.
    pub fn widest(&self) -> usize {
        self.micro_batch.min(self.most())
    }

    /// The tokens of the longest prompt that is answered to evaluate, `<sop>` included.
    pub fn longest_prompt(&self) -> usize {
        let prompts = self.evaluation.iter().map(|sample| sample.context + 1);
        prompts.max().unwrap_or(0)
    }

    /// The largest micro-batch that there could be: the longest sample as often as it fits.
    pub fn largest(&self) -> Batch {
        let all = self.training.iter().chain(&self.replay);
        let longest: Vec<&Sample> = all.max_by_key(|sample| sample.ids.len()).into_iter().collect();
        let samples: Vec<&Sample> = longest
            .iter()
            .cycle()
            .take(self.widest() * longest.len())
            .copied()
            .collect();
        right_pad(&samples, self.pad, None)
    }

    /// The length of the longest sample, evaluation included.
    pub fn longest(&self) -> usize {
        let all = self.training.iter().chain(&self.replay).chain(&self.evaluation);
        all.map(|sample| sample.ids.len()).max().unwrap_or(0)
    }

    /// The micro-batches of update number `update` (from 0), and their tokens without padding.
    pub fn step(&self, update: u64) -> (Vec<Batch>, usize) {
        let mut tokens = 0;
        let mut batches = Vec::new();
        let epoch = self.loader.epoch(update);
        for micro_batch in self.loader.step(update) {
            let samples: Vec<&Sample> = micro_batch.iter().map(|&i| self.sample(epoch, i)).collect();
            tokens += samples.iter().map(|sample| sample.ids.len()).sum::<usize>();
            batches.push(right_pad(&samples, self.pad, None));
        }
        (batches, tokens)
    }

    /// Sample `i` of an epoch: after those of the data come the replayed ones, each general sample once before any comes
    /// again.
    fn sample(&self, epoch: u64, i: usize) -> &Sample {
        let Some(place) = i.checked_sub(self.training.len()) else {
            return &self.training[i];
        };
        let (n, drawn) = (self.replay.len(), epoch as usize * self.replayed + place);
        let round = (drawn / n) as u64;
        let order = Stream::new(self.seed, REPLAY.wrapping_add(round)).permutation(n);
        &self.replay[order[drawn % n]]
    }

    /// The evaluation samples, in the order of their file.
    pub fn evaluation(&self) -> &[Sample] {
        &self.evaluation
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
        of_samples(self.training.iter().chain(&self.replay))
    }

    /// What tells the evaluation samples from others.
    pub fn evaluation_fingerprint(&self) -> String {
        of_samples(self.evaluation.iter())
    }
}

fn of_samples<'a>(samples: impl Iterator<Item = &'a Sample>) -> String {
    fingerprint::of_bytes(|hash| {
        for sample in samples {
            hash(&(sample.ids.len() as u64).to_le_bytes());
            hash(bytemuck::cast_slice(&sample.ids));
            hash(bytemuck::cast_slice(&sample.labels));
        }
    })
}

/// A warning when evaluation samples also stand in the training data: their scores say nothing of new questions.
fn leak<'a>(training: impl Iterator<Item = &'a Sample>, evaluation: &[Sample]) -> Option<String> {
    let known: HashSet<&[u32]> = training.map(|sample| sample.ids.as_slice()).collect();
    let mut leaked = evaluation
        .iter()
        .filter(|sample| known.contains(sample.ids.as_slice()));
    let first = leaked.next()?;
    Some(format!(
        "{} of {} evaluation samples also stand in the training data (first: {}): the evaluation looks better than it is; \
         remove them from one of the two",
        1 + leaked.count(),
        evaluation.len(),
        first.place
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(id: u32) -> Sample {
        Sample {
            ids: vec![id, 9, 9],
            labels: vec![-100, 9, 9],
            context: 1,
            mask: 0,
            place: format!("data.json:{id}"),
        }
    }

    fn inputs(training: u32, replay: u32, replayed: usize) -> Inputs {
        Inputs {
            training: (0..training).map(sample).collect(),
            replay: (100..100 + replay).map(sample).collect(),
            replayed,
            evaluation: Vec::new(),
            loader: Loader::new(training as usize + replayed, 2, 1, 1),
            seed: 1,
            micro_batch: 2,
            pad: 3,
            notes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    #[test]
    fn every_general_sample_comes_once_before_any_comes_again() {
        let inputs = inputs(6, 4, 2);
        let mut drawn = Vec::new();
        for epoch in 0..4 {
            let mut own = 0;
            for step in 0..inputs.steps_per_epoch() {
                let (batches, _) = inputs.step(epoch * inputs.steps_per_epoch() + step);
                for batch in batches {
                    for ids in batch.ids.chunks_exact(batch.len) {
                        match ids[0] {
                            id if id >= 100 => drawn.push(id),
                            _ => own += 1,
                        }
                    }
                }
            }
            assert_eq!(
                (own, drawn.len()),
                (6, 2 * (epoch as usize + 1)),
                "an epoch is the data and two more"
            );
        }
        for round in drawn.chunks_exact(4) {
            let distinct: HashSet<i32> = round.iter().copied().collect();
            assert_eq!(distinct.len(), 4, "{drawn:?}");
        }
    }

    #[test]
    fn evaluation_samples_in_the_training_data_are_warned_of() {
        let training: Vec<Sample> = (0..5).map(sample).collect();
        let evaluation: Vec<Sample> = [7, 3, 1].map(sample).into();
        let text = leak(training.iter(), &evaluation).unwrap();
        assert!(text.contains("2 of 3") && text.contains("data.json:3"), "{text}");
        assert_eq!(leak(training.iter(), &evaluation[..1]), None);
    }
}
