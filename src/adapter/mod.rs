//! What adapters are and what becomes of them: norms, differences, sums, lower ranks.
//!
//! An adapter is a sum of factored updates `s B A` to linears. Everything here works on the factors: with thin QR decompositions
//! `B = Q R` and `Aᵀ = P S`, the product `B A = Q (R Sᵀ) Pᵀ` has the norms and singular values of the core `R Sᵀ`, which is
//! no larger than the rank: O((out + in) r²) in f64, where the product would take O(out · in · r).

mod algebra;
mod measure;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

pub use algebra::{Rank, Resized, add, resize, scale, total_error};
pub use measure::{Difference, Norms, difference, distance, dora_change, norm, norms, root_of_squares};

use crate::checkpoint::{
    AdapterConfig, PEFT_PREFIX, Patterns, read_adapter, write_adapter, write_adapter_twice,
};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// The adapter of one linear: `W += scale B A`.
#[derive(Debug, Clone)]
pub struct Update {
    /// What B A is multiplied by.
    pub scale: f64,
    /// `[r, in]`, F32.
    pub a: Tensor,
    /// `[out, r]`, F32.
    pub b: Tensor,
    /// `[out]`, F32, with DoRA.
    pub magnitude: Option<Tensor>,
}

impl Update {
    /// r.
    pub fn rank(&self) -> usize {
        self.a.extent(0)
    }

    /// Rows and columns of the weight.
    pub fn extents(&self) -> (usize, usize) {
        (self.b.extent(0), self.a.extent(1))
    }
}

/// An adapter, apart from any base.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Where it was read from.
    pub dir: PathBuf,
    /// As it was read; ranks and alphas are those of `updates`.
    pub config: AdapterConfig,
    /// By the linear's name in the base.
    pub updates: BTreeMap<String, Update>,
    /// Tensors of modules that trained whole, by their names in the base.
    pub saved: BTreeMap<String, Tensor>,
}

