//! Tuning methods from outside: what they save comes back to the bit, a trained model is a checkpoint again, a prefix
//! generates as it was trained, and what does not fit is refused in one line.

#[path = "common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{assert_close, exact_computes, golden, half_computes, read_safetensors, values};
use glmtune::checkpoint::{Checkpoint, LM_HEAD, WORD_EMBEDDINGS, write_torch_bin};
use glmtune::data::batch::Batch;
use glmtune::data::collate;
use glmtune::model::tune::{self, FreezeModules, Loaded, PrefixConfig, Tuning};
use glmtune::model::{LoadOptions, Model, Weights};
use glmtune::quant::QuantType;
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Device, Tensor, allocations};
use glmtune::tokenizer::Special;

const BASE: &str = "chatglm_v1/checkpoint_fp16_bin";

/// One test at a time: [`allocations`] counts those of the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn base() -> PathBuf {
    golden(BASE).expect("every golden set has the fp16 checkpoint")
}

fn load_from(dir: &Path, compute: Compute, weights: Weights) -> Model {
    Model::load(
        &Checkpoint::open(dir).unwrap(),
        &LoadOptions {
            compute,
            weights,
            ..LoadOptions::default()
        },
    )
    .unwrap()
}

fn load(compute: Compute) -> Model {
    load_from(&base(), compute, Weights::AsStored)
}

fn special(model: &Model) -> Special {
    let config = model.config();
    Special {
        unk: 0,
        sop: config.bos_token_id,
        eop: config.eos_token_id,
        pad: config.pad_token_id,
        mask: config.mask_token_id,
        gmask: config.gmask_token_id,
    }
}

/// `count` words, `[gMASK]`, `<sop>`.
fn prompt(model: &Model, count: u32, seed: u32) -> Vec<u32> {
    let config = model.config();
    let words = (0..count).map(|i| 10 + (i * 37 + seed * 101) % 900);
    words
        .chain([config.gmask_token_id, config.bos_token_id])
        .collect()
}

/// Prompts of these lengths with an answer of three words, labelled.
fn batch(model: &Model, lengths: &[u32]) -> Batch {
    let ids: Vec<Vec<u32>> = lengths
        .iter()
        .map(|&n| [prompt(model, n, n), vec![50, 60, 70]].concat())
        .collect();
    let mut batch = collate::left_pad(&ids, &special(model));
    let answers = batch.len - 3;
    for (i, label) in batch.labels.iter_mut().enumerate() {
        if i % batch.len >= answers {
            *label = batch.ids[i];
        }
    }
    batch
}

/// One pass, and a step down the gradient; returns the loss.
fn step(model: &mut Model, number: u64) -> f64 {
    let batch = batch(model, &[4, 7]);
    let mut ws = model.workspace(batch.size, batch.len).unwrap();
    model.zero_gradients().unwrap();
    let stream = Stream::new(3, number);
    let loss = model.loss_and_gradients(&mut ws, &batch, 1.0, stream).unwrap();
    model
        .for_each_param_mut(&mut |_, param| {
            if let Some(grad) = &param.grad {
                let stepped = values(&param.value).into_iter().zip(values(grad));
                let stepped: Vec<f32> = stepped.map(|(v, g)| (v - 0.01 * g) as f32).collect();
                param.value.write(&stepped)?;
            }
            Ok(())
        })
        .unwrap();
    loss.nll_sum
}

/// The bytes of every parameter, or of those that train.
fn bytes(model: &Model, trained: bool) -> Vec<(String, Vec<u8>)> {
    let mut out = Vec::new();
    model.for_each_param(&mut |name, param| {
        if param.trains() || !trained {
            let host = param.value.to_device(Device::Cpu).unwrap();
            out.push((name.to_string(), host.bytes().to_vec()));
        }
    });
    out
}

fn methods() -> Vec<Tuning> {
    let prefix = |projection| {
        Tuning::PTuning(PrefixConfig {
            pre_seq_len: 5,
            projection,
            dropout: 0.2,
        })
    };
    let freeze = |layers, modules| Tuning::Freeze { layers, modules };
    vec![
        prefix(false),
        prefix(true),
        freeze(1, FreezeModules::All),
        freeze(-2, FreezeModules::Mlp),
        Tuning::Full,
    ]
}

