//! Interrupts, kills, a full disk in the middle of a run: the last checkpoint stays whole and the run goes on from it as if
//! nothing had happened.

use crate::program::{self, Workplace, fails, signal, str, succeeds, text};

/// Enough steps that a signal comes before the last.
const LONG: &[&str] = &["--max-steps", "40"];

#[test]
fn ctrl_c_saves_and_the_resumed_run_ends_as_the_uninterrupted_one() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("whole", LONG).output().unwrap());
    let child = place.start_and_wait("cut", 3, LONG);
    signal(&child, "INT");
    let output = child.wait_with_output().unwrap();
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(
        stderr.contains("interrupted at step") && stderr.contains("--resume"),
        "{stderr}"
    );
    assert!(
        !place.path("cut/adapter_model.safetensors").exists(),
        "an unfinished run has no adapter"
    );

    // The folder knows the rest.
    let cut = place.path("cut");
    succeeds(
        &program::glmtune(&["train", "--output", str(&cut), "--resume"])
            .output()
            .unwrap(),
    );
    assert!(
        place.adapter("cut") == place.adapter("whole"),
        "the adapters differ"
    );
    assert_eq!(place.metrics("cut"), place.metrics("whole"));
}

#[test]
fn killed_at_any_moment_it_goes_on_from_the_last_checkpoint() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("whole", &[]).output().unwrap());
    // Killed again and again, each time a little later, also in the middle of saving.
    let mut kills = 0;
    for step in [3, 4, 6, 9] {
        let begun = place
            .path("cut/checkpoints")
            .read_dir()
            .is_ok_and(|mut d| d.any(|e| e.unwrap().file_name().to_string_lossy().starts_with("step-")));
        let mode: &[&str] = if begun { &["--resume"] } else { &["--overwrite"] };
        let mut child = place.start_and_wait("cut", step, mode);
        std::thread::sleep(std::time::Duration::from_millis(step));
        child.kill().unwrap();
        kills += usize::from(!child.wait().unwrap().success());
    }
    assert!(kills > 0, "every run was over before it was killed");
    succeeds(&place.train("cut", &["--resume"]).output().unwrap());
    assert!(
        place.adapter("cut") == place.adapter("whole"),
        "the adapters differ"
    );
    assert_eq!(place.metrics("cut"), place.metrics("whole"));
    let left = std::fs::read_dir(place.path("cut/checkpoints")).unwrap();
    let names: Vec<String> = left
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        names.len() == 3 && names.iter().all(|n| n.starts_with("step-")),
        "{names:?}"
    );
}

/// The system refuses to let any file grow beyond a limit, as a full disk would.
#[test]
#[cfg(unix)]
fn a_full_disk_is_one_line_and_the_old_checkpoint_stays() {
    let Some(place) = Workplace::new() else { return };
    let child = place.start_and_wait("out", 5, LONG);
    signal(&child, "TERM");
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    let before: Vec<_> = checkpoint_files(&place);
    let mut resume = place.train("out", &["--max-steps", "40", "--resume"]);
    let mut limited = std::process::Command::new("sh");
    // 16 blocks of 512 bytes: metrics and state fit, the optimizer's state does not.
    limited.args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" \"$@\""]);
    limited.arg(resume.get_program()).args(resume.get_args());
    let line = fails(&limited.output().unwrap(), 1);
    assert!(
        line.contains("write") || line.contains("File too large"),
        "{line}"
    );
    assert_eq!(checkpoint_files(&place), before);
    succeeds(&resume.output().unwrap());
}

fn checkpoint_files(place: &Workplace) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for step in std::fs::read_dir(place.path("out/checkpoints")).unwrap() {
        for file in std::fs::read_dir(step.unwrap().path()).unwrap() {
            let path = file.unwrap().path();
            files.push((path.display().to_string(), std::fs::read(&path).unwrap()));
        }
    }
    files.sort();
    files
}

#[test]
fn a_run_that_is_not_the_same_is_not_resumed() {
    let Some(place) = Workplace::new() else { return };
    succeeds(&place.train("out", &[]).output().unwrap());
    let refuse = |extra: &[&str]| {
        let output = place.path("out");
        let args = [&["train", "--output", str(&output), "--resume"], extra].concat();
        fails(&program::glmtune(&args).output().unwrap(), 1)
    };
    let line = refuse(&["--seed", "1"]);
    assert!(line.contains("seed was 42 and is 1"), "{line}");
    let line = refuse(&["--learning-rate", "0.5", "--lora-r", "2"]);
    assert!(
        line.contains("learning_rate was 0.01 and is 0.5") && line.contains("lora_r"),
        "{line}"
    );
    std::fs::write(place.data(), r#"[{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}, {"instruction": "e", "output": "f"}]"#).unwrap();
    assert!(refuse(&[]).contains("training samples"));
}
