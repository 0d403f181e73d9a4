//! `glmtune quantize`: a checkpoint in 4 bits.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};

use crate::checkpoint::quantized::{CacheStatus, cache_folder, open_or_quantize, quantize_checkpoint};
use crate::checkpoint::{Checkpoint, quantized};
use crate::error::{Error, Result};
use crate::quant::QuantType;
use crate::train::Interrupt;

/// Quantise a checkpoint to 4 bits, tensor by tensor, into a folder that `train`, `chat` and bitsandbytes read
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// Model folder: config.json, tokenizer, fp16, bf16 or fp32 weights (.bin or .safetensors)
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Folder to write; default: nf4-cache in the model folder, where `train` finds it
    #[arg(long, value_name = "DIR", conflicts_with = "cache_dir")]
    pub output: Option<PathBuf>,
    /// Keep the cache below this folder instead of in the model folder
    #[arg(long, value_name = "DIR")]
    pub cache_dir: Option<PathBuf>,
    /// Table of the 16 values
    #[arg(long, value_enum, default_value = "nf4")]
    pub quant_type: QuantTypeArg,
    /// Keep the block scales in 32 bits (4.5 bits a weight instead of 4.13)
    #[arg(long)]
    pub no_double_quant: bool,
    /// Replace a folder that an earlier run wrote
    #[arg(long)]
    pub overwrite: bool,
}

/// [`QuantType`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantTypeArg {
    /// Quantiles of the normal distribution
    Nf4,
    /// 4-bit floating point
    Fp4,
}

impl From<QuantTypeArg> for QuantType {
    fn from(arg: QuantTypeArg) -> Self {
        match arg {
            QuantTypeArg::Nf4 => QuantType::Nf4,
            QuantTypeArg::Fp4 => QuantType::Fp4,
        }
    }
}

/// Runs `glmtune quantize`.
///
/// # Errors
/// The checkpoint is broken, or the folder cannot be written.
pub fn run(args: &QuantizeArgs) -> Result<()> {
    let quant_type = QuantType::from(args.quant_type);
    let double_quant = !args.no_double_quant;
    let start = Instant::now();
    let interrupt = Interrupt::listen()?;
    let mut bar = QuantizeProgress::new();
    let (folder, what) = match &args.output {
        Some(output) => {
            if output.join(quantized::CACHE_FILE).exists() && !args.overwrite {
                let remedy = "give --overwrite to replace it, or another --output";
                return Err(Error::input(
                    output.display(),
                    "an earlier result",
                    "an empty folder",
                    remedy,
                ));
            }
            let source = Checkpoint::open(&args.model)?;
            quantize_checkpoint(&source, output, quant_type, double_quant, &mut |d, t, n| {
                bar.update(d, t, n);
                interrupt.check(0)
            })?;
            (output.clone(), "written")
        }
        None => {
            let cache = cache_folder(&args.model, args.cache_dir.as_deref(), quant_type, double_quant);
            let mut report = |done: u64, total: u64, name: &str| {
                bar.update(done, total, name);
                interrupt.check(0)
            };
            if args.overwrite && cache.exists() {
                let source = Checkpoint::open(&args.model)?;
                quantize_checkpoint(&source, &cache, quant_type, double_quant, &mut report)?;
                (cache, "written again")
            } else {
                let root = args.cache_dir.as_deref();
                let (checkpoint, status) =
                    open_or_quantize(&args.model, root, quant_type, double_quant, &mut report)?;
                (checkpoint.dir().to_path_buf(), describe(status))
            }
        }
    };
    bar.finish();
    println!(
        "{}: {what} ({}, {:.1} s)",
        folder.display(),
        indicatif::HumanBytes(folder_bytes(&folder)),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// One phrase for people: what [`open_or_quantize`] did.
pub fn describe(status: CacheStatus) -> &'static str {
    match status {
        CacheStatus::Created => "written",
        CacheStatus::Reused => "there already, made from this very model",
        CacheStatus::Refreshed => "there already; the model's files were touched but are the same",
        CacheStatus::Replaced => "written again: the model (or the folder) had changed since it was made",
        CacheStatus::AlreadyQuantized => "already in few bits, used as it is",
    }
}

fn folder_bytes(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .filter(|m| m.is_file())
        .map(|m| m.len())
        .sum()
}

/// The progress of work on the bytes of a model: a bar on a terminal, a line per tenth elsewhere.
pub struct QuantizeProgress {
    doing: &'static str,
    bar: Option<ProgressBar>,
    terminal: bool,
    start: Instant,
    tenths: u64,
}

impl Default for QuantizeProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl QuantizeProgress {
    /// Shows nothing until the first [`QuantizeProgress::update`].
    pub fn new() -> Self {
        Self::of("quantising")
    }

    /// The progress of other work: `doing` is its participle.
    pub fn of(doing: &'static str) -> Self {
        Self {
            doing,
            bar: None,
            terminal: std::io::stderr().is_terminal(),
            start: Instant::now(),
            tenths: 0,
        }
    }

    /// `done` of `total` bytes; `name` is the tensor at hand.
    pub fn update(&mut self, done: u64, total: u64, name: &str) {
        if self.terminal {
            let bar = self.bar.get_or_insert_with(|| {
                let template =
                    "{prefix} {bar:32} {bytes}/{total_bytes} {binary_bytes_per_sec} eta {eta} {wide_msg}";
                let style = ProgressStyle::with_template(template).expect("the template is a constant");
                ProgressBar::new(total).with_style(style).with_prefix(self.doing)
            });
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(name.to_string());
            return;
        }
        let tenths = (done * 10).checked_div(total).unwrap_or(10);
        if tenths > self.tenths {
            self.tenths = tenths;
            let seconds = self.start.elapsed().as_secs_f64();
            eprintln!(
                "{}: {}% of {}, {seconds:.0} s",
                self.doing,
                tenths * 10,
                indicatif::HumanBytes(total)
            );
        }
    }

    /// Takes the bar away.
    pub fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
