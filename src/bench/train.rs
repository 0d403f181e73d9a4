//! `bench train`: optimizer steps of a model with random NF4 weights, through the trainer that `glmtune train` uses.

use std::time::Instant;

use serde_json::{Value, json};

use super::inputs::{batch, visible_pairs};
use super::measure::median;
use crate::config::LossReduction;
use crate::cuda;
use crate::error::Result;
use crate::model::tune::{self, LoraTarget, Tuning};
use crate::model::{Model, ModelConfig};
use crate::optim::OptimizerConfig;
use crate::schedule::{Schedule, Scheduler};
use crate::tensor::{Compute, Device};
use crate::train::{Options, Trainer};

/// What to measure.
#[derive(Debug, Clone)]
pub struct TrainSettings {
    /// Where, and in which type.
    pub compute: Compute,
    /// The sizes of the model.
    pub config: ModelConfig,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of each; one report for each length.
    pub lengths: Vec<usize>,
    /// Steps that are measured.
    pub steps: usize,
    /// Steps before them.
    pub warmup: usize,
    /// Rank of the adapters.
    pub rank: usize,
    /// Which linears carry one.
    pub targets: Vec<LoraTarget>,
    /// Dropout on their inputs.
    pub dropout: f64,
}

/// Steps of one length.
#[derive(Debug, Clone)]
pub struct TrainReport {
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// Milliseconds of a step: median, fastest, slowest.
    pub ms: [f64; 3],
    /// Operations of a step, those that the method needs.
    pub flops: f64,
    /// Loss of the first step and of the last: always the same batch.
    pub losses: [f64; 2],
    /// The loss of knowing nothing.
    pub ln_vocabulary: f64,
    /// Bytes of memory.
    pub memory: Memory,
}

/// Bytes of memory at their highest.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Memory {
    /// Of all tensors on the device.
    pub tensors: Option<u64>,
    /// Of the device, as its driver counts: what other processes and the context use included.
    pub device: Option<u64>,
    /// Of that, in use before the model was made.
    pub device_before: Option<u64>,
    /// Of the host: the resident set of this process.
    pub host: Option<u64>,
}

/// Measures; `done` is called with each report as soon as there is one.
///
/// # Errors
/// The device has no room, or a loss is not finite.
pub fn train(settings: &TrainSettings, done: &mut dyn FnMut(&TrainReport)) -> Result<Vec<TrainReport>> {
    let TrainSettings { compute, config, .. } = settings;
    let before = device_bytes(*compute)?;
    let started = Instant::now();
    let mut model = Model::synthetic(config, 1, *compute)?;
    let tuning = Tuning::Lora(tune::LoraConfig {
        r: settings.rank,
        alpha: 2.0 * settings.rank as f64,
        dropout: settings.dropout,
        rslora: false,
        targets: settings.targets.clone(),
        ..tune::LoraConfig::default()
    });
    tune::apply(&mut model, &tuning, 1)?;
    eprintln!(
        "model: {} layers of {}, random NF4 weights, made in {:.1} s",
        config.num_layers,
        config.hidden_size,
        started.elapsed().as_secs_f64()
    );
    let mut reports = Vec::new();
    for &length in &settings.lengths {
        cuda::forget_peak();
        let options = Options {
            optimizer: OptimizerConfig::default(),
            schedule: Schedule {
                scheduler: Scheduler::Constant,
                base: 1e-3,
                warmup_steps: 0,
                total_steps: u64::MAX,
                ..Schedule::default()
            },
            max_grad_norm: 1.0,
            in_backward: false,
            reduction: LossReduction::Token,
            seed: 1,
        };
        let mut trainer = Trainer::new(model, options, settings.batch, length)?;
        let mut report = steps(settings, &mut trainer, length)?;
        report.memory = Memory {
            tensors: before.map(|_| cuda::held_bytes().1),
            device: device_bytes(*compute)?,
            device_before: before,
            host: resident_peak(),
        };
        model = trainer.into_model();
        done(&report);
        reports.push(report);
    }
    Ok(reports)
}

