//! Does the doctor find what is wrong? Folders broken as people break them, each with the line that it must give.

#[path = "common/program.rs"]
mod program;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use glmtune::checkpoint::quantized::open_or_quantize;
use glmtune::checkpoint::{Checkpoint, read_tensors, write_safetensors};
use glmtune::model::tune::{self, LoraConfig, Tuning};
use glmtune::model::{LoadOptions, Model, ModelConfig};
use glmtune::quant::QuantType;
use glmtune::tensor::{DType, Tensor};
use program::{Workplace, glmtune, str, succeeds, text};

fn doctor(args: &[&str]) -> Output {
    glmtune(&[&["doctor"], args].concat()).output().unwrap()
}

/// The lines for a model folder, and the exit code.
fn of_model(dir: &Path) -> (Vec<String>, i32) {
    of(&["--model", str(dir)])
}

fn of(args: &[&str]) -> (Vec<String>, i32) {
    let output = doctor(args);
    let stderr = text(&output.stderr);
    assert!(!stderr.contains("panicked"), "{stderr}");
    let lines = text(&output.stdout).lines().map(String::from).collect();
    (lines, output.status.code().unwrap())
}

/// One line that begins so and says all of this.
#[track_caller]
fn says(lines: &[String], begins: &str, parts: &[&str]) {
    let found = lines
        .iter()
        .any(|line| line.starts_with(begins) && parts.iter().all(|part| line.contains(part)));
    assert!(found, "no line {begins} with {parts:?}: {lines:#?}");
}

/// Nothing that stops a run.
#[track_caller]
fn stops_nothing(lines: &[String]) {
    assert!(!lines.iter().any(|line| line.starts_with('✗')), "{lines:#?}");
}

fn change_config(dir: &Path, change: impl Fn(&mut serde_json::Map<String, serde_json::Value>)) {
    let path = dir.join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(config.as_object_mut().unwrap());
    fs::write(path, config.to_string()).unwrap();
}

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\n\
    oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 1740651802\n";

/// The weights in another type: another size of the file, the same model.
fn rewrite_weights(dir: &Path, dtype: DType) {
    let path = dir.join("model.safetensors");
    let tensors: Vec<(String, Tensor)> = read_tensors(&path)
        .unwrap()
        .into_iter()
        .map(|(name, tensor)| (name, tensor.to_dtype(dtype)))
        .collect();
    let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    write_safetensors(&path, &borrowed, &Default::default()).unwrap();
}

#[test]
fn a_sound_folder_and_sound_records_stop_nothing() {
    let Some(place) = Workplace::new() else { return };
    let (model, data) = (place.model(), place.data());
    let args = ["--model", str(&model), "--data", str(&data)];
    let (lines, code) = of(&args);
    stops_nothing(&lines);
    assert_eq!(code, 0, "{lines:#?}");
    says(&lines, "model     ", &["ChatGLM-6B architecture", "layers"]);
    says(&lines, "weights   ", &["complete", "MB in 1 file"]);
    says(&lines, "tokenizer ", &["those of the model"]);
    says(&lines, "disk      ", &["no 4-bit copy yet"]);
    says(&lines, "data      ", &["10 records", "alpaca"]);
    says(&lines, "data      ", &["longest: ", "data.json:"]);
    // For programs.
    let output = doctor(&[&args[..], &["--json"]].concat());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["stops"], 0);
    let findings = json["findings"].as_array().unwrap();
    assert_eq!(findings.len(), lines.len());
    for key in [
        "program",
        "cpu",
        "auto",
        "model.config",
        "model.weights",
        "model.tokenizer",
        "disk.cache",
        "data.records",
        "data.lengths",
    ] {
        let finding = findings.iter().find(|finding| finding["key"] == key);
        let finding = finding.unwrap_or_else(|| panic!("{key}: {findings:?}"));
        assert!(finding["found"].is_string() && finding["level"].is_string());
    }
}

#[test]
fn git_lfs_pointers_are_told_from_files() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    fs::write(model.join("model.safetensors"), POINTER).unwrap();
    let (lines, code) = of_model(&model);
    assert_eq!(code, 1);
    says(
        &lines,
        "✗ model",
        &["1 git-LFS pointers", "model.safetensors", "git lfs pull"],
    );
    // One finding for it, and the rest is still looked at.
    assert_eq!(lines.iter().filter(|line| line.starts_with('✗')).count(), 1);
    says(&lines, "tokenizer ", &["those of the model"]);
    fs::write(model.join("ice_text.model"), POINTER).unwrap();
    fs::write(model.join("config.json"), POINTER).unwrap();
    let (lines, _) = of_model(&model);
    says(
        &lines,
        "✗ model",
        &[
            "3 git-LFS pointers",
            "config.json",
            "ice_text.model",
            "model.safetensors",
        ],
    );
    assert_eq!(lines.iter().filter(|line| line.starts_with('✗')).count(), 1);
}

