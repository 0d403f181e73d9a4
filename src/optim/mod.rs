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
//!
//! State lies in pages: on the device, or on the host or on disk, passing through the device ([`StateStorage`]). The bits are the
//! same wherever it lies. What others call a paged optimizer (bitsandbytes) leaves that motion to unified memory; here
//! it is copies that are asked for ahead of time.

mod file;
mod groups;
mod layout;
mod motion;
mod pages;
mod state;
#[cfg(test)]
mod tests;
mod values;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use self::layout::{Layout, Need};
use self::pages::{Pages, Taking};
use self::state::{Format, Rule};
use crate::error::{Error, Result};
use crate::nn::Param;
use crate::tensor::{Device, Shape, Tensor};

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

/// Where the state of an optimizer lies between updates. On the CPU the host is the device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum StatePlace {
    /// Where the parameters are updated.
    #[default]
    Device,
    /// In pages of page-locked host memory that pass through the device's memory.
    Host,
    /// In a scratch file in this folder, mapped, whose pages pass through the device's memory.
    Disk(PathBuf),
}

/// Where the state lies, and what of the device it may use on its way.
///
/// State on the host or on disk is cut into pages. As many as the budget allows stay on the device for good; the others move:
/// each is fetched ahead of its update and written back behind it, beside whatever the device computes. Every step updates
/// every page in the same order, so there is nothing for a cache to learn: what was used last is needed last.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StateStorage {
    /// Where.
    pub place: StatePlace,
    /// Bytes of device memory for state and for values on their way, at most; by default 96 MiB for each kind of state.
    pub vram: Option<u64>,
}

/// Bytes of memory that an optimizer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StateMemory {
    /// Of the device.
    pub device: u64,
    /// Of the host, page-locked where a device copies from and to it.
    pub host: u64,
    /// Of the disk.
    pub disk: u64,
}

/// Bytes that a step copies between host and device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// To the device.
    pub fetched: u64,
    /// From the device.
    pub stored: u64,
}

/// A parameter that trains.
#[derive(Debug)]
struct Trained {
    name: String,
    /// Extents, for files.
    shape: Shape,
    format: Format,
    decayed: bool,
    /// Its learning rate, in units of the base rate.
    rate: f64,
    /// Bytes of its rounded copy, if that waits in host memory.
    waiting: u64,
    /// Has it taken the step that is being taken in parts?
    updated: bool,
}

/// An optimizer over every parameter that trains.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    step: u64,
    trained: Vec<Trained>,
    numbers: BTreeMap<String, usize>,
    pages: Pages,
}

/// What [`Optimizer::step`] and [`Optimizer::update`] are given: a function that visits parameters.
type Visit<'v, 'a> = &'v mut dyn FnMut(&str, &'a mut Param) -> Result<()>;

impl Optimizer {
    /// An optimizer of the parameters that `visit` visits, with all the memory that its steps will need; those that do not
    /// train are passed over:
    ///
    /// ```text
    /// let optimizer = Optimizer::new(config, &storage, |visit| model.try_for_each_param(visit))?;
    /// ```
    ///
    /// A parameter whose value lies on the host while the device computes with a rounded copy (`Param::working`) passes
    /// through the device with its state.
    ///
    /// # Errors
    /// The device, the host or the disk has no room; the budget is too small; two parameters of one name.
    pub fn new(
        config: OptimizerConfig,
        storage: &StateStorage,
        visit: impl FnOnce(&mut dyn FnMut(&str, &Param) -> Result<()>) -> Result<()>,
    ) -> Result<Self> {
        let (mut trained, mut needs, mut numbers) = (Vec::new(), Vec::new(), BTreeMap::new());
        let (mut device, mut pinned_values, mut waiting) = (None, true, None);
        visit(&mut |name, param| {
            if !param.trains() {
                return Ok(());
            }
            let elements = param.value.elements();
            let computes_on = param.operand().beside();
            let master = param.value.device() != computes_on;
            let waits = param.working.as_ref().filter(|w| w.device() != computes_on);
            waiting = waiting.or(waits.map(Tensor::dtype));
            pinned_values &= !master || param.value.is_pinned();
            let format = Format::of(&config, name, elements);
            device.get_or_insert(computes_on);
            needs.push(Need {
                group: group_of(name),
                elements,
                format,
                master,
            });
            if numbers.insert(name.to_string(), trained.len()).is_some() {
                return Err(unexpected(&format!("{name} twice")));
            }
            let raised = is_raised_by_loraplus(name, param.value.shape());
            trained.push(Trained {
                name: name.to_string(),
                shape: param.value.shape(),
                format,
                decayed: is_decayed(name) || !config.exclude_bias_and_norm,
                rate: config.loraplus_lr_ratio.filter(|_| raised).unwrap_or(1.0),
                waiting: waits.map_or(0, |waits| waits.byte_len() as u64),
                updated: false,
            });
            Ok(())
        })?;
        let device = device.unwrap_or(Device::Cpu);
        let layout = match (&storage.place, device) {
            (StatePlace::Device, _) | (_, Device::Cpu) => Layout::resident(&needs),
            (StatePlace::Host | StatePlace::Disk(_), Device::Cuda(_)) => Layout::paged(&needs, storage.vram)?,
        };
        Ok(Self {
            config,
            step: 0,
            trained,
            numbers,
            pages: Pages::new(layout, device, &storage.place, pinned_values, waiting)?,
        })
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

    /// Bytes of state, wherever they lie.
    pub fn state_bytes(&self) -> usize {
        self.pages.bytes()
    }

    /// Bytes of memory for state and its motion.
    pub fn memory(&self) -> StateMemory {
        self.pages.memory()
    }

    /// Bytes that a step moves. Exact for every step but the first of those that are taken in parts, whose order is not
    /// known before.
    pub fn traffic(&self) -> Traffic {
        let traffic = self.pages.traffic();
        Traffic {
            stored: traffic.stored + self.trained.iter().map(|t| t.waiting).sum::<u64>(),
            ..traffic
        }
    }

    /// The number of steps taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Takes one step: `rate` is its learning rate, `clip` the factor of every gradient ([`clip_factor`]).
    ///
    /// `visit` calls the function that it is given with every parameter; those that do not train are passed over:
    ///
    /// ```text
    /// optimizer.step(rate, clip, |visit| model.for_each_param_mut(visit))?;
    /// ```
    ///
    /// # Errors
    /// The parameters are not those of [`Optimizer::new`], or one has no gradient; nothing is updated then.
    pub fn step<'a>(
        &mut self,
        rate: f64,
        clip: f64,
        visit: impl FnOnce(Visit<'_, 'a>) -> Result<()>,
    ) -> Result<()> {
        let rule = Rule::new(&self.config, self.step + 1, clip);
        let mut taking = self.gather(&rule, rate, visit)?;
        let missing = (0..self.len()).find(|&i| taking.get(i).is_none_or(|t| t.number != i));
        if let Some(missing) = missing {
            let name = &self.trained[missing].name;
            return Err(unexpected(&format!("the end before {name}")));
        }
        self.take(&rule, &mut taking)?;
        self.end()
    }

