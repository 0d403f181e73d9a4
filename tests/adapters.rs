//! Do adapters survive the disk, merging, scaling? Do the training tricks around them do what they say?

#[path = "common/mod.rs"]
mod common;

use std::path::Path;

use common::{assert_close, exact_computes, half_computes, values};
use glmtune::checkpoint::{
    AdapterConfig, Patterns, WORD_EMBEDDINGS, read_adapter, read_tensors, write_adapter, write_torch_bin,
};
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::model::tune::{self, LoraConfig, LoraInit, LoraTarget, PrefixConfig, SavedModule, Tuning};
use glmtune::model::{LoadOptions, Model, ModelConfig, Weights};
use glmtune::quant::QuantType;
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Tensor};
use serde_json::{Value, json};

fn toy() -> ModelConfig {
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

fn batch() -> Batch {
    let len = 9;
    let ids: Vec<i32> = (0..2 * len).map(|i| (i * 17 + 5) % 90).collect();
    let mut labels = ids.clone();
    labels[..4].fill(IGNORE);
    let positions = (0..2 * len)
        .flat_map(|i| [(i % len).min(4), (i % len - 3).max(0)])
        .collect();
    let spans = vec![Span { start: 0, context: 4 }; 2];
    Batch {
        size: 2,
        len: len as usize,
        ids,
        labels,
        positions,
        spans,
    }
}

const QUANTIZED: Weights = Weights::Quantized {
    quant_type: QuantType::Nf4,
    double_quant: true,
};

fn base(compute: Compute, weights: Weights) -> Model {
    Model::initialize(
        &toy(),
        1,
        &LoadOptions {
            compute,
            weights,
            ..LoadOptions::default()
        },
    )
    .unwrap()
}

fn all(init: LoraInit, dora: bool) -> LoraConfig {
    LoraConfig {
        r: 3,
        alpha: 5.0,
        dora,
        init,
        modules_to_save: SavedModule::ALL.to_vec(),
        ..LoraConfig::default()
    }
}

/// The configurations whose folders differ.
fn kinds() -> Vec<LoraConfig> {
    let pissa = LoraInit::Pissa { iterations: None };
    let quick = LoraInit::Pissa { iterations: Some(4) };
    vec![
        LoraConfig {
            modules_to_save: Vec::new(),
            dropout: 0.1,
            ..all(LoraInit::Kaiming, false)
        },
        all(LoraInit::Kaiming, true),
        LoraConfig {
            rslora: true,
            targets: vec![LoraTarget::Dense, LoraTarget::Dense4HToH],
            ..all(pissa, false)
        },
        all(quick, true),
        // Single layers, and ranks and alphas of single linears.
        LoraConfig {
            layers: vec![1],
            ..patterned(LoraInit::Kaiming)
        },
        LoraConfig {
            rslora: true,
            ..patterned(pissa)
        },
    ]
}

fn patterned(init: LoraInit) -> LoraConfig {
    let name = |text: &str| text.to_string();
    LoraConfig {
        rank_pattern: Patterns::new([(name("attention.dense"), 2), (name(r"layers\.1\.mlp\..*"), 5)])
            .unwrap(),
        alpha_pattern: Patterns::new([(name("dense"), 7.0)]).unwrap(),
        modules_to_save: Vec::new(),
        ..all(init, false)
    }
}

/// How many linears of the toy carry an adapter of this configuration.
fn linears(config: &LoraConfig) -> usize {
    let layers = if config.layers.is_empty() {
        2
    } else {
        config.layers.len()
    };
    layers * config.targets.len()
}

/// Some steps of plain descent: everything that trains moves.
fn train(model: &mut Model, steps: u64) -> Vec<f64> {
    let batch = batch();
    let mut ws = model.workspace(batch.size, batch.len).unwrap();
    let mut losses = Vec::new();
    for step in 0..steps {
        model.zero_gradients().unwrap();
        losses.push(
            model
                .loss_and_gradients(&mut ws, &batch, 1.0, Stream::new(4, step))
                .unwrap()
                .nll_sum,
        );
        model
            .for_each_param_mut(&mut |_, param| {
                let Some(grad) = &param.grad else { return Ok(()) };
                let moved = values(&param.value)
                    .into_iter()
                    .zip(values(grad))
                    .map(|(p, g)| (p - 0.01 * g) as f32);
                let moved: Vec<f32> = moved.collect();
                param.value.write(&moved)
            })
            .unwrap();
    }
    losses
}

fn logits(model: &Model) -> Vec<f64> {
    let batch = batch();
    let mut ws = model.workspace(batch.size, batch.len).unwrap();
    model.forward(&mut ws, &batch, None).unwrap();
    values(&model.logits(&ws).unwrap())
}

/// Every parameter and every weight in 4 bits, by its bits.
fn bits(model: &Model) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    model.for_each_param(&mut |name, param| {
        all.push((name.to_string(), common::host(&param.value).bytes().to_vec()));
    });
    all.push((
        "logits".into(),
        logits(model).iter().flat_map(|x| x.to_le_bytes()).collect(),
    ));
    all
}

