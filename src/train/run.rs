//! A training run from configuration to result: everything before the first step.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::evaluation::Evaluation;
use super::journal::Journal;
use super::ladder::Ladder;
use super::start::{self, Ready, Start};
use super::steps::Run;
use super::{Inputs, Interrupt, Options, RunFolder, clock, fingerprint, method, record};
use crate::checkpoint::Checkpoint;
use crate::compute;
use crate::config::{Method, RunConfig};
use crate::error::{Error, Result};
use crate::optim::OptimizerConfig;
use crate::schedule::{Schedule, warmup_steps};
use crate::tokenizer::Tokenizer;

/// How the base answers the general prompts, kept beside the run so that a resumed one compares with the same.
pub(super) const REFERENCE: &str = "forgetting.safetensors";

/// What a finished run achieved.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Optimizer steps taken, those left out included.
    pub steps: u64,
    /// Loss of the last step; `None` when a resumed run was complete already.
    pub loss: Option<f64>,
    /// Evaluation loss before the first step of this call, when there is evaluation data.
    pub eval_before: Option<f64>,
    /// Evaluation loss of the result.
    pub eval_after: Option<f64>,
    /// The step that the result comes from, when the best was asked for.
    pub best: Option<u64>,
    /// The run's folder, which holds the adapter or the model.
    pub output: PathBuf,
}

/// Trains as `config` says and writes the result to `config.output`.
///
/// # Errors
/// Bad input, found before the first step where possible; a number that is not finite; a disk that is full; or
/// [`crate::error::Error::Interrupted`] after `interrupt` was requested and everything is saved.
pub fn run(config: &RunConfig, interrupt: &Interrupt) -> Result<Summary> {
    let started = Instant::now();
    let mut folder = RunFolder::check(config)?;
    let config = &method::inherit(config)?;
    let compute = compute::choose(&config.device, &config.dtype)?;

    let source = Checkpoint::open(&config.model)?;
    source.validate()?;
    let tokenizer = Tokenizer::open(&config.model)?;
    tokenizer.check(source.config())?;
    let mut inputs = Inputs::prepare(config, &tokenizer, source.config())?;
    inputs.notes().iter().for_each(|note| eprintln!("{note}"));
    if config.preview {
        eprint!("{}", inputs.preview(&tokenizer));
    }

    interrupt.check(0)?;
    let base = base_fingerprint(&source, &config.merge_adapters)?;
    let ladder = Ladder::of(config, (&source, &tokenizer), compute, &inputs)?;
    drop(source);
    eprintln!("computing on: {}", compute::describe(compute)?);
    eprint!("{}", ladder.text);

    let mut rungs = ladder.rungs.into_iter().peekable();
    let ready = loop {
        let Some(layout) = rungs.next() else {
            return Err(Error::input("memory", "no layout to try", "one", "this is a bug"));
        };
        let config = layout.settle(config);
        inputs.regroup(&config);
        let start = Start {
            config: &config,
            work: &ladder.work,
            layout: &layout,
            inputs: &inputs,
            tokenizer: &tokenizer,
            interrupt,
        };
        match start.begin(&mut folder, base.clone()) {
            Err(error) if error.is_out_of_memory() && rungs.peek().is_some() => {
                eprintln!("{error}");
                eprintln!("the card has less than it said: going on with less of it");
                if let Some(next) = rungs.peek() {
                    eprintln!("next: {next}");
                }
            }
            Err(error) => return Err(error),
            Ok(ready) => break (config, layout.layers, ready),
        }
    };
    let (config, layers, ready) = (&ready.0, &ready.1, ready.2);
    let Ready {
        trainer,
        mut state,
        resumed,
        reference,
        parts,
        loading,
        storage,
    } = ready;
    let tuning = ladder.work.tuning;
    let model = trainer.model();
    eprintln!(
        "{}",
        method::describe(config, model, state.total_steps, inputs.steps_per_epoch())
    );
    let mut record = record::of(config, model, &inputs, &state, compute::describe(compute)?);
    record.memory.parts = parts;
    let from = resumed.is_some();
    if let Some((checkpoint, saved)) = resumed {
        let notes;
        (state, notes) = state.go_on_from(saved, config.keeps_best(), folder.checkpoints());
        eprintln!("resumed from {}", checkpoint.display());
        notes.iter().for_each(|note| eprintln!("{note}"));
    }
    interrupt.check(trainer.steps())?;
    folder.begin(config)?;
    let place = folder.dir().join(REFERENCE);
    if let Some(reference) = reference.as_ref().filter(|_| !from || !place.exists()) {
        reference.save(&place)?;
    }
    for text in inputs.warnings() {
        if let Some(text) = state.watch.warn(0, text.clone()) {
            eprintln!("warning: {text}");
        }
    }
    let resumed_at = from.then(|| trainer.steps());
    let mut journal = Journal::open(folder.dir(), resumed_at, record, compute.device, started)?;
    let kept = state
        .best
        .step()
        .and_then(|step| folder.checkpoints().of_step(step));
    journal.note(&state, trainer.steps(), kept);
    let reload = || {
        let mut silent = |_: &str| ();
        let mut model = start::load(config, &loading, &Interrupt::new(), &mut silent)?;
        model.set_storage(storage.clone());
        Ok(model)
    };
    let result = Run {
        config,
        tuning,
        evaluation: Evaluation::new(config, &inputs, tokenizer, reference),
        inputs,
        folder: &folder,
        state,
        trainer,
        journal: &mut journal,
        layers,
        reload: &reload,
    }
    .finish(interrupt);
    let summary = journal.end(result)?;
    eprintln!("{}", conclusion(config, &summary, started.elapsed()));
    Ok(summary)
}

