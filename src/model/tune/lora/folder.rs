//! PEFT folders and the model: what each tensor of a folder belongs to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::vocabulary::{self, Replacement};
use super::{LoraConfig, LoraInit, SavedModule, pissa, saved};
use crate::checkpoint::{AdapterConfig, PEFT_PREFIX as PREFIX, read_adapter, say_once, write_adapter};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::nn::{Dora, Lora, Param};
use crate::tensor::{DType, Device, Shape, Tensor};

/// A folder that is being taken over, tensor by tensor.
pub(super) struct Folder {
    dir: PathBuf,
    config: AdapterConfig,
    saved: Vec<SavedModule>,
    tensors: BTreeMap<String, Tensor>,
    unused: BTreeSet<String>,
}

/// The adapter of one linear, `W += scale B A`, in the type of the file and mapped where that stores it.
#[derive(Debug)]
pub(super) struct Pair {
    /// What B A is multiplied by: `lora_alpha / r` of this linear, or `lora_alpha / sqrt(r)`.
    pub scale: f64,
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
    /// `[out]`, with DoRA.
    pub magnitude: Option<Tensor>,
}

impl Folder {
    /// # Errors
    /// As [`read_adapter`]; a module in `modules_to_save` that cannot train here.
    pub fn read(dir: &Path) -> Result<Self> {
        let (config, tensors) = read_adapter(dir)?;
        let saved = |name: &String| name.strip_prefix("transformer.").unwrap_or(name).parse();
        let saved: Result<Vec<SavedModule>> = config.modules_to_save.iter().map(saved).collect();
        Ok(Self {
            dir: dir.to_path_buf(),
            saved: saved.map_err(|e| Error::input(dir.display(), e, "an adapter for it", "give another"))?,
            unused: tensors.keys().cloned().collect(),
            config,
            tensors,
        })
    }

    /// The modules that trained whole.
    pub fn saved(&self) -> &[SavedModule] {
        &self.saved
    }

    fn wrong(&self, name: &str, found: String, expected: String) -> Error {
        let remedy = "this adapter belongs to another base model: give --model the base it was trained on";
        Error::input(format!("{}: {name}", self.dir.display()), found, expected, remedy)
    }

    /// The adapter of the linear `module` of block `layer`, if it has one.
    ///
    /// # Errors
    /// A tensor is missing, mis-shaped or of a linear that is no target; it is named.
    pub fn take(&mut self, layer: usize, module: &str, (out, input): (usize, usize)) -> Result<Option<Pair>> {
        let whole = format!("transformer.layers.{layer}.{module}");
        let name = |part: &str| format!("{PREFIX}{whole}.{part}");
        let (r, targeted) = (self.config.rank(&whole), self.config.targets(&whole));
        let mut parts = vec![("lora_A.weight", vec![r, input]), ("lora_B.weight", vec![out, r])];
        if self.config.use_dora {
            parts.push(("lora_magnitude_vector", vec![out]));
        }
        let mut taken = Vec::new();
        for (part, extents) in parts {
            let name = name(part);
            let Some(tensor) = self.tensors.get(&name) else {
                if targeted || !taken.is_empty() {
                    return Err(self.wrong(&name, "nothing".into(), "a tensor".into()));
                }
                return Ok(None);
            };
            if !targeted {
                let place = format!("{}: {name}", self.dir.display());
                let targets = self.config.targets_in_words();
                let found = format!("a tensor, and target_modules {targets}");
                let expected = format!(
                    "{} in target_modules",
                    module.rsplit('.').next().unwrap_or(module)
                );
                let remedy =
                    "adapter_config.json and the weights are not of one adapter: copy the whole folder again";
                return Err(Error::input(place, found, expected, remedy));
            }
            if tensor.shape().extents() != extents.as_slice() || !tensor.dtype().is_float() {
                let got = format!("{} {}", tensor.dtype(), tensor.shape());
                return Err(self.wrong(&name, got, format!("floats {extents:?}")));
            }
            taken.push(tensor.clone());
            self.unused.remove(&name);
        }
        let mut taken = taken.into_iter();
        let (Some(a), Some(b)) = (taken.next(), taken.next()) else {
            return Ok(None);
        };
        let magnitude = taken.next();
        let scale = self.config.scale(&whole);
        Ok(Some(Pair {
            scale,
            a,
            b,
            magnitude,
        }))
    }

    /// What takes the place of the base's tensor `name` of `shape`, if the folder saved its module whole.
    ///
    /// # Errors
    /// The tensor is missing or mis-shaped; it is named.
    pub fn take_saved(&mut self, name: &str, shape: Shape) -> Result<Option<Replacement>> {
        if !saved::is_of(&self.saved, name) {
            return Ok(None);
        }
        let name = format!("{PREFIX}{name}");
        let Some(tensor) = self.tensors.get(&name) else {
            return Err(self.wrong(&name, "nothing".into(), "a tensor".into()));
        };
        let Some(replacement) = vocabulary::fit(tensor, shape) else {
            let got = format!("{} {}", tensor.dtype(), tensor.shape());
            return Err(self.wrong(&name, got, format!("floats {shape}")));
        };
        if let Some(line) = replacement.notice() {
            say_once(format!("{}: {name}: {line}", self.dir.display()));
        }
        self.unused.remove(&name);
        Ok(Some(replacement))
    }

