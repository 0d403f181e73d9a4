//! What `chat` and `generate` share: which model, how to sample, how a conversation becomes a prompt that fits.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::quantized::{is_quantized, open_or_quantize};
use crate::compute;
use crate::data::template;
use crate::error::{Error, Result};
use crate::generate::GenerationConfig;
use crate::model::{EmbeddingPlace, LoadOptions, Model, tune};
use crate::quant::QuantType;
use crate::tensor::Device;
use crate::tokenizer::Tokenizer;
use crate::train::{TrainedOn, base_fingerprint, preparing_weights};

/// How the base weights are held in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadIn {
    /// As the checkpoint stores them.
    Stored,
    /// The four linears of every layer in 4 bits, as the adapter was trained on them; otherwise NF4, double quantisation.
    #[value(name = "4bit")]
    FourBit,
}

/// Which model.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Folder of the base model (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Folder of a trained adapter
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Multiplies the adapter's effect: 0 is the base, 1 as trained, between them less of it (LoRA only)
    #[arg(long, value_name = "FACTOR", requires = "adapter")]
    pub adapter_scale: Option<f64>,
    /// Hold the base weights as stored or in 4 bits [default: as the adapter was trained]
    #[arg(long, value_name = "HOW")]
    pub load_in: Option<LoadIn>,
    /// Where to compute: auto (the first CUDA device, else the CPU), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Compute type on a CUDA device: auto (bf16, fp16 before compute capability 8.0), bf16, fp16 or fp32
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    pub dtype: String,
    /// Keep the 4-bit copy of the base here instead of in its own folder
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// On a card: keep the layers' matrices in host memory and copy them ahead of their use, which takes about 2 GB less of it
    #[arg(long)]
    pub stream_weights: bool,
    /// The head's matrix: compute (in the compute type), int8, nf4, or stream (copied in chunks from host memory)
    #[arg(long, value_name = "FORM", default_value = "compute", value_parser = ["compute", "int8", "nf4", "stream"], hide_possible_values = true)]
    pub head_storage: String,
}

/// How to choose tokens; the defaults are those of the official `model.chat`.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Always take the most probable token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p"])]
    pub greedy: bool,
    /// Divides the logits: below 1 bolder about its favourites, above 1 more varied
    #[arg(long, default_value_t = 0.95)]
    pub temperature: f64,
    /// Sample from the k most probable tokens only; 0 switches it off
    #[arg(long, default_value_t = 50)]
    pub top_k: usize,
    /// Sample from the smallest set of tokens with this probability; 1 switches it off
    #[arg(long, default_value_t = 0.7)]
    pub top_p: f64,
    /// Makes tokens of prompt and answer less probable; 1 switches it off
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f64,
    /// Never repeat a sequence of this many tokens; 0 switches it off
    #[arg(long, default_value_t = 0)]
    pub no_repeat_ngram_size: usize,
    /// Most tokens of an answer [default: what --max-length leaves]
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<usize>,
    /// Most tokens of prompt and answer together
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub max_length: usize,
    /// The same seed gives the same answers
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl SamplingArgs {
    /// The validated settings.
    ///
    /// # Errors
    /// A value out of range, by its flag.
    pub fn config(&self) -> Result<GenerationConfig> {
        let config = GenerationConfig {
            max_new_tokens: self.max_new_tokens,
            max_length: self.max_length,
            do_sample: !self.greedy,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            repetition_penalty: self.repetition_penalty,
            no_repeat_ngram_size: self.no_repeat_ngram_size,
            seed: self.seed,
        };
        config.validate().map_err(|e| Error::Usage(e.to_string()))?;
        Ok(config)
    }
}

/// Opens the tokenizer and the model of `args`, with the adapter if there is one; says on standard error how.
///
/// # Errors
/// Whatever is wrong with a file, and a tokenizer or adapter of another model.
pub fn load(args: &ModelArgs) -> Result<(Model, Tokenizer)> {
    let (mut model, tokenizer) = load_base(args)?;
    attach_adapter(args, &mut model)?;
    Ok((model, tokenizer))
}