/// Optimizer steps of the whole run.
pub(super) fn total_steps(config: &RunConfig, steps_per_epoch: u64) -> u64 {
    let by_epochs = (config.epochs * steps_per_epoch as f64).ceil() as u64;
    config.max_steps.unwrap_or(by_epochs).max(1)
}

pub(super) fn options(config: &RunConfig, total_steps: u64) -> Options {
    Options {
        optimizer: OptimizerConfig {
            kind: config.optim,
            beta1: config.adam_beta1,
            beta2: config.adam_beta2,
            epsilon: config.adam_epsilon,
            momentum: config.momentum,
            weight_decay: config.weight_decay,
            exclude_bias_and_norm: true,
            loraplus_lr_ratio: config.loraplus_lr_ratio,
        },
        schedule: Schedule {
            scheduler: config.lr_scheduler,
            base: config.rate(),
            warmup_steps: warmup_steps(config.warmup_steps, config.warmup_ratio, total_steps),
            total_steps,
            min_lr_ratio: config.min_lr_ratio,
            power: config.lr_power,
        },
        max_grad_norm: config.max_grad_norm,
        in_backward: false,
        reduction: config.loss_reduction,
        seed: config.seed,
    }
}

/// What tells a base from others: its weights and, where adapters are merged into it first, theirs.
///
/// # Errors
/// A tensor or an adapter cannot be read.
pub fn base_fingerprint(source: &Checkpoint, merged: &[PathBuf]) -> Result<String> {
    let base = fingerprint::of_weights(source)?;
    if merged.is_empty() {
        return Ok(base);
    }
    let mut parts = vec![base];
    for dir in merged {
        parts.push(fingerprint::of_adapter(dir)?);
    }
    Ok(fingerprint::of_bytes(|hash| {
        parts.iter().for_each(|part| hash(part.as_bytes()))
    }))
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
    let (model, output) = (config.model.display(), summary.output.display());
    let next = match config.method {
        Method::Freeze | Method::Full => {
            format!("model: {output}/model\nnext: glmtune chat --model {output}/model")
        }
        _ => format!("adapter: {output}\nnext: glmtune chat --model {model} --adapter {output}"),
    };
    // A whole model holds them; an adapter is nothing without them.
    let merged = match (config.method, config.merge_adapters.len()) {
        (_, 0) | (Method::Freeze | Method::Full, _) => String::new(),
        (_, n) => format!(
            "\nnote: it is an adapter of the base with {n} others merged in, which glmtune finds through run.toml; other programs do \
             not"
        ),
    };
    format!(
        "{} steps in {}, {loss}\nreport: {output}/report.html\n{next}{merged}",
        summary.steps,
        clock(took),
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
