//! Is the house still the house? The rules of ARCHITECTURE.md that a machine can check.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file under `folder` with this extension, sorted, relative to the root.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, extension: &str, out: &mut Vec<PathBuf>) {
        let Ok(entries) = std::fs::read_dir(dir) else {
            return;
        };
        for entry in entries.map(|e| e.unwrap()) {
            let path = entry.path();
            if path.is_dir() {
                walk(&path, extension, out);
            } else if path.extension().is_some_and(|e| e == extension) {
                out.push(path);
            }
        }
    }
    let mut out = Vec::new();
    walk(&root().join(folder), extension, &mut out);
    out.sort();
    out.into_iter()
        .map(|p| p.strip_prefix(root()).unwrap().to_path_buf())
        .collect()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The code without comments: rules are about what runs.
fn code(path: &Path) -> String {
    read(path)
        .lines()
        .map(|line| line.split("//").next().unwrap_or(""))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Is `word` in `text` as a whole identifier path?
fn mentions(text: &str, word: &str) -> bool {
    let boundary = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    text.match_indices(word).any(|(i, _)| {
        boundary(text[..i].chars().next_back()) && boundary(text[i + word.len()..].chars().next())
    })
}

/// Fails for every source file that matches `offends` and lies outside `doors`.
#[track_caller]
fn only_in(rule: &str, doors: &[&str], offends: impl Fn(&str) -> bool) {
    let offenders: Vec<_> = files("src", "rs")
        .into_iter()
        .filter(|path| !doors.iter().any(|door| path.starts_with(door)))
        .filter(|path| offends(&code(path)))
        .collect();
    assert!(offenders.is_empty(), "{rule}: {offenders:?}");
}

#[test]
fn only_ops_calls_the_backends() {
    only_in(
        "only ops calls cpu",
        &["src/ops", "src/cpu", "src/lib.rs"],
        |code| code.contains("crate::cpu") || code.contains("cpu::") || code.contains("super::cpu"),
    );
    // Tensors need device memory; commands ask what device there is, benchmarks what time it is there.
    only_in(
        "only ops calls cuda",
        &[
            "src/ops",
            "src/cuda",
            "src/tensor",
            "src/lib.rs",
            "src/cli",
            "src/bench",
            "src/compute.rs",
        ],
        |code| mentions(code, "crate::cuda"),
    );
}

#[test]
fn layers_know_only_what_lies_below_them() {
    let below: [(&str, &[&str]); 9] = [
        (
            "src/cuda",
            &[
                "cpu",
                "ops",
                "nn",
                "model",
                "checkpoint",
                "train",
                "evaluate",
                "generate",
                "bench",
                "cli",
                "optim",
            ],
        ),
        (
            "src/cpu",
            &[
                "ops",
                "nn",
                "model",
                "checkpoint",
                "train",
                "evaluate",
                "generate",
                "bench",
                "cli",
                "optim",
            ],
        ),
        (
            "src/ops",
            &[
                "nn",
                "model",
                "checkpoint",
                "train",
                "evaluate",
                "generate",
                "bench",
                "cli",
                "optim",
            ],
        ),
        (
            "src/nn",
            &[
                "model",
                "checkpoint",
                "train",
                "evaluate",
                "generate",
                "bench",
                "cli",
                "optim",
                "cpu",
            ],
        ),
        (
            "src/model",
            &["train", "evaluate", "generate", "bench", "cli", "optim", "cpu"],
        ),
        (
            "src/checkpoint",
            &[
                "ops", "nn", "train", "evaluate", "generate", "bench", "cli", "optim", "cpu",
            ],
        ),
        (
            "src/generate",
            &["train", "evaluate", "bench", "cli", "optim", "cpu"],
        ),
        (
            "src/evaluate",
            &["ops", "nn", "train", "bench", "cli", "optim", "cpu"],
        ),
        // Works on the files of a run alone; of `checkpoint` it takes the atomic file.
        (
            "src/report",
            &[
                "cuda",
                "cpu",
                "ops",
                "nn",
                "model",
                "tensor",
                "tokenizer",
                "data",
                "config",
                "compute",
                "train",
                "generate",
                "bench",
                "cli",
                "optim",
                "schedule",
                "quant",
            ],
        ),
    ];
    for (room, forbidden) in below {
        for path in files("src", "rs").into_iter().filter(|p| p.starts_with(room)) {
            let code = code(&path);
            for upper in forbidden {
                assert!(
                    !mentions(&code, &format!("crate::{upper}")),
                    "{} knows crate::{upper}",
                    path.display()
                );
            }
        }
    }
    for leaf in ["src/error.rs", "src/rng.rs"] {
        assert!(!code(Path::new(leaf)).contains("crate::"), "{leaf} is a leaf");
    }
}

#[test]
fn heavy_crates_have_one_door() {
    let doors: [(&str, &[&str]); 17] = [
        ("clap", &["src/cli", "src/main.rs"]),
        ("prost", &["src/tokenizer", "src/report/event.rs"]),
        ("safetensors", &["src/checkpoint"]),
        ("memmap2", &["src/checkpoint"]),
        ("rustix", &["src/checkpoint/scratch.rs"]),
        ("zip", &["src/checkpoint"]),
        ("gemm", &["src/cpu/matrix.rs"]),
        ("nalgebra", &["src/factor.rs"]),
        ("regex_lite", &["src/checkpoint/adapter/pattern.rs"]),
        ("terminal_size", &["src/cli"]),
        ("pulp", &["src/cpu", "src/quant"]),
        ("jieba_rs", &["src/evaluate/words.rs"]),
        ("indicatif", &["src/train", "src/cli"]),
        ("rustyline", &["src/cli/chat/editor.rs"]),
        ("toml", &["src/config"]),
        ("cudarc", &["src/cuda/driver.rs", "src/cuda/driver"]),
        ("miniz_oxide", &["src/cuda/driver/images.rs"]),
    ];
    for (name, doors) in doors {
        only_in(&format!("{name} has one door"), doors, |code| {
            code.contains(&format!("use {name}::"))
                || mentions(code, &format!("::{name}::"))
                || code.lines().any(|l| {
                    l.trim_start().starts_with(&format!("{name}::")) || l.contains(&format!(" {name}::"))
                })
        });
    }
}

#[test]
fn unsafe_stands_in_few_places_and_says_why() {
    let doors = ["src/cpu/matrix.rs", "src/checkpoint/map.rs", "src/cuda"];
    only_in(
        "unsafe only in the matrix, mmap and cuda modules",
        &doors,
        |code| mentions(code, "unsafe"),
    );
    let behind = files("src", "rs").into_iter().filter(|path| {
        // Generated: its layout assertions are all the unsafe it has.
        doors.iter().any(|door| path.starts_with(door)) && !path.ends_with("sys.rs")
    });
    for door in behind {
        let text = read(&door);
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let is_code = !line.trim_start().starts_with("//");
            if is_code && mentions(line, "unsafe") {
                let before = &lines[i.saturating_sub(6)..i];
                assert!(
                    before.iter().any(|l| l.contains("// SAFETY:")),
                    "{}:{}: unsafe without SAFETY",
                    door.display(),
                    i + 1
                );
            }
        }
    }
}