#[test]
fn what_is_saved_trains_on_to_the_bit() {
    let _alone = alone();
    for compute in exact_computes().into_iter().chain(half_computes()) {
        for tuning in methods() {
            let what = format!("{tuning:?} on {} in {}", compute.device, compute.dtype);
            let mut model = load(compute);
            tune::apply(&mut model, &tuning, 7).unwrap();
            step(&mut model, 1);
            let dir = tempfile::tempdir().unwrap();
            tune::save(&model, &tuning, &base(), dir.path()).unwrap();

            let mut again = load(compute);
            tune::restore(&mut again, &tuning, dir.path()).unwrap();
            assert_eq!(bytes(&model, true), bytes(&again, true), "{what}");
            assert_eq!(bytes(&model, false), bytes(&again, false), "{what}");
            let losses = [&mut model, &mut again].map(|m| [step(m, 2), step(m, 3)]);
            assert_eq!(losses[0], losses[1], "{what}");
            assert_eq!(
                bytes(&model, true),
                bytes(&again, true),
                "{what}: after two more steps"
            );
        }
    }
}

/// DoRA with dropout and modules that train whole.
fn dora() -> Tuning {
    Tuning::Lora(tune::LoraConfig {
        r: 3,
        dropout: 0.2,
        dora: true,
        modules_to_save: tune::SavedModule::ALL.to_vec(),
        ..tune::LoraConfig::default()
    })
}

#[test]
fn a_pass_allocates_nothing() {
    let _alone = alone();
    for compute in exact_computes().into_iter().chain(half_computes()) {
        for tuning in methods().into_iter().chain([dora()]) {
            let mut model = load(compute);
            tune::apply(&mut model, &tuning, 7).unwrap();
            model.set_neftune(5.0).unwrap();
            let batches = [batch(&model, &[4, 7]), batch(&model, &[3])];
            let mut ws = model.workspace(2, batches[0].len).unwrap();
            let mut pass = |model: &mut Model, batch: &Batch, number| {
                let stream = Stream::new(1, number);
                model.loss_and_gradients(&mut ws, batch, 1.0, stream).unwrap();
                model.loss(&mut ws, batch).unwrap();
                model.zero_gradients().unwrap();
            };
            pass(&mut model, &batches[0], 0);
            let before = allocations();
            for number in 1..4 {
                pass(&mut model, &batches[number as usize % 2], number);
            }
            assert_eq!(allocations() - before, 0, "{tuning:?} in {}", compute.dtype);
        }
    }
}

/// The same masks everywhere, the same losses within what a type can tell (see tests/golden/trajectories.rs).
#[test]
fn the_device_walks_the_path_of_the_cpu() {
    let _alone = alone();
    let devices = exact_computes().into_iter().skip(1).chain(half_computes());
    for compute in devices {
        let atol = match compute.dtype {
            DType::F32 => 2e-5,
            DType::F16 => 16.0 / 2048.0,
            _ => 16.0 / 256.0,
        };
        let nf4 = Weights::Quantized {
            quant_type: QuantType::Nf4,
            double_quant: true,
        };
        let on_nf4 = methods()
            .into_iter()
            .take(2)
            .chain([dora()])
            .map(|tuning| (tuning, nf4));
        let all = methods().into_iter().chain([dora()]);
        let dense = all.map(|tuning| (tuning, Weights::AsStored));
        for (tuning, weights) in dense.chain(on_nf4) {
            let walk = |compute| {
                let mut model = load_from(&base(), compute, weights);
                tune::apply(&mut model, &tuning, 7).unwrap();
                let tokens = batch(&model, &[4, 7]).supervised() as f64;
                (0..4).map(|i| step(&mut model, i) / tokens).collect::<Vec<_>>()
            };
            let (got, want) = (walk(compute), walk(Compute::cpu(DType::F32)));
            assert_close(
                &format!("{tuning:?} in {}", compute.dtype),
                &got,
                &want,
                atol,
                0.0,
            );
        }
    }
}

