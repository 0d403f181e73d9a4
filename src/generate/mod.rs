//! From prompts to answers: the token loop over a KV cache.
//!
//! A batch holds left-padded prompts that end in `<sop>`. [`generate`] reads them once ([`Model::prefill`]) and then adds one
//! token a step ([`Model::decode`]) until every sequence has produced `<eop>` or its share of tokens. What a sequence
//! becomes depends on its own tokens, its own number and the seed, never on the padding or on its neighbours.

mod generator;
pub mod sampling;
pub mod speed;
pub mod stream;

use std::ops::ControlFlow;

use serde_json::{Value, json};

use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

pub use generator::{Generator, Sequence, number};
use sampling::Sampler;
use speed::Speed;

/// How answers are chosen. The names are those of transformers' `GenerationConfig`.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// Most new tokens of a sequence, `<eop>` included; `None`: as many as [`Self::max_length`] leaves.
    pub max_new_tokens: Option<usize>,
    /// Most tokens of a sequence, prompt and answer together, padding not counted; only without `max_new_tokens`.
    pub max_length: usize,
    /// Sample; otherwise the most probable token is taken and temperature, top-k and top-p are not used.
    pub do_sample: bool,
    /// Divides the logits; above 0.
    pub temperature: f64,
    /// Keeps the k highest logits (and what equals the last of them); 0 switches it off.
    pub top_k: usize,
    /// Keeps the smallest set of tokens whose probabilities exceed this; 1 switches it off.
    pub top_p: f64,
    /// Divides positive and multiplies negative logits of tokens seen before, prompt included; 1 switches it off.
    pub repetition_penalty: f64,
    /// Forbids tokens that would repeat an n-gram of prompt and answer; 0 switches it off.
    pub no_repeat_ngram_size: usize,
    /// The same seed gives the same answers.
    pub seed: u64,
}

impl Default for GenerationConfig {
    /// What the official `model.chat` samples with: its own `max_length` 2048, top-p 0.7 and temperature 0.95, and the
    /// top-k 50 that transformers' defaults add.
    fn default() -> Self {
        Self {
            max_new_tokens: None,
            max_length: 2048,
            do_sample: true,
            temperature: 0.95,
            top_k: 50,
            top_p: 0.7,
            repetition_penalty: 1.0,
            no_repeat_ngram_size: 0,
            seed: 0,
        }
    }
}

impl GenerationConfig {
    /// The most probable token at every step, everything else off.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens: Some(max_new_tokens),
            do_sample: false,
            ..Self::default()
        }
    }

    /// Are all values in range?
    ///
    /// # Errors
    /// The first value that is not, by its flag.
    pub fn validate(&self) -> Result<()> {
        let positive = |flag: &str, value: f64, remedy: &str| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(Error::input(flag, value, "a number above 0", remedy))
            }
        };
        positive(
            "--temperature",
            self.temperature,
            "use --greedy for the most probable answer",
        )?;
        positive(
            "--repetition-penalty",
            self.repetition_penalty,
            "1 switches it off",
        )?;
        if !(0.0..=1.0).contains(&self.top_p) {
            return Err(Error::input(
                "--top-p",
                self.top_p,
                "a number from 0 to 1",
                "1 switches it off",
            ));
        }
        if self.max_length == 0 {
            return Err(Error::input(
                "--max-length",
                0,
                "at least 1",
                "the default is 2048",
            ));
        }
        if self.max_new_tokens == Some(0) {
            return Err(Error::input(
                "--max-new-tokens",
                0,
                "at least 1",
                "ask for at least one token",
            ));
        }
        Ok(())
    }

    /// Every setting by its name in transformers.
    pub fn named(&self) -> [(&'static str, Value); 9] {
        [
            ("do_sample", json!(self.do_sample)),
            ("temperature", json!(self.temperature)),
            ("top_k", json!(self.top_k)),
            ("top_p", json!(self.top_p)),
            ("repetition_penalty", json!(self.repetition_penalty)),
            ("no_repeat_ngram_size", json!(self.no_repeat_ngram_size)),
            ("max_new_tokens", json!(self.max_new_tokens)),
            ("max_length", json!(self.max_length)),
            ("seed", json!(self.seed)),
        ]
    }

    /// How many tokens may follow a prompt of `prompt` tokens.
    ///
    /// # Errors
    /// The prompt leaves no room within `max_length`.
    pub fn room(&self, prompt: usize) -> Result<usize> {
        match self.max_new_tokens {
            Some(tokens) => Ok(tokens),
            None if prompt < self.max_length => Ok(self.max_length - prompt),
            None => Err(Error::input(
                "prompt",
                format!("{prompt} tokens"),
                format!("fewer than --max-length {}", self.max_length),
                "shorten the prompt or the history, or raise --max-length",
            )),
        }
    }
}

