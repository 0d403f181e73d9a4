//! Are merged models the trained ones? Written on disk they have the bits that merging in memory makes.

#[path = "common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};

use common::{assert_close, values};
use glmtune::checkpoint::shards::SHARD_BYTES;
use glmtune::checkpoint::{Checkpoint, LM_HEAD, Source, Stored, WORD_EMBEDDINGS, write_safetensors};
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::export::merged::{Held, Into, Merged};
use glmtune::export::{bnb, huggingface};
use glmtune::model::tune::{
    self, LoraConfig, LoraTarget, Merger, PrefixConfig, SavedModule, Strength, Tuning,
};
use glmtune::model::{LoadOptions, Model, ModelConfig, Weights};
use glmtune::quant::QuantType;
use glmtune::rng::Stream;
use glmtune::tensor::{DType, Tensor};
use tempfile::TempDir;

const NF4: Into = Into::Dequantized {
    quant_type: QuantType::Nf4,
    double_quant: true,
};

/// Rows that are no multiple of a cut, and more than one.
fn toy() -> ModelConfig {
    ModelConfig {
        vocab_size: 300,
        hidden_size: 96,
        inner_hidden_size: 320,
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

fn random(shape: glmtune::tensor::Shape, seed: u64, number: u64) -> Tensor {
    let stream = Stream::new(seed, number);
    let values: Vec<f32> = (0..shape.elements() as u64).map(|i| stream.normal(i)).collect();
    Tensor::from_slice(&values, shape)
}

/// A base in float16 with LayerNorm in float32 and rotary frequencies, as the official files are; the head once or twice.
fn base(head: bool) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = toy();
    config.write(dir.path()).unwrap();
    let mut tensors: Vec<(String, Tensor)> = Vec::new();
    for (number, (name, shape)) in config.tensors().into_iter().enumerate() {
        if name == LM_HEAD {
            if head {
                tensors.push((name, tensors[0].1.clone()));
            }
            continue;
        }
        let mut tensor = random(shape, 1, number as u64);
        let scale = if name == WORD_EMBEDDINGS { 0.1 } else { 0.08 };
        let norm = name.ends_with("layernorm.weight");
        for x in tensor.as_mut_slice::<f32>() {
            *x = *x * scale + if norm { 1.0 } else { 0.0 };
        }
        // A zero keeps its sign where nothing is added to it.
        tensor.as_mut_slice::<f32>()[1] = -0.0;
        let dtype = if name.contains("layernorm") {
            DType::F32
        } else {
            DType::F16
        };
        tensors.push((name, tensor.to_dtype(dtype)));
    }
    for layer in 0..config.num_layers {
        let name = format!("transformer.layers.{layer}.attention.rotary_emb.inv_freq");
        tensors.push((name, random([6].into(), 2, layer as u64).to_dtype(DType::F16)));
    }
    let named: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    write_safetensors(&dir.path().join("model.safetensors"), &named, &Default::default()).unwrap();
    std::fs::write(dir.path().join("ice_text.model"), "a tokenizer").unwrap();
    std::fs::write(dir.path().join("modeling_chatglm.py"), "code").unwrap();
    dir
}

fn open(dir: &Path) -> Checkpoint {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.validate().unwrap();
    checkpoint
}

fn load(dir: &Path, weights: Weights) -> Model {
    let options = LoadOptions {
        weights,
        ..LoadOptions::default()
    };
    Model::load(&open(dir), &options).unwrap()
}

fn quantized() -> Weights {
    Weights::Quantized {
        quant_type: QuantType::Nf4,
        double_quant: true,
    }
}

/// A trained adapter: random numbers in everything that trains.
fn adapter(base: &Path, config: LoraConfig, seed: u64) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tuning = Tuning::Lora(config);
    let mut model = load(base, Weights::AsStored);
    tune::apply(&mut model, &tuning, seed).unwrap();
    let mut number = 0;
    model
        .for_each_param_mut(&mut |_, param| {
            number += 1;
            if !param.trains() {
                return Ok(());
            }
            let moved: Vec<f32> = values(&param.value)
                .iter()
                .zip(values(&random(param.value.shape(), seed, number)))
                .map(|(old, new)| (old + 0.05 * new) as f32)
                .collect();
            param.value.write(&moved)
        })
        .unwrap();
    tune::save(&model, &tuning, base, dir.path()).unwrap();
    dir
}

