//! Low-rank adapters: which linears carry them, how they start, how they are read and written.

mod alive;
mod folder;
mod merge;
mod merger;
mod pissa;
mod saved;
mod vocabulary;
mod weight;

use std::fmt;
use std::str::FromStr;

pub use folder::{adapter_tensors, load_adapter, save_adapter};
pub(super) use folder::{restore, save};
pub use merge::Merged;
pub(super) use merge::merge;
pub use merger::{Merger, Strength};
pub use saved::SavedModule;

use crate::checkpoint::{AdapterConfig, Patterns};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::nn::{Lora, Param};
use crate::rng::Stream;
use crate::tensor::ledger::planning;
use crate::tensor::{DType, Device, Tensor, check_memory};

/// A linear of each block that can carry an adapter, by PEFT's module name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LoraTarget {
    /// `attention.query_key_value`.
    QueryKeyValue,
    /// `attention.dense`.
    Dense,
    /// `mlp.dense_h_to_4h`.
    DenseHTo4H,
    /// `mlp.dense_4h_to_h`.
    Dense4HToH,
}

impl LoraTarget {
    /// All four, in the order of the forward pass.
    pub const ALL: [LoraTarget; 4] = [
        Self::QueryKeyValue,
        Self::Dense,
        Self::DenseHTo4H,
        Self::Dense4HToH,
    ];

    /// PEFT's name, as in `target_modules`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::QueryKeyValue => "query_key_value",
            Self::Dense => "dense",
            Self::DenseHTo4H => "dense_h_to_4h",
            Self::Dense4HToH => "dense_4h_to_h",
        }
    }
}

impl fmt::Display for LoraTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for LoraTarget {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|t| t.name() == s).ok_or_else(|| {
            Error::input(
                "--lora-target",
                s,
                Self::ALL.map(Self::name).join(", "),
                "name linears of ChatGLM-6B, or `all`",
            )
        })
    }
}

/// How adapters start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoraInit {
    /// A uniform in `±1/sqrt(in)` (Kaiming with a = sqrt 5), B zero: the model starts as its base.
    #[default]
    Kaiming,
    /// PiSSA (Meng et al. 2024): the r largest singular triples of W, `s B A = U S Vᵀ`; the base keeps the residual
    /// `W - s B A`.
    Pissa {
        /// Subspace iterations of the randomised decomposition (PEFT's `pissa_niter_N`; 16 are usual); without, the exact
        /// decomposition (PEFT's `pissa`), which takes minutes for each large linear.
        iterations: Option<usize>,
    },
}

impl FromStr for LoraInit {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let iterations = s.strip_prefix("pissa_niter_").and_then(|n| n.parse().ok());
        match (s, iterations) {
            ("kaiming", _) => Ok(Self::Kaiming),
            ("pissa", _) => Ok(Self::Pissa { iterations: None }),
            (_, Some(1..)) => Ok(Self::Pissa { iterations }),
            _ => Err(Error::input(
                "--lora-init",
                s,
                "kaiming, pissa or pissa_niter_N",
                "pissa_niter_16 is usual for large models",
            )),
        }
    }
}

/// Low-rank adapters (Hu et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// The adapter is scaled by `alpha / r`.
    pub alpha: f64,
    /// Dropout on the adapter's input.
    pub dropout: f64,
    /// Scale by `alpha / sqrt(r)` instead (Kalajdzievski 2023).
    pub rslora: bool,
    /// Which linears.
    pub targets: Vec<LoraTarget>,
    /// Of which blocks; without numbers, of all.
    pub layers: Vec<usize>,
    /// Ranks of single linears, by the ends of their names.
    pub rank_pattern: Patterns<usize>,
    /// Alphas of single linears.
    pub alpha_pattern: Patterns<f64>,
    /// Train magnitudes and directions apart (DoRA, Liu et al. 2024)?
    pub dora: bool,
    /// How adapters start.
    pub init: LoraInit,
    /// Modules that train whole beside the adapters.
    pub modules_to_save: Vec<SavedModule>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 16.0,
            dropout: 0.0,
            rslora: false,
            targets: LoraTarget::ALL.to_vec(),
            layers: Vec::new(),
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            dora: false,
            init: LoraInit::Kaiming,
            modules_to_save: Vec::new(),
        }
    }
}

impl LoraConfig {
    /// The rank of the linear `module` of block `layer`.
    fn rank(&self, layer: usize, module: &str) -> usize {
        self.rank_pattern
            .get(&whole_name(layer, module))
            .unwrap_or(self.r)
    }

    /// What its `B A` is multiplied by.
    fn scale(&self, layer: usize, module: &str) -> f64 {
        let alpha = self
            .alpha_pattern
            .get(&whole_name(layer, module))
            .unwrap_or(self.alpha);
        AdapterConfig::scaling(alpha, self.rank(layer, module), self.rslora)
    }

    /// Does the linear of block `layer` carry an adapter?
    fn adapts(&self, layer: usize, target: LoraTarget) -> bool {
        self.targets.contains(&target) && (self.layers.is_empty() || self.layers.contains(&layer))
    }
}

/// The name of a linear in the base.
fn whole_name(layer: usize, module: &str) -> String {
    format!("transformer.layers.{layer}.{module}")
}