#[test]
fn a_run_goes_on_from_the_disk_bit_for_bit() {
    for compute in exact_computes().into_iter().chain(half_computes()) {
        for weights in [Weights::AsStored, QUANTIZED] {
            for config in kinds() {
                let what = format!("{config:?} {compute:?} {weights:?}");
                let tuning = Tuning::Lora(config);
                let mut model = base(compute, weights);
                tune::apply(&mut model, &tuning, 7).unwrap();
                train(&mut model, 2);
                let dir = tempfile::tempdir().unwrap();
                tune::save(&model, &tuning, Path::new("base"), dir.path()).unwrap();
                let mut again = base(compute, weights);
                tune::restore(&mut again, &tuning, dir.path()).unwrap();
                assert_eq!(bits(&model), bits(&again), "{what}");
                assert_eq!(train(&mut model, 2), train(&mut again, 2), "{what}");
                assert_eq!(bits(&model), bits(&again), "{what}: after more steps");
            }
        }
    }
}

/// The folder of any kind is a LoRA or DoRA adapter of the base as it was: loaded or merged it gives the trained model.
#[test]
fn what_is_saved_is_the_model_that_was_trained() {
    for compute in exact_computes() {
        for config in kinds() {
            let what = format!("{config:?} {compute:?}");
            let tuning = Tuning::Lora(config.clone());
            let mut model = base(compute, Weights::AsStored);
            tune::apply(&mut model, &tuning, 7).unwrap();
            train(&mut model, 3);
            let want = logits(&model);
            let dir = tempfile::tempdir().unwrap();
            tune::save(&model, &tuning, Path::new("base"), dir.path()).unwrap();

            let mut loaded = base(compute, Weights::AsStored);
            tune::load_adapter(&mut loaded, dir.path(), false).unwrap();
            assert_close(&format!("{what}: loaded"), &logits(&loaded), &want, 2e-5, 1e-5);

            let mut merged = base(compute, Weights::AsStored);
            let report = tune::merge_adapter(&mut merged, dir.path()).unwrap();
            assert_eq!((report.linears, report.requantized), (linears(&config), 0));
            assert_eq!(
                report.replaced,
                if config.modules_to_save.is_empty() { 0 } else { 12 }
            );
            assert_close(&format!("{what}: merged"), &logits(&merged), &want, 2e-5, 1e-5);
            // A merged base starts another run.
            tune::apply(&mut merged, &tuning, 8).unwrap();
            assert!(tune::merge_adapter(&mut merged, dir.path()).is_err());
        }
    }
}

/// Merging in 4 bits is the quantisation of the decoded sum; the model then is off by about what quantising costs.
#[test]
fn merging_in_four_bits_quantises_again() {
    for compute in exact_computes() {
        let config = LoraConfig {
            modules_to_save: Vec::new(),
            ..all(LoraInit::Kaiming, false)
        };
        let tuning = Tuning::Lora(config);
        let mut model = base(compute, QUANTIZED);
        tune::apply(&mut model, &tuning, 7).unwrap();
        train(&mut model, 3);
        let dir = tempfile::tempdir().unwrap();
        tune::save(&model, &tuning, Path::new("base"), dir.path()).unwrap();
        let mut merged = base(compute, QUANTIZED);
        assert_eq!(
            tune::merge_adapter(&mut merged, dir.path()).unwrap().requantized,
            8
        );
        let dense = logits(&base(compute, Weights::AsStored));
        let off = |a: &[f64], b: &[f64]| common::relative_l2(a, b);
        let (cost, change) = (
            off(&logits(&base(compute, QUANTIZED)), &dense),
            off(&logits(&merged), &logits(&model)),
        );
        assert!(change < 2.0 * cost, "{change} where quantising costs {cost}");
    }
}