/// The official code has a mask for each sequence of the batch.
#[test]
fn each_sequence_has_a_dropout_mask_of_its_own() {
    let _alone = alone();
    for compute in exact_computes() {
        let mut model = load(compute);
        let config = PrefixConfig {
            pre_seq_len: 6,
            projection: false,
            dropout: 0.5,
        };
        tune::apply(&mut model, &Tuning::PTuning(config), 7).unwrap();
        let batch = batch(&model, &[5, 5]);
        let mut ids = batch.ids.chunks(batch.len);
        let (Some(first), Some(second)) = (ids.next(), ids.next()) else {
            unreachable!()
        };
        assert_eq!(first, second);
        let mut ws = model.workspace(batch.size, batch.len).unwrap();
        let mut rows = |dropout| {
            model.forward(&mut ws, &batch, dropout).unwrap();
            let hidden = values(ws.final_hidden());
            let (a, b) = hidden.split_at(hidden.len() / 2);
            (a.to_vec(), b.to_vec())
        };
        let (a, b) = rows(None);
        assert_eq!(a, b, "evaluation drops nothing");
        let (a, b) = rows(Some(Stream::new(1, 2)));
        assert_ne!(a, b);
        assert_eq!(
            (a, b),
            rows(Some(Stream::new(1, 2))),
            "masks depend on the stream alone"
        );
    }
}

/// Prompt first, then token by token, in a batch with left padding: the logits of a forward pass over all of it.
#[test]
fn generation_with_a_prefix_is_the_forward_pass() {
    let _alone = alone();
    for compute in exact_computes() {
        for projection in [false, true] {
            let mut model = load(compute);
            let config = PrefixConfig {
                pre_seq_len: 5,
                projection,
                ..PrefixConfig::default()
            };
            tune::apply(&mut model, &Tuning::PTuning(config), 7).unwrap();
            let mut sequences = vec![prompt(&model, 3, 1), prompt(&model, 8, 2), prompt(&model, 1, 3)];
            let padded = |sequences: &[Vec<u32>]| collate::left_pad(sequences, &special(&model));
            let start = padded(&sequences);
            let mut cache = model.cache(start.size, start.len + 6).unwrap();
            let mut logits = model.prefill(&mut cache, &start).unwrap();
            let mut ws = model.workspace(start.size, start.len + 6).unwrap();
            let vocabulary = model.config().vocab_size;
            for number in 0..6 {
                let whole = padded(&sequences);
                model.forward(&mut ws, &whole, None).unwrap();
                let all = values(&model.logits(&ws).unwrap());
                let last = (1..=whole.size).map(|b| &all[(b * whole.len - 1) * vocabulary..][..vocabulary]);
                let want = last.collect::<Vec<_>>().concat();
                let what = format!("token {number} on {}", compute.device);
                assert_close(&what, &values(&logits), &want, 5e-5, 1e-5);
                let tokens: Vec<u32> = values(&logits)
                    .chunks(vocabulary)
                    .map(|row| {
                        let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                        best.unwrap().0 as u32
                    })
                    .collect();
                for (sequence, &token) in sequences.iter_mut().zip(&tokens) {
                    sequence.push(token);
                }
                logits = model.decode(&mut cache, &tokens).unwrap();
            }
        }
    }
}

#[test]
fn a_prefix_of_the_official_trainer_is_read_and_written() {
    let _alone = alone();
    let weights = golden("chatglm_v1/trajectories/ptuning_embed/final_prefix_encoder.safetensors");
    let (Some(weights), Some(run)) = (weights, golden("chatglm_v1/trajectories/ptuning_embed")) else {
        return;
    };
    let compute = Compute::cpu(DType::F32);
    let mut model = load(compute);
    // The run's folder itself has the official form.
    let Loaded::Prefix(config) = tune::load_adapter(&mut model, &run, false).unwrap() else {
        panic!("a prefix")
    };
    let want = read_safetensors(&weights);
    let name = "transformer.prefix_encoder.embedding.weight";
    assert_eq!(
        (config.pre_seq_len, config.projection),
        (want[name].extent(0), false)
    );
    let got: Vec<_> = bytes(&model, false)
        .into_iter()
        .filter(|(n, _)| n == name)
        .collect();
    assert_eq!(got, [(name.to_string(), want[name].bytes().to_vec())]);
    model.for_each_param(&mut |_, param| assert!(!param.trains()));

    let out = tempfile::tempdir().unwrap();
    tune::save(&model, &Tuning::PTuning(config), &base(), out.path()).unwrap();
    let official = glmtune::checkpoint::read_tensors(&run.join("pytorch_model.bin")).unwrap();
    let written = glmtune::checkpoint::read_tensors(&out.path().join("pytorch_model.bin")).unwrap();
    assert_eq!(written.len(), official.len());
    assert_eq!(written[name].bytes(), official[name].bytes());
    let json = |dir: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
    };
    let (config, of_base) = (json(out.path()), json(&base()));
    assert_eq!(
        (&config["pre_seq_len"], &config["prefix_projection"]),
        (&want[name].extent(0).into(), &false.into())
    );
    assert_eq!(config["hidden_size"], of_base["hidden_size"]);

    // As fp16 it is read as well.
    let half = want[name].to_dtype(DType::F16);
    let folder = tempfile::tempdir().unwrap();
    write_torch_bin(
        &folder.path().join("pytorch_model.bin"),
        &[(name.to_string(), &half)],
    )
    .unwrap();
    tune::load_adapter(&mut model, folder.path(), true).unwrap();
    let mut trained = 0;
    model.for_each_param(&mut |name, param| {
        if param.trains() {
            assert_eq!(
                (
                    name.starts_with("transformer.prefix_encoder"),
                    param.value.dtype()
                ),
                (true, DType::F32)
            );
            trained += 1;
        }
    });
    assert_eq!(trained, 1);
}

