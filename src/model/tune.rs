//! Which parameters train: the only place that knows the tuning methods.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::Model;
use crate::checkpoint::{AdapterConfig, read_adapter, write_adapter};
use crate::error::{Error, Result};
use crate::nn::{Lora, Param, Weight};
use crate::rng::Stream;
use crate::tensor::{Compute, DType, Device, Tensor, check_memory};

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

/// A tuning method. QLoRA is [`Tuning::Lora`] on 4-bit weights.
#[derive(Debug, Clone, PartialEq)]
pub enum Tuning {
    /// Low-rank adapters (Hu et al. 2021).
    Lora {
        /// Rank.
        r: usize,
        /// The adapter is scaled by `alpha / r`.
        alpha: f64,
        /// Dropout on the adapter's input.
        dropout: f64,
        /// Scale by `alpha / sqrt(r)` instead (Kalajdzievski 2023).
        rslora: bool,
        /// Which linears.
        targets: Vec<LoraTarget>,
    },
    /// Every parameter.
    Full,
}

/// `alpha / r`, or `alpha / sqrt(r)`.
fn lora_scale(alpha: f64, r: usize, rslora: bool) -> f64 {
    if rslora {
        alpha / (r as f64).sqrt()
    } else {
        alpha / r as f64
    }
}

/// Makes the parameters of `tuning` trainable. New adapters start as PEFT's do: A uniform in `±1/sqrt(in)` (Kaiming with
/// a = sqrt 5), B zero, so that the model starts as its base.
///
/// # Errors
/// r is 0 or no target is named; dropout is not in 0..1; full tuning of 4-bit weights.
pub fn apply(model: &mut Model, tuning: &Tuning, seed: u64) -> Result<()> {
    match tuning {
        Tuning::Lora {
            r,
            alpha,
            dropout,
            rslora,
            targets,
        } => {
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
            let bytes = (4 * dtype.size() * width) as u128 * *r as u128;
            check_memory(
                &format!("--lora-r {r}"),
                bytes,
                "give a lower rank; 8 to 64 are usual",
            )?;
            let mut number = 0;
            for block in &mut model.blocks {
                for ((_, linear), target) in block.linears_mut().into_iter().zip(LoraTarget::ALL) {
                    number += 1;
                    if !targets.contains(&target) {
                        continue;
                    }
                    let (out, input) = linear.extents();
                    let stream = Stream::new(seed, number);
                    let bound = 1.0 / (input as f32).sqrt();
                    let a: Vec<f32> = (0..(r * input) as u64)
                        .map(|i| (2.0 * stream.uniform(i) - 1.0) * bound)
                        .collect();
                    linear.lora = Some(Lora {
                        a: Param::trainable(
                            Tensor::from_slice(&a, [*r, input])
                                .to_dtype(dtype)
                                .into_device(device)?,
                        )?,
                        b: Param::trainable(Tensor::zeros_on(device, dtype, [out, *r])?)?,
                        scale: lora_scale(*alpha, *r, *rslora),
                        dropout: *dropout as f32,
                    });
                }
            }
            Ok(())
        }
        Tuning::Full => {
            let quantized =
                |(_, linear): (&str, &crate::nn::Linear)| matches!(linear.weight, Weight::Quant(_));
            if model.blocks.iter().flat_map(|b| b.linears()).any(quantized) {
                return Err(Error::input(
                    "method full",
                    "weights in 4 bits",
                    "dense weights",
                    "use method qlora",
                ));
            }
            let Compute { device, dtype } = model.compute();
            if dtype != dtype.accumulator() {
                return Err(Error::input(
                    "method full",
                    format!("--dtype {dtype}"),
                    "float32",
                    "use --dtype fp32, or method lora",
                ));
            }
            model.for_each_param_mut(&mut |_, param| {
                // A copy: the frozen value may lie in a mapped file, or be shared.
                let value = match param.value.dtype() == dtype {
                    true => param.value.to_device(device)?,
                    false => param.value.to_dtype(dtype).into_device(device)?,
                };
                *param = Param::trainable(value)?;
                Ok(())
            })
        }
    }
}

/// Gives a model with a tied head an output matrix of its own, a copy of the embedding: the two then train apart. A model
/// whose head is separate already stays as it is.
///
/// # Errors
/// The device has no room.
pub fn untie_head(model: &mut Model) -> Result<()> {
    if model.lm_head.is_none() {
        let value = model.embedding.value.to_device(model.device())?;
        model.lm_head = Some(match model.embedding.trains() {
            true => Param::trainable(value)?,
            false => Param::frozen(value),
        });
    }
    Ok(())
}

