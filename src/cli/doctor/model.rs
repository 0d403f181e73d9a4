//! A model folder: configuration, weights, tokenizer, the 4-bit copy, and what interrupted programs left behind.

use std::fs;
use std::path::{Path, PathBuf};

use super::downloads::{self, beginning, files, is_pointer, list};
use super::machine::gb;
use super::{Finding, Level};
use crate::checkpoint::quantized::{CacheRecord, cache_folder, is_quantized_linear};
use crate::checkpoint::{Checkpoint, free_disk};
use crate::model::ModelConfig;
use crate::model::config::{Linears, Vocabulary};
use crate::quant::QuantType;
use crate::tokenizer::Tokenizer;

/// What of a model can be used, for the findings about adapter and data.
pub(super) struct Model {
    pub checkpoint: Option<Checkpoint>,
    pub tokenizer: Option<Tokenizer>,
}

pub(super) fn look(dir: &Path, cache_dir: Option<&Path>, findings: &mut Vec<Finding>) -> Model {
    let mut model = Model {
        checkpoint: None,
        tokenizer: None,
    };
    if !dir.is_dir() {
        findings.push(no_folder(dir));
        return model;
    }
    downloads::look("model", dir, findings);
    let config = configuration(dir, findings);
    if downloads::shards(dir, findings) && config.is_some() {
        model.checkpoint = weights(dir, findings);
    }
    if !is_pointer(&dir.join("ice_text.model")) {
        model.tokenizer = tokenizer(dir, config.as_ref(), findings);
    }
    if let Some(config) = &config {
        cache(dir, cache_dir, config, model.checkpoint.as_ref(), findings);
    }
    left_behind(dir, findings);
    model
}

/// Nothing, or a file: that of another program, often.
fn no_folder(path: &Path) -> Finding {
    let stops = |found: String, remedy: &str| Finding::stops("model.folder", "model", found, remedy);
    let place = path.display();
    match beginning(path, 4).as_slice() {
        b"GGUF" => stops(
            format!("{place}: a GGUF file; expected: a model folder"),
            "no GGUF file holds ChatGLM-6B, and none can be trained: give the Hugging Face folder of ChatGLM-6B",
        ),
        b"ggml" => stops(
            format!("{place}: a GGML file for chatglm.cpp; expected: a model folder"),
            "give the folder that it was made from",
        ),
        _ if path.exists() => stops(
            format!("{place}: a file; expected: a model folder"),
            "give the folder with config.json and the weights",
        ),
        _ => stops(
            format!("{place}: nothing there; expected: a model folder"),
            "check the path",
        ),
    }
}

fn configuration(dir: &Path, findings: &mut Vec<Finding>) -> Option<ModelConfig> {
    let path = dir.join("config.json");
    if is_pointer(&path) {
        return None;
    }
    if !path.exists() {
        let adapter = dir.join("adapter_config.json").exists();
        let remedy = match adapter {
            true => "this is an adapter: give it with --adapter, and its base with --model",
            false => "download config.json from the model's repository into this folder",
        };
        let found = format!("{}: no config.json", dir.display());
        findings.push(Finding::stops("model.config", "model", found, remedy));
        return None;
    }
    match ModelConfig::read(dir) {
        Err(error) => {
            findings.push(Finding::of("model.config", Level::Stops, "model", &error));
            None
        }
        Ok(config) => {
            findings.push(Finding::fine("model.config", "model", described(dir, &config)));
            Some(config)
        }
    }
}

