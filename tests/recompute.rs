//! Is a step the same whatever its layers keep? To the bit, in the memory that was promised, without an allocation.

#[path = "common/mod.rs"]
mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use glmtune::checkpoint::Patterns;
use glmtune::cuda;
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::model::tune::{self, FreezeModules, LoraConfig, LoraTarget, PrefixConfig, Tuning};
use glmtune::model::{LayerPolicy, Linears, LoadOptions, LoadedFrom, Model, ModelConfig, Recompute, Weights};
use glmtune::quant::QuantType;
use glmtune::rng::Stream;
use glmtune::tensor::ledger::{Ledger, Pool};
use glmtune::tensor::{Compute, DType, Device, allocations};

use common::{cuda_device, host, values};

const LAYERS: usize = 6;
const NF4: Weights = Weights::Quantized {
    quant_type: QuantType::Nf4,
    double_quant: true,
};

/// One test at a time: [`allocations`] counts those of the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn toy() -> ModelConfig {
    ModelConfig {
        vocab_size: 96,
        hidden_size: 64,
        inner_hidden_size: 256,
        num_layers: LAYERS,
        num_attention_heads: 4,
        max_sequence_length: 32,
        pad_token_id: 3,
        mask_token_id: 24,
        gmask_token_id: 25,
        bos_token_id: 28,
        eos_token_id: 29,
        ..ModelConfig::chatglm_6b()
    }
}

const LORA: LoraConfig = LoraConfig {
    r: 4,
    alpha: 8.0,
    dropout: 0.3,
    rslora: false,
    targets: Vec::new(),
    layers: Vec::new(),
    rank_pattern: Patterns::none(),
    alpha_pattern: Patterns::none(),
    dora: false,
    init: tune::LoraInit::Kaiming,
    modules_to_save: Vec::new(),
};

fn lora(targets: &[LoraTarget], dropout: f64, dora: bool) -> Tuning {
    Tuning::Lora(LoraConfig {
        targets: targets.to_vec(),
        dropout,
        dora,
        ..LORA
    })
}

/// Every way of tuning that leaves a block something of its own to keep.
fn methods() -> Vec<(&'static str, Tuning, Weights)> {
    let some = [LoraTarget::QueryKeyValue, LoraTarget::Dense4HToH];
    let prefix = |projection| {
        Tuning::PTuning(PrefixConfig {
            pre_seq_len: 3,
            projection,
            dropout: 0.3,
        })
    };
    let (layers, modules) = (5, FreezeModules::All);
    let dense = Weights::AsStored;
    vec![
        ("lora", lora(&LoraTarget::ALL, 0.3, false), NF4),
        ("lora of some", lora(&some, 0.0, false), NF4),
        ("dora", lora(&LoraTarget::ALL, 0.3, true), NF4),
        ("dora without dropout", lora(&some, 0.0, true), dense),
        ("prefix", prefix(false), NF4),
        ("projected prefix", prefix(true), dense),
        ("freeze", Tuning::Freeze { layers, modules }, dense),
        ("full", Tuning::Full, dense),
    ]
}

/// A model whose every trained number differs from what it starts as: B of a new adapter is 0 and would hide much.
fn model(compute: Compute, tuning: &Tuning, weights: Weights) -> Model {
    let options = LoadOptions {
        compute,
        weights,
        ..LoadOptions::default()
    };
    let mut model = Model::initialize(&toy(), 1, &options).unwrap();
    tune::apply(&mut model, tuning, 1).unwrap();
    let mut number = 0;
    model
        .for_each_param_mut(&mut |_, param| {
            if param.trains() {
                number += 1;
                let noise = Stream::new(number, 99);
                let moved = values(&param.value).into_iter().zip(0..);
                let moved: Vec<f64> = moved.map(|(v, i)| v + 0.1 * f64::from(noise.normal(i))).collect();
                let moved = glmtune::tensor::Tensor::from_slice(&moved, param.value.shape());
                param.value.copy_from(&moved.to_dtype(param.value.dtype()))?;
            }
            Ok(())
        })
        .unwrap();
    model
}

/// One sequence padded on the left and one on the right, of `len` tokens with padding; three labels each.
fn batch(len: usize) -> Batch {
    let ids: Vec<i32> = (0..2 * len).map(|i| (i * 11 % 40) as i32).collect();
    let mut labels = vec![IGNORE; 2 * len];
    for at in [len - 3, 2 * len - 5] {
        labels[at..at + 3].copy_from_slice(&ids[at..at + 3]);
    }
    let positions = |context: usize| (0..len).map(move |i| [i.min(context), i.saturating_sub(context)]);
    Batch {
        size: 2,
        len,
        ids,
        labels,
        positions: positions(4)
            .chain(positions(2))
            .flatten()
            .map(|p| p as i32)
            .collect(),
        spans: vec![Span { start: 2, context: 4 }, Span { start: 0, context: 2 }],
    }
}

