//! Folders in few bits that are broken or mixed up: one line each that names what is wrong.

use std::path::Path;

use glmtune::checkpoint::{Checkpoint, Source};
use glmtune::model::config::ModelConfig;
use glmtune::model::{LoadOptions, Model};
use glmtune::tensor::{DType, Tensor};
use serde_json::{Value, json};

use crate::folders::{self, Layout, Tensors, keys, toy};

const QKV: &str = "transformer.layers.0.attention.query_key_value";

/// Loads a folder of `tensors` with these keys in its configuration; the one line of its refusal.
#[track_caller]
fn refused(config: &ModelConfig, keys: &Value, tensors: &Tensors, parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    folders::write(dir.path(), config, keys, tensors);
    let error = load(dir.path()).expect_err("it is refused");
    for part in parts {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
    assert!(error.lines().count() == 1 && error.len() < 2000, "{error}");
}

fn load(dir: &Path) -> Result<Model, String> {
    let checkpoint = Checkpoint::open(dir).map_err(|error| error.to_string())?;
    Model::load(&checkpoint, &LoadOptions::default()).map_err(|error| error.to_string())
}

fn changed(layout: Layout, change: impl FnOnce(&mut Tensors)) -> Tensors {
    let (mut tensors, _) = folders::model(layout, &toy());
    change(&mut tensors);
    tensors
}

#[test]
fn scales_that_are_missing_broken_or_of_another_shape() {
    for (layout, suffix) in [
        (Layout::ThudmInt8, "weight_scale"),
        (Layout::ThudmInt4, "weight_scale"),
        (Layout::BnbInt8, "SCB"),
    ] {
        let scales = format!("{QKV}.{suffix}");
        let broken = |parts: &[&str], change: &dyn Fn(&mut Tensors)| {
            let tensors = changed(layout, change);
            refused(
                &toy(),
                &keys(layout),
                &tensors,
                &[parts, &[scales.as_str()]].concat(),
            );
        };
        broken(&["missing", "[192]"], &|t| drop(t.remove(&scales)));
        for bad in [f32::NAN, f32::INFINITY] {
            broken(&["[7]", "NaN or infinity"], &|t| {
                let mut values = t[&scales].to_dtype(DType::F32);
                values.as_mut_slice::<f32>()[7] = bad;
                t.insert(scales.clone(), values.to_dtype(t[&scales].dtype()));
            });
        }
        for shape in [vec![191], vec![193], vec![192, 1], vec![1]] {
            broken(&["instead of floats [192]"], &|t| {
                t.insert(
                    scales.clone(),
                    Tensor::zeros(t[&scales].dtype(), shape.as_slice()),
                );
            });
        }
        broken(&["int64", "instead of floats"], &|t| {
            t.insert(scales.clone(), Tensor::zeros(DType::I64, [192]));
        });
    }
}

#[test]
fn codes_that_are_missing_or_of_another_shape() {
    let weight = format!("{QKV}.weight");
    for (layout, columns) in [
        (Layout::ThudmInt8, 64),
        (Layout::ThudmInt4, 32),
        (Layout::BnbInt8, 64),
    ] {
        let broken = |parts: &[&str], change: &dyn Fn(&mut Tensors)| {
            refused(
                &toy(),
                &keys(layout),
                &changed(layout, change),
                &[parts, &[weight.as_str()]].concat(),
            );
        };
        broken(&["missing"], &|t| drop(t.remove(&weight)));
        let right = format!("instead of codes int8 [192, {columns}]");
        for shape in [[191, columns], [192, columns - 1], [columns, 192]] {
            broken(&[&right], &|t| {
                drop(t.insert(weight.clone(), Tensor::zeros(DType::I8, shape)))
            });
        }
        broken(&[&right, "uint8"], &|t| {
            drop(t.insert(weight.clone(), Tensor::zeros(DType::U8, [192, columns])))
        });
    }
}

#[test]
fn a_configuration_of_other_weights() {
    let all = [Layout::ThudmInt8, Layout::ThudmInt4, Layout::BnbInt8];
    for weights in all {
        let (tensors, _) = folders::model(weights, &toy());
        let found = match weights {
            Layout::ThudmInt8 => ["THUDM's int8", "it has quantization_bit 8"],
            Layout::ThudmInt4 => ["THUDM's int4", "it has quantization_bit 4"],
            Layout::BnbInt8 => ["bitsandbytes' 8 bits", "load_in_8bit"],
        };
        for says in all.into_iter().filter(|&says| says != weights) {
            refused(&toy(), &keys(says), &tensors, &found);
        }
        refused(&toy(), &json!({}), &tensors, &found);
        let four_bits =
            json!({ "quantization_config": { "load_in_4bit": true, "bnb_4bit_quant_type": "nf4" } });
        refused(&toy(), &four_bits, &tensors, &found);
        // Floats under the configuration of a quantised model: as a P-Tuning folder of THUDM's has it.
        let parts = ["7 other linears", "in floats", "neither quantization_bit nor"];
        refused(&toy(), &keys(weights), &folders::dense(&toy()), &parts);
    }
    // Some of one, some of another.
    let (int4, _) = folders::model(Layout::ThudmInt4, &toy());
    let mixed = changed(Layout::ThudmInt8, |t| {
        let part = int4
            .into_iter()
            .filter(|(name, _)| name.contains("layers.1.mlp") && !name.contains("bias"));
        t.extend(part);
    });
    let parts = [
        "layers.1.mlp.dense_h_to_4h.weight",
        "1 other linears",
        "THUDM's int4",
        "all linears in THUDM's int8",
    ];
    refused(&toy(), &keys(Layout::ThudmInt8), &mixed, &parts);
}

#[test]
fn bits_and_layouts_that_nobody_writes() {
    let (tensors, _) = folders::model(Layout::ThudmInt4, &toy());
    for bits in [
        json!(3),
        json!(2),
        json!(16),
        json!(-4),
        json!("4"),
        json!(4.5),
        json!(true),
    ] {
        let parts = ["config.json", "quantization_bit", "4 or 8"];
        refused(&toy(), &json!({ "quantization_bit": bits }), &tensors, &parts);
    }
    let parts = ["quantization_embeddings true", "chatglm-6b-int4"];
    refused(
        &toy(),
        &json!({ "quantization_bit": 4, "quantization_embeddings": true }),
        &tensors,
        &parts,
    );
    let both = json!({ "quantization_bit": 4, "quantization_config": { "load_in_4bit": true } });
    refused(
        &toy(),
        &both,
        &tensors,
        &["quantization_bit 4 and quantization_config", "one of them"],
    );
    let config = json!({ "quantization_config": { "quant_method": "gptq", "load_in_8bit": true } });
    refused(&toy(), &config, &tensors, &["gptq", "bitsandbytes"]);

    let mut odd = toy();
    (odd.hidden_size, odd.inner_hidden_size) = (48, 96);
    let (tensors, _) = folders::model(Layout::ThudmInt4, &odd);
    let parts = ["[144, 48]", "a multiple of 64 inputs", "int8"];
    refused(&odd, &keys(Layout::ThudmInt4), &tensors, &parts);

    let other_order = changed(Layout::BnbInt8, |t| {
        t.insert(format!("{QKV}.weight_format"), Tensor::from_slice(&[2u8], [1]));
    });
    refused(
        &toy(),
        &keys(Layout::BnbInt8),
        &other_order,
        &["weight_format [2]", "order of rows"],
    );
    let foreign = changed(Layout::ThudmInt8, |t| {
        drop(t.insert(format!("{QKV}.SCB"), Tensor::zeros(DType::F32, [192])))
    });
    refused(
        &toy(),
        &keys(Layout::ThudmInt8),
        &foreign,
        &[&format!("{QKV}.weight"), "bitsandbytes' 8 bits"],
    );
    let extra = changed(Layout::ThudmInt8, |t| {
        t.insert(
            "transformer.word_embeddings.weight_scale".into(),
            Tensor::zeros(DType::F16, [96]),
        );
    });
    refused(
        &toy(),
        &keys(Layout::ThudmInt8),
        &extra,
        &["extra transformer.word_embeddings.weight_scale [96]"],
    );
    let embedding = changed(Layout::ThudmInt8, |t| {
        t.insert(
            "transformer.word_embeddings.weight".into(),
            Tensor::zeros(DType::I8, [96, 64]),
        );
    });
    refused(
        &toy(),
        &keys(Layout::ThudmInt8),
        &embedding,
        &["word_embeddings.weight of int8 instead of float16"],
    );
}

/// 4 bits of bitsandbytes with another block than the kernels have, or of another shape than the configuration.
#[test]
fn four_bits_of_another_block_or_shape() {
    let weight = format!("{QKV}.weight");
    let keys = json!({ "quantization_config": { "quant_method": "bitsandbytes", "load_in_4bit": true,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false } });
    let mut tensors = Tensors::new();
    for (name, tensor) in folders::dense(&toy()) {
        if folders::is_linear(&name) {
            let weight =
                glmtune::quant::QuantTensor::quantize(&tensor, glmtune::quant::QuantType::Nf4, false)
                    .unwrap();
            tensors.extend(weight.to_bnb(&name));
        } else {
            tensors.insert(name, tensor);
        }
    }
    let state = format!("{weight}.quant_state.bitsandbytes__nf4");
    let text = String::from_utf8(tensors[&state].bytes().to_vec()).unwrap();
    for (from, to, part) in [
        ("\"blocksize\": 64", "\"blocksize\": 128", "blocksize 128"),
        ("[192, 64]", "[64, 192]", "[64, 192]"),
    ] {
        let other = text.replace(from, to);
        assert_ne!(other, text);
        let mut tensors = tensors.clone();
        tensors.insert(state.clone(), Tensor::from_slice(other.as_bytes(), [other.len()]));
        refused(&toy(), &keys, &tensors, &[part, &weight]);
    }
    let dir = tempfile::tempdir().unwrap();
    folders::write(dir.path(), &toy(), &keys, &tensors);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.weight(&weight).unwrap();
    tensors.insert(weight.clone(), Tensor::zeros(DType::BF16, [192 * 64 / 2, 1]));
    refused(&toy(), &keys, &tensors, &[&weight, "6144 bytes of 4-bit codes"]);
}
