//! Is the plan what a run allocates, to the byte? Does the choice fit, and change no number?

#[path = "bases/folders.rs"]
mod folders;
#[path = "common/program.rs"]
mod program;

use glmtune::checkpoint::Checkpoint;
use glmtune::checkpoint::quantized::open_or_quantize;
use glmtune::config::LossReduction;
use glmtune::data::batch::{Batch, Span};
use glmtune::model::tune::{self, FreezeModules, LoraConfig, LoraInit, PrefixConfig, SavedModule, Tuning};
use glmtune::model::{EmbeddingPlace, HeadStorage, Linears, LoadedFrom, Model, ModelConfig};
use glmtune::optim::{OptimizerConfig, OptimizerKind};
use glmtune::quant::QuantType;
use glmtune::schedule::Schedule;
use glmtune::tensor::ledger::{Ledger, Pool};
use glmtune::tensor::{Compute, DType, Device, allocations};
use glmtune::train::Options;
use glmtune::train::plan::{self, Asked, Card, Layout, Limits, Plan, Policies, StateOn, Work};
use program::{Workplace, fails, glmtune, str, succeeds, text};

/// A run without any flag that says how much memory it takes.
fn train(place: &Workplace, output: &str, flags: &str) -> std::process::Command {
    let (model, data, output) = (place.model(), place.data(), place.path(output));
    let mut command = glmtune(&["train", "--model", str(&model), "--data", str(&data)]);
    command
        .args(["--output", str(&output)])
        .args(flags.split_whitespace());
    command
}

fn options(kind: OptimizerKind) -> Options {
    Options {
        optimizer: OptimizerConfig::of(kind),
        schedule: Schedule::default(),
        max_grad_norm: 1.0,
        in_backward: false,
        reduction: LossReduction::Token,
        seed: 0,
    }
}

fn chatglm(length: usize) -> Work {
    Work {
        model: ModelConfig::chatglm_6b(),
        from: LoadedFrom {
            dtype: DType::F16,
            linears: Linears::FourBit { double_quant: true },
            separate_head: false,
        },
        tuning: Tuning::Lora(LoraConfig::default()),
        compute: Compute {
            device: Device::Cuda(0),
            dtype: DType::BF16,
        },
        options: options(OptimizerKind::Adamw),
        batch: 1,
        length,
        samples: 1,
        folder: std::path::PathBuf::new(),
        answers: Vec::new(),
        context: plan::CONTEXT,
    }
}

/// Two sequences of eight tokens, the first half context.
fn batch(vocabulary: usize) -> Batch {
    let ids: Vec<i32> = (0..16).map(|i| (i * 7 + 3) % vocabulary as i32).collect();
    let labels = ids
        .iter()
        .enumerate()
        .map(|(i, &id)| if i % 8 < 4 { -100 } else { id });
    let positions = (0..16).flat_map(|i| [(i % 8).min(3), (i % 8 - 3).max(0)]);
    Batch {
        size: 2,
        len: 8,
        labels: labels.collect(),
        positions: positions.collect(),
        spans: vec![Span { start: 0, context: 4 }; 2],
        ids,
    }
}

fn devices() -> Vec<Compute> {
    let mut all = vec![Compute::cpu(DType::F32)];
    match glmtune::cuda::describe(0) {
        Ok(_) => all.push(Compute {
            device: Device::Cuda(0),
            dtype: DType::F16,
        }),
        Err(why) => eprintln!("SKIPPED: no CUDA device: {why}"),
    }
    all
}

fn layout(f: impl FnOnce(&mut Layout)) -> Layout {
    let mut layout = Layout::plain(2, 4);
    f(&mut layout);
    layout
}

fn policies(text: &str) -> Layout {
    let layers = text.parse::<Policies>().unwrap().layers(4).unwrap();
    layout(|l| l.layers = layers)
}