const LONGEST: usize = 12;

/// What a step leaves: losses and gradients, to the bit.
type Outcome = (Vec<u64>, Vec<(String, Vec<u8>)>);

/// Two micro-batches, the second shorter, with an evaluation between them, in one workspace.
fn step(model: &mut Model, policies: &[LayerPolicy]) -> Outcome {
    let mut ws = model.workspace_with(2, LONGEST, policies).unwrap();
    model.zero_gradients().unwrap();
    let before = allocations();
    let mut losses = Vec::new();
    for (number, len) in [LONGEST, 9].into_iter().enumerate() {
        let stream = Stream::new(3, 5 + number as u64);
        let loss = model.loss_and_gradients(&mut ws, &batch(len), 0.7, stream);
        losses.push(loss.unwrap().nll_sum.to_bits());
        losses.push(model.loss(&mut ws, &batch(10)).unwrap().nll_sum.to_bits());
    }
    assert_eq!(allocations(), before, "tensors made in a step under {policies:?}");
    let mut gradients = Vec::new();
    model.for_each_param(&mut |name, param| {
        if let Some(grad) = &param.grad {
            gradients.push((name.to_string(), host(grad).bytes().to_vec()));
        }
    });
    (losses, gradients)
}

fn kept_on_device(recompute: [Recompute; LAYERS]) -> [LayerPolicy; LAYERS] {
    recompute.map(|recompute| LayerPolicy {
        recompute,
        offload: false,
    })
}

#[track_caller]
fn assert_same(what: &str, got: &Outcome, want: &Outcome) {
    assert_eq!(got.0, want.0, "{what}: losses");
    let differ: Vec<&str> = (got.1.iter().zip(&want.1))
        .filter(|(got, want)| got != want)
        .map(|(got, _)| got.0.as_str())
        .collect();
    let some = &differ[..differ.len().min(3)];
    assert!(
        differ.is_empty(),
        "{what}: {} gradients, {some:?} first",
        differ.len()
    );
}

use Recompute::{Full, None as Nothing, Smart};

fn every_policy_gives_the_same_bits_on(compute: Compute, policies: &[[Recompute; LAYERS]]) {
    for (name, tuning, weights) in methods() {
        let mut model = model(compute, &tuning, weights);
        let want = step(&mut model, &[]);
        assert!(
            want.1.iter().all(|(_, bytes)| bytes.iter().any(|&b| b != 0)),
            "{name}"
        );
        for &policy in policies {
            let got = step(&mut model, &kept_on_device(policy));
            assert_same(&format!("{name} on {compute:?} under {policy:?}"), &got, &want);
        }
    }
}

#[test]
fn every_policy_gives_the_same_bits() {
    let _alone = alone();
    for dtype in [DType::F32, DType::F64] {
        let all = Recompute::ALL.map(|recompute| [recompute; LAYERS]);
        let mixed = [
            [Nothing, Smart, Full, Nothing, Full, Smart],
            [Full, Nothing, Smart, Full, Smart, Nothing],
        ];
        every_policy_gives_the_same_bits_on(Compute::cpu(dtype), &[&all[..], &mixed].concat());
    }
}

#[test]
fn every_policy_gives_the_same_bits_on_a_device() {
    let _alone = alone();
    let Some(device) = cuda_device() else { return };
    let dtype = DType::BF16;
    let compute = Compute { device, dtype };
    every_policy_gives_the_same_bits_on(compute, &[[Nothing, Smart, Full, Full, Smart, Nothing]]);
}

/// Five of six layers wait in host memory, under every policy: three of them are copied, as the last two keep their slots.
const OFFLOADED: [(Recompute, bool); LAYERS] = [
    (Nothing, true),
    (Smart, true),
    (Nothing, false),
    (Full, true),
    (Nothing, true),
    (Smart, true),
];

fn policies(layers: [(Recompute, bool); LAYERS]) -> [LayerPolicy; LAYERS] {
    layers.map(|(recompute, offload)| LayerPolicy { recompute, offload })
}

