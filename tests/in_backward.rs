//! Training whole weights in little memory: the update in the backward pass and masters that lie elsewhere come to what plain
//! training comes to. To the bit, for what trains, the optimizer's state and the report.

#[path = "common/mod.rs"]
mod common;

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::{exact_computes, half_computes};
use glmtune::config::LossReduction;
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::error::Error;
use glmtune::model::tune::{
    self, FreezeModules, LoraConfig, LoraTarget, MasterPlace, PrefixConfig, SavedModule, Storage, Tuning,
};
use glmtune::model::{LayerPolicy, LoadOptions, Model, ModelConfig, Recompute};
use glmtune::optim::{OptimizerConfig, OptimizerKind, StatePlace, StateStorage};
use glmtune::rng::Stream;
use glmtune::schedule::{Schedule, Scheduler};
use glmtune::tensor::{Compute, DType, Device, allocations};
use glmtune::train::{LossScale, Options, StepReport, Trainer};

const STEPS: u64 = 2;
const SIZE: usize = 2;
/// More than 16 labelled tokens: a product of fewer rows takes a 16-bit matrix another way than its master in 32 bits.
const LENGTH: usize = 20;

/// One test at a time: [`allocations`] counts those of the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn toy() -> ModelConfig {
    ModelConfig {
        vocab_size: 150,
        hidden_size: 32,
        inner_hidden_size: 128,
        num_layers: 3,
        num_attention_heads: 2,
        max_sequence_length: 32,
        pad_token_id: 3,
        mask_token_id: 140,
        gmask_token_id: 141,
        bos_token_id: 144,
        eos_token_id: 145,
        ..ModelConfig::chatglm_6b()
    }
}

/// Sequences of `LENGTH` tokens, the second half of each labelled.
fn batch(number: u64) -> Batch {
    let stream = Stream::new(17, number);
    let rows = SIZE * LENGTH;
    let ids: Vec<i32> = (0..rows as u64).map(|i| stream.below(i, 130) as i32).collect();
    let context = LENGTH / 2;
    let label = |(i, &id)| if i % LENGTH > context { id } else { IGNORE };
    let positions = (0..rows).flat_map(|i| match i % LENGTH {
        t if t < context => [t as i32, 0],
        t => [context as i32 - 1, (t - context) as i32 + 1],
    });
    Batch {
        size: SIZE,
        len: LENGTH,
        labels: ids.iter().enumerate().map(label).collect(),
        positions: positions.collect(),
        spans: vec![Span { start: 0, context }; SIZE],
        ids,
    }
}

/// What a run is made of.
#[derive(Debug, Clone)]
struct Case {
    compute: Compute,
    tied: bool,
    tuning: Tuning,
    optimizer: OptimizerKind,
    max_grad_norm: f64,
    policies: Vec<LayerPolicy>,
    storage: Storage,
    state: StateStorage,
    stream: bool,
}

impl Case {
    fn full(compute: Compute) -> Self {
        Self {
            compute,
            tied: true,
            tuning: Tuning::Full,
            optimizer: OptimizerKind::Adamw,
            max_grad_norm: 0.0,
            policies: Vec::new(),
            storage: Storage::default(),
            state: StateStorage::default(),
            stream: false,
        }
    }

    /// Everything that makes training small: streamed matrices, masters and moments on the host or in `folder`, pages of a few
    /// elements, layers that keep nothing or next to nothing. Also the plain way to train the same.
    fn small(compute: Compute, folder: Option<&Path>) -> (Self, Self) {
        let plain = Self {
            optimizer: OptimizerKind::Adamw8bit,
            max_grad_norm: 0.3,
            ..Self::full(compute)
        };
        let layer = |recompute, offload| LayerPolicy { recompute, offload };
        let place = |folder: &Path| folder.to_path_buf();
        let small = Self {
            policies: vec![
                layer(Recompute::Full, true),
                layer(Recompute::Smart, true),
                layer(Recompute::Full, false),
            ],
            storage: Storage {
                masters: folder.map_or(MasterPlace::Host, |f| MasterPlace::Disk(place(f))),
                lent_gradients: true,
            },
            state: StateStorage {
                place: folder.map_or(StatePlace::Host, |f| StatePlace::Disk(place(f))),
                vram: Some(30_000),
            },
            stream: true,
            ..plain.clone()
        };
        (small, plain)
    }

    fn model(&self) -> Model {
        self.model_of(&ModelConfig {
            num_layers: self.policies.len().max(3),
            ..toy()
        })
    }

