//! `glmtune inspect`: what is in this checkpoint, adapter, 4-bit cache or file of weights.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value, json};

use crate::checkpoint::quantized::{CACHE_FILE, CacheRecord};
use crate::checkpoint::{
    AdapterConfig, Checkpoint, LM_HEAD, Source, Stored, read_adapter, read_folder, read_tensors,
};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::model::tune::{self, Loaded, PrefixConfig};
use crate::quant::QuantTensor;
use crate::tensor::{Shape, Tensor};

/// Show what is in a model folder, an adapter folder, a 4-bit cache, or one .safetensors or .bin file
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Folder or file
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// List every tensor
    #[arg(long)]
    pub tensors: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs `glmtune inspect`.
///
/// # Errors
/// There is nothing at that path that glmtune reads.
pub fn run(args: &InspectArgs) -> Result<()> {
    let mut report = inspect(&args.path)?;
    if args.json {
        if args.tensors {
            report
                .facts
                .insert("tensors".into(), report.rows.iter().map(Row::json).collect());
        }
        println!("{:#}", Value::Object(report.facts));
        return Ok(());
    }
    for (key, value) in &report.facts {
        println!("{:<24} {}", key.replace('_', " "), text(value));
    }
    if args.tensors {
        let width = report.rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
        for row in &report.rows {
            println!(
                "{:<width$}  {:<9} {:<16} {:>12} bytes",
                row.name,
                row.stored,
                row.shape.to_string(),
                row.bytes
            );
        }
    }
    Ok(())
}

/// What was found, in the order it is shown.
struct Report {
    facts: Map<String, Value>,
    rows: Vec<Row>,
}

/// One weight; the parts of a 4-bit weight count as one.
struct Row {
    name: String,
    stored: String,
    shape: Shape,
    bytes: usize,
}

impl Row {
    fn json(&self) -> Value {
        json!({ "name": self.name, "stored": self.stored, "shape": self.shape.extents(), "bytes": self.bytes })
    }
}

fn inspect(path: &Path) -> Result<Report> {
    if !path.exists() {
        let expected = "a folder, or a .safetensors or .bin file";
        return Err(Error::input(
            path.display(),
            "nothing",
            expected,
            "check the path",
        ));
    }
    if path.is_file() {
        file(path)
    } else if path.join("adapter_config.json").exists() {
        adapter(path)
    } else if let Ok(Loaded::Prefix(prefix)) = tune::adapter_kind(path) {
        self::prefix(path, &prefix)
    } else if path.join("config.json").exists() {
        model(path)
    } else {
        let expected = "config.json (a model) or adapter_config.json (an adapter)";
        Err(Error::input(
            path.display(),
            "neither of them",
            expected,
            "give the folder that holds the weights",
        ))
    }
}

fn model(path: &Path) -> Result<Report> {
    let checkpoint = Checkpoint::open(path)?;
    let config = checkpoint.config();
    let names: Vec<String> = checkpoint.names().map(String::from).collect();
    let rows = match config.row_scaled {
        Some(_) => rows_of_whole_numbers(&checkpoint, &names)?,
        None => rows(&names, |name| checkpoint.tensor(name))?,
    };
    let quantized = rows.iter().find(|row| row.stored == "nf4" || row.stored == "fp4");
    let kind = match (config.row_scaled, quantized) {
        (Some(layout), _) => format!("ChatGLM-6B model in {} ({layout})", config.linears()),
        (None, Some(row)) => format!("ChatGLM-6B model in 4 bits ({}, bitsandbytes layout)", row.stored),
        (None, None) => "ChatGLM-6B model".to_string(),
    };
    let mut facts = start(path, &kind);
    facts.insert("vocabulary".into(), json!(vocabulary(config)));
    facts.insert("layers".into(), json!(config.num_layers));
    facts.insert("hidden_size".into(), json!(config.hidden_size));
    facts.insert("inner_hidden_size".into(), json!(config.inner_hidden_size));
    facts.insert("attention_heads".into(), json!(config.num_attention_heads));
    facts.insert("max_sequence_length".into(), json!(config.max_sequence_length));
    facts.insert(
        "special_ids".into(),
        json!({ "sop": config.bos_token_id, "eop": config.eos_token_id, "mask": config.mask_token_id,
            "gmask": config.gmask_token_id, "pad": config.pad_token_id }),
    );
    totals(&mut facts, &rows);
    facts.insert("head".into(), json!(head(&checkpoint)?));
    facts.insert(
        "files".into(),
        json!(
            checkpoint
                .files()
                .iter()
                .map(|p| file_name(p))
                .collect::<Vec<_>>()
        ),
    );
    facts.insert("tokenizer".into(), json!(path.join("ice_text.model").is_file()));
    let complete = match checkpoint.validate() {
        Ok(()) => "yes, every tensor is there with its shape".to_string(),
        Err(error) => format!("no: {error}"),
    };
    facts.insert("complete".into(), json!(complete));
    if path.join(CACHE_FILE).exists() {
        let made_from = match CacheRecord::read(path) {
            Ok(record) => serde_json::to_value(record).unwrap_or_default(),
            Err(error) => json!(error.to_string()),
        };
        facts.insert("made_from".into(), made_from);
    }
    Ok(Report { facts, rows })
}