fn offload_gives_the_same_bits_on(compute: Compute) {
    for (name, tuning, weights) in methods() {
        let mut model = model(compute, &tuning, weights);
        let want = step(&mut model, &[]);
        let got = step(&mut model, &policies(OFFLOADED));
        assert_same(&format!("{name} on {compute:?}"), &got, &want);
    }
}

#[test]
fn activations_that_waited_in_host_memory_give_the_same_bits() {
    let _alone = alone();
    offload_gives_the_same_bits_on(Compute::cpu(DType::F32));
    let Some(device) = cuda_device() else { return };
    let compute = Compute {
        device,
        dtype: DType::BF16,
    };
    offload_gives_the_same_bits_on(compute);
    // The emulator's copies come late, and their destinations are poisoned until then; now they come early.
    #[cfg(feature = "emu")]
    {
        use glmtune::cuda::{Landing, land_copies};
        land_copies(Landing::Early);
        offload_gives_the_same_bits_on(compute);
        land_copies(Landing::Late);
    }
}

/// Bytes that a layer keeps of `rows` tokens beside its input, with adapters of rank 4 on every linear if at all.
fn kept_bytes(compute: Compute, recompute: Recompute, rows: usize, tuning: &Tuning) -> usize {
    let config = toy();
    let (h, inner) = (config.hidden_size, config.inner_hidden_size);
    let (rank, dora) = match tuning {
        Tuning::Lora(config) => (config.r, config.dora),
        _ => (0, false),
    };
    let values = match (recompute, dora) {
        (Nothing, false) => 5 * h + inner + 4 * rank,
        (Nothing, true) => 5 * h + inner + 4 * rank + (3 * h + h + inner + h),
        (Smart, false) => 2 * h + 2 * rank,
        (Smart, true) => 2 * h,
        (Full, _) => 0,
    };
    let sums = if recompute == Full {
        0
    } else {
        config.num_attention_heads
    };
    rows * (values * compute.dtype.size() + sums * compute.dtype.accumulator().size())
}

/// Bytes of `account` in `pool`.
fn held(ledger: &Ledger, pool: Pool, account: &str) -> usize {
    let lines = ledger.lines().into_iter();
    let lines = lines.filter(|line| line.pool == pool && line.account == account);
    lines.map(|line| line.bytes as usize).sum()
}

#[test]
fn layers_keep_what_they_promise() {
    let _alone = alone();
    let cuda = cuda_device().map(|device| Compute {
        device,
        dtype: DType::BF16,
    });
    let rows = 2 * LONGEST;
    for compute in [Compute::cpu(DType::F32)].into_iter().chain(cuda) {
        let here = if compute.device == Device::Cpu {
            Pool::Host
        } else {
            Pool::Device
        };
        let there = if compute.device == Device::Cpu {
            Pool::Host
        } else {
            Pool::Pinned
        };
        let x = rows * toy().hidden_size * compute.dtype.size();
        for (name, tuning, weights) in methods() {
            if name.contains("some") || name.contains("without") {
                continue;
            }
            let model = model(compute, &tuning, weights);
            let lowest = usize::from(name == "freeze");
            let reserve = |layers| {
                let ledger = Ledger::new();
                let ws = ledger.scope(|| model.workspace_with(2, LONGEST, &policies(layers)).unwrap());
                (ledger, ws)
            };
            let mut device_bytes = Vec::new();
            for recompute in Recompute::ALL {
                let kept = x + kept_bytes(compute, recompute, rows, &tuning);
                assert!(
                    kept >= rows * recompute.values(64, 256) * compute.dtype.size(),
                    "{name} under {recompute:?}"
                );
                let (ledger, _ws) = reserve([(recompute, false); LAYERS]);
                let found = held(&ledger, here, "activations");
                assert_eq!(found, (LAYERS - lowest) * kept, "{name} under {recompute:?}");
                device_bytes.push(ledger.held(here));
                let (ledger, _ws) = reserve([(recompute, true); LAYERS]);
                let found = held(&ledger, there, "activations");
                assert_eq!(
                    found,
                    (LAYERS - 2 - lowest) * kept,
                    "{name} under {recompute:?}, offloaded"
                );
                if here != there {
                    assert_eq!(held(&ledger, here, "activations"), 0, "{name}");
                    assert!(
                        ledger.held(here) < *device_bytes.last().unwrap(),
                        "{name} {recompute:?}"
                    );
                }
            }
            assert!(
                device_bytes.is_sorted_by(|a, b| a > b),
                "{name}: {device_bytes:?}"
            );
        }
    }
}

