//! A training run from configuration to result: everything before the first step.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::evaluation::Evaluation;
use super::journal::Journal;
use super::steps::Run;
use super::{
    BestSoFar, Inputs, Interrupt, OPTIMIZER, Options, RunFolder, RunState, Trainer, clock, fingerprint,
    method, preparing_weights,
};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::quantized::open_or_quantize;
use crate::compute;
use crate::config::{Method, RunConfig};
use crate::error::{Error, Result};
use crate::evaluate::{ProbeOptions, Reference};
use crate::model::{LoadOptions, Model, Weights, tune};
use crate::optim::OptimizerConfig;
use crate::quant::QuantType;
use crate::report::{Digest, MemoryPart, Parameters, Program, RunRecord};
use crate::schedule::{Schedule, warmup_steps};
use crate::tensor::{Compute, Device};
use crate::tokenizer::Tokenizer;

/// How the base answers the general prompts, kept beside the run so that a resumed one compares with the same.
const REFERENCE: &str = "forgetting.safetensors";

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
    let tuning = method::tuning(config)?;
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
    let base = base_fingerprint(&source, &config.merge_adapters)?;
    drop(source);
    let mut decisive = config.decisive();
    let on = match compute.device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
    };
    decisive.insert("device".into(), on.into());
    decisive.insert("dtype".into(), compute.dtype.name().into());
    let mut state = RunState::new(total_steps, inputs.fingerprint(), base, decisive);
    state.best = BestSoFar::new(config.metric_for_best_model);
    state.evaluation = format!(
        "{} {} {}",
        inputs.evaluation_fingerprint(),
        config.eval_samples,
        config.eval_max_new_tokens
    );
    let from = folder.resume_from(&state)?;
    let computing_on = compute::describe(compute)?;
    eprintln!("computing on: {computing_on}");
    let mut say = |text: &str| eprintln!("{text}");
    let mut model = load(config, compute, interrupt, &mut say)?;
    let mut reference = None;
    if config.forgetting {
        // Measured once: a resumed run compares with the same numbers.
        let known = folder.dir().join(REFERENCE);
        reference = Some(match from.is_some() && known.exists() {
            true => Reference::read(&known, &model)?,
            false => measure_base(config, &model, &tokenizer)?,
        });
    }
    match &from {
        None => {
            match &config.adapter {
                None => {
                    tune::apply(&mut model, &tuning, config.seed)?;
                    // Of a base that was changed by a merge there is no checkpoint.
                    if !config.in_four_bits() && config.merge_adapters.is_empty() {
                        tune::widen(&mut model, &Checkpoint::open(&config.model)?)?;
                    }
                }
                // An adapter of an earlier run as the start of this one.
                Some(dir) => {
                    tune::restore(&mut model, &tuning, dir)?;
                    eprintln!("going on from {}", dir.display());
                }
            }
        }
        Some(checkpoint) => {
            whole(checkpoint, tune::restore(&mut model, &tuning, checkpoint))?;
        }
    }
    model.set_neftune(config.neftune_alpha)?;
    eprintln!(
        "{}",
        method::describe(config, &model, total_steps, inputs.steps_per_epoch())
    );

    let options = options(config, total_steps);
    let mut record = record(config, &model, &inputs, &state, computing_on);
    let mut trainer = Trainer::new(model, options, inputs.widest(), inputs.longest())?;
    record.memory.parts = memory_parts(&trainer);
    if let Some(checkpoint) = &from {
        let saved = whole(checkpoint, go_on(&mut trainer, checkpoint))?;
        let notes;
        (state, notes) = state.go_on_from(saved, config.keeps_best(), folder.checkpoints());
        eprintln!("resumed from {}", checkpoint.display());
        notes.iter().for_each(|note| eprintln!("{note}"));
    }
    interrupt.check(trainer.steps())?;
    folder.begin(config)?;
    let place = folder.dir().join(REFERENCE);
    if let Some(reference) = reference.as_ref().filter(|_| from.is_none() || !place.exists()) {
        reference.save(&place)?;
    }
    for text in inputs.warnings() {
        if let Some(text) = state.watch.warn(0, text.clone()) {
            eprintln!("warning: {text}");
        }
    }
    let resumed_at = from.as_ref().map(|_| trainer.steps());
    let mut journal = Journal::open(folder.dir(), resumed_at, record, compute.device, started)?;
    let kept = state
        .best
        .step()
        .and_then(|step| folder.checkpoints().of_step(step));
    journal.note(&state, trainer.steps(), kept);
    let reload = || {
        let mut silent = |_: &str| ();
        load(config, compute, &Interrupt::new(), &mut silent)
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
        reload: &reload,
    }
    .finish(interrupt);
    let summary = journal.end(result)?;
    eprintln!("{}", conclusion(config, &summary, started.elapsed()));
    Ok(summary)
}

