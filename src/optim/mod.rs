//! Optimizers as their references define them, and clipping by the global gradient norm.
//!
//! | kind | update | state of an element | reference |
//! |---|---|---|---|
//! | `adamw` | [`crate::ops::adamw`] | 8 bytes | `torch.optim.AdamW` (Loshchilov and Hutter 2019) |
//! | `adamw_8bit` | [`crate::ops::adamw_8bit`] | 2 bytes, and 8 for 256 | `bitsandbytes.optim.AdamW8bit` (Dettmers et al. 2022) |
//! | `sgd` | [`crate::ops::sgd`] | 4 bytes with momentum, else none | `torch.optim.SGD` |
//! | `lion` | [`crate::ops::lion`] | 4 bytes | Chen et al. 2023, arXiv 2302.06675 |
//!
//! Weight decay is decoupled from the gradient, except in `sgd`, where it is the L2 penalty of `torch.optim.SGD`, which is
//! what Hugging Face's `--optim sgd` runs.

mod groups;
mod state;
#[cfg(test)]
mod tests;

use std::path::Path;

use self::state::State;
use crate::error::{Error, Result};
use crate::nn::Param;
use crate::ops::{self, AdamW, Adamw8bitSlot, AdamwSlot, Lion, LionSlot, Sgd, SgdSlot};

pub use groups::{group_of, is_decayed, is_raised_by_loraplus};

/// Which rule turns gradients into updates. Names as Hugging Face's `--optim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// AdamW with moments in f32.
    #[default]
    Adamw,
    /// AdamW with moments in 8 bits, block-wise as bitsandbytes.
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// Stochastic gradient descent, with momentum when it is not 0.
    Sgd,
    /// Lion.
    Lion,
}

impl OptimizerKind {
    /// Every optimizer, in the order of the help text.
    pub const ALL: [OptimizerKind; 4] = [
        OptimizerKind::Adamw,
        OptimizerKind::Adamw8bit,
        OptimizerKind::Sgd,
        OptimizerKind::Lion,
    ];

    /// The name in configurations.
    pub const fn name(self) -> &'static str {
        match self {
            OptimizerKind::Adamw => "adamw",
            OptimizerKind::Adamw8bit => "adamw_8bit",
            OptimizerKind::Sgd => "sgd",
            OptimizerKind::Lion => "lion",
        }
    }
}

/// The numbers of an optimizer that stay the same over a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerConfig {
    /// The rule.
    pub kind: OptimizerKind,
    /// Decay of the first moment; in Lion, the gradient's part in the update is `1 - beta1`.
    pub beta1: f64,
    /// Decay of the second moment; in Lion, of the momentum.
    pub beta2: f64,
    /// AdamW: added to the denominator after bias correction.
    pub epsilon: f64,
    /// SGD: decay of the momentum; 0 is none.
    pub momentum: f64,
    /// Decoupled weight decay, in units of the learning rate; in SGD `weight_decay p` is added to the gradient.
    pub weight_decay: f64,
    /// As the Hugging Face Trainer: biases and LayerNorm parameters are not decayed ([`is_decayed`]).
    pub exclude_bias_and_norm: bool,
    /// LoRA+: the learning rate of LoRA's B is this many times that of A.
    pub loraplus_lr_ratio: Option<f64>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            kind: OptimizerKind::Adamw,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            momentum: 0.0,
            weight_decay: 0.0,
            exclude_bias_and_norm: true,
            loraplus_lr_ratio: None,
        }
    }
}

impl OptimizerConfig {
    /// The defaults of `kind`: for Lion the betas of its paper, 0.9 and 0.99; Hugging Face runs Lion with those of AdamW.
    pub fn of(kind: OptimizerKind) -> Self {
        let beta2 = if kind == OptimizerKind::Lion { 0.99 } else { 0.999 };
        Self {
            kind,
            beta2,
            ..Self::default()
        }
    }
}

/// The factor of the gradients that brings a global norm above `max` down to it: `min(1, max / (norm + 1e-6))`,
/// as `torch.nn.utils.clip_grad_norm_`.
pub fn clip_factor(norm: f64, max: f64) -> f64 {
    (max / (norm + 1e-6)).min(1.0)
}

/// A parameter that trains.
#[derive(Debug)]
struct Trained {
    name: String,
    decayed: bool,
    /// Its learning rate, in units of the base rate.
    rate: f64,
    state: State,
}

/// An optimizer over every parameter with a gradient.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    step: u64,
    trained: Vec<Trained>,
}

impl Optimizer {
    /// An optimizer without parameters.
    pub fn new(config: OptimizerConfig) -> Self {
        Self {
            config,
            step: 0,
            trained: Vec::new(),
        }
    }

    /// Makes room for the state of a parameter; one without a gradient is passed over.
    ///
    /// # Errors
    /// The parameter's device has no room.
    pub fn register(&mut self, name: &str, param: &Param) -> Result<()> {
        if param.grad.is_some() {
            let c = &self.config;
            let raised = is_raised_by_loraplus(name, param.value.shape());
            self.trained.push(Trained {
                name: name.to_string(),
                decayed: is_decayed(name) || !c.exclude_bias_and_norm,
                rate: c.loraplus_lr_ratio.filter(|_| raised).unwrap_or(1.0),
                state: State::new(c, name, &param.value)?,
            });
        }
        Ok(())
    }

    /// The number of parameters that train.
    pub fn len(&self) -> usize {
        self.trained.len()
    }

    /// Does nothing train?
    pub fn is_empty(&self) -> bool {
        self.trained.is_empty()
    }

