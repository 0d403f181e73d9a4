//! The forgetting meter: how far a tuned model has moved from its base on questions that have nothing to do with its task.
//!
//! A fixed suite of general questions (`probes.jsonl`: knowledge, everyday life, reasoning, arithmetic, writing,
//! translation, format, safety, in Chinese and English) is answered by the base, greedily, and the base's distribution over
//! the vocabulary is kept at each token. The tuned model then reads the same answers token by token (teacher forcing):
//! with p the base's and q the tuned model's distribution after the same tokens,
//!
//! `KL(p || q) = Σ_v p(v) (ln p(v) - ln q(v))`, in nats,
//!
//! summed over the whole vocabulary. It is 0 for an unchanged model; what a fine-tuning run makes of it says how much of its
//! change reaches beyond its task. Beside the number stand both models' own answers, for people.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use rayon::prelude::*;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::checkpoint::{read_tensors, refuse_non_finite, write_safetensors};
use crate::data::batch::Batch;
use crate::data::{collate, template};
use crate::error::{Error, Result};
use crate::generate::{self, Ends, GenerationConfig};
use crate::model::Model;
use crate::tensor::{DType, Tensor};
use crate::tokenizer::Tokenizer;

/// The suite, part of the program.
const SUITE: &str = include_str!("probes.jsonl");
/// Probes answered at once: few, since a training run holds its own memory at the same time.
const AT_ONCE: usize = 4;
/// Distributions are kept in f32 up to this many bytes, beyond in f16.
const IN_F32: usize = 16 << 20;
/// The tensor that names the suite.
const SUITE_HASH: &str = "suite.sha256";

/// One question of the suite.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    /// What it is about.
    pub topic: String,
    /// The question.
    pub prompt: String,
}

/// The suite in its order.
pub fn probes() -> Vec<Probe> {
    let lines = SUITE.lines().filter(|line| !line.is_empty());
    // Part of the program and tested: a line that cannot be read would be a bug.
    lines.filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// How much of each answer is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeOptions {
    /// Most tokens of an answer.
    pub tokens: usize,
}

impl Default for ProbeOptions {
    /// 24 tokens: at ChatGLM-6B's vocabulary the reference then takes at most 150 MB.
    fn default() -> Self {
        Self { tokens: 24 }
    }
}

/// What a model makes of one token of the base's answers.
#[derive(Debug, Clone, Copy)]
struct Step {
    kl: f64,
    /// Is it this model's most probable token as well?
    agrees: bool,
}

/// The base's answers to the suite, and its distributions over the vocabulary at each of their tokens.
///
/// Distributions are kept as `ln p` in f32, or in f16 where they would take more than 16 MiB. An f16 holds `ln p` to 1 part
/// in 2048; the probabilities are divided by their sum again when they are read, so that the KL divergence of two equal
/// models becomes the mean of the squared roundings instead of the mean of the roundings: below 1e-5 nats.
#[derive(Debug)]
pub struct Reference {
    /// The base's greedy answer to each probe; the last token is `<eop>` where it ended.
    answers: Vec<Vec<u32>>,
    /// `ln p` of the base before each token of its answer, `[T, V]` for each probe.
    log_probs: Vec<Tensor>,
}

/// How far a model is from the base.
#[derive(Debug, Clone, PartialEq)]
pub struct Forgetting {
    /// Mean `KL(base || tuned)` over all tokens of all probes, in nats per token.
    pub kl_mean: f64,
    /// The same mean for each probe.
    pub kl_per_probe: Vec<f64>,
    /// The share of tokens for which both find the same token most probable, from 0 to 1.
    pub top1_agreement: f64,
    /// Prompt, the base's answer, the tuned model's answer.
    pub answers: Vec<(String, String, String)>,
}

