//! Merging that is interrupted, killed, given the wrong things, or has no room: one clear line, and never half a model under the
//! final name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use glmtune::checkpoint::Checkpoint;
use glmtune::rng::Stream;

use crate::program::{Workplace, fails, glmtune, signal, str, succeeds, text};

/// A base and an adapter for it.
fn workplace() -> Option<Workplace> {
    let place = Workplace::new()?;
    let flags = ["--method", "lora", "--max-steps", "2"];
    succeeds(&place.train("lora", &flags).output().unwrap());
    Some(place)
}

fn command(model: &Path, adapter: &Path, output: &Path, flags: &[&str]) -> Command {
    let mut command = glmtune(&["merge", "--model", str(model), "--adapter", str(adapter)]);
    command
        .args(["--output", str(output), "--device", "cpu"])
        .args(flags);
    command
}

fn merge(place: &Workplace, output: &str, flags: &[&str]) -> Command {
    command(&place.model(), &place.path("lora"), &place.path(output), flags)
}

/// What of a merge lies in the folder of `out`: its result, what is not yet one.
fn left(place: &Workplace) -> Vec<String> {
    let entries = fs::read_dir(place.path("")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("out"))
        .collect();
    names.sort();
    names
}

fn line(output: &Output, words: &[&str]) {
    let line = fails(output, 1);
    for word in words {
        assert!(line.contains(word), "no {word:?} in: {line}");
    }
}

#[test]
fn killed_at_any_moment_there_is_a_whole_model_or_none() {
    let Some(place) = workplace() else { return };
    let begun = Instant::now();
    succeeds(&merge(&place, "out", &[]).output().unwrap());
    let whole = begun.elapsed();
    let want = fs::read(place.path("out/model.safetensors")).unwrap();
    fs::remove_dir_all(place.path("out")).unwrap();
    let stream = Stream::new(8, 0);
    let (mut halves, mut kills) = (0, 0);
    for turn in 0..24 {
        let mut child = merge(&place, "out", &["--overwrite"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(whole.mul_f32(stream.uniform(turn)));
        child.kill().unwrap();
        kills += usize::from(!child.wait().unwrap().success());
        halves += usize::from(place.path(".out.partial").exists());
        if place.path("out").exists() {
            Checkpoint::open(&place.path("out")).unwrap().validate().unwrap();
            assert_eq!(fs::read(place.path("out/model.safetensors")).unwrap(), want);
        }
    }
    assert!(kills > 0 && halves > 0, "{kills} kills, {halves} in the middle");
    succeeds(&merge(&place, "out", &["--overwrite"]).output().unwrap());
    assert_eq!(fs::read(place.path("out/model.safetensors")).unwrap(), want);
    assert_eq!(left(&place), ["out"], "what killed merges left is gone");
}

#[test]
fn ctrl_c_leaves_nothing() {
    let Some(place) = workplace() else { return };
    let mut caught = 0;
    for _ in 0..10 {
        let mut child = merge(&place, "out", &["--verify-prompts", "16"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while !place.path(".out.partial").exists() && child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(1));
        }
        signal(&child, "INT");
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            fs::remove_dir_all(place.path("out")).unwrap();
            continue;
        }
        caught += 1;
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(130), "{stderr}");
        assert!(stderr.contains("interrupted"), "{stderr}");
        assert_eq!(left(&place), Vec::<String>::new());
    }
    assert!(caught > 0, "every merge was over before it was interrupted");
}

/// A process that may write no file larger than 512 KiB: the system then refuses as a full disk does, in the middle of a file.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_leaves_nothing_and_the_old_model_whole() {
    let Some(place) = workplace() else { return };
    let full = || {
        let script = "trap '' XFSZ; ulimit -f 512; exec \"$@\"";
        let merge = merge(&place, "out", &["--overwrite", "--no-verify"]);
        let mut command = Command::new("bash");
        command.args(["-c", script, "bash"]).arg(merge.get_program());
        command.args(merge.get_args()).output().unwrap()
    };
    line(&full(), &["model.safetensors", "cannot write"]);
    assert_eq!(left(&place), Vec::<String>::new());
    succeeds(&merge(&place, "out", &[]).output().unwrap());
    let whole = fs::read(place.path("out/model.safetensors")).unwrap();
    line(&full(), &["model.safetensors", "cannot write"]);
    assert_eq!(left(&place), ["out"]);
    assert_eq!(fs::read(place.path("out/model.safetensors")).unwrap(), whole);
}

