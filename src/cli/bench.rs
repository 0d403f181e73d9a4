//! `glmtune bench`: speed and memory, of single operations, of training, of generation.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::bench::{
    self, DecodeSettings, FilesSettings, KernelSettings, MemorySettings, Protocol, TrainSettings, machine,
    model_config,
};
use crate::checkpoint::atomic;
use crate::compute;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::model::tune::LoraTarget;
use crate::tensor::Compute;
use crate::train::plan::parse_bytes;

/// Measure speed and memory; needs no checkpoint
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Every operation at the model's shapes: time, GB/s, TFLOP/s, share of what the device can do at most
    Kernels(KernelArgs),
    /// Optimizer steps of QLoRA on random weights: tokens/s, memory
    Train(TrainArgs),
    /// Generating token by token on random weights: tokens/s
    Decode(DecodeArgs),
    /// What each way to save memory costs, as a ratio to none; or, with --vram, what fits and whether the plan is kept
    Memory(MemoryArgs),
    /// Merging and each export format on this disk: GB/s, and the ratio to a plain read and write of as many bytes
    Files(FilesArgs),
}

/// What all three have in common.
#[derive(Debug, Args)]
struct Common {
    /// Whose sizes: chatglm-6b, tiny, or the path of a config.json [default: chatglm-6b, with --quick tiny]
    #[arg(long, value_name = "NAME")]
    config: Option<String>,
    /// Where to compute: auto (the first CUDA device, else the CPU), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: String,
    /// Compute type on a CUDA device: auto (bf16, fp16 before compute capability 8.0), bf16, fp16 or fp32
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    dtype: String,
    /// Only see that everything runs: small sizes, few repeats; the figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct KernelArgs {
    #[command(flatten)]
    common: Common,
    /// Rows of activations (tokens of a batch) [default: 1,16,64,512,2048,8192]
    #[arg(long, value_name = "M,...", value_delimiter = ',', value_parser = extent)]
    rows: Vec<usize>,
    /// Lengths of sequences for attention [default: 512,2048,8192]
    #[arg(long, value_name = "S,...", value_delimiter = ',', value_parser = extent)]
    lengths: Vec<usize>,
    /// Only these groups of operations, by the first column of the table
    #[arg(long, value_name = "GROUP,...", value_delimiter = ',')]
    only: Vec<String>,
    /// Measurements of each case [default: 7]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: Option<u32>,
}

#[derive(Debug, Args)]
struct TrainArgs {
    #[command(flatten)]
    common: Common,
    /// Sequences of a step
    #[arg(long, value_name = "N", default_value = "1", value_parser = extent)]
    batch: usize,
    /// Tokens of each sequence; several lengths are measured one after the other [default: 512,2048]
    #[arg(long, value_name = "S,...", value_delimiter = ',', value_parser = extent)]
    length: Vec<usize>,
    /// Steps to measure [default: 10]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: Option<u32>,
    /// Steps before them [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100_000))]
    warmup: Option<u32>,
    /// Rank of the adapters
    #[arg(long, value_name = "R", default_value = "8", value_parser = extent)]
    lora_r: usize,
    /// Linears with an adapter, by name, or all
    #[arg(long, value_name = "NAME,...", default_value = "all", value_delimiter = ',')]
    lora_target: Vec<String>,
    /// Dropout on the adapters' inputs
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    lora_dropout: f64,
}

#[derive(Debug, Args)]
struct DecodeArgs {
    #[command(flatten)]
    common: Common,
    /// Sequences at once
    #[arg(long, value_name = "N", default_value = "1", value_parser = extent)]
    batch: usize,
    /// Tokens of the prompt; several are measured one after the other [default: 32,512,2048]
    #[arg(long, value_name = "S,...", value_delimiter = ',', value_parser = extent)]
    context: Vec<usize>,
    /// Tokens to generate [default: 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    tokens: Option<u32>,
}

