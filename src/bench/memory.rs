//! `bench memory`: what each way to save memory costs, as a ratio to none from interleaved rounds; and whether a run within a budget
//! keeps its plan, by the driver's own figure.

use std::time::Instant;

use serde_json::{Value, json};

use super::inputs::batch;
use super::measure::median;
use crate::config::LossReduction;
use crate::cuda;
use crate::error::{Error, Result};
use crate::model::tune::{self, LoraConfig, Tuning};
use crate::model::{EmbeddingPlace, HeadStorage, Linears, LoadedFrom, Model, ModelConfig};
use crate::ops;
use crate::optim::{OptimizerConfig, OptimizerKind};
use crate::schedule::{Schedule, Scheduler};
use crate::tensor::ledger::{Ledger, Pool};
use crate::tensor::{Compute, DType, Device, Tensor};
use crate::train::plan::{self, Asked, Card, Layout, Limits, Plan, Policies, StateOn, Work};
use crate::train::{Options, Trainer};

/// What to measure.
#[derive(Debug, Clone)]
pub struct MemorySettings {
    /// Where, and in which type.
    pub compute: Compute,
    /// The sizes of the model.
    pub config: ModelConfig,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of each.
    pub lengths: Vec<usize>,
    /// Every weight trains, not adapters.
    pub full: bool,
    /// Rank of the adapters.
    pub rank: usize,
    /// Budgets; none: every way to save memory is measured.
    pub vram: Vec<u64>,
    /// Interleaved rounds.
    pub rounds: usize,
    /// Steps of each measurement.
    pub steps: usize,
}

/// One way at one length.
#[derive(Debug, Clone)]
pub struct MemoryReport {
    /// What it is called.
    pub name: String,
    /// Tokens of a sequence.
    pub length: usize,
    /// Milliseconds of a step: the median over the rounds.
    pub ms: f64,
    /// To the first way, by rounds: median, smallest, largest.
    pub ratio: [f64; 3],
    /// The same by the cost model.
    pub predicted: f64,
    /// Bytes to and from the host in a step.
    pub copied: [u64; 2],
    /// Device bytes: of tensors as planned, and as held at most.
    pub tensors: [u64; 2],
    /// Device bytes of tensors: as planned, and by how much the driver has less now than before; on the CPU nothing.
    pub driver: Option<[u64; 2]>,
    /// Loss of the last step.
    pub loss: f64,
}

fn work(settings: &MemorySettings, length: usize) -> Work {
    let kind = match settings.full {
        true => OptimizerKind::Adamw8bit,
        false => OptimizerKind::Adamw,
    };
    Work {
        model: settings.config.clone(),
        from: LoadedFrom {
            dtype: DType::F16,
            linears: match settings.full {
                true => Linears::Dense,
                false => Linears::FourBit { double_quant: true },
            },
            separate_head: false,
        },
        tuning: match settings.full {
            true => Tuning::Full,
            false => Tuning::Lora(LoraConfig {
                r: settings.rank,
                alpha: 2.0 * settings.rank as f64,
                ..LoraConfig::default()
            }),
        },
        compute: settings.compute,
        options: Options {
            optimizer: OptimizerConfig::of(kind),
            schedule: Schedule {
                scheduler: Scheduler::Constant,
                base: 1e-5,
                total_steps: u64::MAX,
                ..Schedule::default()
            },
            max_grad_norm: 1.0,
            in_backward: false,
            reduction: LossReduction::Token,
            seed: 1,
        },
        batch: settings.batch,
        length,
        samples: settings.batch,
        folder: std::env::temp_dir(),
        answers: Vec::new(),
        context: plan::context(settings.compute.device),
    }
}

