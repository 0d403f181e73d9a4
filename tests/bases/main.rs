//! Checkpoints in few bits as other programs write them, as a base to train and to run: THUDM's int4 and int8, bitsandbytes' 8 and 4
//! bits.
//!
//! The folders are quantised here, from the definition (`folders.rs`); the reference is the model of the numbers that they stand for.

#[path = "../common/mod.rs"]
mod common;
mod folders;
#[path = "../common/program.rs"]
mod program;
mod refused;
mod runs;

use std::path::Path;

use common::{assert_close, exact_computes, half_computes, relative_l2, values};
use folders::{LAYOUTS, Layout, pair, toy};
use glmtune::checkpoint::{Checkpoint, Source, Stored};
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::model::tune::{self, LoraConfig, LoraInit, PrefixConfig, Tuning};
use glmtune::model::{HeadStorage, LoadOptions, Model};
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Device};
use serde_json::json;

fn batch() -> Batch {
    let len = 9;
    let ids: Vec<i32> = (0..2 * len).map(|i| (i * 17 + 5) % 90).collect();
    let mut labels = ids.clone();
    labels[..4].fill(IGNORE);
    let positions = (0..2 * len).flat_map(|i| [i % len, 0]).collect();
    let (size, len) = (2, len as usize);
    let spans = vec![Span { start: 0, context: 4 }; size];
    Batch {
        size,
        len,
        ids,
        labels,
        positions,
        spans,
    }
}

fn load(dir: &Path, compute: Compute) -> Model {
    load_as(dir, |options| options.compute = compute)
}

fn load_as(dir: &Path, change: impl FnOnce(&mut LoadOptions)) -> Model {
    let mut options = LoadOptions::default();
    change(&mut options);
    Model::load(&Checkpoint::open(dir).unwrap(), &options).unwrap()
}

fn logits(model: &Model) -> Vec<f64> {
    let mut ws = model.workspace(2, 9).unwrap();
    model.forward(&mut ws, &batch(), None).unwrap();
    values(&model.logits(&ws).unwrap())
}

fn lora(change: impl FnOnce(&mut LoraConfig)) -> Tuning {
    let mut config = LoraConfig {
        r: 4,
        dropout: 0.1,
        ..LoraConfig::default()
    };
    change(&mut config);
    Tuning::Lora(config)
}

/// Losses and gradients of three steps of plain descent.
fn steps(model: &mut Model) -> Vec<f64> {
    let batch = batch();
    let mut ws = model.workspace(2, 9).unwrap();
    let mut seen = Vec::new();
    for step in 0..3 {
        model.zero_gradients().unwrap();
        let loss = model
            .loss_and_gradients(&mut ws, &batch, 0.5, Stream::new(3, step))
            .unwrap();
        seen.push(loss.nll_sum);
        model
            .for_each_param_mut(&mut |_, param| {
                if let Some(grad) = &param.grad {
                    let grad = values(grad);
                    let stepped = values(&param.value).into_iter().zip(&grad);
                    let stepped: Vec<f32> = stepped.map(|(v, g)| (v - 0.05 * g) as f32).collect();
                    param.value.write(&stepped)?;
                    seen.extend(grad);
                }
                Ok(())
            })
            .unwrap();
    }
    seen
}

fn bits(values: &[f64]) -> Vec<u64> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// How far two decodings may be apart: THUDM's are one product, of bitsandbytes' two the order is open.
fn rounding(layout: Layout) -> f64 {
    if layout == Layout::BnbInt8 { 2e-7 } else { 0.0 }
}

#[test]
fn weights_are_the_numbers_that_codes_and_scales_stand_for() {
    let dir = tempfile::tempdir().unwrap();
    for layout in LAYOUTS {
        let (stored, floats) = folders::model(layout, &toy());
        let shards = dir.path().join(format!("{layout:?}-shards"));
        folders::write_bin_shards(&shards, &toy(), &folders::keys(layout), &stored, 3);
        for place in [&pair(dir.path(), layout)[0], &shards] {
            let checkpoint = Checkpoint::open(place).unwrap();
            checkpoint.validate().unwrap();
            for (name, want) in &floats {
                let weight = checkpoint.weight(name).unwrap();
                let kind = match &weight {
                    Stored::Dense(_) => None,
                    Stored::Quant(_) => Some(4),
                    Stored::Int8(_) => Some(8),
                };
                let bits = if layout == Layout::ThudmInt4 { 4 } else { 8 };
                assert_eq!(
                    kind,
                    folders::is_linear(name).then_some(bits),
                    "{layout:?} {name}"
                );
                let (got, want) = (weight.decoded().to_f64_vec(), want.to_f64_vec());
                assert_close(&format!("{layout:?} {name}"), &got, &want, 0.0, rounding(layout));
                assert_eq!(Source::dtype(&checkpoint, name).unwrap(), DType::F16);
            }
        }
    }
}

