//! `glmtune demo --methods`: the five methods side by side on the demo's model and data.
//!
//! Each is trained by a `glmtune train` of its own, so that its peak of memory is its own; the table is read from the
//! `run.json` that each leaves.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use super::Folder;
use crate::checkpoint::atomic;
use crate::config::{Method, RunConfig};
use crate::error::{Error, Result};
use crate::report::RunRecord;

/// Every method with a learning rate that suits the tiny model: the smaller the share of weights that trains, the higher.
const METHODS: [(Method, f64); 5] = [
    (Method::Qlora, 4e-3),
    (Method::Lora, 4e-3),
    (Method::Ptuning, 2e-2),
    (Method::Freeze, 2e-3),
    (Method::Full, 1e-3),
];

/// Trains by every method for `steps` steps and prints the table.
pub(super) fn compare(folder: &Folder, steps: u64) -> Result<()> {
    println!("The five methods, {steps} steps each on the same data:\n");
    let mut records = Vec::new();
    for (method, rate) in METHODS {
        let config = RunConfig {
            method,
            learning_rate: Some(rate),
            output: folder.path(method.name()),
            eval_samples: 96,
            eval_max_new_tokens: super::MAX_NEW_TOKENS,
            trainable_layers: 2,
            pre_seq_len: 16,
            save_steps: steps,
            ..folder.config(steps)
        };
        records.push((method, train(&config)?));
        eprintln!("{} is done", method.name());
    }
    println!("{}", table(&records));
    println!(
        "\nMemory is the highest of the whole process, evaluation included; scores are of the held-out reports.\n\
         Each run left its report: {}",
        folder.path("METHOD/report.html").display()
    );
    Ok(())
}

/// One training in a process of its own; what it says goes to a file beside its output.
fn train(config: &RunConfig) -> Result<RunRecord> {
    let beside = |end: &str| config.output.with_extension(end);
    let (toml, log) = (beside("toml"), beside("log"));
    atomic::write(&toml, config.to_toml().as_bytes())?;
    let program = std::env::current_exe().map_err(Error::io("glmtune", "find"))?;
    let out = File::create(&log).map_err(Error::io(&log, "create"))?;
    let status = Command::new(&program)
        .arg("train")
        .arg("--config")
        .arg(&toml)
        .arg("--overwrite")
        .stderr(out)
        .status()
        .map_err(Error::io(&program, "start"))?;
    if !status.success() {
        let found = last_line(&log).unwrap_or_else(|| status.to_string());
        let remedy = format!("read {}", log.display());
        return Err(Error::input(
            config.output.display(),
            found,
            "a finished run",
            remedy,
        ));
    }
    RunRecord::read(&config.output.join("run.json"))
}

fn last_line(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().last().map(str::to_string)
}

/// The table in Markdown.
fn table(records: &[(Method, RunRecord)]) -> String {
    let mut lines = vec![
        "| method | trains | memory | tokens/s | loss | BLEU-4 | ROUGE-1 | ROUGE-2 | ROUGE-L | exact |"
            .to_string(),
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|".to_string(),
    ];
    for (method, record) in records {
        let score = |key: &str| record.eval_after.get(key).and_then(serde_json::Value::as_f64);
        let number = |key: &str, digits: usize| score(key).map_or("-".into(), |x| format!("{x:.digits$}"));
        let memory = record.memory.peak_host_bytes;
        lines.push(format!(
            "| {} | {} ({:.2} %) | {} | {:.0} | {} | {} | {} | {} | {} | {} |",
            method.name(),
            record.parameters.trainable,
            100.0 * record.parameters.trainable as f64 / record.parameters.total.max(1) as f64,
            memory.map_or("-".into(), |bytes| format!("{:.1} MB", bytes as f64 / 1e6)),
            record.tokens as f64 / record.times.training_seconds.max(1e-9),
            number("eval_loss", 4),
            number("eval_bleu-4", 2),
            number("eval_rouge-1", 2),
            number("eval_rouge-2", 2),
            number("eval_rouge-l", 2),
            score("eval_exact_match").map_or("-".into(), |x| format!("{:.1} %", 100.0 * x)),
        ));
    }
    lines.join("\n")
}
