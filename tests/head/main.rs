//! The model's two ends in every form: a head in 8 bits, 4 bits or streamed, an embedding that stays on the host.

mod accuracy;
#[path = "../common/mod.rs"]
mod common;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{assert_close, exact_computes, golden, half_computes, values};
use glmtune::checkpoint::{Checkpoint, LM_HEAD, WORD_EMBEDDINGS};
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::model::tune::{self, FreezeModules, LoraConfig, SavedModule, Tuning};
use glmtune::model::{EmbeddingPlace, HeadStorage, Linears, LoadOptions, LoadedFrom, Model};
use glmtune::ops::HEAD_CHUNK;
use glmtune::rng::Stream;
use glmtune::tensor::ledger::{Ledger, Line, Pool};
use glmtune::tensor::{Compute, DType, Device, allocations};

const TIED: &str = "chatglm_v1/checkpoint_fp16_bin";
const SEPARATE: &str = "chatglm_v1/checkpoint_untied_fp16_safetensors";

const STORAGES: [HeadStorage; 4] = [
    HeadStorage::Compute,
    HeadStorage::Int8,
    HeadStorage::Nf4,
    HeadStorage::Stream,
];
const PLACES: [EmbeddingPlace; 2] = [EmbeddingPlace::Device, EmbeddingPlace::Host];

/// One test at a time: [`allocations`] counts those of the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn computes() -> Vec<Compute> {
    [exact_computes(), half_computes()].concat()
}

/// The two golden checkpoints, as far as this set has them.
fn bases() -> Vec<PathBuf> {
    [TIED, SEPARATE].into_iter().filter_map(golden).collect()
}

fn options(compute: Compute, head: HeadStorage, embedding: EmbeddingPlace) -> LoadOptions {
    LoadOptions {
        compute,
        head,
        embedding,
        ..LoadOptions::default()
    }
}

fn load(dir: &Path, compute: Compute, head: HeadStorage, embedding: EmbeddingPlace) -> Model {
    let checkpoint = Checkpoint::open(dir).unwrap();
    Model::load(&checkpoint, &options(compute, head, embedding)).unwrap()
}

fn lora() -> Tuning {
    Tuning::Lora(LoraConfig {
        r: 4,
        dropout: 0.1,
        ..LoraConfig::default()
    })
}

/// Two sequences of different length, padded on the right.
fn batch(vocabulary: usize, number: u64) -> Batch {
    let stream = Stream::new(5, number);
    let (size, len) = (2, 9);
    let mut batch = Batch {
        size,
        len,
        ids: Vec::new(),
        labels: Vec::new(),
        positions: Vec::new(),
        spans: Vec::new(),
    };
    for b in 0..size {
        let (context, end) = (3 + b, len - b);
        for i in 0..len {
            let id = stream.below((b * len + i) as u64, vocabulary) as i32;
            batch.ids.push(id);
            batch
                .labels
                .push(if i >= context && i < end { id } else { IGNORE });
            batch
                .positions
                .extend([i.min(context - 1) as i32, (i + 1).saturating_sub(context) as i32]);
        }
        batch.spans.push(Span { start: 0, context });
    }
    batch
}

/// Everything that the ends of a model decide: loss and gradients of a training step, logits of every position, of a prompt and
/// of the tokens after it.
fn everything(mut model: Model) -> (f64, Vec<Vec<f64>>) {
    tune::apply(&mut model, &lora(), 3).unwrap();
    // B starts at 0, and then nothing would reach A.
    let stream = Stream::new(8, 0);
    model
        .for_each_param_mut(&mut |name, param| {
            if name.ends_with("lora_B.weight") {
                let n = param.value.elements() as u64;
                let b: Vec<f32> = (0..n).map(|i| 0.05 * stream.normal(i)).collect();
                param.value.write(&b)?;
            }
            Ok(())
        })
        .unwrap();
    let vocabulary = model.config().vocab_size;
    let mut ws = model.workspace(2, 9).unwrap();
    let mut loss = 0.0;
    for number in 0..2 {
        let batch = batch(vocabulary, number);
        loss += model
            .loss_and_gradients(&mut ws, &batch, 0.5, Stream::new(1, number))
            .unwrap()
            .nll_sum;
    }
    let mut out = Vec::new();
    model.for_each_param(&mut |_, param| out.extend(param.grad.as_ref().map(values)));
    let batch = batch(vocabulary, 7);
    model.forward(&mut ws, &batch, None).unwrap();
    out.push(values(&model.logits(&ws).unwrap()));
    let mut cache = model.cache(2, 12).unwrap();
    out.push(values(&model.prefill(&mut cache, &batch).unwrap()));
    out.push(values(&model.decode(&mut cache, &[5, 900]).unwrap()));
    (loss, out)
}