fn steps(settings: &TrainSettings, trainer: &mut Trainer, length: usize) -> Result<TrainReport> {
    let TrainSettings {
        config, batch: size, ..
    } = settings;
    let batches = [batch(config, *size, length, 0)];
    let mut times = Vec::with_capacity(settings.steps);
    let mut losses = Vec::with_capacity(settings.warmup + settings.steps);
    for i in 0..settings.warmup + settings.steps {
        let start = Instant::now();
        losses.push(trainer.step(&batches)?.loss);
        if let Device::Cuda(ordinal) = settings.compute.device {
            cuda::synchronize(ordinal)?;
        }
        if i >= settings.warmup {
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(TrainReport {
        batch: *size,
        length,
        ms: [median(&times), times[0], times[times.len() - 1]],
        flops: flops(settings, length, batches[0].supervised()),
        losses: [losses[0], losses[losses.len() - 1]],
        ln_vocabulary: (config.vocab_size as f64).ln(),
        memory: Memory::default(),
    })
}

/// Forward, and the gradients over activations and adapters; nothing computed twice, hidden pairs not counted.
fn flops(settings: &TrainSettings, length: usize, supervised: usize) -> f64 {
    let (config, rank) = (&settings.config, settings.rank as f64);
    let (h, inner) = (config.hidden_size as f64, config.inner_hidden_size as f64);
    let tokens = (settings.batch * length) as f64;
    let layers = config.num_layers as f64;
    let widths = |target: &LoraTarget| match target {
        LoraTarget::QueryKeyValue => 4.0 * h,
        LoraTarget::Dense => 2.0 * h,
        LoraTarget::DenseHTo4H | LoraTarget::Dense4HToH => h + inner,
    };
    let adapters: f64 = settings.targets.iter().map(widths).sum();
    let linears = 4.0 * tokens * (4.0 * h * h + 2.0 * h * inner) + 6.0 * tokens * rank * adapters;
    let pairs = settings.batch as f64 * visible_pairs(length, length / 4);
    let attention = 3.5 * 4.0 * h * pairs;
    let head = 4.0 * supervised as f64 * h * config.vocab_size as f64;
    layers * (linears + attention) + head
}

/// Bytes in use on the device, by whomever.
fn device_bytes(compute: Compute) -> Result<Option<u64>> {
    match compute.device {
        Device::Cpu => Ok(None),
        Device::Cuda(ordinal) => {
            let (free, total) = cuda::memory_info(ordinal)?;
            Ok(Some(total - free))
        }
    }
}

/// The highest resident set of this process, where the system tells.
fn resident_peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes << 10)
}

impl TrainReport {
    /// Tokens of a second.
    pub fn tokens_per_second(&self) -> f64 {
        (self.batch * self.length) as f64 / (self.ms[0] * 1e-3)
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let [ms, min, max] = self.ms;
        let gb = |bytes: Option<u64>| bytes.map(|bytes| format!("{:.3} GB", bytes as f64 / 1e9));
        let memory = [
            ("tensors", gb(self.memory.tensors)),
            ("device", gb(self.memory.device)),
            ("host", gb(self.memory.host)),
        ];
        let memory: Vec<String> = memory
            .into_iter()
            .filter_map(|(name, gb)| gb.map(|gb| format!("{name} {gb}")))
            .collect();
        format!(
            "{} x {}: {:.1} tokens/s, {ms:.2} ms a step ({min:.2} to {max:.2}), {:.1} TFLOP/s; loss {:.3} to {:.3} (ln V {:.3}); \
             peak: {}",
            self.batch,
            self.length,
            self.tokens_per_second(),
            self.flops / (ms * 1e9),
            self.losses[0],
            self.losses[1],
            self.ln_vocabulary,
            memory.join(", ")
        )
    }

    /// For `--json`.
    pub fn json(&self) -> Value {
        json!({
            "batch": self.batch,
            "length": self.length,
            "tokens_per_second": self.tokens_per_second(),
            "ms": self.ms[0],
            "ms_min": self.ms[1],
            "ms_max": self.ms[2],
            "tflop_s": self.flops / (self.ms[0] * 1e9),
            "loss_first": self.losses[0],
            "loss_last": self.losses[1],
            "ln_vocabulary": self.ln_vocabulary,
            "tensor_bytes": self.memory.tensors,
            "device_bytes": self.memory.device,
            "device_bytes_before": self.memory.device_before,
            "host_bytes": self.memory.host,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    #[test]
    fn the_operations_of_the_real_size_are_those_counted_by_hand() {
        let settings = TrainSettings {
            compute: Compute::cpu(DType::F32),
            config: ModelConfig::chatglm_6b(),
            batch: 1,
            lengths: vec![2048],
            steps: 1,
            warmup: 0,
            rank: 8,
            targets: LoraTarget::ALL.to_vec(),
            dropout: 0.0,
        };
        let linears = 4.0 * 5_637_144_576.0 * 2048.0;
        let adapters = 6.0 * 14_680_064.0 * 2048.0;
        let attention = 28.0 * 3.5 * 4.0 * 4096.0 * visible_pairs(2048, 512);
        let head = 4.0 * 1536.0 * 4096.0 * 130_528.0;
        let got = flops(&settings, 2048, 1536);
        let want = linears + adapters + attention + head;
        assert!((got / want - 1.0).abs() < 1e-12, "{got} {want}");
    }
}