#[test]
fn a_scale_of_zero_is_the_base() {
    for compute in exact_computes().into_iter().chain(half_computes()) {
        let config = LoraConfig {
            modules_to_save: Vec::new(),
            ..all(LoraInit::Kaiming, false)
        };
        let mut model = base(compute, QUANTIZED);
        let want = logits(&model);
        assert!(
            tune::scale_adapter(&mut model, 0.5).is_err(),
            "there is no adapter yet"
        );
        tune::apply(&mut model, &Tuning::Lora(config), 7).unwrap();
        train(&mut model, 2);
        assert_ne!(logits(&model), want);
        assert!(tune::scale_adapter(&mut model, f64::NAN).is_err());
        tune::scale_adapter(&mut model, 0.0).unwrap();
        assert_eq!(logits(&model), want);
    }
}

#[test]
fn scaling_dora_scales_its_directions() {
    let compute = Compute::cpu(DType::F32);
    let config = LoraConfig {
        modules_to_save: Vec::new(),
        ..all(LoraInit::Kaiming, true)
    };
    let run = |factor: f64, halved: bool| {
        let mut model = base(compute, Weights::AsStored);
        tune::apply(&mut model, &Tuning::Lora(config.clone()), 7).unwrap();
        train(&mut model, 2);
        if halved {
            model
                .for_each_param_mut(&mut |name, param| {
                    if name.contains(".lora_B.") {
                        param
                            .value
                            .as_mut_slice::<f32>()
                            .iter_mut()
                            .for_each(|b| *b *= 0.5);
                    }
                    Ok(())
                })
                .unwrap();
        }
        tune::scale_adapter(&mut model, factor).unwrap();
        logits(&model)
    };
    assert_eq!(run(0.5, false), run(1.0, true), "half the scale is half of B");
}

/// PiSSA changes nothing at the start; its residual is what is left.
#[test]
fn pissa_starts_as_the_base() {
    for compute in exact_computes() {
        for init in [
            LoraInit::Pissa { iterations: None },
            LoraInit::Pissa { iterations: Some(2) },
        ] {
            for dora in [false, true] {
                let mut model = base(compute, Weights::AsStored);
                let want = logits(&model);
                let config = LoraConfig {
                    modules_to_save: Vec::new(),
                    ..all(init, dora)
                };
                tune::apply(&mut model, &Tuning::Lora(config), 7).unwrap();
                assert_close(&format!("{init:?} {dora}"), &logits(&model), &want, 1e-5, 1e-5);
            }
        }
        // In 4 bits the principal part escapes quantisation: nearer to the dense model than the quantised one.
        let dense = logits(&base(compute, Weights::AsStored));
        let mut model = base(compute, QUANTIZED);
        let plain = common::relative_l2(&logits(&model), &dense);
        let init = LoraInit::Pissa { iterations: Some(8) };
        let config = LoraConfig {
            r: 16,
            modules_to_save: Vec::new(),
            ..all(init, false)
        };
        tune::apply(&mut model, &Tuning::Lora(config), 7).unwrap();
        let started = common::relative_l2(&logits(&model), &dense);
        assert!(started < 2.0 * plain, "{started} against {plain}");
    }
    let mut model = base(Compute::cpu(DType::F32), Weights::AsStored);
    let config = LoraConfig {
        r: 65,
        ..all(LoraInit::Pissa { iterations: None }, false)
    };
    assert!(
        tune::apply(&mut model, &Tuning::Lora(config), 7).is_err(),
        "a rank above the weight's"
    );
}

/// The embedding trains as a copy: the head, tied before, stays what it was; and the other way round.
#[test]
fn modules_to_save_part_a_tied_head() {
    let compute = Compute::cpu(DType::F32);
    let value = |model: &Model, wanted: &str| {
        let mut found = None;
        model.for_each_param(&mut |name, param| {
            if name == wanted {
                found = Some((param.trains(), values(&param.value)));
            }
        });
        found.unwrap()
    };
    let (embedding, head) = ("transformer.word_embeddings.weight", "lm_head.weight");
    let (_, original) = value(&base(compute, Weights::AsStored), embedding);
    for (module, trained, frozen) in [
        (SavedModule::WordEmbeddings, embedding, head),
        (SavedModule::LmHead, head, embedding),
    ] {
        let mut model = base(compute, Weights::AsStored);
        let config = LoraConfig {
            modules_to_save: vec![module],
            ..all(LoraInit::Kaiming, false)
        };
        tune::apply(&mut model, &Tuning::Lora(config), 7).unwrap();
        train(&mut model, 1);
        let ((trains, moved), (also, kept)) = (value(&model, trained), value(&model, frozen));
        assert!(trains && !also, "{module}");
        assert!(moved != original && kept == original, "{module}");
    }
}