/// The only thing that a streamed head and an embedding on the host change is where bytes lie.
#[test]
fn streaming_and_rows_from_the_host_change_no_bit() {
    let _alone = alone();
    for dir in bases() {
        for compute in computes() {
            let want = everything(load(&dir, compute, HeadStorage::Compute, EmbeddingPlace::Device));
            for (head, embedding) in [
                (HeadStorage::Compute, EmbeddingPlace::Host),
                (HeadStorage::Stream, EmbeddingPlace::Device),
                (HeadStorage::Stream, EmbeddingPlace::Host),
            ] {
                let got = everything(load(&dir, compute, head, embedding));
                assert!(
                    got == want,
                    "{compute:?} {head:?} {embedding:?} {}",
                    dir.display()
                );
            }
        }
    }
}

/// The same with a vocabulary of several panels, the last one short and odd.
#[test]
fn several_panels_change_no_bit() {
    let _alone = alone();
    let mut config = Checkpoint::open(&golden(TIED).unwrap()).unwrap().config().clone();
    config.vocab_size = HEAD_CHUNK + 33;
    config.num_layers = 1;
    for compute in computes() {
        let model = |head, embedding| {
            let options = options(compute, head, embedding);
            everything(Model::initialize(&config, 4, &options).unwrap())
        };
        let want = model(HeadStorage::Compute, EmbeddingPlace::Device);
        assert!(
            model(HeadStorage::Stream, EmbeddingPlace::Host) == want,
            "{compute:?}"
        );
        if compute.device == Device::Cpu {
            continue;
        }
        // A device against the CPU, in 8 and in 4 bits.
        for head in [HeadStorage::Int8, HeadStorage::Nf4] {
            let options = options(Compute::cpu(DType::F32), head, EmbeddingPlace::Host);
            let cpu = everything(Model::initialize(&config, 4, &options).unwrap());
            let card = model(head, EmbeddingPlace::Host);
            let what = format!("{head:?} {compute:?}");
            assert_close(&what, &[card.0], &[cpu.0], 0.0, tolerance(compute.dtype));
        }
    }
}

/// Of a loss: some units in the last place of the type that is computed in.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 16.0 / 2048.0 / 7.0,
        DType::BF16 => 16.0 / 256.0 / 7.0,
        _ => 1e-5,
    }
}

#[test]
fn heads_in_few_bits_are_the_same_on_the_device_and_on_the_cpu() {
    let _alone = alone();
    for dir in bases() {
        for head in [HeadStorage::Int8, HeadStorage::Nf4] {
            let cpu = everything(load(&dir, Compute::cpu(DType::F32), head, EmbeddingPlace::Device));
            for compute in computes().into_iter().filter(|c| c.device != Device::Cpu) {
                for embedding in PLACES {
                    let card = everything(load(&dir, compute, head, embedding));
                    let what = format!("{head:?} {compute:?} {}", dir.display());
                    assert_close(&what, &[card.0], &[cpu.0], 0.0, tolerance(compute.dtype));
                    for (i, (got, want)) in card.1.iter().zip(&cpu.1).enumerate() {
                        let off = common::relative_l2(got, want);
                        let limit = match compute.dtype {
                            DType::F16 => 0.02,
                            DType::BF16 => 0.1,
                            _ => 1e-4,
                        };
                        assert!(off < limit, "{what}: output {i} is off by {off}");
                    }
                }
            }
        }
    }
}