    /// Puts the modules that trained whole in their places: to train on, in the type of sums, or frozen. Returns how many
    /// tensors they are.
    ///
    /// # Errors
    /// A tensor is missing or mis-shaped; the device has no room.
    pub fn put_saved(&mut self, model: &mut Model, trainable: bool) -> Result<usize> {
        let (dtype, device) = (model.dtype().accumulator(), model.device());
        let saved = self.saved.clone();
        let mut count = 0;
        saved::for_each(model, &saved, &mut |name, param| {
            let Some(new) = self.take_saved(name, param.value.shape())? else {
                return Ok(());
            };
            let tensor = match new.needs_base() {
                true => new.over(&param.value.to_device(Device::Cpu)?),
                false => new.over(&param.value),
            };
            count += 1;
            // Frozen on a device, a matrix is of the compute type as before.
            let dtype = match device {
                Device::Cuda(_) if !trainable => param.value.dtype(),
                _ => dtype,
            };
            *param = placed(&tensor, dtype, device, trainable)?;
            Ok(())
        })?;
        Ok(count)
    }

    /// When everything has been taken: the configuration.
    ///
    /// # Errors
    /// A tensor is left, or none was of a linear.
    pub fn finish(self, linears: usize) -> Result<AdapterConfig> {
        if let Some(name) = self.unused.first() {
            let expected = "only LoRA tensors of this base's layers";
            return Err(self.wrong(name, "a tensor".into(), expected.into()));
        }
        if linears == 0 {
            return Err(self.wrong("adapter_model", "no LoRA tensor".into(), "at least one".into()));
        }
        Ok(self.config)
    }
}

pub(super) fn placed(tensor: &Tensor, dtype: DType, device: Device, trainable: bool) -> Result<Param> {
    let value = tensor.to_dtype(dtype).into_device(device)?;
    match trainable {
        true => Param::trainable(value),
        false => Ok(Param::frozen(value)),
    }
}

/// Puts the adapter of a PEFT folder into the model, to train on or only to use.
///
/// # Errors
/// The folder is not an adapter of this base: a tensor is unknown, missing or mis-shaped; each is named.
pub fn load_adapter(model: &mut Model, dir: &Path, trainable: bool) -> Result<AdapterConfig> {
    let folder = Folder::read(dir)?;
    put(model, folder, None, trainable)
}

/// With `pissa`, the folder holds the two halves that [`pissa::joined`] joined, and this is the run that made them.
fn put(
    model: &mut Model,
    mut folder: Folder,
    pissa: Option<&LoraConfig>,
    trainable: bool,
) -> Result<AdapterConfig> {
    let (dtype, device) = (model.dtype().accumulator(), model.device());
    let dropout = folder.config.lora_dropout as f32;
    let mut linears = 0;
    for (i, block) in model.blocks.iter_mut().enumerate() {
        for (module, linear) in block.linears_mut() {
            let Some(pair) = folder.take(i, module, linear.extents())? else {
                continue;
            };
            let Pair {
                mut scale,
                a,
                b,
                magnitude,
            } = pair;
            let (a, b, found) = if let Some(own) = pissa {
                scale = own.scale(i, module);
                let (a, b, found) = pissa::parted(&a, &b);
                pissa::leave_rest(linear, &format!("layer {i} {module}"), scale, &found)?;
                (a, b, Some(found))
            } else {
                (a, b, None)
            };
            let dora = magnitude.map(|m| -> Result<_> {
                let there = linear.weight.on(device)?;
                let weight = there.as_ref().unwrap_or(&linear.weight).as_ref();
                Dora::new(weight, placed(&m, dtype, device, trainable)?)
            });
            linear.lora = Some(Lora {
                a: placed(&a, dtype, device, trainable)?,
                b: placed(&b, dtype, device, trainable)?,
                scale,
                dropout,
                dora: dora.transpose()?,
                found,
            });
            linears += 1;
        }
    }
    folder.put_saved(model, trainable)?;
    folder.finish(linears)
}

/// PEFT takes whole names too: `transformer.final_layernorm`.
fn last_parts(names: &[String]) -> impl Iterator<Item = &str> {
    names.iter().map(|name| name.rsplit('.').next().unwrap_or(name))
}