#[test]
fn noise_is_bounded_repeatable_and_only_in_training() {
    let batch = batch();
    for compute in exact_computes() {
        let mut model = base(compute, Weights::AsStored);
        let mut ws = model.workspace(batch.size, batch.len).unwrap();
        let mut embeddings = |model: &Model, dropout: Option<Stream>| {
            let mut embeddings = Vec::new();
            model
                .forward_seen(&mut ws, &batch, dropout, &mut |pass| {
                    if pass.layer == 0 {
                        embeddings = values(pass.x);
                    }
                    Ok(())
                })
                .unwrap();
            embeddings
        };
        let pass = Some(Stream::new(1, 2));
        let plain = embeddings(&model, pass);
        let alpha = 10.0;
        model.set_neftune(alpha).unwrap();
        assert_eq!(embeddings(&model, None), plain, "evaluation is without noise");
        let noisy = embeddings(&model, pass);
        assert_eq!(embeddings(&model, pass), noisy, "one pass, one noise");
        assert_ne!(
            embeddings(&model, Some(Stream::new(1, 3))),
            noisy,
            "another pass, another noise"
        );
        // alpha / sqrt(L d), with the padded length.
        let bound = alpha / f64::from(9 * 64).sqrt();
        let noise: Vec<f64> = noisy.iter().zip(&plain).map(|(a, b)| a - b).collect();
        let n = noise.len() as f64;
        let most = noise.iter().fold(0f64, |most, x| most.max(x.abs()));
        assert!(
            most <= bound * (1.0 + 1e-6) && most > 0.98 * bound,
            "{most} of {bound}"
        );
        let (mean, square) = (
            noise.iter().sum::<f64>() / n,
            noise.iter().map(|x| x * x).sum::<f64>() / n,
        );
        // Standard errors of a uniform sample: bound / sqrt(3 n), and of the square 0.3 bound² / sqrt(n).
        assert!(mean.abs() < 5.0 * bound / (3.0 * n).sqrt(), "mean {mean}");
        assert!(
            (square - bound * bound / 3.0).abs() < 5.0 * 0.3 * bound * bound / n.sqrt(),
            "square {square}"
        );
        model.set_neftune(0.0).unwrap();
        assert_eq!(embeddings(&model, pass), plain);
        assert!(model.set_neftune(-1.0).is_err() && model.set_neftune(f64::INFINITY).is_err());
    }
}

#[test]
fn adapters_that_mean_something_else_are_refused_by_name() {
    let compute = Compute::cpu(DType::F32);
    let tuning = Tuning::Lora(all(LoraInit::Kaiming, true));
    let mut model = base(compute, Weights::AsStored);
    tune::apply(&mut model, &tuning, 7).unwrap();
    let dir = tempfile::tempdir().unwrap();
    tune::save(&model, &tuning, Path::new("base"), dir.path()).unwrap();
    let path = dir.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let refused = |from: &str, to: &str, word: &str| {
        assert!(text.contains(from), "{from}");
        std::fs::write(&path, text.replace(from, to)).unwrap();
        for merge in [false, true] {
            let mut model = base(compute, Weights::AsStored);
            let result = match merge {
                true => tune::merge_adapter(&mut model, dir.path()).map(|_| ()),
                false => tune::load_adapter(&mut model, dir.path(), true).map(|_| ()),
            };
            let message = result.expect_err(to).to_string();
            assert!(message.contains(word), "{to}: {message}");
        }
    };
    refused(
        "\"init_lora_weights\": true",
        "\"init_lora_weights\": \"pissa\"",
        "init_lora_weights",
    );
    refused(
        "\"use_dora\": true",
        "\"use_dora\": false",
        "lora_magnitude_vector",
    );
    refused("\"use_dora\": true", "\"use_dora\": 1", "use_dora");
    refused("\"bias\": \"none\"", "\"bias\": \"all\"", "bias");
    refused("\"lm_head\"", "\"score\"", "score");
    refused("\"lm_head\"", "\"lm_head\", \"dense\"", "dense");
    refused("\"r\": 3", "\"r\": 4", "r 4");
    // Another configuration of the run.
    std::fs::write(&path, &text).unwrap();
    let mut model = base(compute, Weights::AsStored);
    let other = Tuning::Lora(LoraConfig {
        alpha: 6.0,
        ..all(LoraInit::Kaiming, true)
    });
    assert!(tune::restore(&mut model, &other, dir.path()).is_err());
}

