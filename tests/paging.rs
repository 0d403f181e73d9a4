//! Is a state in pages the state? To the bit, wherever it lies, within its budget, with the copies that were predicted.
//!
//! On the emulated device every case runs with copies as late and as early as they may be: a wait that is missing changes a
//! number.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use glmtune::cuda;
use glmtune::error::Result;
use glmtune::nn::Param;
use glmtune::optim::{Optimizer, OptimizerConfig, OptimizerKind, StatePlace, StateStorage};
use glmtune::rng::Stream;
use glmtune::tensor::ledger::{Ledger, Pool};
use glmtune::tensor::{DType, Device, Tensor, allocations};

/// One test at a time: memory is counted for the whole process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `f` on the device, if there is one, with late and with early copies where that can be chosen.
fn whenever_they_land(f: impl Fn(Device)) {
    if let Err(why) = cuda::describe(0) {
        eprintln!("SKIPPED: no CUDA device: {why}");
        return;
    }
    #[cfg(feature = "emu")]
    for landing in [cuda::Landing::Early, cuda::Landing::Late] {
        cuda::land_copies(landing);
        f(Device::Cuda(0));
        assert_eq!(
            cuda::copies_under_way(),
            0,
            "{landing:?}: nobody waits for a copy"
        );
    }
    #[cfg(not(feature = "emu"))]
    f(Device::Cuda(0));
}

/// Parameters around blocks and pages, in layers, some of which 8 bits keep in 32.
const PARAMETERS: [(&str, usize); 12] = [
    ("transformer.word_embeddings.weight", 4503),
    ("transformer.layers.0.input_layernorm.weight", 33),
    ("transformer.layers.0.attention.dense.weight", 4501),
    ("transformer.layers.0.mlp.dense_h_to_4h.weight", 9000),
    ("transformer.layers.0.mlp.dense_h_to_4h.bias", 130),
    ("transformer.layers.1.input_layernorm.weight", 33),
    ("transformer.layers.1.attention.dense.weight", 4501),
    ("transformer.layers.1.mlp.dense_h_to_4h.weight", 9000),
    ("transformer.layers.1.mlp.dense_h_to_4h.bias", 1),
    ("transformer.layers.2.attention.dense.lora_A.weight", 4096),
    ("transformer.layers.2.attention.dense.lora_B.weight", 4097),
    ("lm_head.weight", 10_011),
];

fn kinds() -> [OptimizerConfig; 4] {
    let config = |kind| OptimizerConfig {
        weight_decay: 0.1,
        momentum: 0.9,
        loraplus_lr_ratio: Some(4.0),
        ..OptimizerConfig::of(kind)
    };
    [
        OptimizerKind::Adamw,
        OptimizerKind::Adamw8bit,
        OptimizerKind::Sgd,
        OptimizerKind::Lion,
    ]
    .map(config)
}

fn normal(n: usize, seed: u64) -> Tensor {
    let stream = Stream::new(seed, 0);
    let values: Vec<f32> = (0..n as u64).map(|i| stream.normal(i)).collect();
    Tensor::from_slice(&values, [n])
}

fn value_of((name, n): (&str, usize)) -> Tensor {
    normal(n, name.len() as u64 + n as u64)
}

