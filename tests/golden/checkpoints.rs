//! Checkpoints and adapters of the golden set: names, types, shapes and values.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use glmtune::checkpoint::{
    Checkpoint, LM_HEAD, read_adapter, read_tensors, write_adapter, write_safetensors, write_torch_bin,
};
use glmtune::model::config::ModelConfig;
use glmtune::tensor::{DType, Tensor};

use crate::common;

fn same(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!((got.dtype(), got.shape()), (want.dtype(), want.shape()), "{what}");
    assert!(got.bytes() == want.bytes(), "{what}: values differ");
}

/// Equal as numbers, whatever the types.
fn same_values(what: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    common::assert_close(what, &got.to_f64_vec(), &want.to_f64_vec(), 0.0, 0.0);
}

#[test]
fn the_bin_shards_open_in_place_and_hold_the_names_and_shapes_of_the_config() {
    let Some(dir) = common::golden("chatglm_v1/checkpoint_fp16_bin") else {
        return;
    };
    let checkpoint = Checkpoint::open(&dir).unwrap();
    checkpoint.validate().unwrap();
    assert!(checkpoint.files().len() > 1);
    for (name, shape) in checkpoint.config().tensors() {
        let tensor = checkpoint.tensor(&name).unwrap();
        assert_eq!(
            (tensor.shape(), Some(tensor.dtype())),
            (shape, checkpoint.dtype(&name)),
            "{name}"
        );
        assert_eq!(tensor.owned_bytes(), 0, "{name} was copied");
        assert!(tensor.to_f64_vec().iter().all(|x| x.is_finite()), "{name}");
        assert!(checkpoint.place(&name).contains(&name));
    }
    assert!(
        !checkpoint.has_separate_head().unwrap(),
        "the head of this one equals the embedding"
    );
    let missing = checkpoint
        .tensor("transformer.layers.99.mlp")
        .unwrap_err()
        .to_string();
    assert!(missing.contains("transformer.layers.99.mlp"), "{missing}");
}

#[test]
fn bin_and_safetensors_hold_the_same_values() {
    let (Some(bin), Some(safe)) = (
        common::golden("chatglm_v1/checkpoint_fp16_bin"),
        common::golden("chatglm_v1/checkpoint_fp32_safetensors"),
    ) else {
        return;
    };
    let (bin, safe) = (Checkpoint::open(&bin).unwrap(), Checkpoint::open(&safe).unwrap());
    safe.validate().unwrap();
    assert_eq!(bin.config(), safe.config());
    let file = common::read_safetensors(&safe.files()[0]);
    let mut names: Vec<&str> = file.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(safe.names().collect::<Vec<_>>(), names);
    for (name, _) in bin.config().tensors() {
        if name == LM_HEAD && !safe.contains(LM_HEAD) {
            continue;
        }
        let tensor = safe.tensor(&name).unwrap();
        assert_eq!(tensor.dtype(), DType::F32, "{name}");
        same(&name, &tensor, &file[&name]);
        same_values(&name, &tensor, &bin.tensor(&name).unwrap());
    }
}

#[test]
fn a_separate_head_is_seen() {
    let Some(dir) = common::golden("chatglm_v1/checkpoint_untied_fp16_safetensors") else {
        return;
    };
    let checkpoint = Checkpoint::open(&dir).unwrap();
    checkpoint.validate().unwrap();
    assert!(checkpoint.has_separate_head().unwrap());
    if let Some(bin) = common::golden("chatglm_v1/checkpoint_fp16_bin") {
        let bin = Checkpoint::open(&bin).unwrap();
        for (name, _) in bin.config().tensors().iter().filter(|(name, _)| name != LM_HEAD) {
            same_values(
                name,
                &checkpoint.tensor(name).unwrap(),
                &bin.tensor(name).unwrap(),
            );
        }
    }
}

#[test]
fn a_bitsandbytes_folder_is_understood() {
    let Some(dir) = common::golden("nf4/chatglm_v1_bnb_nf4_double") else {
        return;
    };
    let checkpoint = Checkpoint::open(&dir).unwrap();
    checkpoint.validate().unwrap();
    let quantisation = checkpoint
        .config()
        .quantization_config
        .as_ref()
        .expect("quantization_config");
    assert_eq!(
        (quantisation.quant_type.as_str(), quantisation.use_double_quant),
        ("nf4", true)
    );

    // Without one of its parts it is not.
    let part = "transformer.layers.0.mlp.dense_h_to_4h.weight.nested_absmax";
    let folder = tempfile::tempdir().unwrap();
    checkpoint.config().write(folder.path()).unwrap();
    let tensors: Vec<_> = checkpoint
        .names()
        .filter(|name| *name != part)
        .map(|name| (name.to_string(), checkpoint.tensor(name).unwrap()))
        .collect();
    let borrowed: Vec<_> = tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
    write_safetensors(
        &folder.path().join("model.safetensors"),
        &borrowed,
        &BTreeMap::new(),
    )
    .unwrap();
    let broken = Checkpoint::open(folder.path()).unwrap();
    assert_eq!(broken.config(), checkpoint.config(), "config.json as written");
    let message = broken.validate().unwrap_err().to_string();
    assert!(message.contains(&format!("missing {part}")), "{message}");
}

