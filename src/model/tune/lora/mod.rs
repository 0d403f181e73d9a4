//! Low-rank adapters: which linears carry them, how they start, how they are read and written.

mod folder;
mod merge;
mod pissa;
mod saved;
mod weight;

use std::fmt;
use std::str::FromStr;

pub use folder::{adapter_tensors, load_adapter, save_adapter};
pub(super) use folder::{restore, save};
pub use merge::Merged;
pub(super) use merge::merge;
pub use saved::SavedModule;

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
            dora: false,
            init: LoraInit::Kaiming,
            modules_to_save: Vec::new(),
        }
    }
}

/// `alpha / r`, or `alpha / sqrt(r)`.
fn lora_scale(alpha: f64, r: usize, rslora: bool) -> f64 {
    if rslora {
        alpha / (r as f64).sqrt()
    } else {
        alpha / r as f64
    }
}

/// Adds new adapters, as PEFT starts them.
///
/// # Errors
/// r is 0 or no target is named; dropout is not in 0..1; there is not enough memory.
pub(super) fn apply(model: &mut Model, config: &LoraConfig, seed: u64) -> Result<()> {
    let LoraConfig {
        r,
        alpha,
        dropout,
        rslora,
        targets,
        ..
    } = config;

    if *r == 0 {
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
    let widths = model
        .blocks
        .iter()
        .flat_map(|block| block.linears())
        .zip(LoraTarget::ALL.into_iter().cycle());
    let adapted = widths.filter(|(_, target)| targets.contains(target));
    let width: usize = adapted
        .map(|((_, linear), _)| linear.extents())
        .map(|(out, input)| out + input)
        .sum();
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
        let bytes = copies * width as u128 * *r as u128;
        check_memory(
            &format!("--lora-r {r}"),
            bytes,
            "give a lower rank; 8 to 64 are usual",
        )?;
    }
    let scale = lora_scale(*alpha, *r, *rslora);
    let mut number = 0;
    for (layer, block) in model.blocks.iter_mut().enumerate() {
        for ((module, linear), target) in block.linears_mut().into_iter().zip(LoraTarget::ALL) {
            number += 1;
            if !targets.contains(&target) {
                continue;
            }
            let (out, input) = linear.extents();
            let stream = Stream::new(seed, number);
            let (a, b, found) = match config.init {
                // A plan asks for sizes only.
                LoraInit::Kaiming if planning() => {
                    let zeros = |extents: [usize; 2]| Tensor::zeros(DType::F32, extents);
                    (zeros([*r, input]), zeros([out, *r]), None)
                }
                LoraInit::Pissa { .. } if planning() => {
                    let zeros = |extents: [usize; 2]| Tensor::zeros(DType::F32, extents);
                    weight::replace(&mut linear.weight, &zeros([out, input]), module)?;
                    let found = (zeros([*r, input]), zeros([out, *r]));
                    (found.0.clone(), found.1.clone(), Some(found))
                }
                LoraInit::Kaiming => {
                    let bound = 1.0 / (input as f32).sqrt();
                    let a: Vec<f32> = (0..(r * input) as u64)
                        .map(|i| (2.0 * stream.uniform(i) - 1.0) * bound)
                        .collect();
                    let b = Tensor::zeros(DType::F32, [out, *r]);
                    (Tensor::from_slice(&a, [*r, input]), b, None)
                }
                LoraInit::Pissa { iterations } => {
                    let place = format!("layer {layer} {module}");
                    let found = pissa::principal(&place, &linear.weight, *r, scale, iterations, stream)?;
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