    fn model_of(&self, config: &ModelConfig) -> Model {
        let load = LoadOptions {
            compute: self.compute,
            stream: self.stream,
            ..LoadOptions::default()
        };
        let mut model = Model::initialize(config, 5, &load).unwrap();
        if !self.tied {
            tune::untie_head(&mut model).unwrap();
        }
        model.set_storage(self.storage.clone());
        tune::apply(&mut model, &self.tuning, 9).unwrap();
        model
    }

    fn options(&self, in_backward: bool) -> Options {
        Options {
            optimizer: OptimizerConfig {
                weight_decay: 0.01,
                momentum: 0.9,
                ..OptimizerConfig::of(self.optimizer)
            },
            schedule: Schedule {
                scheduler: Scheduler::Cosine,
                base: 3e-3,
                warmup_steps: 0,
                total_steps: 8,
                ..Schedule::default()
            },
            max_grad_norm: self.max_grad_norm,
            in_backward,
            reduction: LossReduction::Token,
            seed: 11,
        }
    }

    fn trainer(&self, in_backward: bool) -> Trainer {
        let options = self.options(in_backward);
        let (policies, state) = (&self.policies, &self.state);
        Trainer::with_memory(self.model(), options, SIZE, LENGTH, policies, state).unwrap()
    }

    fn run(&self, in_backward: bool) -> Outcome {
        let mut trainer = self.trainer(in_backward);
        let step = |number| trainer.step(&[batch(number)]).unwrap();
        let reports = (0..STEPS).map(step).collect();
        Outcome {
            reports,
            ..Outcome::of(&trainer)
        }
    }
}

/// What a run comes to.
#[derive(PartialEq)]
struct Outcome {
    reports: Vec<StepReport>,
    values: Vec<(String, Vec<u8>)>,
    optimizer: Vec<u8>,
}

impl Outcome {
    fn of(trainer: &Trainer) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("optimizer.safetensors");
        trainer.optimizer().save(&path).unwrap();
        Self {
            reports: Vec::new(),
            values: values(trainer.model()),
            optimizer: std::fs::read(path).unwrap(),
        }
    }
}

/// The bytes of every parameter.
fn values(model: &Model) -> Vec<(String, Vec<u8>)> {
    let mut values = Vec::new();
    model.for_each_param(&mut |name, param| {
        let host = param.value.to_device(Device::Cpu).unwrap();
        values.push((name.to_string(), host.bytes().to_vec()));
    });
    values
}

#[track_caller]
fn assert_same(what: &dyn std::fmt::Debug, got: &Outcome, want: &Outcome) {
    assert_eq!(got.reports, want.reports, "{what:?}");
    for ((name, got), (_, want)) in got.values.iter().zip(&want.values) {
        assert!(got == want, "{what:?}: {name} differs");
    }
    assert!(
        got.optimizer == want.optimizer,
        "{what:?}: the optimizer's state differs"
    );
    assert!(got == want);
}

/// A frozen toy model, its values to be stored as `storage` says.
fn stored(compute: Compute, storage: Storage) -> Model {
    let load = LoadOptions {
        compute,
        ..LoadOptions::default()
    };
    let mut model = Model::initialize(&toy(), 5, &load).unwrap();
    model.set_storage(storage);
    model
}

fn every_compute() -> Vec<Compute> {
    [exact_computes(), half_computes()].concat()
}

fn every_tuning() -> Vec<Tuning> {
    let lora = |modules_to_save: &[SavedModule], dora| {
        Tuning::Lora(LoraConfig {
            r: 2,
            alpha: 4.0,
            dropout: 0.1,
            targets: LoraTarget::ALL.to_vec(),
            dora,
            modules_to_save: modules_to_save.to_vec(),
            ..LoraConfig::default()
        })
    };
    let prefix = |projection| {
        Tuning::PTuning(PrefixConfig {
            pre_seq_len: 4,
            projection,
            dropout: 0.1,
        })
    };
    vec![
        Tuning::Full,
        Tuning::Freeze {
            layers: 2,
            modules: FreezeModules::All,
        },
        Tuning::Freeze {
            layers: -1,
            modules: FreezeModules::Mlp,
        },
        lora(&[], false),
        lora(&SavedModule::ALL, true),
        prefix(false),
        prefix(true),
    ]
}

