//! The loop over the steps of a run: report, evaluate, save, stop when asked to.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Map, Value};

use super::run::Summary;
use super::{
    Inputs, Interrupt, LossScale, Metrics, OPTIMIZER, Progress, RunFolder, RunState, StepLine, StepReport,
    Trainer,
};
use crate::checkpoint::{AdapterConfig, read_adapter};
use crate::config::RunConfig;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::model::{Model, tune};
use crate::tensor::Tensor;

/// A run, ready for its next step.
pub(super) struct Run<'a> {
    pub config: &'a RunConfig,
    pub inputs: Inputs,
    pub folder: RunFolder,
    pub state: RunState,
    pub trainer: Trainer,
}

impl Run<'_> {
    /// Takes the remaining steps and writes the adapter.
    pub fn finish(mut self, interrupt: &Interrupt) -> Result<Summary> {
        let first = self.trainer.steps();
        let total = self.state.total_steps;
        let mut metrics = Metrics::open(&self.folder.dir().join("metrics.jsonl"), first)?;
        let mut progress = Progress::new(first, total);
        let mut pace = Pace::new();
        if first >= total {
            progress.note(&format!("all {total} steps are done: writing the adapter again"));
        }

        let eval_before = self.evaluate(&progress, "before", Some(interrupt))?;
        if let (Some(loss), 0) = (eval_before, first) {
            metrics.write(&row(&[("step", 0.into()), ("eval_loss", loss.into())]))?;
        }
        let (mut loss, mut eval_after) = (None, eval_before);
        for step in first + 1..=total {
            let (batches, tokens) = self.inputs.step(step - 1);
            let report = self.trainer.step(&batches)?;
            loss = Some(report.loss);
            let speed = pace.step(tokens);
            let line = self.line(&report, speed);
            progress.step(&line);

            let evaluate = step == total || self.config.eval_steps.is_some_and(|every| step % every == 0);
            let eval_loss = if evaluate {
                self.evaluate(&progress, &format!("step {step}"), None)?
            } else {
                None
            };
            eval_after = eval_loss.or(eval_after);
            if step % self.config.logging_steps == 0 || step == total || eval_loss.is_some() {
                metrics.write(&metrics_row(&line, &report, tokens, eval_loss))?;
            }
            let stop = interrupt.requested() && step < total;
            if stop || step % self.config.save_steps == 0 || step == total {
                let place = self.save(step)?;
                if stop {
                    progress.finish();
                    let output = self.config.output.display();
                    let saved = format!(
                        "saved {}; go on with: glmtune train --output {output} --resume",
                        place.display()
                    );
                    return Err(Error::Interrupted { step, saved });
                }
            }
            pace.start();
        }
        progress.finish();

        let Run {
            config,
            folder,
            trainer,
            ..
        } = self;
        let model = trainer.into_model();
        let dir = folder.dir();
        tune::save_adapter(&model, dir, &adapter_config(config))?;
        verify_adapter(&model, dir)?;
        if let Some(warning) = zero_update(&tune::adapter_tensors(&model)?) {
            eprintln!("warning: {warning}");
        }
        Ok(Summary {
            steps: total,
            loss,
            eval_before,
            eval_after,
            adapter: dir.to_path_buf(),
        })
    }

    /// The evaluation loss. One before the first step can be cut off by `interrupt`; one between steps belongs to its step.
    fn evaluate(
        &mut self,
        progress: &Progress,
        when: &str,
        interrupt: Option<&Interrupt>,
    ) -> Result<Option<f64>> {
        if self.inputs.has_evaluation() {
            let going_on = |_: &Batch| interrupt.is_none_or(|i| !i.requested());
            let loss = self
                .trainer
                .evaluate(self.inputs.evaluation_batches().take_while(going_on));
            if let Some(interrupt) = interrupt {
                interrupt.check(self.trainer.steps())?;
            }
            let loss = loss?;
            progress.note(&format!("evaluation loss {when}: {loss:.4}"));
            return Ok(Some(loss));
        }
        Ok(None)
    }

    fn save(&mut self, step: u64) -> Result<PathBuf> {
        // Checked here and not in each step: what is not finite now makes the next loss NaN, but must not be kept.
        self.trainer.check_finite()?;
        self.state.step = step;
        self.state.loss_scale = self.trainer.loss_scale();
        let (trainer, adapter) = (&self.trainer, adapter_config(self.config));
        self.folder.checkpoints().save(&self.state, |dir| {
            tune::save_adapter(trainer.model(), dir, &adapter)?;
            trainer.optimizer().save(&dir.join(OPTIMIZER))
        })
    }

    fn line(&self, report: &StepReport, tokens_per_second: f64) -> StepLine {
        StepLine {
            step: report.step,
            epoch: report.step as f64 / self.inputs.steps_per_epoch() as f64,
            loss: report.loss,
            learning_rate: report.learning_rate,
            grad_norm: report.grad_norm,
            loss_scale: report.loss_scale,
            tokens_per_second,
        }
    }
}

