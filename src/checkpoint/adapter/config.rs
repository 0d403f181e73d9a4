//! `adapter_config.json`: what PEFT 0.2 to 0.21 wrote, read; what all of them read, written.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::pattern::{self, Patterns};
use crate::checkpoint::notice::say_once;
use crate::checkpoint::pickle::printable;
use crate::error::{Error, Result};

/// What `adapter_config.json` says, as far as LoRA, DoRA and modules saved beside them need it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct AdapterConfig {
    /// The model it was trained on, as its owner named it.
    pub base_model_name_or_path: Option<String>,
    /// Rank, where no pattern says otherwise.
    pub r: usize,
    /// The update is scaled by `lora_alpha / r`, or by `lora_alpha / sqrt(r)` with rsLoRA.
    pub lora_alpha: f64,
    /// Dropout on the input of `lora_A` while training.
    pub lora_dropout: f64,
    /// The linears that carry the adapter, by the end of their names or by their whole names. Where the file has one expression
    /// or `all-linear`, what its tensors say.
    pub target_modules: Vec<String>,
    /// Only of these blocks are the linears that are named by an end; without numbers, of all.
    pub layers_to_transform: Vec<usize>,
    /// Ranks of single linears.
    pub rank_pattern: Patterns<usize>,
    /// Alphas of single linears.
    pub alpha_pattern: Patterns<f64>,
    /// Rank-stabilised scaling?
    pub use_rslora: bool,
    /// Magnitudes beside the directions?
    pub use_dora: bool,
    /// Modules that trained whole, by the last part of their names.
    pub modules_to_save: Vec<String>,
}

/// Keys that change what an adapter means: any value but these is refused.
const PLAIN: &[(&str, &[&str])] = &[
    ("bias", &["\"none\""]),
    ("fan_in_fan_out", &["false"]),
    // Of PEFT 0.2: parts of a fused linear that carry no adapter.
    ("enable_lora", &["[]"]),
    // PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base itself: their adapters mean nothing on the original one.
    (
        "init_lora_weights",
        &["true", "false", "\"gaussian\"", "\"orthogonal\"", "\"eva\""],
    ),
    ("ensure_weight_tying", &["false"]),
    ("exclude_modules", &["[]"]),
    ("layers_pattern", &["[]", "\"\"", "\"layers\"", "[\"layers\"]"]),
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

/// Keys that are read, and keys that tell how an adapter was made or is served, not what it is.
const KNOWN: &[&str] = &[
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "layers_to_transform",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "auto_mapping",
    "inference_mode",
    "merge_weights",
    "peft_version",
    "revision",
    "task_type",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
];

/// Values that a key may have without saying anything.
fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

/// A key and its value, short.
fn shown(key: &str, value: &Value) -> String {
    let text: String = format!("{key} {value}").chars().take(120).collect();
    printable(&text)
}

/// The keys of one file.
struct Keys<'a> {
    path: &'a Path,
    map: Map<String, Value>,
}

const AGAIN: &str = "take the adapter folder again";

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, found: impl std::fmt::Display, expected: &str, remedy: &str) -> Error {
        Error::input(self.path.display(), found, expected, remedy)
    }

    fn refuse(&self, key: &str, value: &Value, expected: &str, remedy: &str) -> Error {
        self.wrong(shown(key, value), expected, remedy)
    }

    fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        let expected = "a finite number";
        match self.get(key) {
            None => default.ok_or_else(|| self.wrong(format!("no key {key}"), expected, AGAIN)),
            Some(value) => finite(value).ok_or_else(|| self.refuse(key, value, expected, AGAIN)),
        }
    }

    fn flag(&self, key: &str) -> Result<bool> {
        match self.get(key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.refuse(key, other, "true or false", AGAIN)),
        }
    }

    fn names(&self, key: &str) -> Result<Vec<String>> {
        let names = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(names)) => names.iter().map(|name| name.as_str().map(Into::into)).collect(),
            Some(_) => None,
        };
        let value = self.get(key).unwrap_or(&Value::Null);
        names.ok_or_else(|| self.refuse(key, value, "a list of module names", "write the names out"))
    }

    fn layers(&self) -> Result<Vec<usize>> {
        let key = "layers_to_transform";
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let one = std::slice::from_ref(value);
        let numbers = value.as_array().map_or(one, Vec::as_slice).iter();
        let numbers: Option<BTreeSet<usize>> = numbers.map(|n| usize::try_from(n.as_u64()?).ok()).collect();
        match numbers {
            Some(numbers) => Ok(numbers.into_iter().collect()),
            None => Err(self.refuse(key, value, "numbers of layers, from 0", AGAIN)),
        }
    }

    fn patterns<T: Copy>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Patterns<T>> {
        let Some(value) = self.get(key) else {
            return Ok(Patterns::default());
        };
        let pairs = value.as_object().and_then(|map| {
            map.iter()
                .map(|(pattern, value)| Some((pattern.clone(), read(value)?)))
                .collect::<Option<Vec<_>>>()
        });
        let expected = format!("patterns of module names, each with {expected}");
        let pairs = pairs.ok_or_else(|| self.refuse(key, value, &expected, AGAIN))?;
        Patterns::new(pairs)
            .map_err(|e| self.wrong(format!("{key} with {e}"), &expected, "write the names out"))
    }
}