/// What layers share beside the buffers that every policy needs, in values of the compute type a token: by Smart the inner
/// values, and q, k and v, whose place serves the gradient over the inner values too; by None that gradient's; by Full both,
/// with context, its log-sum-exps and y.
#[test]
fn layers_share_what_they_make_again() {
    let _alone = alone();
    let compute = Compute::cpu(DType::F32);
    let rows = 2 * LONGEST;
    let (h, inner, rank, heads) = (64, 256, 4, 4);
    let tuning = lora(&LoraTarget::ALL, 0.3, false);
    let model = model(compute, &tuning, NF4);
    let shared = |layers| {
        let ledger = Ledger::new();
        let _ws = ledger.scope(|| model.workspace_with(2, LONGEST, &policies(layers)).unwrap());
        held(&ledger, Pool::Host, "transients") / (rows * compute.dtype.size())
    };
    let none = shared([(Nothing, false); LAYERS]) - inner;
    assert_eq!(shared([(Smart, false); LAYERS]), none + inner + inner + 2 * rank);
    let full = none + 3 * h + heads + h + h + inner + inner + 4 * rank;
    assert_eq!(shared([(Full, false); LAYERS]), full);
    assert_eq!(
        shared([
            (Full, false),
            (Smart, false),
            (Nothing, false),
            (Full, false),
            (Smart, false),
            (Full, false)
        ]),
        full
    );
    // Beside: both norms' outputs, that of the GELU, dropped inner values, u's gradient, four hidden states, statistics, ids.
    let beside = 2 * h + inner + inner + rank + 4 * h;
    assert!((beside..beside + 20).contains(&none), "{none} of {beside}");
}

/// The memory model of the real size, from the run's own constructors: bytes a token that 28 layers keep and share.
#[test]
fn chatglm_6b_keeps_and_shares_what_the_documentation_says() {
    let from = LoadedFrom {
        dtype: DType::F16,
        linears: Linears::FourBit { double_quant: true },
        separate_head: false,
    };
    let options = LoadOptions {
        compute: Compute {
            device: Device::Cuda(0),
            dtype: DType::BF16,
        },
        ..LoadOptions::default()
    };
    let ledger = Ledger::new();
    ledger.plan(|| {
        let mut model = Model::planned(&ModelConfig::chatglm_6b(), from, &options).unwrap();
        let config = LoraConfig { r: 8, ..LORA };
        let targets = LoraTarget::ALL.to_vec();
        tune::apply(&mut model, &Tuning::Lora(LoraConfig { targets, ..config }), 1).unwrap();
        let tokens = 1000;
        // Values of a layer, log-sum-exps of 32 heads, u of rank 8; planes of 4096 values that are shared.
        for (recompute, values, sums, u, planes) in [
            (Nothing, 40_960, 32, 4 * 8, 18),
            (Smart, 12_288, 32, 2 * 8, 22),
            (Full, 4_096, 0, 0, 27),
        ] {
            let layers = [LayerPolicy {
                recompute,
                offload: false,
            }; 28];
            let ws = model.workspace_with(1, tokens, &layers).unwrap();
            let kept = held(&ledger, Pool::Device, "activations") / tokens;
            assert_eq!(kept, 28 * (2 * (values + u) + 4 * sums), "{recompute:?}");
            let shared = held(&ledger, Pool::Device, "transients") / tokens;
            let planes = planes * 4096 * 2;
            assert!(
                (planes..planes + 2 * 4096).contains(&shared),
                "{recompute:?}: {shared} beside {planes}"
            );
            drop(ws);
        }
    });
}

#[test]
fn copies_are_as_many_bytes_as_wait() {
    let _alone = alone();
    let Some(device) = cuda_device() else { return };
    let compute = Compute {
        device,
        dtype: DType::BF16,
    };
    let tuning = lora(&LoraTarget::ALL, 0.3, false);
    let mut model = model(compute, &tuning, NF4);
    let mut ws = model.workspace_with(2, LONGEST, &policies(OFFLOADED)).unwrap();
    for len in [LONGEST, 7] {
        let before = cuda::transfers();
        model
            .loss_and_gradients(&mut ws, &batch(len), 1.0, Stream::new(1, 2))
            .unwrap();
        let after = cuda::transfers();
        let rows = 2 * len;
        let x = rows * toy().hidden_size * compute.dtype.size();
        let copied = OFFLOADED.iter().filter(|(_, offload)| *offload).take(3);
        let bytes: usize = copied
            .map(|&(recompute, _)| x + kept_bytes(compute, recompute, rows, &tuning))
            .sum();
        assert_eq!(after.stored - before.stored, bytes as u64);
        assert_eq!(after.fetched - before.fetched, bytes as u64);
        model.loss(&mut ws, &batch(len)).unwrap();
        assert_eq!(
            cuda::transfers().stored,
            after.stored,
            "an evaluation stores nothing"
        );
    }
}