#[test]
fn on_the_cpu_a_model_is_that_of_the_decoded_weights() {
    let dir = tempfile::tempdir().unwrap();
    for layout in LAYOUTS {
        let [few, floats] = pair(dir.path(), layout);
        for dtype in [DType::F32, DType::F64] {
            let [few, floats] = [&few, &floats].map(|dir| logits(&load(dir, Compute::cpu(dtype))));
            match layout {
                Layout::BnbInt8 => assert_close("logits", &few, &floats, 2e-5, 2e-5),
                _ => assert!(bits(&few) == bits(&floats), "{layout:?} {dtype}"),
            }
        }
        for tuning in [lora(|_| ()), lora(|config| config.dora = true)] {
            let [few, floats] = [&few, &floats].map(|dir| {
                let mut model = load(dir, Compute::cpu(DType::F32));
                tune::apply(&mut model, &tuning, 5).unwrap();
                steps(&mut model)
            });
            match layout {
                Layout::BnbInt8 => assert_close("steps", &few, &floats, 2e-5, 2e-5),
                _ => assert!(bits(&few) == bits(&floats), "{layout:?}: steps differ"),
            }
        }
    }
}

/// In f32 a device does what the CPU does; in 16 bits the products with 8-bit weights are those with the decoded matrix to the
/// bit, and those with 4-bit weights as near as with NF4.
#[test]
fn on_a_device_a_model_is_that_of_the_decoded_weights() {
    let dir = tempfile::tempdir().unwrap();
    for layout in LAYOUTS {
        let [few, floats] = pair(dir.path(), layout);
        let want = logits(&load(&floats, Compute::cpu(DType::F64)));
        for compute in exact_computes() {
            let got = logits(&load(&few, compute));
            assert_close(&format!("{layout:?} {compute:?}"), &got, &want, 5e-5, 5e-5);
        }
        for compute in half_computes() {
            let what = format!("{layout:?} {compute:?}");
            let [few, floats] = [&few, &floats].map(|dir| logits(&load(dir, compute)));
            if layout == Layout::ThudmInt8 {
                assert!(bits(&few) == bits(&floats), "{what}: bits");
            }
            let (off, usual) = (relative_l2(&few, &want), relative_l2(&floats, &want));
            println!("{what}: {off:.2e} off the exact numbers, floats {usual:.2e}");
            assert!(off < 2.0 * usual, "{what}: {off} where floats are {usual} off");
        }
    }
}

#[test]
fn training_on_a_device_is_training_on_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    for layout in LAYOUTS {
        let few = &pair(dir.path(), layout)[0];
        for tuning in [
            lora(|_| ()),
            lora(|config| config.dora = true),
            Tuning::PTuning(PrefixConfig {
                pre_seq_len: 3,
                ..PrefixConfig::default()
            }),
        ] {
            let seen = |compute| {
                let mut model = load(few, compute);
                tune::apply(&mut model, &tuning, 5).unwrap();
                steps(&mut model)
            };
            let want = seen(Compute::cpu(DType::F32));
            for compute in exact_computes().into_iter().filter(|c| c.device != Device::Cpu) {
                let what = format!("{layout:?} {tuning:?}");
                assert_close(&what, &seen(compute), &want, 2e-4, 2e-3);
            }
        }
    }
}

#[test]
fn weights_that_wait_in_host_memory_are_the_same_to_the_bit() {
    let dir = tempfile::tempdir().unwrap();
    for layout in LAYOUTS {
        let few = &pair(dir.path(), layout)[0];
        for tuning in [
            lora(|_| ()),
            lora(|config| config.dora = true),
            lora(|config| config.init = LoraInit::Pissa { iterations: Some(2) }),
        ] {
            for compute in half_computes() {
                let seen = |stream| {
                    let mut model = load_as(few, |options| {
                        options.compute = compute;
                        options.stream = stream;
                        options.head = if stream {
                            HeadStorage::Stream
                        } else {
                            HeadStorage::Compute
                        };
                    });
                    tune::apply(&mut model, &tuning, 5).unwrap();
                    bits(&steps(&mut model))
                };
                assert!(seen(true) == seen(false), "{layout:?} {compute:?} {tuning:?}");
            }
        }
    }
}

