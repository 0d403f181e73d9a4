//! Does it train, and does it go on where it stopped?

mod common;

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};

use glmtune::checkpoint::{AdapterConfig, Checkpoint};
use glmtune::config::LossReduction;
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::error::Error;
use glmtune::model::{LoadOptions, Model, ModelConfig, Weights, tune};
use glmtune::optim::OptimizerConfig;
use glmtune::quant::QuantType;
use glmtune::rng::Stream;
use glmtune::schedule::{Schedule, Scheduler};
use glmtune::tensor::{Compute, DType, allocations};
use glmtune::train::{Checkpoints, OPTIMIZER, Options, RunState, Trainer};

/// One test at a time: [`allocations`] counts those of the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A toy checkpoint of the golden set.
fn checkpoint() -> Option<PathBuf> {
    let names = [
        "checkpoint_fp32_safetensors",
        "checkpoint_fp16_bin",
        "checkpoint_untied_fp16_safetensors",
    ];
    names
        .iter()
        .find_map(|name| common::golden(&format!("chatglm_v1/{name}")))
}

fn options() -> Options {
    Options {
        optimizer: OptimizerConfig {
            weight_decay: 0.01,
            ..OptimizerConfig::default()
        },
        schedule: Schedule {
            scheduler: Scheduler::Cosine,
            base: 5e-3,
            warmup_steps: 2,
            total_steps: 10,
            ..Schedule::default()
        },
        max_grad_norm: 1.0,
        in_backward: false,
        reduction: LossReduction::Token,
        seed: 7,
    }
}

const LONGEST: usize = 24;
const SIZE: usize = 2;

/// Everywhere a model can compute.
fn every() -> Vec<Compute> {
    [common::exact_computes(), common::half_computes()].concat()
}

fn model(compute: Compute, dropout: f64) -> Option<Model> {
    let weights = Weights::Quantized {
        quant_type: QuantType::Nf4,
        double_quant: true,
    };
    let load = LoadOptions {
        compute,
        weights,
        ..LoadOptions::default()
    };
    let mut model = Model::load(&Checkpoint::open(&checkpoint()?).unwrap(), &load).unwrap();
    let targets = tune::LoraTarget::ALL.to_vec();
    tune::apply(
        &mut model,
        &tune::Tuning::Lora(tune::LoraConfig {
            r: 4,
            alpha: 8.0,
            dropout,
            rslora: false,
            targets,
            ..tune::LoraConfig::default()
        }),
        3,
    )
    .unwrap();
    Some(model)
}

fn trainer(compute: Compute, dropout: f64, options: Options) -> Option<Trainer> {
    Some(Trainer::new(model(compute, dropout)?, options, SIZE, LONGEST).unwrap())
}

fn adapter_config() -> AdapterConfig {
    AdapterConfig {
        base_model_name_or_path: None,
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.1,
        target_modules: tune::LoraTarget::ALL
            .iter()
            .map(|t| t.name().to_string())
            .collect(),
        use_rslora: false,
        ..AdapterConfig::default()
    }
}

/// Random sequences of the given prompt and answer lengths, padded on the right.
fn batch(config: &ModelConfig, number: u64, lengths: &[(usize, usize)]) -> Batch {
    let stream = Stream::new(99, number);
    // Below every special id, in both generations of the vocabulary.
    let ordinary = [
        config.bos_token_id,
        config.eos_token_id,
        config.mask_token_id,
        config.gmask_token_id,
    ];
    let ordinary = ordinary.into_iter().min().unwrap().min(config.vocab_size as u32) as usize;
    let len = lengths
        .iter()
        .map(|(prompt, answer)| prompt + answer + 3)
        .max()
        .unwrap();
    let mut batch = Batch {
        size: lengths.len(),
        len,
        ids: vec![],
        labels: vec![],
        positions: vec![],
        spans: vec![],
    };
    let mut drawn = 0;
    for &(prompt, answer) in lengths {
        let mut token = |_| {
            drawn += 1;
            if ordinary > 0 {
                stream.below(drawn, ordinary) as i32
            } else {
                0
            }
        };
        let mut ids: Vec<i32> = (0..prompt).map(&mut token).collect();
        ids.extend([config.gmask_token_id as i32, config.bos_token_id as i32]);
        ids.extend((0..answer).map(&mut token));
        ids.push(config.eos_token_id as i32);
        let context = prompt + 1;
        for i in 0..len {
            let inside = i < ids.len();
            batch.ids.push(if inside {
                ids[i]
            } else {
                config.pad_token_id as i32
            });
            batch
                .labels
                .push(if inside && i >= context { ids[i] } else { IGNORE });
            let (position, block) = if i < context {
                (i, 0)
            } else {
                (context - 1, i - context + 1)
            };
            batch.positions.extend([position as i32, block as i32]);
        }
        batch.spans.push(Span { start: 0, context });
    }
    batch
}

