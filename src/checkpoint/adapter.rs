//! PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors` (or `.bin`).

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::pickle::printable;
use super::{atomic, read_tensors, write_safetensors};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// What `adapter_config.json` says, as far as LoRA, DoRA and modules saved beside them need it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterConfig {
    /// The model it was trained on, as its owner named it.
    pub base_model_name_or_path: Option<String>,
    /// Rank.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`, or by `lora_alpha / sqrt(r)` with rsLoRA.
    pub lora_alpha: f64,
    /// Dropout on the input of `lora_A` while training.
    pub lora_dropout: f64,
    /// The linears that carry the adapter, by the end of their names.
    pub target_modules: Vec<String>,
    /// Rank-stabilised scaling?
    pub use_rslora: bool,
    /// Magnitudes beside the directions?
    pub use_dora: bool,
    /// Modules that trained whole, by the last part of their names.
    pub modules_to_save: Vec<String>,
}

/// Keys that change what an adapter means: any value but these is refused.
const PLAIN: [(&str, &[&str]); 19] = [
    ("bias", &["\"none\""]),
    ("fan_in_fan_out", &["false"]),
    // PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base itself: their adapters mean nothing on the original one.
    (
        "init_lora_weights",
        &["true", "false", "\"gaussian\"", "\"orthogonal\"", "\"eva\""],
    ),
    ("ensure_weight_tying", &["false"]),
    ("exclude_modules", &["[]"]),
    ("rank_pattern", &["{}"]),
    ("alpha_pattern", &["{}"]),
    ("layers_to_transform", &["[]"]),
    ("layer_replication", &["[]"]),
    ("trainable_token_indices", &["[]", "{}"]),
    ("target_parameters", &["[]"]),
    ("lora_bias", &["false"]),
    ("use_qalora", &["false"]),
    ("use_bdlora", &["false"]),
    ("alora_invocation_tokens", &["[]"]),
    ("kasa_config", &["{}"]),
    ("velora_config", &["{}"]),
    ("arrow_config", &["{}"]),
    ("monteclora_config", &["{}"]),
];

impl AdapterConfig {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(Error::io(path, "read"))?;
        let map: Map<String, Value> = serde_json::from_slice(&text).map_err(|e| {
            Error::input(
                path.display(),
                e,
                "a JSON object",
                "take the adapter folder again",
            )
        })?;
        let refusal = |found: String, expected: &str, remedy: &str| {
            Error::input(path.display(), found, expected, remedy)
        };
        let wrong = |found, expected: &str, remedy: &str| Err(refusal(found, expected, remedy));
        let get = |key: &str| map.get(key).filter(|value| !value.is_null());
        match get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            other => {
                return wrong(
                    format!("peft_type {}", other.unwrap_or("missing")),
                    "LORA",
                    "give a LoRA adapter",
                );
            }
        }
        for (key, plain) in PLAIN {
            if let Some(value) = get(key).filter(|value| !plain.contains(&value.to_string().as_str())) {
                let found: String = format!("{key} {value}").chars().take(120).collect();
                let remedy = match key {
                    "init_lora_weights" => {
                        "save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
                    }
                    _ => "not supported: train or export the adapter without it",
                };
                return wrong(found, "LoRA or DoRA on the base as it was published", remedy);
            }
        }
        let number = |key: &str, default: Option<f64>| match get(key) {
            None => default.ok_or(format!("no key {key}")),
            Some(value) => value
                .as_f64()
                .filter(|n| n.is_finite())
                .ok_or(format!("{key} {value}")),
        };
        let names = |key: &str| match get(key) {
            None => Ok(Vec::new()),
            Some(Value::Array(names)) if names.iter().all(Value::is_string) => Ok(names
                .iter()
                .filter_map(|name| Some(name.as_str()?.to_string()))
                .collect()),
            Some(other) => {
                let found: String = format!("{key} {other}").chars().take(120).collect();
                Err(refusal(found, "a list of module names", "write the names out"))
            }
        };
        let target_modules = names("target_modules")?;
        if target_modules.is_empty() {
            let found = get("target_modules").unwrap_or(&Value::Null);
            let found = format!("target_modules {found}");
            return wrong(found, "a list of module names", "write the names out");
        }
        let remedy = "take the adapter folder again";
        let numbers = || -> Result<_, String> {
            let r = get("r").ok_or("no key r")?;
            let rank = r.as_u64().and_then(|r| usize::try_from(r).ok());
            let r = rank
                .filter(|r| (1..=1 << 20).contains(r))
                .ok_or(format!("r {r}"))?;
            Ok((r, number("lora_alpha", None)?, number("lora_dropout", Some(0.0))?))
        };
        let (r, lora_alpha, lora_dropout) = match numbers() {
            Ok(numbers) => numbers,
            Err(found) => {
                return wrong(
                    found,
                    "r a whole number from 1, lora_alpha and lora_dropout numbers",
                    remedy,
                );
            }
        };
        if !(0.0..1.0).contains(&lora_dropout) {
            return wrong(
                format!("lora_dropout {lora_dropout}"),
                "at least 0 and below 1",
                remedy,
            );
        }
        let flag = |key: &str| match get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(refusal(format!("{key} {other}"), "true or false", remedy)),
        };
        Ok(Self {
            base_model_name_or_path: get("base_model_name_or_path")
                .and_then(Value::as_str)
                .map(Into::into),
            r,
            lora_alpha,
            lora_dropout,
            target_modules,
            use_rslora: flag("use_rslora")?,
            use_dora: flag("use_dora")?,
            modules_to_save: names("modules_to_save")?,
        })
    }

    /// The keys that PEFT 0.3 already knew, and `use_rslora`, `use_dora`.
    fn to_json(&self) -> Value {
        let alpha = if self.lora_alpha.fract() == 0.0 && self.lora_alpha.abs() < 1e15 {
            json!(self.lora_alpha as i64)
        } else {
            json!(self.lora_alpha)
        };
        let modules_to_save = match self.modules_to_save.as_slice() {
            [] => Value::Null,
            names => json!(names),
        };
        json!({
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": alpha,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": modules_to_save,
            "peft_type": "LORA",
            "r": self.r,
            "revision": null,
            "target_modules": self.target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": self.use_dora,
            "use_rslora": self.use_rslora,
        })
    }
}