/// Every mechanism, and some together.
fn layouts(device: Device) -> Vec<(&'static str, Layout)> {
    let mut all = vec![
        ("plain", layout(|_| ())),
        ("smart", policies("smart")),
        ("mixed", policies("full:1,smart:1,none:2")),
        (
            "host embedding",
            layout(|l| {
                l.embedding = EmbeddingPlace::Host;
                l.head = HeadStorage::Nf4;
            }),
        ),
        ("int8 head", layout(|l| l.head = HeadStorage::Int8)),
        ("disk", layout(|l| l.state = StateOn::Disk)),
        ("in backward", layout(|l| l.in_backward = true)),
    ];
    if device != Device::Cpu {
        all.extend([
            ("offload", policies("smart+offload:3,none+offload:1")),
            ("streamed", layout(|l| l.stream = true)),
            ("streamed head", layout(|l| l.head = HeadStorage::Stream)),
            ("paged", layout(|l| l.state = StateOn::Host)),
            (
                "everything",
                layout(|l| {
                    *l = policies("full+offload:3,smart+offload:1");
                    l.embedding = EmbeddingPlace::Host;
                    l.head = HeadStorage::Nf4;
                    l.stream = true;
                    l.state = StateOn::Host;
                }),
            ),
            (
                "full training",
                layout(|l| {
                    *l = policies("full+offload:2,smart:2");
                    l.state = StateOn::Host;
                    l.in_backward = true;
                }),
            ),
            (
                "full training streamed",
                layout(|l| {
                    l.stream = true;
                    l.state = StateOn::Disk;
                    l.in_backward = true;
                }),
            ),
        ]);
    }
    all
}

fn methods() -> Vec<(&'static str, Tuning, OptimizerKind)> {
    let lora = LoraConfig {
        r: 2,
        ..LoraConfig::default()
    };
    let adamw = OptimizerKind::Adamw;
    vec![
        (
            "qlora",
            Tuning::Lora(LoraConfig {
                dropout: 0.1,
                ..lora.clone()
            }),
            adamw,
        ),
        ("lora", Tuning::Lora(lora.clone()), OptimizerKind::Adamw8bit),
        (
            "dora",
            Tuning::Lora(LoraConfig {
                dora: true,
                ..lora.clone()
            }),
            adamw,
        ),
        (
            "pissa",
            Tuning::Lora(LoraConfig {
                init: LoraInit::Pissa { iterations: Some(2) },
                ..lora.clone()
            }),
            OptimizerKind::Lion,
        ),
        (
            "saved",
            Tuning::Lora(LoraConfig {
                modules_to_save: vec!["lm_head".parse::<SavedModule>().unwrap()],
                ..lora
            }),
            OptimizerKind::Sgd,
        ),
        (
            "ptuning",
            Tuning::PTuning(PrefixConfig {
                pre_seq_len: 3,
                projection: true,
                dropout: 0.1,
            }),
            adamw,
        ),
        (
            "freeze",
            Tuning::Freeze {
                layers: 1,
                modules: FreezeModules::All,
            },
            adamw,
        ),
        ("full", Tuning::Full, OptimizerKind::Adamw8bit),
    ]
}

/// What the run holds, what its plan says, and what its steps add.
fn check(what: &str, work: &Work, layout: &Layout, checkpoint: &Checkpoint) {
    let plan = match Plan::of(work, layout) {
        Ok(plan) => plan,
        Err(error) => {
            // What a plan refuses, a run refuses with the same words.
            let refused = build(work, layout, checkpoint).map(|_| ());
            assert_eq!(refused.unwrap_err().to_string(), error.to_string(), "{what}");
            return;
        }
    };
    let ledger = Ledger::new();
    let mut trainer = ledger
        .scope(|| build(work, layout, checkpoint))
        .unwrap_or_else(|error| panic!("{what}: planned, but: {error}"));
    assert_eq!(ledger.lines(), plan.lines, "{what}: held, planned");
    assert_eq!(
        ledger.peak(Pool::Device),
        plan.tensors(Pool::Device) + plan.loading,
        "{what}: at most while loading, planned"
    );
    let batches = [batch(work.model.vocab_size)];
    trainer.rehearse(&batches[0]).unwrap();
    let before = allocations();
    ledger
        .scope(|| trainer.step(&batches))
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(ledger.lines(), plan.lines, "{what}: after a step, planned");
    assert_eq!(allocations(), before, "{what}: a step allocates");
}

