//! Model and adapter folders that are incomplete or contradict themselves.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use glmtune::checkpoint::{AdapterConfig, Checkpoint, read_adapter, write_adapter, write_safetensors};
use glmtune::cli::synth;
use glmtune::model::config::ModelConfig;
use glmtune::tensor::{DType, Tensor};

use crate::refused;

fn synth(dir: &Path, format: synth::Format) {
    synth::run(synth::SynthArgs {
        output: dir.to_path_buf(),
        vocab_size: 96,
        hidden_size: 16,
        inner_hidden_size: None,
        num_layers: 2,
        num_heads: 2,
        max_sequence_length: 64,
        shards: Some(3),
        format,
        dtype: DType::F16,
        seed: 5,
        tokenizer: None,
    })
    .unwrap();
}

/// A small sound checkpoint in three shards.
fn checkpoint(format: synth::Format) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    synth(&dir, format);
    (folder, dir)
}

#[test]
fn folders_and_shards_that_are_missing_or_contradict_the_index_are_named() {
    for (format, last, index) in [
        (
            synth::Format::Bin,
            "pytorch_model-00003-of-00003.bin",
            "pytorch_model.bin.index.json",
        ),
        (
            synth::Format::Safetensors,
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ),
    ] {
        let (_folder, dir) = checkpoint(format);
        Checkpoint::open(&dir).unwrap().validate().unwrap();
        let index_text = fs::read_to_string(dir.join(index)).unwrap();

        // A stale total size is no reason to complain: the published index has one.
        let mut json: serde_json::Value = serde_json::from_str(&index_text).unwrap();
        json["metadata"]["total_size"] = serde_json::json!(13_744_473_856u64);
        fs::write(dir.join(index), json.to_string()).unwrap();
        Checkpoint::open(&dir).unwrap().validate().unwrap();

        // The index promises a tensor that no shard has; puts one into the wrong shard; points outside.
        json["weight_map"]["transformer.layers.9.fancy.weight"] = serde_json::json!(last);
        fs::write(dir.join(index), json.to_string()).unwrap();
        refused(
            Checkpoint::open(&dir),
            &[index, "no transformer.layers.9.fancy.weight", last],
        );
        let mut json: serde_json::Value = serde_json::from_str(&index_text).unwrap();
        json["weight_map"]["transformer.word_embeddings.weight"] = serde_json::json!(last);
        fs::write(dir.join(index), json.to_string()).unwrap();
        refused(
            Checkpoint::open(&dir),
            &[
                "transformer.word_embeddings.weight",
                "-00001-of-00003",
                "instead of",
                last,
            ],
        );
        for outside in ["../secret.bin", "/etc/passwd", ".."] {
            json["weight_map"]["transformer.word_embeddings.weight"] = serde_json::json!(outside);
            fs::write(dir.join(index), json.to_string()).unwrap();
            refused(Checkpoint::open(&dir), &[index, outside, "same folder"]);
        }
        fs::write(dir.join(index), "{").unwrap();
        refused(Checkpoint::open(&dir), &[index]);
        fs::write(dir.join(index), &index_text).unwrap();

        let shard = fs::read(dir.join(last)).unwrap();
        fs::write(dir.join(last), &shard[..shard.len() / 2]).unwrap();
        refused(Checkpoint::open(&dir), &[last, "truncated"]);
        fs::remove_file(dir.join(last)).unwrap();
        refused(Checkpoint::open(&dir), &[last, "download the missing shards"]);
        fs::remove_file(dir.join(index)).unwrap();
        refused(Checkpoint::open(&dir), &["-00001-of-00003", "index"]);
    }
    let folder = tempfile::tempdir().unwrap();
    refused(
        Checkpoint::open(&folder.path().join("typo")),
        &["typo", "found nothing"],
    );
    refused(Checkpoint::open(folder.path()), &["config.json"]);
    ModelConfig::chatglm_6b().write(folder.path()).unwrap();
    refused(Checkpoint::open(folder.path()), &["no weights"]);
}

