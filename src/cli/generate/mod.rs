//! `glmtune generate`: one answer, or the answers to a whole file in batches.

mod input;
mod journal;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::checkpoint::{Checkpoint, atomic};
use crate::compute;
use crate::data::collate;
use crate::data::record::Columns;
use crate::error::{Error, Result};
use crate::generate::speed::Speed;
use crate::generate::{GenerationConfig, Generator, Sequence, number};
use crate::tokenizer::Tokenizer;
use crate::train::{Interrupt, TrainedOn, adapter_fingerprint, base_fingerprint, clock, file_fingerprint};

use super::generation::{Holding, ModelArgs, SamplingArgs, fit, load};
use input::Item;
use journal::{Answers, Journal, Place};

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
    /// Answer every record of this file (JSON or JSONL), or every line of it if its name ends in .txt
    #[arg(long, value_name = "FILE", requires = "output")]
    input: Option<PathBuf>,
    /// Write the records with their answers in the field "predict" to this file (JSONL); until all are there they stand in
    /// FILE.partial
    #[arg(long, value_name = "FILE", requires = "input")]
    output: Option<PathBuf>,
    /// Replace the output file if there is one
    #[arg(long)]
    overwrite: bool,
    /// Go on where an interrupted run of the same command stopped; begin if there is none
    #[arg(long, requires = "input")]
    resume: bool,
    /// Answer this many times at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Answer each prompt this many times, each time with random numbers of its own; the prompt is read once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    /// Number of the first sample [default: 0]: 3 adds to the samples 0, 1 and 2 of an earlier run
    #[arg(long, value_name = "N", requires = "samples")]
    first_sample: Option<u32>,
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
/// Files that cannot be used, prompts that do not fit, logits that are not finite; the output file is then left as it was, and what was
/// answered stands beside it. [`Error::Stopped`] after Ctrl-C.
pub fn run(args: GenerateArgs) -> Result<()> {
    let config = args.sampling.config()?;
    if args.samples.is_some_and(|samples| samples > 1) && !config.do_sample {
        return Err(Error::Usage(
            "--greedy gives the same answer every time: leave it or --samples out".into(),
        ));
    }
    match (&args.prompt, &args.input, &args.output) {
        (Some(prompt), ..) => answer_prompt(&args, prompt, &config),
        (None, Some(input), Some(output)) => answer_file(&args, input, output, &config),
        // clap asks for one of them.
        _ => Err(Error::Usage("give --prompt, or --input and --output".into())),
    }
}

fn answer_prompt(args: &GenerateArgs, prompt: &str, config: &GenerationConfig) -> Result<()> {
    let (model, tokenizer) = load(&args.model)?;
    let mut session = Session {
        generator: Generator::new(&model)?,
        tokenizer: &tokenizer,
        config,
        shared: args.samples.is_some(),
        speed: Speed::default(),
    };
    let (ids, _) = session.fit(prompt, &[])?;
    let samples: Vec<u64> = args.sample_numbers().collect();
    for batch in samples.chunks(args.batch_size as usize) {
        let sequences: Vec<Sequence<'_>> = batch.iter().map(|&sample| sequence(&ids, 0, sample)).collect();
        for (sample, answer) in batch.iter().zip(session.answers(&sequences, &mut || {})?) {
            if samples.len() > 1 {
                println!("[sample {sample}]");
            }
            println!("{answer}");
        }
    }
    if args.stats {
        eprintln!("{}", session.speed.report(model.decode_bytes()));
    }
    Ok(())
}