/// Optimizer steps of the whole run.
fn total_steps(config: &RunConfig, steps_per_epoch: u64) -> u64 {
    let by_epochs = (config.epochs * steps_per_epoch as f64).ceil() as u64;
    config.max_steps.unwrap_or(by_epochs).max(1)
}

fn options(config: &RunConfig, total_steps: u64) -> Options {
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

/// How the base answers the general prompts, before anything is trained.
fn measure_base(config: &RunConfig, model: &Model, tokenizer: &Tokenizer) -> Result<Reference> {
    eprintln!("forgetting: the base answers the general prompts");
    let options = ProbeOptions {
        tokens: config.forgetting_tokens,
    };
    Reference::measure(model, tokenizer, &options)
}

/// What the memory is for, as far as tensors tell.
fn memory_parts(trainer: &Trainer) -> Vec<MemoryPart> {
    let mut trained = 0;
    trainer.model().for_each_param(&mut |_, param| {
        if let Some(gradient) = &param.grad {
            trained += param.value.byte_len() + gradient.byte_len();
        }
    });
    let part = |name: &str, bytes: usize| MemoryPart {
        name: name.to_string(),
        bytes: bytes as u64,
    };
    vec![
        part(
            "all weights (mapped from files on the CPU)",
            trainer.model().decode_bytes(),
        ),
        part("what trains, with its gradients", trained),
        part("optimizer state", trainer.optimizer().state_bytes()),
    ]
}

/// What `run.json` says of the run from its start.
fn record(config: &RunConfig, model: &Model, inputs: &Inputs, state: &RunState, device: String) -> RunRecord {
    let (trainable, _, base) = method::counts(model);
    let digest = |of: &str, path: &Path, sha256: String| Digest {
        of: of.to_string(),
        path: path.display().to_string(),
        sha256,
    };
    let mut hashes = vec![
        digest("training samples", &config.data, inputs.fingerprint()),
        digest("base", &config.model, state.base.clone()),
    ];
    let files = [
        ("training data", Some(&config.data)),
        ("evaluation data", config.eval_data.as_ref()),
        ("replayed data", config.replay.as_ref()),
        ("tokenizer", Some(&config.model.join("ice_text.model"))),
    ]
    .map(|(of, path)| (of, path.cloned()));
    for (of, path) in files {
        if let Some(path) = path
            && let Ok(sha256) = fingerprint::of_file(&path)
        {
            hashes.push(digest(of, &path, sha256));
        }
    }
    RunRecord {
        program: Program {
            version: env!("CARGO_PKG_VERSION").to_string(),
            sha256: std::env::current_exe()
                .ok()
                .and_then(|path| fingerprint::of_file(&path).ok()),
        },
        method: method::words(config),
        model: config.model.display().to_string(),
        device,
        dtype: model.dtype().name().to_string(),
        parameters: Parameters {
            trainable: trainable as u64,
            total: base as u64,
        },
        total_steps: state.total_steps,
        hashes,
        ..RunRecord::default()
    }
}

/// The frozen weights: for QLoRA and P-Tuning the 4-bit copy of the checkpoint, made now if there is none; and the adapters that are
/// merged into them.
fn load(
    config: &RunConfig,
    compute: Compute,
    interrupt: &Interrupt,
    say: &mut dyn FnMut(&str),
) -> Result<Model> {
    let options = LoadOptions {
        compute,
        weights: Weights::AsStored,
    };
    let checkpoint = match config.in_four_bits() {
        true => quantized(config, interrupt)?,
        false => Checkpoint::open(&config.model)?,
    };
    let mut model = Model::load(&checkpoint, &options)?;
    for dir in &config.merge_adapters {
        let merged = tune::merge_adapter(&mut model, dir)?;
        say(&format!("merged {}: {merged}", dir.display()));
    }
    Ok(model)
}

/// The 4-bit copy of the checkpoint.
fn quantized(config: &RunConfig, interrupt: &Interrupt) -> Result<Checkpoint> {
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
    Ok(checkpoint)
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