#[derive(Debug, Args)]
struct MemoryArgs {
    #[command(flatten)]
    common: Common,
    /// Sequences of a step
    #[arg(long, value_name = "N", default_value = "1", value_parser = extent)]
    batch: usize,
    /// Tokens of each sequence; several lengths are measured one after the other [default: 2048]
    #[arg(long, value_name = "S,...", value_delimiter = ',', value_parser = extent)]
    length: Vec<usize>,
    /// Train every weight with 8-bit AdamW, instead of adapters on 4-bit weights
    #[arg(long)]
    full: bool,
    /// Rank of the adapters
    #[arg(long, value_name = "R", default_value = "8", value_parser = extent)]
    lora_r: usize,
    /// Choose what fits into these amounts of memory, and compare the driver's figure with the plan
    #[arg(long, value_name = "SIZE,...", value_delimiter = ',')]
    vram: Vec<String>,
    /// Rounds, each of which measures every way once [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Steps of each measurement [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: Option<u32>,
}

#[derive(Debug, Args)]
struct FilesArgs {
    /// A folder on the disk to measure; what is written there is removed
    #[arg(long, value_name = "DIR", default_value = ".")]
    place: PathBuf,
    /// Whose sizes: chatglm-6b, tiny, or the path of a config.json [default: chatglm-6b, with --quick tiny]
    #[arg(long, value_name = "NAME")]
    config: Option<String>,
    /// Layers of it
    #[arg(long, value_name = "N", default_value = "4", value_parser = extent)]
    layers: usize,
    /// ice_text.model of that model: GGML files hold it, and are left out without
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Rank of the adapters
    #[arg(long, value_name = "R", default_value = "8", value_parser = extent)]
    lora_r: usize,
    /// Rounds, each of which measures every way once [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: Option<u32>,
    /// Only see that everything runs: small sizes, one round; the figures mean nothing
    #[arg(long)]
    quick: bool,
    /// Write the figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn extent(text: &str) -> std::result::Result<usize, String> {
    match text.parse() {
        Ok(n) if (1..=1 << 20).contains(&n) => Ok(n),
        _ => Err("a whole number from 1 to 1048576".to_string()),
    }
}

impl Common {
    fn open(&self) -> Result<(Compute, ModelConfig)> {
        let named = self.config.as_deref();
        let config = model_config(named.unwrap_or(if self.quick { "tiny" } else { "chatglm-6b" }))?;
        let compute = compute::choose(&self.device, &self.dtype)?;
        eprintln!("computing on: {}", compute::describe(compute)?);
        Ok((compute, config))
    }

    /// `given`, or a default that depends on `--quick`.
    fn or<T: Clone>(&self, given: &[T], full: &[T], quick: &[T]) -> Vec<T> {
        match (given, self.quick) {
            ([], false) => full.to_vec(),
            ([], true) => quick.to_vec(),
            (given, _) => given.to_vec(),
        }
    }

    fn count(&self, given: Option<u32>, full: usize, quick: usize) -> usize {
        given.map_or(if self.quick { quick } else { full }, |n| n as usize)
    }

    fn write(&self, figures: &Value) -> Result<()> {
        match &self.json {
            Some(path) => write(path, figures),
            None => Ok(()),
        }
    }
}

fn write(path: &Path, figures: &Value) -> Result<()> {
    atomic::write(path, format!("{figures:#}\n").as_bytes())
}

/// Runs `glmtune bench`.
///
/// # Errors
/// No such device, no room on it, a file that cannot be written, or cases that could not be measured.
pub fn run(args: &BenchArgs) -> Result<()> {
    match &args.what {
        What::Kernels(args) => kernels(args),
        What::Train(args) => train(args),
        What::Decode(args) => decode(args),
        What::Memory(args) => memory(args),
        What::Files(args) => files(args),
    }
}

fn kernels(args: &KernelArgs) -> Result<()> {
    let common = &args.common;
    let (compute, config) = common.open()?;
    let mut protocol = if common.quick {
        Protocol::QUICK
    } else {
        Protocol::FULL
    };
    if let Some(repeats) = args.repeats {
        protocol.repeats = repeats as usize;
    }
    let settings = KernelSettings {
        compute,
        config,
        rows: common.or(&args.rows, &[1, 16, 64, 512, 2048, 8192], &[1, 16]),
        lengths: common.or(&args.lengths, &[512, 2048, 8192], &[16]),
        only: args.only.clone(),
        protocol,
    };
    let report = bench::kernels(&settings, &mut |line| println!("{line}"))?;
    common.write(&report.json())?;
    match report.failures() {
        0 => Ok(()),
        failures => Err(Error::input(
            "bench kernels",
            format!("{failures} cases that could not be measured"),
            "none",
            "each says why in its line of the table",
        )),
    }
}