    /// Takes a part of the next step: that of the parameters that `visit` visits. Parts may come in any order; when every
    /// parameter has had its part, [`Optimizer::end`] ends the step. Pages move best when parts are whole layers, in the
    /// order of the step before.
    ///
    /// # Errors
    /// A parameter is not one of [`Optimizer::new`], has taken this step already, or has no gradient; nothing is updated
    /// then.
    pub fn update<'a>(
        &mut self,
        rate: f64,
        clip: f64,
        visit: impl FnOnce(Visit<'_, 'a>) -> Result<()>,
    ) -> Result<()> {
        let rule = Rule::new(&self.config, self.step + 1, clip);
        let mut taking = self.gather(&rule, rate, visit)?;
        self.take(&rule, &mut taking)
    }

    /// Ends a step that was taken in parts.
    ///
    /// # Errors
    /// The parts were not one for each parameter; a copy cannot be asked for.
    pub fn end(&mut self) -> Result<()> {
        let updated = self.trained.iter().filter(|t| t.updated).count();
        self.trained.iter_mut().for_each(|t| t.updated = false);
        self.pages.end()?;
        if updated != self.len() {
            return Err(Error::Shape {
                operation: "Optimizer::end",
                found: format!("{updated} updates"),
                expected: format!("one for each of {} parameters", self.len()),
            });
        }
        self.step += 1;
        Ok(())
    }

    /// The parameters that `visit` visits and that train, sorted by number.
    fn gather<'a>(
        &self,
        rule: &Rule,
        rate: f64,
        visit: impl FnOnce(Visit<'_, 'a>) -> Result<()>,
    ) -> Result<Vec<Taking<'a>>> {
        let mut taking: Vec<Taking<'a>> = Vec::new();
        visit(&mut |name, param| {
            if !param.trains() {
                return Ok(());
            }
            let number = self.numbers.get(name).copied();
            let Some(number) = number.filter(|&number| !self.trained[number].updated && param.grad.is_some())
            else {
                return Err(unexpected(name));
            };
            let t = &self.trained[number];
            let (rate, decay) = rule.rate_and_decay(rate * t.rate, t.decayed);
            taking.push(Taking {
                number,
                param,
                rate,
                decay,
            });
            Ok(())
        })?;
        taking.sort_by_key(|t| t.number);
        if let Some(twice) = taking.windows(2).find(|pair| pair[0].number == pair[1].number) {
            return Err(unexpected(&format!(
                "{} twice",
                self.trained[twice[0].number].name
            )));
        }
        Ok(taking)
    }

    fn take(&mut self, rule: &Rule, taking: &mut [Taking<'_>]) -> Result<()> {
        for t in taking.iter() {
            self.trained[t.number].updated = true;
        }
        self.pages.update(rule, taking)
    }

    /// Writes the state, bit for bit: `step`, and the parts of every parameter's state under PyTorch's and bitsandbytes'
    /// names (`exp_avg.<parameter>`, ...); the kind stands in the file's metadata as `optim`. Where the state lies makes no
    /// difference to the file.
    ///
    /// # Errors
    /// The file cannot be written, or a copy failed.
    pub fn save(&self, path: &Path) -> Result<()> {
        file::save(path, self.config.kind, self.step, &self.trained, &self.pages)
    }

    /// Reads a state that [`Optimizer::save`] wrote for the same kind and the same parameters, wherever it lay.
    ///
    /// # Errors
    /// The file cannot be read, is of another kind, holds other parameters than those of [`Optimizer::new`], or numbers that
    /// no optimizer could have written (not finite, a negative second moment). Nothing is changed then.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        self.step = file::load(path, self.config.kind, &self.trained, &mut self.pages)?;
        Ok(())
    }
}

fn unexpected(found: &str) -> Error {
    Error::Shape {
        operation: "Optimizer::step",
        found: found.to_string(),
        expected: "each parameter of the optimizer once, with its gradient".to_string(),
    }
}