fn described(dir: &Path, config: &ModelConfig) -> String {
    let revision = match config.vocabulary() {
        Vocabulary::WithImageTokens => "first revision, of March 2023",
        Vocabulary::TextOnly => "revision since April 2023",
        Vocabulary::Other => "no published revision",
    };
    let linears = match config.linears() {
        Linears::Dense => String::new(),
        Linears::FourBit { .. } => ", linears in 4 bits of bitsandbytes".to_string(),
        Linears::RowInt4 => ", linears in 4 bits with a scale for each row".to_string(),
        Linears::RowInt8 => ", linears in 8 bits with a scale for each row".to_string(),
    };
    format!(
        "{}: ChatGLM-6B architecture, {} layers of {}, {} tokens ({revision}){linears}",
        dir.display(),
        config.num_layers,
        config.hidden_size,
        config.vocab_size
    )
}

/// Every file can be read: are they the tensors of this configuration?
fn weights(dir: &Path, findings: &mut Vec<Finding>) -> Option<Checkpoint> {
    let opened = Checkpoint::open(dir).and_then(|checkpoint| checkpoint.validate().map(|()| checkpoint));
    match opened {
        Err(error) => {
            findings.push(Finding::of("model.weights", Level::Stops, "weights", &error));
            None
        }
        Ok(checkpoint) => {
            let sizes = checkpoint
                .files()
                .iter()
                .filter_map(|path| fs::metadata(path).ok());
            let bytes = sizes.map(|metadata| metadata.len()).sum();
            let files = match checkpoint.files().len() {
                1 => "1 file".to_string(),
                n => format!("{n} files"),
            };
            let found = format!("complete: {} in {files}", gb(bytes));
            findings.push(Finding::fine("model.weights", "weights", found));
            Some(checkpoint)
        }
    }
}

fn tokenizer(dir: &Path, config: Option<&ModelConfig>, findings: &mut Vec<Finding>) -> Option<Tokenizer> {
    let stops = |error| Finding::of("model.tokenizer", Level::Stops, "tokenizer", &error);
    if !dir.join("ice_text.model").exists() {
        findings.push(Finding::stops(
            "model.tokenizer",
            "tokenizer",
            format!("{}: no ice_text.model", dir.display()),
            "download ice_text.model from the model's repository into this folder",
        ));
        return None;
    }
    let tokenizer = match Tokenizer::open(dir) {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            findings.push(stops(error));
            return None;
        }
    };
    match config.map_or(Ok(()), |config| tokenizer.check(config)) {
        Err(error) => findings.push(stops(error)),
        Ok(()) => {
            let found = format!("{} tokens, those of the model", tokenizer.vocab_size());
            findings.push(Finding::fine("model.tokenizer", "tokenizer", found));
        }
    }
    Some(tokenizer)
}

/// The 4-bit copy that QLoRA keeps: is there one of these weights, or room for it?
fn cache(
    dir: &Path,
    cache_dir: Option<&Path>,
    config: &ModelConfig,
    checkpoint: Option<&Checkpoint>,
    findings: &mut Vec<Finding>,
) {
    if config.linears() != Linears::Dense {
        return;
    }
    let mut found = false;
    for quant_type in [QuantType::Nf4, QuantType::Fp4] {
        for double_quant in [true, false] {
            let folder = cache_folder(dir, cache_dir, quant_type, double_quant);
            if folder.exists() {
                found = true;
                findings.push(copy(&folder, checkpoint));
            }
        }
    }
    if !found {
        findings.push(room(cache_dir.unwrap_or(dir), config));
    }
}

