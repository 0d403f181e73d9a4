//! `glmtune eval`: loss, answers and their scores, classes, and what a model forgot.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use super::generate::{ColumnArgs, check_output};
use super::generation::{ModelArgs, attach_adapter, load_base};
use crate::checkpoint::atomic;
use crate::data::collate::right_pad;
use crate::data::record::read_records;
use crate::data::sample::{FirstTarget, Options, OverLength, Sample, encode_all};
use crate::error::{Error, Result};
use crate::evaluate::{
    AnswerOptions, Candidates, Classification, Forgetting, Prediction, ProbeOptions, Question, Reference,
    TextMetrics, answer, classes, labels_of, loss,
};
use crate::generate::GenerationConfig;
use crate::model::Model;
use crate::tokenizer::Tokenizer;

/// `--labels auto` takes the answers of the data for labels if there are at most so many different ones.
const MOST_LABELS: usize = 64;

/// Measure a model on records with answers
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  glmtune eval --model chatglm-6b --adapter out/alpaca --data test.json --output out/alpaca/eval
  glmtune eval --model chatglm-6b --adapter out/intent --data test.json --labels auto --no-generate
BLEU-4 and ROUGE are those of the official ptuning script.")]
pub struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Records with answers: .json or .jsonl
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Folder for metrics.json and predictions.jsonl; made if it is not there
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Write the answers with their scores to this file (JSONL), instead of into --output
    #[arg(long, value_name = "FILE", conflicts_with = "no_generate")]
    predictions: Option<PathBuf>,
    /// Replace the files of an earlier evaluation
    #[arg(long)]
    overwrite: bool,
    /// Print the metrics as one JSON object
    #[arg(long)]
    json: bool,
    /// Compute this many records at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    batch_size: u32,
    /// Measure the first N records only
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_samples: Option<u32>,

    /// Classes, separated by commas, or auto: the different answers of the data. A record is taken for the one that the
    /// model finds most probable as its answer
    #[arg(long, value_name = "LIST", help_heading = "What to measure")]
    labels: Option<String>,
    /// Let the model answer general questions with and without the adapter, and measure how far apart the two are
    #[arg(long, requires = "adapter", help_heading = "What to measure")]
    forgetting: bool,
    /// Write no answers: no BLEU-4, ROUGE and exact match, but much faster
    #[arg(long, help_heading = "What to measure")]
    no_generate: bool,

    #[command(flatten)]
    answers: AnswerArgs,
    #[command(flatten)]
    columns: ColumnArgs,
    #[command(flatten)]
    lengths: LengthArgs,
}

/// How to choose tokens: the most probable one, unless told to sample.
#[derive(Debug, Args)]
#[command(next_help_heading = "Answers")]
struct AnswerArgs {
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_new_tokens: usize,
    /// Sample, as the published scores of ChatGLM-6B did, instead of taking the most probable token
    #[arg(long)]
    sample: bool,
    /// Divides the logits
    #[arg(long, default_value_t = 0.95, requires = "sample")]
    temperature: f64,
    /// Sample from the k most probable tokens only; 0 switches it off
    #[arg(long, default_value_t = 50, requires = "sample")]
    top_k: usize,
    /// Sample from the smallest set of tokens with this probability; 1 switches it off
    #[arg(long, default_value_t = 0.7, requires = "sample")]
    top_p: f64,
    /// The same seed gives the same answers
    #[arg(long, default_value_t = 0, requires = "sample")]
    seed: u64,
    /// Makes tokens of prompt and answer less probable; 1 switches it off
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Never repeat a sequence of this many tokens; 0 switches it off
    #[arg(long, default_value_t = 0)]
    no_repeat_ngram_size: usize,
}

impl AnswerArgs {
    fn config(&self) -> Result<GenerationConfig> {
        let config = GenerationConfig {
            max_new_tokens: Some(self.max_new_tokens),
            do_sample: self.sample,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            no_repeat_ngram_size: self.no_repeat_ngram_size,
            seed: self.seed,
            ..GenerationConfig::default()
        };
        config.validate().map_err(|e| Error::Usage(e.to_string()))?;
        Ok(config)
    }
}

