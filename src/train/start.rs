//! From a layout to a trainer that is ready for its next step.

use std::path::{Path, PathBuf};

use super::plan::{Layout, Plan, StateOn, Work};
use super::run::{REFERENCE, total_steps};
use super::{BestSoFar, Inputs, Interrupt, OPTIMIZER, RunFolder, RunState, Trainer, preparing_weights};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::quantized::{CacheStatus, open_or_quantize};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::evaluate::{ProbeOptions, Reference};
use crate::model::tune::Storage;
use crate::model::{Linears, LoadOptions, Model, tune};
use crate::quant::QuantType;
use crate::report::MemoryPart;
use crate::tensor::Device;
use crate::tensor::ledger::{Ledger, Pool};
use crate::tokenizer::Tokenizer;

/// What a start needs to know.
pub(super) struct Start<'a> {
    pub config: &'a RunConfig,
    pub work: &'a Work,
    pub layout: &'a Layout,
    pub inputs: &'a Inputs,
    pub tokenizer: &'a Tokenizer,
    pub interrupt: &'a Interrupt,
}

/// A run whose memory is reserved.
pub(super) struct Ready {
    pub trainer: Trainer,
    pub state: RunState,
    /// The checkpoint that it goes on from, and what that says of the run.
    pub resumed: Option<(PathBuf, RunState)>,
    pub reference: Option<Reference>,
    /// What the memory is for.
    pub parts: Vec<MemoryPart>,
    /// How the base was loaded.
    pub loading: LoadOptions,
    pub storage: Storage,
}

impl Start<'_> {
    /// Loads the base, makes it trainable, and reserves all that a step needs.
    ///
    /// # Errors
    /// Something does not fit: a file, the memory, the checkpoint that the run goes on from.
    pub fn begin(&self, folder: &mut RunFolder, base: String) -> Result<Ready> {
        let work = self.work;
        let state = self.state(base);
        let from = folder.resume_from(&state)?;
        let ledger = Ledger::new();
        let (trainer, saved, reference) = ledger.scope(|| self.trainer(from.as_deref(), folder))?;
        if let Device::Cuda(_) = work.compute.device {
            check_plan(&Plan::of(work, self.layout)?, &ledger);
        }
        let parts = ledger.lines().into_iter().map(|line| MemoryPart {
            name: format!("{} ({})", line.account, line.pool.name()),
            bytes: line.bytes,
        });
        Ok(Ready {
            parts: parts.collect(),
            trainer,
            state,
            resumed: from.zip(saved),
            reference,
            loading: work.load_options(self.layout),
            // What is only evaluated has no gradients.
            storage: Storage {
                lent_gradients: true,
                ..work.storage(self.layout)
            },
        })
    }

    /// The state of a run that has not taken a step.
    fn state(&self, base: String) -> RunState {
        let Self {
            config, work, inputs, ..
        } = *self;
        let mut decisive = config.decisive();
        let on = match work.compute.device {
            Device::Cpu => "cpu",
            Device::Cuda(_) => "cuda",
        };
        decisive.insert("device".into(), on.into());
        decisive.insert("dtype".into(), work.compute.dtype.name().into());
        let total_steps = total_steps(config, inputs.steps_per_epoch());
        let mut state = RunState::new(total_steps, inputs.fingerprint(), base, decisive);
        state.best = BestSoFar::new(config.metric_for_best_model);
        state.evaluation = format!(
            "{} {} {}",
            inputs.evaluation_fingerprint(),
            config.eval_samples,
            config.eval_max_new_tokens
        );
        state
    }

    fn trainer(
        &self,
        from: Option<&Path>,
        folder: &RunFolder,
    ) -> Result<(Trainer, Option<RunState>, Option<Reference>)> {
        let Self {
            config,
            work,
            layout,
            inputs,
            tokenizer,
            interrupt,
        } = *self;
        let tuning = &work.tuning;
        let mut say = |text: &str| eprintln!("{text}");
        if layout.state == StateOn::Disk {
            std::fs::create_dir_all(&work.folder).map_err(Error::io(&work.folder, "create"))?;
        }
        let mut model = load(config, &work.load_options(layout), interrupt, &mut say)?;
        model.set_storage(work.storage(layout));
        let mut reference = None;
        if config.forgetting {
            // Measured once: a resumed run compares with the same numbers.
            let known = folder.dir().join(REFERENCE);
            reference = Some(match from.is_some() && known.exists() {
                true => Reference::read(&known, &model)?,
                false => measure_base(config, &model, tokenizer)?,
            });
        }
        match (from, &config.adapter) {
            (Some(checkpoint), _) => whole(checkpoint, tune::restore(&mut model, tuning, checkpoint))?,
            // An adapter of an earlier run as the start of this one.
            (None, Some(dir)) => {
                tune::restore(&mut model, tuning, dir)?;
                eprintln!("going on from {}", dir.display());
            }
            (None, None) => {
                tune::apply(&mut model, tuning, config.seed)?;
                // Of a base that was changed by a merge there is no checkpoint.
                if !config.in_four_bits() && config.merge_adapters.is_empty() {
                    tune::widen(&mut model, &Checkpoint::open(&config.model)?)?;
                }
            }
        }
        model.set_neftune(config.neftune_alpha)?;
        let mut trainer = work.trainer(model, layout)?;
        let saved = match from {
            Some(checkpoint) => Some(whole(checkpoint, go_on(&mut trainer, checkpoint))?),
            None => None,
        };
        if let Device::Cuda(_) = work.compute.device {
            // Whatever a driver reserves at a first use it reserves now, with the longest batch there is.
            trainer.rehearse(&inputs.largest())?;
        }
        Ok((trainer, saved, reference))
    }
}