fn copy(folder: &Path, source: Option<&Checkpoint>) -> Finding {
    let key = "model.cache";
    let place = folder.display();
    let again = "nothing has to be done: the next run with 4 bits makes it again";
    let record = match CacheRecord::read(folder) {
        Ok(record) => record,
        Err(error) => {
            return Finding {
                remedy: Some("delete that folder: the next run with 4 bits makes it again".into()),
                ..Finding::of(key, Level::Warns, "4 bits", &error)
            };
        }
    };
    let whole = Checkpoint::open(folder).and_then(|copy| copy.validate());
    if let Err(error) = whole {
        return Finding {
            remedy: Some("delete that folder: the next run with 4 bits makes it again".into()),
            ..Finding::of(key, Level::Warns, "4 bits", &error)
        };
    }
    let changed = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let size = fs::metadata(path).map_or(0, |metadata| metadata.len());
        let mut files = record.source.iter().map(|file| &file.stamp);
        !files.any(|stamp| stamp.name == name && stamp.size == size)
    };
    if source.is_some_and(|source| source.files().iter().any(changed)) {
        let found = format!("{place}: a copy of other weights than those in the folder now");
        return Finding::warns(key, "4 bits", found, again);
    }
    let touched = source.is_some_and(|source| !record.is_untouched(source).unwrap_or(false));
    let then = match touched {
        true => {
            "; the model's files were touched since: the next run compares them, and makes it again if they differ"
        }
        false => ", which runs with 4 bits map",
    };
    let found = format!("{place}: a copy in {}{then}", record.quant_type);
    Finding::fine(key, "4 bits", found)
}

/// Is there room for the copy that the first run with 4 bits makes?
fn room(place: &Path, config: &ModelConfig) -> Finding {
    let bytes = copy_bytes(config);
    let found = format!(
        "no 4-bit copy yet: the first run with 4 bits writes {}",
        gb(bytes)
    );
    match free_disk(place) {
        Some(free) if free < bytes => Finding::warns(
            "disk.cache",
            "disk",
            format!("{}: {} free; {found}", place.display(), gb(free)),
            "make room, or keep the copy on another disk with --cache-dir DIR",
        ),
        Some(free) => Finding::fine("disk.cache", "disk", format!("{} free; {found}", gb(free))),
        None => Finding::fine("disk.cache", "disk", found),
    }
}

/// The linears in NF4 with double quantisation (4.127 bits each), the rest as stored, the head once.
fn copy_bytes(config: &ModelConfig) -> u64 {
    let tensors = config.tensors().into_iter();
    let sizes = tensors.filter(|(name, _)| name != crate::checkpoint::LM_HEAD);
    let bytes = sizes.map(|(name, shape)| match is_quantized_linear(&name) {
        true => shape.elements() as f64 * 4.127 / 8.0,
        false => (shape.elements() * config.torch_dtype.size()) as f64,
    });
    bytes.sum::<f64>() as u64
}

/// Folders that a killed program did not finish, in the folder and beside it.
fn left_behind(dir: &Path, findings: &mut Vec<Finding>) {
    let beside = dir
        .canonicalize()
        .ok()
        .and_then(|dir| dir.parent().map(Path::to_path_buf));
    for place in [Some(dir.to_path_buf()), beside].into_iter().flatten() {
        let entries = fs::read_dir(&place).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries
            .filter(|entry| entry.path().is_dir())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with('.') && name.ends_with(".partial"))
            .collect();
        names.sort();
        if !names.is_empty() {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            findings.push(Finding::warns(
                "model.partial",
                "model",
                format!(
                    "{}: left by a program that was stopped while it wrote: {}",
                    place.display(),
                    list(&names)
                ),
                "remove them, unless glmtune is writing there now",
            ));
        }
    }
    let temporary = files(dir).into_iter().map(|(name, _)| name);
    let temporary: Vec<String> = temporary
        .filter(|name| name.starts_with('.') && name.ends_with(".tmp"))
        .collect();
    if !temporary.is_empty() {
        let names: Vec<&str> = temporary.iter().map(String::as_str).collect();
        findings.push(Finding::warns(
            "model.partial",
            "model",
            format!("{}: half-written files: {}", dir.display(), list(&names)),
            "remove them, unless glmtune is writing there now",
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_of_the_published_model_takes_four_gigabytes() {
        // 2,908,028,928 bytes of linears and 1,069,285,376 of embedding, as docs of the format compute them.
        let bytes = copy_bytes(&ModelConfig::chatglm_6b()) as f64;
        assert!((bytes / 3_983_000_000.0 - 1.0).abs() < 0.01, "{bytes}");
    }
}