type Params = Vec<(&'static str, Param)>;

/// Values on `device`.
fn params(device: Device) -> Params {
    let param = |value: Tensor| Param::trainable(value.into_device(device).unwrap()).unwrap();
    PARAMETERS.iter().map(|&p| (p.0, param(value_of(p)))).collect()
}

fn optimizer(config: OptimizerConfig, storage: &StateStorage, params: &Params) -> Result<Optimizer> {
    Optimizer::new(config, storage, |visit| {
        params.iter().try_for_each(|(name, param)| visit(name, param))
    })
}

fn storage(place: StatePlace, vram: impl Into<Option<u64>>) -> StateStorage {
    StateStorage {
        place,
        vram: vram.into(),
    }
}

/// Gradients of step `t`.
fn fill_gradients(params: &mut Params, t: u64) {
    for (i, (_, param)) in params.iter_mut().enumerate() {
        let gradient = normal(param.value.elements(), 100 * t + i as u64);
        param.grad.as_mut().unwrap().copy_from(&gradient).unwrap();
    }
}

fn step(optimizer: &mut Optimizer, params: &mut Params, t: u64) {
    fill_gradients(params, t);
    optimizer
        .step(0.01 / (t + 1) as f64, 0.5, |visit| {
            params.iter_mut().try_for_each(|(name, param)| visit(name, param))
        })
        .unwrap();
}

/// A step in parts, each of some parameters.
fn step_in_parts(optimizer: &mut Optimizer, params: &mut Params, t: u64, parts: &[&[usize]]) {
    fill_gradients(params, t);
    for part in parts {
        let mut numbered = params.iter_mut().enumerate();
        optimizer
            .update(0.01 / (t + 1) as f64, 0.5, |visit| {
                numbered.try_for_each(|(i, (name, param))| match part.contains(&i) {
                    true => visit(name, param),
                    false => Ok(()),
                })
            })
            .unwrap();
    }
    optimizer.end().unwrap();
}

/// Every value, and the file of the state.
fn all(optimizer: &Optimizer, params: &Params) -> Vec<Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("optimizer.safetensors");
    optimizer.save(&path).unwrap();
    let values = params.iter().map(|(_, param)| {
        let value = param.value.to_device(Device::Cpu).unwrap();
        value.bytes().to_vec()
    });
    values.chain([std::fs::read(&path).unwrap()]).collect()
}

#[track_caller]
fn assert_same(got: &[Vec<u8>], want: &[Vec<u8>], what: &str) {
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let name = PARAMETERS.get(i).map_or("the state", |(name, _)| name);
        assert!(got == want, "{what}: {name} differs");
    }
}

const STEPS: u64 = 3;

/// What `STEPS` steps of the resident optimizer come to.
fn resident(config: OptimizerConfig, device: Device) -> Vec<Vec<u8>> {
    let mut params = params(device);
    let mut optimizer = optimizer(config, &StateStorage::default(), &params).unwrap();
    (0..STEPS).for_each(|t| step(&mut optimizer, &mut params, t));
    all(&optimizer, &params)
}

/// The smallest budget, as the error of one that is too small says it.
fn least(config: OptimizerConfig, params: &Params) -> u64 {
    let error = optimizer(config, &storage(StatePlace::Host, 1), params).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("--optimizer-vram: found 1 bytes"), "{text}");
    let after = text.split("at least ").nth(1).unwrap();
    after.split(' ').next().unwrap().parse().unwrap()
}

/// Budgets: the smallest, a bit more, half of the state, all but a page of it, all of it, and the default.
fn budgets(config: OptimizerConfig, params: &Params) -> [Option<u64>; 6] {
    let least = least(config, params);
    let state = optimizer(config, &StateStorage::default(), params)
        .unwrap()
        .state_bytes() as u64;
    assert!(2 * least < state / 2);
    [
        Some(least),
        Some(2 * least + 100),
        Some(state / 2),
        Some(state - 4096),
        Some(state),
        None,
    ]
}