    /// The numbers that stay the same over a run.
    pub fn config(&self) -> &OptimizerConfig {
        &self.config
    }

    /// Bytes of state, on the device of the parameters.
    pub fn state_bytes(&self) -> usize {
        let parts = self.trained.iter().flat_map(|t| t.state.parts());
        parts.map(|(_, tensor)| tensor.byte_len()).sum()
    }

    /// The number of steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Takes one step: `rate` is its learning rate, `clip` the factor of every gradient ([`clip_factor`]).
    ///
    /// `visit` calls the function that it is given with every parameter, in the order of [`Optimizer::register`]; those
    /// without a gradient are passed over:
    ///
    /// ```text
    /// optimizer.step(rate, clip, |visit| model.for_each_param_mut(visit))?;
    /// ```
    ///
    /// # Errors
    /// The parameters are not those registered, or in another order; nothing is updated then.
    pub fn step<'a>(
        &'a mut self,
        rate: f64,
        clip: f64,
        visit: impl FnOnce(&mut dyn FnMut(&str, &'a mut Param) -> Result<()>) -> Result<()>,
    ) -> Result<()> {
        let c = self.config;
        let correction1 = 1.0 - c.beta1.powf((self.step + 1) as f64);
        let unexpected = |found: &str| Error::Shape {
            operation: "Optimizer::step",
            found: found.to_string(),
            expected: "the parameters in the order they were registered in".to_string(),
        };
        let mut trained = self.trained.iter_mut();
        let mut slots = Slots::default();
        visit(&mut |name, param| {
            let Some(g) = &param.grad else { return Ok(()) };
            let t = trained.next().filter(|t| t.name == name);
            let t = t.ok_or_else(|| unexpected(name))?;
            let (p, rate) = (&mut param.value, rate * t.rate);
            let weight_decay = if t.decayed { c.weight_decay } else { 0.0 };
            let decay = (1.0 - rate * weight_decay) as f32;
            let step_size = (rate / correction1) as f32;
            match &mut t.state {
                State::Adamw { exp_avg, exp_avg_sq } => slots.adamw.push(AdamwSlot {
                    p,
                    g,
                    m: exp_avg,
                    v: exp_avg_sq,
                    decay,
                    step_size,
                }),
                State::Adamw8bit {
                    state1,
                    state2,
                    absmax1,
                    absmax2,
                } => slots.adamw_8bit.push(Adamw8bitSlot {
                    p,
                    g,
                    m: state1,
                    v: state2,
                    m_absmax: absmax1,
                    v_absmax: absmax2,
                    decay,
                    step_size,
                }),
                State::Sgd { momentum_buffer } => slots.sgd.push(SgdSlot {
                    p,
                    g,
                    m: momentum_buffer.as_mut(),
                    rate: rate as f32,
                    weight_decay: weight_decay as f32,
                }),
                State::Lion { exp_avg } => slots.lion.push(LionSlot {
                    p,
                    g,
                    m: exp_avg,
                    rate: rate as f32,
                    decay,
                }),
            }
            Ok(())
        })?;
        if let Some(t) = trained.next() {
            return Err(unexpected(&format!("the end before {}", t.name)));
        }
        slots.update(&c, self.step + 1, clip)?;
        self.step += 1;
        Ok(())
    }

    /// Writes the state, bit for bit: `step`, and the parts of every parameter's state under PyTorch's and bitsandbytes'
    /// names (`exp_avg.<parameter>`, ...); the kind stands in the file's metadata as `optim`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        state::save(path, self.config.kind, self.step, &self.trained)
    }

    /// Reads a state that [`Optimizer::save`] wrote for the same kind and the same parameters.
    ///
    /// # Errors
    /// The file cannot be read, is of another kind, holds other parameters than those registered, or numbers that no
    /// optimizer could have written (not finite, a negative second moment). Nothing is changed then.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        self.step = state::load(path, self.config.kind, &mut self.trained)?;
        Ok(())
    }
}

/// The parameters of a step by the operation that updates them.
#[derive(Default)]
struct Slots<'a> {
    adamw: Vec<AdamwSlot<'a>>,
    adamw_8bit: Vec<Adamw8bitSlot<'a>>,
    sgd: Vec<SgdSlot<'a>>,
    lion: Vec<LionSlot<'a>>,
}

impl Slots<'_> {
    /// Step `t`, counted from 1.
    fn update(&mut self, c: &OptimizerConfig, t: u64, clip: f64) -> Result<()> {
        let clip = clip as f32;
        let adamw = AdamW {
            clip,
            one_minus_beta1: (1.0 - c.beta1) as f32,
            beta2: c.beta2 as f32,
            one_minus_beta2: (1.0 - c.beta2) as f32,
            sqrt_correction2: (1.0 - c.beta2.powf(t as f64)).sqrt() as f32,
            epsilon: c.epsilon as f32,
        };
        let sgd = Sgd {
            clip,
            momentum: c.momentum as f32,
        };
        let lion = Lion {
            clip,
            beta1: c.beta1 as f32,
            one_minus_beta1: (1.0 - c.beta1) as f32,
            beta2: c.beta2 as f32,
            one_minus_beta2: (1.0 - c.beta2) as f32,
        };
        ops::adamw(&mut self.adamw, &adamw)?;
        ops::adamw_8bit(&mut self.adamw_8bit, &adamw)?;
        ops::sgd(&mut self.sgd, &sgd)?;
        ops::lion(&mut self.lion, &lion)
    }
}