fn answer_file(args: &GenerateArgs, input: &Path, output: &Path, config: &GenerationConfig) -> Result<()> {
    // What goes to a device or a pipe cannot be gone on with.
    let kept = !std::fs::metadata(output).is_ok_and(|m| !m.is_file() && !m.is_dir());
    if !kept && args.resume {
        return Err(Error::Usage(format!(
            "--resume needs a file to go on with, and {} is none",
            output.display()
        )));
    }
    let going_on = args.resume && Journal::path(output).exists();
    check_output(output, args.overwrite || going_on)?;
    let items = input::read(input, &args.columns.columns())?;
    let settings = args.settings(&items, config)?;
    let mut journal = match kept {
        true => Some(Journal::open(output, &settings, args.resume, args.overwrite)?),
        false => None,
    };
    let interrupt = Interrupt::listen()?;
    let (model, tokenizer) = load(&args.model)?;
    let mut session = Session {
        generator: Generator::new(&model)?,
        tokenizer: &tokenizer,
        config,
        shared: args.samples.is_some(),
        speed: Speed::default(),
    };
    let prompts = session.prompts(&items)?;
    let plan = plan(&prompts, args.sample_numbers(), args.batch_size as usize);
    let places = |batch: &[(usize, u64)]| -> Vec<Place> {
        batch
            .iter()
            .map(|&(item, sample)| (items[item].line, sample))
            .collect()
    };
    let earlier = journal.as_ref().map_or(&[][..], Journal::done);
    let planned = |(answers, batch): (&Answers, &Vec<(usize, u64)>)| {
        answers.iter().map(|(place, _)| *place).eq(places(batch))
    };
    if earlier.len() > plan.len() || !earlier.iter().zip(&plan).all(planned) {
        return Err(Error::input(
            Journal::path(output).display(),
            "batches of another run",
            "those of this one",
            "begin again with --overwrite",
        ));
    }
    let mut done: Vec<Vec<String>> = earlier
        .iter()
        .map(|answers| answers.iter().map(|(_, answer)| answer.clone()).collect())
        .collect();
    let all = plan.iter().map(Vec::len).sum();
    let mut progress = Answered::new(done.iter().map(Vec::len).sum(), all);
    if args.resume {
        eprintln!("going on after {} of {all} answers", progress.done);
    }
    for batch in &plan[done.len()..] {
        if interrupt.requested() {
            return Err(stopped(&progress, &journal, output));
        }
        let sequences: Vec<Sequence<'_>> = batch
            .iter()
            .map(|&(item, sample)| sequence(&prompts[item], item, sample))
            .collect();
        let answers = session.answers(&sequences, &mut || progress.tick())?;
        progress.add(answers.len(), &session.speed);
        if let Some(journal) = &mut journal {
            let answers = answers.iter().cloned();
            journal.push(places(batch).into_iter().zip(answers).collect())?;
        }
        done.push(answers);
    }
    progress.finish();
    let text = in_order(&items, &plan, done, args.samples.is_some());
    atomic::write(output, text.as_bytes())?;
    if let Some(journal) = journal {
        journal.finish()?;
    }
    eprintln!("{all} answers: {}", output.display());
    if args.stats {
        eprintln!("{}", session.speed.report(model.decode_bytes()));
    }
    Ok(())
}

fn stopped(progress: &Answered, journal: &Option<Journal>, output: &Path) -> Error {
    progress.finish();
    let count = format!("{} of {} answers", progress.done, progress.all);
    Error::Stopped(match journal {
        // Its journal goes with it.
        Some(_) if progress.done == 0 => {
            format!(
                "none of {} answers was made; the same command begins again",
                progress.all
            )
        }
        Some(_) => {
            let path = Journal::path(output);
            format!(
                "{count} are in {}; the same command with --resume goes on",
                path.display()
            )
        }
        None => format!("{count} were made and none is kept"),
    })
}

fn sequence(prompt: &[u32], item: usize, sample: u64) -> Sequence<'_> {
    let number = number(item as u64, sample);
    Sequence { prompt, number }
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

impl GenerateArgs {
    fn sample_numbers(&self) -> std::ops::Range<u64> {
        let first = u64::from(self.first_sample.unwrap_or(0));
        first..first + u64::from(self.samples.unwrap_or(1))
    }