#[test]
fn pages_have_the_bits_of_the_resident_state() {
    let _alone = alone();
    whenever_they_land(|device| {
        let folder = tempfile::tempdir().unwrap();
        for config in kinds() {
            let want = resident(config, device);
            for vram in budgets(config, &params(device)) {
                // Of a file: what moves does not move otherwise.
                let disk = vram.is_some_and(|vram| vram < 12_000);
                let disk = disk.then(|| StatePlace::Disk(folder.path().into()));
                for place in [StatePlace::Host].into_iter().chain(disk) {
                    let what = format!("{:?} {place:?} {vram:?}", config.kind);
                    let mut params = params(device);
                    let mut optimizer = optimizer(config, &storage(place, vram), &params).unwrap();
                    (0..STEPS).for_each(|t| step(&mut optimizer, &mut params, t));
                    assert_same(&all(&optimizer, &params), &want, &what);
                }
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    });
}

#[test]
fn a_file_on_the_cpu_has_the_bits_of_memory() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    for config in kinds() {
        let want = resident(config, Device::Cpu);
        for place in [StatePlace::Host, StatePlace::Disk(folder.path().into())] {
            let on_disk = matches!(place, StatePlace::Disk(_));
            let mut params = params(Device::Cpu);
            let mut optimizer = optimizer(config, &storage(place, 1), &params).unwrap();
            let memory = optimizer.memory();
            let (device, traffic) = (memory.device, optimizer.traffic());
            assert_eq!((device, traffic.fetched, traffic.stored), (0, 0, 0));
            let state = optimizer.state_bytes() as u64;
            let (here, there) = if on_disk { (0, state) } else { (state, 0) };
            assert!(memory.host >= here && memory.host <= here + 64 && memory.disk == there);
            (0..STEPS).for_each(|t| step(&mut optimizer, &mut params, t));
            assert_same(&all(&optimizer, &params), &want, &format!("{:?}", config.kind));
        }
    }
}

#[test]
fn a_step_moves_what_was_predicted_and_holds_no_more_than_the_budget() {
    let _alone = alone();
    whenever_they_land(|device| {
        let folder = tempfile::tempdir().unwrap();
        for config in kinds() {
            let mut moved = Vec::new();
            for vram in budgets(config, &params(device)) {
                for place in [StatePlace::Host, StatePlace::Disk(folder.path().into())] {
                    let what = format!("{:?} {place:?} {vram:?}", config.kind);
                    let mut params = params(device);
                    let before = cuda::held_bytes().0;
                    let mut optimizer = optimizer(config, &storage(place, vram), &params).unwrap();
                    let held = cuda::held_bytes().0 - before;
                    assert_eq!(held, optimizer.memory().device, "{what}");
                    assert!(vram.is_none_or(|vram| held <= vram), "{what}: {held}");
                    let traffic = optimizer.traffic();
                    for t in 0..STEPS {
                        fill_gradients(&mut params, t);
                        let (made, before) = (allocations(), cuda::transfers());
                        optimizer
                            .step(0.01, 0.5, |visit| {
                                params.iter_mut().try_for_each(|(name, param)| visit(name, param))
                            })
                            .unwrap();
                        let after = cuda::transfers();
                        assert_eq!(allocations(), made, "{what}: step {t} allocates");
                        assert_eq!(
                            after.fetched - before.fetched,
                            traffic.fetched,
                            "{what}: step {t}"
                        );
                        assert_eq!(after.stored - before.stored, traffic.stored, "{what}: step {t}");
                    }
                    moved.push(traffic.fetched);
                }
            }
            // All of it with the smallest budget, none with enough, and less with more.
            let state = optimizer(config, &StateStorage::default(), &params(device))
                .unwrap()
                .state_bytes();
            assert!(moved[0] as usize >= state * 9 / 10, "{moved:?} of {state}");
            assert!(moved.is_sorted_by(|a, b| a >= b), "{moved:?}");
            assert!(moved[4] > 0 && moved[6] > 0 && moved[8..] == [0; 4], "{moved:?}");
        }
    });
}

/// Parts of a step, by numbers of parameters.
type Parts = &'static [&'static [usize]];
const LAYERS: Parts = &[&[0], &[1, 2, 3, 4], &[5, 6, 7, 8], &[9, 10], &[11]];
const BACKWARD: Parts = &[&[11], &[9, 10], &[5, 6, 7, 8], &[1, 2, 3, 4], &[0]];
const SCATTERED: Parts = &[&[7], &[0], &[5], &[11, 2], &[1, 10], &[3], &[4, 6, 8], &[9]];