#[test]
fn every_missing_extra_and_mis_shaped_tensor_is_named_in_one_message() {
    let (_folder, dir) = checkpoint(synth::Format::Bin);
    let open = Checkpoint::open(&dir).unwrap();
    let mut tensors: Vec<(String, Tensor)> = open
        .names()
        .map(|name| (name.to_string(), open.tensor(name).unwrap()))
        .collect();
    let whole = tempfile::tempdir().unwrap();
    let write = |tensors: &[(String, Tensor)]| {
        open.config().write(whole.path()).unwrap();
        let borrowed: Vec<_> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        write_safetensors(
            &whole.path().join("model.safetensors"),
            &borrowed,
            &BTreeMap::new(),
        )
        .unwrap();
        Checkpoint::open(whole.path()).unwrap()
    };
    let sound = write(&tensors);
    sound.validate().unwrap();
    assert!(!sound.has_separate_head().unwrap());
    // Tied: the head may be missing.
    tensors.retain(|(name, _)| name != "lm_head.weight");
    write(&tensors).validate().unwrap();
    tensors.retain(|(name, _)| name != "transformer.layers.1.mlp.dense_4h_to_h.bias");
    tensors.push((
        "transformer.prefix_encoder.embedding.weight".into(),
        Tensor::zeros(DType::F32, [2, 2]),
    ));
    tensors.push((
        "transformer.layers.7.input_layernorm.weight".into(),
        Tensor::zeros(DType::F32, [16]),
    ));
    for (name, tensor) in &mut tensors {
        match name.as_str() {
            "transformer.layers.0.attention.dense.weight" => *tensor = Tensor::zeros(DType::F16, [16, 15]),
            "transformer.final_layernorm.bias" => *tensor = Tensor::zeros(DType::I32, [16]),
            _ => {}
        }
    }
    refused(
        write(&tensors).validate(),
        &[
            "missing transformer.layers.1.mlp.dense_4h_to_h.bias [16]",
            "extra transformer.prefix_encoder.embedding.weight [2, 2]",
            "extra transformer.layers.7.input_layernorm.weight [16]",
            "transformer.layers.0.attention.dense.weight [16, 15] instead of [16, 16]",
            "transformer.final_layernorm.bias of int32",
            "2 layers",
        ],
    );
    refused(write(&tensors[..3]).validate(), &["missing", "more"]);
}

#[test]
fn configs_that_miss_keys_or_belong_to_other_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    ModelConfig::chatglm_6b().write(dir.path()).unwrap();
    assert_eq!(ModelConfig::read(dir.path()).unwrap(), ModelConfig::chatglm_6b());
    let sound: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let with = |key: &str, value: serde_json::Value| {
        let mut json = sound.clone();
        json[key] = value;
        fs::write(&path, json.to_string()).unwrap();
        ModelConfig::read(dir.path())
    };
    for key in [
        "vocab_size",
        "hidden_size",
        "inner_hidden_size",
        "num_layers",
        "num_attention_heads",
        "bos_token_id",
        "eos_token_id",
        "mask_token_id",
        "gmask_token_id",
        "pad_token_id",
        "layernorm_epsilon",
        "max_sequence_length",
    ] {
        let mut json = sound.clone();
        json.as_object_mut().unwrap().remove(key);
        fs::write(&path, json.to_string()).unwrap();
        refused(
            ModelConfig::read(dir.path()),
            &["config.json", &format!("no key {key}")],
        );
        refused(with(key, serde_json::json!("many")), &[key]);
        refused(with(key, serde_json::json!(1u64 << 60)), &[key]);
    }
    refused(
        with("model_type", serde_json::json!("llama")),
        &["llama", "ChatGLM-6B"],
    );
    refused(
        with("multi_query_attention", serde_json::json!(true)),
        &["ChatGLM2", "not supported yet"],
    );
    refused(
        with("quantization_bit", serde_json::json!(3)),
        &["quantization_bit 3", "4 or 8"],
    );
    with("quantization_bit", serde_json::json!(0)).unwrap();
    refused(
        with("quantization_config", serde_json::json!({"quant_method": "gptq"})),
        &["gptq"],
    );
    refused(
        with("num_attention_heads", serde_json::json!(33)),
        &["33 attention heads"],
    );
    refused(
        with("bos_token_id", serde_json::json!(130_528)),
        &["bos_token_id 130528", "below vocab_size"],
    );
    refused(with("vocab_size", serde_json::json!(0)), &["vocab_size 0"]);
    refused(
        with("position_encoding_2d", serde_json::json!(false)),
        &["position_encoding_2d"],
    );
    refused(
        with("layernorm_epsilon", serde_json::json!(-1)),
        &["layernorm_epsilon"],
    );
    fs::write(&path, "[]").unwrap();
    refused(ModelConfig::read(dir.path()), &["config.json", "a JSON object"]);
    fs::write(&path, b"{\"a\": \xff}").unwrap();
    refused(ModelConfig::read(dir.path()), &["config.json"]);
}

