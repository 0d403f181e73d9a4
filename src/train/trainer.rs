//! One optimizer step: micro-batches, clipping, schedule, AdamW; and the evaluation loss.

use std::borrow::Borrow;

use super::LossScale;
use crate::config::LossReduction;
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::model::{Model, Workspace};
use crate::ops;
use crate::optim::{AdamW, AdamWConfig, clip_factor};
use crate::rng::Stream;
use crate::schedule::Schedule;
use crate::tensor::{DType, Device, Tensor};

/// Keeps the dropout masks apart from everything else that is drawn from the same seed.
const DROPOUT: u64 = 0x6472_6f70_6f75_7400;

/// What decides the numbers of a run, beside the model and the batches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// The optimizer's constants.
    pub adamw: AdamWConfig,
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
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The step, counted from 1.
    pub step: u64,
    /// The loss before the update, averaged as [`LossReduction`] says.
    pub loss: f64,
    /// Supervised tokens.
    pub supervised: usize,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// The learning rate of this step.
    pub learning_rate: f64,
    /// Loss scaling after this step, in fp16.
    pub loss_scale: Option<LossScale>,
}

/// A model with its optimizer. All memory of a step is reserved by [`Trainer::new`].
pub struct Trainer {
    model: Model,
    optimizer: AdamW,
    workspace: Workspace,
    options: Options,
    loss_scale: Option<LossScale>,
}

impl Trainer {
    /// A trainer for micro-batches of at most `max_size` sequences of `max_len` tokens.
    ///
    /// # Errors
    /// No parameter of the model trains, or the activations cannot be reserved.
    pub fn new(model: Model, options: Options, max_size: usize, max_len: usize) -> Result<Self> {
        let mut optimizer = AdamW::new(options.adamw);
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
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// The optimizer, to load its state.
    pub fn optimizer_mut(&mut self) -> &mut AdamW {
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

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    /// Takes one optimizer step on the mean loss over `micro_batches`.
    ///
    /// Nothing is updated when a loss or gradient is not finite.
    ///
    /// # Errors
    /// A batch is larger than planned or has no supervised token; a loss or a gradient is not finite.
    pub fn step(&mut self, micro_batches: &[Batch]) -> Result<StepReport> {
        let step = self.optimizer.steps() + 1;
        let supervised: usize = micro_batches.iter().map(Batch::supervised).sum();
        let (loss, grad_norm) = loop {
            let (loss, grad_norm) = self.gradients(step, supervised, micro_batches)?;
            if grad_norm.is_finite() {
                break (loss, grad_norm);
            }
            if !self.loss_scale.as_mut().is_some_and(LossScale::shrink) {
                return Err(self.non_finite(step, "the gradient norm", grad_norm));
            }
        };
        let clip = match self.options.max_grad_norm {
            0.0 => 1.0,
            max => clip_factor(grad_norm, max),
        };
        let learning_rate = self.options.schedule.rate(step - 1);
        let scale = self.loss_scale.map_or(1.0, |s| s.scale);
        self.optimizer.step(learning_rate, clip / scale, |visit| {
            self.model.for_each_param_mut(visit)
        })?;
        if let Some(scale) = &mut self.loss_scale {
            scale.advance();
        }
        Ok(StepReport {
            step,
            loss,
            supervised,
            grad_norm,
            learning_rate,
            loss_scale: self.loss_scale,
        })
    }

    /// Loss and gradient norm of a step; the gradients themselves are multiplied by the loss scale.
    fn gradients(&mut self, step: u64, supervised: usize, micro_batches: &[Batch]) -> Result<(f64, f64)> {
        let loss_scale = self.loss_scale.map_or(1.0, |s| s.scale);
        self.model.zero_gradients()?;
        let mut loss = 0.0;
        for (i, batch) in micro_batches.iter().enumerate() {
            let tokens = batch.supervised();
            if tokens == 0 {
                let place = format!("step {step}, micro-batch {}", i + 1);
                let remedy = "remove records whose answer is empty or cut off";
                return Err(Error::input(place, "no supervised token", "at least one", remedy));
            }
            let scale = match self.options.reduction {
                LossReduction::Token => 1.0 / supervised as f64,
                LossReduction::MicroBatch => 1.0 / (micro_batches.len() as f64 * tokens as f64),
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

        Ok((loss, self.gradient_norm()? / loss_scale))
    }

    /// The mean loss per supervised token over `batches`, without dropout.
    ///
    /// # Errors
    /// A batch is larger than planned; the loss is not finite; nothing is supervised.
    pub fn evaluate<B: Borrow<Batch>>(&mut self, batches: impl IntoIterator<Item = B>) -> Result<f64> {
        let (mut sum, mut tokens) = (0.0, 0);
        for batch in batches {
            let part = self.model.loss(&mut self.workspace, batch.borrow())?;
            if !part.nll_sum.is_finite() {
                return Err(self.non_finite(self.optimizer.steps(), "the evaluation loss", part.nll_sum));
            }
            sum += part.nll_sum;
            tokens += part.tokens;
        }
        if tokens == 0 {
            let remedy = "give --eval-data records with an answer";
            return Err(Error::input(
                "evaluation data",
                "no supervised token",
                "at least one",
                remedy,
            ));
        }
        Ok(sum / tokens as f64)
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
                step: self.steps(),
                what: "a trained weight",
                value,
                layer,
                remedy: "it was not saved; start a new run with a lower --learning-rate or --weight-decay"
                    .into(),
            }),
        }
    }

    fn gradient_norm(&self) -> Result<f64> {
        let mut gradients = Vec::new();
        self.model
            .for_each_param(&mut |_, param| gradients.extend(&param.grad));
        Ok(ops::sum_of_squares_all(&gradients)?.sqrt())
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
            remedy: "nothing was updated; start a new run with a lower --learning-rate, or check --model and --data".into(),
        }
    }
}
