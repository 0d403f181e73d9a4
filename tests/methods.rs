//! The program with every method: what a run can start from, when it ends, what it warns of, and what it leaves.

#[path = "common/program.rs"]
mod program;

use std::path::Path;
use std::process::Command;

use program::{Workplace, fails, str, succeeds};
use serde_json::Value;

/// A short run: one micro-batch a step.
fn train(place: &Workplace, output: &str, flags: &str) -> Command {
    let (model, data, output) = (place.model(), place.data(), place.path(output));
    let mut command = program::glmtune(&["train", "--model", str(&model), "--data", str(&data)]);
    command.args(["--output", str(&output), "--micro-batch-size", "2"]);
    command.args("--gradient-accumulation-steps 1 --warmup-ratio 0".split(' '));
    command.args(flags.split(' '));
    command
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn eval_loss(place: &Workplace, output: &str, when: &str) -> f64 {
    json(&place.path(&format!("{output}/run.json")))[when]["eval_loss"]
        .as_f64()
        .unwrap()
}

/// The loss that `glmtune eval` measures on the training data.
fn loss_of(place: &Workplace, model: &Path, extra: &[&str]) -> f64 {
    let data = place.data();
    let args = [
        &[
            "eval",
            "--model",
            str(model),
            "--data",
            str(&data),
            "--json",
            "--max-new-tokens",
            "2",
        ],
        extra,
    ];
    let output = program::glmtune(&args.concat()).output().unwrap();
    succeeds(&output);
    let metrics: Value = serde_json::from_slice(&output.stdout).unwrap();
    metrics["loss"].as_f64().unwrap_or_else(|| panic!("{metrics}"))
}

#[test]
fn a_run_goes_on_from_the_adapter_of_another_of_any_kind() {
    let Some(place) = Workplace::new() else { return };
    for (kind, flags) in [
        (
            "lora",
            "--method lora --lora-r 2 --lora-target dense --learning-rate 1e-2",
        ),
        ("dora", "--method lora --dora --lora-r 2 --learning-rate 1e-2"),
        ("ptuning", "--method ptuning --pre-seq-len 3 --load-in stored"),
    ] {
        let steps = "--val-size 2 --max-steps 8";
        succeeds(&train(&place, kind, &format!("{flags} {steps}")).output().unwrap());
        let old = place.path(kind);
        let method = if kind == "dora" { "lora" } else { kind };
        let mut again = train(
            &place,
            &format!("{kind}-on"),
            &format!("--method {method} {steps} --learning-rate 1e-3"),
        );
        if kind == "ptuning" {
            again.args(["--load-in", "stored"]);
        }
        let log = succeeds(&again.args(["--adapter", str(&old)]).output().unwrap());
        assert!(log.contains("going on from"), "{log}");
        let (end, start) = (
            eval_loss(&place, kind, "eval_after"),
            eval_loss(&place, &format!("{kind}-on"), "eval_before"),
        );
        assert!(
            (end - start).abs() < 1e-5 * end,
            "{kind}: ended at {end}, went on from {start}"
        );
    }
    // Its form is the adapter's, and run.toml says so.
    let toml = std::fs::read_to_string(place.path("lora-on/run.toml")).unwrap();
    assert!(
        toml.contains("lora_r = 2") && toml.contains("lora_target = \"dense\""),
        "{toml}"
    );
    // Another kind than the method's is refused before anything is written.
    let prefix = place.path("ptuning");
    let wrong = train(&place, "wrong", "--method lora")
        .args(["--adapter", str(&prefix)])
        .output()
        .unwrap();
    assert!(fails(&wrong, 1).contains("--method ptuning"));
    assert!(!place.path("wrong").exists());
    let merged = train(&place, "wrong", "--method lora")
        .args(["--merge-adapters", str(&prefix)])
        .output()
        .unwrap();
    assert!(fails(&merged, 1).contains("prefix"));
}

#[test]
fn adapters_are_merged_into_the_base_before_a_run_and_resume_finds_them_there() {
    let Some(place) = Workplace::new() else { return };
    let lora = "--method lora --lora-r 2 --learning-rate 1e-2 --val-size 2 --max-steps 6";
    succeeds(&train(&place, "a", lora).output().unwrap());
    let a = place.path("a");
    succeeds(
        &train(&place, "b", lora)
            .args(["--merge-adapters", str(&a)])
            .output()
            .unwrap(),
    );
    let (end, start) = (
        eval_loss(&place, "a", "eval_after"),
        eval_loss(&place, "b", "eval_before"),
    );
    assert!(
        (end - start).abs() < 1e-3 * end,
        "{end} {start}: float16 rounds the merged weights once"
    );
    let both = format!("{},{}", str(&a), str(&place.path("b")));
    let flags = "--method full --val-size 2 --max-steps 4 --save-steps 2 --learning-rate 1e-4";
    let log = succeeds(
        &train(&place, "c", flags)
            .args(["--merge-adapters", &both])
            .output()
            .unwrap(),
    );
    assert_eq!(log.matches("merged ").count(), 2, "{log}");
    let start = eval_loss(&place, "c", "eval_before");
    let end = eval_loss(&place, "b", "eval_after");
    assert!((end - start).abs() < 1e-3 * end, "{end} {start}");
    // The folder knows which; without one of them the base is another.
    let c = place.path("c");
    succeeds(
        &program::glmtune(&["train", "--output", str(&c), "--resume"])
            .output()
            .unwrap(),
    );
    let other = train(&place, "c", flags)
        .args(["--resume", "--merge-adapters", str(&a)])
        .output()
        .unwrap();
    assert!(fails(&other, 1).contains("base weights"));
}

#[test]
fn full_and_freeze_leave_a_model_that_loads_and_scores_as_it_was_trained() {
    let Some(place) = Workplace::new() else { return };
    for (name, flags) in [
        ("full", "--method full --learning-rate 1e-3"),
        (
            "freeze",
            "--method freeze --trainable-layers -2 --trainable-modules mlp --learning-rate 1e-3",
        ),
    ] {
        let data = place.data();
        let flags = format!("{flags} --max-steps 12 --eval-data {}", str(&data));
        succeeds(&train(&place, name, &flags).output().unwrap());
        let (before, after) = (
            eval_loss(&place, name, "eval_before"),
            eval_loss(&place, name, "eval_after"),
        );
        assert!(after < before - 0.05, "{name}: {before} -> {after}");
        let loss = loss_of(&place, &place.path(&format!("{name}/model")), &[]);
        // The model is written in the base's float16.
        assert!(
            (loss - after).abs() < 2e-3 * after,
            "{name}: trained to {after}, reads back as {loss}"
        );
    }
}

#[test]
fn it_stops_early_keeps_the_best_and_gives_it_back() {
    let Some(place) = Workplace::new() else { return };
    // A rate that first helps and then hurts.
    let flags = "--method lora --lora-r 4 --learning-rate 0.3 --lr-scheduler constant --val-size 2 --eval-steps 1 \
                 --max-steps 40 --early-stopping-patience 3 --save-steps 100 --save-total-limit 1";
    let log = succeeds(&train(&place, "out", flags).output().unwrap());
    assert!(log.contains("stopping early after step"), "{log}");
    assert!(log.contains("the result is the best checkpoint"), "{log}");
    let rows = place.metrics("out");
    let losses: Vec<(u64, f64)> = rows
        .iter()
        .filter(|row| row["step"] != 0)
        .map(|row| (row["step"].as_u64().unwrap(), row["eval_loss"].as_f64().unwrap()))
        .collect();
    let best = losses.iter().copied().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    let last = losses.last().unwrap().0;
    assert_eq!(
        last,
        best.0 + 3,
        "three evaluations without a better one: {losses:?}"
    );
    let record = json(&place.path("out/run.json"));
    assert_eq!(record["best"]["step"], best.0);
    assert_eq!(record["status"], "finished");
    // The adapter is that of the best step, not of the last.
    let kept = place.path(&format!(
        "out/checkpoints/step-{:06}/adapter_model.safetensors",
        best.0
    ));
    assert!(place.adapter("out") == std::fs::read(kept).unwrap());
    // Going on has nothing left to do, unless it is told to be more patient.
    let out = place.path("out");
    let resume = |extra: &[&str]| {
        let output = program::glmtune(&[&["train", "--output", str(&out), "--resume"], extra].concat())
            .output()
            .unwrap();
        succeeds(&output);
        place.metrics("out").last().unwrap()["step"].as_u64().unwrap()
    };
    assert_eq!(resume(&[]), last);
    assert_eq!(resume(&["--early-stopping-patience", "5"]), last + 2);
}

#[test]
fn steps_that_are_no_number_are_left_out_and_too_many_in_a_row_end_the_run() {
    let Some(place) = Workplace::new() else { return };
    let flags = "--method lora --lora-r 2 --learning-rate 1e30 --lr-scheduler constant --max-steps 9 --save-steps 1 \
                 --max-bad-steps 2";
    let output = train(&place, "out", flags).output().unwrap();
    let line = fails(&output, 1);
    assert!(
        line.contains("2 such steps in a row")
            && line.contains("last good checkpoint is")
            && line.contains("first seen in"),
        "{line}"
    );
    let log = program::text(&output.stderr);
    assert!(log.contains("warning: step"), "{log}");
    let rows = place.metrics("out");
    assert!(rows.iter().any(|row| row["skipped"] == 1), "{rows:?}");
    assert!(
        rows.iter()
            .all(|row| !row["loss"].is_null() || row.get("loss").is_none()),
        "a NaN is hidden: {rows:?}"
    );
    let record = json(&place.path("out/run.json"));
    assert_eq!(record["status"], "failed");
    assert!(record["error"].as_str().unwrap().contains("in a row"));
    assert!(place.path("out/report.html").exists());
    let kept: Vec<_> = std::fs::read_dir(place.path("out/checkpoints"))
        .unwrap()
        .collect();
    assert!(!kept.is_empty());
}

#[test]
fn it_warns_of_leaked_evaluation_data_and_of_an_update_that_is_zero() {
    let Some(place) = Workplace::new() else { return };
    let data = place.data();
    let flags = format!(
        "--method lora --lora-r 2 --max-steps 1 --learning-rate 1e-30 --weight-decay 0 --eval-data {}",
        str(&data)
    );
    let log = succeeds(&train(&place, "out", &flags).output().unwrap());
    assert!(
        log.contains("10 of 10 evaluation samples also stand in the training data"),
        "{log}"
    );
    let zero = train(
        &place,
        "zero",
        "--method lora --lora-r 2 --max-steps 1 --warmup-steps 5",
    )
    .output();
    let log = succeeds(&zero.unwrap());
    assert!(
        log.contains("the update of 16 of 16 adapted layers is zero"),
        "{log}"
    );
    let warnings = json(&place.path("zero/run.json"))["warnings"].clone();
    assert!(warnings.to_string().contains("is zero"), "{warnings}");
    let report = std::fs::read_to_string(place.path("zero/report.html")).unwrap();
    assert!(report.contains("is zero"));
}

#[test]
fn general_samples_are_mixed_in_and_forgetting_is_measured() {
    let Some(place) = Workplace::new() else { return };
    let general = place.path("general.jsonl");
    std::fs::write(
        &general,
        "{\"prompt\": \"你好\", \"response\": \"好\"}\n{\"prompt\": \"a\", \"response\": \"b\"}\n",
    )
    .unwrap();
    let flags = format!(
        "--method lora --lora-r 4 --learning-rate 3e-2 --epochs 1 --replay {} --replay-ratio 0.5 --forgetting --forgetting-tokens 3",
        str(&general)
    );
    let log = succeeds(&train(&place, "out", &flags).output().unwrap());
    assert!(
        log.contains("10 of 2 general samples are mixed into each pass (50.0 % of it)"),
        "{log}"
    );
    let rows = place.metrics("out");
    assert_eq!(rows.last().unwrap()["step"], 10, "20 samples in pairs");
    let kl = |row: &Value| row["eval_kl"].as_f64().unwrap();
    let (first, last) = (kl(&rows[0]), kl(rows.last().unwrap()));
    assert!(first.abs() < 1e-6 && last > 1e-3, "KL {first} -> {last}");
    let samples = std::fs::read_to_string(place.path("out/samples.jsonl")).unwrap();
    assert!(
        samples.contains("\"suite\":\"forgetting\"") && samples.contains("\"base\""),
        "{samples}"
    );
}

#[test]
fn overwrite_never_removes_what_the_run_is_made_from() {
    let Some(place) = Workplace::new() else { return };
    let flags = "--method full --max-steps 2";
    succeeds(&train(&place, "out", flags).output().unwrap());
    let (data, out) = (place.data(), place.path("out"));
    let model = out.join("model");
    let again = |model: &Path, extra: &[&str]| {
        let args = [
            "train",
            "--model",
            str(model),
            "--data",
            str(&data),
            "--output",
            str(&out),
            "--overwrite",
        ];
        program::glmtune(&[&args, extra].concat()).output().unwrap()
    };
    let line = fails(&again(&model, &["--method", "full", "--max-steps", "2"]), 1);
    assert!(
        line.contains("--model") && line.contains("--overwrite replaces"),
        "{line}"
    );
    assert!(model.join("model.safetensors").exists());
    // An adapter of the very folder.
    succeeds(
        &train(&place, "a", "--method lora --lora-r 2 --max-steps 2")
            .output()
            .unwrap(),
    );
    let a = place.path("a");
    for flag in ["--adapter", "--merge-adapters"] {
        let mut run = train(&place, "a", "--method lora --max-steps 2 --overwrite");
        let line = fails(&run.args([flag, str(&a)]).output().unwrap(), 1);
        assert!(line.contains(flag), "{line}");
    }
    assert!(a.join("adapter_model.safetensors").exists());
    // A model folder that no run left is nobody's to replace.
    let base = place.model();
    let foreign = place.path("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::copy(base.join("config.json"), foreign.join("config.json")).unwrap();
    let line = fails(
        &train(&place, "foreign", "--max-steps 1 --overwrite")
            .output()
            .unwrap(),
        1,
    );
    assert!(line.contains("not of a run"), "{line}");
}

#[test]
fn a_resumed_run_may_be_asked_for_something_else() {
    let Some(place) = Workplace::new() else { return };
    let old = place.path("old");
    succeeds(
        &train(&place, "old", "--method lora --lora-r 2 --max-steps 2")
            .output()
            .unwrap(),
    );
    let flags = "--method lora --val-size 2 --eval-steps 1 --save-steps 3 --save-total-limit 1 --learning-rate 1e-2 --max-steps 60";
    let mut first = train(&place, "out", flags);
    first.args(["--adapter", str(&old)]);
    let mut child = first.stderr(std::process::Stdio::null()).spawn().unwrap();
    let begun = std::time::Instant::now();
    while place
        .metrics("out")
        .last()
        .is_none_or(|row| row["step"].as_u64() < Some(7))
    {
        assert!(begun.elapsed().as_secs() < 100, "no step 7");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    program::signal(&child, "INT");
    child.wait().unwrap();
    // The adapter that it began from is not needed any more; the best by another number starts anew, and its checkpoint is kept.
    std::fs::remove_dir_all(&old).unwrap();
    let out = place.path("out");
    let resume = [
        "train",
        "--output",
        str(&out),
        "--resume",
        "--save-best",
        "--metric-for-best-model",
        "token_accuracy",
    ];
    let log = succeeds(&program::glmtune(&resume).output().unwrap());
    assert!(
        log.contains("the best so far counts from here on, by token_accuracy"),
        "{log}"
    );
    let record = json(&place.path("out/run.json"));
    assert_eq!(record["best"]["metric"], "eval_token_accuracy");
    assert!(record["best"]["value"].as_f64().unwrap() <= 1.0, "{record}");
    assert_eq!(record["status"], "finished");
    // What the report calls "after" is the result.
    let best = record["best"]["step"].as_u64().unwrap();
    let rows = place.metrics("out");
    let row = rows.iter().find(|row| row["step"] == best).unwrap();
    assert_eq!(record["eval_after"]["eval_loss"], row["eval_loss"]);
}

#[test]
fn an_adapter_of_a_merged_base_finds_the_merged_ones() {
    let Some(place) = Workplace::new() else { return };
    let data = place.data();
    let flags = format!(
        "--method lora --lora-r 2 --learning-rate 1e-2 --max-steps 8 --eval-data {}",
        str(&data)
    );
    succeeds(&train(&place, "a", &flags).output().unwrap());
    let a = place.path("a");
    succeeds(
        &train(&place, "b", &flags)
            .args(["--merge-adapters", str(&a)])
            .output()
            .unwrap(),
    );
    let b = place.path("b");
    let loss = loss_of(&place, &place.model(), &["--adapter", str(&b)]);
    let after = eval_loss(&place, "b", "eval_after");
    assert!(
        (loss - after).abs() < 1e-4 * after,
        "trained to {after}, used at {loss}"
    );
}

#[test]
fn an_evaluation_every_half_pass() {
    let Some(place) = Workplace::new() else { return };
    // Eight samples in pairs: four steps a pass.
    let flags = "--method lora --lora-r 2 --val-size 2 --epochs 2 --eval-epochs 0.5 --eval-samples 1 --eval-max-new-tokens 3";
    succeeds(&train(&place, "out", flags).output().unwrap());
    let rows = place.metrics("out");
    let evaluated: Vec<u64> = rows
        .iter()
        .filter(|row| row["eval_loss"].is_number() && row["eval_bleu-4"].is_number())
        .map(|row| row["step"].as_u64().unwrap())
        .collect();
    assert_eq!(evaluated, [0, 2, 4, 6, 8]);
    assert!(
        rows.iter()
            .skip(1)
            .all(|row| row["grad_norm/layers.0"].is_number()),
        "{rows:?}"
    );
    let record = json(&place.path("out/run.json"));
    assert!(record["program"]["sha256"].is_string());
    let parts = record["memory"]["parts"].as_array().unwrap();
    for account in [
        "what trains (host)",
        "gradients (host)",
        "optimizer (host)",
        "activations (host)",
    ] {
        let bytes = parts
            .iter()
            .find(|part| part["name"] == account)
            .map(|part| part["bytes"].as_u64().unwrap());
        assert!(bytes.is_some_and(|bytes| bytes > 0), "{account}: {parts:?}");
    }
    assert!(
        record["hashes"]
            .as_array()
            .unwrap()
            .iter()
            .any(|hash| hash["of"] == "base")
    );
    let events = std::fs::read_dir(place.path("out")).unwrap();
    assert!(events.into_iter().any(|e| {
        e.unwrap()
            .file_name()
            .to_string_lossy()
            .starts_with("events.out.tfevents.")
    }));
}

#[test]
fn inspect_knows_a_prefix_from_a_model() {
    let Some(place) = Workplace::new() else { return };
    succeeds(
        &train(&place, "out", "--method ptuning --pre-seq-len 3 --max-steps 1")
            .output()
            .unwrap(),
    );
    let out = place.path("out");
    let output = program::glmtune(&["inspect", str(&out)]).output().unwrap();
    let text = program::text(&output.stdout);
    assert!(
        text.contains("P-Tuning v2 prefix") && text.contains("pre seq len              3"),
        "{text}"
    );
}

#[test]
fn half_of_an_adapter_lies_between_the_base_and_the_whole() {
    let Some(place) = Workplace::new() else { return };
    let data = place.data();
    let flags = format!(
        "--method lora --lora-r 4 --learning-rate 1e-2 --max-steps 20 --eval-data {}",
        str(&data)
    );
    succeeds(&train(&place, "out", &flags).output().unwrap());
    let (model, out) = (place.model(), place.path("out"));
    let at = |factor: &str| {
        loss_of(
            &place,
            &model,
            &["--adapter", str(&out), "--adapter-scale", factor],
        )
    };
    let base = loss_of(&place, &model, &[]);
    let (none, half, whole) = (at("0"), at("0.5"), at("1"));
    assert!((none - base).abs() < 1e-6 * base, "{none} {base}");
    assert!(whole < half && half < none, "{none} {half} {whole}");
}

/// `command` as a user whom permissions bind: the superuser's tests would show nothing. The program is copied to where that
/// user can reach it, and the whole workplace is given to it.
#[cfg(unix)]
fn as_an_ordinary_user(place: &Workplace, command: &Command) -> Command {
    use std::os::unix::fs::{MetadataExt, chown};
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    fn give(path: &Path) {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        if path.is_dir() {
            std::fs::read_dir(path)
                .unwrap()
                .for_each(|entry| give(&entry.unwrap().path()));
        }
    }
    let program = place.path("glmtune");
    std::fs::copy(command.get_program(), &program).unwrap();
    let mut again = Command::new(&program);
    again.args(command.get_args());
    if std::fs::metadata(place.path("")).unwrap().uid() == 0 {
        give(&place.path(""));
        again.uid(NOBODY).gid(NOBODY);
    }
    again
}

#[test]
#[cfg(unix)]
fn a_folder_that_becomes_read_only_is_one_line_and_loses_nothing() {
    use std::os::unix::fs::PermissionsExt;
    let Some(place) = Workplace::new() else { return };
    let flags = "--method lora --lora-r 2 --save-steps 2 --max-steps";
    succeeds(&train(&place, "out", &format!("{flags} 4")).output().unwrap());
    let checkpoints = place.path("out/checkpoints");
    let names = || {
        let all = std::fs::read_dir(&checkpoints).unwrap();
        let mut names: Vec<_> = all.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = names();
    let allow = |mode| std::fs::set_permissions(&checkpoints, PermissionsExt::from_mode(mode)).unwrap();
    allow(0o555);
    let again = train(&place, "out", &format!("{flags} 4 --overwrite"));
    let output = as_an_ordinary_user(&place, &again).output().unwrap();
    allow(0o755);
    assert!(fails(&output, 1).contains("permissions"), "{output:?}");
    assert_eq!(names(), before, "a checkpoint was lost");
}