/// Central differences in f64, for every parameter of an adapter. (DoRA's norms are constants by definition: its gradients are those
/// of the decoded weights, above.)
#[test]
fn gradients_are_derivatives() {
    const H: f64 = 1e-5;
    let dir = tempfile::tempdir().unwrap();
    for layout in [Layout::ThudmInt8, Layout::ThudmInt4] {
        let tuning = lora(|_| ());
        let mut model = load(&pair(dir.path(), layout)[0], Compute::cpu(DType::F64));
        tune::apply(&mut model, &tuning, 1).unwrap();
        let noise = Stream::new(9, 9);
        let mut gradients: Vec<(String, Vec<f64>)> = Vec::new();
        // B of a new adapter is 0, which would hide the gradient of A.
        let nudge = |model: &mut Model, f: &mut dyn FnMut(&str, &mut [f64])| {
            let mut nudged = |name: &str, param: &mut glmtune::nn::Param| {
                if param.trains() {
                    f(name, param.value.as_mut_slice());
                }
                Ok(())
            };
            model.for_each_param_mut(&mut nudged).unwrap();
        };
        nudge(&mut model, &mut |_, values| {
            let noisy = values.iter_mut().enumerate();
            noisy.for_each(|(i, v)| *v += 0.05 * f64::from(noise.normal(i as u64)));
        });
        let mut ws = model.workspace(2, 9).unwrap();
        let loss = |model: &mut Model, ws: &mut _| {
            model
                .loss_and_gradients(ws, &batch(), 1.0, Stream::new(3, 5))
                .unwrap()
                .nll_sum
        };
        model.zero_gradients().unwrap();
        loss(&mut model, &mut ws);
        model.for_each_param(&mut |name, param| {
            if let Some(grad) = &param.grad {
                gradients.push((name.to_string(), values(grad)));
            }
        });
        assert!(gradients.len() >= 4, "{tuning:?}");
        for (name, gradient) in &gradients {
            for i in (0..gradient.len()).step_by(gradient.len().div_ceil(5)) {
                let mut at = |by: f64| {
                    nudge(&mut model, &mut |n, values| {
                        if n == name {
                            values[i] += by;
                        }
                    });
                    loss(&mut model, &mut ws)
                };
                let (up, down) = (at(H), at(-2.0 * H));
                at(H);
                let numerical = (up - down) / (2.0 * H);
                assert_close(
                    &format!("{layout:?} {name}[{i}]"),
                    &[gradient[i]],
                    &[numerical],
                    2e-7,
                    2e-6,
                );
            }
        }
    }
}

/// DoRA starts as the model itself; PiSSA and merging quantise again, which costs about what quantising costs.
#[test]
fn adapters_that_need_the_matrix_find_it() {
    let dir = tempfile::tempdir().unwrap();
    for layout in LAYOUTS {
        let few = &pair(dir.path(), layout)[0];
        for compute in exact_computes() {
            let what = format!("{layout:?} {compute:?}");
            let base = logits(&load(few, compute));
            let mut dora = load(few, compute);
            tune::apply(&mut dora, &lora(|config| config.dora = true), 1).unwrap();
            assert_close(&what, &logits(&dora), &base, 2e-5, 2e-5);

            let pissa = lora(|config| config.init = LoraInit::Pissa { iterations: None });
            let mut model = load(few, compute);
            tune::apply(&mut model, &pissa, 1).unwrap();
            let most = if layout == Layout::ThudmInt4 { 0.3 } else { 0.02 };
            let off = relative_l2(&logits(&model), &base);
            println!("{what}: PiSSA starts {off:.2e} off");
            assert!(off < most, "{what}: PiSSA starts {off} off");

            let tuning = lora(|config| config.dropout = 0.0);
            let mut model = load(few, compute);
            tune::apply(&mut model, &tuning, 1).unwrap();
            steps(&mut model);
            let folder = tempfile::tempdir().unwrap();
            tune::save(&model, &tuning, Path::new("base"), folder.path()).unwrap();
            let mut merged = load(few, compute);
            let count = tune::merge_adapter(&mut merged, folder.path()).unwrap();
            assert!(
                count.requantized > 0 && count.requantized == count.linears,
                "{what}"
            );
            let off = relative_l2(&logits(&merged), &logits(&model));
            println!("{what}: merged {off:.2e} off");
            assert!(off < most, "{what}: merged {off} off");
        }
    }
}

