//! Does the program work, seen from outside?

#[path = "common/program.rs"]
mod program;

use program::{Workplace, fails, glmtune, str, succeeds, text};

#[test]
fn help_lists_every_command_and_every_flag_is_documented() {
    let output = glmtune(&["--help"]).output().unwrap();
    assert!(output.status.success());
    let help = text(&output.stdout);
    for command in [
        "train",
        "generate",
        "chat",
        "quantize",
        "inspect",
        "synth",
        "demo",
        "--threads",
    ] {
        assert!(help.contains(command), "{command}: {help}");
    }
    let help = text(&glmtune(&["train", "--help"]).output().unwrap().stdout);
    for heading in [
        "LoRA:",
        "Quantisation:",
        "Optimisation:",
        "Data:",
        "Evaluation:",
        "Saving and reporting:",
    ] {
        assert!(help.contains(heading), "{heading}: {help}");
    }
    assert!(text(&glmtune(&["--version"]).output().unwrap().stdout).starts_with("glmtune "));
}

#[test]
fn a_wrong_command_line_ends_with_2() {
    for args in [
        &["train", "--no-such-flag"][..],
        &["no-such-command"],
        &["train", "--learning-rate", "fast"],
        &["train", "--method", "magic"],
        &[],
    ] {
        assert_eq!(glmtune(args).output().unwrap().status.code(), Some(2), "{args:?}");
    }
    let line = fails(
        &glmtune(&["train", "--data", "d.json", "--output", "o"])
            .output()
            .unwrap(),
        2,
    );
    assert!(line.contains("--model is missing"), "{line}");
    let all = ["train", "--model", "m", "--data", "d.json", "--output", "o"];
    for (extra, expected) in [
        (&["--method", "full"][..], "not there yet"),
        (&["--lora-r", "0"], "--lora-r: found 0"),
        (&["--learning-rate", "-1"], "expected a number above 0"),
        (&["--resume", "--overwrite"], "give one of them"),
        (&["--threads", "0"], "--threads: found 0"),
        (&["--lr-scheduler", "zigzag"], "zigzag"),
    ] {
        let line = fails(&glmtune(&[&all, extra].concat()).output().unwrap(), 2);
        assert!(line.contains(expected), "{extra:?}: {line}");
    }
    let output = glmtune(&all).env("GLMTUNE_THREADS", "many").output().unwrap();
    assert!(fails(&output, 2).contains("GLMTUNE_THREADS: found many"));
}

#[test]
fn what_is_missing_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data, output) = (
        dir.path().join("no-model"),
        dir.path().join("d.json"),
        dir.path().join("out"),
    );
    let args = [
        "train",
        "--model",
        str(&model),
        "--data",
        str(&data),
        "--output",
        str(&output),
    ];
    let line = fails(&glmtune(&args).output().unwrap(), 1);
    assert!(line.contains("no-model"), "{line}");
    assert!(!output.exists(), "a run that cannot start leaves no folder");

    let line = fails(
        &glmtune(&["train", "--config", str(&dir.path().join("no.toml"))])
            .output()
            .unwrap(),
        1,
    );
    assert!(line.contains("no.toml"), "{line}");
}

#[test]
fn an_output_folder_with_something_in_it_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    std::fs::create_dir(&output).unwrap();
    std::fs::write(output.join("thesis.txt"), "years of work").unwrap();
    let args = [
        "train",
        "--model",
        "m",
        "--data",
        "d.json",
        "--output",
        str(&output),
    ];
    let line = fails(&glmtune(&args).output().unwrap(), 1);
    assert!(
        line.contains("not empty") && line.contains("--resume") && line.contains("--overwrite"),
        "{line}"
    );
    let line = fails(
        &glmtune(&[&args[..], &["--resume"]].concat()).output().unwrap(),
        1,
    );
    assert!(line.contains("no checkpoint"), "{line}");
    assert_eq!(
        std::fs::read_to_string(output.join("thesis.txt")).unwrap(),
        "years of work"
    );
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let mut child = glmtune(&["train", "--help"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(
        !text(&output.stderr).contains("panicked"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_run_leaves_what_the_documentation_promises() {
    let Some(place) = Workplace::new() else { return };
    let stderr = succeeds(
        &place
            .train("out", &["--eval-steps", "4", "--preview"])
            .output()
            .unwrap(),
    );
    assert!(
        stderr.contains("step 12/12") && stderr.contains("evaluation loss"),
        "{stderr}"
    );
    assert!(
        stderr.contains("glmtune chat --model"),
        "says what to do next: {stderr}"
    );
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "run.toml",
        "metrics.jsonl",
    ] {
        assert!(
            place.path("out").join(file).metadata().unwrap().len() > 0,
            "{file}"
        );
    }
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ] {
        assert!(
            place.path("out/checkpoints/step-000012").join(file).exists(),
            "{file}"
        );
    }
    let kept = std::fs::read_dir(place.path("out/checkpoints")).unwrap().count();
    assert_eq!(kept, 3, "--save-total-limit is 3");

    let metrics = place.metrics("out");
    let steps: Vec<_> = metrics.iter().filter(|row| row.get("loss").is_some()).collect();
    assert_eq!(steps.len(), 12);
    for key in ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"] {
        assert!(steps.iter().all(|row| row[key].is_number()), "{key}: {steps:?}");
    }
    let evaluated: Vec<_> = metrics
        .iter()
        .filter(|row| row.get("eval_loss").is_some())
        .map(|row| &row["step"])
        .collect();
    assert_eq!(evaluated, [0, 4, 8, 12]);
    let loss = |row: &serde_json::Value| row["loss"].as_f64().unwrap();
    assert!(loss(steps[11]) < loss(steps[0]), "{steps:?}");
}

#[test]
fn run_toml_repeats_the_run() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("first", &[]).output().unwrap());
    let (file, again) = (place.path("first/run.toml"), place.path("again"));
    succeeds(
        &glmtune(&["train", "--config", str(&file), "--output", str(&again)])
            .output()
            .unwrap(),
    );
    assert!(
        place.adapter("first") == place.adapter("again"),
        "the adapters differ"
    );
    assert_eq!(place.metrics("first"), place.metrics("again"));
    // On one thread as well: no sum depends on how the work is shared.
    let one = place.path("one");
    let args = [
        "train",
        "--config",
        str(&file),
        "--output",
        str(&one),
        "--threads",
        "1",
    ];
    succeeds(&glmtune(&args).output().unwrap());
    assert!(
        place.adapter("first") == place.adapter("one"),
        "the adapters differ on one thread"
    );
}
