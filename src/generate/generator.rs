//! A model that answers one batch after another: what does not change between them is made once.

use std::time::Instant;

use super::speed::Speed;
use super::{Ends, Generated, GenerationConfig, OnToken, run};
use crate::data::batch::Batch;
use crate::data::collate;
use crate::error::Result;
use crate::model::{KvCache, Model, PrefixKeys, ReadPrompt};
use crate::tensor::Tensor;
use crate::tokenizer::Special;

/// A sequence that [`Generator::samples`] continues.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// The prompt's ids, with `[gMASK] <sop>`.
    pub prompt: &'a [u32],
    /// Which random numbers: see [`number`].
    pub number: u64,
}

/// The number of sample `sample` of record `record`. Every sample draws from a stream of its own, which depends on nothing else:
/// neither on how many samples are asked for nor on the batch that it lands in. Sample 0 has the record's own number.
pub fn number(record: u64, sample: u64) -> u64 {
    record ^ (sample << 32)
}

/// Answers by one model, as it is now.
#[derive(Debug)]
pub struct Generator<'m> {
    model: &'m Model,
    /// Made once for all batches.
    prefix: PrefixKeys,
    /// The prompt that was read last: its samples may fill several batches.
    last: Option<(Vec<u32>, ReadPrompt)>,
}

impl<'m> Generator<'m> {
    /// # Errors
    /// There is not enough memory for the keys of a prefix.
    pub fn new(model: &'m Model) -> Result<Self> {
        Ok(Self {
            model,
            prefix: model.prefix_keys()?,
            last: None,
        })
    }

    /// As [`super::generate`].
    ///
    /// # Errors
    /// As there.
    pub fn batch(
        &self,
        batch: &Batch,
        numbers: &[u64],
        config: &GenerationConfig,
        on_token: &mut OnToken<'_>,
    ) -> Result<Generated> {
        let mut cache = self.cache(batch, config)?;
        let begin = Instant::now();
        let first = self.model.prefill(&mut cache, batch)?;
        let speed = Speed {
            prompt_tokens: batch.spans.iter().map(|span| batch.len - span.start).sum(),
            prefill: begin.elapsed(),
            ..Speed::default()
        };
        self.decode(cache, batch, numbers, config, first, speed, on_token)
    }

    /// Continues a batch of sequences of which neighbours may have the same prompt. Each distinct prompt is read once, on its own,
    /// and its keys and values are copied to its sequences: to the bit what reading it again for each of them would give.
    ///
    /// Two different prompts share nothing, however alike they begin: the keys of a position depend on the whole prompt.
    ///
    /// # Errors
    /// As [`super::generate`].
    pub fn samples(
        &mut self,
        sequences: &[Sequence<'_>],
        special: &Special,
        config: &GenerationConfig,
        on_token: &mut OnToken<'_>,
    ) -> Result<Generated> {
        let prompts: Vec<Vec<u32>> = sequences.iter().map(|s| s.prompt.to_vec()).collect();
        let numbers: Vec<u64> = sequences.iter().map(|s| s.number).collect();
        let batch = collate::left_pad(&prompts, special);
        let mut cache = self.cache(&batch, config)?;
        let begin = Instant::now();
        let mut prompt_tokens = 0;
        let mut read: Vec<(Vec<u32>, ReadPrompt)> = self.last.take().into_iter().collect();
        let mut of_sequence = Vec::with_capacity(sequences.len());
        for prompt in prompts {
            if read.last().is_none_or(|(ids, _)| *ids != prompt) {
                let alone = collate::left_pad(std::slice::from_ref(&prompt), special);
                prompt_tokens += prompt.len();
                let done = self.model.read(&alone, &self.prefix)?;
                read.push((prompt, done));
            }
            of_sequence.push(read.len() - 1);
        }
        let begun: Vec<&ReadPrompt> = of_sequence.iter().map(|&i| &read[i].1).collect();
        let first = self.model.fork(&mut cache, &begun)?;
        self.last = read.pop();
        drop(read);
        let speed = Speed {
            prompt_tokens,
            prefill: begin.elapsed(),
            ..Speed::default()
        };
        self.decode(cache, &batch, &numbers, config, first, speed, on_token)
    }

    /// Room for the prompts and the longest answers to them.
    fn cache(&self, batch: &Batch, config: &GenerationConfig) -> Result<KvCache> {
        config.validate()?;
        let mut capacity = batch.len;
        for span in &batch.spans {
            capacity = capacity.max(batch.len.saturating_add(config.room(batch.len - span.start)?));
        }
        self.model.cache_with(batch.size, capacity, &self.prefix)
    }

    /// The steps after the prompts. A sequence that has ended is fed padding until the last one ends: which kernel computes a product,
    /// and so its last bits, depends on the number of rows, which therefore stays what it was.
    fn decode(
        &self,
        mut cache: KvCache,
        batch: &Batch,
        numbers: &[u64],
        config: &GenerationConfig,
        first: Tensor,
        mut speed: Speed,
        on_token: &mut OnToken<'_>,
    ) -> Result<Generated> {
        let ends = Ends {
            eos: self.model.config().eos_token_id,
            pad: self.model.config().pad_token_id,
        };
        let begin = Instant::now();
        let sequences = run(batch, numbers, config, ends, first, on_token, |tokens| {
            speed.steps += 1;
            self.model.decode(&mut cache, tokens)
        })?;
        speed.decode = begin.elapsed();
        speed.new_tokens = sequences.iter().map(Vec::len).sum();
        Ok(Generated { sequences, speed })
    }
}