/// How records become samples, as in `glmtune train`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Lengths")]
struct LengthArgs {
    /// Longest sample in tokens [default: what the model takes]
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Longest prompt in tokens, [gMASK] included
    #[arg(long, value_name = "N")]
    max_source_length: Option<usize>,
    /// Longest answer in tokens, <sop> and <eop> included
    #[arg(long, value_name = "N")]
    max_target_length: Option<usize>,
    /// What happens to longer records: cut, drop, error or official
    #[arg(long, value_parser = ["cut", "drop", "error", "official"], hide_possible_values = true, default_value = "cut")]
    over_length: String,
    /// First token that counts in the loss: sop (as the official script) or answer
    #[arg(long, value_parser = ["sop", "answer"], hide_possible_values = true, default_value = "sop")]
    first_target: String,
}

impl LengthArgs {
    fn options(&self, longest: usize) -> Options {
        Options {
            first_target: if self.first_target == "answer" {
                FirstTarget::Answer
            } else {
                FirstTarget::Sop
            },
            max_source_length: self.max_source_length,
            max_target_length: self.max_target_length,
            max_length: Some(self.max_length.map_or(longest, |most| most.min(longest))),
            over_length: match self.over_length.as_str() {
                "drop" => OverLength::Drop,
                "error" => OverLength::Error,
                "official" => OverLength::Official,
                _ => OverLength::Cut,
            },
        }
    }
}

/// Runs `glmtune eval`.
///
/// # Errors
/// Files that cannot be used, a reference that is no label, a loss or logit that is not finite; no file is then written.
pub fn run(args: &EvalArgs) -> Result<()> {
    let generation = args.answers.config()?;
    let (metrics_file, predictions_file) = args.outputs()?;
    let (mut records, shape) = read_records(&args.data, &args.columns.columns())?;
    records.truncate(args.max_samples.map_or(usize::MAX, |most| most as usize));
    eprintln!("{}: {shape}", args.data.display());

    let (mut model, tokenizer) = load_base(&args.model)?;
    let options = args.lengths.options(model.config().max_sequence_length);
    let (samples, report) = encode_all(&tokenizer, &records, &options)?;
    eprintln!("{report}");
    let questions: Vec<Question> = samples.iter().map(|s| Question::of(&tokenizer, s)).collect();
    let candidates = match &args.labels {
        Some(list) => Some(Candidates::new(
            &tokenizer,
            &questions,
            &labels(list, &questions)?,
        )?),
        None => None,
    };
    let base = if args.forgetting {
        eprintln!("the base answers general questions");
        Some(Reference::measure(&model, &tokenizer, &ProbeOptions::default())?)
    } else {
        None
    };
    // What scales an adapter belongs here: the base has been measured, the tuned model not yet.
    attach_adapter(&args.model, &mut model)?;

    let session = Session {
        model: &model,
        tokenizer: &tokenizer,
        batch_size: args.batch_size as usize,
    };
    let started = Instant::now();
    let mut metrics = Metrics::new();
    metrics.add("samples", samples.len());
    let by_likelihood = session.told(&samples, candidates.as_ref(), &mut metrics)?;
    let mut predictions = Vec::new();
    if !args.no_generate {
        predictions = session.answers(&questions, &generation, &mut metrics)?;
    }
    let mut tables = String::new();
    if let (Some(counts), Some(candidates)) = (&by_likelihood, &candidates) {
        metrics.classification("classification", counts);
        tables += &table(counts);
        if !args.no_generate {
            let by_answers = classes::of_answers(&predictions, candidates.labels())?;
            metrics.classification("classification_of_answers", &by_answers);
        }
    }
    if let Some(base) = &base {
        eprintln!("the tuned model answers general questions");
        let forgetting = base.compare(&model, &tokenizer)?;
        metrics.forgetting(&forgetting);
        tables += &side_by_side(&forgetting);
    }
    eprintln!("measured in {:.1} s", started.elapsed().as_secs_f64());

    if let Some(path) = predictions_file {
        let lines: String = predictions
            .iter()
            .map(|prediction| Value::Object(prediction.to_json()).to_string() + "\n")
            .collect();
        atomic::write(&path, lines.as_bytes())?;
        eprintln!("{} answers: {}", predictions.len(), path.display());
    }
    let object = Value::Object(metrics.object);
    let pretty = format!("{object:#}\n");
    if let Some(path) = metrics_file {
        atomic::write(&path, pretty.as_bytes())?;
        eprintln!("metrics: {}", path.display());
    }
    if args.json {
        print!("{pretty}");
    } else {
        print!("{}{tables}", metrics.lines);
    }
    Ok(())
}

