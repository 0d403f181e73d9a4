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
        "eval",
        "generate",
        "chat",
        "quantize",
        "report",
        "inspect",
        "synth",
        "bench",
        "doctor",
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
        (&["--method", "freeze", "--dora"][..], "--dora belongs to"),
        (&["--eval-samples", "3"], "needs evaluation data"),
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

#[test]
fn bench_measures_every_kind_of_thing_without_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let figures = |what: &str, device: &str, extra: &[&str]| -> serde_json::Value {
        let file = dir.path().join(format!("{what}.json"));
        let args = [
            "bench",
            what,
            "--quick",
            "--device",
            device,
            "--dtype",
            "fp32",
            "--json",
            str(&file),
        ];
        succeeds(&glmtune(&[&args, extra].concat()).output().unwrap());
        serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap()
    };
    let kernels = figures("kernels", "cpu", &["--rows", "1,8"]);
    assert_eq!(kernels["machine"]["device"], "cpu");
    assert!(kernels["ceilings"]["copy_gb_s"].as_f64().unwrap() > 0.0);
    let cases = kernels["cases"].as_array().unwrap();
    for group in [
        "dequantize",
        "nf4",
        "dense",
        "lora",
        "head",
        "attention",
        "norm",
        "gelu",
        "rope",
        "embedding",
        "dropout",
        "adamw",
    ] {
        let of_group: Vec<_> = cases.iter().filter(|case| case["group"] == group).collect();
        assert!(!of_group.is_empty(), "{group}");
        assert!(
            of_group
                .iter()
                .all(|case| case["us"].as_f64().is_some_and(|us| us > 0.0)),
            "{of_group:?}"
        );
    }
    let only = figures("kernels", "cpu", &["--only", "gelu"]);
    let groups = only["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| case["group"].as_str().unwrap());
    assert_eq!(
        groups.collect::<std::collections::BTreeSet<_>>(),
        ["ceiling", "gelu"].into()
    );

    let steps = ["--length", "16,32", "--steps", "6", "--lora-dropout", "0.1"];
    let trained = figures("train", "cpu", &steps);
    for (report, length) in trained["train"].as_array().unwrap().iter().zip([16, 32]) {
        assert_eq!(report["length"], length);
        let number = |key: &str| report[key].as_f64().unwrap();
        assert!(
            (number("loss_first") - number("ln_vocabulary")).abs() < 0.5,
            "{report}"
        );
        assert!(number("loss_last") < number("loss_first"), "{report}");
        assert!(number("tokens_per_second") > 0.0);
    }
    let decoded = figures("decode", "cpu", &["--batch", "2"]);
    assert!(decoded["decode"][0]["tokens_per_second"].as_f64().unwrap() > 0.0);

    if glmtune::cuda::describe(0).is_ok() {
        let kernels = figures("kernels", "cuda", &[]);
        assert_eq!(kernels["machine"]["device"], "cuda:0");
        let there = figures("train", "cuda", &steps);
        for (cpu, cuda) in trained["train"]
            .as_array()
            .unwrap()
            .iter()
            .zip(there["train"].as_array().unwrap())
        {
            let loss = |report: &serde_json::Value| report["loss_last"].as_f64().unwrap();
            assert!((loss(cpu) - loss(cuda)).abs() < 1e-3, "{cpu} {cuda}");
            assert!(cuda["tensor_bytes"].as_u64().unwrap() > 0, "{cuda}");
        }
        figures("decode", "cuda", &[]);
    }

    for (args, code, says) in [
        (
            &["bench", "kernels", "--quick", "--only", "soup"][..],
            2,
            "--only: found soup, expected some of dequantize, nf4",
        ),
        (
            &["bench", "train", "--quick", "--length", "2"],
            2,
            "--length: found 2",
        ),
        (
            &["bench", "train", "--quick", "--config", "no/config.json"],
            1,
            "config.json",
        ),
        (
            &["bench", "train", "--quick", "--device", "cpu", "--dtype", "bf16"],
            1,
            "found bfloat16 on the CPU",
        ),
    ] {
        let line = fails(&glmtune(args).output().unwrap(), code);
        assert!(line.contains(says), "{line}");
    }
}

#[test]
fn doctor_says_what_it_found_and_what_to_do() {
    let output = glmtune(&["doctor"]).output().unwrap();
    succeeds(&output);
    let lines = text(&output.stdout);
    for what in ["program", "CPU", "auto"] {
        assert!(
            lines.lines().any(|line| line.starts_with(what)),
            "{what}: {lines}"
        );
    }
    let output = glmtune(&["doctor", "--json"]).output().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = json["findings"].as_array().unwrap();
    assert_eq!(findings.len(), lines.lines().count());
    if cfg!(not(any(feature = "cuda", feature = "emu"))) {
        let cuda = findings.iter().find(|finding| finding["what"] == "CUDA").unwrap();
        assert!(
            cuda["remedy"].as_str().unwrap().contains("--features cuda"),
            "{cuda}"
        );
    }
}