/// The matrix that a form holds is what is multiplied: its logits differ from those of the dense head as much as the form
/// rounds, and no less.
#[test]
fn the_form_decides_about_the_numbers() {
    let _alone = alone();
    for dir in bases() {
        let run = |head| everything(load(&dir, Compute::cpu(DType::F32), head, EmbeddingPlace::Device));
        let (exact, int8, nf4) = (
            run(HeadStorage::Compute),
            run(HeadStorage::Int8),
            run(HeadStorage::Nf4),
        );
        let logits = exact.1.len() - 3;
        let off = |other: &(f64, Vec<Vec<f64>>)| common::relative_l2(&other.1[logits], &exact.1[logits]);
        let (int8, nf4) = (off(&int8), off(&nf4));
        // Rows of normal numbers: 2.6 / 127 / sqrt 12 of their deviation, and 9 % for NF4.
        assert!((0.002..0.02).contains(&int8), "int8: {int8}");
        assert!((0.05..0.15).contains(&nf4), "nf4: {nf4}");
    }
}

#[test]
fn a_step_allocates_nothing_in_any_form() {
    let _alone = alone();
    let Some(dir) = golden(TIED) else { return };
    for compute in computes() {
        for (head, embedding) in STORAGES.into_iter().flat_map(|h| PLACES.map(|p| (h, p))) {
            let mut model = load(&dir, compute, head, embedding);
            tune::apply(&mut model, &lora(), 3).unwrap();
            let mut ws = model.workspace(2, 9).unwrap();
            let batches: Vec<Batch> = (0..3).map(|n| batch(model.config().vocab_size, n)).collect();
            let before = allocations();
            for (n, batch) in batches.iter().enumerate() {
                let stream = Stream::new(1, n as u64);
                model.loss_and_gradients(&mut ws, batch, 1.0, stream).unwrap();
                model.token_scores(&mut ws, batch).unwrap();
            }
            assert_eq!(allocations(), before, "{compute:?} {head:?} {embedding:?}");
        }
    }
}

/// What a plan counts is what a model takes, form by form; and a matrix is where the form says.
#[test]
fn the_plan_of_both_ends_is_what_they_take() {
    let _alone = alone();
    for (dir, separate_head) in [(TIED, false), (SEPARATE, true)] {
        let Some(dir) = golden(dir) else { continue };
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let from = LoadedFrom {
            dtype: DType::F16,
            linears: Linears::Dense,
            separate_head,
        };
        for compute in computes().into_iter().filter(|c| c.device != Device::Cpu) {
            for (head, embedding) in STORAGES.into_iter().flat_map(|h| PLACES.map(|p| (h, p))) {
                let options = options(compute, head, embedding);
                let what = format!("{head:?} {embedding:?} {compute:?} separate {separate_head}");
                let (plan, real) = (Ledger::new(), Ledger::new());
                let planned = plan.plan(|| {
                    let mut model = Model::planned(checkpoint.config(), from, &options).unwrap();
                    tune::apply(&mut model, &lora(), 3).unwrap();
                    let workspace = model.workspace(2, 9).unwrap();
                    (model, workspace)
                });
                let made = real.scope(|| {
                    let mut model = Model::load(&checkpoint, &options).unwrap();
                    tune::apply(&mut model, &lora(), 3).unwrap();
                    let workspace = model.workspace(2, 9).unwrap();
                    (model, workspace)
                });
                // The fp16 checkpoint's norms are in f32, the plan's in f16: neither is on the device in that type.
                let there = |ledger: &Ledger| {
                    let lines = ledger.lines().into_iter();
                    lines.filter(|line| line.pool != Pool::Host).collect::<Vec<_>>()
                };
                assert_eq!(there(&plan), there(&real), "{what}");
                let (v, k) = (checkpoint.config().vocab_size, checkpoint.config().hidden_size);
                let held = |account| {
                    let of = |l: &&Line| l.account == account && l.pool == Pool::Device;
                    there(&real).iter().filter(of).map(|l| l.bytes).sum::<u64>()
                };
                let dense = (v * k * compute.dtype.size()) as u64;
                // A tied head in the compute type is the embedding, on the device.
                let shared = !separate_head && head == HeadStorage::Compute;
                let of_embedding = match embedding {
                    EmbeddingPlace::Host if !shared => 0,
                    _ => dense,
                };
                assert_eq!(held("embedding"), of_embedding, "{what}");
                let of_head = match head {
                    HeadStorage::Compute if separate_head => dense,
                    HeadStorage::Compute | HeadStorage::Stream => 0,
                    HeadStorage::Int8 => (v * k + 4 * v) as u64,
                    // A byte of scale for 64 numbers, padded to four in a row; their scales and map.
                    HeadStorage::Nf4 => {
                        (v * k / 2 + 4 * v * k.div_ceil(256) + 4 * (v * k).div_ceil(64 * 256) + 1024) as u64
                    }
                };
                assert_eq!(held("head"), of_head, "{what}");
                drop((planned, made));
            }
        }
    }
}