#[test]
fn missing_and_truncated_shards_are_named() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let shard = |i: usize| format!("pytorch_model-0000{i}-of-00008.bin");
    let map: serde_json::Map<String, serde_json::Value> = (1..=8)
        .map(|i| (format!("tensor.{i}"), shard(i).into()))
        .collect();
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(model.join("pytorch_model.bin.index.json"), index.to_string()).unwrap();
    fs::write(model.join(shard(1)), b"PK\x03\x04 and then the line broke").unwrap();
    fs::write(model.join(shard(3)), POINTER).unwrap();
    fs::write(model.join(shard(4) + ".aria2"), b"").unwrap();
    let (lines, code) = of_model(&model);
    assert_eq!(code, 1);
    let missing = [2, 4, 5, 6, 7, 8].map(shard).join(", ");
    says(&lines, "✗ model", &[&missing, "of 8", "download them"]);
    says(
        &lines,
        "✗ model",
        &[
            &shard(1),
            "28 bytes of the 1740651802",
            "download this file again",
        ],
    );
    says(&lines, "✗ model", &["git-LFS", &shard(3)]);
    says(&lines, "! model", &["not finished", &(shard(4) + ".aria2")]);
    // A file of another name has no published size.
    fs::write(model.join("pytorch_model.bin"), b"PK\x03\x04").unwrap();
    let (lines, _) = of_model(&model);
    says(
        &lines,
        "✗ model",
        &["pytorch_model.bin", "download this file again"],
    );
}

#[test]
fn a_cut_off_file_and_a_folder_of_another_size_are_told() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    let path = model.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let (lines, code) = of_model(&model);
    assert_eq!(code, 1);
    says(
        &lines,
        "✗ model",
        &["model.safetensors", "download this file again"],
    );
    fs::write(&path, &whole).unwrap();
    change_config(&model, |config| {
        config["num_layers"] = 7.into();
    });
    let (lines, code) = of_model(&model);
    assert_eq!(code, 1);
    says(
        &lines,
        "✗ weights",
        &["missing transformer.layers.4", "same model"],
    );
    fs::remove_file(&path).unwrap();
    let (lines, code) = of_model(&model);
    assert_eq!(code, 1);
    says(&lines, "✗ weights", &["no weights"]);
}

#[test]
fn other_models_and_other_files_are_told() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    let config = fs::read(model.join("config.json")).unwrap();
    change_config(&model, |config| {
        config.insert("padded_vocab_size".into(), 65_024.into());
    });
    let (lines, code) = of_model(&model);
    assert_eq!(code, 1);
    says(&lines, "✗ model", &["ChatGLM2, ChatGLM3 and GLM-4"]);
    fs::write(model.join("config.json"), &config).unwrap();
    change_config(&model, |config| {
        config["model_type"] = "glm".into();
    });
    let (lines, _) = of_model(&model);
    says(&lines, "✗ model", &["model_type \"glm\"", "ChatGLM-6B"]);
    fs::remove_file(model.join("config.json")).unwrap();
    let (lines, _) = of_model(&model);
    says(&lines, "✗ model", &["no config.json", "download"]);
    fs::write(model.join("adapter_config.json"), "{}").unwrap();
    let (lines, _) = of_model(&model);
    says(&lines, "✗ model", &["this is an adapter", "--adapter"]);
    for (name, bytes, part) in [
        ("a.gguf", &b"GGUF\x03"[..], "a GGUF file"),
        ("a.bin", &b"ggml\x01"[..], "a GGML file for chatglm.cpp"),
        ("a.txt", &b"hello"[..], "a file; expected: a model folder"),
    ] {
        let path = place.path(name);
        fs::write(&path, bytes).unwrap();
        let (lines, code) = of_model(&path);
        assert_eq!(code, 1);
        says(&lines, "✗ model", &[name, part]);
    }
    let (lines, code) = of_model(&place.path("nowhere"));
    assert_eq!(code, 1);
    says(&lines, "✗ model", &["nothing there", "check the path"]);
}