fn vocabulary(config: &ModelConfig) -> String {
    let generation = match config.vocab_size {
        150_528 => "first generation, with 20000 image tokens (before 2023-04-06)",
        130_528 => "current generation, text only",
        _ => "of neither published generation",
    };
    format!("{} rows: {generation}", config.vocab_size)
}

fn head(checkpoint: &Checkpoint) -> Result<&'static str> {
    Ok(if !checkpoint.contains(LM_HEAD) {
        "tied: the embedding itself"
    } else if checkpoint.has_separate_head()? {
        if checkpoint.config().tie_word_embeddings {
            "stored and different from the embedding, but tied by config.json: the embedding is used"
        } else {
            "separate from the embedding"
        }
    } else {
        "stored, equal to the embedding"
    })
}

fn adapter(path: &Path) -> Result<Report> {
    let (config, tensors) = read_adapter(path)?;
    let mut facts = start(path, "LoRA adapter (PEFT)");
    facts.insert("base_model".into(), json!(config.base_model_name_or_path));
    facts.insert("r".into(), json!(config.r));
    facts.insert("lora_alpha".into(), json!(config.lora_alpha));
    facts.insert("lora_dropout".into(), json!(config.lora_dropout));
    let scaling = AdapterConfig::scaling(config.lora_alpha, config.r, config.use_rslora);
    facts.insert("scaling".into(), json!(scaling));
    if !config.rank_pattern.is_empty() {
        facts.insert("rank_pattern".into(), config.rank_pattern.to_json(|r| json!(r)));
    }
    if !config.alpha_pattern.is_empty() {
        let alphas = config.alpha_pattern.to_json(|alpha| json!(alpha));
        facts.insert("alpha_pattern".into(), alphas);
    }
    if !config.layers_to_transform.is_empty() {
        facts.insert("layers_to_transform".into(), json!(config.layers_to_transform));
    }
    facts.insert("use_rslora".into(), json!(config.use_rslora));
    facts.insert("use_dora".into(), json!(config.use_dora));
    facts.insert("target_modules".into(), json!(config.target_modules));
    if !config.modules_to_save.is_empty() {
        facts.insert("modules_to_save".into(), json!(config.modules_to_save));
    }
    lora_facts(&mut facts, &tensors);
    let rows = plain_rows(&tensors);
    totals(&mut facts, &rows);
    Ok(Report { facts, rows })
}

fn prefix(path: &Path, prefix: &PrefixConfig) -> Result<Report> {
    let tensors = read_folder(path)?;
    let mut facts = start(path, "P-Tuning v2 prefix (official layout)");
    facts.insert("pre_seq_len".into(), json!(prefix.pre_seq_len));
    facts.insert("prefix_projection".into(), json!(prefix.projection));
    let rows = plain_rows(&tensors);
    totals(&mut facts, &rows);
    Ok(Report { facts, rows })
}

fn file(path: &Path) -> Result<Report> {
    let tensors = read_tensors(path)?;
    let any = |part: &str| tensors.keys().any(|name| name.contains(part));
    let kind = if any(".lora_A") {
        "file of LoRA weights"
    } else if any("prefix_encoder.") {
        "file with a P-Tuning prefix"
    } else {
        "file of weights"
    };
    let mut facts = start(path, kind);
    lora_facts(&mut facts, &tensors);
    let names: Vec<String> = tensors.keys().cloned().collect();
    let rows = rows(&names, |name| {
        tensors.get(name).cloned().ok_or_else(|| {
            let remedy = "the file is damaged: write or download it again";
            Error::input(
                path.display(),
                format!("no {}", name.escape_debug()),
                "every part of a 4-bit weight",
                remedy,
            )
        })
    })?;
    totals(&mut facts, &rows);
    Ok(Report { facts, rows })
}