#[test]
fn a_prefix_that_does_not_fit_is_refused() {
    let _alone = alone();
    let mut model = load(Compute::cpu(DType::F32));
    let config = model.config().clone();
    let columns = 2 * config.num_layers * config.hidden_size;
    let name = |part: &str| format!("transformer.prefix_encoder.{part}");
    let zeros = |shape: [usize; 2]| Tensor::zeros(DType::F32, shape);
    let mut spoilt = zeros([4, columns]);
    spoilt.as_mut_slice::<f32>()[7] = f32::NAN;
    let cases: Vec<(Vec<(String, Tensor)>, &str)> = vec![
        (
            vec![(name("embedding.weight"), zeros([4, columns + 2]))],
            "another base model",
        ),
        (
            vec![(name("trans.0.weight"), zeros([64, 64]))],
            "embedding.weight",
        ),
        (vec![(name("embedding.weight"), spoilt)], "NaN"),
        (
            vec![
                (name("embedding.weight"), zeros([4, columns])),
                (WORD_EMBEDDINGS.to_string(), zeros([8, 8])),
            ],
            "only transformer.prefix_encoder",
        ),
        (
            vec![
                (name("embedding.weight"), zeros([4, columns])),
                (name("other"), zeros([8, 8])),
            ],
            "other",
        ),
    ];
    for (tensors, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        write_torch_bin(&dir.path().join("pytorch_model.bin"), &borrowed).unwrap();
        let message = tune::load_adapter(&mut model, dir.path(), false)
            .unwrap_err()
            .to_string();
        assert!(message.contains(expected) && !message.contains('\n'), "{message}");
    }
    for (config, expected) in [
        (
            PrefixConfig {
                pre_seq_len: 0,
                ..PrefixConfig::default()
            },
            "--pre-seq-len",
        ),
        (
            PrefixConfig {
                dropout: 1.0,
                ..PrefixConfig::default()
            },
            "--prefix-dropout",
        ),
        (
            PrefixConfig {
                pre_seq_len: 1 << 40,
                ..PrefixConfig::default()
            },
            "--pre-seq-len",
        ),
    ] {
        let message = tune::apply(&mut model, &Tuning::PTuning(config), 0)
            .unwrap_err()
            .to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn layers_that_are_not_there_or_in_four_bits_do_not_train() {
    let _alone = alone();
    let compute = Compute::cpu(DType::F32);
    let mut model = load(compute);
    let layers = model.config().num_layers as i64;
    for n in [0, layers + 1, -layers - 1, i64::MIN] {
        let tuning = Tuning::Freeze {
            layers: n,
            modules: FreezeModules::All,
        };
        let message = tune::apply(&mut model, &tuning, 0).unwrap_err().to_string();
        assert!(
            message.contains("--trainable-layers") && message.contains(&n.to_string()),
            "{message}"
        );
    }
    let weights = Weights::Quantized {
        quant_type: QuantType::Nf4,
        double_quant: true,
    };
    let mut quantized = load_from(&base(), compute, weights);
    for tuning in methods() {
        let applied = tune::apply(&mut quantized, &tuning, 0);
        match tuning {
            Tuning::PTuning(_) => applied.unwrap(),
            _ => {
                let message = applied.unwrap_err().to_string();
                assert!(
                    message.contains("4 bits") && message.contains("fp16"),
                    "{message}"
                );
            }
        }
    }
    let modules = FreezeModules::ALL.map(|m| m.name().parse::<FreezeModules>().unwrap());
    assert_eq!(modules, FreezeModules::ALL);
    assert!("ln".parse::<FreezeModules>().is_err());
}

/// Every tensor of a folder by name.
fn tensors(dir: &Path) -> Vec<(String, Tensor)> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.validate().unwrap();
    let names = checkpoint.names().map(str::to_string);
    names
        .map(|name| {
            let tensor = checkpoint.tensor(&name).unwrap();
            (name, tensor)
        })
        .collect()
}

#[test]
fn a_trained_model_is_a_checkpoint_again() {
    let _alone = alone();
    for compute in exact_computes().into_iter().chain(half_computes()) {
        for (tuning, untied) in methods()
            .into_iter()
            .skip(2)
            .zip([false, true, false])
            .chain([(Tuning::Full, true)])
        {
            let what = format!(
                "{tuning:?} untied {untied} on {} in {}",
                compute.device, compute.dtype
            );
            let mut model = load(compute);
            if untied {
                tune::untie_head(&mut model).unwrap();
            }
            tune::apply(&mut model, &tuning, 0).unwrap();
            let source = Checkpoint::open(&base()).unwrap();
            tune::widen(&mut model, &source).unwrap();
            step(&mut model, 1);
            let parent = tempfile::tempdir().unwrap();
            let dir = parent.path().join("model");
            // Twice: the second replaces the first.
            tune::save_model(&model, &base(), &dir).unwrap();
            assert!(dir.join("model.safetensors").exists(), "{what}");
            tune::save_model_in_shards(&model, &base(), &dir, 60_000).unwrap();
            assert!(dir.join("model.safetensors.index.json").exists(), "{what}");
            assert_eq!(
                std::fs::read_dir(parent.path()).unwrap().count(),
                1,
                "{what}: left over"
            );

            let mut trained = std::collections::BTreeMap::new();
            model.for_each_param(&mut |name, param| {
                if param.trains() {
                    trained.insert(name.to_string(), param.value.to_device(Device::Cpu).unwrap());
                }
            });
            if let (Some(embedding), false) = (trained.get(WORD_EMBEDDINGS).cloned(), untied) {
                trained.insert(LM_HEAD.to_string(), embedding);
            }
            let written = tensors(&dir);
            assert_eq!(written.len(), source.names().count(), "{what}: tensors");
            for (name, tensor) in &written {
                let of_base = source.tensor(name).unwrap();
                assert_eq!(tensor.dtype(), of_base.dtype(), "{what}: {name}");
                let want = trained.get(name).map_or(of_base, |t| t.to_dtype(tensor.dtype()));
                assert!(tensor.bytes() == want.bytes(), "{what}: {name}");
            }
            let reloaded = Checkpoint::open(&dir).unwrap();
            assert_eq!(reloaded.config().tie_word_embeddings, !untied, "{what}");
            assert_eq!(
                reloaded.has_separate_head().unwrap(),
                untied && tuning == Tuning::Full,
                "{what}"
            );
            assert_eq!(reloaded.metadata().unwrap()["torch_dtype"], "float16");
            load_from(&dir, compute, Weights::AsStored);
        }
    }
}

#[test]
fn only_a_dense_model_without_an_adapter_is_saved_whole() {
    let _alone = alone();
    let compute = Compute::cpu(DType::F32);
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().join("model");
    let refuse = |model: &Model, dir: &Path, expected: &str| {
        let message = tune::save_model(model, &base(), dir).unwrap_err().to_string();
        assert!(message.contains(expected) && !message.contains('\n'), "{message}");
    };
    let mut model = load(compute);
    tune::apply(&mut model, &methods()[0], 0).unwrap();
    refuse(&model, &dir, "prefix_encoder");
    let weights = Weights::Quantized {
        quant_type: QuantType::Nf4,
        double_quant: true,
    };
    refuse(&load_from(&base(), compute, weights), &dir, "4 bits");
    let mut model = load(compute);
    refuse(&model, &base(), "the base model itself");
    std::fs::write(out.path().join("letter.txt"), "mine").unwrap();
    refuse(&model, out.path(), "other files");
    tune::apply(&mut model, &Tuning::Full, 0).unwrap();
    model
        .for_each_param_mut(&mut |name, param| {
            if name == WORD_EMBEDDINGS {
                param.value.as_mut_slice::<f32>()[3] = 70_000.0;
            }
            Ok(())
        })
        .unwrap();
    refuse(&model, &dir, "float16");
    assert_eq!(
        std::fs::read_dir(out.path()).unwrap().count(),
        1,
        "nothing is left behind"
    );
}