impl EvalArgs {
    /// Where metrics and predictions go; looked at before anything is computed.
    fn outputs(&self) -> Result<(Option<PathBuf>, Option<PathBuf>)> {
        if let Some(dir) = &self.output {
            std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
        }
        let metrics = self.output.as_ref().map(|dir| dir.join("metrics.json"));
        let predictions = match (&self.predictions, &self.output) {
            (Some(file), _) => Some(file.clone()),
            (None, Some(dir)) if !self.no_generate => Some(dir.join("predictions.jsonl")),
            _ => None,
        };
        for path in metrics.iter().chain(&predictions) {
            check_output(path, self.overwrite)?;
        }
        Ok((metrics, predictions))
    }
}

/// The labels of `--labels`.
fn labels(list: &str, questions: &[Question]) -> Result<Vec<String>> {
    if list != "auto" {
        return Ok(list.split(',').map(|label| label.trim().to_string()).collect());
    }
    labels_of(questions, MOST_LABELS).ok_or_else(|| {
        Error::input(
            "--labels auto",
            format!("more than {MOST_LABELS} different answers in the data"),
            "classification data",
            "name the labels, separated by commas",
        )
    })
}

struct Session<'a> {
    model: &'a Model,
    tokenizer: &'a Tokenizer,
    batch_size: usize,
}

impl Session<'_> {
    /// What the model makes of answers that it is told: the loss and, with `candidates`, the classes.
    fn told(
        &self,
        samples: &[Sample],
        candidates: Option<&Candidates>,
        metrics: &mut Metrics,
    ) -> Result<Option<Classification>> {
        let longest = samples.iter().map(|sample| sample.ids.len()).max();
        let longest = longest
            .unwrap_or_default()
            .max(candidates.map_or(0, Candidates::longest));
        let mut ws = self.model.workspace(self.batch_size, longest)?;
        let mut order: Vec<&Sample> = samples.iter().collect();
        order.sort_by_key(|sample| sample.ids.len());
        let bar = progress(samples.len(), "samples");
        let batches = order.chunks(self.batch_size).map(|samples| {
            bar.inc(samples.len() as u64);
            right_pad(samples, self.tokenizer.special().pad, None)
        });
        let told = loss(self.model, &mut ws, batches)?;
        bar.finish_and_clear();
        metrics.add("loss", told.loss);
        metrics.add("perplexity", told.perplexity());
        metrics.add("token_accuracy", told.token_accuracy);
        metrics.add("tokens", told.tokens);
        let Some(candidates) = candidates else {
            return Ok(None);
        };
        let bar = progress(samples.len() * candidates.labels().len(), "candidates");
        let counts = candidates.classify(self.model, &mut ws, self.batch_size, &mut |done, _| {
            bar.set_position(done as u64)
        })?;
        bar.finish_and_clear();
        Ok(Some(counts))
    }

    /// What the model answers.
    fn answers(
        &self,
        questions: &[Question],
        generation: &GenerationConfig,
        metrics: &mut Metrics,
    ) -> Result<Vec<Prediction>> {
        let options = AnswerOptions {
            generation: generation.clone(),
            batch_size: self.batch_size,
        };
        let bar = progress(questions.len(), "answers");
        let predictions = answer(
            self.model,
            self.tokenizer,
            questions,
            &options,
            &mut |done, speed| {
                bar.set_message(format!("{:.1} tokens/s", speed.tokens_per_second()));
                bar.set_position(done as u64);
            },
        )?;
        bar.finish_and_clear();
        if let Some(means) = TextMetrics::of(&predictions) {
            for (name, score) in means.scores.named() {
                metrics.add(name, score);
            }
            metrics.add("exact_match", means.exact_match);
            metrics.add("empty", means.empty);
            metrics.add("unended", means.unended);
        }
        Ok(predictions)
    }
}