/// [`load`] without the adapter; the weights are held as the adapter was trained on them.
///
/// # Errors
/// As [`load`].
pub fn load_base(args: &ModelArgs) -> Result<(Model, Tokenizer)> {
    let run = match &args.adapter {
        Some(dir) => TrainedOn::read(dir)?,
        None => TrainedOn::default(),
    };
    let compute = compute::choose(&args.device, &args.dtype)?;
    if args.stream_weights && compute.device == Device::Cpu {
        return Err(Error::Usage(
            "--stream-weights is about the memory of a card, and this computes on the CPU: leave it out"
                .into(),
        ));
    }
    let tokenizer = Tokenizer::open(&args.model)?;
    let holding = Holding::of(args.load_in, &run);
    if let Some(base) = &run.base {
        warn_of_another_base(args, base, &run.merged)?;
    }
    let checkpoint = match holding.load_in {
        LoadIn::Stored => Checkpoint::open(&args.model)?,
        LoadIn::FourBit => {
            let cache_dir = args.cache_dir.as_deref().or(run.cache_dir.as_deref());
            let mut say = preparing_weights();
            let mut progress = |done: u64, total: u64, what: &str| -> Result<()> {
                say(done, total, what);
                Ok(())
            };
            let (checkpoint, _) = open_or_quantize(
                &args.model,
                cache_dir,
                run.quant_type,
                run.double_quant,
                &mut progress,
            )?;
            checkpoint
        }
    };
    tokenizer.check(checkpoint.config())?;
    let mut model = Model::load(
        &checkpoint,
        &LoadOptions {
            compute,
            stream: args.stream_weights,
            head: args.head_storage.parse()?,
            embedding: match compute.device {
                Device::Cpu => EmbeddingPlace::Device,
                Device::Cuda(_) => EmbeddingPlace::Host,
            },
            ..LoadOptions::default()
        },
    )?;
    let how = match checkpoint.config().row_scaled {
        Some(_) => format!("as stored, in {}", checkpoint.config().linears()),
        None => holding.words(),
    };
    eprintln!(
        "model: {} {how}; computing on: {}",
        args.model.display(),
        compute::describe(compute)?
    );
    // The adapter was trained on a base into which others had been merged: it is nothing without them.
    for dir in &run.merged {
        let merged = tune::merge_adapter(&mut model, dir)?;
        eprintln!("merged {}: {merged}", dir.display());
    }
    Ok((model, tokenizer))
}

/// Puts the adapter of `args` on the model, if there is one.
///
/// # Errors
/// An adapter of another model, or a file of it that cannot be used.
pub fn attach_adapter(args: &ModelArgs, model: &mut Model) -> Result<()> {
    if let Some(dir) = &args.adapter {
        let loaded = tune::load_adapter(model, dir, false)?;
        eprintln!("adapter: {} ({})", dir.display(), describe_adapter(&loaded));
        if let Some(factor) = args.adapter_scale {
            tune::scale_adapter(model, factor)?;
        }
    }
    Ok(())
}

/// What an adapter is, in a few words.
pub fn describe_adapter(loaded: &tune::Loaded) -> String {
    match loaded {
        tune::Loaded::Lora(config) => format!("r {}, {}", config.r, config.targets_in_words()),
        tune::Loaded::Prefix(config) => format!("a prefix of {}", config.pre_seq_len),
    }
}

/// How the base weights are held beneath an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    /// As stored, or in 4 bits.
    pub load_in: LoadIn,
    /// Of 4 bits: the codes and whether their scales are quantised as well.
    pub quantisation: Option<(QuantType, bool)>,
    /// Adapters merged into them.
    pub merged: Vec<PathBuf>,
}