    /// Everything that decides the answers, by name.
    fn settings(&self, items: &[Item], config: &GenerationConfig) -> Result<Map<String, Value>> {
        let ModelArgs { model, adapter, .. } = &self.model;
        let trained_on = adapter.as_deref().map(TrainedOn::read).transpose()?;
        let trained_on = trained_on.unwrap_or_default();
        let holding = Holding::of(self.model.load_in, &trained_on);
        let checkpoint = Checkpoint::open(model)?;
        checkpoint.validate()?;
        let tokenizer = model.join("ice_text.model");
        let compute = compute::choose(&self.model.device, &self.model.dtype)?;
        let device = if compute.device == crate::tensor::Device::Cpu {
            "CPU"
        } else {
            "CUDA"
        };
        let mut settings = Map::new();
        let mut set = |name: &str, value: Value| settings.insert(name.to_string(), value);
        set("glmtune", env!("CARGO_PKG_VERSION").into());
        set("--input", json!({"sha256": input::fingerprint(items)}));
        set(
            "--model",
            json!({"fingerprint": base_fingerprint(&checkpoint, &holding.merged)?}),
        );
        if tokenizer.exists() {
            set("tokenizer", json!({"sha256": file_fingerprint(&tokenizer)?}));
        }
        let adapter = adapter.as_deref().map(adapter_fingerprint).transpose()?;
        set(
            "--adapter",
            adapter.map_or(Value::Null, |sha256| json!({ "sha256": sha256 })),
        );
        set("--adapter-scale", json!(self.model.adapter_scale));
        set(
            "--load-in",
            format!("{:?}", (holding.load_in, holding.quantisation)).into(),
        );
        set("--device", format!("{device} {}", compute.dtype).into());
        set("--head-storage", self.model.head_storage.as_str().into());
        for (name, value) in config.named() {
            set(&format!("--{}", name.replace('_', "-")), value);
        }
        set("--samples", json!(self.samples));
        set("--first-sample", json!(self.first_sample.unwrap_or(0)));
        set("--batch-size", self.batch_size.into());
        let columns = self.columns.columns();
        set("--prompt-column", json!(columns.prompt));
        set("--response-column", json!(columns.response));
        set("--history-column", json!(columns.history));
        Ok(settings)
    }
}

struct Session<'a> {
    generator: Generator<'a>,
    tokenizer: &'a Tokenizer,
    config: &'a GenerationConfig,
    /// Are prompts read on their own, for all their samples?
    shared: bool,
    speed: Speed,
}

impl Session<'_> {
    fn fit(&self, query: &str, history: &[(String, String)]) -> Result<(Vec<u32>, usize)> {
        let encode = |text: &str| self.tokenizer.build_inputs(&self.tokenizer.encode(text), None);
        fit(&encode, "", query, history, self.config)
    }

    /// The ids of every prompt.
    fn prompts(&self, items: &[Item]) -> Result<Vec<Vec<u32>>> {
        let mut prompts = Vec::with_capacity(items.len());
        let mut cut = 0;
        for item in items {
            let fitted = self.fit(&item.query, &item.history);
            let (ids, dropped) = fitted.map_err(|error| at(&item.place, error))?;
            cut += usize::from(dropped > 0);
            prompts.push(ids);
        }
        if cut > 0 {
            let all = items.len();
            eprintln!("{cut} of {all} records are too long: their oldest turns are left out");
        }
        Ok(prompts)
    }

    /// The answers to one batch; `tick` is called after every step.
    fn answers(&mut self, sequences: &[Sequence<'_>], tick: &mut dyn FnMut()) -> Result<Vec<String>> {
        let special = self.tokenizer.special();
        let mut on_token = |row, _| {
            if row == 0 {
                tick();
            }
            ControlFlow::Continue(())
        };
        let done = if self.shared {
            self.generator
                .samples(sequences, &special, self.config, &mut on_token)?
        } else {
            let prompts: Vec<Vec<u32>> = sequences.iter().map(|s| s.prompt.to_vec()).collect();
            let numbers: Vec<u64> = sequences.iter().map(|s| s.number).collect();
            let batch = collate::left_pad(&prompts, &special);
            self.generator
                .batch(&batch, &numbers, self.config, &mut on_token)?
        };
        self.speed.add(&done.speed);
        let text = |ids: &Vec<u32>| self.tokenizer.decode(ids).trim().to_string();
        Ok(done.sequences.iter().map(text).collect())
    }
}