fn progress(length: usize, what: &str) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    let template = format!("{{bar:30}} {{pos}}/{{len}} {what} {{msg}} eta {{eta}}");
    if let Ok(style) = ProgressStyle::with_template(&template) {
        bar.set_style(style);
    }
    bar
}

/// The metrics by their official names, and as lines for people.
struct Metrics {
    object: Map<String, Value>,
    lines: String,
}

impl Metrics {
    fn new() -> Self {
        Self {
            object: Map::new(),
            lines: String::new(),
        }
    }

    fn add(&mut self, name: &str, value: impl Into<Value>) {
        let value = value.into();
        let text = match value.as_f64() {
            Some(number) if !value.is_u64() => format!("{number:.4}"),
            _ => value.to_string(),
        };
        self.lines += &format!("{name:<28}{text:>12}\n");
        self.object.insert(name.to_string(), value);
    }

    fn classification(&mut self, name: &str, counts: &Classification) {
        for (what, value) in [("accuracy", counts.accuracy()), ("macro_f1", counts.macro_f1())] {
            self.lines += &format!("{:<28}{value:>12.4}\n", format!("{what}, {}", how(name)));
        }
        self.object.insert(name.to_string(), counts.to_json());
    }

    fn forgetting(&mut self, forgetting: &Forgetting) {
        self.lines += &format!(
            "{:<28}{:>12.4}\n{:<28}{:>12.4}\n",
            "forgetting (nats/token)",
            forgetting.kl_mean,
            "same first choice as base",
            forgetting.top1_agreement
        );
        let probes: Vec<Value> = forgetting
            .answers
            .iter()
            .zip(&forgetting.kl_per_probe)
            .map(|((prompt, before, after), kl)| {
                json!({"prompt": prompt, "kl": kl, "base": before, "tuned": after})
            })
            .collect();
        self.object.insert(
            "forgetting".to_string(),
            json!({
                "kl": forgetting.kl_mean,
                "top1_agreement": forgetting.top1_agreement,
                "probes": probes,
            }),
        );
    }
}

fn how(name: &str) -> &str {
    if name.ends_with("of_answers") {
        "as written"
    } else {
        "by likelihood"
    }
}

/// Precision, recall and F1 of every class, and what its records were taken for.
fn table(counts: &Classification) -> String {
    let mut text = format!(
        "\n{:>9} {:>9} {:>9} {:>9}  class, and what its records were taken for\n",
        "precision", "recall", "F1", "records"
    );
    for (i, (label, class)) in counts.labels.iter().zip(counts.classes()).enumerate() {
        let taken: Vec<String> = counts.confusion[i]
            .iter()
            .zip(&counts.labels)
            .filter(|(count, _)| **count > 0)
            .map(|(count, label)| format!("{label} {count}"))
            .collect();
        text += &format!(
            "{:>9.4} {:>9.4} {:>9.4} {:>9}  {label}: {}\n",
            class.precision,
            class.recall,
            class.f1,
            class.records,
            taken.join(", ")
        );
    }
    text
}

/// The general questions with both answers, the most changed first.
fn side_by_side(forgetting: &Forgetting) -> String {
    let mut probes: Vec<_> = forgetting.answers.iter().zip(&forgetting.kl_per_probe).collect();
    probes.sort_by(|a, b| b.1.total_cmp(a.1));
    let line = |text: &str| text.replace('\n', " ");
    let mut text = "\nGeneral questions, the most changed first:\n".to_string();
    for ((prompt, before, after), kl) in probes {
        text += &format!(
            "{kl:>9.4}  {}\n     base  {}\n    tuned  {}\n",
            line(prompt),
            line(before),
            line(after)
        );
    }
    text
}