fn build(
    work: &Work,
    layout: &Layout,
    checkpoint: &Checkpoint,
) -> glmtune::error::Result<glmtune::train::Trainer> {
    let mut model = Model::load(checkpoint, &work.load_options(layout))?;
    model.set_storage(work.storage(layout));
    tune::apply(&mut model, &work.tuning, 0)?;
    work.trainer(model, layout)
}

/// Allocations and device bytes are counted for the whole process: what makes tensors here runs alone.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn a_run_holds_what_its_plan_says_to_the_byte() {
    let _alone = alone();
    let Some(place) = Workplace::new() else { return };
    let stored = Checkpoint::open(&place.model()).unwrap();
    let quantize = |double_quant| {
        open_or_quantize(
            &place.model(),
            None,
            QuantType::Nf4,
            double_quant,
            &mut |_, _, _| Ok(()),
        )
        .unwrap()
        .0
    };
    for compute in devices() {
        for (name, tuning, kind) in methods() {
            let checkpoint = match name {
                "qlora" => quantize(true),
                "dora" | "ptuning" => quantize(false),
                _ => Checkpoint::open(&place.model()).unwrap(),
            };
            let work = Work {
                model: stored.config().clone(),
                from: LoadedFrom::of(&checkpoint).unwrap(),
                tuning,
                compute,
                options: options(kind),
                batch: 2,
                length: 8,
                samples: 2,
                folder: place.path("scratch"),
                answers: Vec::new(),
                context: 0,
            };
            std::fs::create_dir_all(&work.folder).unwrap();
            // Every mechanism with an adapter and with everything that trains; with the other methods those that differ for them.
            let few = ["plain", "mixed", "disk", "everything", "full training streamed"];
            let all = ["qlora", "full"].contains(&name);
            let layouts = layouts(compute.device).into_iter();
            for (how, layout) in layouts.filter(|(how, _)| all || few.contains(how)) {
                check(
                    &format!("{name}, {how}, {compute:?}"),
                    &work,
                    &layout,
                    &checkpoint,
                );
            }
        }
    }
}

/// Bases in whole numbers: their codes are mapped or placed as they are, the scales of their rows are made.
#[test]
fn a_run_on_a_base_in_whole_numbers_holds_what_its_plan_says() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig {
        num_layers: 4,
        ..folders::toy()
    };
    for layout in folders::LAYOUTS {
        let place = dir.path().join(format!("{layout:?}"));
        let (tensors, _) = folders::model(layout, &config);
        folders::write(&place, &config, &folders::keys(layout), &tensors);
        let checkpoint = Checkpoint::open(&place).unwrap();
        for compute in devices() {
            for (name, tuning, kind) in methods() {
                let work = Work {
                    model: checkpoint.config().clone(),
                    from: LoadedFrom::of(&checkpoint).unwrap(),
                    tuning,
                    compute,
                    options: options(kind),
                    batch: 2,
                    length: 8,
                    samples: 2,
                    folder: dir.path().to_path_buf(),
                    answers: Vec::new(),
                    context: 0,
                };
                let few = ["plain", "everything"];
                let layouts = layouts(compute.device).into_iter();
                for (how, layout) in layouts.filter(|(how, _)| name == "qlora" || few.contains(how)) {
                    check(
                        &format!("{layout:?}, {name}, {how}, {compute:?}"),
                        &work,
                        &layout,
                        &checkpoint,
                    );
                }
            }
        }
    }
}

