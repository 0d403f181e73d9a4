//! What a run allocates, before it does: the constructors of the run, called where tensors have no memory
//! ([`crate::tensor::ledger`]). There is no second formula that could differ from them.

mod card;
mod cost;
mod fit;
mod layout;
mod request;
mod table;
mod tables;

use std::path::PathBuf;

use serde_json::{Value, json};

pub use card::Card;
pub use cost::Cost;
pub use fit::{Asked, Candidate, Fit, Limits, cost_of, fit, largest, longest};
pub use layout::{Layout, Policies, StateOn, head_name, parse_bytes};

pub use request::{answers, context, limits, options, tuning};
pub use tables::tables;

use super::{Options, Trainer};
use crate::compute;
use crate::error::Result;
use crate::model::tune::{self, MasterPlace, Storage, Tuning};
use crate::model::{LoadOptions, LoadedFrom, Model, ModelConfig, Weights};
use crate::optim::{StatePlace, StateStorage};
use crate::tensor::ledger::{Ledger, Line, Pool};
use crate::tensor::{Compute, Device};

/// What the driver itself takes of a card for a process, until a run on a card has measured it; a guess from reports.
pub const CONTEXT: u64 = 400_000_000;

/// Answers that a run generates to evaluate itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answers {
    /// Prompts at a time.
    pub size: usize,
    /// And never more than a micro-batch has sequences?
    pub in_micro_batches: bool,
    /// Tokens of the longest prompt.
    pub prompt: usize,
    /// Tokens of prompt and answer.
    pub capacity: usize,
}

/// What is to be trained, whatever lies where.
#[derive(Debug, Clone)]
pub struct Work {
    /// The sizes of the model.
    pub model: ModelConfig,
    /// The checkpoint as it will be loaded.
    pub from: LoadedFrom,
    /// What trains.
    pub tuning: Tuning,
    /// Where, and in which type.
    pub compute: Compute,
    /// Optimizer and clipping.
    pub options: Options,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of the longest.
    pub length: usize,
    /// Sequences that there are at all.
    pub samples: usize,
    /// For files that stand in for memory.
    pub folder: PathBuf,
    /// What is generated in between.
    pub answers: Vec<Answers>,
    /// Bytes that the driver itself takes.
    pub context: u64,
}

impl Work {
    /// How the model is loaded.
    pub fn load_options(&self, layout: &Layout) -> LoadOptions {
        LoadOptions {
            compute: self.compute,
            weights: Weights::AsStored,
            stream: layout.stream,
            head: layout.head,
            embedding: layout.embedding,
        }
    }

    /// Where weights that train whole lie.
    pub fn storage(&self, layout: &Layout) -> Storage {
        let whole = matches!(self.tuning, Tuning::Full | Tuning::Freeze { .. });
        Storage {
            masters: match layout.state {
                StateOn::Host if whole => MasterPlace::Host,
                StateOn::Disk if whole => MasterPlace::Disk(self.folder.clone()),
                _ => MasterPlace::Device,
            },
            lent_gradients: layout.in_backward,
        }
    }

    /// The trainer over a model that [`tune::apply`] has seen.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn trainer(&self, model: Model, layout: &Layout) -> Result<Trainer> {
        let options = Options {
            in_backward: layout.in_backward,
            ..self.options
        };
        let storage = StateStorage {
            place: match layout.state {
                StateOn::Device => StatePlace::Device,
                StateOn::Host => StatePlace::Host,
                StateOn::Disk => StatePlace::Disk(self.folder.clone()),
            },
            vram: layout.optimizer_vram,
        };
        let size = layout.micro_batch.min(self.samples);
        Trainer::with_memory(model, options, size, self.length, &layout.layers, &storage)
    }
}

/// Every buffer of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Bytes by pool and account, from the first step to the last.
    pub lines: Vec<Line>,
    /// Device bytes that answers take beside, while they are generated.
    pub answers: u64,
    /// Device bytes that loading takes for a moment beyond what stays.
    pub loading: u64,
    /// What the driver takes, and the kernels' scratch memory; 0 on the CPU.
    pub fixed: [u64; 2],
}

impl Plan {
    /// The plan of `work` in `layout`.
    ///
    /// # Errors
    /// The method does not fit the model.
    pub fn of(work: &Work, layout: &Layout) -> Result<Self> {
        let ledger = Ledger::new();
        ledger.plan(|| {
            let mut model = Model::planned(&work.model, work.from, &work.load_options(layout))?;
            model.set_storage(work.storage(layout));
            tune::apply(&mut model, &work.tuning, 0)?;
            let trainer = work.trainer(model, layout)?;
            let lines = ledger.lines();
            let before = ledger.held(Pool::Device);
            let mut answers = 0;
            for &Answers {
                size,
                in_micro_batches,
                prompt,
                capacity,
            } in &work.answers
            {
                let size = if in_micro_batches {
                    size.min(layout.micro_batch)
                } else {
                    size
                };
                let mut cache = trainer.model().cache(size, capacity)?;
                trainer.model().reserve(&mut cache, prompt)?;
                answers = answers.max(ledger.held(Pool::Device) - before);
            }
            let steady = before + answers;
            Ok(Self {
                lines,
                answers,
                loading: ledger.peak(Pool::Device).saturating_sub(steady),
                fixed: match work.compute.device {
                    Device::Cpu => [0, 0],
                    Device::Cuda(_) => [work.context, compute::SCRATCH],
                },
            })
        })
    }

    /// Bytes of tensors in `pool`.
    pub fn tensors(&self, pool: Pool) -> u64 {
        let lines = self.lines.iter().filter(|line| line.pool == pool);
        lines.map(|line| line.bytes).sum()
    }

    /// Bytes of the card at their highest.
    pub fn device(&self) -> u64 {
        self.tensors(Pool::Device) + self.answers + self.loading + self.fixed.iter().sum::<u64>()
    }

    /// Bytes of host memory, the mapped checkpoint not counted.
    pub fn host(&self) -> u64 {
        self.tensors(Pool::Host) + self.tensors(Pool::Pinned)
    }

    /// For `--json` and `run.json`.
    pub fn json(&self) -> Value {
        let lines = self.lines.iter();
        let lines: Vec<Value> = lines
            .map(|line| json!({"memory": line.pool.name(), "account": line.account, "bytes": line.bytes}))
            .collect();
        json!({
            "buffers": lines,
            "answers_bytes": self.answers,
            "loading_bytes": self.loading,
            "context_bytes": self.fixed[0],
            "scratch_bytes": self.fixed[1],
            "device_bytes": self.device(),
            "host_bytes": self.host(),
            "disk_bytes": self.tensors(Pool::Disk),
        })
    }
}
