//! Weights that wait in host memory: the same numbers as without, in less device memory, and nothing allocated on the way.
//!
//! On the emulated device copies land as late as they may, and once more as early as they may.

#[path = "common/mod.rs"]
mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{golden, values};
use glmtune::checkpoint::Checkpoint;
use glmtune::cuda;
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::model::tune::{self, FreezeModules, LoraConfig, LoraInit, PrefixConfig, Tuning};
use glmtune::model::{LayerPolicy, Linears, LoadOptions, LoadedFrom, Model, ModelConfig, Recompute, Weights};
use glmtune::quant::QuantType;
use glmtune::rng::Stream;
use glmtune::tensor::ledger::{Ledger, Pool};
use glmtune::tensor::{Compute, DType, Tensor, allocations};

const LAYERS: usize = 5;

/// One test at a time: bytes and allocations are counted for the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `f` with late and with early copies where that can be chosen; not at all without a device.
fn whenever_they_land(f: impl Fn(Compute)) {
    let _alone = alone();
    let Some(device) = common::cuda_device() else {
        return;
    };
    let compute = Compute {
        device,
        dtype: DType::BF16,
    };
    #[cfg(feature = "emu")]
    for landing in [cuda::Landing::Early, cuda::Landing::Late] {
        cuda::land_copies(landing);
        f(compute);
    }
    #[cfg(not(feature = "emu"))]
    f(compute);
}