#[test]
fn every_operation_is_tested_on_its_own() {
    let tests = code(Path::new("tests/ops.rs"));
    let ops: String = files("src/ops", "rs")
        .iter()
        .map(|path| code(path) + "\n")
        .collect();
    let names = ops
        .lines()
        .filter_map(|l| l.strip_prefix("pub fn "))
        .filter_map(|l| l.split(['(', '<']).next());
    let missing: Vec<_> = names
        .filter(|name| !mentions(&tests, &format!("ops::{name}")))
        .collect();
    assert!(
        missing.is_empty(),
        "operations without a case in tests/ops.rs: {missing:?}"
    );
}

#[test]
fn files_stay_small_and_no_room_is_a_drawer() {
    for path in files("src", "rs").iter().filter(|path| !path.ends_with("sys.rs")) {
        let lines = read(path).lines().count();
        assert!(
            lines <= 700,
            "{} has {lines} lines: does one idea still own it?",
            path.display()
        );
        let stem = path.file_stem().unwrap().to_str().unwrap();
        assert!(
            !["utils", "util", "helpers", "manager", "common", "misc"].contains(&stem),
            "{}",
            path.display()
        );
    }
}

#[test]
fn the_map_names_every_room() {
    let map = read(Path::new("ARCHITECTURE.md"));
    let rooms: BTreeSet<String> = files("src", "rs")
        .iter()
        .filter_map(|p| {
            p.strip_prefix("src")
                .ok()?
                .components()
                .next()
                .map(|c| c.as_os_str().to_string_lossy().into_owned())
        })
        .collect();
    let missing: Vec<_> = rooms.iter().filter(|room| !map.contains(room.as_str())).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md does not name {missing:?}");
}

#[test]
fn no_machine_path_and_no_large_file() {
    for folder in ["src", "tests", "benches", "models", "examples", ".ci"] {
        for extension in ["rs", "py", "md", "json", "toml", "sh"] {
            for path in files(folder, extension) {
                let text = read(&path);
                // Spelt in two parts, so that this file does not offend.
                for bad in [
                    concat!("/ro", "ot/"),
                    concat!("/wo", "rk/"),
                    concat!("/ho", "me/"),
                ] {
                    assert!(!text.contains(bad), "{} holds {bad}", path.display());
                }
            }
        }
    }
}