/// The micro-batches of step `step`: lengths differ from step to step.
fn micro_batches(config: &ModelConfig, step: u64) -> Vec<Batch> {
    let n = step as usize;
    vec![
        batch(config, 2 * step, &[(5 + n % 4, 9), (3, 4 + n % 5)]),
        batch(config, 2 * step + 1, &[(8, 3 + n % 7), (4 + n % 3, 10)]),
    ]
}

fn adapter_bits(trainer: &Trainer) -> Vec<(String, Vec<u8>)> {
    tune::adapter_tensors(trainer.model())
        .unwrap()
        .into_iter()
        .map(|(n, t)| (n, t.bytes().to_vec()))
        .collect()
}

#[test]
fn the_loss_falls() {
    let _alone = alone();
    every().into_iter().for_each(the_loss_falls_on);
}

fn the_loss_falls_on(compute: Compute) {
    let Some(mut trainer) = trainer(compute, 0.0, options()) else {
        return;
    };
    let batches = micro_batches(trainer.model().config(), 0);
    let before = trainer.evaluate(&batches).unwrap().loss;
    for _ in 0..10 {
        trainer.step(&batches).unwrap();
    }
    let after = trainer.evaluate(&batches).unwrap().loss;
    assert!(after < 0.9 * before, "{before} -> {after}");
}

#[test]
fn a_step_allocates_nothing() {
    let _alone = alone();
    every().into_iter().for_each(a_step_allocates_nothing_on);
}

fn a_step_allocates_nothing_on(compute: Compute) {
    let Some(mut trainer) = trainer(compute, 0.1, options()) else {
        return;
    };
    let config = trainer.model().config().clone();
    let steps: Vec<_> = (0..4).map(|step| micro_batches(&config, step)).collect();
    let before = allocations();
    for batches in &steps {
        trainer.step(batches).unwrap();
    }
    trainer.evaluate(&steps[0]).unwrap();
    assert_eq!(allocations() - before, 0, "tensors made in 4 steps");
}

#[test]
fn a_resumed_run_is_the_uninterrupted_run_to_the_bit() {
    let _alone = alone();
    every()
        .into_iter()
        .for_each(a_resumed_run_is_the_uninterrupted_run_to_the_bit_on);
}

fn a_resumed_run_is_the_uninterrupted_run_to_the_bit_on(compute: Compute) {
    let Some(mut whole) = trainer(compute, 0.1, options()) else {
        return;
    };
    let config = whole.model().config().clone();
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(dir.path(), 1);
    let mut losses = Vec::new();
    for step in 0..8 {
        losses.push(whole.step(&micro_batches(&config, step)).unwrap());
        if step == 4 {
            let state = RunState {
                step: 5,
                loss_scale: whole.loss_scale(),
                ..RunState::new(8, String::new(), String::new(), serde_json::Map::new())
            };
            checkpoints
                .save(&state, |dir| {
                    tune::save_adapter(whole.model(), dir, &adapter_config())?;
                    whole.optimizer().save(&dir.join(OPTIMIZER))
                })
                .unwrap();
        }
    }
    // A new process: the base again, adapter and optimizer from the checkpoint.
    let (_, place) = checkpoints.list().unwrap().pop().unwrap();
    let mut base = model(compute, 0.0).unwrap();
    tune::load_adapter(&mut base, &place, true).unwrap();
    let mut resumed = Trainer::new(base, options(), SIZE, LONGEST).unwrap();
    resumed.optimizer_mut().load(&place.join(OPTIMIZER)).unwrap();
    let state = RunState::read(&place).unwrap();
    resumed.set_steps(state.step);
    resumed.set_loss_scale(state.loss_scale);
    for step in 5..8 {
        assert_eq!(
            resumed.step(&micro_batches(&config, step)).unwrap(),
            losses[step as usize]
        );
    }
    assert!(
        adapter_bits(&resumed) == adapter_bits(&whole),
        "the final adapters differ"
    );
}

#[test]
fn the_token_mean_does_not_depend_on_the_cut_into_micro_batches() {
    let _alone = alone();
    let Some(mut cut) = trainer(Compute::cpu(DType::F32), 0.0, options()) else {
        return;
    };
    let Some(mut whole) = trainer(Compute::cpu(DType::F32), 0.0, options()) else {
        return;
    };
    let config = cut.model().config().clone();
    let lengths = [(5, 12), (3, 4)];
    let parts: Vec<Batch> = {
        let both = batch(&config, 1, &lengths);
        (0..2)
            .map(|b| Batch {
                size: 1,
                len: both.len,
                ids: both.ids[b * both.len..][..both.len].to_vec(),
                labels: both.labels[b * both.len..][..both.len].to_vec(),
                positions: both.positions[2 * b * both.len..][..2 * both.len].to_vec(),
                spans: vec![both.spans[b]],
            })
            .collect()
    };
    let a = cut.step(&parts).unwrap();
    let b = whole.step(&[batch(&config, 1, &lengths)]).unwrap();
    common::assert_close(
        "loss and norm",
        &[a.loss, a.grad_norm],
        &[b.loss, b.grad_norm],
        0.0,
        1e-5,
    );

    let micro = Options {
        reduction: LossReduction::MicroBatch,
        ..options()
    };
    let mut mean_of_means = trainer(Compute::cpu(DType::F32), 0.0, micro).unwrap();
    let c = mean_of_means.step(&parts).unwrap();
    assert!(
        (c.loss - b.loss).abs() > 1e-4 * b.loss,
        "answers of 12 and 4 tokens weigh the same: {c:?} {b:?}"
    );
}