fn toy(num_layers: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: 96,
        hidden_size: 64,
        inner_hidden_size: 128,
        num_layers,
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

const NF4: Weights = Weights::Quantized {
    quant_type: QuantType::Nf4,
    double_quant: true,
};
const NF4_FLAT: Weights = Weights::Quantized {
    quant_type: QuantType::Nf4,
    double_quant: false,
};

fn options(compute: Compute, weights: Weights, stream: bool) -> LoadOptions {
    LoadOptions {
        compute,
        weights,
        stream,
        ..LoadOptions::default()
    }
}

fn model(compute: Compute, weights: Weights, stream: bool) -> Model {
    Model::initialize(&toy(LAYERS), 7, &options(compute, weights, stream)).unwrap()
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

/// The bits of a run: losses, gradients and an evaluation of three steps.
fn run(model: &mut Model, policies: &[LayerPolicy]) -> Vec<(String, Vec<u64>)> {
    let batch = batch();
    let mut ws = model.workspace_with(2, 9, policies).unwrap();
    let mut seen = Vec::new();
    for step in 0..3 {
        model.zero_gradients().unwrap();
        let loss = model
            .loss_and_gradients(&mut ws, &batch, 0.5, Stream::new(3, step))
            .unwrap();
        seen.push((format!("loss {step}"), vec![loss.nll_sum.to_bits()]));
        model
            .for_each_param_mut(&mut |name, param| {
                if let Some(grad) = &param.grad {
                    let grad = values(grad);
                    seen.push((name.to_owned(), grad.iter().map(|x| x.to_bits()).collect()));
                    let stepped = values(&param.value).into_iter().zip(grad);
                    let stepped: Vec<f32> = stepped.map(|(v, g)| (v - 0.05 * g) as f32).collect();
                    param.value.write(&stepped)?;
                    if let Some(working) = &mut param.working {
                        working.copy_from(&common::host(&param.value).to_dtype(working.dtype()))?;
                    }
                }
                Ok(())
            })
            .unwrap();
        let loss = model.loss(&mut ws, &batch).unwrap();
        assert!(loss.nll_sum.is_finite());
        seen.push((format!("evaluation {step}"), vec![loss.nll_sum.to_bits()]));
    }
    seen
}

#[track_caller]
fn assert_same(what: &str, got: &[(String, Vec<u64>)], want: &[(String, Vec<u64>)]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for ((name, got), (_, want)) in got.iter().zip(want) {
        assert!(got == want, "{what}: {name} differs");
    }
}

#[test]
fn training_is_the_same_to_the_bit() {
    let smart = LayerPolicy {
        recompute: Recompute::Smart,
        ..LayerPolicy::default()
    };
    let full = LayerPolicy {
        recompute: Recompute::Full,
        ..LayerPolicy::default()
    };
    let prefix = PrefixConfig {
        pre_seq_len: 3,
        ..PrefixConfig::default()
    };
    let freeze = |layers, modules| Tuning::Freeze { layers, modules };
    let pissa = LoraInit::Pissa { iterations: Some(2) };
    let cases: [(&str, Weights, Tuning, &[LayerPolicy]); 8] = [
        ("LoRA", NF4, lora(|_| ()), &[]),
        (
            "LoRA, recomputed",
            NF4_FLAT,
            lora(|_| ()),
            &[full, smart, full, smart],
        ),
        ("DoRA", NF4, lora(|config| config.dora = true), &[]),
        ("PiSSA", NF4, lora(|config| config.init = pissa), &[]),
        (
            "PiSSA, dense",
            Weights::AsStored,
            lora(|config| config.init = pissa),
            &[],
        ),
        ("P-Tuning", Weights::AsStored, Tuning::PTuning(prefix), &[]),
        (
            "freeze, a part",
            Weights::AsStored,
            freeze(2, FreezeModules::Mlp),
            &[],
        ),
        (
            "freeze, the first",
            Weights::AsStored,
            freeze(-1, FreezeModules::All),
            &[full],
        ),
    ];
    whenever_they_land(|compute| {
        for (what, weights, tuning, policies) in &cases {
            let of = |stream| {
                let mut model = model(compute, *weights, stream);
                tune::apply(&mut model, tuning, 5).unwrap();
                run(&mut model, policies)
            };
            assert_same(what, &of(true), &of(false));
        }
    });
}

#[test]
fn every_parameter_may_train_though_weights_were_to_wait() {
    whenever_they_land(|compute| {
        let of = |stream| {
            let mut model = model(compute, Weights::AsStored, stream);
            tune::apply(&mut model, &Tuning::Full, 5).unwrap();
            run(&mut model, &[])
        };
        assert_same("full", &of(true), &of(false));
    });
}

/// What passes read of a matrix that trains may wait in host memory as well; it changes with every step.
#[test]
fn working_copies_of_what_trains_are_streamed() {
    whenever_they_land(|compute| {
        let of = |stream: bool| {
            let mut model = model(compute, Weights::AsStored, false);
            tune::apply(&mut model, &Tuning::Full, 5).unwrap();
            model
                .for_each_param_mut(&mut |name, param| {
                    let shape = param.value.shape();
                    if name.starts_with("transformer.layers.") && shape.extents().len() == 2 {
                        let mut working = match stream {
                            true => Tensor::zeros_pinned(compute.device, compute.dtype, shape)?,
                            false => compute.zeros(shape)?,
                        };
                        working.copy_from(&common::host(&param.value).to_dtype(compute.dtype))?;
                        param.working = Some(working);
                    }
                    Ok(())
                })
                .unwrap();
            let before = cuda::transfers().fetched;
            let seen = run(&mut model, &[]);
            let fetched = cuda::transfers().fetched - before;
            // Three steps forward and backward, and as many evaluations.
            let blocks = if stream { 3 * (3 * LAYERS as u64 - 2) } else { 0 };
            assert_eq!(fetched, blocks * block_bytes(Weights::AsStored));
            seen
        };
        assert_same("working copies", &of(true), &of(false));
    });
}

/// Bytes of a block's matrices as a device holds them, without what stays there.
fn block_bytes(weights: Weights) -> u64 {
    let config = toy(LAYERS);
    let (h, inner) = (config.hidden_size as u64, config.inner_hidden_size as u64);
    // Scales of an output lie in fours, so that 64 inputs have as many as 256.
    let scales = |outputs: u64, inputs: u64| outputs * 4 * inputs.div_ceil(256);
    let matrices = [(3 * h, h), (h, h), (inner, h), (h, inner)];
    matrices
        .iter()
        .map(|&(outputs, inputs)| match weights {
            Weights::AsStored => 2 * outputs * inputs,
            Weights::Quantized { double_quant, .. } => {
                outputs * inputs / 2 + scales(outputs, inputs) * if double_quant { 1 } else { 4 }
            }
        })
        .sum()
}

#[test]
fn a_step_fetches_each_block_once_a_pass_and_allocates_nothing() {
    whenever_they_land(|compute| {
        let freeze = Tuning::Freeze {
            layers: 2,
            modules: FreezeModules::Mlp,
        };
        // Forward all blocks, backward those that the two buffers do not hold; the frozen blocks once.
        let cases = [
            (NF4, lora(|_| ()), 2 * LAYERS - 2),
            (NF4_FLAT, lora(|config| config.dora = true), 2 * LAYERS - 2),
            (Weights::AsStored, freeze, LAYERS - 2),
        ];
        for (weights, tuning, fetches) in cases {
            let mut model = model(compute, weights, true);
            tune::apply(&mut model, &tuning, 5).unwrap();
            let mut ws = model.workspace(2, 9).unwrap();
            let before = (allocations(), cuda::transfers());
            let batch = batch();
            for step in 0..2 {
                let loss = model.loss_and_gradients(&mut ws, &batch, 1.0, Stream::new(1, step));
                assert!(loss.unwrap().nll_sum.is_finite());
            }
            let fetched = cuda::transfers().fetched - before.1.fetched;
            assert_eq!(fetched, 2 * fetches as u64 * block_bytes(weights), "{weights:?}");
            assert_eq!(cuda::transfers().stored, before.1.stored);
            model.loss(&mut ws, &batch).unwrap();
            assert_eq!(allocations() - before.0, 0, "{weights:?}");
        }
    });
}

#[test]
fn device_memory_is_smaller_by_what_waits_and_a_plan_knows_it() {
    whenever_they_land(|compute| {
        for weights in [NF4, NF4_FLAT, Weights::AsStored] {
            let held = |stream| {
                let ledger = Ledger::new();
                let made = ledger.scope(|| {
                    let model = model(compute, weights, stream);
                    let ws = model.workspace(2, 9).unwrap();
                    let cache = model.cache(2, 12).unwrap();
                    (model, ws, cache)
                });
                let bytes = (ledger.held(Pool::Device), ledger.held(Pool::Pinned));
                drop(made);
                assert_eq!(ledger.held(Pool::Device) + ledger.held(Pool::Pinned), 0);
                bytes
            };
            let waiting = LAYERS as u64 * block_bytes(weights);
            let (plain, streamed) = (held(false), held(true));
            assert_eq!((plain.1, streamed.1), (0, waiting), "{weights:?}");
            // Two blocks in the workspace, two in the cache.
            let slots = 4 * block_bytes(weights);
            assert_eq!(streamed.0, plain.0 - waiting + slots, "{weights:?}");

            let ledger = Ledger::new();
            let _planned = ledger.plan(|| {
                let from = LoadedFrom {
                    dtype: DType::F16,
                    linears: match weights {
                        Weights::AsStored => Linears::Dense,
                        Weights::Quantized { double_quant, .. } => Linears::FourBit { double_quant },
                    },
                    separate_head: false,
                };
                let options = options(compute, Weights::AsStored, true);
                let model = Model::planned(&toy(LAYERS), from, &options).unwrap();
                let ws = model.workspace(2, 9).unwrap();
                let cache = model.cache(2, 12).unwrap();
                (model, ws, cache)
            });
            let planned = (ledger.held(Pool::Device), ledger.held(Pool::Pinned));
            assert_eq!(planned, streamed, "{weights:?}");
        }
    });
}

/// A model of which parts train is planned with the same bytes.
#[test]
fn a_plan_knows_which_blocks_do_not_wait() {
    whenever_they_land(|compute| {
        let tuning = Tuning::Freeze {
            layers: 2,
            modules: FreezeModules::Attention,
        };
        let options = options(compute, Weights::AsStored, true);
        let made = |mut model: Model| {
            tune::apply(&mut model, &tuning, 5).unwrap();
            let ws = model.workspace(2, 9).unwrap();
            (model, ws)
        };
        let (real, plan) = (Ledger::new(), Ledger::new());
        let _real = real.scope(|| made(Model::initialize(&toy(LAYERS), 7, &options).unwrap()));
        let from = LoadedFrom {
            dtype: DType::F16,
            linears: Linears::Dense,
            separate_head: false,
        };
        let _plan = plan.plan(|| made(Model::planned(&toy(LAYERS), from, &options).unwrap()));
        for pool in [Pool::Device, Pool::Pinned] {
            assert_eq!(plan.held(pool), real.held(pool), "{pool:?}");
        }
        let waiting = (LAYERS as u64 - 2) * block_bytes(Weights::AsStored);
        assert_eq!(real.held(Pool::Pinned), waiting);
    });
}

#[test]
fn answers_are_the_same_to_the_bit() {
    whenever_they_land(|compute| {
        for weights in [NF4, Weights::AsStored] {
            let of = |stream| {
                let mut model = model(compute, weights, stream);
                tune::apply(&mut model, &lora(|config| config.dora = true), 5).unwrap();
                let mut cache = model.cache(2, 16).unwrap();
                let before = cuda::transfers().fetched;
                let mut logits = vec![model.prefill(&mut cache, &batch()).unwrap()];
                for token in [5, 60, 7] {
                    logits.push(model.decode(&mut cache, &[token, token + 1]).unwrap());
                }
                let fetched = cuda::transfers().fetched - before;
                let blocks = if stream { 4 * LAYERS as u64 } else { 0 };
                assert_eq!(fetched, blocks * block_bytes(weights));
                logits.iter().map(|l| l.bytes().to_vec()).collect::<Vec<_>>()
            };
            assert!(of(true) == of(false), "{weights:?}");
        }
    });
}

/// Merging reads and writes weights as a whole, saving reads them.
#[test]
fn merged_and_saved_models_are_the_same_to_the_bit() {
    let Some(base) = golden("chatglm_v1/checkpoint_fp16_bin") else {
        return;
    };
    whenever_they_land(|compute| {
        let checkpoint = Checkpoint::open(&base).unwrap();
        let load = |weights, stream| Model::load(&checkpoint, &options(compute, weights, stream)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let adapter = folder.path().join("adapter");
        let tuning = lora(|config| config.dora = true);
        let mut trained = load(Weights::AsStored, false);
        tune::apply(&mut trained, &tuning, 5).unwrap();
        trained
            .for_each_param_mut(&mut |name, param| match name.ends_with("lora_B.weight") {
                true => param.value.write(&vec![0.01f32; param.value.elements()]),
                false => Ok(()),
            })
            .unwrap();
        tune::save(&trained, &tuning, &base, &adapter).unwrap();
        let merged = |weights, stream| {
            let mut model = load(weights, stream);
            let mut ws = model.workspace(2, 9).unwrap();
            let before = model.loss(&mut ws, &batch()).unwrap();
            tune::merge_adapter(&mut model, &adapter).unwrap();
            let after = model.loss(&mut ws, &batch()).unwrap();
            assert_ne!(before, after);
            (model, after.nll_sum.to_bits())
        };
        assert_eq!(merged(NF4, true).1, merged(NF4, false).1);
        let (plain, streamed) = (merged(Weights::AsStored, false), merged(Weights::AsStored, true));
        assert_eq!(plain.1, streamed.1);
        let saved = |model: &Model, name: &str| {
            let dir = folder.path().join(name);
            tune::save_model(model, &base, &dir).unwrap();
            let mut files: Vec<_> = std::fs::read_dir(&dir)
                .unwrap()
                .map(|e| e.unwrap().path())
                .collect();
            files.sort();
            files
                .iter()
                .map(|path| std::fs::read(path).unwrap())
                .collect::<Vec<_>>()
        };
        assert!(saved(&plain.0, "plain") == saved(&streamed.0, "streamed"));
    });
}

/// On the CPU weights are used where they lie.
#[test]
fn nothing_waits_on_the_cpu() {
    let compute = Compute::cpu(DType::F32);
    let of = |stream| {
        let mut model = model(compute, NF4, stream);
        tune::apply(&mut model, &lora(|_| ()), 5).unwrap();
        run(&mut model, &[])
    };
    assert_same("cpu", &of(true), &of(false));
}

/// Whichever allocation fails on the way to the first step: an error that says so, and nothing is left behind.
#[cfg(feature = "emu")]
#[test]
fn a_model_that_does_not_fit_leaves_nothing_behind() {
    let _alone = alone();
    let compute = Compute {
        device: glmtune::tensor::Device::Cuda(0),
        dtype: DType::F16,
    };
    let make = || -> glmtune::error::Result<u64> {
        let before = cuda::allocations();
        let mut model = Model::initialize(&toy(1), 7, &options(compute, NF4, true))?;
        tune::apply(&mut model, &lora(|config| config.dora = true), 5)?;
        model.workspace(1, 4)?;
        Ok(cuda::allocations() - before)
    };
    let count = make().unwrap();
    let (held, _) = cuda::held_bytes();
    for n in 1..=count {
        cuda::fail_allocation(n);
        let error = make().unwrap_err();
        assert!(error.is_out_of_memory(), "allocation {n}: {error}");
        assert_eq!(cuda::held_bytes().0, held, "allocation {n}");
    }
    assert_eq!(make().unwrap(), count);
}
