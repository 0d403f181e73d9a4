//! Kill after kill: every method and every optimizer, stopped without warning at moments drawn at random, also while it
//! saves, evaluates or writes its result. The run goes on from the last checkpoint and ends, to the bit, as if nothing had
//! happened.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use glmtune::rng::Stream;

use crate::program::{Workplace, str, succeeds};

/// Kills of each run below; all runs together are killed more than 200 times.
const KILLS: u64 = 30;
const STEPS: &str = "10";

/// What `glmtune train` is told beside model, data and output.
const RUNS: [(&str, &str); 7] = [
    (
        "qlora-adamw",
        "--method qlora --lora-r 4 --lora-dropout 0.1 --eval-steps 4 --eval-samples 1 --eval-max-new-tokens 4",
    ),
    (
        "dora-8bit",
        "--method lora --dora --lora-r 4 --lora-dropout 0.1 --optim adamw_8bit --neftune-alpha 5",
    ),
    (
        "pissa-sgd",
        "--method lora --lora-init pissa --lora-r 4 --optim sgd --modules-to-save final_layernorm",
    ),
    (
        "ptuning-lion",
        "--method ptuning --pre-seq-len 4 --prefix-projection --optim lion --learning-rate 1e-3",
    ),
    (
        "freeze-adamw",
        "--method freeze --trainable-layers 1 --save-best --eval-steps 3",
    ),
    ("full-8bit", "--method full --optim adamw_8bit"),
    (
        "qlora-forgetting",
        "--method qlora --lora-r 4 --forgetting --forgetting-tokens 2 --eval-steps 5",
    ),
];

fn train(place: &Workplace, output: &str, flags: &str, mode: &str) -> Command {
    let (model, data, output) = (place.model(), place.data(), place.path(output));
    let mut command = crate::program::glmtune(&["train", "--model", str(&model), "--data", str(&data)]);
    command.args(["--output", str(&output), "--max-steps", STEPS, "--val-size", "2"]);
    command.args("--save-steps 1 --micro-batch-size 2 --gradient-accumulation-steps 2".split(' '));
    command.args(flags.split(' '));
    if !mode.is_empty() {
        command.arg(mode);
    }
    command.stdout(Stdio::null());
    command
}

/// Everything that must be the same: weights, the last checkpoint, the numbers without the times.
fn outcome(place: &Workplace, output: &str) -> BTreeMap<String, Vec<u8>> {
    let dir = place.path(output);
    let mut files = BTreeMap::new();
    let mut take = |folder: &Path, prefix: &str| {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_string();
            let weights = name.ends_with(".safetensors") || name.ends_with(".bin") || name == "state.json";
            if path.is_file() && weights {
                files.insert(format!("{prefix}{name}"), std::fs::read(&path).unwrap());
            }
        }
    };
    take(&dir, "");
    if dir.join("model").exists() {
        take(&dir.join("model"), "model/");
    }
    let last = dir.join(format!("checkpoints/step-{STEPS:0>6}"));
    take(&last, "last/");
    files.insert(
        "metrics".into(),
        format!("{:?}", place.metrics(output)).into_bytes(),
    );
    files
}

fn has_checkpoint(place: &Workplace, output: &str) -> bool {
    let folder = place.path(output).join("checkpoints").read_dir();
    folder.is_ok_and(|mut d| d.any(|e| e.unwrap().file_name().to_string_lossy().starts_with("step-")))
}

/// Kills `output` again and again; returns how often it was still running then.
fn kill_often(place: &Workplace, output: &str, flags: &str, seed: u64, usual: Duration) -> u64 {
    let stream = Stream::new(seed, 0x6b69_6c6c);
    let (mut kills, mut attempt) = (0, 0);
    let begun = Instant::now();
    while kills < KILLS {
        assert!(
            begun.elapsed() < Duration::from_secs(300),
            "{output}: {kills} kills in five minutes"
        );
        let mode = if has_checkpoint(place, output) {
            "--resume"
        } else {
            "--overwrite"
        };
        let mut child = train(place, output, flags, mode)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // From the first file that is opened to some steps on, so that kills fall everywhere and the run gets forward.
        attempt += 1;
        std::thread::sleep(usual.mul_f64(f64::from(stream.uniform(attempt)) * 0.4));
        child.kill().unwrap();
        kills += u64::from(!child.wait().unwrap().success());
        if place
            .path(output)
            .join(format!("checkpoints/step-{STEPS:0>6}"))
            .exists()
            && kills < KILLS
        {
            // Done before its share of kills: from the start again, into a fresh folder.
            let finished = train(place, output, flags, "--resume").output().unwrap();
            succeeds(&finished);
            assert!(
                outcome(place, output) == outcome(place, "whole"),
                "{output}: not the uninterrupted run"
            );
            std::fs::remove_dir_all(place.path(output)).unwrap();
        }
    }
    kills
}

fn survives(number: usize) {
    let Some(place) = Workplace::new() else { return };
    let (name, flags) = RUNS[number];
    let begun = Instant::now();
    succeeds(&train(&place, "whole", flags, "").output().unwrap());
    let kills = kill_often(&place, "cut", flags, number as u64, begun.elapsed());
    let mode = if has_checkpoint(&place, "cut") {
        "--resume"
    } else {
        "--overwrite"
    };
    succeeds(&train(&place, "cut", flags, mode).output().unwrap());
    let (whole, cut) = (outcome(&place, "whole"), outcome(&place, "cut"));
    let names = |files: &BTreeMap<String, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&whole), names(&cut), "{name}");
    for (file, bytes) in &whole {
        assert!(cut[file] == *bytes, "{name}: {file} differs after {kills} kills");
    }
    assert!(whole.len() >= 4, "{name}: {:?}", names(&whole));
    let left: Vec<String> = std::fs::read_dir(place.path("cut"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".tmp"))
        .collect();
    assert!(left.is_empty(), "{name}: {left:?} left behind");
}

macro_rules! runs {
    ($($name:ident: $number:literal,)*) => {
        $(#[test]
        fn $name() {
            survives($number);
        })*

        #[test]
        fn every_run_is_killed_and_there_are_two_hundred_kills() {
            assert_eq!([$($number),*].len(), RUNS.len());
            assert!(RUNS.len() as u64 * KILLS >= 200);
        }
    };
}

runs! {
    qlora_with_adamw_survives: 0,
    dora_with_8_bit_adamw_survives: 1,
    pissa_with_sgd_survives: 2,
    ptuning_with_lion_survives: 3,
    freeze_that_keeps_the_best_survives: 4,
    full_with_8_bit_adamw_survives: 5,
    the_forgetting_meter_survives: 6,
}