#[test]
fn a_missing_or_truncated_shard_is_named() {
    let Some(place) = workplace() else { return };
    succeeds(
        &merge(&place, "sharded", &["--shard-size", "300kB"])
            .output()
            .unwrap(),
    );
    let base = place.path("sharded");
    let shards: Vec<PathBuf> = Checkpoint::open(&base).unwrap().files().to_vec();
    assert!(shards.len() > 3);
    let lora = place.path("lora");
    // The adapter says that this is not its base; that it is one again with the shard back is what the last line shows.
    let run = |flags: &[&str]| command(&base, &lora, &place.path("out"), flags).output().unwrap();
    line(&run(&[]), &["sharded", "other weights", "--another-base"]);
    let name = shards[1].file_name().unwrap().to_str().unwrap();
    let bytes = fs::read(&shards[1]).unwrap();
    fs::remove_file(&shards[1]).unwrap();
    line(&run(&["--another-base"]), &[name, "download the missing shards"]);
    fs::write(&shards[1], &bytes[..bytes.len() / 2]).unwrap();
    line(&run(&["--another-base"]), &[name]);
    assert_eq!(left(&place), Vec::<String>::new());
    fs::write(&shards[1], &bytes).unwrap();
    succeeds(&run(&["--another-base"]));
}

#[test]
fn other_peoples_files_stay_where_they_are() {
    let Some(place) = workplace() else { return };
    fs::create_dir(place.path("out")).unwrap();
    let letter = place.path("out/letter.txt");
    fs::write(&letter, "mine").unwrap();
    for flags in [&[][..], &["--overwrite"]] {
        line(
            &merge(&place, "out", flags).output().unwrap(),
            &["other files (letter.txt"],
        );
    }
    assert_eq!(fs::read(&letter).unwrap(), b"mine");
    for (output, words) in [
        ("model", "the base model itself"),
        ("lora", "the adapter itself"),
        ("data.json", "a file"),
    ] {
        line(
            &merge(&place, output, &["--overwrite"]).output().unwrap(),
            &[words],
        );
    }
    // Also by another name.
    let model = place.path("model");
    fs::create_dir_all(place.path("sub")).unwrap();
    let around = place.path("sub").join("..").join("model");
    let output = command(&model, &place.path("lora"), &around, &["--overwrite"])
        .output()
        .unwrap();
    line(&output, &["the base model itself"]);
    // An empty folder is as good as none; what glmtune wrote is replaced when that is said.
    fs::remove_file(&letter).unwrap();
    succeeds(&merge(&place, "out", &["--no-verify"]).output().unwrap());
    line(
        &merge(&place, "out", &[]).output().unwrap(),
        &["wrote before", "--overwrite"],
    );
    succeeds(
        &merge(&place, "out", &["--overwrite", "--no-verify"])
            .output()
            .unwrap(),
    );
}

#[test]
fn formats_mixed_up_are_told_apart() {
    let Some(place) = workplace() else { return };
    let (model, lora, out) = (place.model(), place.path("lora"), place.path("out"));
    let refuse = |model: &Path, adapter: &Path, words: &[&str]| {
        line(&command(model, adapter, &out, &[]).output().unwrap(), words);
    };
    refuse(&lora, &model, &["an adapter", "--adapter", "a model folder"]);
    refuse(&model, &model, &["a model", "a LoRA adapter", "--adapter"]);
    refuse(&model, &place.path("no"), &["nothing", "an adapter folder"]);
    refuse(&place.path("no"), &lora, &["nothing", "a model folder"]);
    refuse(
        &model,
        &lora.join("adapter_model.safetensors"),
        &["a file", "an adapter folder"],
    );
    for (start, words) in [
        ("ggml1234", "a GGML file"),
        ("GGUF1234", "a GGUF file"),
        ("{}", "a file"),
    ] {
        let file = place.path("model.bin");
        fs::write(&file, start).unwrap();
        refuse(&file, &lora, &[words, "a model folder"]);
    }
    let usage = |flags: &[&str], word: &str| {
        let output = merge(&place, "out", flags).output().unwrap();
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(word), "{stderr}");
    };
    usage(
        &["--adapter-scale", "1", "--adapter-scale", "2"],
        "2 factors for 1 adapters",
    );
    usage(&["--adapter-scale", "nan"], "--adapter-scale");
    usage(&["--shard-size", "5 bytes"], "--shard-size");
    usage(&["--into", "requantized", "--type", "fp32"], "--type");
    usage(&["--verify-bound=-1"], "--verify-bound");
    let none = glmtune(&["merge", "--model", str(&model), "--output", str(&out)])
        .output()
        .unwrap();
    assert!(fails(&none, 2).contains("--adapter"));
    assert_eq!(left(&place), Vec::<String>::new());
}

#[test]
fn a_result_beyond_the_bound_gets_no_name() {
    let Some(place) = workplace() else { return };
    let output = merge(&place, "out", &["--verify-bound", "1e-9"])
        .output()
        .unwrap();
    line(&output, &["out", "--verify-bound", "1.00e-9"]);
    assert_eq!(left(&place), Vec::<String>::new());
    assert!(text(&output.stdout).contains("largest logit difference"));
}
