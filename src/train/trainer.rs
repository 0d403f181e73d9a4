//! One optimizer step: micro-batches, clipping, schedule, update; and the evaluation loss.

use std::borrow::Borrow;

use super::LossScale;
use crate::config::LossReduction;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::evaluate::{self, LossMetrics};
use crate::model::{Model, Workspace};
use crate::ops;
use crate::optim::{Optimizer, OptimizerConfig, clip_factor, group_of};
use crate::rng::Stream;
use crate::schedule::Schedule;
use crate::tensor::{DType, Device, Tensor};

/// Keeps the dropout masks apart from everything else that is drawn from the same seed.
const DROPOUT: u64 = 0x6472_6f70_6f75_7400;

/// What decides the numbers of a run, beside the model and the batches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// The optimizer's constants.
    pub optimizer: OptimizerConfig,
    /// The learning rate of every step.
    pub schedule: Schedule,
    /// The global gradient norm is clipped to this; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// How the micro-batches of a step are averaged.
    pub reduction: LossReduction,
    /// Seed of dropout.
    pub seed: u64,
}

/// The numbers of one optimizer step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// The step, counted from 1.
    pub step: u64,
    /// The loss before the update, averaged as [`LossReduction`] says.
    pub loss: f64,
    /// Supervised tokens.
    pub supervised: usize,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The norm's part of each group of parameters ([`group_of`]), in model order.
    pub groups: Vec<(String, f64)>,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// Loss scaling after this step, in fp16.
    pub loss_scale: Option<LossScale>,
    /// Micro-batches that had no supervised token and were passed over.
    pub masked: usize,
}

/// A model with its optimizer. All memory of a step is reserved by [`Trainer::new`].
pub struct Trainer {
    model: Model,
    optimizer: Optimizer,
    workspace: Workspace,
    options: Options,
    loss_scale: Option<LossScale>,
    /// Steps done, those left out included.
    steps: u64,
    groups: Groups,
}

/// The parameters that train, in groups for reporting.
struct Groups {
    names: Vec<String>,
    /// The group of each parameter, in model order.
    of: Vec<usize>,
}

impl Groups {
    fn new(model: &Model) -> Self {
        let (mut names, mut of): (Vec<String>, _) = (Vec::new(), Vec::new());
        model.for_each_param(&mut |name, param| {
            if param.trains() {
                let group = group_of(name);
                let known = names.iter().position(|known| *known == group);
                of.push(known.unwrap_or(names.len()));
                if known.is_none() {
                    names.push(group);
                }
            }
        });
        Self { names, of }
    }
}

/// Loss and gradient norm of a step.
struct Gradients {
    loss: f64,
    norm: f64,
    groups: Vec<f64>,
    masked: usize,
}