impl Reference {
    /// Asks the base every probe of the suite.
    ///
    /// # Errors
    /// As [`generate::generate`]; 0 tokens.
    pub fn measure(model: &Model, tokenizer: &Tokenizer, options: &ProbeOptions) -> Result<Self> {
        let prompts = prompts(tokenizer);
        let config = GenerationConfig::greedy(options.tokens);
        config.validate()?;
        let vocabulary = model.config().vocab_size;
        let dtype = kept_in(prompts.len() * options.tokens * vocabulary);
        let mut reference = Self {
            answers: Vec::with_capacity(prompts.len()),
            log_probs: Vec::with_capacity(prompts.len()),
        };
        for batch in batches(&prompts, tokenizer) {
            let (answers, logits) = greedy(model, &batch, &config)?;
            for (row, answer) in answers.into_iter().enumerate() {
                let mut log_probs = Tensor::zeros(DType::F32, [answer.len(), vocabulary]);
                let rows = log_probs.as_mut_slice::<f32>().chunks_exact_mut(vocabulary);
                for (t, out) in rows.enumerate() {
                    let values = row_of(&logits[t], row, vocabulary);
                    for (out, value) in out.iter_mut().zip(log_softmax(values)) {
                        // An f16 ends at -65504; e to that is 0 anyway.
                        *out = value.max(-65504.0) as f32;
                    }
                }
                let log_probs = if dtype == DType::F32 {
                    log_probs
                } else {
                    log_probs.to_dtype(dtype)
                };
                reference.log_probs.push(log_probs);
                reference.answers.push(answer);
            }
        }
        Ok(reference)
    }

    /// Compares `model` with the base: lets it read the base's answers, and answer itself.
    ///
    /// # Errors
    /// A model of another vocabulary, or one whose logits are not finite.
    pub fn compare(&self, model: &Model, tokenizer: &Tokenizer) -> Result<Forgetting> {
        let probes = probes();
        let prompts = prompts(tokenizer);
        let vocabulary = self.vocabulary();
        if model.config().vocab_size != vocabulary || prompts.len() != self.answers.len() {
            return Err(Error::input(
                "forgetting meter",
                format!(
                    "a model of {} tokens and a suite of {} questions",
                    model.config().vocab_size,
                    prompts.len()
                ),
                format!("{vocabulary} tokens and {} questions", self.answers.len()),
                "measure the base again",
            ));
        }
        let tokens = self.answers.iter().map(Vec::len).max().unwrap_or_default().max(1);
        let config = GenerationConfig::greedy(tokens);
        let mut forgetting = Forgetting {
            kl_mean: 0.0,
            kl_per_probe: Vec::with_capacity(probes.len()),
            top1_agreement: 0.0,
            answers: Vec::with_capacity(probes.len()),
        };
        let (mut sum, mut agreed, mut count) = (0.0, 0usize, 0usize);
        for (number, batch) in batches(&prompts, tokenizer).enumerate() {
            let first = number * AT_ONCE;
            let read = self.read_along(model, &batch, first)?;
            let (own, _) = greedy(model, &batch, &config)?;
            for (i, (steps, own)) in read.iter().zip(&own).enumerate() {
                let kl: f64 = steps.iter().map(|step| step.kl).sum();
                forgetting.kl_per_probe.push(kl / steps.len() as f64);
                sum += kl;
                agreed += steps.iter().filter(|step| step.agrees).count();
                count += steps.len();
                let text = |ids: &[u32]| tokenizer.decode(ids).trim().to_string();
                forgetting.answers.push((
                    probes[first + i].prompt.clone(),
                    text(&self.answers[first + i]),
                    text(own),
                ));
            }
        }
        forgetting.kl_mean = sum / count as f64;
        forgetting.top1_agreement = agreed as f64 / count as f64;
        Ok(forgetting)
    }