#[test]
fn adapters_of_other_kinds_and_broken_ones_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = AdapterConfig {
        base_model_name_or_path: Some("base".into()),
        r: 2,
        lora_alpha: 8.0,
        lora_dropout: 0.05,
        target_modules: vec!["query_key_value".into()],
        use_rslora: true,
        ..AdapterConfig::default()
    };
    let (a, b) = (
        Tensor::zeros(DType::F32, [2, 16]),
        Tensor::zeros(DType::F32, [48, 2]),
    );
    let stem = "base_model.model.transformer.layers.0.attention.query_key_value";
    let pair = [
        (format!("{stem}.lora_A.weight"), &a),
        (format!("{stem}.lora_B.weight"), &b),
    ];
    write_adapter(dir.path(), &config, &pair).unwrap();
    let (read, tensors) = read_adapter(dir.path()).unwrap();
    assert_eq!(read, config);
    assert_eq!(tensors.len(), 2);
    let path = dir.path().join("adapter_config.json");
    let sound: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in [
        ("use_dora", serde_json::json!("yes")),
        ("init_lora_weights", serde_json::json!("pissa_niter_16")),
        ("bias", serde_json::json!("all")),
        ("modules_to_save", serde_json::json!("lm_head")),
        ("rank_pattern", serde_json::json!({"dense": 0})),
        ("rank_pattern", serde_json::json!(["dense"])),
        ("rank_pattern", serde_json::json!({"(?=dense)": 2})),
        ("alpha_pattern", serde_json::json!({"dense": "4"})),
        ("layers_to_transform", serde_json::json!([-1])),
        ("layers_pattern", serde_json::json!("h")),
        ("enable_lora", serde_json::json!([true, false, true])),
        ("peft_type", serde_json::json!("IA3")),
        ("r", serde_json::json!(0)),
        ("target_modules", serde_json::json!("")),
        ("target_modules", serde_json::json!(".*mlp.*")),
        ("lora_alpha", serde_json::json!("big")),
    ] {
        let mut json = sound.clone();
        json[key] = value;
        fs::write(&path, json.to_string()).unwrap();
        refused(read_adapter(dir.path()), &["adapter_config.json", key]);
    }
    let dora = AdapterConfig {
        use_dora: true,
        ..config.clone()
    };
    write_adapter(dir.path(), &dora, &pair).unwrap();
    refused(
        read_adapter(dir.path()),
        &["its partner", "lora_magnitude_vector"],
    );
    write_adapter(dir.path(), &config, &pair[..1]).unwrap();
    refused(read_adapter(dir.path()), &["lora_A", "its partner", "lora_B"]);
    write_adapter(dir.path(), &config, &[]).unwrap();
    refused(read_adapter(dir.path()), &["no tensors at all"]);
    write_adapter(
        dir.path(),
        &AdapterConfig {
            r: 3,
            ..config.clone()
        },
        &pair,
    )
    .unwrap();
    refused(read_adapter(dir.path()), &["lora_A", "r 3"]);
    fs::remove_file(dir.path().join("adapter_model.safetensors")).unwrap();
    refused(
        read_adapter(dir.path()),
        &["adapter_model.safetensors or adapter_model.bin"],
    );
    refused(read_adapter(&dir.path().join("typo")), &["typo"]);
}