/// Modules, layers, and whether training moved `lora_B` away from zero.
fn lora_facts(facts: &mut Map<String, Value>, tensors: &BTreeMap<String, Tensor>) {
    let mut modules = BTreeSet::new();
    let mut layers = BTreeSet::new();
    let (mut a, mut b, mut zero) = (0.0, 0.0, 0);
    for (name, tensor) in tensors {
        let Some((module, factor)) = name.rsplit_once(".lora_") else {
            continue;
        };
        modules.insert(
            module
                .rsplit('.')
                .next()
                .unwrap_or(module)
                .escape_debug()
                .to_string(),
        );
        layers.extend(module.split('.').filter_map(|part| part.parse::<usize>().ok()));
        let squares: f64 = tensor.to_f64_vec().iter().map(|x| x * x).sum();
        if factor.starts_with('A') {
            a += squares;
        } else {
            b += squares;
            zero += usize::from(squares == 0.0);
        }
    }
    if modules.is_empty() {
        return;
    }
    facts.insert("modules".into(), json!(modules));
    facts.insert("layers".into(), json!(layers.len()));
    facts.insert("norm_lora_A".into(), number(f64::sqrt(a)));
    facts.insert("norm_lora_B".into(), number(f64::sqrt(b)));
    if zero > 0 {
        facts.insert(
            "warning".into(),
            json!(format!("{zero} lora_B are zero: these modules were not trained")),
        );
    }
}

/// JSON has no NaN: it becomes the word.
fn number(x: f64) -> Value {
    if x.is_finite() {
        json!(x)
    } else {
        json!(x.to_string())
    }
}

fn start(path: &Path, kind: &str) -> Map<String, Value> {
    Map::from_iter([
        ("path".to_string(), json!(path.display().to_string())),
        ("kind".to_string(), json!(kind)),
    ])
}

fn totals(facts: &mut Map<String, Value>, rows: &[Row]) {
    let parameters: usize = rows
        .iter()
        .map(|row| row.shape.elements())
        .fold(0, usize::saturating_add);
    let bytes: usize = rows.iter().map(|row| row.bytes).sum();
    let mut by_type: BTreeMap<&str, usize> = BTreeMap::new();
    for row in rows {
        *by_type.entry(&row.stored).or_default() += row.bytes;
    }
    facts.insert("parameters".into(), json!(parameters));
    facts.insert("bytes".into(), json!(bytes));
    facts.insert("bytes_by_type".into(), json!(by_type));
}

fn plain_rows(tensors: &BTreeMap<String, Tensor>) -> Vec<Row> {
    tensors.iter().map(|(name, tensor)| row(name, tensor)).collect()
}

fn row(name: &str, tensor: &Tensor) -> Row {
    Row {
        name: name.escape_debug().to_string(),
        stored: tensor.dtype().to_string(),
        shape: tensor.shape(),
        bytes: tensor.bytes().len(),
    }
}

/// One row per weight, the keys of a 4-bit weight folded into one.
fn rows(names: &[String], get: impl Fn(&str) -> Result<Tensor>) -> Result<Vec<Row>> {
    let described: BTreeSet<&str> = names
        .iter()
        .filter(|name| name.contains(".quant_state.bitsandbytes__"))
        .filter_map(|name| QuantTensor::described_weight(name))
        .collect();
    let mut rows = Vec::new();
    for name in names {
        if described.contains(name.as_str()) {
            let weight = QuantTensor::from_bnb(name, &get)?;
            rows.push(Row {
                name: name.escape_debug().to_string(),
                stored: weight.quant_type.to_string(),
                shape: weight.shape,
                bytes: weight.bytes(),
            });
        } else if !QuantTensor::described_weight(name).is_some_and(|weight| described.contains(weight)) {
            rows.push(row(name, &get(name)?));
        }
    }
    Ok(rows)
}

