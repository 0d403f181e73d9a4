//! `glmtune generate`: one answer, or the answers to a whole file in batches.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use crate::checkpoint::atomic;
use crate::data::collate;
use crate::data::record::{Columns, Question, read_objects};
use crate::error::{Error, Result};
use crate::generate::speed::Speed;
use crate::generate::{GenerationConfig, generate};
use crate::model::Model;
use crate::tokenizer::Tokenizer;

use super::generation::{ModelArgs, SamplingArgs, fit, load};

/// Answer a prompt, or every record of a file
#[derive(Debug, Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Answer this text
    #[arg(
        long,
        value_name = "TEXT",
        required_unless_present = "input",
        conflicts_with = "input"
    )]
    prompt: Option<String>,
    /// Answer every record of this file (JSON or JSONL)
    #[arg(long, value_name = "FILE", requires = "output")]
    input: Option<PathBuf>,
    /// Write the records with their answers in the field "predict" to this file (JSONL)
    #[arg(long, value_name = "FILE", requires = "input")]
    output: Option<PathBuf>,
    /// Replace the output file if there is one
    #[arg(long)]
    overwrite: bool,
    /// Answer this many records at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    #[command(flatten)]
    columns: ColumnArgs,
    /// Report tokens per second and bytes of weights read per second
    #[arg(long)]
    stats: bool,
}

/// Which fields of a record are what, where they are not recognised by their names.
#[derive(Debug, Default, Args)]
pub struct ColumnArgs {
    /// Field of the question
    #[arg(long, value_name = "FIELD")]
    pub prompt_column: Option<String>,
    /// Field of the answer
    #[arg(long, value_name = "FIELD")]
    pub response_column: Option<String>,
    /// Field of the earlier turns
    #[arg(long, value_name = "FIELD")]
    pub history_column: Option<String>,
}

/// Runs `glmtune generate`.
///
/// # Errors
/// Files that cannot be used, prompts that do not fit, logits that are not finite; the output file is then left as it was.
pub fn run(args: GenerateArgs) -> Result<()> {
    let config = args.sampling.config()?;
    if let Some(output) = &args.output {
        check_output(output, args.overwrite)?;
    }
    let items = match &args.input {
        Some(input) => read(input, &args.columns.columns())?,
        None => Vec::new(),
    };
    let (model, tokenizer) = load(&args.model)?;
    let session = Session {
        model: &model,
        tokenizer: &tokenizer,
        config: &config,
    };
    let mut speed = Speed::default();
    if let Some(prompt) = &args.prompt {
        let (ids, _) = session.fit(prompt, &[])?;
        println!("{}", session.answers(&[(0, ids)], &mut speed, &mut || {})?[0]);
    } else if let Some(output) = &args.output {
        let mut prompts = Vec::with_capacity(items.len());
        let mut cut = 0;
        for item in &items {
            let (ids, dropped) = session
                .fit(&item.query, &item.history)
                .map_err(|error| at(&item.place, error))?;
            cut += usize::from(dropped > 0);
            prompts.push(ids);
        }
        if cut > 0 {
            eprintln!(
                "{cut} of {} records are too long: their oldest turns are left out",
                items.len()
            );
        }
        let answers = session.answer_all(&prompts, args.batch_size as usize, &mut speed)?;
        atomic::write(output, lines(items, answers).as_bytes())?;
        eprintln!("{} answers: {}", prompts.len(), output.display());
    }
    if args.stats {
        eprintln!("{}", speed.report(model.decode_bytes()));
    }
    Ok(())
}

/// Looks at the place of the answers before they are computed.
pub(super) fn check_output(output: &Path, overwrite: bool) -> Result<()> {
    let wrong = |path: &Path, found: &str, expected: &str, remedy: &str| {
        Err(Error::input(path.display(), found, expected, remedy))
    };
    if output.is_dir() {
        return wrong(output, "a folder", "a file", "add the name of a file");
    }
    if output.is_file() && !overwrite {
        let remedy = "give --overwrite to replace it";
        return wrong(output, "a file that exists", "a new file", remedy);
    }
    match output.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
            wrong(folder, "no folder", "a folder for the answers", "make it first")
        }
        _ => Ok(()),
    }
}

/// A record of the input: all its fields, and what of them is asked.
struct Item {
    place: String,
    fields: Map<String, Value>,
    query: String,
    history: Vec<(String, String)>,
}

/// Reads the records of a file; the answer column may be missing.
fn read(input: &Path, columns: &Columns) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for (line, fields) in read_objects(input)? {
        let place = format!("{}:{line}", input.display());
        let Question { query, history } = Question::of(&fields, columns, &place)?;
        items.push(Item {
            place,
            fields,
            query,
            history,
        });
    }
    if items.is_empty() {
        return Err(Error::input(
            input.display(),
            "no records",
            "at least one",
            "check --input",
        ));
    }
    Ok(items)
}

