//! `glmtune demo`: QLoRA of the built-in tiny ChatGLM on a small data set, with answers before and after.

mod methods;

use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::checkpoint::quantized::open_or_quantize;
use crate::checkpoint::{Checkpoint, atomic};
use crate::config::RunConfig;
use crate::data::record::{Columns, Record, read_records};
use crate::data::{collate, template};
use crate::error::{Error, Result};
use crate::generate::{GenerationConfig, generate};
use crate::model::{LoadOptions, Model, tune};
use crate::quant::QuantType;
use crate::tokenizer::Tokenizer;
use crate::train::{self, Interrupt};

/// The model and the data, part of the program.
const FILES: [(&str, &[u8]); 5] = [
    (
        "model/config.json",
        include_bytes!("../../../models/tiny-glm/config.json"),
    ),
    (
        "model/ice_text.model",
        include_bytes!("../../../models/tiny-glm/ice_text.model"),
    ),
    (
        "model/model.safetensors",
        include_bytes!("../../../models/tiny-glm/model.safetensors"),
    ),
    (
        "train.jsonl",
        include_bytes!("../../../examples/demo/train.jsonl"),
    ),
    ("eval.jsonl", include_bytes!("../../../examples/demo/eval.jsonl")),
];

/// Held-out prompts whose answers are shown side by side.
const SHOWN: usize = 5;
/// Prompts answered at once.
const BATCH: usize = 24;
/// No answer of the task is longer.
const MAX_NEW_TOKENS: usize = 96;

/// The flags of `glmtune demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// Folder for the tiny model, the data and the adapter
    #[arg(long, value_name = "DIR", default_value = "glmtune-demo")]
    output: PathBuf,
    /// Optimizer steps
    #[arg(long, value_name = "N", default_value_t = 1000)]
    max_steps: u64,
    /// Train by each of the five methods instead, and compare them in a table
    #[arg(long)]
    methods: bool,
}

/// Runs `glmtune demo`.
///
/// # Errors
/// The folder holds something else, or cannot be written; Ctrl-C.
pub fn run(args: DemoArgs) -> Result<()> {
    let started = Instant::now();
    let folder = Folder::write(&args.output)?;
    if args.methods {
        return methods::compare(&folder, args.max_steps);
    }
    println!(
        "The task: read a report of faults and answer with triples, one a line, as part_faultkind_phenomenon.\n\
         The tiny ChatGLM (0.96 million parameters, in {}) has never seen it. First its answers as it is:\n",
        folder.path("model").display()
    );
    let (held_out, _) = read_records(&folder.path("eval.jsonl"), &Columns::default())?;
    let before = folder.answers(&held_out, None)?;
    show_before(&held_out, &before);

    println!(
        "\nNow QLoRA: its weights in 4 bits, frozen; an adapter of rank 8 on every linear layer learns.\n"
    );
    let config = folder.config(args.max_steps);
    let summary = train::run(&config, &Interrupt::listen()?)?;

    let after = folder.answers(&held_out, Some(&config.output))?;
    show_side_by_side(&held_out, &before, &after);
    let n = held_out.len();
    println!("\nOn {n} reports that were held out (other parts, other combinations than in training):");
    if let (Some(before), Some(after)) = (summary.eval_before, summary.eval_after) {
        println!("  loss             {before:8.4} -> {after:.4}");
    }
    println!(
        "  answers all right {:7} -> {} of {n}",
        right(&held_out, &before),
        right(&held_out, &after)
    );
    println!("  time             {:8.0} s", started.elapsed().as_secs_f64());
    folder.say_what_next(&config);
    Ok(())
}

/// The demo's folder.
struct Folder(PathBuf);

impl Folder {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Unpacks model and data; a folder with other contents is refused, an earlier demo is written again.
    fn write(dir: &Path) -> Result<Self> {
        let occupied = std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
        let (marker, contents) = FILES[0];
        if occupied && !std::fs::read(dir.join(marker)).is_ok_and(|found| found == contents) {
            return Err(Error::input(
                dir.display(),
                "a folder with other files in it",
                "a new folder, or that of an earlier demo",
                "give another folder with --output",
            ));
        }
        for (name, contents) in FILES {
            let path = dir.join(name);
            let parent = path.parent().unwrap_or(dir);
            std::fs::create_dir_all(parent).map_err(Error::io(parent, "create"))?;
            atomic::write(&path, contents)?;
        }
        Ok(Self(dir.to_path_buf()))
    }