/// Adds new adapters, as PEFT starts them.
///
/// # Errors
/// r is 0 or no target is named; dropout is not in 0..1; there is not enough memory.
pub(super) fn apply(model: &mut Model, config: &LoraConfig, seed: u64) -> Result<()> {
    let LoraConfig {
        r,
        dropout,
        targets,
        layers,
        ..
    } = config;

    if *r == 0 || config.rank_pattern.pairs().any(|(_, r)| r == 0) {
        return Err(Error::input("--lora-r", 0, "at least 1", "give a rank such as 8"));
    }
    if targets.is_empty() {
        return Err(Error::input(
            "--lora-target",
            "nothing",
            "at least one linear",
            "use `all`",
        ));
    }
    let count = model.blocks.len();
    if let Some(layer) = layers.iter().find(|layer| **layer >= count) {
        let expected = format!("layers from 0 to {}", count.saturating_sub(1));
        return Err(Error::input(
            "--lora-layers",
            layer,
            expected,
            "name layers of this model",
        ));
    }
    if !(0.0..1.0).contains(dropout) {
        return Err(Error::input(
            "--lora-dropout",
            dropout,
            "a probability in 0..1",
            "use 0 to 0.1",
        ));
    }
    let dtype = model.dtype().accumulator();
    let device = model.device();
    let mut elements = 0;
    for (layer, block) in model.blocks.iter().enumerate() {
        for ((module, linear), target) in block.linears().into_iter().zip(LoraTarget::ALL) {
            if config.adapts(layer, target) {
                let (out, input) = linear.extents();
                elements += (out + input) as u128 * config.rank(layer, module) as u128;
            }
        }
    }
    // Value, gradient and the two moments of the optimizer.
    let copies = 4 * dtype.size() as u128;
    let whole = saved::elements(model, &config.modules_to_save) as u128;
    // A device refuses on its own.
    if model.device() == Device::Cpu {
        check_memory(
            "modules_to_save",
            copies * whole,
            "train fewer of them: norms are small, word_embeddings and lm_head are large",
        )?;
        let bytes = copies * elements;
        check_memory(
            &format!("--lora-r {r}"),
            bytes,
            "give a lower rank; 8 to 64 are usual",
        )?;
    }
    let mut number = 0;
    for (layer, block) in model.blocks.iter_mut().enumerate() {
        for ((module, linear), target) in block.linears_mut().into_iter().zip(LoraTarget::ALL) {
            number += 1;
            if !config.adapts(layer, target) {
                continue;
            }
            let (r, scale) = (config.rank(layer, module), config.scale(layer, module));
            let (out, input) = linear.extents();
            let stream = Stream::new(seed, number);
            let (a, b, found) = match config.init {
                // A plan asks for sizes only.
                LoraInit::Kaiming if planning() => {
                    let zeros = |extents: [usize; 2]| Tensor::zeros(DType::F32, extents);
                    (zeros([r, input]), zeros([out, r]), None)
                }
                LoraInit::Pissa { .. } if planning() => {
                    let zeros = |extents: [usize; 2]| Tensor::zeros(DType::F32, extents);
                    weight::replace(&mut linear.weight, &zeros([out, input]), module)?;
                    let found = (zeros([r, input]), zeros([out, r]));
                    (found.0.clone(), found.1.clone(), Some(found))
                }
                LoraInit::Kaiming => {
                    let bound = 1.0 / (input as f32).sqrt();
                    let a: Vec<f32> = (0..(r * input) as u64)
                        .map(|i| (2.0 * stream.uniform(i) - 1.0) * bound)
                        .collect();
                    let b = Tensor::zeros(DType::F32, [out, r]);
                    (Tensor::from_slice(&a, [r, input]), b, None)
                }
                LoraInit::Pissa { iterations } => {
                    let place = format!("layer {layer} {module}");
                    let found = pissa::principal(&place, &linear.weight, r, scale, iterations, stream)?;
                    pissa::leave_rest(linear, &place, scale, &found)?;
                    (found.0.clone(), found.1.clone(), Some(found))
                }
            };
            let param = |x: Tensor| Param::trainable(x.to_dtype(dtype).into_device(device)?);
            linear.lora = Some(Lora {
                a: param(a)?,
                b: param(b)?,
                scale,
                dropout: *dropout as f32,
                dora: None,
                found,
            });
            if config.dora {
                linear.start_dora()?;
            }
        }
    }
    saved::train(model, &config.modules_to_save)
}

/// Multiplies the scale of every adapter with `factor`: 0 is the base, 1 the adapter as it was trained. As in PEFT, DoRA's
/// magnitudes and modules that trained whole stay what they are.
///
/// # Errors
/// The model has no adapter, or the factor is not finite.
pub(super) fn scale(model: &mut Model, factor: f64) -> Result<()> {
    if !factor.is_finite() {
        return Err(Error::input(
            "--adapter-scale",
            factor,
            "a finite number",
            "use 0 to 1",
        ));
    }
    let mut found = false;
    for block in &mut model.blocks {
        for (_, linear) in block.linears_mut() {
            if let Some(lora) = &mut linear.lora {
                lora.scale *= factor;
                lora.dora.as_mut().map(crate::nn::Dora::forget);
                found = true;
            }
        }
    }
    if found {
        return Ok(());
    }
    let remedy = "give --adapter, or leave --adapter-scale out";
    Err(Error::input(
        "--adapter-scale",
        "a model without a LoRA adapter",
        "one with it",
        remedy,
    ))
}