/// Reads a PEFT folder: its config and its tensors, named as in the file
/// (`base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight` `[r, in]`, `lora_B` `[out, r]`, with
/// DoRA `lora_magnitude_vector` `[out]`; modules saved whole by their own names after `base_model.model.`).
///
/// # Errors
/// A missing or broken file, an unsupported kind of adapter, no tensors, a tensor that is no `lora_A` or `lora_B` of
/// rank `r` and of no module in `modules_to_save`, one without its partner.
pub fn read_adapter(dir: &Path) -> Result<(AdapterConfig, BTreeMap<String, Tensor>)> {
    if !dir.is_dir() {
        let found = if dir.exists() { "a file" } else { "nothing" };
        let expected = "an adapter folder";
        let remedy = "give the folder with adapter_config.json";
        return Err(Error::input(dir.display(), found, expected, remedy));
    }
    let config = AdapterConfig::read(&dir.join("adapter_config.json"))?;
    let names = ["adapter_model.safetensors", "adapter_model.bin"];
    let Some(path) = names
        .map(|name| dir.join(name))
        .into_iter()
        .find(|path| path.exists())
    else {
        let expected = "adapter_model.safetensors or adapter_model.bin";
        return Err(Error::input(
            dir.display(),
            "no adapter weights",
            expected,
            "copy the whole adapter folder",
        ));
    };
    let tensors = read_tensors(&path)?;
    check_tensors(&path, &config, &tensors)?;
    Ok((config, tensors))
}

fn check_tensors(path: &Path, config: &AdapterConfig, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let wrong = |name: &str, found: String, expected: String| {
        let place = super::entry::place(path, name);
        Err(Error::input(
            place,
            found,
            expected,
            "the adapter is damaged or of another kind",
        ))
    };
    if tensors.is_empty() {
        let expected = "lora_A and lora_B of at least one linear";
        let remedy = "the adapter was saved wrongly: save it again";
        return Err(Error::input(
            path.display(),
            "no tensors at all",
            expected,
            remedy,
        ));
    }
    for (name, tensor) in tensors {
        let [a, b, m] = ["lora_A.weight", "lora_B.weight", MAGNITUDE];
        // What it goes with, its extents where they are known, and how they are called.
        let (partners, extents, shape) = if let Some(stem) = stem(name, a) {
            (vec![format!("{stem}.{b}")], vec![Some(config.r), None], "[r, in]")
        } else if let Some(stem) = stem(name, b) {
            let magnitude = config.use_dora.then(|| format!("{stem}.{m}"));
            let partners = [format!("{stem}.{a}")].into_iter().chain(magnitude).collect();
            (partners, vec![None, Some(config.r)], "[out, r]")
        } else if let Some(stem) = stem(name, m).filter(|_| config.use_dora) {
            (vec![format!("{stem}.{b}")], vec![None], "[out]")
        } else if is_saved(name, &config.modules_to_save) {
            // Its extents are those of the model's own.
            super::refuse_non_finite(&super::entry::place(path, name), tensor)?;
            continue;
        } else {
            let mut expected = "names that end in lora_A.weight or lora_B.weight".to_string();
            if !config.modules_to_save.is_empty() {
                expected += &format!(", or of {}", config.modules_to_save.join(", "));
            }
            return wrong(name, "an unknown tensor".into(), expected);
        };
        let found = tensor.shape();
        let mut pairs = extents.iter().zip(found.extents());
        let fits = found.extents().len() == extents.len()
            && pairs.all(|(want, is)| want.is_none_or(|want| want == *is));
        if !fits || !tensor.dtype().is_float() {
            let found = format!("{} {found}", tensor.dtype());
            return wrong(name, found, format!("floats {shape} with r {}", config.r));
        }
        super::refuse_non_finite(&super::entry::place(path, name), tensor)?;
        if let Some(partner) = partners.iter().find(|partner| !tensors.contains_key(*partner)) {
            return wrong(
                name,
                "it alone".into(),
                format!("its partner {}", printable(partner)),
            );
        }
    }
    Ok(())
}

/// What PEFT calls the magnitudes of DoRA.
const MAGNITUDE: &str = "lora_magnitude_vector";

/// The module that `name` is the part `part` of.
fn stem<'a>(name: &'a str, part: &str) -> Option<&'a str> {
    name.strip_suffix(part)?.strip_suffix('.')
}

/// Is `name` a tensor of a module whose name ends in one of `modules`?
fn is_saved(name: &str, modules: &[String]) -> bool {
    let module = name.rsplit_once('.').map_or("", |(module, _)| module);
    modules.iter().any(|saved| {
        let before = module.strip_suffix(saved.as_str());
        before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
    })
}

/// Writes a PEFT folder: weights first, then the config, each whole or not at all.
///
/// # Errors
/// The system refuses to write.
pub fn write_adapter(dir: &Path, config: &AdapterConfig, tensors: &[(String, &Tensor)]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors(&dir.join("adapter_model.safetensors"), tensors, &metadata)?;
    let text = format!("{:#}\n", config.to_json());
    atomic::write(&dir.join("adapter_config.json"), text.as_bytes())
}
