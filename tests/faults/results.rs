//! Adapters, checkpoints and answers: what a run leaves and others use; runs that get in each other's way.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::program::{Workplace, fails, glmtune, signal, str, succeeds, text};
use crate::spoil::{edit_json, halve, one_line, poke};

const LORA: &[&str] = &["--method", "lora", "--max-steps", "2"];

#[test]
fn adapters_that_do_not_fit_are_one_line() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("adapter", LORA).output().unwrap());
    const A: &str = "base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight";
    let set = |key: &'static str, value: Value| {
        move |dir: &Path| edit_json(&dir.join("adapter_config.json"), |json| json[key] = value)
    };
    type Change = Box<dyn FnOnce(&Path)>;
    let cases: Vec<(&str, Change, &[&str])> = vec![
        (
            "no configuration",
            Box::new(|d| fs::remove_file(d.join("adapter_config.json")).unwrap()),
            &["adapter_config.json", "check the path"],
        ),
        (
            "no weights",
            Box::new(|d| fs::remove_file(d.join("adapter_model.safetensors")).unwrap()),
            &["no adapter weights"],
        ),
        (
            "half",
            Box::new(|d| halve(&d.join("adapter_model.safetensors"))),
            &["adapter_model.safetensors", "truncated"],
        ),
        (
            "garbage",
            Box::new(|d| fs::write(d.join("adapter_config.json"), "\u{1}").unwrap()),
            &["adapter_config.json", "JSON"],
        ),
        (
            "another r",
            Box::new(set("r", json!(8))),
            &["lora_A.weight", "r 8"],
        ),
        (
            "a huge r",
            Box::new(set("r", json!(1u64 << 40))),
            &["r 1099511627776"],
        ),
        (
            "text for alpha",
            Box::new(set("lora_alpha", json!("x"))),
            &["lora_alpha \"x\""],
        ),
        (
            "text for a flag",
            Box::new(set("use_rslora", json!("yes"))),
            &["use_rslora \"yes\"", "true or false"],
        ),
        (
            "fewer targets",
            Box::new(set("target_modules", json!(["query_key_value"]))),
            &["attention.dense.lora_A", "target_modules query_key_value"],
        ),
        (
            "not LoRA",
            Box::new(set("peft_type", json!("PREFIX_TUNING"))),
            &["PREFIX_TUNING"],
        ),
        (
            "NaN",
            Box::new(|d| poke(&d.join("adapter_model.safetensors"), A, f32::NAN)),
            &[A, "NaN"],
        ),
        (
            "a broken run.toml",
            Box::new(|d| fs::write(d.join("run.toml"), "[[").unwrap()),
            &["run.toml:1"],
        ),
    ];
    for (i, (what, change, words)) in cases.into_iter().enumerate() {
        let dir = place.path(&format!("spoilt-{i}"));
        fs::create_dir(&dir).unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::copy(place.path("adapter").join(name), dir.join(name)).unwrap();
        }
        change(&dir);
        let model = place.model();
        let args = [
            "generate",
            "--model",
            str(&model),
            "--adapter",
            str(&dir),
            "--prompt",
            "x",
            "--max-new-tokens",
            "1",
        ];
        one_line(what, &mut glmtune(&args), 1, words);
    }
}

/// Shapes cannot tell a base of the same size; the checkpoint of the run can.
#[test]
fn an_adapter_on_other_weights_of_the_same_shapes_is_warned_of() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("adapter", LORA).output().unwrap());
    let (model, adapter) = (place.model(), place.path("adapter"));
    let args = [
        "generate",
        "--model",
        str(&model),
        "--adapter",
        str(&adapter),
        "--prompt",
        "x",
        "--max-new-tokens",
        "1",
    ];
    assert!(!succeeds(&glmtune(&args).output().unwrap()).contains("warning"));
    poke(
        &model.join("model.safetensors"),
        "transformer.final_layernorm.bias",
        0.5,
    );
    let stderr = succeeds(&glmtune(&args).output().unwrap());
    assert!(
        stderr.contains("warning: ") && stderr.contains("not those that the adapter was trained on"),
        "{stderr}"
    );
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_still_works() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("out", &["--max-steps", "4"]).output().unwrap());
    let last = place.path("out/checkpoints/step-000004");
    let keep = place.path("kept");
    fs::create_dir(&keep).unwrap();
    for entry in fs::read_dir(&last).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, keep.join(path.file_name().unwrap())).unwrap();
    }
    let out = place.path("out");
    let resume = ["train", "--output", str(&out), "--resume"];
    let remedy = "remove ";
    for name in [
        "optimizer.safetensors",
        "state.json",
        "adapter_model.safetensors",
        "adapter_config.json",
    ] {
        halve(&last.join(name));
        one_line(
            name,
            &mut glmtune(&resume),
            1,
            &[name, remedy, "step-000004", "the checkpoint before it"],
        );
        fs::remove_file(last.join(name)).unwrap();
        one_line(
            name,
            &mut glmtune(&resume),
            1,
            &[remedy, "step-000004", "the checkpoint before it"],
        );
        fs::copy(keep.join(name), last.join(name)).unwrap();
    }
    edit_json(&last.join("state.json"), |json| json["step"] = json!(3));
    one_line(
        "another step",
        &mut glmtune(&resume),
        1,
        &["optimizer.safetensors", "step 4", "step 3 as in state.json"],
    );
    fs::remove_dir_all(&last).unwrap();
    succeeds(&glmtune(&resume).output().unwrap());
}