fn row(pairs: &[(&str, Value)]) -> Map<String, Value> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_string(), value.clone()))
        .collect()
}

/// One line of `metrics.jsonl`, with the names of the Hugging Face Trainer.
fn metrics_row(
    line: &StepLine,
    report: &StepReport,
    tokens: usize,
    eval_loss: Option<f64>,
) -> Map<String, Value> {
    let mut row = row(&[
        ("step", line.step.into()),
        ("epoch", line.epoch.into()),
        ("loss", line.loss.into()),
        ("learning_rate", line.learning_rate.into()),
        ("grad_norm", line.grad_norm.into()),
        ("tokens", tokens.into()),
        ("supervised_tokens", report.supervised.into()),
        ("tokens_per_second", line.tokens_per_second.round().into()),
    ]);
    if let Some(LossScale { scale, overflows, .. }) = report.loss_scale {
        row.insert("loss_scale".into(), scale.into());
        row.insert("overflows".into(), overflows.into());
    }
    if let Some(loss) = eval_loss {
        row.insert("eval_loss".into(), loss.into());
    }
    row
}

/// The PEFT configuration of the run's adapter.
fn adapter_config(config: &RunConfig) -> AdapterConfig {
    let targets = match config.lora_target.as_str() {
        "all" => tune::LoraTarget::ALL
            .iter()
            .map(|t| t.name().to_string())
            .collect(),
        list => list.split(',').map(|t| t.trim().to_string()).collect(),
    };
    AdapterConfig {
        base_model_name_or_path: Some(config.model.display().to_string()),
        r: config.lora_r,
        lora_alpha: config.alpha(),
        lora_dropout: config.lora_dropout,
        target_modules: targets,
        use_rslora: config.rslora,
    }
}

/// Reads the written adapter back and compares it with memory, bit by bit.
fn verify_adapter(model: &Model, dir: &Path) -> Result<()> {
    let (_, mut written) = read_adapter(dir)?;
    for (name, tensor) in tune::adapter_tensors(model)? {
        let same = written
            .remove(&name)
            .is_some_and(|w| w.shape() == tensor.shape() && w.bytes() == tensor.bytes());
        if !same {
            let place = format!("{}: {name}", dir.display());
            let remedy = "the disk does not keep what is written to it: write to another with --output";
            return Err(Error::input(
                place,
                "other values than were written",
                "the adapter in memory",
                remedy,
            ));
        }
    }
    Ok(())
}

/// A warning when some adapter pair changes nothing: its B is zero throughout.
fn zero_update(tensors: &[(String, Tensor)]) -> Option<String> {
    let all = tensors
        .iter()
        .filter(|(name, _)| name.contains(".lora_B."))
        .count();
    let zero: Vec<&str> = tensors
        .iter()
        .filter(|(name, tensor)| name.contains(".lora_B.") && tensor.bytes().iter().all(|&byte| byte == 0))
        .map(|(name, _)| name.as_str())
        .collect();
    let first = zero.first()?;
    Some(format!(
        "the update of {} of {all} adapted layers is zero (first: {first}): the adapter changes nothing there; train longer \
         or with a higher --learning-rate",
        zero.len()
    ))
}

/// Tokens per second over the last steps, the time of saving and evaluating left out.
struct Pace {
    since: Instant,
    seconds: f64,
    tokens: f64,
}

impl Pace {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            seconds: 0.0,
            tokens: 0.0,
        }
    }

    fn start(&mut self) {
        self.since = Instant::now();
    }

    /// Ends a step of `tokens`; older steps fade by a tenth each.
    fn step(&mut self, tokens: usize) -> f64 {
        self.seconds = 0.9 * self.seconds + self.since.elapsed().as_secs_f64();
        self.tokens = 0.9 * self.tokens + tokens as f64;
        self.tokens / self.seconds.max(1e-9)
    }
}