#[test]
fn it_is_the_update_after_the_backward_pass_to_the_bit() {
    let _alone = alone();
    for compute in every_compute() {
        for tuning in every_tuning() {
            let mut ways = vec![(true, 0.0), (false, 0.3)];
            if compute.device == Device::Cpu {
                ways.extend([(true, 0.3), (false, 0.0)]);
            }
            for (tied, max_grad_norm) in ways {
                let case = Case {
                    tied,
                    tuning: tuning.clone(),
                    max_grad_norm,
                    ..Case::full(compute)
                };
                assert_same(&case, &case.run(true), &case.run(false));
            }
        }
    }
}

#[test]
fn every_optimizer_takes_its_step_in_parts() {
    let _alone = alone();
    for compute in every_compute() {
        for optimizer in OptimizerKind::ALL {
            for max_grad_norm in [0.0, 0.3] {
                let case = Case {
                    optimizer,
                    max_grad_norm,
                    ..Case::full(compute)
                };
                assert_same(&case, &case.run(true), &case.run(false));
            }
        }
    }
}

#[test]
fn activations_serve_both_backward_passes_whatever_layers_keep() {
    let _alone = alone();
    let policies = |recompute: [Recompute; 3], offload| {
        let policy = |recompute| LayerPolicy { recompute, offload };
        recompute.map(policy).to_vec()
    };
    use Recompute::{Full, Smart};
    let mixed = [Full, Recompute::None, Smart];
    for compute in every_compute() {
        for policies in [
            policies(mixed, false),
            policies(mixed, true),
            policies([Smart; 3], false),
            policies([Full; 3], true),
        ] {
            let case = Case {
                max_grad_norm: 0.3,
                policies,
                ..Case::full(compute)
            };
            assert_same(&case, &case.run(true), &case.run(false));
        }
    }
}

/// The first backward pass lets the first layers come back into the places of the last, which the second begins with.
#[test]
fn activations_that_come_back_from_the_host_serve_both_backward_passes() {
    let _alone = alone();
    use Recompute::{Full, None, Smart};
    let policy = |recompute| LayerPolicy {
        recompute,
        offload: true,
    };
    for compute in every_compute() {
        for kinds in [
            &[None, Smart, None, Full, Smart, None][..],
            &[Smart; 5],
            &[None; 3],
        ] {
            let case = Case {
                max_grad_norm: 0.3,
                policies: kinds.iter().copied().map(policy).collect(),
                ..Case::full(compute)
            };
            assert_same(&case, &case.run(true), &case.run(false));
        }
    }
}

#[test]
fn an_overflow_lowers_the_loss_scale_before_anything_is_updated() {
    let _alone = alone();
    for compute in half_computes().into_iter().filter(|c| c.dtype == DType::F16) {
        for max_grad_norm in [0.0, 0.3] {
            let case = Case {
                max_grad_norm,
                ..Case::full(compute)
            };
            let run = |in_backward| {
                let mut trainer = case.trainer(in_backward);
                let scale = 2f64.powi(40);
                trainer.set_loss_scale(Some(LossScale {
                    scale,
                    ..LossScale::default()
                }));
                let reports = (0..2).map(|n| trainer.step(&[batch(n)]).unwrap());
                let reports: Vec<StepReport> = reports.collect();
                let overflows = reports[0].loss_scale.unwrap().overflows;
                assert!(overflows > 0, "2^40 does not overflow");
                Outcome {
                    reports,
                    ..Outcome::of(&trainer)
                }
            };
            assert_same(&case, &run(true), &run(false));
        }
    }
}

#[test]
fn layers_share_the_gradients_of_one_and_a_step_allocates_nothing() {
    let _alone = alone();
    for compute in every_compute() {
        for (tied, max_grad_norm) in [(true, 0.0), (false, 0.3)] {
            let case = Case {
                tied,
                max_grad_norm,
                ..Case::full(compute)
            };
            let mut trainer = case.trainer(true);
            let config = toy();
            let (h, inner) = (config.hidden_size, config.inner_hidden_size);
            // Four matrices with biases, two norms; or, in the place of the largest, the embedding and the head in turns.
            let block = 4 * h * h + 2 * h * inner + (3 * h + h + inner + h) + 4 * h;
            let shared = match tied {
                true => block,
                false => block - h * inner + config.vocab_size * h,
            };
            assert_eq!(trainer.lent_bytes(), 4 * shared, "{case:?}");
            let mut own = 0;
            trainer.model().for_each_param(&mut |_, param| {
                own += param.grad.as_ref().map_or(0, |g| g.elements());
            });
            assert_eq!(own, if tied { config.vocab_size * h } else { 0 }, "{case:?}");

            trainer.step(&[batch(0)]).unwrap();
            let before = allocations();
            trainer.step(&[batch(1)]).unwrap();
            assert_eq!(allocations() - before, 0, "{case:?}");
        }
    }
}