/// What [`generate`] gives back.
#[derive(Debug, Clone)]
pub struct Generated {
    /// The new tokens of each sequence; the last one is `<eop>` where the model ended the answer itself.
    pub sequences: Vec<Vec<u32>>,
    /// Where the time went.
    pub speed: Speed,
}

/// Called with every new token: the sequence's place in the batch and the id. `Break` ends the whole batch.
pub type OnToken<'a> = dyn FnMut(usize, u32) -> ControlFlow<()> + 'a;

/// Answers a batch of left-padded prompts.
///
/// `numbers[b]` numbers sequence `b` among all that use this seed: its random numbers come from that stream, so a record
/// gets the same answer in whatever batch it lands.
///
/// # Errors
/// A value of `config` out of range, a prompt without room, logits that are not finite.
pub fn generate(
    model: &Model,
    batch: &Batch,
    numbers: &[u64],
    config: &GenerationConfig,
    on_token: &mut OnToken<'_>,
) -> Result<Generated> {
    Generator::new(model)?.batch(batch, numbers, config, on_token)
}

/// The token that ends a sequence, and the one that is fed for a sequence that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Ends {
    /// `<eop>`.
    pub eos: u32,
    /// `<pad>`.
    pub pad: u32,
}

/// The token loop without the model: `first` holds the logits `[B, V]` after the prompts, `step` takes one token of every
/// sequence and returns the logits after them.
///
/// # Errors
/// Logits of another shape, logits that are not finite (named with their step), a prompt without room, whatever `step` fails with.
pub fn run(
    batch: &Batch,
    numbers: &[u64],
    config: &GenerationConfig,
    ends: Ends,
    first: Tensor,
    on_token: &mut OnToken<'_>,
    mut step: impl FnMut(&[u32]) -> Result<Tensor>,
) -> Result<Vec<Vec<u32>>> {
    let size = batch.size;
    if numbers.len() != size {
        return Err(Error::Shape {
            operation: "generate",
            found: format!("{} sequence numbers", numbers.len()),
            expected: format!("{size}"),
        });
    }
    let mut histories: Vec<Vec<u32>> = Vec::with_capacity(size);
    let mut limits = Vec::with_capacity(size);
    for (ids, span) in batch.ids.chunks_exact(batch.len).zip(&batch.spans) {
        let prompt: Vec<u32> = ids[span.start..].iter().map(|&id| id as u32).collect();
        limits.push(prompt.len().saturating_add(config.room(prompt.len())?));
        histories.push(prompt);
    }
    let prompts: Vec<usize> = histories.iter().map(Vec::len).collect();
    let mut sampler = Sampler::new(config)?;
    let mut running = vec![true; size];
    let mut tokens = vec![ends.pad; size];
    let mut logits = first;
    'steps: for number in 1u64.. {
        let vocab = rows(&logits, size)?;
        for (b, row) in logits.as_slice::<f32>().chunks_exact(vocab).enumerate() {
            tokens[b] = ends.pad;
            if !running[b] {
                continue;
            }
            check_finite(row, number)?;
            let history = &mut histories[b];
            let position = (history.len() - prompts[b]) as u64;
            let id = sampler.next(
                row,
                history,
                Stream::new(config.seed, sampling::STREAM ^ numbers[b]),
                position,
            );
            history.push(id);
            tokens[b] = id;
            running[b] = id != ends.eos && history.len() < limits[b];
            if on_token(b, id).is_break() {
                break 'steps;
            }
        }
        if !running.contains(&true) {
            break;
        }
        logits = step(&tokens)?;
    }
    Ok(histories
        .into_iter()
        .zip(prompts)
        .map(|(mut history, prompt)| history.split_off(prompt))
        .collect())
}