#[test]
fn a_value_that_is_no_number_stops_the_run_and_names_its_layer() {
    let _alone = alone();
    every()
        .into_iter()
        .for_each(a_value_that_is_no_number_stops_the_run_and_names_its_layer_on);
}

fn a_value_that_is_no_number_stops_the_run_and_names_its_layer_on(compute: Compute) {
    let Some(mut model) = model(compute, 0.0) else {
        return;
    };
    let mut poisoned = String::new();
    model
        .for_each_param_mut(&mut |name, param| {
            if name.contains("layers.1.") && name.ends_with("attention.dense.lora_B.weight") {
                poisoned = name.to_string();
                let mut value = common::host(&param.value);
                value.as_mut_slice::<f32>()[0] = f32::NAN;
                param.value.copy_from(&value)?;
            }
            Ok(())
        })
        .unwrap();
    assert!(!poisoned.is_empty());
    let mut trainer = Trainer::new(model, options(), SIZE, LONGEST).unwrap();
    let batches = micro_batches(trainer.model().config(), 0);
    let before = adapter_bits(&trainer);
    let error = trainer.step(&batches).unwrap_err();
    let Error::NonFinite { step: 1, layer, .. } = &error else {
        panic!("{error}")
    };
    assert!(layer.contains("layers.1"), "{error}");
    assert_eq!(trainer.steps(), 0);
    assert!(
        adapter_bits(&trainer) == before,
        "a step that failed has changed the adapter"
    );
    // Left out, it counts for schedule and data, and neither for the optimizer nor against the loss scale.
    trainer.skip();
    assert_eq!((trainer.steps(), trainer.optimizer().steps()), (1, 0));
    let scale = trainer.loss_scale().map(|s| s.scale);
    assert!(scale.is_none_or(|scale| scale == 65536.0), "{scale:?}");
}

#[test]
fn a_step_without_a_supervised_token_is_an_error() {
    let _alone = alone();
    let Some(mut trainer) = trainer(Compute::cpu(DType::F32), 0.0, options()) else {
        return;
    };
    let whole = batch(trainer.model().config(), 0, &[(4, 4)]);
    let mut masked = whole.clone();
    masked.labels.fill(IGNORE);
    let message = trainer
        .step(std::slice::from_ref(&masked))
        .unwrap_err()
        .to_string();
    assert!(message.contains("no supervised token"), "{message}");
    // One among others is passed over and counted; whatever the reduction, the others' mean is the loss.
    for reduction in [LossReduction::Token, LossReduction::MicroBatch] {
        let options = Options {
            reduction,
            ..options()
        };
        let step = |batches: &[Batch]| {
            let mut trainer = self::trainer(Compute::cpu(DType::F32), 0.0, options).unwrap();
            trainer.step(batches).unwrap()
        };
        let (alone, beside) = (
            step(std::slice::from_ref(&whole)),
            step(&[masked.clone(), whole.clone()]),
        );
        assert_eq!((alone.masked, beside.masked), (0, 1));
        assert_eq!((alone.loss, alone.grad_norm), (beside.loss, beside.grad_norm));
        let total: f64 = beside.groups.iter().map(|(_, norm)| norm * norm).sum();
        assert!(
            (total.sqrt() - beside.grad_norm).abs() < 1e-9 * beside.grad_norm,
            "{:?}",
            beside.groups
        );
        assert!(
            beside.groups.iter().any(|(group, _)| group == "layers.0"),
            "{:?}",
            beside.groups
        );
    }
}

#[test]
fn the_device_walks_the_path_of_the_cpu() {
    let _alone = alone();
    let Some(device) = common::cuda_device() else {
        return;
    };
    let on = |compute| trainer(compute, 0.1, options());
    // QLoRA with dropout. Sums run in another order: the difference grows with every step, from a few units in the last
    // place; in half precision from 16 roundings (see tests/golden/trajectories.rs).
    for (dtype, atol) in [
        (DType::F32, 2e-5),
        (DType::F16, 16.0 / 2048.0),
        (DType::BF16, 16.0 / 256.0),
    ] {
        let (Some(mut cpu), Some(mut card)) = (on(Compute::cpu(DType::F32)), on(Compute { device, dtype }))
        else {
            return;
        };
        let config = cpu.model().config().clone();
        for step in 0..6 {
            let batches = micro_batches(&config, step);
            let (want, got) = (cpu.step(&batches).unwrap(), card.step(&batches).unwrap());
            common::assert_close(
                &format!("loss of step {step} in {dtype}"),
                &[got.loss],
                &[want.loss],
                atol,
                0.0,
            );
        }
    }
}