#[test]
fn several_micro_batches_are_refused_and_the_remedy_is_named() {
    let _alone = alone();
    let mut trainer = Case::full(Compute::cpu(DType::F32)).trainer(true);
    let error = trainer.step(&[batch(0), batch(1)]).unwrap_err().to_string();
    assert!(error.contains("--gradient-accumulation-steps") && error.contains("--micro-batch-size"));
    trainer.step(&[batch(0)]).unwrap();
}

#[test]
fn gradients_that_are_lent_are_not_taken_for_none() {
    let _alone = alone();
    let case = Case::full(Compute::cpu(DType::F32));
    let trainer = case.trainer(true);
    let mut workspace = trainer.model().workspace(SIZE, LENGTH).unwrap();
    let mut model = trainer.into_model();
    let error = model.loss_and_gradients(&mut workspace, &batch(0), 1.0, Stream::new(1, 1));
    assert!(error.unwrap_err().to_string().contains("lent"));
}

/// A model whose gradients are finite but for some of block 0, while its loss is a number: the inner activations of that block are
/// of size 1e28 but count for nothing, and its tiny output, once normalised, gives a gradient of size 1e12 back.
fn overflowing(case: &Case) -> Model {
    let config = ModelConfig {
        layernorm_epsilon: 1e-30,
        ..toy()
    };
    let mut model = case.model_of(&config);
    let fill = |value: f32| move |old: &[f32]| vec![value; old.len()];
    let times = |factor: f32| move |old: &[f32]| old.iter().map(|x| factor * x).collect();
    type Change = Box<dyn Fn(&[f32]) -> Vec<f32>>;
    let changes: [(&str, Change); 3] = [
        ("post_attention_layernorm.weight", Box::new(fill(1e-13))),
        ("mlp.dense_h_to_4h.weight", Box::new(times(1e38))),
        ("mlp.dense_4h_to_h.weight", Box::new(fill(0.0))),
    ];
    model
        .for_each_param_mut(&mut |name, param| {
            for (part, change) in &changes {
                if name == format!("transformer.layers.0.{part}") {
                    let old = param.value.to_device(Device::Cpu)?;
                    param.value.write(&change(old.as_slice()))?;
                }
            }
            Ok(())
        })
        .unwrap();
    model
}