/// The ways, each with its name; the first is what the others are compared with.
fn ways(settings: &MemorySettings) -> Vec<(String, Layout)> {
    let layers = settings.config.num_layers;
    let plain = Layout::plain(settings.batch, layers);
    let mut ways = vec![("none".to_string(), plain.clone())];
    for text in ["smart", "full", "none+offload", "smart+offload", "full+offload"] {
        let policies = text
            .parse::<Policies>()
            .and_then(|policies| policies.layers(layers));
        if let Ok(policies) = policies {
            ways.push((
                format!("recompute {text}"),
                Layout {
                    layers: policies,
                    ..plain.clone()
                },
            ));
        }
    }
    let state = |state| Layout {
        state,
        ..plain.clone()
    };
    ways.push(("optimizer on the host".into(), state(StateOn::Host)));
    if settings.full {
        let in_backward = Layout {
            in_backward: true,
            ..state(StateOn::Host)
        };
        ways.push(("and updated in backward".into(), in_backward));
    } else {
        let head = |head| Layout {
            head,
            embedding: EmbeddingPlace::Host,
            ..plain.clone()
        };
        ways.push(("head streamed".into(), head(HeadStorage::Stream)));
        ways.push(("head in int8".into(), head(HeadStorage::Int8)));
        ways.push(("head in nf4".into(), head(HeadStorage::Nf4)));
        let streamed = Layout {
            stream: true,
            ..plain
        };
        ways.push(("weights streamed".into(), streamed));
    }
    ways
}

/// Measures; `done` is called with each report as soon as there is one.
///
/// # Errors
/// Nothing fits, the device has no room, or a loss is not finite.
pub fn memory(settings: &MemorySettings, done: &mut dyn FnMut(&MemoryReport)) -> Result<Vec<MemoryReport>> {
    let Device::Cuda(ordinal) = settings.compute.device else {
        return Err(Error::Usage(
            "bench memory: found the CPU, expected a CUDA device: nothing is copied on the CPU".into(),
        ));
    };
    let card = Card::of(&cuda::describe(ordinal)?);
    // The kernels' scratch memory is reserved at its first use and then stays: now, so that it counts for nobody.
    ops::non_finite(&Tensor::zeros_on(settings.compute.device, DType::F32, [1])?)?;
    let mut reports = Vec::new();
    for &length in &settings.lengths {
        let work = work(settings, length);
        if settings.vram.is_empty() {
            let of_length = compare(settings, &work, &card)?;
            of_length.iter().for_each(&mut *done);
            reports.extend(of_length);
        }
        for &budget in &settings.vram {
            let asked = Asked {
                micro_batch: Some(settings.batch),
                ..Asked::default()
            };
            let limits = Limits {
                device: budget,
                host: None,
            };
            let fit = plan::fit(&work, &asked, limits, &card)?;
            let chosen = &fit.ladder[0];
            let name = format!("{:.1} GB: {}", budget as f64 / 1e9, chosen.layout);
            let mut report = measure(settings, &work, &chosen.layout)?;
            report.name = name;
            report.predicted = 1.0;
            done(&report);
            reports.push(report);
        }
    }
    Ok(reports)
}

/// Every way in interleaved rounds.
fn compare(settings: &MemorySettings, work: &Work, card: &Card) -> Result<Vec<MemoryReport>> {
    let ways = ways(settings);
    let mut rounds: Vec<Vec<f64>> = vec![Vec::new(); ways.len()];
    let mut last = Vec::new();
    for _ in 0..settings.rounds {
        last.clear();
        for (times, (name, layout)) in rounds.iter_mut().zip(&ways) {
            let mut report = measure(settings, work, layout)?;
            report.name.clone_from(name);
            times.push(report.ms);
            last.push(report);
        }
    }
    let base = plan::cost_of(work, &ways[0].1, card)?;
    for ((report, times), (_, layout)) in last.iter_mut().zip(&rounds).zip(&ways) {
        let mut ratios: Vec<f64> = times
            .iter()
            .zip(&rounds[0])
            .map(|(time, none)| time / none)
            .collect();
        ratios.sort_by(f64::total_cmp);
        report.ratio = [median(&ratios), ratios[0], ratios[ratios.len() - 1]];
        let mut times = times.clone();
        times.sort_by(f64::total_cmp);
        report.ms = median(&times);
        report.predicted = plan::cost_of(work, layout, card)?.total() / base.total();
    }
    Ok(last)
}