/// One row per weight, the codes and the scales of its rows folded into one; parts that fit no weight are rows of their own.
fn rows_of_whole_numbers(checkpoint: &Checkpoint, names: &[String]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut parts = BTreeSet::new();
    for (name, _) in checkpoint.config().tensors() {
        let (stored, shape) = match checkpoint.weight(&name) {
            Ok(Stored::Int8(weight)) => ("int8".to_string(), weight.shape()),
            Ok(Stored::Quant(weight)) => (weight.quant_type.to_string(), weight.shape),
            Ok(Stored::Dense(_)) | Err(_) => continue,
        };
        let module = name.strip_suffix(".weight").unwrap_or(&name);
        let keys = ["weight", "weight_scale", "SCB", "weight_format"].map(|part| format!("{module}.{part}"));
        let mut bytes = 0;
        for key in keys.into_iter().filter(|key| checkpoint.contains(key)) {
            bytes += checkpoint.tensor(&key)?.bytes().len();
            parts.insert(key);
        }
        rows.push(Row {
            name,
            stored,
            shape,
            bytes,
        });
    }
    for name in names.iter().filter(|name| !parts.contains(*name)) {
        rows.push(row(name, &checkpoint.tensor(name)?));
    }
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(rows)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// A value for people: thousands separated, lists in one line.
fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(s) => s
            .escape_debug()
            .to_string()
            .replace("\\'", "'")
            .replace("\\\"", "\""),
        Value::Number(n) if n.is_u64() => {
            let digits = n.to_string();
            let mut out = String::new();
            for (i, c) in digits.chars().enumerate() {
                if i > 0 && (digits.len() - i).is_multiple_of(3) {
                    out.push(',');
                }
                out.push(c);
            }
            out
        }
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(", "),
        Value::Object(map) => map
            .iter()
            .map(|(k, v)| format!("{k} {}", text(v)))
            .collect::<Vec<_>>()
            .join(", "),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{AdapterConfig, write_adapter, write_safetensors};
    use crate::quant::QuantType;
    use crate::tensor::DType;

    #[test]
    fn a_4_bit_weight_is_one_row_of_its_own_shape() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let source = Tensor::from_slice(&[0.5f32; 6 * 64], [6, 64]);
        let parts = QuantTensor::quantize(&source, QuantType::Nf4, true)
            .unwrap()
            .to_bnb("a.weight");
        let mut tensors: Vec<_> = parts
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor))
            .collect();
        let bias = Tensor::zeros(DType::F16, [6]);
        tensors.push(("a.bias\u{1b}[31m".into(), &bias));
        write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
        let report = inspect(&path).unwrap();
        assert_eq!(report.facts["parameters"], 6 * 64 + 6);
        let rows: Vec<_> = report
            .rows
            .iter()
            .map(|row| (row.stored.as_str(), row.shape.elements()))
            .collect();
        assert_eq!(rows, [("float16", 6), ("nf4", 6 * 64)]);
        assert!(
            !report.rows[0].name.contains('\u{1b}'),
            "names of a file do not reach the terminal raw"
        );

        tensors.retain(|(name, _)| name != "a.weight.absmax");
        write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
        assert!(
            inspect(&path)
                .err()
                .unwrap()
                .to_string()
                .contains("a.weight.absmax")
        );
    }

    #[test]
    fn an_untrained_adapter_is_called_so() {
        let dir = tempfile::tempdir().unwrap();
        let config = AdapterConfig {
            base_model_name_or_path: None,
            r: 4,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            target_modules: vec!["query_key_value".into()],
            use_rslora: true,
            ..AdapterConfig::default()
        };
        let stem = "base_model.model.transformer.layers.3.attention.query_key_value";
        let (a, b) = (
            Tensor::from_slice(&[1.0f32; 4 * 9], [4, 9]),
            Tensor::zeros(DType::F32, [27, 4]),
        );
        let tensors = [
            (format!("{stem}.lora_A.weight"), &a),
            (format!("{stem}.lora_B.weight"), &b),
        ];
        write_adapter(dir.path(), &config, &tensors).unwrap();
        let facts = inspect(dir.path()).unwrap().facts;
        assert_eq!((&facts["r"], &facts["scaling"]), (&json!(4), &json!(4.0)));
        assert_eq!(
            (&facts["modules"], &facts["norm_lora_A"]),
            (&json!(["query_key_value"]), &json!(6.0))
        );
        assert!(facts["warning"].as_str().unwrap().contains("not trained"));
    }

    #[test]
    fn nothing_to_inspect_is_said() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().to_path_buf(), dir.path().join("none")] {
            assert!(inspect(&path).is_err());
        }
    }
}
