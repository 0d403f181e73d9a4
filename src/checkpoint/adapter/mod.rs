//! PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

mod config;
mod pattern;
mod tensors;

use std::collections::BTreeMap;
use std::path::Path;

pub use config::AdapterConfig;
pub use pattern::Patterns;

use super::notice::say_once;
use super::{atomic, read_tensors, write_safetensors, write_torch_bin};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// PEFT puts this before every name of the base.
pub const PEFT_PREFIX: &str = "base_model.model.";

const CONFIG: &str = "adapter_config.json";
/// In the order in which PEFT looks for them.
const WEIGHTS: [&str; 2] = ["adapter_model.safetensors", "adapter_model.bin"];

/// Reads a PEFT folder: its config and its tensors, named as PEFT names them in files
/// (`base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight` `[r, in]`, `lora_B` `[out, r]`, with
/// DoRA `lora_magnitude_vector` `[out]`; modules saved whole by their own names after `base_model.model.`).
///
/// What is not heeded is said on standard error, once: keys of the config that are not known, a second file of weights, names
/// as they are in memory (`lora_A.default.weight`), the originals of modules that were saved whole.
///
/// # Errors
/// A missing or broken file, an unsupported kind of adapter, no tensors, a tensor that is no `lora_A` or `lora_B` of the rank
/// that the config gives it and of no module in `modules_to_save`, one without its partner.
pub fn read_adapter(dir: &Path) -> Result<(AdapterConfig, BTreeMap<String, Tensor>)> {
    if !dir.is_dir() {
        let found = if dir.exists() { "a file" } else { "nothing" };
        let expected = "an adapter folder";
        let remedy = "give the folder with adapter_config.json";
        return Err(Error::input(dir.display(), found, expected, remedy));
    }
    let config_path = dir.join(CONFIG);
    let (mut config, expression) = AdapterConfig::read(&config_path)?;
    let mut paths = WEIGHTS
        .map(|name| dir.join(name))
        .into_iter()
        .filter(|path| path.exists());
    let Some(path) = paths.next() else {
        let expected = "adapter_model.safetensors or adapter_model.bin";
        return Err(Error::input(
            dir.display(),
            "no adapter weights",
            expected,
            "copy the whole adapter folder",
        ));
    };
    let tensors = tensors::in_file_names(&path, read_tensors(&path)?)?;
    if let Some(second) = paths.next() {
        say_which(&path, &second, &tensors);
    }
    if let Some(expression) = expression {
        config.resolve_targets(&config_path, &expression, &tensors::modules(&tensors))?;
    }
    tensors::check(&path, &config, &tensors)?;
    Ok((config, tensors))
}

/// Says that `used` is read, and what is different in the file beside it.
fn say_which(used: &Path, beside: &Path, tensors: &BTreeMap<String, Tensor>) {
    let other = read_tensors(beside).and_then(|other| tensors::in_file_names(beside, other));
    let difference = match &other {
        Err(_) => "cannot be read",
        Ok(other) if other.keys().ne(tensors.keys()) => "has other tensors",
        Ok(other) => match other.iter().zip(tensors).all(|((_, a), (_, b))| same(a, b)) {
            true => "holds the same",
            false => "has other numbers",
        },
    };
    let file = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    say_once(format!(
        "{} is used; {} beside it {difference}",
        used.display(),
        file(beside)
    ));
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    a.dtype() == b.dtype() && a.shape() == b.shape() && a.bytes() == b.bytes()
}

/// Writes a PEFT folder: weights first, then the config, each whole or not at all.
///
/// # Errors
/// The system refuses to write.
pub fn write_adapter(dir: &Path, config: &AdapterConfig, tensors: &[(String, &Tensor)]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors(&dir.join(WEIGHTS[0]), tensors, &metadata)?;
    let text = format!("{:#}\n", config.to_json());
    atomic::write(&dir.join(CONFIG), text.as_bytes())
}

/// [`write_adapter`], and the weights a second time as `adapter_model.bin`, the only file that PEFT before 0.4 reads.
///
/// # Errors
/// The system refuses to write.
pub fn write_adapter_twice(dir: &Path, config: &AdapterConfig, tensors: &[(String, &Tensor)]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    write_torch_bin(&dir.join(WEIGHTS[1]), tensors)?;
    write_adapter(dir, config, tensors)
}
