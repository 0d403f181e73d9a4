//! Adapters as changes of the base's weights: `W + Σ_i f_i s_i B_i A_i`, one weight at a time.
//!
//! The one place where an adapter becomes part of a weight: merging in memory ([`super::merge()`]) and merging on disk
//! ([`crate::export::merged`]) both come here, so they make the same bits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::folder::{Folder, Pair};
use super::vocabulary::Replacement;
use super::{SavedModule, weight};
use crate::checkpoint::{AdapterConfig, Checkpoint, LM_HEAD, WORD_EMBEDDINGS};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::tune::prefix;
use crate::tensor::{DType, Tensor};

/// An adapter, and how much of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strength<'a> {
    /// The PEFT folder.
    pub dir: &'a Path,
    /// f: 0 is the base, 1 the adapter as it was trained. As in PEFT, DoRA's magnitudes and modules that trained whole stay
    /// what they are.
    pub factor: f64,
}

/// `f s B A`, which is added to a weight.
#[derive(Debug)]
struct Update {
    /// f s.
    scale: f64,
    pair: Pair,
}

/// What becomes of a weight.
#[derive(Debug)]
enum Change {
    /// These are added, one after the other; one with a magnitude is alone.
    Added(Vec<Update>),
    /// This takes its place.
    Replaced(Replacement),
}

/// Adapters, opened and checked against the sizes of their base. Their tensors stay in the mapped files.
#[derive(Debug)]
pub struct Merger {
    changes: BTreeMap<String, Change>,
    saved: Vec<SavedModule>,
    adapters: Vec<(PathBuf, AdapterConfig)>,
}

impl Merger {
    /// Rows of a weight that are changed at once: the bits of a product depend on how it is cut, so it is cut here.
    pub const ROWS: usize = weight::ROWS;