fn lora() -> LoraConfig {
    LoraConfig {
        r: 3,
        alpha: 5.0,
        ..LoraConfig::default()
    }
}

fn kinds() -> Vec<LoraConfig> {
    vec![
        lora(),
        LoraConfig {
            rslora: true,
            targets: vec![LoraTarget::Dense4HToH],
            ..lora()
        },
        LoraConfig { dora: true, ..lora() },
        LoraConfig {
            modules_to_save: SavedModule::ALL.to_vec(),
            ..lora()
        },
        LoraConfig {
            modules_to_save: vec![SavedModule::WordEmbeddings, SavedModule::FinalLayernorm],
            ..lora()
        },
    ]
}

fn strength(dir: &TempDir, factor: f64) -> Strength<'_> {
    Strength {
        dir: dir.path(),
        factor,
    }
}

fn held(base: &Checkpoint, into: Into) -> Held<'_> {
    Held::new(base, into, Vec::new()).unwrap()
}

fn merger(adapters: &[Strength<'_>]) -> Merger {
    Merger::open(&toy(), adapters).unwrap()
}

/// Writes the model folder and opens it again.
fn written(source: &dyn Source, base: &Path, shard_bytes: u64) -> (TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    huggingface::write(source, base, dir.path(), None, shard_bytes, &mut |_, _, _| Ok(())).unwrap();
    let checkpoint = open(dir.path());
    (dir, checkpoint)
}

fn batch() -> Batch {
    let len = 9;
    let ids: Vec<i32> = (0..2 * len).map(|i| (i * 17 + 5) % 90).collect();
    let mut labels = ids.clone();
    labels[..4].fill(IGNORE);
    let positions = (0..2 * len)
        .flat_map(|i| [(i % len).min(4), (i % len - 3).max(0)])
        .collect();
    Batch {
        size: 2,
        len: len as usize,
        ids,
        labels,
        positions,
        spans: vec![Span { start: 0, context: 4 }; 2],
    }
}

fn logits(model: &Model) -> Vec<f64> {
    let batch = batch();
    let mut ws = model.workspace(batch.size, batch.len).unwrap();
    model.forward(&mut ws, &batch, None).unwrap();
    values(&model.logits(&ws).unwrap())
}

#[test]
fn on_disk_are_the_bits_of_merging_in_memory() {
    for head in [false, true] {
        let base = base(head);
        for config in kinds() {
            let dir = adapter(base.path(), config.clone(), 3);
            let mut memory = load(base.path(), Weights::AsStored);
            tune::merge_adapter(&mut memory, dir.path()).unwrap();
            let checkpoint = open(base.path());
            let (held, merger) = (held(&checkpoint, Into::Original), merger(&[strength(&dir, 1.0)]));
            let merged = Merged::new(&held, &merger, None);
            // Cut into many files: the same bits.
            for shard_bytes in [SHARD_BYTES, 50_000] {
                let (folder, result) = written(&merged, base.path(), shard_bytes);
                let mut seen = 0;
                memory.for_each_param(&mut |name, param| {
                    // Modules that trained whole are held wider in memory than the base stores them.
                    let stored = result.tensor(name).unwrap();
                    let want = param.value.to_dtype(stored.dtype());
                    assert_eq!(stored.bytes(), want.bytes(), "{config:?} {name}");
                    seen += 1;
                });
                assert!(seen > 20);
                let files = std::fs::read_dir(folder.path()).unwrap().count();
                assert_eq!(files > 10, shard_bytes < SHARD_BYTES, "{files} files");
                let separate = config.modules_to_save.contains(&SavedModule::WordEmbeddings);
                assert_eq!(result.has_separate_head().unwrap(), separate);
                assert_eq!(result.contains(LM_HEAD), head || separate);
                assert_eq!(result.config().tie_word_embeddings, !separate);
            }
        }
    }
}

#[test]
fn every_row_has_its_bits_whoever_asks_for_it() {
    let base = base(true);
    let dir = adapter(base.path(), kinds().pop().unwrap(), 3);
    let checkpoint = open(base.path());
    let merger = merger(&[strength(&dir, 0.7)]);
    for into in [Into::Original, NF4] {
        let held = held(&checkpoint, into);
        for dtype in [None, Some(DType::BF16)] {
            let merged = Merged::new(&held, &merger, dtype);
            for (name, shape) in toy().tensors() {
                let whole = merged.dense(&name).unwrap();
                assert_eq!(whole.shape(), shape, "{name}");
                let count = shape.extents()[0];
                for rows in [
                    0..count,
                    0..1,
                    5..90,
                    90.min(count - 1)..count,
                    255.min(count)..count,
                ] {
                    let part = merged.rows(&name, rows.clone()).unwrap();
                    assert_eq!(part.bytes(), whole.rows(rows.clone()).bytes(), "{name} {rows:?}");
                }
            }
        }
    }
}

/// One formula: `W + Σ f s B A`, here in f64 from the numbers of the files.
#[test]
fn several_adapters_are_added_with_their_strengths() {
    let base = base(false);
    let (a, b) = (
        adapter(base.path(), lora(), 3),
        adapter(base.path(), kinds()[1].clone(), 4),
    );
    let strengths = [strength(&a, 0.5), strength(&b, -1.25)];
    let checkpoint = open(base.path());
    let (held, merger) = (held(&checkpoint, Into::Original), merger(&strengths));
    let merged = Merged::new(&held, &merger, Some(DType::F32));
    let scales = [0.5 * 5.0 / 3.0, -1.25 * 5.0 / 3f64.sqrt()];
    for (name, shape) in toy().tensors() {
        if name == LM_HEAD {
            continue;
        }
        let mut want = values(&checkpoint.tensor(&name).unwrap());
        for (strength, scale) in strengths.iter().zip(scales) {
            let file = common::read_safetensors(&strength.dir.join("adapter_model.safetensors"));
            let stem = name.trim_end_matches(".weight");
            let part = |part: &str| file.get(&format!("base_model.model.{stem}.{part}.weight"));
            let (Some(a), Some(b)) = (part("lora_A"), part("lora_B")) else {
                continue;
            };
            let (out, input) = shape.rows_and_columns();
            let (rank, a, b) = (a.extent(0), values(a), values(b));
            for i in 0..out {
                for j in 0..input {
                    let sum: f64 = (0..rank).map(|k| b[i * rank + k] * a[k * input + j]).sum();
                    want[i * input + j] += scale * sum;
                }
            }
        }
        assert_close(&name, &values(&merged.dense(&name).unwrap()), &want, 1e-7, 1e-6);
    }
}

#[test]
fn nothing_of_an_adapter_is_the_base_bit_for_bit() {
    let base = base(true);
    let dir = adapter(base.path(), lora(), 3);
    let checkpoint = open(base.path());
    let (held, merger) = (held(&checkpoint, Into::Original), merger(&[strength(&dir, 0.0)]));
    let (_folder, result) = written(&Merged::new(&held, &merger, None), base.path(), SHARD_BYTES);
    let names: Vec<&str> = checkpoint.names().collect();
    assert_eq!(names, result.names().collect::<Vec<_>>());
    for name in names {
        let (want, got) = (checkpoint.tensor(name).unwrap(), result.tensor(name).unwrap());
        assert_eq!((want.dtype(), want.bytes()), (got.dtype(), got.bytes()), "{name}");
    }
}

/// What QLoRA trained: 4 bits with the adapter alive. Merged in float32 it is the same model up to the order of sums.
#[test]
fn into_dequantised_weights_it_is_the_model_that_was_trained() {
    let base = base(false);
    for (config, factor) in kinds().into_iter().zip([1.0, 0.3, 0.6, 1.0, 1.0]) {
        let dir = adapter(base.path(), config.clone(), 3);
        let mut alive = load(base.path(), quantized());
        tune::load_adapter(&mut alive, dir.path(), false).unwrap();
        tune::scale_adapter(&mut alive, factor).unwrap();
        let want = logits(&alive);
        // From the base in float16, and from its 4-bit folder.
        let four = tempfile::tempdir().unwrap();
        let checkpoint = open(base.path());
        let progress: &mut glmtune::export::Progress<'_> = &mut |_, _, _| Ok(());
        bnb::write(
            &checkpoint,
            base.path(),
            four.path(),
            QuantType::Nf4,
            true,
            progress,
        )
        .unwrap();
        let mut bits = Vec::new();
        for base in [base.path(), four.path()] {
            let checkpoint = open(base);
            let (held, merger) = (held(&checkpoint, NF4), merger(&[strength(&dir, factor)]));
            let merged = Merged::new(&held, &merger, Some(DType::F32));
            let (_folder, result) = written(&merged, base, SHARD_BYTES);
            let model = Model::load(&result, &LoadOptions::default()).unwrap();
            assert!(result.config().quantization_config.is_none());
            assert_close(&format!("{config:?}"), &logits(&model), &want, 2e-5, 1e-5);
            bits.push(logits(&model));
        }
        assert_eq!(bits[0], bits[1]);
        // The original weights are another model.
        let (held, merger) = (
            held(&checkpoint, Into::Original),
            merger(&[strength(&dir, factor)]),
        );
        let merged = Merged::new(&held, &merger, Some(DType::F32));
        let other = Model::load_from(&merged, &LoadOptions::default()).unwrap();
        let off = common::relative_l2(&logits(&other), &want);
        assert!(off > 1e-3, "{config:?}: {off}");
    }
}

#[test]
fn quantised_again_it_is_what_merging_in_four_bits_makes() {
    let base = base(false);
    let dir = adapter(base.path(), lora(), 3);
    let mut memory = load(base.path(), quantized());
    tune::merge_adapter(&mut memory, dir.path()).unwrap();
    let checkpoint = open(base.path());
    let (held, merger) = (held(&checkpoint, NF4), merger(&[strength(&dir, 1.0)]));
    let merged = Merged::new(&held, &merger, None);
    let folder = tempfile::tempdir().unwrap();
    bnb::write(
        &merged,
        base.path(),
        folder.path(),
        QuantType::Nf4,
        true,
        &mut |_, _, _| Ok(()),
    )
    .unwrap();
    assert_eq!(logits(&load(folder.path(), Weights::AsStored)), logits(&memory));
}

/// What was in the base when the adapter was trained goes in first, rounded as training held it.
#[test]
fn adapters_merged_before_the_training_go_first() {
    let base = base(false);
    let (first, second) = (
        adapter(base.path(), kinds()[3].clone(), 3),
        adapter(base.path(), lora(), 4),
    );
    let checkpoint = open(base.path());
    for (into, weights) in [(Into::Original, Weights::AsStored), (NF4, quantized())] {
        let mut memory = load(base.path(), weights);
        tune::merge_adapter(&mut memory, first.path()).unwrap();
        let before = vec![merger(&[strength(&first, 1.0)])];
        let held = Held::new(&checkpoint, into, before).unwrap();
        for name in ["attention.query_key_value", "mlp.dense_4h_to_h"] {
            let name = format!("transformer.layers.1.{name}.weight");
            let in_few_bits = matches!(held.weight(&name).unwrap(), Stored::Quant(_));
            assert_eq!(in_few_bits, into == NF4, "{name}");
        }
        let options = LoadOptions::default();
        // Modules that trained whole are held wider in memory than the base stores them.
        let base_of_training = Model::load_from(&held, &options).unwrap();
        assert_close("held", &logits(&base_of_training), &logits(&memory), 2e-3, 2e-3);
        tune::load_adapter(&mut memory, second.path(), false).unwrap();
        let merger = merger(&[strength(&second, 1.0)]);
        let merged = Merged::new(&held, &merger, Some(DType::F32));
        let result = Model::load_from(&merged, &options).unwrap();
        assert_close("merged", &logits(&result), &logits(&memory), 2e-3, 2e-3);
        let mut alive = base_of_training;
        tune::load_adapter(&mut alive, second.path(), false).unwrap();
        assert_close("alive", &logits(&result), &logits(&alive), 2e-5, 1e-5);
    }
}

#[test]
fn the_folder_is_what_the_official_code_loads() {
    let base = base(true);
    let dir = adapter(base.path(), lora(), 3);
    let text = std::fs::read_to_string(base.path().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["mine"] = "kept".into();
    std::fs::write(base.path().join("config.json"), config.to_string()).unwrap();
    let checkpoint = open(base.path());
    let (held, merger) = (held(&checkpoint, Into::Original), merger(&[strength(&dir, 1.0)]));
    let json = |dir: &Path, name: &str| -> serde_json::Value {
        serde_json::from_str(&std::fs::read_to_string(dir.join(name)).unwrap()).unwrap()
    };
    for dtype in [None, Some(DType::BF16), Some(DType::F32)] {
        let merged = Merged::new(&held, &merger, dtype);
        let (folder, result) = written(&merged, base.path(), 100_000);
        for (name, _) in toy().tensors() {
            let want = dtype.unwrap_or(checkpoint.dtype(&name).unwrap());
            assert_eq!(result.dtype(&name), Some(want), "{name}");
        }
        let inv_freq = "transformer.layers.1.attention.rotary_emb.inv_freq";
        let of = |checkpoint: &Checkpoint| checkpoint.tensor(inv_freq).unwrap().bytes().to_vec();
        assert_eq!(of(&result), of(&checkpoint));
        let config = json(folder.path(), "config.json");
        let name = dtype.unwrap_or(DType::F16).name();
        assert_eq!(
            (&config["torch_dtype"], &config["mine"]),
            (&name.into(), &"kept".into())
        );
        for key in ["quantization_config", "quantization_bit", "dtype"] {
            assert!(config.get(key).is_none(), "{key}");
        }
        let settings = json(folder.path(), "generation_config.json");
        assert_eq!(
            (&settings["top_p"], &settings["temperature"]),
            (&0.7.into(), &0.95.into())
        );
        assert_eq!(settings["eos_token_id"], toy().eos_token_id);
        for name in ["ice_text.model", "modeling_chatglm.py"] {
            let [from, to] = [base.path(), folder.path()].map(|dir| std::fs::read(dir.join(name)).unwrap());
            assert_eq!(from, to);
        }
        // Each file is at most as large as asked for, and the index names each tensor once.
        let index = json(folder.path(), "model.safetensors.index.json");
        assert_eq!(
            index["weight_map"].as_object().unwrap().len(),
            result.names().count()
        );
        let total: usize = result
            .names()
            .map(|name| result.tensor(name).unwrap().byte_len())
            .sum();
        assert_eq!(index["metadata"]["total_size"], total);
        assert!(result.files().len() > 3);
    }
    std::fs::write(base.path().join("generation_config.json"), "{\"mine\": 1}").unwrap();
    let (folder, _) = written(&Merged::new(&held, &merger, None), base.path(), SHARD_BYTES);
    assert_eq!(json(folder.path(), "generation_config.json")["mine"], 1);
}

/// What is no adapter of this base, or cannot be added: one line that names it, at once.
#[test]
fn what_cannot_be_merged_is_refused_when_it_is_opened() {
    let base = base(false);
    let refuse = |strengths: &[Strength<'_>], words: &[&str]| {
        let message = Merger::open(&toy(), strengths).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word) && !message.contains('\n'), "{message}");
        }
    };
    let plain = adapter(base.path(), lora(), 3);
    let dora = adapter(base.path(), kinds()[2].clone(), 3);
    let (saved, other) = (
        adapter(base.path(), kinds()[3].clone(), 3),
        adapter(base.path(), kinds()[4].clone(), 5),
    );
    refuse(&[strength(&plain, 1.0), strength(&dora, 1.0)], &["DoRA", "alone"]);
    refuse(&[strength(&dora, 1.0), strength(&plain, 1.0)], &["DoRA", "alone"]);
    let twice = ["word_embeddings", "another adapter", "merge one of them"];
    refuse(&[strength(&saved, 1.0), strength(&other, 1.0)], &twice);
    refuse(&[strength(&plain, f64::NAN)], &["--adapter-scale", "NaN"]);
    let model = Strength {
        dir: base.path(),
        factor: 1.0,
    };
    refuse(&[model], &["a model", "--model"]);
    let nothing = Strength {
        dir: Path::new("no/such/adapter"),
        factor: 1.0,
    };
    refuse(&[nothing], &["no/such/adapter", "nothing"]);

    let prefix = tempfile::tempdir().unwrap();
    let tuning = Tuning::PTuning(PrefixConfig {
        pre_seq_len: 4,
        ..PrefixConfig::default()
    });
    let mut tuned = load(base.path(), Weights::AsStored);
    tune::apply(&mut tuned, &tuning, 0).unwrap();
    tune::save(&tuned, &tuning, base.path(), prefix.path()).unwrap();
    refuse(&[strength(&prefix, 1.0)], &["prefix of P-Tuning", "alone"]);

    // Of another base: narrower, of fewer layers, of more.
    for (config, word) in [
        (
            ModelConfig {
                hidden_size: 64,
                ..toy()
            },
            "layers.0.attention.query_key_value",
        ),
        (
            ModelConfig {
                num_layers: 1,
                ..toy()
            },
            "layers.1",
        ),
        (
            ModelConfig {
                num_layers: 3,
                ..toy()
            },
            "layers.2",
        ),
    ] {
        let message = Merger::open(&config, &[strength(&plain, 1.0)])
            .unwrap_err()
            .to_string();
        assert!(
            message.contains(word) && message.contains("another base"),
            "{message}"
        );
    }
    let file = |change: &dyn Fn(&mut common::Tensors)| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(
            plain.path().join("adapter_config.json"),
            dir.path().join("adapter_config.json"),
        )
        .unwrap();
        let mut tensors = common::read_safetensors(&plain.path().join("adapter_model.safetensors"));
        change(&mut tensors);
        let named: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        let path = dir.path().join("adapter_model.safetensors");
        write_safetensors(&path, &named, &Default::default()).unwrap();
        dir
    };
    let part = |part: &str| format!("base_model.model.transformer.layers.1.attention.dense.{part}.weight");
    let a = part("lora_A");
    refuse(
        &[strength(&file(&|t| drop(t.remove(&a))), 1.0)],
        &["layers.1.attention.dense"],
    );
    let wide = file(&|t| drop(t.insert(a.clone(), Tensor::zeros(DType::F32, [4, 96]))));
    refuse(&[strength(&wide, 1.0)], &["layers.1.attention.dense", "[4, 96]"]);
    let extra = file(&|t| drop(t.insert("base_model.model.lora_C".into(), Tensor::zeros(DType::F32, [2]))));
    refuse(&[strength(&extra, 1.0)], &["lora_C"]);

    // 4 bits have nothing left of the original.
    let four = tempfile::tempdir().unwrap();
    let progress: &mut glmtune::export::Progress<'_> = &mut |_, _, _| Ok(());
    bnb::write(
        &open(base.path()),
        base.path(),
        four.path(),
        QuantType::Nf4,
        true,
        progress,
    )
    .unwrap();
    let checkpoint = open(four.path());
    let message = Held::new(&checkpoint, Into::Original, Vec::new())
        .err()
        .unwrap()
        .to_string();
    assert!(
        message.contains("few bits") && message.contains("--into dequantized"),
        "{message}"
    );
}