/// ChatGLM-6B in the layouts of the memory model: weights 2.908 GB and, a token and layer, 10, 3 or 1 hidden values.
#[test]
fn the_plan_of_chatglm_is_the_arithmetic_of_its_shapes() {
    let work = chatglm(2048);
    let of = |layout: &Layout, account: &str| {
        let plan = Plan::of(&work, layout).unwrap();
        let lines = plan
            .lines
            .iter()
            .filter(|line| line.pool == Pool::Device && line.account == account);
        lines.map(|line| line.bytes).sum::<u64>()
    };
    let plain = Layout::plain(1, 28);
    // NF4 codes, a byte for 64 of them, an f32 for 256 of those and a table; norms and biases in f32.
    let linears: u64 = 28 * 201_326_592;
    let weights = linears / 2 + linears / 64 + linears / 64 / 256 * 4 + 28 * 4 * 1024;
    let small = 28 * 4 * (4 * 4096 + (12_288 + 4096 + 16_384 + 4096)) + 2 * 4 * 4096;
    assert_eq!(of(&plain, "weights"), weights + small);
    assert_eq!(of(&plain, "embedding"), 130_528 * 4096 * 2);
    let adapters = 28 * 8 * (4096 + 12_288 + 2 * 4096 + 2 * (4096 + 16_384)) * 4;
    assert_eq!(of(&plain, "what trains"), adapters);
    assert_eq!(of(&plain, "gradients"), adapters);
    assert_eq!(of(&plain, "optimizer"), 2 * adapters);
    for (text, values, u) in [("none", 10, 4), ("smart", 3, 2), ("full", 1, 0)] {
        let mut layout = plain.clone();
        layout.layers = text.parse::<Policies>().unwrap().layers(28).unwrap();
        let lse = if text == "full" { 0 } else { 32 * 4 };
        let token = values * 4096 * 2 + u * 8 * 2 + lse;
        assert_eq!(of(&layout, "activations"), 28 * 2048 * token, "{text}");
    }
}

#[test]
fn what_is_chosen_fits_and_more_memory_is_never_slower() {
    let card = Card::named("RTX 3060").unwrap();
    for length in [512, 2048] {
        let work = chatglm(length);
        let mut slower = f64::INFINITY;
        for gb in [4, 5, 6, 8, 12, 24] {
            let limits = Limits {
                device: gb * 1_000_000_000,
                host: None,
            };
            let fit = plan::fit(&work, &Asked::default(), limits, &card).unwrap();
            let chosen = &fit.ladder[0];
            assert!(chosen.device <= limits.device, "{gb}: {chosen:?}");
            let plan = Plan::of(&work, &chosen.layout).unwrap();
            assert_eq!(plan.device(), chosen.device);
            let time = chosen.cost.total();
            assert!(
                time <= slower * 1.03,
                "{gb} GB at {length}: {time} after {slower}"
            );
            slower = slower.min(time);
            let mut rungs = fit.ladder.windows(2);
            assert!(rungs.all(|w| w[1].device < w[0].device), "{gb}");
        }
    }
    // Room for everything: nothing is moved, nothing rounded, no product computed again.
    let work = chatglm(2048);
    let limits = Limits {
        device: 16_000_000_000,
        host: None,
    };
    let fit = plan::fit(&work, &Asked::default(), limits, &card).unwrap();
    assert_eq!(fit.ladder[0].layout, Layout::plain(1, 28));
}