#[test]
fn overwrite_removes_what_a_run_left_and_nothing_else() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("out", LORA).output().unwrap());
    let mine = place.path("out/checkpoints/mine.txt");
    fs::write(&mine, "years of work").unwrap();
    succeeds(
        &place
            .train("out", &[LORA, &["--overwrite"]].concat())
            .output()
            .unwrap(),
    );
    assert_eq!(fs::read_to_string(mine).unwrap(), "years of work");
}

#[test]
#[cfg(target_os = "linux")]
fn two_runs_do_not_share_a_folder() {
    let Some(place) = Workplace::new() else { return };
    let mut first = place.start_and_wait("out", 2, &["--max-steps", "100000"]);
    one_line(
        "the second",
        &mut place.train("out", &["--overwrite"]),
        1,
        &["another glmtune", "--output"],
    );
    assert!(first.try_wait().unwrap().is_none(), "the first was disturbed");
    signal(&first, "INT");
    assert_eq!(first.wait().unwrap().code(), Some(130));
}

/// An interrupt before step 1 does not wait for it.
#[test]
#[cfg(unix)]
fn ctrl_c_during_the_evaluation_before_step_1_stops_there() {
    let Some(place) = Workplace::new() else { return };
    let record =
        |i: usize| json!({"q": format!("{i}{}", "数".repeat(200)), "a": "一".repeat(200)}).to_string();
    let lines: Vec<String> = (0..4000).map(record).collect();
    fs::write(place.path("eval.jsonl"), lines.join("\n")).unwrap();
    let eval = place.path("eval.jsonl");
    let mut command = place.train("out", &["--max-steps", "2"]);
    let args: Vec<_> = command.get_args().map(std::ffi::OsStr::to_owned).collect();
    let split = args.iter().position(|arg| arg == "--val-size").unwrap();
    command = Command::new(command.get_program());
    command
        .args(&args[..split])
        .args(&args[split + 2..])
        .arg("--eval-data")
        .arg(&eval);
    let child = command.stderr(Stdio::piped()).spawn().unwrap();
    while !place.path("out/metrics.jsonl").exists() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    signal(&child, "INT");
    let output = child.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(
        stderr.contains("interrupted at step 0") && !stderr.contains("step 1/"),
        "{stderr}"
    );
}

#[test]
fn generation_is_refused_before_it_begins() {
    let Some(place) = Workplace::new() else { return };
    let (model, data, dir) = (place.model(), place.data(), place.path("folder"));
    fs::create_dir(&dir).unwrap();
    let (taken, lost) = (place.path("data.json"), place.path("no/such/answers.jsonl"));
    let base = ["generate", "--model", str(&model)];
    let file = |output| vec!["--input", str(&data), "--output", output];
    let cases: Vec<(Vec<&str>, i32, &[&str])> = vec![
        (
            vec!["--prompt", "x", "--max-length", "0"],
            2,
            &["--max-length: found 0"],
        ),
        (
            vec!["--prompt", "x", "--max-new-tokens", "18446744073709551615"],
            1,
            &["GB of memory", "--max-new-tokens"],
        ),
        (
            vec!["--prompt", "x", "--max-length", "18446744073709551615"],
            1,
            &["GB of memory", "--max-length"],
        ),
        (
            vec!["--prompt", "x", "--temperature", "0"],
            2,
            &["--temperature: found 0"],
        ),
        (
            vec!["--prompt", "x", "--max-length", "3", "--max-new-tokens", "2"],
            1,
            &["prompt: found", "--max-length 3"],
        ),
        (file(str(&dir)), 1, &["folder", "add the name of a file"]),
        (file(str(&taken)), 1, &["a file that exists", "--overwrite"]),
        (file(str(&lost)), 1, &["no folder", "make it first"]),
    ];
    for (args, code, words) in cases {
        one_line(
            &args.join(" "),
            &mut glmtune(&[&base, &args[..]].concat()),
            code,
            words,
        );
    }
    // A device is written to, not replaced.
    #[cfg(target_os = "linux")]
    {
        let link = place.path("full");
        std::os::unix::fs::symlink("/dev/full", &link).unwrap();
        let args = [
            &base[..],
            &file(str(&link)),
            &["--overwrite", "--max-new-tokens", "1"],
        ]
        .concat();
        let output = glmtune(&args).output().unwrap();
        assert!(
            fails(&output, 1).contains("make room"),
            "{}",
            text(&output.stderr)
        );
        assert!(link.is_symlink());
    }
}

#[test]
fn a_chat_without_input_ends_well() {
    let Some(place) = Workplace::new() else { return };
    let model = place.model();
    let output = glmtune(&["chat", "--model", str(&model)])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    succeeds(&output);
    assert!(output.stdout.is_empty());
}