/// Puts back what [`save`] wrote, to the bit, into a freshly loaded base: it trains on as if it had never stopped.
///
/// # Errors
/// As [`load_adapter`]; the folder is of another configuration.
pub(in crate::model::tune) fn restore(model: &mut Model, config: &LoraConfig, dir: &Path) -> Result<()> {
    let folder = Folder::read(dir)?;
    let (want, is) = (config.peft(Path::new("")), &folder.config);
    let same = want.r == is.r
        && want.lora_alpha.to_bits() == is.lora_alpha.to_bits()
        && want.lora_dropout.to_bits() == is.lora_dropout.to_bits()
        && (want.use_rslora, want.use_dora) == (is.use_rslora, is.use_dora)
        && (&want.rank_pattern, &want.alpha_pattern) == (&is.rank_pattern, &is.alpha_pattern)
        && last_parts(&want.modules_to_save).eq(last_parts(&is.modules_to_save));
    if !same {
        let words = |c: &AdapterConfig| {
            let modules = c.modules_to_save.join(", ");
            let patterns = c.rank_pattern.pairs().map(|(key, r)| format!(", r {r} of {key}"));
            let alphas = c
                .alpha_pattern
                .pairs()
                .map(|(key, alpha)| format!(", alpha {alpha} of {key}"));
            let patterns: String = patterns.chain(alphas).collect();
            format!(
                "r {}, alpha {}{patterns}, dropout {}, rsLoRA {}, DoRA {}, modules [{modules}]",
                c.r, c.lora_alpha, c.lora_dropout, c.use_rslora, c.use_dora
            )
        };
        let remedy = "go on with the options that the run began with";
        return Err(Error::input(dir.display(), words(is), words(&want), remedy));
    }
    // From the run's own rank: twice the rank and twice alpha give the same scale only up to rounding.
    let pissa = matches!(config.init, LoraInit::Pissa { .. });
    put(model, folder, pissa.then_some(config), true).map(|_| ())
}

/// Copies of the adapter's tensors on the host by PEFT name, in model order, and of the modules that train beside it. A
/// PiSSA adapter is given as the one of rank 2r for the original base.
///
/// # Errors
/// They cannot be copied from the device.
pub fn adapter_tensors(model: &Model) -> Result<Vec<(String, Tensor)>> {
    let mut tensors = Vec::new();
    model.try_for_each_param(&mut |name, param| {
        if name.contains(".lora_") {
            tensors.push((name.to_string(), param.value.to_device(Device::Cpu)?));
        } else if param.trains() {
            tensors.push((format!("{PREFIX}{name}"), param.value.to_device(Device::Cpu)?));
        }
        Ok(())
    })?;
    let mut found = model
        .linears()
        .filter_map(|linear| linear.lora.as_ref())
        .map(|lora| &lora.found);
    for i in 0..tensors.len() {
        if !tensors[i].0.ends_with(".lora_A.weight") {
            continue;
        }
        // B follows A.
        if let Some(Some(found)) = found.next() {
            let narrow = |tensor: &Tensor| tensor.to_dtype(DType::F32);
            let (a, b) = pissa::joined(&narrow(&tensors[i].1), &narrow(&tensors[i + 1].1), found);
            (tensors[i].1, tensors[i + 1].1) = (a, b);
        }
    }
    Ok(tensors)
}

/// Writes the adapter as a PEFT folder, in F32.
///
/// # Errors
/// The model has no adapter, or the folder cannot be written.
pub fn save_adapter(model: &Model, dir: &Path, config: &AdapterConfig) -> Result<()> {
    let tensors = adapter_tensors(model)?;
    if !tensors.iter().any(|(name, _)| name.contains(".lora_")) {
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

/// Writes the adapter as a PEFT folder for the base `base`.
///
/// # Errors
/// As [`save_adapter`].
pub(in crate::model::tune) fn save(
    model: &Model,
    config: &LoraConfig,
    base: &Path,
    dir: &Path,
) -> Result<()> {
    save_adapter(model, dir, &config.peft(base))
}

impl LoraConfig {
    /// What PEFT is told about an adapter of this configuration on the base `base`: with PiSSA, a plain one of twice the
    /// rank whose scale is the same.
    pub fn peft(&self, base: &Path) -> AdapterConfig {
        // As many ranks, and what alpha becomes.
        let (twice, growth) = match (self.init, self.rslora) {
            (LoraInit::Kaiming, _) => (1, 1.0),
            (LoraInit::Pissa { .. }, false) => (2, 2.0),
            (LoraInit::Pissa { .. }, true) => (2, 2f64.sqrt()),
        };
        AdapterConfig {
            base_model_name_or_path: Some(base.display().to_string()),
            r: twice * self.r,
            lora_alpha: growth * self.alpha,
            lora_dropout: self.dropout,
            target_modules: self.targets.iter().map(|t| t.name().to_string()).collect(),
            layers_to_transform: self.layers.clone(),
            rank_pattern: self.rank_pattern.map(|r| twice * r),
            alpha_pattern: self.alpha_pattern.map(|alpha| growth * alpha),
            use_rslora: self.rslora,
            use_dora: self.dora,
            modules_to_save: self
                .modules_to_save
                .iter()
                .map(|m| m.name().to_string())
                .collect(),
        }
    }
}