/// The kernels of a layer wait for no copy of the layer before: of the six tensors that each of these layers lets go, all are
/// under way when the next one has been asked for. The last two layers keep their slots.
#[cfg(feature = "emu")]
#[test]
fn copies_run_beside_the_next_layer() {
    let _alone = alone();
    let Some(device) = cuda_device() else { return };
    cuda::land_copies(cuda::Landing::Late);
    let compute = Compute {
        device,
        dtype: DType::BF16,
    };
    let mut model = model(compute, &lora(&LoraTarget::ALL, 0.3, false), NF4);
    let layers = policies([(Smart, true); LAYERS]);
    let mut ws = model.workspace_with(2, LONGEST, &layers).unwrap();
    let mut under_way = Vec::new();
    let stream = Stream::new(1, 2);
    model
        .forward_seen(&mut ws, &batch(LONGEST), Some(stream), &mut |_| {
            under_way.push(cuda::copies_under_way());
            Ok(())
        })
        .unwrap();
    // The ring has a third place: even the last that was copied, its x, is not waited for.
    assert_eq!(under_way, [0, 6, 6, 6, 6, 1]);
    model
        .loss_and_gradients(&mut ws, &batch(LONGEST), 1.0, stream)
        .unwrap();
    assert_eq!(cuda::copies_under_way(), 0);
}

/// Nothing trains: nothing is kept, and a pass costs what one layer does.
#[test]
fn a_workspace_for_evaluation_keeps_nothing() {
    let _alone = alone();
    let reserve = |num_layers: usize| {
        let config = ModelConfig { num_layers, ..toy() };
        let model = Model::initialize(&config, 1, &LoadOptions::default()).unwrap();
        let ledger = Ledger::new();
        let ws = ledger.scope(|| model.workspace(2, LONGEST).unwrap());
        assert_eq!(held(&ledger, Pool::Host, "activations"), 0);
        let bytes = ledger.held(Pool::Host);
        drop(ws);
        bytes
    };
    assert_eq!(reserve(2), reserve(9));
}

#[test]
fn what_began_to_train_later_is_refused() {
    let _alone = alone();
    let mut model = Model::initialize(&toy(), 1, &LoadOptions::default()).unwrap();
    let mut ws = model.workspace(2, LONGEST).unwrap();
    tune::apply(&mut model, &Tuning::Full, 1).unwrap();
    let result = model.loss_and_gradients(&mut ws, &batch(LONGEST), 1.0, Stream::new(1, 2));
    let message = result.unwrap_err().to_string();
    assert!(message.contains("a gradient in layer 0"), "{message}");
    let refused = model.workspace_with(2, LONGEST, &[LayerPolicy::default(); LAYERS + 1]);
    let message = refused.unwrap_err().to_string();
    assert!(
        message.contains("policies of 7 layers") && message.contains("at most 6"),
        "{message}"
    );
}

/// A number that is none is found in its layer, wherever that layer's activations are.
#[test]
fn what_is_no_number_is_traced_under_every_policy() {
    let _alone = alone();
    for layers in [[(Full, false); LAYERS], OFFLOADED, [(Nothing, false); LAYERS]] {
        let tuning = lora(&LoraTarget::ALL, 0.3, false);
        let mut model = model(Compute::cpu(DType::F32), &tuning, NF4);
        let mut ws = model.workspace_with(2, LONGEST, &policies(layers)).unwrap();
        let stream = Stream::new(1, 2);
        model.loss_and_gradients(&mut ws, &batch(9), 1.0, stream).unwrap();
        assert_eq!(model.first_non_finite(&mut ws), None);
        model
            .for_each_param_mut(&mut |name, param| {
                if name.contains("layers.1.mlp.dense_h_to_4h.lora_B") {
                    param.value.as_mut_slice::<f32>()[0] = f32::NAN;
                }
                Ok(())
            })
            .unwrap();
        let loss = model.loss_and_gradients(&mut ws, &batch(9), 1.0, stream).unwrap();
        assert!(loss.nll_sum.is_nan());
        let found = model.first_non_finite(&mut ws);
        assert_eq!(found.as_deref(), Some("transformer.layers.1.mlp.dense_h_to_4h"));
    }
}