/// Writes a folder of each kind and what the model says with it, for `tests/goldens/open_in_peft.py`. `GLMTUNE_PEFT_OUT`
/// names the place; without it there is nothing to do.
#[test]
fn folders_for_peft() {
    let Some(out) = std::env::var_os("GLMTUNE_PEFT_OUT") else {
        return;
    };
    let Some(base_dir) = common::golden("chatglm_v1/checkpoint_fp16_bin") else {
        return;
    };
    let load = || {
        let checkpoint = glmtune::checkpoint::Checkpoint::open(&base_dir).unwrap();
        Model::load(&checkpoint, &LoadOptions::default()).unwrap()
    };
    for (i, config) in kinds().into_iter().enumerate() {
        let tuning = Tuning::Lora(config);
        let mut model = load();
        let batch = Batch {
            spans: vec![Span { start: 0, context: 4 }; 2],
            ..official_batch(model.config())
        };
        tune::apply(&mut model, &tuning, 7).unwrap();
        let mut ws = model.workspace(batch.size, batch.len).unwrap();
        for step in 0..3 {
            model.zero_gradients().unwrap();
            model
                .loss_and_gradients(&mut ws, &batch, 1.0, Stream::new(4, step))
                .unwrap();
            model
                .for_each_param_mut(&mut |_, param| {
                    let Some(grad) = &param.grad else { return Ok(()) };
                    let grad: Vec<f32> = grad.as_slice::<f32>().to_vec();
                    let value = param.value.as_mut_slice::<f32>();
                    value.iter_mut().zip(grad).for_each(|(p, g)| *p -= 0.01 * g);
                    Ok(())
                })
                .unwrap();
        }
        let dir = Path::new(&out).join(format!("kind{i}"));
        tune::save(&model, &tuning, &base_dir, &dir).unwrap();
        model.forward(&mut ws, &batch, None).unwrap();
        let logits = model.logits(&ws).unwrap();
        let ids: Vec<i64> = batch.ids.iter().map(|&id| i64::from(id)).collect();
        let ids = Tensor::from_slice(&ids, [batch.size, batch.len]);
        let tensors = [("input_ids".to_string(), &ids), ("logits".to_string(), &logits)];
        glmtune::checkpoint::write_safetensors(&dir.join("said.safetensors"), &tensors, &Default::default())
            .unwrap();
    }
}

fn official_batch(config: &ModelConfig) -> Batch {
    let (len, context) = (10, 4);
    let mut ids: Vec<i32> = (0..2 * len).map(|i| 30 + i * 31 % 900).collect();
    for row in ids.chunks_exact_mut(len as usize) {
        (row[3], row[4]) = (config.gmask_token_id as i32, config.bos_token_id as i32);
    }
    let positions = (0..2 * len).flat_map(|i| [(i % len).min(context - 1), (i % len - context + 1).max(0)]);
    Batch {
        size: 2,
        len: len as usize,
        labels: ids.clone(),
        positions: positions.collect(),
        spans: Vec::new(),
        ids,
    }
}

/// PEFT adapts single layers by their whole names. What generation computes is what evaluation computes.
#[test]
fn an_adapter_of_one_layer_acts_in_generation_too() {
    for compute in exact_computes() {
        for layer in 0..2 {
            let mut model = base(compute, Weights::AsStored);
            let plain = logits(&model);
            let name = format!("transformer.layers.{layer}.attention.query_key_value");
            let ramp = |n: usize| (0..n).map(|i| 0.01 * (i % 7) as f32 - 0.02).collect::<Vec<_>>();
            let tensors = [
                ("A", Tensor::from_slice(&ramp(2 * 64), [2, 64])),
                ("B", Tensor::from_slice(&ramp(192 * 2), [192, 2])),
            ];
            let named = |(part, t): &(&str, Tensor)| {
                (format!("base_model.model.{name}.lora_{part}.weight"), t.clone())
            };
            let tensors: Vec<(String, Tensor)> = tensors.iter().map(named).collect();
            let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
            let config = AdapterConfig {
                r: 2,
                lora_alpha: 64.0,
                target_modules: vec![name],
                ..AdapterConfig::default()
            };
            let dir = tempfile::tempdir().unwrap();
            write_adapter(dir.path(), &config, &borrowed).unwrap();
            tune::load_adapter(&mut model, dir.path(), false).unwrap();

            let (batch, whole) = (batch(), logits(&model));
            assert!(
                whole.iter().zip(&plain).any(|(a, b)| (a - b).abs() > 1e-3),
                "the adapter does nothing"
            );
            let mut cache = model.cache(batch.size, batch.len).unwrap();
            let last = values(&model.prefill(&mut cache, &batch).unwrap());
            let vocabulary = toy().vocab_size;
            let want: Vec<f64> = (1..=batch.size)
                .flat_map(|b| &whole[(b * batch.len - 1) * vocabulary..][..vocabulary])
                .copied()
                .collect();
            assert_close(&format!("layer {layer} on {compute:?}"), &last, &want, 1e-5, 1e-5);
        }
    }
}

