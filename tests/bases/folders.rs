//! Model folders as THUDM and bitsandbytes write them, quantised here from the definition and not by the crate.
#![allow(dead_code, missing_docs)]

use std::collections::BTreeMap;
use std::path::Path;

use glmtune::checkpoint::{write_safetensors, write_torch_bin};
use glmtune::model::ModelConfig;
use glmtune::rng::Stream;
use glmtune::tensor::{DType, Shape, Tensor};
use half::f16;
use serde_json::{Value, json};

pub type Tensors = BTreeMap<String, Tensor>;

/// Layouts of linears in few bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    ThudmInt8,
    ThudmInt4,
    BnbInt8,
}

pub const LAYOUTS: [Layout; 3] = [Layout::ThudmInt8, Layout::ThudmInt4, Layout::BnbInt8];

pub fn toy() -> ModelConfig {
    ModelConfig {
        vocab_size: 96,
        hidden_size: 64,
        inner_hidden_size: 128,
        num_layers: 2,
        num_attention_heads: 4,
        max_sequence_length: 64,
        pad_token_id: 3,
        bos_token_id: 90,
        eos_token_id: 91,
        mask_token_id: 92,
        gmask_token_id: 93,
        ..ModelConfig::chatglm_6b()
    }
}

pub fn is_linear(name: &str) -> bool {
    let ends = [
        "query_key_value",
        "attention.dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    ];
    ends.iter().any(|end| name.ends_with(&format!("{end}.weight")))
}

/// Random float16 weights, some rows of them small, the head that of the embedding.
pub fn dense(config: &ModelConfig) -> Tensors {
    let mut tensors = Tensors::new();
    for (number, (name, shape)) in config.tensors().into_iter().enumerate() {
        let stream = Stream::new(11, number as u64);
        let (_, columns) = shape.rows_and_columns();
        let value = |i: u64| match (name.ends_with("layernorm.weight"), shape.extents().len()) {
            (true, _) => 1.0 + 0.1 * stream.normal(i),
            (_, 1) => 0.05 * stream.normal(i),
            _ => {
                stream.normal(i)
                    * if (i as usize / columns).is_multiple_of(5) {
                        0.002
                    } else {
                        0.08
                    }
            }
        };
        let values: Vec<f32> = (0..shape.elements() as u64).map(value).collect();
        tensors.insert(name, Tensor::from_slice(&values, shape).to_dtype(DType::F16));
    }
    tensors.insert(
        "lm_head.weight".into(),
        tensors["transformer.word_embeddings.weight"].clone(),
    );
    tensors
}

/// One matrix in whole numbers: what is stored beside its name, and the numbers it stands for, F32.
pub fn quantized(layout: Layout, name: &str, w: &Tensor) -> (Vec<(String, Tensor)>, Tensor) {
    let module = name.strip_suffix(".weight").unwrap();
    let (rows, columns) = w.shape().rows_and_columns();
    let (mut codes, mut scales, mut decoded) = (Vec::new(), Vec::new(), Vec::new());
    for row in w.to_f64_vec().chunks(columns) {
        let largest = row.iter().fold(0f64, |a, x| a.max(x.abs()));
        let most = if layout == Layout::ThudmInt4 { 7.0 } else { 127.0 };
        let scale = match layout {
            Layout::BnbInt8 => largest / 127.0,
            _ => f16::from_f64(largest / most).to_f64(),
        };
        let mut row: Vec<i8> = row.iter().map(|x| (x / scale).round_ties_even() as i8).collect();
        if layout == Layout::ThudmInt4 {
            // The one code that no quantiser makes, but the format has.
            row[codes.len() % columns] = -8;
        }
        match layout {
            // As bitsandbytes has it: with 1 / 127 at last.
            Layout::BnbInt8 => {
                decoded.extend(row.iter().map(|&q| f32::from(q) * largest as f32 * 0.007_874_016))
            }
            _ => decoded.extend(row.iter().map(|&q| f32::from(q) * scale as f32)),
        }
        scales.push(if layout == Layout::BnbInt8 { largest } else { scale });
        match layout {
            Layout::ThudmInt4 => codes.extend(row.chunks(2).map(|q| q[0] << 4 | (q[1] & 15))),
            _ => codes.extend(row),
        }
    }
    let scales = Tensor::from_slice(&scales, [rows]);
    let mut tensors = vec![(
        name.to_string(),
        Tensor::from_slice(&codes, [rows, codes.len() / rows]),
    )];
    match layout {
        Layout::BnbInt8 => {
            tensors.push((format!("{module}.SCB"), scales.to_dtype(DType::F32)));
            tensors.push((
                format!("{module}.weight_format"),
                Tensor::from_slice(&[0u8], Shape::new(&[])),
            ));
        }
        _ => tensors.push((format!("{module}.weight_scale"), scales.to_dtype(DType::F16))),
    }
    (tensors, Tensor::from_slice(&decoded, [rows, columns]))
}

/// All tensors of a folder, and those of the same model in floats.
pub fn model(layout: Layout, config: &ModelConfig) -> (Tensors, Tensors) {
    let (mut stored, mut floats) = (Tensors::new(), Tensors::new());
    for (name, tensor) in dense(config) {
        if is_linear(&name) {
            let (tensors, decoded) = quantized(layout, &name, &tensor);
            stored.extend(tensors);
            floats.insert(name, decoded);
        } else {
            stored.insert(name.clone(), tensor.clone());
            floats.insert(name, tensor);
        }
    }
    (stored, floats)
}

/// The keys of `config.json` that tell a layout.
pub fn keys(layout: Layout) -> Value {
    match layout {
        Layout::ThudmInt8 => json!({ "quantization_bit": 8, "quantization_embeddings": false }),
        Layout::ThudmInt4 => json!({ "quantization_bit": 4, "quantization_embeddings": false }),
        Layout::BnbInt8 => json!({ "quantization_config": {
            "_load_in_4bit": false, "_load_in_8bit": true, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": false, "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false, "llm_int8_skip_modules": null, "llm_int8_threshold": 6.0,
            "load_in_4bit": false, "load_in_8bit": true, "quant_method": "bitsandbytes" } }),
    }
}

/// Adds `keys` to `config.json` of `dir`.
pub fn set_keys(dir: &Path, keys: &Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config
        .as_object_mut()
        .unwrap()
        .extend(keys.as_object().unwrap().clone());
    std::fs::write(&path, config.to_string()).unwrap();
}

fn borrowed(tensors: &Tensors) -> Vec<(String, &Tensor)> {
    tensors
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor))
        .collect()
}