#[test]
fn a_tokenizer_of_another_vocabulary_is_told() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    change_config(&model, |config| {
        let other = config["gmask_token_id"].as_u64().unwrap() - 7;
        config["gmask_token_id"] = other.into();
    });
    let (lines, code) = of_model(&model);
    assert_eq!(code, 1);
    says(&lines, "✗ tokenizer", &["gmask_token_id", "of one revision"]);
    fs::write(model.join("ice_text.model"), b"not a SentencePiece model").unwrap();
    let (lines, code) = of_model(&model);
    assert_eq!(code, 1);
    says(&lines, "✗ tokenizer", &["ice_text.model"]);
    fs::remove_file(model.join("ice_text.model")).unwrap();
    let (lines, code) = of_model(&model);
    assert_eq!(code, 1);
    says(&lines, "✗ tokenizer", &["no ice_text.model", "download"]);
    says(&lines, "weights   ", &["complete"]);
}

#[test]
fn copies_in_four_bits_are_whole_broken_or_of_other_weights() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    open_or_quantize(&model, None, QuantType::Nf4, true, &mut |_, _, _| Ok(())).unwrap();
    let (lines, code) = of_model(&model);
    assert_eq!(code, 0);
    stops_nothing(&lines);
    says(&lines, "4 bits    ", &["nf4-cache", "a copy in nf4"]);
    let copy = model.join("nf4-cache/model.safetensors");
    let whole = fs::read(&copy).unwrap();
    fs::write(&copy, &whole[..whole.len() - 100]).unwrap();
    let (lines, code) = of_model(&model);
    assert_eq!(code, 0, "a run makes it again: {lines:#?}");
    says(&lines, "! 4 bits", &["nf4-cache", "delete that folder"]);
    fs::write(&copy, &whole).unwrap();
    rewrite_weights(&model, DType::F32);
    let (lines, code) = of_model(&model);
    assert_eq!(code, 0);
    says(&lines, "! 4 bits", &["of other weights", "makes it again"]);
    fs::write(model.join("nf4-cache/glmtune.json"), "{").unwrap();
    let (lines, _) = of_model(&model);
    says(&lines, "! 4 bits", &["glmtune.json", "delete that folder"]);
}

#[test]
fn what_stopped_programs_left_behind_is_told() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    fs::create_dir(place.path(".merged.partial")).unwrap();
    fs::create_dir(model.join(".nf4-cache.partial")).unwrap();
    let (lines, code) = of_model(&model);
    assert_eq!(code, 0);
    says(&lines, "! model", &[".merged.partial", "remove them"]);
    says(&lines, "! model", &[".nf4-cache.partial"]);
}

/// An adapter of a toy model of this width, saved into `dir`.
fn toy_adapter(dir: &Path) {
    let config = ModelConfig {
        hidden_size: 16,
        inner_hidden_size: 32,
        num_layers: 1,
        num_attention_heads: 2,
        vocab_size: 1000,
        bos_token_id: 990,
        eos_token_id: 991,
        mask_token_id: 992,
        gmask_token_id: 993,
        ..ModelConfig::chatglm_6b()
    };
    let mut model = Model::initialize(&config, 1, &LoadOptions::default()).unwrap();
    let tuning = Tuning::Lora(LoraConfig::default());
    tune::apply(&mut model, &tuning, 1).unwrap();
    tune::save(&model, &tuning, Path::new("base"), dir).unwrap();
}

