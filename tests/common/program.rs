//! The program seen from outside: a small model folder, a data file, and runs of `glmtune`.
#![allow(dead_code, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use glmtune::checkpoint::write_safetensors;
use glmtune::model::ModelConfig;
use glmtune::rng::Stream;
use glmtune::tensor::{DType, Tensor};

pub fn glmtune(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_glmtune"));
    command.args(args).env_remove("GLMTUNE_THREADS");
    command
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

pub fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The one line of a failure that is not clap's: `error: ...`.
#[track_caller]
pub fn fails(output: &Output, code: i32) -> String {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    let line = stderr.lines().last().unwrap_or_default();
    assert!(line.starts_with("error: "), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    line.to_string()
}

#[track_caller]
pub fn succeeds(output: &Output) -> String {
    let stderr = text(&output.stderr);
    assert!(output.status.success(), "{:?}: {stderr}", output.status);
    stderr
}

/// A small model and ten records in a folder of their own: a copy of `models/tiny-glm`, or a random ChatGLM of two narrow
/// layers with the real tokenizer.
pub struct Workplace {
    dir: tempfile::TempDir,
}

impl Workplace {
    /// `None`, with a loud line, when there is neither.
    pub fn new() -> Option<Self> {
        let place = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let tiny = root.join("models/tiny-glm");
        let shared = std::env::var_os("GLMTUNE_SHARED").map_or(root.join("../shared"), PathBuf::from);
        let tokenizer = shared.join("tokenizer/ice_text.model");
        std::fs::create_dir(place.model()).unwrap();
        if tiny.is_dir() {
            // Copied: the 4-bit form of a model is kept in its folder.
            for entry in std::fs::read_dir(tiny).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    std::fs::copy(&path, place.model().join(path.file_name().unwrap())).unwrap();
                }
            }
        } else if tokenizer.exists() {
            place.write_random_model(&tokenizer);
        } else {
            eprintln!("SKIPPED: neither models/tiny-glm nor {}", tokenizer.display());
            return None;
        }
        let records: Vec<serde_json::Value> = (0..10)
            .map(|i| serde_json::json!({"instruction": format!("数到{i}"), "output": format!("{}，完", "一".repeat(i + 1))}))
            .collect();
        std::fs::write(place.data(), serde_json::to_string(&records).unwrap()).unwrap();
        Some(place)
    }

    fn write_random_model(&self, tokenizer: &Path) {
        let model = self.model();
        std::fs::copy(tokenizer, model.join("ice_text.model")).unwrap();
        let config = ModelConfig {
            hidden_size: 32,
            inner_hidden_size: 128,
            num_layers: 2,
            num_attention_heads: 2,
            max_sequence_length: 128,
            ..ModelConfig::chatglm_6b()
        };
        config.write(&model).unwrap();
        let tensors: Vec<(String, Tensor)> = config
            .tensors()
            .into_iter()
            .enumerate()
            .map(|(number, (name, shape))| {
                let stream = Stream::new(5, number as u64);
                let norm = name.ends_with("layernorm.weight");
                let values: Vec<f32> = (0..shape.elements() as u64)
                    .map(|i| if norm { 1.0 } else { 0.2 * stream.uniform(i) - 0.1 })
                    .collect();
                (name, Tensor::from_slice(&values, shape).to_dtype(DType::F16))
            })
            .collect();
        let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        write_safetensors(&model.join("model.safetensors"), &borrowed, &Default::default()).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn model(&self) -> PathBuf {
        self.path("model")
    }

    pub fn data(&self) -> PathBuf {
        self.path("data.json")
    }

    /// `glmtune train` into the folder `output`: 12 steps unless `extra` says otherwise, a checkpoint every 2.
    pub fn train(&self, output: &str, extra: &[&str]) -> Command {
        let (model, data, output) = (self.model(), self.data(), self.path(output));
        let mut args = vec![
            "train",
            "--model",
            str(&model),
            "--data",
            str(&data),
            "--output",
            str(&output),
        ];
        args.extend("--save-steps 2 --micro-batch-size 2 --gradient-accumulation-steps 2".split(' '));
        args.extend("--learning-rate 1e-2 --lora-r 4 --lora-dropout 0.1 --val-size 2".split(' '));
        if !extra.contains(&"--max-steps") {
            args.extend(["--max-steps", "12"]);
        }
        args.extend(extra);
        glmtune(&args)
    }

    pub fn adapter(&self, output: &str) -> Vec<u8> {
        std::fs::read(self.path(output).join("adapter_model.safetensors")).unwrap()
    }

    /// Every line of `metrics.jsonl` without the times.
    pub fn metrics(&self, output: &str) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.path(output).join("metrics.jsonl")).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .map(|mut row| {
                row.as_object_mut().unwrap().remove("tokens_per_second");
                row
            })
            .collect()
    }

    /// Starts a run and waits until it has logged `steps` steps.
    pub fn start_and_wait(&self, output: &str, steps: u64, extra: &[&str]) -> Child {
        let mut command = self.train(output, extra);
        let mut child = command
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while self
            .metrics(output)
            .last()
            .is_none_or(|row| row["step"].as_u64().unwrap() < steps)
        {
            assert!(
                begun.elapsed() < Duration::from_secs(120),
                "no step {steps} after two minutes"
            );
            if child.try_wait().unwrap().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        child
    }
}

/// Sends a signal to a process that this test started.
pub fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill")
        .args([&format!("-{name}"), &child.id().to_string()])
        .status()
        .unwrap();
    assert!(sent.success());
}