impl Holding {
    /// As `--load-in` asks, else as an adapter was trained.
    pub fn of(load_in: Option<LoadIn>, run: &TrainedOn) -> Self {
        // What PiSSA leaves of a base in 4 bits is not that base in 4 bits: the adapter as it is saved goes with the dense one.
        let load_in = load_in.unwrap_or(match run.four_bits && !run.pissa {
            true => LoadIn::FourBit,
            false => LoadIn::Stored,
        });
        Self {
            load_in,
            quantisation: (load_in == LoadIn::FourBit).then_some((run.quant_type, run.double_quant)),
            merged: run.merged.clone(),
        }
    }

    /// For a message.
    pub fn words(&self) -> String {
        match self.quantisation {
            None => "as stored".to_string(),
            Some((quant_type, _)) => format!("in 4 bits ({quant_type:?})").to_lowercase(),
        }
    }
}

/// Shapes tell an adapter of another size apart, not one of another model of the same size.
///
/// # Errors
/// The checkpoint cannot be read.
pub fn warn_of_another_base(args: &ModelArgs, base: &str, merged: &[PathBuf]) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.model)?;
    checkpoint.validate()?;
    if !is_quantized(&checkpoint) && base_fingerprint(&checkpoint, merged)? != base {
        eprintln!(
            "warning: the weights in {} are not those that the adapter was trained on: its answers may be useless",
            args.model.display()
        );
    }
    Ok(())
}

/// The prompt ids (with `[gMASK] <sop>`) of a conversation, oldest turns dropped until they leave room for an answer, and how
/// many turns were dropped.
///
/// Room is `max_new_tokens`, or a quarter of `max_length` when that is not given. `system`, empty for none, stands on a line of its own
/// before the oldest question that is left: ChatGLM-6B was trained on no other place for it.
///
/// # Errors
/// The query alone does not fit.
pub fn fit(
    encode: &dyn Fn(&str) -> Vec<u32>,
    system: &str,
    query: &str,
    history: &[(String, String)],
    config: &GenerationConfig,
) -> Result<(Vec<u32>, usize)> {
    let answer = config
        .max_new_tokens
        .unwrap_or(config.max_length / 4)
        .min(config.max_length);
    for dropped in 0..=history.len() {
        let ids = encode(&prompt(system, query, &history[dropped..]));
        let room = if dropped == history.len() {
            config.max_length.saturating_sub(1)
        } else {
            config.max_length - answer
        };
        if ids.len() <= room {
            return Ok((ids, dropped));
        }
    }
    let ids = encode(&prompt(system, query, &[])).len();
    Err(Error::input(
        "prompt",
        format!("{ids} tokens"),
        format!("fewer than --max-length {}", config.max_length),
        "shorten it or raise --max-length",
    ))
}

/// The official prompt, with `system` before its first question.
fn prompt(system: &str, query: &str, history: &[(String, String)]) -> String {
    match history.split_first() {
        _ if system.is_empty() => template::prompt(query, history),
        None => template::prompt(&first_question(system, query), &[]),
        Some(((question, answer), later)) => {
            let first = (first_question(system, question), answer.clone());
            template::prompt(query, &[&[first], later].concat())
        }
    }
}

/// `question` with `system` before it, if there is any.
pub fn first_question(system: &str, question: &str) -> String {
    match system {
        "" => question.to_string(),
        system => format!("{system}\n{question}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_of_the_flags_are_those_of_the_official_chat() {
        #[derive(clap::Parser)]
        struct Flags {
            #[command(flatten)]
            sampling: SamplingArgs,
        }
        let flags = |args: &[&str]| <Flags as clap::Parser>::try_parse_from([&["x"], args].concat());
        assert_eq!(
            flags(&[]).unwrap().sampling.config().unwrap(),
            GenerationConfig::default()
        );
        assert!(!flags(&["--greedy"]).unwrap().sampling.config().unwrap().do_sample);
        assert!(flags(&["--greedy", "--top-p", "0.5"]).is_err());
        assert!(flags(&["--top-p", "3"]).unwrap().sampling.config().is_err());
    }
}