/// Puts the adapter of a PEFT folder into the model, to train on or only to use.
///
/// # Errors
/// The folder is not a LoRA adapter of this base: a tensor is unknown, missing or mis-shaped; each is named.
pub fn load_adapter(model: &mut Model, dir: &Path, trainable: bool) -> Result<AdapterConfig> {
    let (config, tensors) = read_adapter(dir)?;
    set_adapter(model, &config, &tensors, dir, trainable)?;
    Ok(config)
}

fn set_adapter(
    model: &mut Model,
    config: &AdapterConfig,
    tensors: &BTreeMap<String, Tensor>,
    dir: &Path,
    trainable: bool,
) -> Result<()> {
    let (dtype, device) = (model.dtype().accumulator(), model.device());
    let mut unused: BTreeSet<&str> = tensors.keys().map(String::as_str).collect();
    let wrong = |name: &str, found: String, expected: String| {
        let remedy = "this adapter belongs to another base model: give --model the base it was trained on";
        Error::input(format!("{}: {name}", dir.display()), found, expected, remedy)
    };
    let mut found = 0;
    for (i, block) in model.blocks.iter_mut().enumerate() {
        for ((module, linear), target) in block.linears_mut().into_iter().zip(LoraTarget::ALL) {
            let name =
                |part: &str| format!("base_model.model.transformer.layers.{i}.{module}.lora_{part}.weight");
            let (name_a, name_b) = (name("A"), name("B"));
            // As PEFT matches: the whole name of the module, or its end after a dot.
            let whole = format!("transformer.layers.{i}.{module}");
            let targeted = config.target_modules.iter().any(|t| {
                whole
                    .strip_suffix(t.as_str())
                    .is_some_and(|before| before.is_empty() || before.ends_with('.'))
            });
            if tensors.contains_key(&name_a) && !targeted {
                let place = format!("{}: {name_a}", dir.display());
                let found = format!(
                    "a tensor, and target_modules {}",
                    config.target_modules.join(", ")
                );
                let expected = format!("{} in target_modules", target.name());
                let remedy =
                    "adapter_config.json and the weights are not of one adapter: copy the whole folder again";
                return Err(Error::input(place, found, expected, remedy));
            }
            let (a, b) = match (tensors.get(&name_a), tensors.get(&name_b)) {
                (Some(a), Some(b)) => (a, b),
                (None, None) if !targeted => continue,
                (None, _) => return Err(wrong(&name_a, "nothing".into(), "a tensor".into())),
                (_, None) => return Err(wrong(&name_b, "nothing".into(), "a tensor".into())),
            };
            let (out, input) = linear.extents();
            let r = a.shape().rows_and_columns().0;
            for (name, tensor, want) in [(&name_a, a, [config.r, input]), (&name_b, b, [out, config.r])] {
                if tensor.shape().extents() != want || !tensor.dtype().is_float() {
                    let got = format!("{} {}", tensor.dtype(), tensor.shape());
                    return Err(wrong(name, got, format!("floats {want:?}")));
                }
                unused.remove(name.as_str());
            }
            let param = |t: &Tensor| {
                let value = t.to_dtype(dtype).into_device(device)?;
                if trainable {
                    Param::trainable(value)
                } else {
                    Ok(Param::frozen(value))
                }
            };
            linear.lora = Some(Lora {
                a: param(a)?,
                b: param(b)?,
                scale: lora_scale(config.lora_alpha, r, config.use_rslora),
                dropout: config.lora_dropout as f32,
            });
            found += 1;
        }
    }
    if let Some(name) = unused.first() {
        return Err(wrong(
            name,
            "a tensor".into(),
            "only LoRA tensors of this base's layers".into(),
        ));
    }
    if found == 0 {
        return Err(wrong(
            "adapter_model",
            "no LoRA tensor".into(),
            "at least one".into(),
        ));
    }
    Ok(())
}

/// Copies of the adapter's tensors on the host by PEFT name, in model order.
///
/// # Errors
/// They cannot be copied from the device.
pub fn adapter_tensors(model: &Model) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::new();
    model.try_for_each_param(&mut |name, param| {
        if name.contains(".lora_") {
            tensors.push((name.to_string(), param.value.to_device(Device::Cpu)?));
        }
        Ok(())
    })?;
    Ok(tensors)
}

/// Writes the adapter as a PEFT folder, in F32.
///
/// # Errors
/// The model has no adapter, or the folder cannot be written.
pub fn save_adapter(model: &Model, dir: &Path, config: &AdapterConfig) -> Result<()> {
    let tensors = adapter_tensors(model)?;
    if tensors.is_empty() {
        return Err(Error::input(
            dir.display(),
            "a model without an adapter",
            "an adapter",
            "train one first",
        ));
    }
    let tensors: Vec<(String, Tensor)> = tensors
        .into_iter()
        .map(|(name, tensor)| (name, tensor.to_dtype(DType::F32)))
        .collect();
    let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    write_adapter(dir, config, &borrowed)
}
