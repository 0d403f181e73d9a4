//! `bench decode`: reading a prompt, then one token after the other, with random NF4 weights.

use std::time::Instant;

use serde_json::{Value, json};

use super::inputs::{batch, position};
use super::measure::median;
use crate::error::Result;
use crate::model::{Model, ModelConfig};
use crate::tensor::{Compute, Tensor};

/// What to measure.
#[derive(Debug, Clone)]
pub struct DecodeSettings {
    /// Where, and in which type.
    pub compute: Compute,
    /// The sizes of the model.
    pub config: ModelConfig,
    /// Sequences at once.
    pub batch: usize,
    /// Tokens of the prompts; one report for each length.
    pub contexts: Vec<usize>,
    /// Tokens that follow.
    pub tokens: usize,
}

/// Decoding after a prompt of one length.
#[derive(Debug, Clone)]
pub struct DecodeReport {
    /// Sequences at once.
    pub batch: usize,
    /// Tokens of each prompt.
    pub context: usize,
    /// Milliseconds to read the prompts.
    pub prefill_ms: f64,
    /// Milliseconds of a step, in which each sequence gains a token: median, fastest, slowest.
    pub ms: [f64; 3],
    /// Bytes of weights, and of keys and values, that a step reads.
    pub bytes: f64,
}

/// Measures; `done` is called with each report as soon as there is one.
///
/// # Errors
/// The device has no room.
pub fn decode(settings: &DecodeSettings, done: &mut dyn FnMut(&DecodeReport)) -> Result<Vec<DecodeReport>> {
    let model = Model::synthetic(&settings.config, 1, settings.compute)?;
    let mut reports = Vec::new();
    for &context in &settings.contexts {
        // Once for what is made at first use: buffers, code.
        measure(settings, &model, context, 2)?;
        let report = measure(settings, &model, context, settings.tokens)?;
        done(&report);
        reports.push(report);
    }
    Ok(reports)
}

fn measure(settings: &DecodeSettings, model: &Model, context: usize, tokens: usize) -> Result<DecodeReport> {
    let config = &settings.config;
    let size = settings.batch;
    let mut prompts = batch(config, size, context, 1);
    prompts.positions = (0..size)
        .flat_map(|_| (0..context).flat_map(|t| position(t, context - 1)))
        .collect();
    for span in &mut prompts.spans {
        span.context = context - 1;
    }
    let mut cache = model.cache(size, context + tokens)?;
    let start = Instant::now();
    let mut next = best(&model.prefill(&mut cache, &prompts)?);
    let prefill_ms = start.elapsed().as_secs_f64() * 1e3;
    let mut times = Vec::with_capacity(tokens);
    for _ in 0..tokens {
        let start = Instant::now();
        next = best(&model.decode(&mut cache, &next)?);
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let cached = size * (context + tokens / 2);
    let entry = 2 * config.num_layers * config.hidden_size * settings.compute.dtype.size();
    Ok(DecodeReport {
        batch: size,
        context,
        prefill_ms,
        ms: [median(&times), times[0], times[times.len() - 1]],
        bytes: (model.decode_bytes() + cached * entry) as f64,
    })
}

/// The most probable token of each row of logits.
fn best(logits: &Tensor) -> Vec<u32> {
    let (_, vocabulary) = logits.shape().rows_and_columns();
    let rows = logits.as_slice::<f32>().chunks_exact(vocabulary);
    let best = rows.map(|row| {
        let largest = row.iter().copied().fold(f32::MIN, f32::max);
        row.iter().position(|&x| x == largest).unwrap_or(0) as u32
    });
    best.collect()
}

impl DecodeReport {
    /// New tokens of a second.
    pub fn tokens_per_second(&self) -> f64 {
        self.batch as f64 / (self.ms[0] * 1e-3)
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let [ms, min, max] = self.ms;
        format!(
            "{} x {}: {:.1} tokens/s, {ms:.3} ms a step ({min:.3} to {max:.3}), {:.1} GB/s; prompts {:.1} ms, {:.0} tokens/s",
            self.batch,
            self.context,
            self.tokens_per_second(),
            self.bytes / (ms * 1e6),
            self.prefill_ms,
            (self.batch * self.context) as f64 / (self.prefill_ms * 1e-3)
        )
    }

    /// For `--json`.
    pub fn json(&self) -> Value {
        json!({
            "batch": self.batch,
            "context": self.context,
            "tokens_per_second": self.tokens_per_second(),
            "ms": self.ms[0],
            "ms_min": self.ms[1],
            "ms_max": self.ms[2],
            "gb_s": self.bytes / (self.ms[0] * 1e6),
            "prefill_ms": self.prefill_ms,
        })
    }
}