/// The rank and the scale that a pattern gives are those of the linear.
#[test]
fn patterns_give_ranks_and_scales() {
    let mut model = base(Compute::cpu(DType::F32), Weights::AsStored);
    tune::apply(&mut model, &Tuning::Lora(patterned(LoraInit::Kaiming)), 7).unwrap();
    let config = patterned(LoraInit::Kaiming).peft(Path::new("base"));
    let tensors = tune::adapter_tensors(&model).unwrap();
    let factors = tensors.iter().filter_map(|(name, a)| {
        let module = name
            .strip_prefix("base_model.model.")?
            .strip_suffix(".lora_A.weight")?;
        Some((a.extent(0), config.scale(module)))
    });
    let found: Vec<(usize, f64)> = factors.collect();
    let plain = 5.0 / 3.0;
    assert_eq!(
        found,
        [
            (3, plain),
            (2, 3.5),
            (3, plain),
            (3, plain),
            (3, plain),
            (2, 3.5),
            (5, 1.0),
            (5, 1.0)
        ]
    );
    let config = LoraConfig {
        layers: vec![0, 2],
        ..patterned(LoraInit::Kaiming)
    };
    let error = tune::apply(&mut model, &Tuning::Lora(config), 7)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("--lora-layers") && error.contains("from 0 to 1"),
        "{error}"
    );
}

/// Folders as versions of PEFT and scripts left them are all the same adapter.
#[test]
fn folders_of_every_age_are_the_same_adapter() {
    let compute = Compute::cpu(DType::F32);
    let tuning = Tuning::Lora(all(LoraInit::Kaiming, true));
    let mut model = base(compute, Weights::AsStored);
    tune::apply(&mut model, &tuning, 7).unwrap();
    train(&mut model, 2);
    let dir = tempfile::tempdir().unwrap();
    tune::save(&model, &tuning, Path::new("base"), dir.path()).unwrap();
    let load = |dir: &Path| {
        let mut model = base(compute, Weights::AsStored);
        tune::load_adapter(&mut model, dir, false).map(|_| bits(&model))
    };
    let want = load(dir.path()).unwrap();
    let config_path = dir.path().join("adapter_config.json");
    let sound: Value = serde_json::from_slice(&std::fs::read(&config_path).unwrap()).unwrap();
    let weights = dir.path().join("adapter_model.safetensors");
    let tensors = read_tensors(&weights).unwrap();

    // What PEFT 0.21 writes.
    let mut newest = sound.clone();
    for (key, value) in [
        ("alora_invocation_tokens", Value::Null),
        ("alpha_pattern", json!({})),
        ("auto_mapping", Value::Null),
        ("corda_config", Value::Null),
        ("ensure_weight_tying", json!(false)),
        ("exclude_modules", Value::Null),
        ("layers_to_transform", Value::Null),
        ("loftq_config", json!({})),
        ("megatron_core", json!("megatron.core")),
        ("peft_version", json!("0.21.2")),
        ("qalora_group_size", json!(16)),
        ("rank_pattern", json!({})),
        ("target_parameters", Value::Null),
        ("use_bdlora", Value::Null),
        ("use_rslora", json!(false)),
    ] {
        newest[key] = value;
    }
    let keep = [
        "peft_type",
        "r",
        "lora_alpha",
        "target_modules",
        "use_dora",
        "modules_to_save",
    ];
    let mut fewest = sound.clone();
    fewest
        .as_object_mut()
        .unwrap()
        .retain(|key, _| keep.contains(&key.as_str()));
    let with = |key: &str, value: Value| {
        let mut json = sound.clone();
        json[key] = value;
        json
    };
    let configs = [
        newest,
        fewest,
        with("target_modules", json!("all-linear")),
        with(
            "target_modules",
            json!(r".*\.layers\.\d+\..*(dense|query_key_value|dense_h_to_4h|dense_4h_to_h)"),
        ),
        // Look-around is Python's alone: the tensors say which linears they are of.
        with("target_modules", json!(r".*(?<!lm_head)")),
        with("layers_to_transform", json!([0, 1])),
        with("layers_pattern", json!("layers")),
    ];
    for json in configs {
        std::fs::write(&config_path, json.to_string()).unwrap();
        assert_eq!(load(dir.path()).unwrap(), want, "{json}");
        // What was read is written as a folder that says the same.
        let (config, tensors) = read_adapter(dir.path()).unwrap();
        let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        let again = tempfile::tempdir().unwrap();
        write_adapter(again.path(), &config, &borrowed).unwrap();
        assert_eq!(load(again.path()).unwrap(), want, "{json}, written again");
    }
    for (json, word) in [
        (with("layers_to_transform", json!(0)), "target_modules"),
        (with("target_modules", json!(".*dense.*")), "query_key_value"),
        (with("rank_pattern", json!({ "dense": 4 })), "r 4"),
    ] {
        std::fs::write(&config_path, json.to_string()).unwrap();
        let error = load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(word), "{json}: {error}");
    }

    // Named as in memory, in a `.bin`, the frozen originals beside the copies.
    std::fs::write(&config_path, sound.to_string()).unwrap();
    std::fs::remove_file(&weights).unwrap();
    let in_memory = |name: &str| match name.rsplit_once('.').unwrap() {
        (stem, "lora_magnitude_vector") => format!("{stem}.lora_magnitude_vector.default"),
        (stem, part) if stem.contains("lora_") => format!("{stem}.default.{part}"),
        (stem, part) => format!("{stem}.modules_to_save.default.{part}"),
    };
    let mut named: Vec<(String, &Tensor)> = tensors.iter().map(|(name, t)| (in_memory(name), t)).collect();
    let zeros = Tensor::zeros(DType::F32, [64]);
    named.push((
        "base_model.model.transformer.final_layernorm.original_module.weight".into(),
        &zeros,
    ));
    let bin = dir.path().join("adapter_model.bin");
    write_torch_bin(&bin, &named).unwrap();
    assert_eq!(load(dir.path()).unwrap(), want);
    named.push((
        in_memory(tensors.keys().next().unwrap()).replace("default", "other"),
        &zeros,
    ));
    write_torch_bin(&bin, &named).unwrap();
    let error = load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("default and other"), "{error}");

    // The file of a few hundred bytes that a state-dict hook left.
    write_torch_bin(&bin, &[]).unwrap();
    let error = load(dir.path()).unwrap_err().to_string();
    assert!(
        std::fs::metadata(&bin).unwrap().len() < 1000 && error.contains("no tensors at all"),
        "{error}"
    );
}