fn finite(value: &Value) -> Option<f64> {
    value.as_f64().filter(|n| n.is_finite())
}

fn rank(value: &Value) -> Option<usize> {
    let r = usize::try_from(value.as_u64()?).ok();
    r.filter(|r| (1..=1 << 20).contains(r))
}

impl AdapterConfig {
    /// What a linear's `B A` is multiplied by: `alpha / r`, or `alpha / sqrt(r)` with rsLoRA.
    pub fn scaling(alpha: f64, r: usize, rslora: bool) -> f64 {
        match rslora {
            true => alpha / (r as f64).sqrt(),
            false => alpha / r as f64,
        }
    }

    /// The rank of the linear `module`, named without PEFT's `base_model.model.`.
    pub fn rank(&self, module: &str) -> usize {
        self.rank_pattern.get(module).unwrap_or(self.r)
    }

    /// What `B A` of the linear `module` is multiplied by.
    pub fn scale(&self, module: &str) -> f64 {
        let alpha = self.alpha_pattern.get(module).unwrap_or(self.lora_alpha);
        Self::scaling(alpha, self.rank(module), self.use_rslora)
    }

    /// Does the linear `module` carry the adapter? As PEFT matches: its whole name, or its end after a dot in the layers of
    /// `layers_to_transform`.
    pub fn targets(&self, module: &str) -> bool {
        let in_layer = || match layer_of(module) {
            Some(layer) => self.layers_to_transform.contains(&layer),
            None => false,
        };
        self.target_modules.iter().any(|target| {
            let before = module.strip_suffix(target.as_str());
            let ends = || before.is_some_and(|before| before.ends_with('.'));
            before == Some("") || ends() && (self.layers_to_transform.is_empty() || in_layer())
        })
    }

    /// The linears that carry the adapter as ends of names and layers (none: all of them), if they are the same in each layer.
    pub fn grid(&self) -> Option<(Vec<String>, Vec<usize>)> {
        let whole = |name: &String| layer_of(name).is_some();
        if !self.target_modules.iter().any(whole) {
            let names = self.target_modules.iter().map(|name| last_part(name).to_string());
            return Some((unique(names), self.layers_to_transform.clone()));
        }
        grid(&self.target_modules)
    }

    /// The linears in a few words, for people.
    pub fn targets_in_words(&self) -> String {
        let names = self.target_modules.iter().map(|name| last_part(name).to_string());
        let names = unique(names).join(", ");
        let mut layers: BTreeSet<usize> = self
            .target_modules
            .iter()
            .filter_map(|name| layer_of(name))
            .collect();
        layers.extend(&self.layers_to_transform);
        match layers.len() {
            0 => names,
            n => format!("{names} in {n} layer{}", if n == 1 { "" } else { "s" }),
        }
    }