/// A run that holds other memory than its plan says is one whose plan nobody can trust.
fn check_plan(plan: &Plan, ledger: &Ledger) {
    for pool in [Pool::Device, Pool::Pinned, Pool::Disk] {
        let (planned, held) = (plan.tensors(pool), ledger.held(pool));
        if planned != held {
            eprintln!(
                "warning: this run holds {held} bytes of {} where its plan said {planned}: please report it",
                pool.name()
            );
        }
    }
}

/// How the base answers the general prompts, before anything is trained.
fn measure_base(config: &RunConfig, model: &Model, tokenizer: &Tokenizer) -> Result<Reference> {
    eprintln!("forgetting: the base answers the general prompts");
    let options = ProbeOptions {
        tokens: config.forgetting_tokens,
    };
    Reference::measure(model, tokenizer, &options)
}

/// The frozen weights: for QLoRA and P-Tuning the 4-bit copy of the checkpoint, made now if there is none; and the adapters that are
/// merged into them.
pub(super) fn load(
    config: &RunConfig,
    options: &LoadOptions,
    interrupt: &Interrupt,
    say: &mut dyn FnMut(&str),
) -> Result<Model> {
    let (checkpoint, status) = match config.in_four_bits() {
        true => quantized(config, interrupt)?,
        false => (Checkpoint::open(&config.model)?, CacheStatus::AlreadyQuantized),
    };
    let linears = checkpoint.config().linears();
    if linears != Linears::Dense && status == CacheStatus::AlreadyQuantized {
        say(&format!(
            "base: its linears are stored in {linears}, and are used as they are"
        ));
    }
    let mut model = Model::load(&checkpoint, options)?;
    for dir in &config.merge_adapters {
        let merged = tune::merge_adapter(&mut model, dir)?;
        say(&format!("merged {}: {merged}", dir.display()));
    }
    Ok(model)
}

/// The 4-bit copy of the checkpoint; the checkpoint itself if it is in few bits.
fn quantized(config: &RunConfig, interrupt: &Interrupt) -> Result<(Checkpoint, CacheStatus)> {
    let quant_type = match config.quant_type.as_str() {
        "fp4" => QuantType::Fp4,
        _ => QuantType::Nf4,
    };
    let mut say = preparing_weights();
    let mut progress = |done: u64, total: u64, what: &str| {
        say(done, total, what);
        interrupt.check(0)
    };
    let double_quant = !config.no_double_quant;
    let (checkpoint, status) = open_or_quantize(
        &config.model,
        config.cache_dir.as_deref(),
        quant_type,
        double_quant,
        &mut progress,
    )?;
    Ok((checkpoint, status))
}

/// Puts the trainer where a checkpoint left it: the optimizer's state, the step, the loss scale. Returns what the checkpoint says of the run.
fn go_on(trainer: &mut Trainer, checkpoint: &Path) -> Result<RunState> {
    let path = checkpoint.join(OPTIMIZER);
    trainer.optimizer_mut().load(&path)?;
    let state = RunState::read(checkpoint)?;
    trainer.set_loss_scale(state.loss_scale);
    trainer.set_steps(state.step);
    let (found, expected) = (
        trainer.optimizer().steps(),
        state.step.saturating_sub(state.skipped),
    );
    if found != expected {
        let expected = format!("step {expected} as in state.json");
        return Err(Error::input(
            path.display(),
            format!("step {found}"),
            expected,
            "",
        ));
    }
    Ok(state)
}

/// A file of a checkpoint that cannot be used: there may be an older checkpoint.
pub(super) fn whole<T>(checkpoint: &Path, read: Result<T>) -> Result<T> {
    let remedy = format!(
        "remove {} and --resume goes on from the checkpoint before it",
        checkpoint.display()
    );
    read.map_err(|error| match error {
        Error::Input {
            place,
            found,
            expected,
            ..
        } => Error::Input {
            place,
            found,
            expected,
            remedy,
        },
        Error::Io { path, action, source } => Error::input(
            path.display(),
            format!("that it cannot {action} it ({source})"),
            "a whole checkpoint",
            remedy,
        ),
        other => other,
    })
}
