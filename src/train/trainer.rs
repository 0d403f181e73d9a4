//! One optimizer step: micro-batches, clipping, schedule, update; and the evaluation loss.

use std::borrow::Borrow;

use super::LossScale;
use super::in_backward::{InBackward, Pass, Update};
use crate::config::LossReduction;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::evaluate::{self, LossMetrics};
use crate::model::{LayerPolicy, Model, Workspace};
use crate::ops;
use crate::optim::{Optimizer, OptimizerConfig, StateStorage, clip_factor, group_of};
use crate::rng::Stream;
use crate::schedule::Schedule;
use crate::tensor::ledger::account;
use crate::tensor::{DType, Device};

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
    /// Is each layer updated in the backward pass, as soon as its gradients are there? Then a step is one micro-batch, and gradients
    /// of one layer are held at a time.
    pub in_backward: bool,
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
    in_backward: Option<InBackward>,
}

/// The parameters that train, in groups for reporting.
struct Groups {
    /// The name of each parameter, in model order.
    parameters: Vec<String>,
    names: Vec<String>,
    /// The group of each parameter, in model order.
    of: Vec<usize>,
}

impl Groups {
    fn new(model: &Model) -> Self {
        let (mut names, mut of): (Vec<String>, _) = (Vec::new(), Vec::new());
        let mut parameters = Vec::new();
        model.for_each_param(&mut |name, param| {
            if param.trains() {
                let group = group_of(name);
                let known = names.iter().position(|known| *known == group);
                parameters.push(name.to_string());
                of.push(known.unwrap_or(names.len()));
                if known.is_none() {
                    names.push(group);
                }
            }
        });
        Self {
            parameters,
            names,
            of,
        }
    }
}

/// Loss and gradients of a step.
struct Gradients {
    loss: f64,
    /// `Σ g²` of every parameter that trains, in model order.
    squares: Vec<f64>,
    /// What the gradients are multiplied by.
    loss_scale: f64,
    masked: usize,
}

impl Gradients {
    /// Their global L2 norm.
    fn norm(&self) -> f64 {
        self.squares.iter().sum::<f64>().sqrt() / self.loss_scale
    }
}

impl Trainer {
    /// A trainer for micro-batches of at most `max_size` sequences of `max_len` tokens.
    ///
    /// # Errors
    /// No parameter of the model trains, or the activations cannot be reserved.
    pub fn new(model: Model, options: Options, max_size: usize, max_len: usize) -> Result<Self> {
        Self::with_policies(model, options, max_size, max_len, &[])
    }

    /// [`Trainer::new`], with what each layer keeps ([`Model::workspace_with`]).
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn with_policies(
        model: Model,
        options: Options,
        max_size: usize,
        max_len: usize,
        policies: &[LayerPolicy],
    ) -> Result<Self> {
        Self::with_memory(
            model,
            options,
            max_size,
            max_len,
            policies,
            &StateStorage::default(),
        )
    }

