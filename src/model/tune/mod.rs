//! Which parameters train: the only place that knows the tuning methods.
//!
//! [`apply`] makes parameters trainable, [`save`] and [`restore`] carry them through a checkpoint to the bit,
//! [`load_adapter`] puts the result of a training on a base, and [`save_model`] writes a base that has itself been trained.

mod dense;
mod exchange;
mod lora;
mod prefix;
mod storage;

use std::path::Path;

pub use dense::{FreezeModules, untie_head, widen};
pub use exchange::Exchange;
pub use lora::{
    LoraConfig, LoraInit, LoraTarget, Merged, Merger, SavedModule, Strength, adapter_tensors, save_adapter,
};
pub use prefix::PrefixConfig;
pub use storage::{MasterPlace, Storage};

use super::{Model, ModelConfig};
use crate::checkpoint::shards::SHARD_BYTES;
use crate::checkpoint::{AdapterConfig, read_adapter};
use crate::error::Result;
use crate::tensor::ledger::account;

/// A tuning method. QLoRA is [`Tuning::Lora`] on 4-bit weights.
#[derive(Debug, Clone, PartialEq)]
pub enum Tuning {
    /// Low-rank adapters.
    Lora(LoraConfig),
    /// Keys and values before those of the sequence: P-Tuning v2.
    PTuning(PrefixConfig),
    /// Some layers of the base.
    Freeze {
        /// `n > 0`: the last n layers; `n < 0`: the first |n|.
        layers: i64,
        /// What of these layers.
        modules: FreezeModules,
    },
    /// Every parameter.
    Full,
}

/// What [`load_adapter`] found in a folder.
#[derive(Debug, Clone, PartialEq)]
pub enum Loaded {
    /// A PEFT folder.
    Lora(AdapterConfig),
    /// An official P-Tuning v2 folder.
    Prefix(PrefixConfig),
}

/// Makes the parameters of `tuning` trainable; what is drawn at random comes from `seed`.
///
/// # Errors
/// The method does not fit the model (4-bit weights do not train), or an option is out of its range.
pub fn apply(model: &mut Model, tuning: &Tuning, seed: u64) -> Result<()> {
    account("what trains", || match tuning {
        Tuning::Lora(config) => lora::apply(model, config, seed),
        Tuning::PTuning(config) => prefix::apply(model, config, seed),
        Tuning::Freeze { layers, modules } => dense::apply_freeze(model, *layers, *modules),
        Tuning::Full => dense::apply_full(model),
    })
}

/// Puts what a folder holds into the model, to train on or only to use: a LoRA adapter (`adapter_config.json`) or a prefix
/// (`pytorch_model.bin`).
///
/// # Errors
/// The folder is neither, or does not belong to this base: a tensor is unknown, missing or mis-shaped; each is named.
pub fn load_adapter(model: &mut Model, dir: &Path, trainable: bool) -> Result<Loaded> {
    if prefix::is_folder(dir) {
        return prefix::load(model, dir, trainable).map(Loaded::Prefix);
    }
    lora::load_adapter(model, dir, trainable).map(Loaded::Lora)
}

/// What a folder holds, without a model to put it into.
///
/// # Errors
/// The folder holds neither a LoRA adapter nor a prefix.
pub fn adapter_kind(dir: &Path) -> Result<Loaded> {
    if prefix::is_folder(dir) {
        return prefix::kind(dir).map(Loaded::Prefix);
    }
    read_adapter(dir).map(|(config, _)| Loaded::Lora(config))
}

/// Checks that the P-Tuning prefix of a folder fits a base of this configuration.
///
/// # Errors
/// It does not: a tensor is unknown, missing, mis-shaped or not finite.
pub fn check_prefix(config: &ModelConfig, dir: &Path) -> Result<PrefixConfig> {
    prefix::check(config, dir)
}

/// Writes the P-Tuning prefix of the folder `from`, of any kind that [`load_adapter`] reads, as the official trainer does: the folder
/// `dir` with `pytorch_model.bin` in F32 and the `config.json` of `base`, else its own.
///
/// # Errors
/// The folder is no whole prefix; there is no `config.json`; `dir` cannot be written.
pub fn rewrite_prefix(from: &Path, base: Option<&Path>, dir: &Path) -> Result<PrefixConfig> {
    prefix::rewrite(from, base, dir)
}

/// Writes what trains into the folder `dir`, to be read by [`restore`]: a PEFT folder, an official P-Tuning v2 folder, or
/// the trained tensors of the base. `base` is the model folder that training began from.
///
/// # Errors
/// The model is not as `tuning` left it, or the folder cannot be written.
pub fn save(model: &Model, tuning: &Tuning, base: &Path, dir: &Path) -> Result<()> {
    match tuning {
        Tuning::Lora(config) => lora::save(model, config, base, dir),
        Tuning::PTuning(_) => prefix::save(model, base, dir),
        Tuning::Freeze { .. } | Tuning::Full => dense::save(model, dir),
    }
}

/// Makes a freshly loaded base train on exactly as the model that [`save`] wrote, bit for bit.
///
/// # Errors
/// The folder was not written by [`save`] with this `tuning` for this base.
pub fn restore(model: &mut Model, tuning: &Tuning, dir: &Path) -> Result<()> {
    account("what trains", || match tuning {
        Tuning::Lora(config) => lora::restore(model, config, dir),
        Tuning::PTuning(config) => prefix::restore(model, config, dir),
        Tuning::Freeze { .. } | Tuning::Full => {
            apply(model, tuning, 0)?;
            dense::restore(model, dir)
        }
    })
}

/// Adds the adapter of a PEFT folder to the base's own weights, before anything is tuned; several may follow each other.
///
/// # Errors
/// The folder is no adapter of this base, a prefix (which has no weight to be added to), or the model carries an adapter.
pub fn merge_adapter(model: &mut Model, dir: &Path) -> Result<Merged> {
    lora::merge(model, dir)
}

/// Multiplies the scale of every adapter with `factor`: 0 is the base, 1 the adapter as it was trained. As in PEFT, DoRA's
/// magnitudes and modules that trained whole stay what they are.
///
/// # Errors
/// The model has no LoRA adapter, or the factor is not finite.
pub fn scale_adapter(model: &mut Model, factor: f64) -> Result<()> {
    lora::scale(model, factor)
}

/// Writes the whole model as a checkpoint folder that [`Model::load`] and the official code load, in the types of the folder
/// `base` that it was loaded from: float16 for the official checkpoints.
///
/// # Errors
/// The base is in 4 bits, the model has an adapter, a weight is beyond what its type can hold, or `dir` holds other files or
/// cannot be written.
pub fn save_model(model: &Model, base: &Path, dir: &Path) -> Result<()> {
    save_model_in_shards(model, base, dir, SHARD_BYTES)
}

/// [`save_model`] in files of at most `shard_bytes`, or of one tensor.
///
/// # Errors
/// As [`save_model`].
pub fn save_model_in_shards(model: &Model, base: &Path, dir: &Path, shard_bytes: u64) -> Result<()> {
    super::save::save(model, base, dir, shard_bytes)
}