fn train(args: &TrainArgs) -> Result<()> {
    let common = &args.common;
    let (compute, config) = common.open()?;
    let all = args.lora_target.iter().any(|name| name == "all");
    let settings = TrainSettings {
        compute,
        config,
        batch: args.batch,
        lengths: common.or(&args.length, &[512, 2048], &[32]),
        steps: common.count(args.steps, 10, 2),
        warmup: common.count(args.warmup, 3, 1),
        rank: args.lora_r,
        targets: if all {
            LoraTarget::ALL.to_vec()
        } else {
            let targets = args.lora_target.iter().map(|name| name.parse());
            targets.collect::<Result<_>>()?
        },
        dropout: args.lora_dropout,
    };
    if let Some(length) = settings.lengths.iter().find(|&&length| length < 4) {
        return Err(Error::Usage(format!(
            "--length: found {length}, expected at least 4: a quarter is context"
        )));
    }
    let reports = bench::train(&settings, &mut |report| println!("{}", report.line()))?;
    let reports: Vec<Value> = reports.iter().map(bench::TrainReport::json).collect();
    common.write(&json!({ "machine": machine(compute)?, "train": reports }))
}

fn decode(args: &DecodeArgs) -> Result<()> {
    let common = &args.common;
    let (compute, config) = common.open()?;
    let settings = DecodeSettings {
        compute,
        config,
        batch: args.batch,
        contexts: common.or(&args.context, &[32, 512, 2048], &[8]),
        tokens: common.count(args.tokens, 64, 4),
    };
    if let Some(context) = settings.contexts.iter().find(|&&context| context < 2) {
        return Err(Error::Usage(format!(
            "--context: found {context}, expected at least 2: a prompt ends in two special tokens"
        )));
    }
    let reports = bench::decode(&settings, &mut |report| println!("{}", report.line()))?;
    let reports: Vec<Value> = reports.iter().map(bench::DecodeReport::json).collect();
    common.write(&json!({ "machine": machine(compute)?, "decode": reports }))
}

fn memory(args: &MemoryArgs) -> Result<()> {
    let common = &args.common;
    let (compute, config) = common.open()?;
    let vram = args.vram.iter().map(|text| parse_bytes("--vram", text));
    let settings = MemorySettings {
        compute,
        config,
        batch: args.batch,
        lengths: common.or(&args.length, &[2048], &[16]),
        full: args.full,
        rank: args.lora_r,
        vram: vram.collect::<Result<_>>()?,
        rounds: common.count(args.rounds, 3, 1),
        steps: common.count(args.steps, 4, 1),
    };
    if let Some(length) = settings.lengths.iter().find(|&&length| length < 4) {
        return Err(Error::Usage(format!(
            "--length: found {length}, expected at least 4: a quarter is context"
        )));
    }
    let reports = bench::memory(&settings, &mut |report| println!("{}", report.line()))?;
    let reports: Vec<Value> = reports.iter().map(bench::MemoryReport::json).collect();
    common.write(&json!({ "machine": machine(compute)?, "memory": reports }))
}

fn files(args: &FilesArgs) -> Result<()> {
    let named = args.config.as_deref();
    let config = model_config(named.unwrap_or(if args.quick { "tiny" } else { "chatglm-6b" }))?;
    let settings = FilesSettings {
        config: ModelConfig {
            num_layers: args.layers.min(config.num_layers),
            ..config
        },
        place: args.place.clone(),
        tokenizer: args.tokenizer.clone(),
        rank: args.lora_r,
        rounds: args.rounds.map_or(if args.quick { 1 } else { 3 }, |n| n as usize),
    };
    if settings.tokenizer.is_none() {
        eprintln!("left out: GGML files, which need --tokenizer FILE (ice_text.model)");
    }
    let reports = bench::files(&settings, &mut |report| println!("{}", report.line()))?;
    let reports: Vec<Value> = reports.iter().map(bench::FilesReport::json).collect();
    match &args.json {
        Some(path) => write(path, &json!({ "files": reports })),
        None => Ok(()),
    }
}
