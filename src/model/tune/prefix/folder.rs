//! Folders of the official P-Tuning scripts: `checkpoint-N` with the prefix alone, or with the whole model around it.
//!
//! `pytorch_model.bin` holds `transformer.prefix_encoder.*`; `training_args.bin`, `optimizer.pt` and what else the trainer left
//! there is not looked at. Scripts that save the encoder by itself leave its prefix out of the names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::PrefixConfig;
use crate::checkpoint::{read_folder, say_once};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::nn::PREFIX_ENCODER;
use crate::tensor::Tensor;

/// What a folder has instead of a PEFT configuration.
const WEIGHTS: [&str; 4] = [
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.safetensors",
    "model.safetensors.index.json",
];

/// Does the folder hold weights that no PEFT configuration describes: a prefix, or a model that was given by mistake?
pub(in crate::model::tune) fn is_folder(dir: &Path) -> bool {
    !dir.join("adapter_config.json").exists() && WEIGHTS.iter().any(|name| dir.join(name).is_file())
}

/// The tensors of a prefix, and what lies beside them.
pub(super) struct Folder {
    dir: PathBuf,
    /// By their names behind `transformer.prefix_encoder.`.
    pub encoder: BTreeMap<String, Tensor>,
    /// Weights of the model it was trained in.
    pub others: BTreeMap<String, Tensor>,
}

impl Folder {
    /// # Errors
    /// The weights cannot be read, or `config.json` beside them is of another prefix.
    pub fn read(dir: &Path) -> Result<Self> {
        let (mut encoder, mut others) = (BTreeMap::new(), BTreeMap::new());
        for (name, tensor) in read_folder(dir)? {
            let whole = name.strip_prefix("transformer.").unwrap_or(&name);
            match whole.strip_prefix("prefix_encoder.") {
                Some(rest) => encoder.insert(rest.to_string(), tensor),
                None => others.insert(name, tensor),
            };
        }
        if encoder.is_empty() && others.contains_key("embedding.weight") {
            std::mem::swap(&mut encoder, &mut others);
        }
        let folder = Self {
            dir: dir.to_path_buf(),
            encoder,
            others,
        };
        folder.check_config()?;
        Ok(folder)
    }

    /// `folder: transformer.prefix_encoder.NAME`.
    pub fn place(&self, name: &str) -> String {
        format!("{}: {PREFIX_ENCODER}.{name}", self.dir.display())
    }

    /// Length, and whether there is a projection.
    ///
    /// # Errors
    /// There is no embedding of a prefix.
    pub fn kind(&self) -> Result<PrefixConfig> {
        let Some(embedding) = self.encoder.get("embedding.weight") else {
            let place = self.place("embedding.weight");
            let remedy = "give the folder that P-Tuning wrote; a whole model is given as --model";
            return Err(Error::input(
                place,
                "nothing",
                "the embedding of a prefix",
                remedy,
            ));
        };
        Ok(PrefixConfig {
            pre_seq_len: embedding.shape().rows_and_columns().0,
            projection: self.encoder.keys().any(|name| name.starts_with("trans.")),
            ..PrefixConfig::default()
        })
    }

    /// `config.json` says how long the prefix is, and so do the weights.
    fn check_config(&self) -> Result<()> {
        let path = self.dir.join("config.json");
        let Ok(text) = std::fs::read(&path) else {
            return Ok(());
        };
        let json: Value = serde_json::from_slice(&text).map_err(|e| {
            let remedy = "copy the folder again";
            Error::input(path.display(), e, "a JSON object", remedy)
        })?;
        let Ok(kind) = self.kind() else { return Ok(()) };
        let said = [
            ("pre_seq_len", Value::from(kind.pre_seq_len)),
            ("prefix_projection", Value::from(kind.projection)),
        ];
        for (key, is) in said {
            if let Some(value) = json.get(key).filter(|value| !value.is_null() && **value != is) {
                let expected = format!("{key} {is}, as the weights beside it have");
                let remedy =
                    "config.json and the weights are of two trainings: copy both from one checkpoint folder";
                return Err(Error::input(
                    path.display(),
                    format!("{key} {value}"),
                    expected,
                    remedy,
                ));
            }
        }
        Ok(())
    }

    /// Whoever saved the whole model saved frozen weights too: those of the base are in use already. Says so.
    ///
    /// # Errors
    /// A tensor is of no model of this configuration.
    pub fn leave_others(&self, config: &ModelConfig) -> Result<()> {
        let base: BTreeMap<String, _> = config.tensors().into_iter().collect();
        for (name, tensor) in &self.others {
            // Rows in 4 or 8 bits, and their scales, are THUDM's quantised form of the same base.
            let shape = base.get(name.strip_suffix("_scale").unwrap_or(name));
            let fits = shape.is_some_and(|shape| *shape == tensor.shape());
            let quantised = shape.is_some() && (!tensor.dtype().is_float() || name.ends_with("_scale"));
            if !fits && !quantised && !name.ends_with(".inv_freq") {
                let place = format!("{}: {}", self.dir.display(), name.escape_debug());
                let found = format!("another tensor, {} {}", tensor.dtype(), tensor.shape());
                let expected = format!("only {PREFIX_ENCODER}.*, or weights of this base beside it");
                let remedy = "give the folder that P-Tuning wrote; a whole model is given as --model";
                return Err(Error::input(place, found, expected, remedy));
            }
        }
        if !self.others.is_empty() {
            say_once(format!(
                "{}: of the {} tensors of a whole model only the prefix is used, the other weights are those of --model",
                self.dir.display(),
                self.others.len() + self.encoder.len()
            ));
        }
        Ok(())
    }
}
