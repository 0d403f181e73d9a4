//! The loop over the steps of a run: report, evaluate, save, stop when asked to or when nothing gets better.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::{Map, Value};

use super::evaluation::{Evaluated, Evaluation};
use super::journal::{Journal, Spent};
use super::result;
use super::run::Summary;
use super::{
    Inputs, Interrupt, LossScale, OPTIMIZER, Progress, RunFolder, RunState, StepLine, StepReport, Trainer,
};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::model::{LayerPolicy, Model, tune};

/// A run, ready for its next step.
pub(super) struct Run<'a> {
    pub config: &'a RunConfig,
    pub tuning: tune::Tuning,
    pub inputs: Inputs,
    pub folder: &'a RunFolder,
    pub state: RunState,
    pub trainer: Trainer,
    pub evaluation: Evaluation,
    pub journal: &'a mut Journal,
    /// What layers keep.
    pub layers: &'a [LayerPolicy],
    /// The base again, as it was before anything was made trainable.
    pub reload: &'a dyn Fn() -> Result<Model>,
}

/// What one evaluation came to.
struct Measured {
    evaluated: Evaluated,
    /// Is it the best so far?
    best: bool,
}

impl Run<'_> {
    /// Takes the remaining steps and writes the result.
    pub fn finish(mut self, interrupt: &Interrupt) -> Result<Summary> {
        let first = self.trainer.steps();
        let total = self.state.total_steps;
        let mut progress = Progress::new(first, total);
        if first >= total {
            progress.note(&format!("all {total} steps are done: writing the result again"));
        }
        let eval_before = self.evaluate_before(&progress, interrupt)?;
        let patience = self.config.early_stopping_patience;
        let known = |row: &Map<String, Value>| row.get("eval_loss").and_then(Value::as_f64);
        let (mut loss, mut eval_after) = (None, known(&self.state.eval_after).or(eval_before));
        let mut pace = Pace::new();
        let mut step = first;
        while step < total && !self.state.best.is_stale(patience) {
            step += 1;
            let (batches, tokens) = self.inputs.step(step - 1);
            pace.start();
            let report = self.step(&batches, &progress)?;
            self.journal.spent(Spent::Training);
            self.state.tokens += tokens as u64;
            let mut row = Map::new();
            if let Some(report) = &report {
                loss = Some(report.loss);
                let line = self.line(report, pace.step(tokens));
                progress.step(&line);
                row = metrics_row(&line, report, tokens);
                for text in self.state.watch.step(report) {
                    progress.note(&format!("warning: {text}"));
                }
            } else {
                row.insert("step".into(), step.into());
                row.insert("skipped".into(), self.state.skipped.into());
            }

            let (mut best, mut evaluated) = (false, false);
            if step == total || self.evaluates_after(step) {
                let measured = self.evaluate(&progress, step)?;
                eval_after = measured.evaluated.loss.map(|l| l.loss).or(eval_after);
                best = measured.best;
                let numbers = measured.evaluated.row();
                evaluated = !numbers.is_empty();
                row.extend(numbers);
            }
            if report.is_none()
                || evaluated
                || step.is_multiple_of(self.config.logging_steps)
                || step == total
            {
                self.journal.row(step, &row)?;
            }
            let stale = self.state.best.is_stale(patience);
            if stale && step < total {
                progress.note(&format!(
                    "stopping early after step {step}: {} evaluations without a better {}",
                    patience.unwrap_or_default(),
                    self.config.metric_for_best_model.name()
                ));
            }
            let stop = interrupt.requested() && step < total && !stale;
            let keep = best && self.config.keeps_best();
            if stop || stale || keep || step.is_multiple_of(self.config.save_steps) || step == total {
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
        }
        progress.finish();
        if step > 0 && self.state.skipped == step {
            let output = self.config.output.display();
            let found = format!("{step} steps of {step} whose loss or gradient was no number");
            let remedy = "nothing was learnt: lower --learning-rate, or check --model and --data";
            return Err(Error::input(output, found, "a step that can be taken", remedy));
        }
        self.write_result(step, loss, eval_before, eval_after)
    }

    /// One step; `None` when its loss or gradient was no number and it was left out.
    fn step(
        &mut self,
        batches: &[crate::data::batch::Batch],
        progress: &Progress,
    ) -> Result<Option<StepReport>> {
        match self.trainer.step(batches) {
            Ok(report) => {
                self.state.bad_in_a_row = 0;
                Ok(Some(report))
            }
            Err(error @ Error::NonFinite { .. }) => {
                self.state.bad_in_a_row += 1;
                if self.state.bad_in_a_row >= self.config.max_bad_steps {
                    return Err(self.give_up(error));
                }
                self.trainer.skip();
                self.state.skipped += 1;
                let step = self.trainer.steps();
                if let Some(text) = self.state.watch.warn(step, error.to_string()) {
                    progress.note(&format!("warning: {text}"));
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// The error of the last bad step, and where the last good checkpoint is.
    fn give_up(&self, error: Error) -> Error {
        let Error::NonFinite {
            step,
            what,
            value,
            layer,
            ..
        } = error
        else {
            return error;
        };
        let kept = self
            .folder
            .checkpoints()
            .list()
            .ok()
            .and_then(|mut all| all.pop());
        let kept = kept.map_or("no checkpoint was saved before".to_string(), |(_, place)| {
            format!("the last good checkpoint is {}", place.display())
        });
        let n = self.state.bad_in_a_row;
        let remedy = format!(
            "{n} such steps in a row, and nothing was updated by them; {kept}; start a new run with a lower --learning-rate, or \
             check --model and --data"
        );
        Error::NonFinite {
            step,
            what,
            value,
            layer,
            remedy,
        }
    }

    /// Is there an evaluation after `step`, beside the one after the last?
    fn evaluates_after(&self, step: u64) -> bool {
        if let Some(every) = self.config.eval_steps {
            return step.is_multiple_of(every);
        }
        let Some(epochs) = self.config.eval_epochs else {
            return false;
        };
        let period = epochs * self.inputs.steps_per_epoch() as f64;
        // A product such as 0.07 * 100 lies a little beside the whole number that is meant.
        let passed = |step: u64| (step as f64 / period + 1e-9).floor();
        passed(step) > passed(step - 1)
    }

    /// The evaluation before the first step, which `interrupt` may cut off; a resumed run remembers it.
    fn evaluate_before(&mut self, progress: &Progress, interrupt: &Interrupt) -> Result<Option<f64>> {
        if self.trainer.steps() > 0 {
            return Ok(self.state.eval_before.get("eval_loss").and_then(Value::as_f64));
        }
        if self.evaluation.is_empty(&self.inputs) {
            return Ok(None);
        }
        let going_on = || !interrupt.requested();
        let evaluated = self.evaluation.run(&mut self.trainer, &self.inputs, &going_on);
        interrupt.check(0)?;
        let evaluated = evaluated?;
        progress.note(&format!("evaluation before training: {}", evaluated.text()));
        let mut row = Map::from_iter([("step".to_string(), Value::from(0))]);
        row.extend(evaluated.row());
        self.journal.row(0, &row)?;
        self.state.eval_before = evaluated.row();
        for sample in evaluated.samples(0) {
            self.journal.sample(&sample)?;
        }
        self.journal.spent(Spent::Evaluating);
        self.note(0);
        self.journal.write()?;
        Ok(evaluated.loss.map(|l| l.loss))
    }

    /// The evaluation after `step`, which belongs to it.
    fn evaluate(&mut self, progress: &Progress, step: u64) -> Result<Measured> {
        if self.evaluation.is_empty(&self.inputs) {
            return Ok(Measured {
                evaluated: Evaluated::default(),
                best: false,
            });
        }
        let evaluated = self.evaluation.run(&mut self.trainer, &self.inputs, &|| true)?;
        let metric = self.config.metric_for_best_model;
        let mut best = false;
        if let Some(value) = evaluated.metric(metric) {
            let threshold = self.config.early_stopping_threshold;
            best = self.state.best.update(step, value, threshold, evaluated.row());
        }
        let mark = if best && self.config.keeps_best() {
            " (best)"
        } else {
            ""
        };
        progress.note(&format!(
            "evaluation after step {step}: {}{mark}",
            evaluated.text()
        ));
        for sample in evaluated.samples(step) {
            self.journal.sample(&sample)?;
        }
        self.state.eval_after = evaluated.row();
        self.journal.spent(Spent::Evaluating);
        Ok(Measured { evaluated, best })
    }

    fn save(&mut self, step: u64) -> Result<PathBuf> {
        // Checked here and not in each step: what is not finite now makes the next loss NaN, but must not be kept.
        self.trainer.check_finite()?;
        self.state.step = step;
        self.state.loss_scale = self.trainer.loss_scale();
        let (trainer, tuning, base) = (&self.trainer, &self.tuning, &self.config.model);
        let place = self.folder.checkpoints().save(&self.state, |dir| {
            tune::save(trainer.model(), tuning, base, dir)?;
            trainer.optimizer().save(&dir.join(OPTIMIZER))
        })?;
        self.note(step);
        self.journal.write()?;
        Ok(place)
    }

    /// Tells the journal how far the run has come.
    fn note(&mut self, step: u64) {
        let kept = self.state.best.step();
        let kept = kept.and_then(|step| self.folder.checkpoints().of_step(step));
        self.journal.note(&self.state, step, kept);
    }

    /// Writes the adapter or model: that of the last step, or of the best evaluation where asked for.
    fn write_result(
        mut self,
        last: u64,
        loss: Option<f64>,
        eval_before: Option<f64>,
        mut eval_after: Option<f64>,
    ) -> Result<Summary> {
        let best = self
            .state
            .best
            .step()
            .filter(|&step| self.config.keeps_best() && step != last);
        let mut watch = std::mem::take(&mut self.state.watch);
        let model = match best {
            None => self.trainer.into_model(),
            Some(step) => {
                // The trained model goes first: two do not fit.
                drop(self.trainer);
                let place = self.folder.checkpoints().of_step(step).ok_or_else(|| {
                    let place = self.folder.dir().join("checkpoints");
                    let remedy =
                        "it was removed while the run went on: --resume takes the last step as the result";
                    Error::input(
                        place.display(),
                        "no step that was best",
                        format!("step {step}"),
                        remedy,
                    )
                })?;
                self.state.eval_after = self.state.best.row().clone();
                let mut model = (self.reload)()?;
                tune::restore(&mut model, &self.tuning, &place)?;
                eval_after = result::loss(&model, &self.inputs, self.layers)?.or(eval_after);
                eprintln!(
                    "the result is the best checkpoint, {}{}",
                    place.display(),
                    eval_after.map_or(String::new(), |loss| format!(" (evaluation loss {loss:.4})"))
                );
                model
            }
        };
        let dir = self.folder.dir();
        result::write(&model, &self.tuning, self.config, dir)?;
        if let Some(text) = result::zero_update(&model)?.and_then(|text| watch.warn(last, text)) {
            eprintln!("warning: {text}");
        }
        self.state.watch = watch;
        let kept = self
            .state
            .best
            .step()
            .and_then(|step| self.folder.checkpoints().of_step(step));
        self.journal.note(&self.state, last, kept);
        Ok(Summary {
            steps: last,
            loss,
            eval_before,
            eval_after,
            best: best.or(self.state.best.step().filter(|_| self.config.keeps_best())),
            output: dir.to_path_buf(),
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

/// One line of `metrics.jsonl`, with the names of the Hugging Face Trainer.
fn metrics_row(line: &StepLine, report: &StepReport, tokens: usize) -> Map<String, Value> {
    let pairs: [(&str, Value); 8] = [
        ("step", line.step.into()),
        ("epoch", line.epoch.into()),
        ("loss", line.loss.into()),
        ("learning_rate", line.learning_rate.into()),
        ("grad_norm", line.grad_norm.into()),
        ("tokens", tokens.into()),
        ("supervised_tokens", report.supervised.into()),
        ("tokens_per_second", line.tokens_per_second.round().into()),
    ];
    let mut row: Map<String, Value> = pairs
        .map(|(key, value)| (key.to_string(), value))
        .into_iter()
        .collect();
    for (group, norm) in &report.groups {
        row.insert(format!("grad_norm/{group}"), (*norm).into());
    }
    if let Some(LossScale { scale, overflows, .. }) = report.loss_scale {
        row.insert("loss_scale".into(), scale.into());
        row.insert("overflows".into(), overflows.into());
    }
    row
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
