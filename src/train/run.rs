//! A training run from configuration to adapter: everything before the first step.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::steps::Run;
use super::{
    Inputs, Interrupt, OPTIMIZER, Options, RunFolder, RunState, Trainer, clock, fingerprint,
    preparing_weights,
};
use crate::checkpoint::quantized::open_or_quantize;
use crate::checkpoint::{Checkpoint, LM_HEAD};
use crate::compute;
use crate::config::{Method, RunConfig};
use crate::error::{Error, Result};
use crate::model::{LoadOptions, Model, Weights, tune};
use crate::optim::AdamWConfig;
use crate::quant::QuantType;
use crate::schedule::{Schedule, warmup_steps};
use crate::tensor::{Compute, Device};
use crate::tokenizer::Tokenizer;

/// What a finished run achieved.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Optimizer steps of the whole run.
    pub steps: u64,
    /// Loss of the last step; `None` when a resumed run was complete already.
    pub loss: Option<f64>,
    /// Evaluation loss before the first step of this call, when there is evaluation data.
    pub eval_before: Option<f64>,
    /// Evaluation loss of the result.
    pub eval_after: Option<f64>,
    /// The PEFT folder.
    pub adapter: PathBuf,
}

/// Trains as `config` says and writes the adapter to `config.output`.
///
/// # Errors
/// Bad input, found before the first step where possible; a number that is not finite; a disk that is full; or
/// [`crate::error::Error::Interrupted`] after `interrupt` was requested and everything is saved.
pub fn run(config: &RunConfig, interrupt: &Interrupt) -> Result<Summary> {
    let started = Instant::now();
    let mut folder = RunFolder::check(config)?;
    let tuning = tuning(config)?;
    let compute = compute::choose(&config.device, &config.dtype)?;

    let source = Checkpoint::open(&config.model)?;
    source.validate()?;
    let tokenizer = Tokenizer::open(&config.model)?;
    tokenizer.check(source.config())?;
    let inputs = Inputs::prepare(config, &tokenizer, source.config())?;
    inputs.notes().iter().for_each(|note| eprintln!("{note}"));
    if config.preview {
        eprint!("{}", inputs.preview(&tokenizer));
    }

    interrupt.check(0)?;
    let total_steps = total_steps(config, inputs.steps_per_epoch());
    let base = fingerprint::of_weights(&source)?;
    drop(source);
    let mut decisive = config.decisive();
    let on = match compute.device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
    };
    decisive.insert("device".into(), on.into());
    decisive.insert("dtype".into(), compute.dtype.name().into());
    let state = RunState::new(total_steps, inputs.fingerprint(), base, decisive);
    let from = folder.resume_from(&state)?;
    eprintln!("computing on: {}", compute::describe(compute)?);
    let mut model = load(config, compute, interrupt)?;
    match &from {
        None => tune::apply(&mut model, &tuning, config.seed)?,
        Some(checkpoint) => {
            whole(checkpoint, tune::load_adapter(&mut model, checkpoint, true)).map(|_| ())?
        }
    }
    eprintln!(
        "{}",
        describe(config, &model, total_steps, inputs.steps_per_epoch())
    );

    let options = options(config, total_steps);
    let mut trainer = Trainer::new(model, options, inputs.widest(), inputs.longest())?;
    if let Some(checkpoint) = &from {
        whole(checkpoint, load_optimizer(&mut trainer, checkpoint))?;
        eprintln!("resumed from {}", checkpoint.display());
    }
    interrupt.check(trainer.steps())?;
    folder.begin(config)?;
    let summary = Run {
        config,
        inputs,
        folder,
        state,
        trainer,
    }
    .finish(interrupt)?;
    eprintln!("{}", conclusion(config, &summary, started.elapsed()));
    Ok(summary)
}

/// Optimizer steps of the whole run.
fn total_steps(config: &RunConfig, steps_per_epoch: u64) -> u64 {
    let by_epochs = (config.epochs * steps_per_epoch as f64).ceil() as u64;
    config.max_steps.unwrap_or(by_epochs).max(1)
}