    /// `glmtune train` as a user would call it.
    fn config(&self, max_steps: u64) -> RunConfig {
        RunConfig {
            model: self.path("model"),
            data: self.path("train.jsonl"),
            eval_data: Some(self.path("eval.jsonl")),
            output: self.path("adapter"),
            learning_rate: Some(4e-3),
            micro_batch_size: 8,
            gradient_accumulation_steps: 1,
            max_steps: Some(max_steps),
            save_steps: 500,
            logging_steps: 50,
            overwrite: true,
            ..RunConfig::default()
        }
    }

    /// The model's greedy answers, from its 4-bit weights, with or without an adapter.
    fn answers(&self, records: &[Record], adapter: Option<&Path>) -> Result<Vec<String>> {
        let dir = self.path("model");
        let tokenizer = Tokenizer::open(&dir)?;
        let (checkpoint, _): (Checkpoint, _) =
            open_or_quantize(&dir, None, QuantType::Nf4, true, &mut |_, _, _| Ok(()))?;
        let mut model = Model::load(&checkpoint, &LoadOptions::default())?;
        if let Some(adapter) = adapter {
            tune::load_adapter(&mut model, adapter, false)?;
        }
        let config = GenerationConfig::greedy(MAX_NEW_TOKENS);
        let mut answers = Vec::with_capacity(records.len());
        for (batch, records) in records.chunks(BATCH).enumerate() {
            let prompts: Vec<Vec<u32>> = records
                .iter()
                .map(|r| {
                    tokenizer.build_inputs(&tokenizer.encode(&template::prompt(&r.prompt, &r.history)), None)
                })
                .collect();
            let numbers: Vec<u64> = (0..records.len()).map(|i| (batch * BATCH + i) as u64).collect();
            let padded = collate::left_pad(&prompts, &tokenizer.special());
            let done = generate(&model, &padded, &numbers, &config, &mut |_, _| {
                std::ops::ControlFlow::Continue(())
            })?;
            answers.extend(
                done.sequences
                    .iter()
                    .map(|ids| tokenizer.decode(ids).trim().to_string()),
            );
        }
        Ok(answers)
    }

    fn say_what_next(&self, config: &RunConfig) {
        let (model, adapter) = (config.model.display(), config.output.display());
        println!(
            "\nThe adapter is a PEFT folder: {adapter}\nWhat next:\n  \
             glmtune chat --model {model} --adapter {adapter} --greedy\n  \
             glmtune generate --model {model} --adapter {adapter} --greedy --input {} --output answers.jsonl\n  \
             glmtune inspect {adapter}\nAnd the real thing, with the folder of ChatGLM-6B and your records (alpaca or prompt/response):\n  \
             glmtune train --model chatglm-6b --data my.jsonl --output out",
            config
                .eval_data
                .as_deref()
                .unwrap_or(Path::new("eval.jsonl"))
                .display()
        );
    }
}

fn right(records: &[Record], answers: &[String]) -> usize {
    records
        .iter()
        .zip(answers)
        .filter(|(record, answer)| record.response.trim() == answer.as_str())
        .count()
}

/// A text on one line.
fn one_line(text: &str) -> String {
    text.split('\n').collect::<Vec<_>>().join(" / ")
}

fn show_before(records: &[Record], answers: &[String]) {
    for (record, answer) in records.iter().zip(answers).take(SHOWN) {
        println!(
            "  asked   {}\n  answer  {}",
            one_line(&record.prompt),
            one_line(answer)
        );
    }
}

fn show_side_by_side(records: &[Record], before: &[String], after: &[String]) {
    println!("\nBefore and after, on reports it was not trained on:");
    for ((record, before), after) in records.iter().zip(before).zip(after).take(SHOWN) {
        println!(
            "\n  asked   {}\n  before  {}\n  after   {}{}\n  right   {}",
            one_line(&record.prompt),
            one_line(before),
            one_line(after),
            if record.response.trim() == after {
                "   (right)"
            } else {
                ""
            },
            one_line(&record.response),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_other_files_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("thesis.txt"), "mine").unwrap();
        let error = Folder::write(dir.path()).err().expect("refused").to_string();
        assert!(error.contains("--output"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_earlier_demo_is_written_again() {
        let dir = tempfile::tempdir().unwrap();
        Folder::write(dir.path()).unwrap();
        std::fs::write(dir.path().join("train.jsonl"), "").unwrap();
        Folder::write(dir.path()).unwrap();
        assert!(std::fs::metadata(dir.path().join("train.jsonl")).unwrap().len() > 1000);
    }
}