    /// Lets `model` read the base's answers to a batch of probes, number `first` and on: one step for each token of each.
    fn read_along(&self, model: &Model, batch: &Batch, first: usize) -> Result<Vec<Vec<Step>>> {
        let vocabulary = self.vocabulary();
        let answers = &self.answers[first..first + batch.size];
        let longest = answers.iter().map(Vec::len).max().unwrap_or_default();
        let mut cache = model.cache(batch.size, batch.len + longest)?;
        let mut logits = model.prefill(&mut cache, batch)?;
        let mut read: Vec<Vec<Step>> = vec![Vec::new(); batch.size];
        for t in 0..longest {
            read.par_iter_mut().enumerate().for_each(|(row, steps)| {
                if t < answers[row].len() {
                    let base = row_as_f64(&self.log_probs[first + row], t, vocabulary);
                    let logits = row_of(&logits, row, vocabulary);
                    steps.push(Step {
                        kl: divergence(&base, logits),
                        // The base's most probable token is the one it answered with.
                        agrees: largest(logits) == answers[row][t] as usize,
                    });
                }
            });
            let bad = |steps: &Vec<Step>| steps.last().is_some_and(|step| !step.kl.is_finite());
            if let Some(row) = read.iter().position(bad) {
                return Err(Error::input(
                    format!("forgetting meter, question {}, token {}", first + row + 1, t + 1),
                    read[row].last().map_or(f64::NAN, |step| step.kl),
                    "a finite divergence from the base",
                    "the model's logits are not finite: check its files with `glmtune inspect`, or lower --learning-rate",
                ));
            }
            if t + 1 < longest {
                // As in generation, a sequence that has ended is fed padding.
                let pad = model.config().pad_token_id;
                let next: Vec<u32> = answers
                    .iter()
                    .map(|answer| if t + 1 < answer.len() { answer[t] } else { pad })
                    .collect();
                logits = model.decode(&mut cache, &next)?;
            }
        }
        Ok(read)
    }

    /// The width of the distributions.
    fn vocabulary(&self) -> usize {
        self.log_probs.first().map_or(0, |tensor| tensor.extent(1))
    }

    /// Writes the reference to one safetensors file, so that a resumed run compares with the same base.
    ///
    /// # Errors
    /// The system refuses; an old file is then untouched.
    pub fn save(&self, path: &Path) -> Result<()> {
        let ids: Vec<Tensor> = self
            .answers
            .iter()
            .map(|answer| {
                let ids: Vec<i32> = answer.iter().map(|&id| id as i32).collect();
                Tensor::from_slice(&ids, [ids.len()])
            })
            .collect();
        let hash = Tensor::from_slice(&suite_hash(), [32]);
        let mut tensors = vec![(SUITE_HASH.to_string(), &hash)];
        for (i, (ids, log_probs)) in ids.iter().zip(&self.log_probs).enumerate() {
            tensors.push((format!("probe.{i:02}.tokens"), ids));
            tensors.push((format!("probe.{i:02}.log_probs"), log_probs));
        }
        let what = "answers of the base to glmtune's probes, and ln p over the vocabulary before each token";
        let metadata = BTreeMap::from([("description".to_string(), what.to_string())]);
        write_safetensors(path, &tensors, &metadata)
    }