#[test]
fn a_step_in_parts_of_any_order_is_the_step() {
    let _alone = alone();
    whenever_they_land(|device| {
        let folder = tempfile::tempdir().unwrap();
        for config in kinds() {
            let want = resident(config, device);
            let least = least(config, &params(device));
            for vram in [least, 3 * least, 100_000] {
                let disk = || StatePlace::Disk(folder.path().into());
                for place in [
                    StatePlace::Host,
                    if vram == least { disk() } else { StatePlace::Device },
                ] {
                    for orders in [[BACKWARD; 3], [LAYERS, SCATTERED, BACKWARD]] {
                        let what = format!("{:?} {place:?} {vram}", config.kind);
                        let mut params = params(device);
                        let mut optimizer =
                            optimizer(config, &storage(place.clone(), vram), &params).unwrap();
                        for (t, parts) in (0..STEPS).zip(orders) {
                            step_in_parts(&mut optimizer, &mut params, t, parts);
                        }
                        assert_same(&all(&optimizer, &params), &want, &what);
                    }
                }
            }
        }
    });
}

#[test]
fn the_second_backward_pass_moves_what_was_predicted() {
    let _alone = alone();
    whenever_they_land(|device| {
        let config = kinds()[0];
        for vram in [least(config, &params(device)), 100_000] {
            let mut params = params(device);
            let mut optimizer = optimizer(config, &storage(StatePlace::Host, vram), &params).unwrap();
            // Without what lies in two parts: those of a layer whose pages are its own.
            let whole: Parts = &[&[11], &[10, 9], &[8, 7, 6, 5], &[4, 3, 2, 1], &[0]];
            step_in_parts(&mut optimizer, &mut params, 0, whole);
            let traffic = optimizer.traffic();
            for t in 1..STEPS {
                let before = cuda::transfers();
                step_in_parts(&mut optimizer, &mut params, t, whole);
                let after = cuda::transfers();
                let moved = [after.fetched - before.fetched, after.stored - before.stored];
                assert_eq!(moved, [traffic.fetched, traffic.stored], "{vram}, step {t}");
            }
        }
    });
}

/// Copies for the next step are asked for when a step ends, so that all that comes between hides them.
#[test]
#[cfg(feature = "emu")]
fn pages_are_fetched_ahead() {
    let _alone = alone();
    cuda::land_copies(cuda::Landing::Late);
    let device = Device::Cuda(0);
    let (config, mut params) = (kinds()[0], params(device));
    let mut optimizer = optimizer(config, &storage(StatePlace::Host, 100_000), &params).unwrap();
    assert!(optimizer.traffic().fetched > 0);
    // Two moments each of three pages.
    assert_eq!(cuda::copies_under_way(), 6);
    step(&mut optimizer, &mut params, 0);
    // Of the last three pages the emulator has waited for what the fetches after them waited for.
    assert!(cuda::copies_under_way() >= 6, "{}", cuda::copies_under_way());
    drop(optimizer);
    assert_eq!(cuda::copies_under_way(), 0);
}

/// Values on the host, in page-locked memory or in a file, with rounded copies on the device, or in page-locked memory too.
fn masters(
    device: Device,
    dtype: DType,
    file: Option<&Path>,
    copies_wait: bool,
) -> (Params, Option<glmtune::checkpoint::ScratchFile>) {
    let mut file = file.map(|path| glmtune::checkpoint::ScratchFile::create(path).unwrap());
    let pinned = |from: &Tensor| {
        let mut pinned = Tensor::zeros_pinned(device, from.dtype(), from.shape()).unwrap();
        pinned.copy_from(from).unwrap();
        pinned
    };
    let param = |&p: &(&'static str, usize)| {
        let value = value_of(p);
        // Small ones stay where the model computes, as in full-parameter training.
        let mut param = if p.1 < 4096 {
            Param::borrowing(value.into_device(device).unwrap())
        } else {
            let master = match &mut file {
                Some(file) => {
                    let mut master = file.tensor(DType::F32, [p.1]).unwrap();
                    master.copy_from(&value).unwrap();
                    master
                }
                None => pinned(&value),
            };
            let mut param = Param::borrowing(master);
            param.working = Some(match copies_wait {
                true => pinned(&value.to_dtype(dtype)),
                false => value.to_device_as(device, dtype).unwrap(),
            });
            param
        };
        param.own_gradient(device).unwrap();
        (p.0, param)
    };
    (PARAMETERS.iter().map(param).collect(), file)
}