#[test]
fn what_was_asked_is_kept_and_what_cannot_fit_says_what_would() {
    let card = Card::named("RTX 3060").unwrap();
    let asked = Asked {
        policies: Some("smart".parse().unwrap()),
        head: Some(HeadStorage::Int8),
        stream: Some(true),
        ..Asked::default()
    };
    let limits = |gb: f64| Limits {
        device: (gb * 1e9) as u64,
        host: None,
    };
    let fit = plan::fit(&chatglm(512), &asked, limits(8.0), &card).unwrap();
    for rung in &fit.ladder {
        assert_eq!(rung.layout.policies().to_string(), "smart");
        assert_eq!((rung.layout.head, rung.layout.stream), (HeadStorage::Int8, true));
    }
    let error = plan::fit(&chatglm(8192), &Asked::default(), limits(2.0), &card).unwrap_err();
    let message = error.to_string();
    for part in ["2.00 GB", "8192 tokens", "at least", "--max-length"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    // What the message proposes fits.
    let length: usize = message
        .split("--max-length ")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    plan::fit(&chatglm(length), &Asked::default(), limits(2.0), &card).unwrap();
}

/// What the README says fits is what would be chosen.
#[test]
fn the_tables_of_the_readmes_are_the_plans() {
    let tables = plan::tables(&ModelConfig::chatglm_6b()).unwrap();
    for name in ["README.md", "README_zh.md"] {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
        let text = std::fs::read_to_string(path).unwrap();
        assert!(
            text.contains(&tables),
            "{name}: put the output of `glmtune plan --tables` into it"
        );
    }
}

#[test]
fn plan_prints_every_buffer_without_a_checkpoint_or_a_card() {
    let output = glmtune(&[
        "plan",
        "--config",
        "chatglm-6b",
        "--vram",
        "8GB",
        "--max-length",
        "2048",
    ])
    .output()
    .unwrap();
    succeeds(&output);
    let shown = text(&output.stdout);
    for part in [
        "chosen for RTX 3060",
        "weights",
        "optimizer",
        "does not fit",
        "in this layout a micro-batch of",
        "context",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let output = glmtune(&["plan", "--vram", "1GB"]).output().unwrap();
    let line = fails(&output, 1);
    assert!(
        line.contains("memory of the card") && line.contains("at least"),
        "{line}"
    );
    for flags in [
        &["plan", "--vram", "lots"][..],
        &["plan", "--card", "Voodoo 2"],
        &["plan", "--recompute", "some"],
        &["plan", "--recompute", "full:18446744073709551615,none:29"],
        &["plan", "--max-length", "100000000000000"],
        &["plan", "--dtype", "banana"],
        &["plan", "--device", "cpu", "--card", "H100"],
    ] {
        fails(&glmtune(flags).output().unwrap(), 2);
    }
    let output = glmtune(&["plan", "--device", "cpu", "--json"]).output().unwrap();
    succeeds(&output);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["device_bytes"], 0);
    assert!(json["host_bytes"].as_u64().unwrap() > 1_000_000_000);
}

/// The same run under every way to save memory: the same adapter, to the bit.
#[test]
fn no_way_to_save_memory_changes_the_result() {
    if glmtune::cuda::describe(0).is_err() {
        eprintln!("SKIPPED: no CUDA device");
        return;
    }
    let Some(place) = Workplace::new() else { return };
    let flags = "--device cuda --dtype fp16 --max-steps 2 --max-length 16 --lora-r 2 --lora-dropout 0.1 --micro-batch-size 2 \
                 --gradient-accumulation-steps 1";
    let run = |output: &str, more: &str| {
        let log = succeeds(
            &train(&place, output, &format!("{flags} {more}"))
                .output()
                .unwrap(),
        );
        assert!(!log.contains("please report"), "{log}");
        assert!(log.contains("chosen for"), "{log}");
        std::fs::read(place.path(output).join("adapter_model.safetensors")).unwrap()
    };
    let plain = run("plain", "--recompute none");
    for (i, more) in [
        "--recompute full",
        "--recompute smart+offload:2,none+offload",
        "--stream-weights",
        "--head-storage stream",
        "--optimizer-state host",
        "--optimizer-state disk --optimizer-in-backward",
        "--recompute full+offload --stream-weights --head-storage stream --optimizer-state host",
    ]
    .into_iter()
    .enumerate()
    {
        assert!(run(&format!("out{i}"), more) == plain, "{more}");
    }
    assert!(run("int8", "--head-storage int8") != plain);
}

/// Whichever allocation fails on the way to the first step: an error that says so, and nothing is left behind.
#[cfg(feature = "emu")]
#[test]
fn an_allocation_that_fails_anywhere_leaves_nothing_behind() {
    use glmtune::cuda;

    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let model = ModelConfig {
        vocab_size: 192,
        hidden_size: 64,
        inner_hidden_size: 256,
        num_layers: 2,
        num_attention_heads: 2,
        mask_token_id: 187,
        gmask_token_id: 188,
        bos_token_id: 190,
        eos_token_id: 191,
        ..ModelConfig::chatglm_6b()
    };
    let compute = Compute {
        device: Device::Cuda(0),
        dtype: DType::F16,
    };
    let all = layouts(compute.device);
    for (name, tuning) in [
        (
            "everything",
            Tuning::Lora(LoraConfig {
                r: 2,
                dora: true,
                ..LoraConfig::default()
            }),
        ),
        ("full training streamed", Tuning::Full),
    ] {
        let (_, layout) = all.iter().find(|(known, _)| *known == name).unwrap();
        let layout = Layout {
            layers: layout.layers[..2].to_vec(),
            ..layout.clone()
        };
        let work = Work {
            model: model.clone(),
            tuning,
            compute,
            folder: folder.path().to_path_buf(),
            batch: 2,
            length: 8,
            samples: 2,
            context: 0,
            ..chatglm(8)
        };
        let build = || -> glmtune::error::Result<glmtune::train::Trainer> {
            let mut model = Model::initialize(&work.model, 7, &work.load_options(&layout))?;
            model.set_storage(work.storage(&layout));
            tune::apply(&mut model, &work.tuning, 0)?;
            work.trainer(model, &layout)
        };
        let before = cuda::allocations();
        drop(build().unwrap());
        let count = cuda::allocations() - before;
        assert!(count > 50, "{name}: {count} allocations");
        let (held, _) = cuda::held_bytes();
        for n in 1..=count {
            cuda::fail_allocation(n);
            let Err(error) = build() else {
                panic!("{name}: allocation {n} of {count} may fail")
            };
            assert!(error.is_out_of_memory(), "{name}, allocation {n}: {error}");
            assert_eq!(cuda::held_bytes().0, held, "{name}, allocation {n}");
        }
        cuda::fail_allocation(0);
        assert_eq!(
            std::fs::read_dir(&work.folder).unwrap().count(),
            0,
            "scratch files stay"
        );
    }
}

/// A card with no byte to spare: the run fits where its plan says so, and a byte below the smallest plan it says so at once.
#[cfg(feature = "emu")]
#[test]
fn a_hard_cap_is_kept_by_whatever_fits() {
    let Some(place) = Workplace::new() else { return };
    let flags = "--device cuda --dtype fp16 --max-steps 2 --max-length 16 --lora-r 2 --lora-dropout 0.1 --micro-batch-size 2 \
                 --gradient-accumulation-steps 1 --head-storage stream";
    let run = |output: &str, memory: u64| {
        train(&place, output, flags)
            .env("GLMTUNE_EMU_MEMORY", memory.to_string())
            .output()
            .unwrap()
    };
    let log = succeeds(&run("most", 1 << 30));
    let adapter = |output: &str| std::fs::read(place.path(output).join("adapter_model.safetensors")).unwrap();
    let plain = adapter("most");
    assert!(log.contains("recompute none,"), "{log}");
    // The most that does not fit, to 16 kilobytes.
    let (mut fails_at, mut fits_at) = (0, 1 << 30);
    let mut layouts = std::collections::BTreeSet::new();
    while fits_at - fails_at > 16 << 10 {
        let middle = (fits_at + fails_at) / 2;
        let output = run("middle", middle);
        if output.status.success() {
            let log = succeeds(&output);
            assert!(
                !log.contains("less than it said"),
                "the plan fits and the run does not: {log}"
            );
            assert!(adapter("middle") == plain, "{middle}: {log}");
            let chosen = log.lines().find(|line| line.starts_with("chosen")).unwrap();
            layouts.insert(chosen.split(": ").nth(1).unwrap().to_string());
            fits_at = middle;
        } else {
            let line = fails(&output, 1);
            assert!(
                line.contains("memory of the card") && line.contains("at least"),
                "{line}"
            );
            fails_at = middle;
        }
        let _ = std::fs::remove_dir_all(place.path("middle"));
    }
    assert!(layouts.len() >= 3, "{layouts:?}");
}

/// A card that has less than it said: the run takes the next smaller layout, and says so.
#[cfg(feature = "emu")]
#[test]
fn a_run_that_runs_out_of_memory_goes_on_with_less() {
    let Some(place) = Workplace::new() else { return };
    let flags = "--device cuda --dtype fp16 --max-steps 1 --max-length 16 --lora-r 2";
    let mut fell_back = 0;
    for n in ["1", "40", "150"] {
        let output = train(&place, &format!("out{n}"), flags)
            .env("GLMTUNE_EMU_FAIL_ALLOCATION", n)
            .output()
            .unwrap();
        let log = succeeds(&output);
        if log.contains("the card has less than it said") {
            assert!(log.contains("next: micro-batch"), "{log}");
            fell_back += 1;
        }
        assert!(
            place
                .path(&format!("out{n}"))
                .join("adapter_model.safetensors")
                .exists()
        );
    }
    assert!(fell_back >= 2, "{fell_back}");
    // Nothing smaller was left to choose.
    let fixed = "--recompute full --head-storage compute --stream-weights off --optimizer-state device --micro-batch-size 1";
    let output = train(&place, "fixed", &format!("{flags} {fixed}"))
        .env("GLMTUNE_EMU_FAIL_ALLOCATION", "40")
        .output()
        .unwrap();
    let line = fails(&output, 1);
    assert!(line.contains("memory of device cuda:0"), "{line}");
}

/// Weights and optimizer in files of a folder that is not there yet; the best checkpoint is read back under the same cap.
#[cfg(feature = "emu")]
#[test]
fn full_training_from_the_disk_under_a_cap_ends_with_its_best_checkpoint() {
    let Some(place) = Workplace::new() else { return };
    let flags = "--device cuda --dtype fp16 --method full --max-steps 4 --max-length 24 --micro-batch-size 1 --optimizer-in-backward \
                 --gradient-accumulation-steps 1 --stream-weights --recompute full+offload --val-size 2 --eval-steps 1 --save-best \
                 --learning-rate 1e-4 --warmup-ratio 0 --lr-scheduler constant --save-steps 1";
    for state in ["disk", "host"] {
        let output = train(&place, state, &format!("{flags} --optimizer-state {state}"))
            .env("GLMTUNE_EMU_MEMORY", "64000000")
            .output()
            .unwrap();
        let log = succeeds(&output);
        assert!(!log.contains("please report"), "{log}");
        assert!(place.path(state).join("model/config.json").exists());
        // Files that stand in for memory go with the run.
        let left = std::fs::read_dir(place.path(state)).unwrap();
        assert!(
            !left
                .into_iter()
                .any(|e| e.unwrap().path().extension().is_some_and(|e| e == "scratch"))
        );
        let again = glmtune(&["train", "--output", str(&place.path(state)), "--resume"])
            .env("GLMTUNE_EMU_MEMORY", "64000000")
            .output()
            .unwrap();
        assert!(succeeds(&again).contains("resumed from"));
    }
}

#[test]
fn flags_of_memory_that_make_no_sense_are_refused() {
    let Some(place) = Workplace::new() else { return };
    for (flags, part) in [
        ("--device cpu --vram 8GB", "--vram"),
        ("--device cpu --stream-weights", "--stream-weights"),
        ("--device cpu --recompute full+offload", "+offload"),
        ("--vram 8", "such as 12GB"),
        ("--optimizer-vram 1MB", "--optimizer-state"),
        (
            "--optimizer-in-backward --micro-batch-size 2",
            "--gradient-accumulation-steps 1",
        ),
        ("--recompute full:40", "add up to"),
        ("--head-storage fp8", "expected auto, compute"),
    ] {
        let line = fails(&train(&place, "out", flags).output().unwrap(), 2);
        assert!(line.contains(part), "{line}");
    }
}