impl Adapter {
    /// Reads a PEFT folder.
    ///
    /// # Errors
    /// As [`read_adapter`]; tensors of linears that are not in `target_modules`.
    pub fn read(dir: &Path) -> Result<Self> {
        let (config, tensors) = read_adapter(dir)?;
        let (mut updates, mut saved) = (BTreeMap::new(), BTreeMap::new());
        let narrow = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        for (name, a) in &tensors {
            if let Some(stem) = name.strip_suffix(".lora_A.weight") {
                let module = stem.strip_prefix(PEFT_PREFIX).unwrap_or(stem);
                let part = |part: &str| tensors.get(&format!("{stem}.{part}"));
                let Some(b) = part("lora_B.weight") else { continue };
                if !config.targets(module) {
                    let place = format!("{}: {}", dir.display(), name.escape_debug());
                    let found = format!("a tensor, and target_modules {}", config.targets_in_words());
                    let remedy = "adapter_config.json and the weights are not of one adapter: copy the whole folder again";
                    return Err(Error::input(place, found, "a linear in target_modules", remedy));
                }
                let update = Update {
                    scale: config.scale(module),
                    a: narrow(a),
                    b: narrow(b),
                    magnitude: part("lora_magnitude_vector").map(narrow),
                };
                updates.insert(module.to_string(), update);
            } else if !name.contains(".lora_") {
                let name = name.strip_prefix(PEFT_PREFIX).unwrap_or(name);
                saved.insert(name.to_string(), a.clone());
            }
        }
        if updates.is_empty() {
            let expected = "lora_A and lora_B of at least one linear";
            let remedy = "give the folder of a LoRA adapter";
            return Err(Error::input(dir.display(), "no LoRA tensor", expected, remedy));
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            config,
            updates,
            saved,
        })
    }

    /// The configuration of what `updates` holds: the rank and alpha that most linears have, patterns for the others.
    fn described(&self) -> Result<AdapterConfig> {
        let alpha = |u: &Update| match self.config.use_rslora {
            true => u.scale * (u.rank() as f64).sqrt(),
            false => u.scale * u.rank() as f64,
        };
        let kept = |module: &str, u: &Update| {
            let (r, scale) = (self.config.rank(module), self.config.scale(module));
            r == u.rank() && scale.to_bits() == u.scale.to_bits()
        };
        if self.updates.iter().all(|(module, u)| kept(module, u)) {
            return Ok(self.config.clone());
        }
        let r = most_frequent(self.updates.values().map(Update::rank));
        let common = most_frequent(
            self.updates
                .values()
                .filter(|u| u.rank() == r)
                .map(|u| alpha(u).to_bits()),
        );
        let lora_alpha = f64::from_bits(common);
        let ranks = self.updates.iter().filter(|(_, u)| u.rank() != r);
        let alphas = self.updates.iter().filter(|(_, u)| alpha(u).to_bits() != common);
        Ok(AdapterConfig {
            r,
            lora_alpha,
            // Whole names, dots and all: as an expression a dot matches itself.
            rank_pattern: Patterns::new(ranks.map(|(module, u)| (module.clone(), u.rank())))?,
            alpha_pattern: Patterns::new(alphas.map(|(module, u)| (module.clone(), alpha(u))))?,
            ..self.config.clone()
        })
    }

    /// The tensors by PEFT's names, in model order.
    fn tensors(&self) -> Vec<(String, &Tensor)> {
        let mut modules: Vec<(&String, &Update)> = self.updates.iter().collect();
        modules.sort_by_key(|(module, _)| place_of(module));
        let mut tensors = Vec::new();
        for (module, update) in modules {
            tensors.push((format!("{PEFT_PREFIX}{module}.lora_A.weight"), &update.a));
            tensors.push((format!("{PEFT_PREFIX}{module}.lora_B.weight"), &update.b));
            if let Some(magnitude) = &update.magnitude {
                tensors.push((format!("{PEFT_PREFIX}{module}.lora_magnitude_vector"), magnitude));
            }
        }
        tensors.extend(
            self.saved
                .iter()
                .map(|(name, tensor)| (format!("{PEFT_PREFIX}{name}"), tensor)),
        );
        tensors
    }

    /// Writes a PEFT folder into `dir`.
    ///
    /// # Errors
    /// The system refuses.
    pub fn write(&self, dir: &Path) -> Result<()> {
        write_adapter(dir, &self.described()?, &self.tensors())
    }

    /// [`Adapter::write`] with one rank and one scale and without keys or files that only newer versions of PEFT know: ranks are
    /// filled up with zeros, the scales of single linears go into B, rsLoRA's into alpha. DoRA has no older form. Returns the
    /// configuration.
    ///
    /// # Errors
    /// The system refuses.
    pub fn write_classic(&self, dir: &Path) -> Result<AdapterConfig> {
        let described = self.described()?;
        let plain =
            described.rank_pattern.is_empty() && described.alpha_pattern.is_empty() && !described.use_rslora;
        let mut classic = self.clone();
        classic.config = described;
        if !plain {
            let r = self.updates.values().map(Update::rank).max().unwrap_or(1);
            let common = f64::from_bits(most_frequent(self.updates.values().map(|u| u.scale.to_bits())));
            let scale = if common == 0.0 { 1.0 } else { common };
            for update in classic.updates.values_mut() {
                *update = update.padded(r).with_scale(scale);
            }
            classic.config = AdapterConfig {
                r,
                lora_alpha: scale * r as f64,
                rank_pattern: Patterns::none(),
                alpha_pattern: Patterns::none(),
                use_rslora: false,
                ..classic.config
            };
        }
        write_adapter_twice(dir, &classic.config, &classic.tensors())?;
        Ok(classic.config)
    }

    /// Reads back what [`Adapter::write`] wrote.
    ///
    /// # Errors
    /// It is not the same adapter.
    pub fn check_written(&self, dir: &Path) -> Result<()> {
        let written = Self::read(dir)?;
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs();
        let same = |(module, u): (&String, &Update)| {
            written.updates.get(module).is_some_and(|w| {
                close(u.scale, w.scale) && u.a.bytes() == w.a.bytes() && u.b.bytes() == w.b.bytes()
            })
        };
        if written.updates.len() == self.updates.len()
            && self.updates.iter().all(same)
            && written.saved.len() == self.saved.len()
        {
            return Ok(());
        }
        let remedy = "the disk does not keep what is written to it: write to another one";
        Err(Error::input(
            dir.display(),
            "another adapter than was written",
            "the same",
            remedy,
        ))
    }

    /// The targets of several adapters together: the ends of names that they have in common form, else every linear by its
    /// whole name.
    fn joined_targets(adapters: &[&Adapter], modules: &BTreeSet<&String>) -> (Vec<String>, Vec<usize>) {
        let configs: Vec<&AdapterConfig> = adapters.iter().map(|adapter| &adapter.config).collect();
        let everywhere = |c: &&AdapterConfig| {
            c.layers_to_transform.is_empty() && c.grid().is_some_and(|(_, layers)| layers.is_empty())
        };
        let alike = |c: &AdapterConfig| {
            (&c.target_modules, &c.layers_to_transform)
                == (&configs[0].target_modules, &configs[0].layers_to_transform)
        };
        if configs.iter().all(|c| alike(c)) {
            return (
                configs[0].target_modules.clone(),
                configs[0].layers_to_transform.clone(),
            );
        }
        if configs.iter().all(everywhere) {
            let mut names: Vec<String> = Vec::new();
            for name in configs.iter().flat_map(|c| &c.target_modules) {
                if !names.contains(name) {
                    names.push(name.clone());
                }
            }
            return (names, Vec::new());
        }
        (
            modules.iter().map(|module| module.to_string()).collect(),
            Vec::new(),
        )
    }
}

/// The value that comes most often; of several, the one that comes first.
fn most_frequent<T: Copy + PartialEq + Default>(values: impl Iterator<Item = T>) -> T {
    let mut counts: Vec<(T, usize)> = Vec::new();
    for value in values {
        match counts.iter_mut().find(|(known, _)| *known == value) {
            Some((_, count)) => *count += 1,
            None => counts.push((value, 1)),
        }
    }
    let mut best = (T::default(), 0);
    for (value, count) in counts {
        if count > best.1 {
            best = (value, count);
        }
    }
    best.0
}

/// Where a linear stands in the model: its block, then the order of the forward pass.
pub fn place_of(module: &str) -> (usize, usize) {
    const ORDER: [&str; 4] = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"];
    let last = module.rsplit('.').next().unwrap_or(module);
    let place = ORDER.iter().position(|name| *name == last).unwrap_or(ORDER.len());
    (layer_of(module).unwrap_or(usize::MAX), place)
}

/// The block that a linear lies in.
pub fn layer_of(module: &str) -> Option<usize> {
    module.split('.').find_map(|part| part.parse().ok())
}

/// The linears of an adapter in model order.
pub fn in_order(adapter: &Adapter) -> Vec<(&str, &Update)> {
    let mut modules: Vec<(&str, &Update)> = adapter.updates.iter().map(|(m, u)| (m.as_str(), u)).collect();
    modules.sort_by_key(|(module, _)| place_of(module));
    modules
}