#[test]
fn other_architectures_are_refused_in_one_line() {
    for folder in [
        "chatglm2/checkpoint_fp16_bin",
        "chatglm3/checkpoint_fp16_bin",
        "glm4/checkpoint",
    ] {
        let Some(dir) = common::golden(folder) else {
            continue;
        };
        let message = Checkpoint::open(&dir).unwrap_err().to_string();
        assert!(
            message.contains("config.json") && message.contains("ChatGLM-6B"),
            "{message}"
        );
        assert!(!message.contains('\n'));
    }
}

/// Every folder below `dir` with an `adapter_config.json`.
fn adapters(dir: &Path, out: &mut Vec<PathBuf>) {
    if dir.join("adapter_config.json").exists() {
        out.push(dir.to_path_buf());
    }
    let mut entries: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    entries.sort();
    entries
        .iter()
        .filter(|path| path.is_dir())
        .for_each(|path| adapters(path, out));
}

#[test]
fn every_adapter_loads_and_survives_writing() {
    let mut folders = Vec::new();
    adapters(&common::goldens(), &mut folders);
    assert!(!folders.is_empty(), "this golden set has no adapters");
    for folder in folders {
        let (config, tensors) = read_adapter(&folder).unwrap_or_else(|e| panic!("{e}"));
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!(json["r"], config.r);
        assert_eq!(json["lora_alpha"].as_f64(), Some(config.lora_alpha));
        assert_eq!(json["target_modules"], serde_json::json!(config.target_modules));
        let file = common::read_safetensors(&folder.join("adapter_model.safetensors"));
        assert_eq!(tensors.len(), file.len());
        for (name, tensor) in &tensors {
            same(name, tensor, &file[name]);
        }
        // PEFT's older file holds the same.
        if folder.join("adapter_model.bin").exists() {
            let bin = read_tensors(&folder.join("adapter_model.bin")).unwrap();
            assert_eq!(bin.len(), file.len());
            bin.iter()
                .for_each(|(name, tensor)| same(name, tensor, &file[name]));
            let only_bin = tempfile::tempdir().unwrap();
            for name in ["adapter_config.json", "adapter_model.bin"] {
                std::fs::copy(folder.join(name), only_bin.path().join(name)).unwrap();
            }
            assert_eq!(read_adapter(only_bin.path()).unwrap().1.len(), file.len());
        }
        let out = tempfile::tempdir().unwrap();
        let borrowed: Vec<_> = tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
        write_adapter(out.path(), &config, &borrowed).unwrap();
        let (again, reread) = read_adapter(out.path()).unwrap();
        assert_eq!(again, config);
        tensors
            .iter()
            .for_each(|(name, tensor)| same(name, &reread[name], tensor));
    }
}

#[test]
fn written_files_read_back_and_are_mapped_in_place() {
    let Some(dir) = common::golden("chatglm_v1/checkpoint_fp16_bin") else {
        return;
    };
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let mut tensors: Vec<_> = checkpoint
        .names()
        .map(|name| (name.to_string(), checkpoint.tensor(name).unwrap()))
        .collect();
    // Sizes that would put the next tensor on an odd address.
    tensors.push(("odd".into(), Tensor::from_slice(&[1u8, 2, 3], [3])));
    tensors.push(("wide".into(), Tensor::from_slice(&[i64::MIN, 7], [2, 1])));
    tensors.push(("empty".into(), Tensor::zeros(DType::F32, [0, 4])));
    tensors.push(("scalar".into(), Tensor::from_slice(&[1.5f32], [])));
    let borrowed: Vec<_> = tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
    let out = tempfile::tempdir().unwrap();
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write_safetensors(&out.path().join("t.safetensors"), &borrowed, &metadata).unwrap();
    write_torch_bin(&out.path().join("t.bin"), &borrowed).unwrap();
    for name in ["t.safetensors", "t.bin"] {
        let read = read_tensors(&out.path().join(name)).unwrap();
        assert_eq!(read.len(), tensors.len());
        for (key, tensor) in &tensors {
            same(key, &read[key], tensor);
            assert_eq!(read[key].owned_bytes(), 0, "{name}: {key} was copied");
        }
    }
    // The crate's own reader, and the checksums of the zip crate.
    assert_eq!(
        common::read_safetensors(&out.path().join("t.safetensors")).len(),
        tensors.len()
    );
    let mut zip = zip::ZipArchive::new(std::fs::File::open(out.path().join("t.bin")).unwrap()).unwrap();
    for i in 0..zip.len() {
        let mut entry = zip.by_index(i).unwrap();
        let start = entry.data_start().unwrap();
        assert!(
            start.is_multiple_of(64),
            "{} starts at {start}",
            entry.name().unwrap()
        );
        std::io::copy(&mut entry, &mut std::io::sink()).unwrap();
    }
}

#[test]
fn a_config_survives_writing() {
    let Some(dir) = common::golden("chatglm_v1/checkpoint_fp16_bin") else {
        return;
    };
    let config = ModelConfig::read(&dir).unwrap();
    let out = tempfile::tempdir().unwrap();
    config.write(out.path()).unwrap();
    assert_eq!(ModelConfig::read(out.path()).unwrap(), config);
    let json = |dir: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
    };
    let (written, golden) = (json(out.path()), json(&dir));
    for (key, value) in golden
        .as_object()
        .unwrap()
        .iter()
        .filter(|(key, _)| *key != "transformers_version")
    {
        assert_eq!(&written[key], value, "{key}");
    }
}