impl Trainer {
    /// A trainer for micro-batches of at most `max_size` sequences of `max_len` tokens.
    ///
    /// # Errors
    /// No parameter of the model trains, or the activations cannot be reserved.
    pub fn new(model: Model, options: Options, max_size: usize, max_len: usize) -> Result<Self> {
        let mut optimizer = Optimizer::new(options.optimizer);
        model.try_for_each_param(&mut |name, param| optimizer.register(name, param))?;
        if optimizer.is_empty() {
            return Err(Error::input(
                "model",
                "no parameter that trains",
                "at least one",
                "choose another --lora-target",
            ));
        }
        let workspace = model.workspace(max_size, max_len)?;
        let loss_scale = (model.dtype() == DType::F16).then(LossScale::default);
        Ok(Self {
            steps: 0,
            groups: Groups::new(&model),
            model,
            optimizer,
            workspace,
            options,
            loss_scale,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// The optimizer, to load its state.
    pub fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// Loss scaling, when computing in fp16.
    pub fn loss_scale(&self) -> Option<LossScale> {
        self.loss_scale
    }

    /// Goes on with the loss scaling of a checkpoint.
    pub fn set_loss_scale(&mut self, loss_scale: Option<LossScale>) {
        self.loss_scale = self.loss_scale.and(loss_scale).or(self.loss_scale);
    }

    /// The model alone, when training is over.
    pub fn into_model(self) -> Model {
        self.model
    }

    /// Steps done, those left out included.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Goes on after step `steps` of a checkpoint.
    pub fn set_steps(&mut self, steps: u64) {
        self.steps = steps;
    }

    /// Leaves the next step out: its loss or gradient was no number. Schedule and data go on, the optimizer does not.
    pub fn skip(&mut self) {
        self.steps += 1;
    }

    /// Takes one optimizer step on the mean loss over `micro_batches`.
    ///
    /// Nothing is updated when a loss or gradient is not finite.
    ///
    /// # Errors
    /// A batch is larger than planned; no batch has a supervised token; a loss or a gradient is not finite.
    pub fn step(&mut self, micro_batches: &[Batch]) -> Result<StepReport> {
        let step = self.steps + 1;
        let supervised: usize = micro_batches.iter().map(Batch::supervised).sum();
        if supervised == 0 {
            let remedy = "remove records whose answer is empty or cut off";
            return Err(Error::input(
                format!("step {step}"),
                "no supervised token",
                "at least one",
                remedy,
            ));
        }
        let before = self.loss_scale;
        let gradients = self.finite_gradients(step, supervised, micro_batches);
        let gradients = gradients.inspect_err(|_| {
            // No scale helped: it is not to blame, and the next step begins where this one did.
            self.loss_scale = before.zip(self.loss_scale).map(|(before, now)| LossScale {
                overflows: now.overflows,
                ..before
            });
        })?;
        let clip = match self.options.max_grad_norm {
            0.0 => 1.0,
            max => clip_factor(gradients.norm, max),
        };
        let learning_rate = self.options.schedule.rate(step - 1);
        let scale = self.loss_scale.map_or(1.0, |s| s.scale);
        self.optimizer.step(learning_rate, clip / scale, |visit| {
            self.model.for_each_param_mut(visit)
        })?;
        if let Some(scale) = &mut self.loss_scale {
            scale.advance();
        }
        self.steps = step;
        Ok(StepReport {
            step,
            loss: gradients.loss,
            supervised,
            grad_norm: gradients.norm,
            groups: self.groups.names.iter().cloned().zip(gradients.groups).collect(),
            learning_rate,
            loss_scale: self.loss_scale,
            masked: gradients.masked,
        })
    }

    /// [`Trainer::gradients`], in fp16 with the largest loss scale under which they are finite.
    fn finite_gradients(
        &mut self,
        step: u64,
        supervised: usize,
        micro_batches: &[Batch],
    ) -> Result<Gradients> {
        loop {
            let gradients = self.gradients(step, supervised, micro_batches)?;
            if gradients.norm.is_finite() {
                return Ok(gradients);
            }
            if !self.loss_scale.as_mut().is_some_and(LossScale::shrink) {
                return Err(self.non_finite(step, "the gradient norm", gradients.norm));
            }
        }
    }

    /// Loss and gradient norm of a step; the gradients themselves are multiplied by the loss scale.
    fn gradients(&mut self, step: u64, supervised: usize, micro_batches: &[Batch]) -> Result<Gradients> {
        let loss_scale = self.loss_scale.map_or(1.0, |s| s.scale);
        self.model.zero_gradients()?;
        let masked = micro_batches
            .iter()
            .filter(|batch| batch.supervised() == 0)
            .count();
        let taught = micro_batches.len() - masked;
        let mut loss = 0.0;
        for (i, batch) in micro_batches.iter().enumerate() {
            let tokens = batch.supervised();
            if tokens == 0 {
                continue;
            }
            let scale = match self.options.reduction {
                LossReduction::Token => 1.0 / supervised as f64,
                LossReduction::MicroBatch => 1.0 / (taught as f64 * tokens as f64),
            };
            let dropout = Stream::new(self.options.seed ^ DROPOUT, (step << 16) + i as u64);
            let part =
                self.model
                    .loss_and_gradients(&mut self.workspace, batch, scale * loss_scale, dropout)?;
            if !part.nll_sum.is_finite() {
                return Err(self.non_finite(step, "the loss", part.nll_sum));
            }
            loss += scale * part.nll_sum;
        }
        let squares = self.squared_norms()?;
        let mut groups = vec![0.0; self.groups.names.len()];
        for (&group, square) in self.groups.of.iter().zip(&squares) {
            groups[group] += square;
        }
        Ok(Gradients {
            loss,
            norm: squares.iter().sum::<f64>().sqrt() / loss_scale,
            groups: groups
                .into_iter()
                .map(|square| square.sqrt() / loss_scale)
                .collect(),
            masked,
        })
    }

    /// Loss and token accuracy over `batches`, without dropout.
    ///
    /// # Errors
    /// A batch is larger than planned; the loss is not finite; nothing is supervised.
    pub fn evaluate<B: Borrow<Batch>>(
        &mut self,
        batches: impl IntoIterator<Item = B>,
    ) -> Result<LossMetrics> {
        evaluate::loss(&self.model, &mut self.workspace, batches)
    }

    /// Checks every parameter that trains.
    ///
    /// # Errors
    /// One holds a NaN or an infinity; it is named.
    pub fn check_finite(&self) -> Result<()> {
        let mut bad = None;
        self.model.try_for_each_param(&mut |name, param| {
            if bad.is_none()
                && param.trains()
                && let Some((at, _)) = ops::non_finite(&param.value)?
            {
                let values = param.value.to_device(Device::Cpu)?.to_f64_vec();
                bad = Some((name.to_string(), values[at]));
            }
            Ok(())
        })?;
        match bad {
            None => Ok(()),
            Some((layer, value)) => Err(Error::NonFinite {
                step: self.steps,
                what: "a trained weight",
                value,
                layer,
                remedy: "it was not saved; start a new run with a lower --learning-rate or --weight-decay"
                    .into(),
            }),
        }
    }

    /// `Σ g²` of every parameter that trains, in model order.
    fn squared_norms(&self) -> Result<Vec<f64>> {
        let mut gradients = Vec::new();
        self.model
            .for_each_param(&mut |_, param| gradients.extend(&param.grad));
        ops::sums_of_squares(&gradients)
    }

    /// Names the layer where something stopped being a number: the first with such activations, else the first
    /// parameter with such a gradient.
    fn non_finite(&self, step: u64, what: &'static str, value: f64) -> Error {
        let mut layer = self.model.first_non_finite(&self.workspace);
        if layer.is_none() {
            self.model.for_each_param(&mut |name, param| {
                let bad = |t: &Tensor| !matches!(ops::non_finite(t), Ok(None));
                if layer.is_none() && param.grad.as_ref().is_some_and(bad) {
                    layer = Some(format!("the gradient of {name}"));
                }
            });
        }
        Error::NonFinite {
            step,
            what,
            value,
            layer: layer.unwrap_or_else(|| "the sum over all layers".into()),
            remedy: "that step was left out; start a new run with a lower --learning-rate, or check --model and --data".into(),
        }
    }
}
