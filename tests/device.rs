//! The program on a CUDA device, seen from outside: what is refused, and a run from training to an answer.
//!
//! With feature `emu` the device is emulated; without a device the refusals remain.

#[path = "common/program.rs"]
mod program;

use program::{Workplace, fails, glmtune, str, succeeds, text};

fn there_is_a_device() -> bool {
    match glmtune::cuda::describe(0) {
        Ok(_) => true,
        Err(why) => {
            eprintln!("SKIPPED: no CUDA device: {why}");
            false
        }
    }
}

#[test]
fn a_device_that_is_not_there_is_refused_in_one_line() {
    let Some(place) = Workplace::new() else { return };
    let asked = if there_is_a_device() { "cuda:7" } else { "cuda" };
    let output = place.train("out", &["--device", asked]).output().unwrap();
    let line = fails(&output, 1);
    assert!(line.contains("--device cuda"), "{line}");
    assert!(
        line.contains("; ") && line.contains("--device"),
        "no remedy: {line}"
    );
    assert!(!place.path("out").join("checkpoints").exists());
    let line = fails(&place.train("out", &["--device", "gpu"]).output().unwrap(), 2);
    assert!(line.contains("expected auto, cpu, cuda or cuda:N"), "{line}");
    let line = fails(
        &place
            .train("out", &["--device", "cpu", "--dtype", "bf16"])
            .output()
            .unwrap(),
        1,
    );
    assert!(line.contains("--dtype"), "{line}");
}

#[test]
fn auto_finds_something_to_compute_on() {
    let Some(place) = Workplace::new() else { return };
    let output = place.train("out", &["--max-steps", "1"]).output().unwrap();
    let log = succeeds(&output);
    assert!(log.contains("computing on: "), "{log}");
}

#[test]
fn a_device_that_is_too_small_says_what_was_asked_and_what_was_free() {
    if !glmtune::cuda::emulated() {
        eprintln!("SKIPPED: only an emulated device can be made small");
        return;
    }
    let Some(place) = Workplace::new() else { return };
    // Enough for nothing, for the weights alone, for the scratch of the kernels: a clean end each time.
    for bytes in ["1000", "1000000", "33800000"] {
        let output = place
            .train(
                "out",
                &["--device", "cuda", "--dtype", "fp32", "--max-steps", "1"],
            )
            .env("GLMTUNE_EMU_MEMORY", bytes)
            .output()
            .unwrap();
        let line = fails(&output, 1);
        assert!(line.contains("memory of the card"), "{line}");
        assert!(
            line.contains("at least") && line.contains("close what else uses the card"),
            "{line}"
        );
        assert!(!place.path("out").join("adapter_model.safetensors").exists());
    }
}

/// Weights and head that wait in host memory answer as those that lie on the device.
#[test]
fn answers_are_the_same_with_weights_that_are_streamed() {
    if !there_is_a_device() {
        return;
    }
    let Some(place) = Workplace::new() else { return };
    let answer = |more: &[&str]| {
        let model = place.model();
        let mut args = vec![
            "generate",
            "--model",
            str(&model),
            "--prompt",
            "数到三",
            "--greedy",
            "--max-new-tokens",
            "4",
        ];
        args.extend(["--device", "cuda", "--dtype", "fp16"]);
        args.extend(more);
        let output = glmtune(&args).output().unwrap();
        succeeds(&output);
        text(&output.stdout)
    };
    let plain = answer(&[]);
    assert!(!plain.trim().is_empty());
    assert_eq!(answer(&["--stream-weights", "--head-storage", "stream"]), plain);
    assert_eq!(
        answer(&["--load-in", "4bit", "--stream-weights"]),
        answer(&["--load-in", "4bit"])
    );
    answer(&["--head-storage", "int8"]);
    let model = place.model();
    let args = [
        "generate",
        "--model",
        str(&model),
        "--prompt",
        "x",
        "--device",
        "cpu",
        "--stream-weights",
    ];
    let line = fails(&glmtune(&args).output().unwrap(), 2);
    assert!(line.contains("--stream-weights"), "{line}");
}

#[test]
fn a_run_on_the_device_trains_resumes_and_answers() {
    if !there_is_a_device() {
        return;
    }
    let Some(place) = Workplace::new() else { return };
    let flags = [
        "--device",
        "cuda",
        "--dtype",
        "fp16",
        "--max-steps",
        "4",
        "--max-length",
        "24",
    ];
    let log = succeeds(&place.train("whole", &flags).output().unwrap());
    assert!(log.contains("cuda:0") && log.contains("fp16"), "{log}");
    let losses: Vec<f64> = place
        .metrics("whole")
        .iter()
        .filter_map(|row| row["loss"].as_f64())
        .collect();
    assert_eq!(losses.len(), 4);
    assert!(losses.iter().all(|loss| loss.is_finite()), "{losses:?}");
    assert!(
        place
            .metrics("whole")
            .iter()
            .any(|row| row["loss_scale"].as_f64() == Some(65536.0))
    );

    // The same run cut off after its second step, as a kill would leave it, goes on to the same bits.
    let cut = place.path("cut");
    succeeds(&place.train("cut", &flags).output().unwrap());
    std::fs::remove_dir_all(cut.join("checkpoints/step-000004")).unwrap();
    std::fs::remove_file(cut.join("adapter_model.safetensors")).unwrap();
    let output = glmtune(&["train", "--output", str(&cut), "--resume"])
        .output()
        .unwrap();
    let log = succeeds(&output);
    assert!(log.contains("resumed from"), "{log}");
    assert!(
        place.adapter("whole") == place.adapter("cut"),
        "the resumed run has other bits"
    );

    // Another type of compute is another run.
    std::fs::remove_dir_all(cut.join("checkpoints/step-000004")).unwrap();
    let output = glmtune(&["train", "--output", str(&cut), "--resume", "--dtype", "fp32"])
        .output()
        .unwrap();
    let line = fails(&output, 1);
    assert!(
        line.contains("dtype was \"float16\" and is \"float32\""),
        "{line}"
    );

    let (model, adapter) = (place.model(), place.path("whole"));
    let answer = |device: &[&str]| {
        let base = [
            "generate",
            "--model",
            str(&model),
            "--adapter",
            str(&adapter),
            "--greedy",
            "--max-new-tokens",
            "6",
        ];
        let output = glmtune(&[&base, &["--prompt", "数到3"][..], device].concat())
            .output()
            .unwrap();
        succeeds(&output);
        text(&output.stdout)
    };
    assert_eq!(
        answer(&["--device", "cuda", "--dtype", "fp32"]),
        answer(&["--device", "cpu"]),
        "the answers of device and CPU differ"
    );
}