#[test]
fn a_gradient_that_is_no_number_is_found_before_its_layer_is_updated() {
    let _alone = alone();
    for compute in exact_computes() {
        let case = Case::full(compute);
        let trainer = |case: &Case, in_backward| {
            Trainer::new(overflowing(case), case.options(in_backward), SIZE, LENGTH).unwrap()
        };
        let of_block = |outcome: &Outcome, i: usize| {
            let name = format!("transformer.layers.{i}.");
            let values = outcome.values.iter();
            let values: Vec<_> = values.filter(|(n, _)| n.starts_with(&name)).cloned().collect();
            values
        };

        // Without clipping the layers above are updated by then, and the model is given up.
        let mut broken = trainer(&case, true);
        let before = Outcome::of(&broken);
        let error = broken.step(&[batch(0)]).unwrap_err();
        assert!(!matches!(error, Error::NonFinite { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("the gradient of transformer.layers.0."), "{text}");
        assert!(
            text.contains("last checkpoint") && text.contains("--resume"),
            "{text}"
        );
        let after = Outcome::of(&broken);
        assert!(of_block(&before, 2) != of_block(&after, 2));
        assert!(of_block(&before, 0) == of_block(&after, 0));
        assert_eq!(broken.steps(), 0);
        for refused in [broken.step(&[batch(1)]).map(|_| ()), broken.check_finite()] {
            assert!(refused.unwrap_err().to_string().contains("--resume"));
        }

        // With clipping nothing was, and the error is that of the update after the backward pass.
        let case = Case {
            max_grad_norm: 1.0,
            ..case
        };
        let (mut whole, mut plain) = (trainer(&case, true), trainer(&case, false));
        let error = whole.step(&[batch(0)]).unwrap_err();
        assert!(matches!(error, Error::NonFinite { .. }), "{error}");
        assert_eq!(
            error.to_string(),
            plain.step(&[batch(0)]).unwrap_err().to_string()
        );
        assert!(Outcome::of(&whole) == before);
        whole.check_finite().unwrap();
        whole.skip();
    }
}

#[test]
fn a_loss_that_is_no_number_stops_before_the_backward_pass() {
    let _alone = alone();
    for compute in exact_computes() {
        let case = Case::full(compute);
        let run = |in_backward| {
            let mut model = case.model();
            model
                .for_each_param_mut(&mut |name, param| match name {
                    "transformer.final_layernorm.bias" => {
                        param.value.write(&vec![f32::NAN; param.value.elements()])
                    }
                    _ => Ok(()),
                })
                .unwrap();
            let mut trainer = Trainer::new(model, case.options(in_backward), SIZE, LENGTH).unwrap();
            let before = Outcome::of(&trainer);
            let error = trainer.step(&[batch(0)]).unwrap_err();
            assert!(matches!(error, Error::NonFinite { .. }), "{error}");
            assert!(Outcome::of(&trainer) == before);
            error.to_string()
        };
        assert_eq!(run(true), run(false));
    }
}

#[test]
fn a_rounded_copy_gives_the_bits_of_its_master() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let host = Storage {
        masters: MasterPlace::Host,
        lent_gradients: false,
    };
    for compute in every_compute() {
        for tied in [true, false] {
            let tuning = Tuning::Full;
            // After some steps the values are of 32 bits indeed.
            let case = Case {
                tied,
                ..Case::full(compute)
            };
            let mut trainer = case.trainer(false);
            (0..2).for_each(|n| drop(trainer.step(&[batch(n)]).unwrap()));
            let trained = dir.path().join("plain");
            tune::save(trainer.model(), &tuning, dir.path(), &trained).unwrap();

            let passes = |storage: &Storage| {
                let mut model = stored(compute, storage.clone());
                tune::restore(&mut model, &tuning, &trained).unwrap();
                let mut workspace = model.workspace(SIZE, LENGTH).unwrap();
                let loss = model.loss_and_gradients(&mut workspace, &batch(7), 0.1, Stream::new(1, 1));
                let mut gradients = Vec::new();
                model.for_each_param(&mut |name, param| {
                    let Some(gradient) = &param.grad else { return };
                    assert_eq!(gradient.device(), compute.device);
                    let gradient = gradient.to_device(Device::Cpu).unwrap();
                    gradients.push((name.to_string(), gradient.bytes().to_vec()));
                });
                (model, loss.unwrap(), gradients)
            };
            let (plain, want_loss, want) = passes(&Storage::default());
            let (model, loss, got) = passes(&host);
            assert_eq!(loss, want_loss, "{case:?}");
            assert!(got == want, "{case:?}: gradients differ");
            assert!(values(&model) == values(&plain), "{case:?}: values differ");

            let apart = |param: &glmtune::nn::Param| param.value.device() != param.operand().device();
            let mut parted = 0;
            model.for_each_param(&mut |_, param| parted += usize::from(apart(param)));
            let half = compute.dtype != DType::F32;
            let matrices = 4 * toy().num_layers + if tied { 1 } else { 2 };
            assert_eq!(parted, if half { matrices } else { 0 }, "{case:?}");

            let saved = dir.path().join("apart");
            tune::save(&model, &tuning, dir.path(), &saved).unwrap();
            let bytes = |dir: &Path| std::fs::read(dir.join("trained.safetensors")).unwrap();
            assert!(bytes(&saved) == bytes(&trained), "{case:?}: the files differ");
        }
    }
}

/// Masters and state that lie elsewhere, in some ways.
fn elsewhere(folder: &Path) -> Vec<(Storage, StateStorage)> {
    let state = |place, vram| StateStorage { place, vram };
    let masters = |masters| Storage {
        masters,
        lent_gradients: true,
    };
    vec![
        (masters(MasterPlace::Host), StateStorage::default()),
        (
            masters(MasterPlace::Device),
            state(StatePlace::Host, Some(20_000)),
        ),
        (masters(MasterPlace::Host), state(StatePlace::Host, Some(20_000))),
        (
            masters(MasterPlace::Disk(folder.to_path_buf())),
            state(StatePlace::Disk(folder.to_path_buf()), Some(20_000)),
        ),
    ]
}

#[test]
fn masters_and_state_elsewhere_change_no_bit() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    for compute in every_compute() {
        for (storage, state) in elsewhere(dir.path()) {
            for (optimizer, max_grad_norm) in [(OptimizerKind::Adamw8bit, 0.3), (OptimizerKind::Adamw, 0.0)] {
                let case = Case {
                    optimizer,
                    max_grad_norm,
                    ..Case::full(compute)
                };
                let want = case.run(false);
                let case = Case {
                    storage: storage.clone(),
                    state: state.clone(),
                    ..case
                };
                assert_same(&case, &case.run(true), &want);
            }
        }
    }
}