#[test]
fn an_adapter_is_looked_at_beside_its_base() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    succeeds(&place.train("run", &["--max-steps", "2"]).output().unwrap());
    let run = place.path("run");
    let of_adapter = |adapter: &Path| of(&["--model", str(&model), "--adapter", str(adapter)]);
    let (lines, code) = of_adapter(&run);
    assert_eq!(code, 0, "{lines:#?}");
    stops_nothing(&lines);
    says(&lines, "adapter   ", &["LoRA of rank 4"]);
    says(&lines, "adapter   ", &["has its place in the base"]);
    says(&lines, "adapter   ", &["are those that it was trained on"]);
    // Without a model, what can be said is said.
    let (lines, code) = of(&["--adapter", str(&run)]);
    assert_eq!(code, 0);
    says(&lines, "adapter   ", &["LoRA of rank 4"]);

    let other = place.path("other");
    toy_adapter(&other);
    let (lines, code) = of_adapter(&other);
    assert_eq!(code, 1);
    says(&lines, "✗ adapter", &["another base model"]);

    let toml = fs::read_to_string(run.join("run.toml")).unwrap();
    let gone = place.path("gone");
    let merged = format!("merge_adapters = [{:?}]", str(&gone));
    assert!(toml.contains("merge_adapters = []"), "{toml}");
    fs::write(run.join("run.toml"), toml.replace("merge_adapters = []", &merged)).unwrap();
    let (lines, code) = of_adapter(&run);
    assert_eq!(code, 1);
    says(&lines, "✗ adapter", &["not there", "gone", "put them back"]);
    fs::write(run.join("run.toml"), &toml).unwrap();

    // The same sizes, other weights.
    rewrite_weights(&model, DType::F32);
    let (lines, code) = of_adapter(&run);
    assert_eq!(code, 0, "a warning: {lines:#?}");
    says(&lines, "! adapter", &["are not those that it was trained on"]);

    fs::write(run.join("adapter_model.safetensors"), POINTER).unwrap();
    let (lines, code) = of_adapter(&run);
    assert_eq!(code, 1);
    says(&lines, "✗ adapter", &["git-LFS", "adapter_model.safetensors"]);
    let (lines, code) = of_adapter(&place.path("nowhere"));
    assert_eq!(code, 1);
    says(&lines, "✗ adapter", &["no folder", "check the path"]);
}

#[test]
fn records_are_looked_at_line_by_line() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    let file = |name: &str, content: &str| -> PathBuf {
        let path = place.path(name);
        fs::write(&path, content).unwrap();
        path
    };
    let of_data = |path: &Path| of(&["--model", str(&model), "--data", str(path)]);
    let broken = file(
        "broken.jsonl",
        "{\"q\": \"1\", \"a\": \"2\"}\n{\"q\": \"1\", \"a\"\n",
    );
    let (lines, code) = of_data(&broken);
    assert_eq!(code, 1);
    says(&lines, "✗ data", &["broken.jsonl:2"]);
    let long = "很长的回答".repeat(600);
    let long = file("long.jsonl", &format!("{{\"q\": \"1\", \"a\": \"{long}\"}}\n"));
    let (lines, code) = of_data(&long);
    assert_eq!(code, 0, "{lines:#?}");
    says(
        &lines,
        "! data",
        &["1 of 1 records", "long.jsonl:1", "--max-length"],
    );
    let special = file("special.jsonl", "{\"q\": \"a <sop> b\", \"a\": \"2\"}\n");
    let (lines, _) = of_data(&special);
    says(&lines, "! data", &["<sop>", "special.jsonl:1"]);
    let columns = file("columns.jsonl", "{\"x\": \"1\"}\n");
    let (lines, code) = of_data(&columns);
    assert_eq!(code, 1);
    says(&lines, "✗ data", &["columns x"]);
    let pointer = file("pointer.json", POINTER);
    let (lines, code) = of_data(&pointer);
    assert_eq!(code, 1);
    says(&lines, "✗ data", &["git-LFS"]);
}

#[test]
fn one_finding_never_hides_the_next_and_what_stops_comes_first() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    fs::write(model.join("model.safetensors"), POINTER).unwrap();
    fs::remove_file(model.join("ice_text.model")).unwrap();
    fs::create_dir(place.path(".merged.partial")).unwrap();
    fs::write(place.data(), "{").unwrap();
    let (model, data, adapter) = (place.model(), place.data(), place.path("nowhere"));
    let output = doctor(&[
        "--model",
        str(&model),
        "--data",
        str(&data),
        "--adapter",
        str(&adapter),
    ]);
    let lines: Vec<String> = text(&output.stdout).lines().map(String::from).collect();
    says(&lines, "✗ model", &["git-LFS"]);
    says(&lines, "✗ tokenizer", &["ice_text.model"]);
    says(&lines, "✗ data", &["data.json"]);
    says(&lines, "✗ adapter", &["nowhere"]);
    says(&lines, "! model", &[".merged.partial"]);
    says(&lines, "program", &["glmtune"]);
    let rank = |line: &String| match line.chars().next() {
        Some('✗') => 0,
        Some('!') => 1,
        _ => 2,
    };
    assert!(lines.iter().map(rank).is_sorted(), "{lines:#?}");
    let line = program::fails(&output, 1);
    assert!(line.contains("4 things that stop a run"), "{line}");
    // The folder is as it was: the doctor only looks.
    assert!(Checkpoint::open(&model).is_err());
}