#[test]
fn masters_on_the_host_have_the_bits_of_values_on_the_device() {
    let _alone = alone();
    whenever_they_land(|device| {
        let folder = tempfile::tempdir().unwrap();
        let state: PathBuf = folder.path().into();
        for (config, dtype) in kinds()
            .into_iter()
            .zip([DType::BF16, DType::F16].into_iter().cycle())
        {
            let want = resident(config, device);
            for place in [
                StatePlace::Device,
                StatePlace::Host,
                StatePlace::Disk(state.clone()),
            ] {
                for (vram, file, wait) in [
                    (Some(60_000), None, false),
                    (None, None, true),
                    (Some(60_000), Some("values"), true),
                ] {
                    let what = format!("{:?} {dtype} {place:?} {vram:?} {file:?}", config.kind);
                    let path = file.map(|name| folder.path().join(name));
                    let (mut params, _file) = masters(device, dtype, path.as_deref(), wait);
                    let before = cuda::held_bytes().0;
                    let mut optimizer = optimizer(config, &storage(place.clone(), vram), &params).unwrap();
                    let held = cuda::held_bytes().0 - before;
                    assert_eq!(held, optimizer.memory().device, "{what}");
                    let within = vram.is_none_or(|vram| place == StatePlace::Device || held <= vram);
                    assert!(within, "{what}: {held}");
                    let traffic = optimizer.traffic();
                    for t in 0..STEPS {
                        let (made, before) = (allocations(), cuda::transfers());
                        match t % 2 {
                            0 => step_in_parts(&mut optimizer, &mut params, t, LAYERS),
                            _ => step(&mut optimizer, &mut params, t),
                        }
                        let after = cuda::transfers();
                        let moved = [after.fetched - before.fetched, after.stored - before.stored];
                        assert_eq!(moved, [traffic.fetched, traffic.stored], "{what}: step {t}");
                        // The gradients above, one each.
                        assert_eq!(allocations() - made, PARAMETERS.len() as u64, "{what}: step {t}");
                    }
                    assert_same(&all(&optimizer, &params), &want, &what);
                    for (name, param) in &params {
                        if let Some(working) = &param.working {
                            let rounded = param.value.to_dtype(dtype);
                            let working = working.to_device(Device::Cpu).unwrap();
                            assert!(working.bytes() == rounded.bytes(), "{what}: {name}");
                        }
                    }
                }
            }
        }
    });
}

#[test]
fn a_state_goes_on_wherever_it_was() {
    let _alone = alone();
    whenever_they_land(|device| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.safetensors");
        for config in kinds() {
            let want = resident(config, device);
            let least = least(config, &params(device));
            let places = || {
                [
                    (device, storage(StatePlace::Device, None)),
                    (device, storage(StatePlace::Host, 3 * least)),
                    (device, storage(StatePlace::Disk(folder.path().into()), least)),
                    (Device::Cpu, storage(StatePlace::Disk(folder.path().into()), None)),
                ]
            };
            for (i, (on, from)) in places().into_iter().enumerate() {
                let mut early = params(on);
                let mut first = optimizer(config, &from, &early).unwrap();
                (0..2).for_each(|t| step(&mut first, &mut early, t));
                first.save(&path).unwrap();
                drop(first);
                // To the next place, and to the device.
                for (on, to) in [places()[(i + 1) % 4].clone(), places()[0].clone()] {
                    let what = format!("{:?} from {from:?} to {to:?} {on}", config.kind);
                    let mut late = params(on);
                    for ((_, late), (_, early)) in late.iter_mut().zip(&early) {
                        late.value.copy_from(&early.value).unwrap();
                    }
                    let mut second = optimizer(config, &to, &late).unwrap();
                    // What it holds before is forgotten.
                    step(&mut second, &mut params(on), 9);
                    second.load(&path).unwrap();
                    assert_eq!(second.steps(), 2);
                    (2..STEPS).for_each(|t| step(&mut second, &mut late, t));
                    assert_same(&all(&second, &late), &want, &what);
                }
            }
        }
    });
}