/// The samples of all prompts in batches of (prompt, sample), the longest prompts first: padding is small, and what does not fit into
/// memory shows at once. The samples of a prompt follow each other.
fn plan(prompts: &[Vec<u32>], samples: std::ops::Range<u64>, batch_size: usize) -> Vec<Vec<(usize, u64)>> {
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(prompts[i].len()));
    let all: Vec<(usize, u64)> = order
        .into_iter()
        .flat_map(|item| samples.clone().map(move |sample| (item, sample)))
        .collect();
    all.chunks(batch_size).map(<[_]>::to_vec).collect()
}

/// The lines of all answers, by record and sample. `sampled`: is each to say its sample?
fn in_order(items: &[Item], plan: &[Vec<(usize, u64)>], answers: Vec<Vec<String>>, sampled: bool) -> String {
    let mut all: Vec<((usize, u64), String)> = plan
        .iter()
        .flatten()
        .copied()
        .zip(answers.into_iter().flatten())
        .collect();
    all.sort_by_key(|(place, _)| *place);
    all.iter()
        .map(|((item, sample), answer)| input::line(&items[*item], sampled.then_some(*sample), answer))
        .collect()
}

/// How far a run has come: a bar on a terminal, a line a second elsewhere.
struct Answered {
    bar: ProgressBar,
    done: usize,
    all: usize,
    /// Answers of this run, which may go on with those of another.
    first: usize,
    begun: Instant,
    said: Option<Instant>,
}

impl Answered {
    fn new(done: usize, all: usize) -> Self {
        let bar = ProgressBar::new(all as u64);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} answers {msg}") {
            bar.set_style(style);
        }
        bar.set_position(done as u64);
        Self {
            bar,
            done,
            all,
            first: done,
            begun: Instant::now(),
            said: None,
        }
    }

    fn tick(&self) {
        self.bar.tick();
    }

    fn add(&mut self, answers: usize, speed: &Speed) {
        self.done += answers;
        let each = self
            .begun
            .elapsed()
            .div_f64((self.done - self.first).max(1) as f64);
        let rates = format!(
            "{:.2} answers/s, {:.1} tokens/s, {} left",
            1.0 / each.as_secs_f64().max(1e-9),
            speed.tokens_per_second(),
            clock(each.mul_f64((self.all - self.done) as f64))
        );
        self.bar.set_position(self.done as u64);
        let pause = Duration::from_secs(1);
        let due = self.done == self.all || self.said.is_none_or(|said| said.elapsed() >= pause);
        if self.bar.is_hidden() && due {
            self.said = Some(Instant::now());
            eprintln!("{}/{} answers, {rates}", self.done, self.all);
        }
        self.bar.set_message(rates);
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_every_sample_once_the_longest_prompts_first() {
        let prompts: Vec<Vec<u32>> = [3, 1, 7, 3, 2].iter().map(|&n| vec![0; n]).collect();
        let at = |items: &[usize]| -> Vec<(usize, u64)> { items.iter().map(|&i| (i, 0)).collect() };
        assert_eq!(plan(&prompts, 0..1, 2), [at(&[2, 0]), at(&[3, 4]), at(&[1])]);
        assert_eq!(
            plan(&prompts[..2], 4..7, 4),
            [vec![(0, 4), (0, 5), (0, 6), (1, 4)], vec![(1, 5), (1, 6)]]
        );
    }
}