#[test]
fn a_number_that_the_type_cannot_hold_is_named_and_leaves_nothing() {
    let base = base(false);
    let dir = adapter(base.path(), lora(), 3);
    let checkpoint = open(base.path());
    let (held, merger) = (held(&checkpoint, Into::Original), merger(&[strength(&dir, 1e7)]));
    let out = tempfile::tempdir().unwrap();
    let write = |dtype| {
        let merged = Merged::new(&held, &merger, dtype);
        huggingface::write(
            &merged,
            base.path(),
            out.path(),
            None,
            SHARD_BYTES,
            &mut |_, _, _| Ok(()),
        )
    };
    let message = write(None).unwrap_err().to_string();
    for word in [
        "layers.0.attention.query_key_value.weight",
        "float16",
        "--type",
        "with ",
    ] {
        assert!(message.contains(word) && !message.contains('\n'), "{message}");
    }
    let left: Vec<PathBuf> = std::fs::read_dir(out.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    assert!(left.is_empty(), "{left:?}");
    write(Some(DType::F32)).unwrap();
}

#[path = "common/program.rs"]
mod program;

/// The program from outside: adapters trained by it, merged by it, and used as any other model.
mod command {
    use std::fs;
    use std::process::Command;

    use super::program::{Workplace, fails, glmtune, str, succeeds, text};

    fn train(place: &Workplace, output: &str, flags: &[&str]) {
        succeeds(
            &place
                .train(output, &[flags, &["--max-steps", "6"]].concat())
                .output()
                .unwrap(),
        );
    }

    fn merge(place: &Workplace, adapters: &[&str], output: &str, flags: &[&str]) -> Command {
        let (model, output) = (place.model(), place.path(output));
        let mut command = glmtune(&["merge", "--model", str(&model), "--output", str(&output)]);
        for adapter in adapters {
            command.args(["--adapter", str(&place.path(adapter))]);
        }
        command.args(["--device", "cpu"]).args(flags);
        command
    }

    fn answer(place: &Workplace, model: &str, flags: &[&str]) -> String {
        let model = place.path(model);
        let mut command = glmtune(&["generate", "--model", str(&model), "--prompt", "数到3"]);
        let output = command
            .args(["--greedy", "--device", "cpu"])
            .args(flags)
            .output()
            .unwrap();
        succeeds(&output);
        text(&output.stdout)
    }

    /// The figure of a line of the table.
    fn figure(table: &str, line: &str) -> f64 {
        let found = table.lines().find_map(|l| l.strip_prefix(line));
        let word = found.and_then(|rest| rest.split_whitespace().next());
        word.unwrap_or_else(|| panic!("no {line:?} in {table}"))
            .trim_end_matches(',')
            .parse()
            .unwrap()
    }

    #[test]
    fn a_merged_model_is_the_trained_one_and_says_so() {
        let Some(place) = Workplace::new() else { return };
        train(&place, "lora", &["--method", "lora"]);
        train(&place, "qlora", &["--method", "qlora"]);
        for (adapter, into, other) in [
            ("lora", "as it is stored", "dequantized"),
            ("qlora", "in 4 bits", "original"),
        ] {
            let out = format!("{adapter}-merged");
            let output = merge(&place, &[adapter], &out, &[]).output().unwrap();
            let said = succeeds(&output);
            assert!(said.contains(into), "{said}");
            let table = text(&output.stdout);
            let (difference, allowed) = (
                figure(&table, "largest logit difference"),
                figure(&table, "allowed"),
            );
            assert!(difference > 0.0 && difference <= allowed, "{table}");
            let card = fs::read_to_string(place.path(&out).join("README.md")).unwrap();
            assert!(
                card.contains("largest logit difference") && card.contains(adapter),
                "{card}"
            );
            let adapted = answer(&place, "model", &["--adapter", str(&place.path(adapter))]);
            assert_eq!(answer(&place, &out, &[]), adapted);
            // Into what it was not trained on: another model, and the table says what is allowed for.
            let output = merge(&place, &[adapter], "other", &["--into", other, "--overwrite"])
                .output()
                .unwrap();
            succeeds(&output);
            let table = text(&output.stdout);
            assert!(
                figure(&table, "largest logit difference") > 5.0 * difference,
                "{table}"
            );
            assert!(table.contains("another base"), "{table}");
        }
        // So few weights do not survive 4 bits twice: beyond what is usual there is no result, and the line says how to get one.
        let line = fails(
            &merge(&place, &["qlora"], "four", &["--into", "requantized"])
                .output()
                .unwrap(),
            1,
        );
        assert!(line.contains("--verify-bound"), "{line}");
        assert!(!place.path("four").exists());
        let flags = ["--into", "requantized", "--verify-bound", "1000"];
        succeeds(&merge(&place, &["qlora"], "four", &flags).output().unwrap());
        let config = fs::read_to_string(place.path("four/config.json")).unwrap();
        assert!(config.contains("bnb_4bit_quant_type"), "{config}");
        // Forms that differ: the user says which.
        let both = merge(&place, &["lora", "qlora"], "both", &[]).output().unwrap();
        let line = fails(&both, 1);
        assert!(line.contains("--into original"), "{line}");
        let flags = [
            "--into",
            "original",
            "--adapter-scale",
            "0.5",
            "--adapter-scale",
            "0.25",
        ];
        let both = merge(&place, &["lora", "qlora"], "both", &flags)
            .output()
            .unwrap();
        assert!(succeeds(&both).contains("times 0.25"));
    }

    /// What an adapter was trained on goes with it through the tools, and is found by any name of its folder.
    #[test]
    fn an_adapter_made_of_one_of_4_bits_is_one_of_4_bits() {
        let Some(place) = Workplace::new() else { return };
        train(&place, "qlora", &["--method", "qlora"]);
        let (strong, weaker) = (place.path("qlora"), place.path("weaker"));
        let flags = ["--factor", "0.5", "--output", str(&weaker)];
        let mut scale = glmtune(&["adapter", "scale", str(&strong)]);
        let scaled = scale.args(flags).output().unwrap();
        succeeds(&scaled);
        for (adapter, flags) in [("weaker", &[][..]), ("qlora", &["--adapter-scale", "0.5"][..])] {
            let flags = [flags, &["--type", "fp32"]].concat();
            let output = merge(&place, &[adapter], &format!("of-{adapter}"), &flags)
                .output()
                .unwrap();
            assert!(succeeds(&output).contains("in 4 bits"), "{adapter}");
        }
        let bytes = |folder: &str| fs::read(place.path(folder).join("model.safetensors")).unwrap();
        assert!(bytes("of-weaker") == bytes("of-qlora"));
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(place.path("qlora"), place.path("link")).unwrap();
            let output = merge(&place, &["link"], "of-link", &["--no-verify"])
                .output()
                .unwrap();
            assert!(succeeds(&output).contains("in 4 bits"));
        }
    }

    /// Replacing a result never takes what it is made from, or what the user put there.
    #[test]
    fn what_lies_inside_the_output_is_not_lost() {
        let Some(place) = Workplace::new() else { return };
        train(&place, "lora", &["--method", "lora"]);
        succeeds(
            &merge(&place, &["lora"], "merged", &["--no-verify"])
                .output()
                .unwrap(),
        );
        let again = |adapter: &str| {
            let flags = ["--no-verify", "--overwrite"];
            merge(&place, &[adapter], "merged", &flags).output().unwrap()
        };
        succeeds(&again("lora"));
        let inside = place.path("merged/run2");
        fs::create_dir(&inside).unwrap();
        for entry in fs::read_dir(place.path("lora")).unwrap().flatten() {
            if entry.path().is_file() {
                fs::copy(entry.path(), inside.join(entry.file_name())).unwrap();
            }
        }
        for adapter in ["merged/run2", "lora"] {
            let line = fails(&again(adapter), 1);
            assert!(
                line.contains("inside") || line.contains("did not write"),
                "{line}"
            );
            assert!(inside.join("adapter_model.safetensors").exists());
        }
        fs::remove_dir_all(&inside).unwrap();
        fs::write(place.path("merged/notes.docx"), "mine").unwrap();
        assert!(fails(&again("lora"), 1).contains("notes.docx"));
    }

    #[test]
    fn what_was_merged_before_the_training_goes_in_by_itself() {
        let Some(place) = Workplace::new() else { return };
        train(&place, "a", &["--method", "lora"]);
        let a = place.path("a");
        train(&place, "b", &["--method", "lora", "--merge-adapters", str(&a)]);
        let output = merge(&place, &["b"], "merged", &["--type", "fp32"])
            .output()
            .unwrap();
        let said = succeeds(&output);
        assert!(
            said.contains("before: ") && text(&output.stdout).contains("float32"),
            "{said}"
        );
        let adapted = answer(&place, "model", &["--adapter", str(&place.path("b"))]);
        assert_eq!(answer(&place, "merged", &[]), adapted);
        let line = fails(&merge(&place, &["a", "b"], "ab", &[]).output().unwrap(), 1);
        assert!(line.contains("merge it alone"), "{line}");
    }

    #[test]
    fn the_bench_of_files_runs_and_cleans_up() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("disk");
        fs::create_dir(&place).unwrap();
        let json = dir.path().join("figures.json");
        let args = [
            "bench",
            "files",
            "--quick",
            "--place",
            str(&place),
            "--json",
            str(&json),
        ];
        let output = glmtune(&args).output().unwrap();
        succeeds(&output);
        let lines = text(&output.stdout);
        assert_eq!(
            lines.lines().filter(|line| line.contains("ratio")).count(),
            6,
            "{lines}"
        );
        assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
        let figures: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
        assert_eq!(figures["files"].as_array().unwrap().len(), 6);
    }
}