/// Bytes in use on the device, by whomever.
fn in_use(compute: Compute) -> Result<Option<u64>> {
    match compute.device {
        Device::Cpu => Ok(None),
        Device::Cuda(ordinal) => {
            cuda::synchronize(ordinal)?;
            let (free, total) = cuda::memory_info(ordinal)?;
            Ok(Some(total - free))
        }
    }
}

fn measure(settings: &MemorySettings, work: &Work, layout: &Layout) -> Result<MemoryReport> {
    let planned = Plan::of(work, layout)?;
    let before = in_use(work.compute)?;
    let ledger = Ledger::new();
    let mut trainer = ledger.scope(|| -> Result<Trainer> {
        let options = work.load_options(layout);
        let mut model = Model::synthetic_as(&work.model, 1, settings.full, &options)?;
        model.set_storage(work.storage(layout));
        tune::apply(&mut model, &work.tuning, 1)?;
        work.trainer(model, layout)
    })?;
    let batches = [batch(&work.model, settings.batch, work.length, 0)];
    // The first steps load what is loaded at a first use.
    trainer.step(&batches)?;
    in_use(work.compute)?;
    let transfers = cuda::transfers();
    let mut times = Vec::with_capacity(settings.steps);
    let mut loss = f64::NAN;
    for _ in 0..settings.steps {
        let start = Instant::now();
        loss = trainer.step(&batches)?.loss;
        in_use(work.compute)?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    let steps = settings.steps.max(1) as u64;
    let now = cuda::transfers();
    let used = in_use(work.compute)?;
    Ok(MemoryReport {
        name: String::new(),
        length: work.length,
        ms: median(&times),
        ratio: [1.0; 3],
        predicted: 1.0,
        copied: [
            (now.fetched - transfers.fetched) / steps,
            (now.stored - transfers.stored) / steps,
        ],
        tensors: [planned.tensors(Pool::Device), ledger.held(Pool::Device)],
        driver: before
            .zip(used)
            .map(|(before, used)| [planned.tensors(Pool::Device), used.saturating_sub(before)]),
        loss,
    })
}

impl MemoryReport {
    /// One line for people.
    pub fn line(&self) -> String {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let [ratio, least, most] = self.ratio;
        let driver = self.driver.map_or(String::new(), |[_, used]| {
            format!(", {:.1} MB by the driver", mb(used))
        });
        format!(
            "{:>5} {:<28} {:>9.2} ms, {ratio:.3} x ({least:.3} to {most:.3}; predicted {:.3}); copied {:.2} MB up, {:.2} MB down; device \
             {:.1} MB planned, {:.1} MB held{driver}; loss {:.3}",
            self.length,
            self.name,
            self.ms,
            self.predicted,
            mb(self.copied[0]),
            mb(self.copied[1]),
            mb(self.tensors[0]),
            mb(self.tensors[1]),
            self.loss,
        )
    }

    /// For `--json`.
    pub fn json(&self) -> Value {
        json!({
            "name": self.name,
            "length": self.length,
            "ms": self.ms,
            "ratio": self.ratio[0],
            "ratio_min": self.ratio[1],
            "ratio_max": self.ratio[2],
            "predicted_ratio": self.predicted,
            "fetched_bytes": self.copied[0],
            "stored_bytes": self.copied[1],
            "planned_tensor_bytes": self.tensors[0],
            "held_tensor_bytes": self.tensors[1],
            "planned_device_bytes": self.driver.map(|d| d[0]),
            "driver_bytes": self.driver.map(|d| d[1]),
            "loss": self.loss,
        })
    }
}