    /// Reads what [`Reference::save`] wrote; the distributions stay in the mapped file.
    ///
    /// # Errors
    /// The file is damaged, of another suite, or of another vocabulary than `model`'s.
    pub fn read(path: &Path, model: &Model) -> Result<Self> {
        let mut tensors = read_tensors(path)?;
        let vocabulary = model.config().vocab_size;
        let wrong = |name: &str, found: &str, expected: &str| {
            let remedy = "remove the file: the base is then measured again";
            Error::input(format!("{}: {name}", path.display()), found, expected, remedy)
        };
        let mut take = |name: &str| {
            tensors
                .remove(name)
                .ok_or_else(|| wrong(name, "nothing", "a tensor"))
        };
        if take(SUITE_HASH)?.bytes() != suite_hash() {
            return Err(wrong(
                SUITE_HASH,
                "another suite of questions",
                "that of this program",
            ));
        }
        let mut reference = Self {
            answers: Vec::new(),
            log_probs: Vec::new(),
        };
        for i in 0..probes().len() {
            let name = format!("probe.{i:02}.tokens");
            let ids = take(&name)?;
            let valid = |id: &&i32| (0..vocabulary as i64).contains(&i64::from(**id));
            if ids.dtype() != DType::I32
                || ids.elements() == 0
                || !ids.as_slice::<i32>().iter().all(|id| valid(&id))
            {
                return Err(wrong(&name, "other values", "ids of the model's vocabulary"));
            }
            let answer: Vec<u32> = ids.as_slice::<i32>().iter().map(|&id| id as u32).collect();
            let name = format!("probe.{i:02}.log_probs");
            let log_probs = take(&name)?;
            let fits = matches!(log_probs.dtype(), DType::F32 | DType::F16)
                && log_probs.shape().extents() == [answer.len(), vocabulary];
            if !fits {
                let found = format!("{} {}", log_probs.dtype(), log_probs.shape());
                let expected = format!("float32 or float16 [{}, {vocabulary}]", answer.len());
                return Err(wrong(&name, &found, &expected));
            }
            refuse_non_finite(&format!("{}: {name}", path.display()), &log_probs)?;
            reference.answers.push(answer);
            reference.log_probs.push(log_probs);
        }
        Ok(reference)
    }
}

/// The type in which `elements` log-probabilities are kept.
fn kept_in(elements: usize) -> DType {
    if elements * size_of::<f32>() <= IN_F32 {
        DType::F32
    } else {
        DType::F16
    }
}

/// The SHA-256 of the suite.
fn suite_hash() -> [u8; 32] {
    Sha256::digest(SUITE.as_bytes()).into()
}

/// The ids of every probe, `[gMASK] <sop>` included.
fn prompts(tokenizer: &Tokenizer) -> Vec<Vec<u32>> {
    let encode = |probe: &Probe| tokenizer.encode(&template::prompt(&probe.prompt, &[]));
    probes()
        .iter()
        .map(|probe| tokenizer.build_inputs(&encode(probe), None))
        .collect()
}

/// How many questions are asked at a time, and the tokens of the longest: what a plan has to make room for.
pub fn probe_extents(tokenizer: &Tokenizer) -> (usize, usize) {
    let longest = prompts(tokenizer).iter().map(Vec::len).max();
    (AT_ONCE, longest.unwrap_or(0))
}

/// The suite in batches: always the same ones, so that an unchanged model computes the very same numbers again.
fn batches<'a>(prompts: &'a [Vec<u32>], tokenizer: &Tokenizer) -> impl Iterator<Item = Batch> + use<'a> {
    let special = tokenizer.special();
    prompts
        .chunks(AT_ONCE)
        .map(move |prompts| collate::left_pad(prompts, &special))
}

/// Greedy answers to a batch, and the logits `[B, V]` before each token of the longest.
fn greedy(model: &Model, batch: &Batch, config: &GenerationConfig) -> Result<(Vec<Vec<u32>>, Vec<Tensor>)> {
    let tokens = config.max_new_tokens.unwrap_or_default();
    let mut cache = model.cache(batch.size, batch.len + tokens)?;
    let first = model.prefill(&mut cache, batch)?;
    let mut kept = vec![first.clone()];
    let ends = Ends {
        eos: model.config().eos_token_id,
        pad: model.config().pad_token_id,
    };
    let numbers: Vec<u64> = (0..batch.size as u64).collect();
    let answers = generate::run(
        batch,
        &numbers,
        config,
        ends,
        first,
        &mut |_, _| ControlFlow::Continue(()),
        |ids| {
            let logits = model.decode(&mut cache, ids)?;
            kept.push(logits.clone());
            Ok(logits)
        },
    )?;
    Ok((answers, kept))
}

fn row_of(logits: &Tensor, row: usize, vocabulary: usize) -> &[f32] {
    &logits.as_slice::<f32>()[row * vocabulary..][..vocabulary]
}