/// An embedding and a head that trained on the other revision lose or keep the rows of the image tokens.
#[test]
fn vocabularies_of_both_revisions_fit() {
    let image_tokens = 20_000;
    let small = ModelConfig {
        hidden_size: 8,
        inner_hidden_size: 16,
        num_layers: 1,
        num_attention_heads: 2,
        ..toy()
    };
    let large = ModelConfig {
        vocab_size: small.vocab_size + image_tokens,
        ..small.clone()
    };
    let options = LoadOptions::default();
    let load = |config: &ModelConfig| Model::initialize(config, 1, &options).unwrap();
    let tuning = Tuning::Lora(LoraConfig {
        modules_to_save: vec![SavedModule::WordEmbeddings, SavedModule::LmHead],
        ..all(LoraInit::Kaiming, false)
    });
    let value = |model: &Model, wanted: &str| {
        let mut found = Vec::new();
        model.for_each_param(&mut |name, param| {
            if name == wanted {
                found = values(&param.value);
            }
        });
        found
    };
    for (from, to) in [(&large, &small), (&small, &large)] {
        let mut model = load(from);
        tune::apply(&mut model, &tuning, 7).unwrap();
        model
            .for_each_param_mut(&mut |_, param| {
                if param.trains() {
                    param
                        .value
                        .as_mut_slice::<f32>()
                        .iter_mut()
                        .for_each(|x| *x += 1.0);
                }
                Ok(())
            })
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        tune::save(&model, &tuning, Path::new("base"), dir.path()).unwrap();
        let (mut loaded, mut merged) = (load(to), load(to));
        tune::load_adapter(&mut loaded, dir.path(), true).unwrap();
        tune::merge_adapter(&mut merged, dir.path()).unwrap();
        let cut = image_tokens * small.hidden_size;
        for name in [WORD_EMBEDDINGS, "lm_head.weight"] {
            let trained = value(&model, name);
            let want = match from.vocab_size > to.vocab_size {
                true => trained[cut..].to_vec(),
                false => [&value(&load(to), WORD_EMBEDDINGS)[..cut], &trained].concat(),
            };
            assert_eq!(value(&loaded, name), want, "{name}");
            assert_eq!(value(&merged, name), want, "{name}, merged");
        }
    }
    // Any other number of rows is of another model.
    let mut model = load(&small);
    tune::apply(&mut model, &tuning, 7).unwrap();
    let dir = tempfile::tempdir().unwrap();
    tune::save(&model, &tuning, Path::new("base"), dir.path()).unwrap();
    let other = ModelConfig {
        vocab_size: small.vocab_size + 16,
        ..small
    };
    let error = tune::load_adapter(&mut load(&other), dir.path(), false)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("word_embeddings") && error.contains("another base model"),
        "{error}"
    );
}