fn tuning(config: &RunConfig) -> Result<tune::Tuning> {
    let targets = match config.lora_target.as_str() {
        "all" => tune::LoraTarget::ALL.to_vec(),
        list => {
            let names = list.split(',').map(str::trim);
            let parsed: Result<Vec<tune::LoraTarget>> = names.map(str::parse).collect();
            let mut targets = parsed.map_err(|e| Error::Usage(e.to_string()))?;
            targets.sort_unstable();
            targets.dedup();
            targets
        }
    };
    Ok(tune::Tuning::Lora {
        r: config.lora_r,
        alpha: config.alpha(),
        dropout: config.lora_dropout,
        rslora: config.rslora,
        targets,
    })
}

fn options(config: &RunConfig, total_steps: u64) -> Options {
    Options {
        adamw: AdamWConfig {
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            weight_decay: config.weight_decay,
            exclude_bias_and_norm: true,
        },
        schedule: Schedule {
            scheduler: config.lr_scheduler,
            base: config.learning_rate,
            warmup_steps: warmup_steps(config.warmup_steps, config.warmup_ratio, total_steps),
            total_steps,
        },
        max_grad_norm: config.max_grad_norm,
        reduction: config.loss_reduction,
        seed: config.seed,
    }
}

/// The frozen weights: for QLoRA the 4-bit copy of the checkpoint, made now if there is none.
fn load(config: &RunConfig, compute: Compute, interrupt: &Interrupt) -> Result<Model> {
    let options = LoadOptions {
        compute,
        weights: Weights::AsStored,
    };
    if config.method == Method::Lora {
        return Model::load(&Checkpoint::open(&config.model)?, &options);
    }
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
    let (checkpoint, _) = open_or_quantize(
        &config.model,
        config.cache_dir.as_deref(),
        quant_type,
        double_quant,
        &mut progress,
    )?;
    Model::load(&checkpoint, &options)
}

/// The optimizer's state of a checkpoint, and the loss scale.
fn load_optimizer(trainer: &mut Trainer, checkpoint: &Path) -> Result<()> {
    let path = checkpoint.join(OPTIMIZER);
    trainer.optimizer_mut().load(&path)?;
    let state = RunState::read(checkpoint)?;
    trainer.set_loss_scale(state.loss_scale);
    let (found, expected) = (trainer.steps(), state.step);
    if found != expected {
        let expected = format!("step {expected} as in state.json");
        return Err(Error::input(
            path.display(),
            format!("step {found}"),
            expected,
            "",
        ));
    }
    Ok(())
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

/// What is trained, in one line.
fn describe(config: &RunConfig, model: &Model, total_steps: u64, steps_per_epoch: u64) -> String {
    let (mut trained, mut tensors, mut separate_head) = (0usize, 0usize, false);
    model.for_each_param(&mut |name, param| {
        separate_head |= name == LM_HEAD;
        if param.trains() {
            trained += param.value.elements();
            tensors += 1;
        }
    });
    let names = model.config().tensors();
    let base: usize = names
        .iter()
        .filter(|(name, _)| separate_head || name != LM_HEAD)
        .map(|(_, shape)| shape.elements())
        .sum();
    let method = match config.method {
        Method::Qlora => format!("QLoRA ({})", config.quant_type),
        _ => "LoRA".to_string(),
    };
    let per_step = config.micro_batch_size * config.gradient_accumulation_steps;
    format!(
        "{method} r {}, alpha {}: {trained} parameters in {tensors} tensors train ({:.3} % of {base}); {total_steps} steps of \
         up to {per_step} samples, {steps_per_epoch} a pass",
        config.lora_r,
        config.alpha(),
        100.0 * trained as f64 / base as f64,
    )
}

/// What came out, and what to do with it.
fn conclusion(config: &RunConfig, summary: &Summary, took: Duration) -> String {
    let loss = match (summary.eval_before, summary.eval_after) {
        (Some(before), Some(after)) => format!("evaluation loss {before:.4} -> {after:.4}"),
        _ => match summary.loss {
            Some(loss) => format!("last loss {loss:.4}"),
            None => "no step left to take".to_string(),
        },
    };
    let adapter = summary.adapter.display();
    format!(
        "{} steps in {}, {loss}\nadapter: {adapter}\nnext: glmtune chat --model {} --adapter {adapter}",
        summary.steps,
        clock(took),
        config.model.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn part_of_an_epoch_rounds_up_and_max_steps_wins() {
        let config = RunConfig {
            epochs: 2.5,
            ..RunConfig::default()
        };
        assert_eq!(total_steps(&config, 3), 8);
        assert_eq!(
            total_steps(
                &RunConfig {
                    max_steps: Some(2),
                    ..config
                },
                3
            ),
            2
        );
    }
}