/// Row `row` of f32 or f16 `[T, V]`.
fn row_as_f64(tensor: &Tensor, row: usize, vocabulary: usize) -> Vec<f64> {
    let range = row * vocabulary..(row + 1) * vocabulary;
    if tensor.dtype() == DType::F32 {
        tensor.as_slice::<f32>()[range]
            .iter()
            .map(|&x| f64::from(x))
            .collect()
    } else {
        tensor.as_slice::<half::f16>()[range]
            .iter()
            .map(|x| x.to_f64())
            .collect()
    }
}

/// `ln softmax` of logits.
fn log_softmax(logits: &[f32]) -> impl Iterator<Item = f64> + '_ {
    let log_sum = log_sum_exp(logits.iter().map(|&x| f64::from(x)));
    logits.iter().map(move |&x| f64::from(x) - log_sum)
}

/// `ln Σ e^x`; NaN where an x is.
fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let top = values
        .clone()
        .fold(f64::NEG_INFINITY, |top, x| if x <= top { top } else { x });
    top + values.map(|x| (x - top).exp()).sum::<f64>().ln()
}

/// `KL(p || q)` of `base`, ln p up to a constant, and q the softmax of `logits`.
fn divergence(base: &[f64], logits: &[f32]) -> f64 {
    let normal = log_sum_exp(base.iter().copied());
    let kl: f64 = base
        .iter()
        .zip(log_softmax(logits))
        .map(|(p, q)| {
            let p = p - normal;
            p.exp() * (p - q)
        })
        .sum();
    // A divergence is not negative; what rounding takes below 0 is 0. `max` would also turn a NaN into 0.
    if kl < 0.0 { 0.0 } else { kl }
}

/// The index of the largest logit, the first of equals, as greedy decoding takes it.
fn largest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_of_the_suite_is_a_probe_of_its_own() {
        let probes = probes();
        assert_eq!(probes.len(), SUITE.lines().count());
        assert_eq!(probes.len(), 24);
        for (i, probe) in probes.iter().enumerate() {
            assert!(!probe.prompt.trim().is_empty() && !probe.topic.is_empty());
            assert!(probes[..i].iter().all(|other| other.prompt != probe.prompt));
        }
    }

    #[test]
    fn the_divergence_is_its_formula() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4); both up to a constant.
        let base = [0.5f64.ln() + 3.0, 0.25f64.ln() + 3.0, 0.25f64.ln() + 3.0];
        let logits = [1.0f32, 1.0 + std::f32::consts::LN_2, 1.0];
        let kl = divergence(&base, &logits);
        let want = 0.5 * 2.0f64.ln() - 0.25 * 2.0f64.ln();
        assert!((kl - want).abs() < 1e-7, "{kl} {want}");
        let logits = [2.0f32, -1.0, 0.5];
        let base: Vec<f64> = log_softmax(&logits).collect();
        let kl = divergence(&base, &logits);
        assert!((0.0..1e-15).contains(&kl), "{kl}");
        assert!(divergence(&base, &[f32::NAN, 0.0, 0.0]).is_nan());
        assert!(!divergence(&base, &[f32::INFINITY, 0.0, 0.0]).is_finite());
        assert_eq!(largest(&[1.0, 3.0, 3.0]), 1);
    }

    #[test]
    fn in_f16_an_unchanged_model_is_still_no_further_than_1e_5() {
        // As flat as a distribution over a real vocabulary gets, and as peaked.
        for spread in [0.5f32, 4.0, 12.0] {
            let logits: Vec<f32> = (0..130_528u32)
                .map(|i| spread * ((i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32))
                .collect();
            let exact: Vec<f32> = log_softmax(&logits).map(|x| x as f32).collect();
            let kept = Tensor::from_slice(&exact, [1, exact.len()]).to_dtype(DType::F16);
            let kl = divergence(&row_as_f64(&kept, 0, exact.len()), &logits);
            assert!((0.0..1e-5).contains(&kl), "{spread}: {kl}");
        }
        assert_eq!(kept_in(24 * 24 * 1_056), DType::F32);
        assert_eq!(kept_in(24 * 24 * 130_528), DType::F16);
    }
}