#[test]
fn a_plan_counts_what_is_made() {
    let _alone = alone();
    whenever_they_land(|device| {
        let folder = tempfile::tempdir().unwrap();
        for config in kinds() {
            for place in [
                StatePlace::Device,
                StatePlace::Host,
                StatePlace::Disk(folder.path().into()),
            ] {
                for masters_too in [false, true] {
                    let params = match masters_too {
                        true => masters(device, DType::BF16, None, false).0,
                        false => params(device),
                    };
                    let storage = storage(place.clone(), 80_000);
                    let (planned, made) = (Ledger::new(), Ledger::new());
                    let before = (cuda::held_bytes().0, cuda::transfers());
                    let a = planned.plan(|| optimizer(config, &storage, &params).unwrap());
                    assert_eq!((cuda::held_bytes().0, cuda::transfers()), before);
                    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
                    let b = made.scope(|| optimizer(config, &storage, &params).unwrap());
                    assert_eq!(planned.lines(), made.lines(), "{config:?} {place:?}");
                    let host = made.held(Pool::Pinned) + made.held(Pool::Host);
                    for optimizer in [&a, &b] {
                        let memory = optimizer.memory();
                        assert_eq!(memory.device, made.held(Pool::Device));
                        assert_eq!((memory.host, memory.disk), (host, made.held(Pool::Disk)));
                    }
                    assert_eq!(a.traffic(), b.traffic());
                }
            }
        }
    });
}

#[test]
fn what_a_killed_run_left_is_replaced() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let storage = storage(StatePlace::Disk(folder.path().into()), None);
    let config = kinds()[0];
    let files = || std::fs::read_dir(folder.path()).unwrap().count();
    let mut params = params(Device::Cpu);
    // A killed program drops nothing.
    let mut killed = optimizer(config, &storage, &params).unwrap();
    step(&mut killed, &mut params, 0);
    std::mem::forget(killed);
    assert_eq!(files(), 1);
    let mut params = self::params(Device::Cpu);
    let mut again = optimizer(config, &storage, &params).unwrap();
    (0..STEPS).for_each(|t| step(&mut again, &mut params, t));
    assert_same(
        &all(&again, &params),
        &resident(config, Device::Cpu),
        "after a kill",
    );
    assert_eq!(files(), 1);
    drop(again);
    assert_eq!(files(), 0);
}

/// Runs itself again in a process that may write no file larger than 64 KiB: the system then refuses as a full disk does.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_said_before_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let script = "trap '' XFSZ; ulimit -f 64; exec \"$0\" --exact child_with_a_full_disk --nocapture";
    let output = std::process::Command::new("bash")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env("GLMTUNE_TEST_FULL_DISK", folder.path())
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// The child process of the test above; on its own it has nothing to do.
#[test]
fn child_with_a_full_disk() {
    let Some(folder) = std::env::var_os("GLMTUNE_TEST_FULL_DISK").map(PathBuf::from) else {
        return;
    };
    let storage = storage(StatePlace::Disk(folder), None);
    let error = optimizer(kinds()[0], &storage, &params(Device::Cpu)).unwrap_err();
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    for word in ["optimizer-state.scratch", "no room for", "free some of it"] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}
