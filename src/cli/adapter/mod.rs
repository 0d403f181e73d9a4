//! `glmtune adapter`: look into adapters, and calculate with them.

mod chart;
mod look;
mod make;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};

use crate::adapter::Adapter;
use crate::error::{Error, Result};
use crate::model::tune::{self, Loaded};

/// Look into adapters, and calculate with them
#[derive(Debug, Args)]
pub struct AdapterArgs {
    #[command(subcommand)]
    command: AdapterCommand,
}

#[derive(Debug, Subcommand)]
enum AdapterCommand {
    /// Norms, ranks and a chart: where an adapter changes its base, and how much
    Inspect(InspectArgs),
    /// How far two adapters are apart
    Diff(DiffArgs),
    /// Make an adapter weaker or stronger
    Scale(ScaleArgs),
    /// Add adapters with weights
    Add(AddArgs),
    /// Bring an adapter to a lower rank, and say what that costs
    Resize(ResizeArgs),
}

#[derive(Debug, Args)]
struct InspectArgs {
    /// Adapter folder
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    /// Base model folder: changes are told relative to its weights
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct DiffArgs {
    /// Adapter folder
    #[arg(value_name = "A")]
    first: PathBuf,
    /// Another one
    #[arg(value_name = "B")]
    second: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Where a new adapter goes.
#[derive(Debug, Args)]
struct OutputArgs {
    /// Folder to write: adapter_config.json and adapter_model.safetensors
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Replace an adapter that is there
    #[arg(long)]
    overwrite: bool,
}

#[derive(Debug, Args)]
struct ScaleArgs {
    /// Adapter folder
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    /// 0 is the base, 1 the adapter as it is
    #[arg(long, value_name = "F", allow_negative_numbers = true)]
    factor: f64,
    #[command(flatten)]
    output: OutputArgs,
}

/// How adapters are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    /// Exactly: ranks add up
    Cat,
    /// The nearest adapter of rank --rank
    Svd,
}

#[derive(Debug, Args)]
struct AddArgs {
    /// Adapter folders
    #[arg(value_name = "DIR", required = true, num_args = 1..)]
    adapters: Vec<PathBuf>,
    /// A weight for each, e.g. 0.5,0.5 [default: 1 for each]
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        allow_negative_numbers = true
    )]
    weights: Vec<f64>,
    /// How
    #[arg(long, value_enum, default_value = "cat")]
    method: Method,
    /// Rank of the sum with --method svd [default: the highest of the adapters]
    #[arg(long, value_name = "R")]
    rank: Option<usize>,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Debug, Args)]
struct ResizeArgs {
    /// Adapter folder
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    /// The new rank
    #[arg(
        long,
        value_name = "R",
        required_unless_present = "error",
        conflicts_with = "error"
    )]
    rank: Option<usize>,
    /// Instead of a rank: in each linear the lowest rank with at most this error, relative to the update's norm
    #[arg(long, value_name = "E")]
    error: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs `glmtune adapter`.
///
/// # Errors
/// Files that cannot be used or written; adapters that cannot be calculated with, with the reason.
pub fn run(args: &AdapterArgs) -> Result<()> {
    match &args.command {
        AdapterCommand::Inspect(args) => look::inspect(args),
        AdapterCommand::Diff(args) => look::diff(args),
        AdapterCommand::Scale(args) => make::scale(args),
        AdapterCommand::Add(args) => make::add(args),
        AdapterCommand::Resize(args) => make::resize(args),
    }
}

/// Opens a LoRA adapter.
fn open(dir: &Path) -> Result<Adapter> {
    // A folder that is missing is the reader's to name.
    if dir.is_dir()
        && !dir.join("adapter_config.json").exists()
        && matches!(tune::adapter_kind(dir), Ok(Loaded::Prefix(_)))
    {
        let remedy = "a prefix has no low-rank factors: `glmtune inspect` shows what it holds";
        return Err(Error::input(
            dir.display(),
            "a prefix of P-Tuning v2",
            "a LoRA adapter",
            remedy,
        ));
    }
    Adapter::read(dir)
}

/// `3 attention.dense` for `transformer.layers.3.attention.dense`.
fn short(module: &str) -> String {
    let short = module.strip_prefix("transformer.layers.").unwrap_or(module);
    short.replacen('.', " ", 1).escape_debug().to_string()
}