/// One line of JSON for each record: its fields in their order, then `predict`.
fn lines(items: Vec<Item>, answers: Vec<String>) -> String {
    let mut text = String::new();
    for (item, answer) in items.into_iter().zip(answers) {
        let mut fields = item.fields;
        fields.shift_remove("predict");
        fields.insert("predict".to_string(), Value::String(answer));
        text.push_str(&Value::Object(fields).to_string());
        text.push('\n');
    }
    text
}

impl ColumnArgs {
    /// As the reader of records takes them.
    pub fn columns(&self) -> Columns {
        Columns {
            prompt: self.prompt_column.clone(),
            response: self.response_column.clone(),
            history: self.history_column.clone(),
        }
    }
}

/// Names the record in an error about its prompt.
fn at(place: &str, error: Error) -> Error {
    match error {
        Error::Input {
            found,
            expected,
            remedy,
            ..
        } => Error::input(place, found, expected, remedy),
        other => other,
    }
}

struct Session<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    config: &'a GenerationConfig,
}

impl Session<'_> {
    fn fit(&self, query: &str, history: &[(String, String)]) -> Result<(Vec<u32>, usize)> {
        let encode = |text: &str| self.tokenizer.build_inputs(&self.tokenizer.encode(text), None);
        fit(&encode, query, history, self.config)
    }

    /// The answers to one batch of numbered prompts; `tick` is called after every step.
    fn answers(
        &self,
        prompts: &[(usize, Vec<u32>)],
        speed: &mut Speed,
        tick: &mut dyn FnMut(),
    ) -> Result<Vec<String>> {
        let numbers: Vec<u64> = prompts.iter().map(|(number, _)| *number as u64).collect();
        let ids: Vec<Vec<u32>> = prompts.iter().map(|(_, ids)| ids.clone()).collect();
        let batch = collate::left_pad(&ids, &self.tokenizer.special());
        let done = generate(self.model, &batch, &numbers, self.config, &mut |row, _| {
            if row == 0 {
                tick();
            }
            ControlFlow::Continue(())
        })?;
        speed.add(&done.speed);
        Ok(done
            .sequences
            .iter()
            .map(|ids| self.tokenizer.decode(ids).trim().to_string())
            .collect())
    }

    /// The answers to all prompts in their order. The batches take them by length, the longest first: padding is small, and
    /// what does not fit into memory shows at once.
    fn answer_all(&self, prompts: &[Vec<u32>], batch_size: usize, speed: &mut Speed) -> Result<Vec<String>> {
        let bar = ProgressBar::new(prompts.len() as u64);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} answers {msg} eta {eta}") {
            bar.set_style(style);
        }
        let mut answers = vec![String::new(); prompts.len()];
        for batch in by_length(prompts, batch_size) {
            let numbered: Vec<(usize, Vec<u32>)> = batch.iter().map(|&i| (i, prompts[i].clone())).collect();
            let texts = self.answers(&numbered, speed, &mut || bar.tick())?;
            for (&i, text) in batch.iter().zip(texts) {
                answers[i] = text;
            }
            bar.set_message(format!("{:.1} tokens/s", speed.tokens_per_second()));
            bar.inc(batch.len() as u64);
            if bar.is_hidden() {
                eprintln!(
                    "{}/{} answers, {:.1} tokens/s",
                    bar.position(),
                    prompts.len(),
                    speed.tokens_per_second()
                );
            }
        }
        bar.finish_and_clear();
        Ok(answers)
    }
}

/// The numbers of the prompts in batches, the longest first.
fn by_length(prompts: &[Vec<u32>], batch_size: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(prompts[i].len()));
    order.chunks(batch_size).map(<[usize]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_keeps_the_fields_of_its_record_and_adds_the_answer() {
        let Value::Object(fields) = serde_json::json!({"z": 1, "predict": "old", "response": "标"}) else {
            unreachable!()
        };
        let item = Item {
            place: String::new(),
            fields,
            query: String::new(),
            history: Vec::new(),
        };
        assert_eq!(
            lines(vec![item], vec!["答\n案".to_string()]),
            "{\"z\":1,\"response\":\"标\",\"predict\":\"答\\n案\"}\n"
        );
    }

    #[test]
    fn batches_hold_every_prompt_once_the_longest_first() {
        let prompts: Vec<Vec<u32>> = [3, 1, 7, 3, 2].iter().map(|&n| vec![0; n]).collect();
        assert_eq!(by_length(&prompts, 2), [vec![2, 0], vec![3, 4], vec![1]]);
    }
}