/// The width of f32 logits `[size, V]`.
fn rows(logits: &Tensor, size: usize) -> Result<usize> {
    match logits.shape().extents() {
        [rows, vocab] if *rows == size && *vocab > 0 && logits.dtype() == DType::F32 => Ok(*vocab),
        _ => Err(Error::Shape {
            operation: "generate",
            found: format!("{} logits {}", logits.dtype(), logits.shape()),
            expected: format!("float32 [{size}, V]"),
        }),
    }
}

/// The official code answers NaN with a constant token (`InvalidScoreLogitsProcessor`); here it is an error.
fn check_finite(row: &[f32], step: u64) -> Result<()> {
    match row.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(id) => Err(Error::NonFinite {
            step,
            what: "logit",
            value: f64::from(row[id]),
            layer: format!("lm_head, token id {id}, while generating"),
            remedy: "check the model and adapter files with `glmtune inspect`".to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::batch::Span;

    const ENDS: Ends = Ends { eos: 5, pad: 0 };
    const VOCAB: usize = 8;

    /// Left-padded rows with nothing but ids and starts: the loop reads no more.
    fn batch(prompts: &[&[u32]]) -> Batch {
        let len = prompts.iter().map(|p| p.len()).max().unwrap();
        let mut ids = Vec::new();
        let mut spans = Vec::new();
        for prompt in prompts {
            let start = len - prompt.len();
            ids.extend(std::iter::repeat_n(0, start).chain(prompt.iter().map(|&id| id as i32)));
            spans.push(Span {
                start,
                context: len - 1,
            });
        }
        let n = ids.len();
        Batch {
            size: prompts.len(),
            len,
            ids,
            labels: vec![-100; n],
            positions: vec![0; 2 * n],
            spans,
        }
    }

    /// A model whose most probable next token is the last one plus 1.
    fn counting(tokens: &[u32]) -> Result<Tensor> {
        let mut logits = Tensor::zeros(DType::F32, [tokens.len(), VOCAB]);
        for (row, &id) in logits.as_mut_slice::<f32>().chunks_exact_mut(VOCAB).zip(tokens) {
            row[(id as usize + 1) % VOCAB] = 9.0;
        }
        Ok(logits)
    }

    /// The answers, and what was fed at each step.
    type Ran = (Vec<Vec<u32>>, Vec<Vec<u32>>);

    fn go(prompts: &[&[u32]], config: &GenerationConfig) -> Result<Ran> {
        let numbers: Vec<u64> = (0..prompts.len() as u64).collect();
        let last: Vec<u32> = prompts.iter().map(|p| *p.last().unwrap()).collect();
        let mut fed = Vec::new();
        let out = run(
            &batch(prompts),
            &numbers,
            config,
            ENDS,
            counting(&last)?,
            &mut |_, _| ControlFlow::Continue(()),
            |tokens| {
                fed.push(tokens.to_vec());
                counting(tokens)
            },
        )?;
        Ok((out, fed))
    }

    #[test]
    fn rows_stop_at_eop_and_are_padded_until_the_last_one_ends() {
        let (out, fed) = go(&[&[7, 1], &[3], &[4]], &GenerationConfig::greedy(10)).unwrap();
        assert_eq!(out, [vec![2, 3, 4, 5], vec![4, 5], vec![5]]);
        assert_eq!(fed, [[2, 4, 5], [3, 5, 0], [4, 0, 0]]);
    }

    #[test]
    fn the_length_limit_counts_a_rows_own_tokens() {
        let (out, _) = go(&[&[6], &[6]], &GenerationConfig::greedy(3)).unwrap();
        assert_eq!(out, [[7, 0, 1], [7, 0, 1]]);
        let config = GenerationConfig {
            max_new_tokens: None,
            max_length: 4,
            ..GenerationConfig::greedy(1)
        };
        let (out, _) = go(&[&[1, 1, 6], &[6]], &config).unwrap();
        assert_eq!(out, [vec![7], vec![7, 0, 1]]);
        let error = go(&[&[1, 1, 1, 6]], &config).unwrap_err().to_string();
        assert!(
            error.contains("4 tokens") && error.contains("--max-length"),
            "{error}"
        );
    }

    #[test]
    fn a_sequence_does_not_depend_on_its_neighbours() {
        let config = GenerationConfig {
            temperature: 8.0,
            top_p: 1.0,
            ..GenerationConfig::default()
        };
        let config = GenerationConfig {
            max_new_tokens: Some(20),
            seed: 3,
            ..config
        };
        let flat = |ids: &[&[u32]], numbers: &[u64]| {
            let last: Vec<u32> = ids.iter().map(|p| *p.last().unwrap()).collect();
            run(
                &batch(ids),
                numbers,
                &config,
                ENDS,
                counting(&last).unwrap(),
                &mut |_, _| ControlFlow::Continue(()),
                counting,
            )
            .unwrap()
        };
        let together = flat(&[&[1, 2, 3], &[4], &[6, 6]], &[10, 11, 12]);
        assert_eq!(flat(&[&[6, 6]], &[12])[0], together[2]);
        assert_eq!(
            flat(&[&[4], &[1, 2, 3]], &[11, 10]),
            [together[1].clone(), together[0].clone()]
        );
        assert_ne!(flat(&[&[6, 6]], &[13])[0], together[2]);
    }

    #[test]
    fn not_a_number_is_named_with_its_step() {
        let mut steps = 0;
        let result = run(
            &batch(&[&[6]]),
            &[0],
            &GenerationConfig::default(),
            ENDS,
            counting(&[6]).unwrap(),
            &mut |_, _| ControlFlow::Continue(()),
            |tokens| {
                steps += 1;
                let mut logits = counting(tokens)?;
                logits.as_mut_slice::<f32>()[3] = if steps == 2 { f32::NAN } else { 0.0 };
                Ok(logits)
            },
        );
        let error = result.unwrap_err().to_string();
        assert!(
            error.starts_with("step 3: logit is NaN") && error.contains("token id 3"),
            "{error}"
        );
    }

    #[test]
    fn the_callback_can_stop_the_answer() {
        let mut seen = Vec::new();
        let mut stop = |_: usize, id: u32| {
            seen.push(id);
            if seen.len() == 2 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let config = GenerationConfig::greedy(10);
        let out = run(
            &batch(&[&[6]]),
            &[0],
            &config,
            ENDS,
            counting(&[6]).unwrap(),
            &mut stop,
            counting,
        )
        .unwrap();
        assert_eq!(out, [[7, 0]]);
        assert_eq!(seen, [7, 0]);
    }

    #[test]
    fn values_out_of_range_name_their_flag() {
        let base = GenerationConfig::default();
        for (config, flag) in [
            (
                GenerationConfig {
                    temperature: 0.0,
                    ..base.clone()
                },
                "--temperature",
            ),
            (
                GenerationConfig {
                    temperature: f64::NAN,
                    ..base.clone()
                },
                "--temperature",
            ),
            (
                GenerationConfig {
                    top_p: 1.5,
                    ..base.clone()
                },
                "--top-p",
            ),
            (
                GenerationConfig {
                    repetition_penalty: -1.0,
                    ..base.clone()
                },
                "--repetition-penalty",
            ),
            (
                GenerationConfig {
                    max_new_tokens: Some(0),
                    ..base.clone()
                },
                "--max-new-tokens",
            ),
        ] {
            assert!(
                config.validate().unwrap_err().to_string().starts_with(flag),
                "{flag}"
            );
        }
        base.validate().unwrap();
    }
}