#[test]
fn heads_in_every_form_go_with_linears_in_whole_numbers() {
    let dir = tempfile::tempdir().unwrap();
    for layout in LAYOUTS {
        let few = &pair(dir.path(), layout)[0];
        for compute in exact_computes() {
            let of = |head| {
                logits(&load_as(few, |options| {
                    (options.compute, options.head) = (compute, head)
                }))
            };
            let plain = of(HeadStorage::Compute);
            assert!(
                bits(&of(HeadStorage::Stream)) == bits(&plain),
                "{layout:?} {compute:?}"
            );
            for (head, most) in [(HeadStorage::Int8, 0.02), (HeadStorage::Nf4, 0.2)] {
                let off = relative_l2(&of(head), &plain);
                assert!(off < most, "{layout:?} {compute:?} {head:?}: {off}");
            }
        }
    }
}

/// One answer's bytes are read for each token: those of codes and scales.
#[test]
fn decoding_reads_codes_and_scales() {
    let dir = tempfile::tempdir().unwrap();
    let config = toy();
    let (h, inner) = (config.hidden_size, config.inner_hidden_size);
    let (weights, rows) = (4 * h * h + 2 * h * inner, 5 * h + inner);
    let floats = |dir: &Path| load(dir, Compute::cpu(DType::F32)).decode_bytes();
    let [_, dense] = pair(dir.path(), Layout::ThudmInt8);
    let rest = floats(&dense) - config.num_layers * weights * 4;
    for (layout, layer) in [
        (Layout::ThudmInt8, weights + rows * 4),
        (Layout::ThudmInt4, weights / 2 + weights / 64 * 4),
    ] {
        let [few, _] = pair(dir.path(), layout);
        assert_eq!(floats(&few), rest + config.num_layers * layer, "{layout:?}");
    }
}

/// What bitsandbytes does with `bnb_4bit_quant_storage`: the same bytes under the name of another type.
#[test]
fn four_bits_may_lie_in_any_container_and_in_shards() {
    let dir = tempfile::tempdir().unwrap();
    for (i, (quant_type, double_quant)) in [("nf4", true), ("nf4", false), ("fp4", true), ("fp4", false)]
        .into_iter()
        .enumerate()
    {
        let kind = if quant_type == "nf4" {
            glmtune::quant::QuantType::Nf4
        } else {
            glmtune::quant::QuantType::Fp4
        };
        let (mut stored, mut floats) = (folders::Tensors::new(), folders::Tensors::new());
        let container = [DType::U8, DType::BF16, DType::F32, DType::I8][i];
        for (name, tensor) in folders::dense(&toy()) {
            if !folders::is_linear(&name) {
                stored.insert(name.clone(), tensor.clone());
                floats.insert(name, tensor);
                continue;
            }
            let weight = glmtune::quant::QuantTensor::quantize(&tensor, kind, double_quant).unwrap();
            floats.insert(name.clone(), weight.dequantize());
            for (key, part) in weight.to_bnb(&name) {
                let part = if key != name {
                    part
                } else {
                    let mut boxed =
                        glmtune::tensor::Tensor::zeros(container, [part.elements() / container.size(), 1]);
                    boxed.bytes_mut().copy_from_slice(part.bytes());
                    boxed
                };
                stored.insert(key, part);
            }
        }
        let keys = json!({ "quantization_config": { "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false,
            "bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant, "bnb_4bit_compute_dtype": "float16",
            "bnb_4bit_quant_storage": container.name() } });
        let what = format!("{quant_type} {double_quant} in {container}");
        let (few, dense) = (
            dir.path().join(format!("{i}")),
            dir.path().join(format!("{i}-floats")),
        );
        folders::write_bin_shards(&few, &toy(), &keys, &stored, 3);
        folders::write(&dense, &toy(), &json!({}), &floats);
        let compute = Compute::cpu(DType::F32);
        assert!(
            bits(&logits(&load(&few, compute))) == bits(&logits(&load(&dense, compute))),
            "{what}"
        );
    }
}