/// Writes a folder with one safetensors file.
pub fn write(dir: &Path, config: &ModelConfig, keys: &Value, tensors: &Tensors) {
    std::fs::create_dir_all(dir).unwrap();
    config.write(dir).unwrap();
    set_keys(dir, keys);
    write_safetensors(
        &dir.join("model.safetensors"),
        &borrowed(tensors),
        &Default::default(),
    )
    .unwrap();
}

/// Writes a folder with torch `.bin` shards: codes and scales of a weight may lie in two of them.
pub fn write_bin_shards(dir: &Path, config: &ModelConfig, keys: &Value, tensors: &Tensors, shards: usize) {
    std::fs::create_dir_all(dir).unwrap();
    config.write(dir).unwrap();
    set_keys(dir, keys);
    let mut map = serde_json::Map::new();
    for shard in 0..shards {
        let file = format!("pytorch_model-{:05}-of-{shards:05}.bin", shard + 1);
        let all = tensors.iter().enumerate().filter(|(i, _)| i % shards == shard);
        let part: Tensors = all
            .map(|(_, (name, tensor))| (name.clone(), tensor.clone()))
            .collect();
        map.extend(part.keys().map(|name| (name.clone(), json!(file))));
        write_torch_bin(&dir.join(&file), &borrowed(&part)).unwrap();
    }
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": map });
    std::fs::write(dir.join("pytorch_model.bin.index.json"), index.to_string()).unwrap();
}

/// The folder of a layout and that of the same model in floats, both in `root`.
pub fn pair(root: &Path, layout: Layout) -> [std::path::PathBuf; 2] {
    let config = toy();
    let (stored, floats) = model(layout, &config);
    let dirs = [
        root.join(format!("{layout:?}")),
        root.join(format!("{layout:?}-floats")),
    ];
    write(&dirs[0], &config, &keys(layout), &stored);
    write(&dirs[1], &config, &json!({}), &floats);
    dirs
}