    /// Opens every folder and finds the place of every tensor of it.
    ///
    /// # Errors
    /// A folder is no LoRA adapter of this base: a tensor is unknown, missing or mis-shaped, each named; it is a prefix or a
    /// model; a factor is not finite; two adapters cannot be added: one has DoRA, or both replace the same module.
    pub fn open(config: &ModelConfig, adapters: &[Strength<'_>]) -> Result<Self> {
        let mut merger = Self {
            changes: BTreeMap::new(),
            saved: Vec::new(),
            adapters: Vec::new(),
        };
        for adapter in adapters {
            merger.add(config, adapter, adapters.len() > 1)?;
        }
        Ok(merger)
    }

    fn add(&mut self, config: &ModelConfig, adapter: &Strength<'_>, several: bool) -> Result<()> {
        let Strength { dir, factor } = *adapter;
        if !factor.is_finite() {
            return Err(Error::input(
                "--adapter-scale",
                factor,
                "a finite number",
                "use 0 to 1",
            ));
        }
        refuse_others(dir)?;
        let mut folder = Folder::read(dir)?;
        let mut linears = 0;
        let base = config.tensors();
        for (name, shape) in &base {
            let Some((layer, module)) = linear_of(name) else {
                continue;
            };
            let Some(pair) = folder.take(layer, module, shape.rows_and_columns())? else {
                continue;
            };
            if several && pair.magnitude.is_some() {
                let remedy = "merge it alone; what it makes of the base is no sum";
                return Err(Error::input(
                    dir.display(),
                    "an adapter with DoRA among others",
                    "adapters that can be added",
                    remedy,
                ));
            }
            let scale = factor * pair.scale;
            let update = Update { scale, pair };
            linears += 1;
            match self
                .changes
                .entry(name.clone())
                .or_insert_with(|| Change::Added(Vec::new()))
            {
                Change::Added(updates) => updates.push(update),
                // Modules that train whole are no linears of a block.
                Change::Replaced(_) => return Err(twice(dir, name)),
            }
        }
        for (name, shape) in base {
            let Some(new) = folder.take_saved(&name, shape)? else {
                continue;
            };
            if self.changes.insert(name.clone(), Change::Replaced(new)).is_some() {
                return Err(twice(dir, &name));
            }
        }
        self.saved.extend_from_slice(folder.saved());
        self.adapters.push((dir.to_path_buf(), folder.finish(linears)?));
        Ok(())
    }

    /// The folders and their configurations, in their order.
    pub fn adapters(&self) -> impl Iterator<Item = (&Path, &AdapterConfig)> {
        self.adapters.iter().map(|(dir, config)| (dir.as_path(), config))
    }

    /// Is the weight `name` another one with the adapters?
    pub fn changes(&self, name: &str) -> bool {
        self.changes.contains_key(name)
    }

    /// The names of the weights that change, sorted.
    pub fn changed(&self) -> impl Iterator<Item = &str> {
        self.changes.keys().map(String::as_str)
    }

    /// The modules that trained whole.
    pub fn saved(&self) -> &[SavedModule] {
        &self.saved
    }

    /// What is added to the weight `name`: `f s`, and B A with it.
    pub(super) fn updates(&self, name: &str) -> impl Iterator<Item = (f64, &Pair)> {
        let updates = match self.changes.get(name) {
            Some(Change::Added(updates)) => updates.as_slice(),
            _ => &[],
        };
        updates.iter().map(|update| (update.scale, &update.pair))
    }

    /// Does something take the place of the weight `name` whole?
    pub fn replaces(&self, name: &str) -> bool {
        self.replacement(name).is_some()
    }

    /// What takes the place of the weight `name` whole.
    pub(super) fn replacement(&self, name: &str) -> Option<&Replacement> {
        match self.changes.get(name) {
            Some(Change::Replaced(new)) => Some(new),
            _ => None,
        }
    }

    /// Is one of the two uses of a tied matrix replaced? PEFT wraps a module, not a matrix: the head is then parted from the
    /// embedding, and what is not replaced stays the base's.
    pub fn parts_head(&self) -> bool {
        [WORD_EMBEDDINGS, LM_HEAD].iter().any(|name| self.changes(name))
    }

    /// `W + Σ_i f_i s_i B_i A_i` for the base's weight `name`, W `[out, in]` F32 on the host; with DoRA
    /// `m ⊙ (W + f s B A) / |W + f s B A|` row by row; of a module that trained whole what it became. A weight that no adapter
    /// changes is given back.
    ///
    /// # Errors
    /// The shape is not that of the base.
    pub fn merge(&self, name: &str, weight: Tensor) -> Result<Tensor> {
        self.merge_rows(name, 0, weight)
    }

    /// [`Merger::merge`] of the rows (elements of a vector) from `first` on, a multiple of [`Merger::ROWS`]: the bits of the same
    /// rows of the whole.
    ///
    /// # Errors
    /// As [`Merger::merge`].
    pub fn merge_rows(&self, name: &str, first: usize, mut rows: Tensor) -> Result<Tensor> {
        // A plan asks for sizes only.
        if rows.is_planned() {
            return Ok(rows);
        }
        match self.changes.get(name) {
            None => {}
            Some(Change::Replaced(new)) => rows = new.over_rows(first, &rows).to_dtype(DType::F32),
            Some(Change::Added(updates)) => {
                for Update { scale, pair } in updates {
                    // The base to the bit, where 0 times a number would make +0 of -0.
                    if *scale != 0.0 {
                        weight::add_rows(&mut rows, first, *scale, &pair.b, &pair.a)?;
                    }
                    if let Some(magnitude) = &pair.magnitude {
                        weight::stretch_rows(&mut rows, first, magnitude);
                    }
                }
            }
        }
        Ok(rows)
    }
}

/// `transformer.layers.3.mlp.dense_4h_to_h.weight` is layer 3 and `mlp.dense_4h_to_h`.
fn linear_of(name: &str) -> Option<(usize, &str)> {
    if !crate::checkpoint::quantized::is_quantized_linear(name) {
        return None;
    }
    let (layer, rest) = name.strip_prefix("transformer.layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, rest.strip_suffix(".weight")?))
}

fn twice(dir: &Path, name: &str) -> Error {
    let found = format!("{name}, which another adapter replaces too");
    let remedy = "merge one of them: two trained copies of a module cannot be added";
    Error::input(dir.display(), found, "each module in one adapter", remedy)
}

/// What people give for an adapter and has no weight to be added: a prefix, a model.
pub(super) fn refuse_others(dir: &Path) -> Result<()> {
    let expected = "a LoRA adapter";
    if dir.join("adapter_config.json").exists() || !dir.is_dir() {
        return Ok(());
    }
    if Checkpoint::open(dir).is_ok_and(|model| model.contains(WORD_EMBEDDINGS)) {
        let remedy = "give a model with --model, and with --adapter the folder with adapter_config.json";
        return Err(Error::input(dir.display(), "a model", expected, remedy));
    }
    if prefix::is_folder(dir) {
        prefix::kind(dir)?;
        let remedy = "a prefix has no weight to be added to: use it with --adapter, alone";
        return Err(Error::input(
            dir.display(),
            "a prefix of P-Tuning v2",
            expected,
            remedy,
        ));
    }
    Ok(())
}