#[test]
fn a_head_that_trains_is_asked_for_in_the_compute_type() {
    let _alone = alone();
    let Some(dir) = golden(TIED) else { return };
    for compute in computes() {
        for head in [HeadStorage::Int8, HeadStorage::Nf4, HeadStorage::Stream] {
            if head == HeadStorage::Stream && compute.device == Device::Cpu {
                continue; // It is the compute type there.
            }
            let load = || load(&dir, compute, head, EmbeddingPlace::Host);
            let refused = |result: glmtune::error::Result<()>| {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("--head-storage compute"), "{error}");
            };
            refused(tune::apply(&mut load(), &Tuning::Full, 0));
            refused(tune::untie_head(&mut load()));
            let saved = |module| {
                Tuning::Lora(LoraConfig {
                    modules_to_save: vec![module],
                    ..LoraConfig::default()
                })
            };
            refused(tune::apply(&mut load(), &saved(SavedModule::LmHead), 0));
            // The embedding may train beside it: as a copy, which comes to the device.
            let mut model = load();
            tune::apply(&mut model, &saved(SavedModule::WordEmbeddings), 0).unwrap();
            let mut ws = model.workspace(2, 9).unwrap();
            let batch = batch(model.config().vocab_size, 0);
            let stream = Stream::new(1, 1);
            model.loss_and_gradients(&mut ws, &batch, 1.0, stream).unwrap();
            model.for_each_param(&mut |name, param| {
                if name == WORD_EMBEDDINGS {
                    assert_eq!(param.value.device(), compute.device);
                    let grad = values(param.grad.as_ref().unwrap());
                    assert!(grad.iter().any(|g| *g != 0.0));
                }
            });
        }
    }
}

/// A model that trained some layers is written with the base's own ends, whatever form they were held in.
#[test]
fn a_saved_model_has_the_ends_of_its_base() {
    let _alone = alone();
    for dir in bases() {
        for compute in computes() {
            for head in STORAGES {
                let mut model = load(&dir, compute, head, EmbeddingPlace::Host);
                let freeze = Tuning::Freeze {
                    layers: 1,
                    modules: FreezeModules::Mlp,
                };
                tune::apply(&mut model, &freeze, 0).unwrap();
                let out = tempfile::tempdir().unwrap();
                let saved = out.path().join("model");
                tune::save_model(&model, &dir, &saved).unwrap();
                let (base, saved) = (Checkpoint::open(&dir).unwrap(), Checkpoint::open(&saved).unwrap());
                assert_eq!(
                    saved.has_separate_head().unwrap(),
                    base.has_separate_head().unwrap()
                );
                for name in [WORD_EMBEDDINGS, LM_HEAD] {
                    assert_eq!(saved.contains(name), base.contains(name));
                    if base.contains(name) {
                        let (got, want) = (saved.tensor(name).unwrap(), base.tensor(name).unwrap());
                        assert!(got.bytes() == want.bytes(), "{name} {compute:?} {head:?}");
                    }
                }
            }
        }
    }
}