    /// Reads the file. Targets that it gives as one expression are left out, and returned: [`AdapterConfig::resolve_targets`].
    pub(super) fn read(path: &Path) -> Result<(Self, Option<String>)> {
        let text = std::fs::read(path).map_err(Error::io(path, "read"))?;
        let map: Map<String, Value> = serde_json::from_slice(&text)
            .map_err(|e| Error::input(path.display(), e, "a JSON object", AGAIN))?;
        let keys = Keys { path, map };
        match keys.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            other => {
                let found = format!("peft_type {}", other.map_or("missing".into(), printable));
                return Err(keys.wrong(found, "LORA", "give a LoRA adapter"));
            }
        }
        for &(key, plain) in PLAIN {
            if let Some(value) = keys
                .get(key)
                .filter(|value| !plain.contains(&value.to_string().as_str()))
            {
                let remedy = match key {
                    "init_lora_weights" => {
                        "save it in PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
                    }
                    _ => "not supported: train or export the adapter without it",
                };
                return Err(keys.refuse(key, value, "LoRA or DoRA on the base as it was published", remedy));
            }
        }
        keys.report_unknown();
        let (target_modules, expression) = match keys.get("target_modules") {
            Some(Value::String(expression)) => (Vec::new(), Some(expression.clone())),
            _ => (keys.names("target_modules")?, None),
        };
        if target_modules.is_empty() && expression.as_deref().unwrap_or("").is_empty() {
            let found = keys.map.get("target_modules").unwrap_or(&Value::Null);
            let found = shown("target_modules", found);
            return Err(keys.wrong(found, "a list of module names", "write the names out"));
        }
        let expected = "r a whole number from 1";
        let r = match keys.get("r") {
            None => return Err(keys.wrong("no key r", expected, AGAIN)),
            Some(value) => rank(value).ok_or_else(|| keys.refuse("r", value, expected, AGAIN))?,
        };
        let lora_dropout = keys.number("lora_dropout", Some(0.0))?;
        if !(0.0..1.0).contains(&lora_dropout) {
            let found = format!("lora_dropout {lora_dropout}");
            return Err(keys.wrong(found, "at least 0 and below 1", AGAIN));
        }
        let config = Self {
            base_model_name_or_path: keys
                .get("base_model_name_or_path")
                .and_then(Value::as_str)
                .map(Into::into),
            r,
            lora_alpha: keys.number("lora_alpha", None)?,
            lora_dropout,
            target_modules,
            layers_to_transform: keys.layers()?,
            rank_pattern: keys.patterns("rank_pattern", "a rank from 1", rank)?,
            alpha_pattern: keys.patterns("alpha_pattern", "a number", finite)?,
            use_rslora: keys.flag("use_rslora")?,
            use_dora: keys.flag("use_dora")?,
            modules_to_save: keys.names("modules_to_save")?,
        };
        Ok((config, expression))
    }

    /// Takes the targets of an expression from the names of the modules that the file has: PEFT matches one against whole
    /// names, and heeds no `layers_to_transform` then.
    ///
    /// # Errors
    /// The expression does not match one of them: config and weights are not of one adapter.
    pub(super) fn resolve_targets(
        &mut self,
        path: &Path,
        expression: &str,
        modules: &BTreeSet<&str>,
    ) -> Result<()> {
        // One that this program cannot read (look-around) is believed.
        let regex = match expression {
            "all-linear" => None,
            _ => pattern::whole(expression).ok(),
        };
        if let Some(other) = modules
            .iter()
            .find(|m| regex.as_ref().is_some_and(|regex| !regex.is_match(m)))
        {
            let found = format!(
                "target_modules {}, and weights of {}",
                printable(expression),
                printable(other)
            );
            let expected = "an expression that matches every linear with weights";
            let remedy =
                "adapter_config.json and the weights are not of one adapter: copy the whole folder again";
            return Err(Error::input(path.display(), found, expected, remedy));
        }
        let names: Vec<String> = modules.iter().map(|m| m.to_string()).collect();
        (self.target_modules, self.layers_to_transform) = grid(&names).unwrap_or((names, Vec::new()));
        Ok(())
    }

    /// The keys that PEFT 0.3 knew, and of later ones those that say something: old versions either refuse a key that they do not
    /// know or, worse, drop it in silence.
    pub(super) fn to_json(&self) -> Value {
        let modules_to_save = match self.modules_to_save.as_slice() {
            [] => Value::Null,
            names => json!(names),
        };
        let mut json = json!({
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": plain(self.lora_alpha),
            "lora_dropout": self.lora_dropout,
            "modules_to_save": modules_to_save,
            "peft_type": "LORA",
            "r": self.r,
            "target_modules": self.target_modules,
            "task_type": "CAUSAL_LM",
        });
        let later = [
            (
                "alpha_pattern",
                !self.alpha_pattern.is_empty(),
                self.alpha_pattern.to_json(plain),
            ),
            (
                "layers_to_transform",
                !self.layers_to_transform.is_empty(),
                json!(self.layers_to_transform),
            ),
            (
                "rank_pattern",
                !self.rank_pattern.is_empty(),
                self.rank_pattern.to_json(|r| json!(r)),
            ),
            ("use_dora", self.use_dora, json!(true)),
            ("use_rslora", self.use_rslora, json!(true)),
        ];
        for (key, _, value) in later.into_iter().filter(|(_, says, _)| *says) {
            json[key] = value;
        }
        json
    }
}

impl Keys<'_> {
    /// One line for the keys that this program does not know and whose value says something.
    fn report_unknown(&self) {
        let known = |key: &str| KNOWN.contains(&key) || PLAIN.iter().any(|(plain, _)| *plain == key);
        let unknown: Vec<String> = self
            .map
            .iter()
            .filter(|(key, value)| !known(key) && !is_neutral(value))
            .map(|(key, value)| shown(key, value))
            .collect();
        if !unknown.is_empty() {
            say_once(format!(
                "{}: keys that glmtune does not know are not heeded: {}",
                self.path.display(),
                unknown.join("; ")
            ));
        }
    }
}

/// A whole number without a point.
fn plain(x: f64) -> Value {
    match x.fract() == 0.0 && x.abs() < 1e15 {
        true => json!(x as i64),
        false => json!(x),
    }
}

/// The number of the block that the module of this name lies in.
fn layer_of(module: &str) -> Option<usize> {
    module.split('.').find_map(|part| part.parse().ok())
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// The same names, each once.
fn unique(names: impl Iterator<Item = String>) -> Vec<String> {
    let mut unique: Vec<String> = Vec::new();
    for name in names {
        if !unique.contains(&name) {
            unique.push(name);
        }
    }
    unique
}

/// Last parts of whole names, and layers, if every layer has every part; none if they are no such grid.
fn grid(names: &[String]) -> Option<(Vec<String>, Vec<usize>)> {
    let mut cells = BTreeSet::new();
    for name in names {
        cells.insert((layer_of(name)?, last_part(name)));
    }
    let layers: BTreeSet<usize> = cells.iter().map(|(layer, _)| *layer).collect();
    let parts = unique(names.iter().map(|name| last_part(name).to_string()));
    let full = cells.len() == names.len() && cells.len() == layers.len() * parts.len();
    full.then(|| (parts, layers.into_iter().collect()))
}