/// A prefix as the official trainer leaves it, by itself and in a whole model, with and without its long names.
#[test]
fn prefixes_of_every_official_form_are_the_same() {
    let compute = Compute::cpu(DType::F32);
    for projection in [false, true] {
        let tuning = Tuning::PTuning(PrefixConfig {
            pre_seq_len: 5,
            projection,
            ..PrefixConfig::default()
        });
        let mut model = base(compute, Weights::AsStored);
        tune::apply(&mut model, &tuning, 7).unwrap();
        let want = bits(&model);
        let base_dir = tempfile::tempdir().unwrap();
        std::fs::write(
            base_dir.path().join("config.json"),
            r#"{"hidden_size": 64, "model_type": "chatglm"}"#,
        )
        .unwrap();
        let saved = tempfile::tempdir().unwrap();
        tune::save(&model, &tuning, base_dir.path(), saved.path()).unwrap();
        let prefix = read_tensors(&saved.path().join("pytorch_model.bin")).unwrap();
        let mut whole: Vec<(String, Tensor)> = prefix.iter().map(|(n, t)| (n.clone(), t.clone())).collect();
        let mut inside = base(compute, Weights::AsStored);
        inside
            .for_each_param_mut(&mut |name, param| {
                whole.push((name.to_string(), param.value.to_dtype(DType::F16)));
                Ok(())
            })
            .unwrap();
        whole.push((
            "transformer.layers.0.attention.rotary_emb.inv_freq".into(),
            Tensor::zeros(DType::F16, [4]),
        ));
        let short = |cut: &str| -> Vec<(String, Tensor)> {
            prefix
                .iter()
                .map(|(n, t)| (n.strip_prefix(cut).unwrap().to_string(), t.clone()))
                .collect()
        };
        let forms = [
            short(""),
            short("transformer."),
            short("transformer.prefix_encoder."),
            whole,
        ];
        let dir = tempfile::tempdir().unwrap();
        let load = |dir: &Path| {
            let mut model = base(compute, Weights::AsStored);
            tune::load_adapter(&mut model, dir, false).map(|_| bits(&model))
        };
        let write = |name: &str, tensors: &[(String, Tensor)]| {
            let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
            write_torch_bin(&dir.path().join(name), &borrowed).unwrap();
        };
        // What the trainer leaves beside it.
        for name in [
            "training_args.bin",
            "optimizer.pt",
            "scheduler.pt",
            "rng_state.pth",
            "trainer_state.json",
        ] {
            std::fs::write(dir.path().join(name), b"not looked at").unwrap();
        }
        for form in &forms {
            write("pytorch_model.bin", form);
            assert_eq!(load(dir.path()).unwrap(), want);
            let out = tempfile::tempdir().unwrap();
            tune::rewrite_prefix(dir.path(), Some(base_dir.path()), out.path()).unwrap();
            for name in ["pytorch_model.bin", "config.json"] {
                let read = |dir: &Path| std::fs::read(dir.join(name)).unwrap();
                assert_eq!(read(out.path()), read(saved.path()), "{name}");
            }
        }
        // In shards with an index, as a large model is saved.
        std::fs::remove_file(dir.path().join("pytorch_model.bin")).unwrap();
        let (first, second) = forms[3].split_at(3);
        let files = [
            ("pytorch_model-00001-of-00002.bin", first),
            ("pytorch_model-00002-of-00002.bin", second),
        ];
        let mut map = serde_json::Map::new();
        for (file, tensors) in files {
            write(file, tensors);
            map.extend(tensors.iter().map(|(name, _)| (name.clone(), json!(file))));
        }
        let index = json!({ "weight_map": map }).to_string();
        std::fs::write(dir.path().join("pytorch_model.bin.index.json"), index).unwrap();
        assert_eq!(load(dir.path()).unwrap(), want);

        for (config, words) in [
            (
                json!({ "pre_seq_len": 128 }),
                ["pre_seq_len 128", "pre_seq_len 5"],
            ),
            (
                json!({ "pre_seq_len": 5, "prefix_projection": !projection }),
                ["config.json", "prefix_projection"],
            ),
        ] {
            std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
            let error = load(dir.path()).unwrap_err().to_string();
            assert!(words.iter().all(|word| error.contains(word)), "{error}");
        }
        let config = json!({ "pre_seq_len": 5, "prefix_projection": projection, "quantization_bit": 4 });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        assert_eq!(load(dir.path()).unwrap(), want);
    }
}