#[test]
fn everything_at_once_changes_no_bit_and_a_step_allocates_nothing() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    for compute in half_computes() {
        for folder in [None, Some(dir.path())] {
            let (small, plain) = Case::small(compute, folder);
            let mut trainer = small.trainer(true);
            let mut reports = vec![trainer.step(&[batch(0)]).unwrap()];
            let before = allocations();
            reports.extend((1..STEPS).map(|n| trainer.step(&[batch(n)]).unwrap()));
            assert_eq!(allocations() - before, 0, "{small:?}");
            let got = Outcome {
                reports,
                ..Outcome::of(&trainer)
            };
            assert_same(&small, &got, &plain.run(false));
            let waiting = |param: &glmtune::nn::Param| param.operand().device() != compute.device;
            let mut matrices = 0;
            (trainer.model()).for_each_param(&mut |_, param| matrices += usize::from(waiting(param)));
            assert_eq!(matrices, 4 * toy().num_layers);
        }
    }
}

#[test]
fn a_run_goes_on_from_its_checkpoint_to_the_bit() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let computes = half_computes().into_iter().chain([Compute::cpu(DType::F32)]);
    for compute in computes {
        let (small, _) = Case::small(compute, Some(dir.path()));
        let mut straight = small.trainer(true);
        straight.step(&[batch(0)]).unwrap();
        let checkpoint = dir.path().join("checkpoint");
        tune::save(straight.model(), &small.tuning, dir.path(), &checkpoint).unwrap();
        let optimizer = checkpoint.join("optimizer.safetensors");
        straight.optimizer().save(&optimizer).unwrap();
        straight.step(&[batch(1)]).unwrap();

        let load = LoadOptions {
            compute,
            stream: small.stream,
            ..LoadOptions::default()
        };
        let mut model = Model::initialize(&toy(), 5, &load).unwrap();
        model.set_storage(small.storage.clone());
        tune::restore(&mut model, &small.tuning, &checkpoint).unwrap();
        let (options, policies) = (small.options(true), &small.policies);
        let mut resumed = Trainer::with_memory(model, options, SIZE, LENGTH, policies, &small.state).unwrap();
        resumed.optimizer_mut().load(&optimizer).unwrap();
        resumed.set_loss_scale(straight.loss_scale());
        resumed.set_steps(1);
        resumed.step(&[batch(1)]).unwrap();
        assert_same(&small, &Outcome::of(&resumed), &Outcome::of(&straight));
    }
}

/// What tells [`a_capped_run`] which way to train.
const WAY: &str = "GLMTUNE_TEST_WAY";

/// One run in a process of its own, whose device has as much memory as its environment says.
#[test]
fn a_capped_run() {
    let Ok(way) = std::env::var(WAY) else { return };
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let compute = half_computes()[0];
    let (small, plain) = Case::small(compute, Some(dir.path()));
    match way.as_str() {
        "small" => drop(small.run(true)),
        _ => drop(plain.run(false)),
    }
}

#[test]
fn it_trains_in_memory_in_which_the_plain_way_does_not() {
    let _alone = alone();
    let Some(&compute) = half_computes().first() else {
        return;
    };
    if !glmtune::cuda::emulated() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (small, plain) = Case::small(compute, Some(dir.path()));
    let peak = |case: &Case, in_backward| {
        glmtune::cuda::forget_peak();
        case.run(in_backward);
        glmtune::cuda::held_bytes().1
    };
    let (low, high) = (peak(&small, true), peak(&plain, false));
    // Beside tensors a device holds the scratch memory of its kernels, and each allocation is rounded up.
    let cap = glmtune::cuda::SCRATCH as u64 + low + (high - low) / 3;
    let run = |way: &str| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_capped_run", "--nocapture"])
            .env(WAY, way)
            .env("GLMTUNE_EMU_MEMORY", cap.to_string())
            .output()
            .unwrap()
    };
    let done = run("small");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let refused = run("plain");
    assert!(!refused.status.success(), "{low} {high}");
    let said = [refused.stdout, refused.stderr].concat();
    assert!(String::from_utf8_lossy(&said).contains("memory"));
    eprintln!("peaks: {low} bytes of the device, plain {high}");
}