    /// [`Trainer::with_policies`], with the place of the optimizer's state.
    ///
    /// # Errors
    /// As [`Trainer::new`]; what holds the state has no room.
    pub fn with_memory(
        mut model: Model,
        options: Options,
        max_size: usize,
        max_len: usize,
        policies: &[LayerPolicy],
        state: &StateStorage,
    ) -> Result<Self> {
        let optimizer = account("optimizer", || {
            Optimizer::new(options.optimizer, state, |visit| model.try_for_each_param(visit))
        })?;
        if optimizer.is_empty() {
            return Err(Error::input(
                "model",
                "no parameter that trains",
                "at least one",
                "choose another --lora-target",
            ));
        }
        let in_backward = match options.in_backward {
            true => Some(InBackward::new(&mut model)?),
            false => None,
        };
        let workspace = model.workspace_with(max_size, max_len, policies)?;
        let loss_scale = (model.dtype() == DType::F16).then(LossScale::default);
        Ok(Self {
            steps: 0,
            groups: Groups::new(&model),
            model,
            optimizer,
            workspace,
            options,
            loss_scale,
            in_backward,
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

    /// Bytes of the gradient buffers that layers share.
    pub fn lent_bytes(&self) -> usize {
        self.in_backward.as_ref().map_or(0, InBackward::bytes)
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
    /// Nothing is updated when a loss or gradient is not finite; but a step in one backward pass, which without clipping and
    /// loss scale is all that [`Options::in_backward`] takes, may have updated some layers when it meets such a gradient in
    /// another. It then says so, and neither goes on nor calls the model finite.
    ///
    /// # Errors
    /// A batch is larger than planned; no batch has a supervised token; a loss or a gradient is not finite; there are
    /// several micro-batches with [`Options::in_backward`].
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
        if let Some(in_backward) = &self.in_backward {
            in_backward.check(micro_batches.len())?;
        }
        let before = self.loss_scale;
        let learning_rate = self.options.schedule.rate(step - 1);
        let gradients = match self.in_backward.take() {
            None => self.step_after_backward(step, supervised, learning_rate, micro_batches),
            Some(mut in_backward) => {
                let gradients =
                    self.step_in_backward(&mut in_backward, step, learning_rate, &micro_batches[0]);
                self.in_backward = Some(in_backward);
                gradients
            }
        };
        let gradients = gradients.inspect_err(|_| {
            // No scale helped: it is not to blame, and the next step begins where this one did.
            self.loss_scale = before.zip(self.loss_scale).map(|(before, now)| LossScale {
                overflows: now.overflows,
                ..before
            });
        })?;
        if let Some(scale) = &mut self.loss_scale {
            scale.advance();
        }
        self.steps = step;
        let mut groups = vec![0.0; self.groups.names.len()];
        for (&group, square) in self.groups.of.iter().zip(&gradients.squares) {
            groups[group] += square;
        }
        let groups = groups
            .into_iter()
            .map(|square| square.sqrt() / gradients.loss_scale);
        Ok(StepReport {
            step,
            loss: gradients.loss,
            supervised,
            grad_norm: gradients.norm(),
            groups: self.groups.names.iter().cloned().zip(groups).collect(),
            learning_rate,
            loss_scale: self.loss_scale,
            masked: gradients.masked,
        })
    }

    /// Runs forward and backward passes of a batch as a step does, and updates nothing: whatever a driver reserves when something
    /// is used first, it reserves now. A loss or gradient that is no number is left to the steps to tell.
    ///
    /// # Errors
    /// The device has no room, or fails.
    pub fn rehearse(&mut self, batch: &Batch) -> Result<()> {
        if batch.supervised() == 0 {
            return Ok(());
        }
        let rehearsed = match self.in_backward.take() {
            None => self
                .gradients(0, batch.supervised(), std::slice::from_ref(batch))
                .map(|_| ()),
            Some(mut in_backward) => {
                let done = self.rehearse_in_backward(&mut in_backward, batch);
                self.in_backward = Some(in_backward);
                done
            }
        };
        match rehearsed {
            Err(Error::NonFinite { .. }) => Ok(()),
            other => other,
        }
    }

    fn rehearse_in_backward(&mut self, in_backward: &mut InBackward, batch: &Batch) -> Result<()> {
        let dropout = Stream::new(self.options.seed ^ DROPOUT, 0);
        self.model.loss_to_learn(&mut self.workspace, batch, dropout)?;
        let mut squares = vec![0.0; self.groups.parameters.len()];
        let pass = Pass {
            step: 0,
            scale: 1.0 / batch.supervised() as f64,
            dropout,
            squares: Some(&mut squares),
            update: None,
        };
        in_backward.run(&mut self.model, &mut self.workspace, pass)
    }

    /// All gradients, then the update.
    fn step_after_backward(
        &mut self,
        step: u64,
        supervised: usize,
        learning_rate: f64,
        micro_batches: &[Batch],
    ) -> Result<Gradients> {
        let gradients = self.finite(step, |trainer| trainer.gradients(step, supervised, micro_batches))?;
        let clip = self.clip(&gradients);
        self.optimizer
            .step(learning_rate, clip, |visit| self.model.for_each_param_mut(visit))?;
        Ok(gradients)
    }

    /// Each layer's update as soon as its gradients are there; when the gradients may have to be clipped or a loss scale changed, in
    /// a second backward pass.
    fn step_in_backward(
        &mut self,
        in_backward: &mut InBackward,
        step: u64,
        learning_rate: f64,
        batch: &Batch,
    ) -> Result<Gradients> {
        let dropout = Stream::new(self.options.seed ^ DROPOUT, step << 16);
        let loss = self.model.loss_to_learn(&mut self.workspace, batch, dropout)?;
        if !loss.nll_sum.is_finite() {
            return Err(self.non_finite(step, "the loss", loss.nll_sum, &[]));
        }
        let scale = 1.0 / batch.supervised() as f64;
        let pass = |scale| Pass {
            step,
            scale,
            dropout,
            squares: None,
            update: None,
        };
        let parameters = self.groups.parameters.len();
        let none = |loss_scale| Gradients {
            loss: scale * loss.nll_sum,
            squares: vec![0.0; parameters],
            loss_scale,
            masked: 0,
        };
        if self.options.max_grad_norm == 0.0 && self.loss_scale.is_none() {
            let mut gradients = none(1.0);
            let pass = Pass {
                squares: Some(&mut gradients.squares),
                update: Some(Update {
                    optimizer: &mut self.optimizer,
                    rate: learning_rate,
                    clip: 1.0,
                }),
                ..pass(scale)
            };
            let result = in_backward.run(&mut self.model, &mut self.workspace, pass);
            return match result {
                Ok(()) => Ok(gradients),
                Err(Error::NonFinite { what, .. }) => {
                    Err(self.non_finite(step, what, gradients.norm(), &gradients.squares))
                }
                Err(error) => Err(error),
            };
        }
        let gradients = self.finite(step, |trainer| {
            let loss_scale = trainer.loss_scale.map_or(1.0, |s| s.scale);
            let mut gradients = none(loss_scale);
            let pass = Pass {
                squares: Some(&mut gradients.squares),
                ..pass(scale * loss_scale)
            };
            in_backward.run(&mut trainer.model, &mut trainer.workspace, pass)?;
            Ok(gradients)
        })?;
        let pass = Pass {
            update: Some(Update {
                clip: self.clip(&gradients),
                optimizer: &mut self.optimizer,
                rate: learning_rate,
            }),
            ..pass(scale * gradients.loss_scale)
        };
        in_backward.run(&mut self.model, &mut self.workspace, pass)?;
        Ok(gradients)
    }

    /// The factor of the gradients on their way into the update: clipping, and what undoes the loss scale.
    fn clip(&self, gradients: &Gradients) -> f64 {
        let clip = match self.options.max_grad_norm {
            0.0 => 1.0,
            max => clip_factor(gradients.norm(), max),
        };
        clip / gradients.loss_scale
    }

    /// What `gradients` finds, in fp16 with the largest loss scale under which it is finite.
    fn finite(
        &mut self,
        step: u64,
        mut gradients: impl FnMut(&mut Self) -> Result<Gradients>,
    ) -> Result<Gradients> {
        loop {
            let gradients = gradients(self)?;
            let norm = gradients.norm();
            if norm.is_finite() {
                return Ok(gradients);
            }
            if !self.loss_scale.as_mut().is_some_and(LossScale::shrink) {
                return Err(self.non_finite(step, "the gradient norm", norm, &gradients.squares));
            }
        }
    }

    /// Loss and gradients of a step; these are multiplied by the loss scale.
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
                return Err(self.non_finite(step, "the loss", part.nll_sum, &[]));
            }
            loss += scale * part.nll_sum;
        }
        Ok(Gradients {
            loss,
            squares: self.squares()?,
            loss_scale,
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
    /// One holds a NaN or an infinity; it is named. The last step in the backward pass was broken off.
    pub fn check_finite(&self) -> Result<()> {
        if let Some(in_backward) = &self.in_backward {
            in_backward.check_whole()?;
        }
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
    fn squares(&self) -> Result<Vec<f64>> {
        let mut gradients = Vec::new();
        self.model
            .for_each_param(&mut |_, param| gradients.extend(&param.grad));
        ops::sums_of_squares(&gradients)
    }

    /// Names the layer where something stopped being a number: the first with such activations, else the first
    /// parameter with such a gradient by `squares`, its sum of squares.
    fn non_finite(&mut self, step: u64, what: &'static str, value: f64, squares: &[f64]) -> Error {
        let layer = self.model.first_non_finite(&mut self.workspace).or_else(|| {
            let bad = squares.iter().position(|square| !square.is_finite())?;
            Some(format!("the gradient of {}", self.groups.parameters[bad]))
        });
        Error::NonFinite {
            step,
            what,
            value,
            layer: layer.unwrap_or_else(|| "the sum over all layers".into()),
            remedy: "that step was left out; start a new run with a lower --learning-rate, or check --model and --data".into(),
        }
    }
}
