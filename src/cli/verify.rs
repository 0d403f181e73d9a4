//! `glmtune verify`: a result that lies there already, beside what it was made from.

use std::path::PathBuf;

use clap::Args;

use super::sources::SourceArgs;
use super::verification::VerifyArgs;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::ggml::GgmlFile;
use crate::error::{Error, Result};
use crate::export::verify::{Rounding, Subject};
use crate::train::Interrupt;

/// Compare a merged or exported model with base and adapters, as `merge` and `export` do
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  glmtune verify merged --model chatglm-6b --adapter out/alpaca
  glmtune verify chatglm-q4_0.bin --model chatglm-6b --verify-data test.json")]
pub struct VerifyResultArgs {
    /// Model folder, or GGML file
    #[arg(value_name = "RESULT")]
    pub result: PathBuf,
    /// What it was made from
    #[command(flatten)]
    pub sources: SourceArgs,
    /// How it is compared
    #[command(flatten)]
    pub verify: VerifyArgs,
}

/// Runs `glmtune verify`.
///
/// # Errors
/// Files that cannot be used; a result that is further from base and adapters than the bound.
pub fn run(args: &VerifyResultArgs) -> Result<()> {
    let inputs = args.sources.open()?;
    let merger = inputs.merger()?;
    let Some(verification) = args.verify.prepare(&args.sources.model, inputs.base.config())? else {
        return Err(Error::Usage(
            "--no-verify: found it with `glmtune verify`, expected none of it".into(),
        ));
    };
    let trained = inputs.held(inputs.trained)?;
    let reference = Subject {
        source: &trained,
        adapters: (!args.sources.adapter.is_empty()).then_some(&merger),
    };
    let (checkpoint, ggml);
    let (result, rounding) = match GgmlFile::recognizes(&args.result) {
        true => {
            ggml = GgmlFile::open(&args.result)?;
            (Subject::plain(&ggml), Rounding::of_ggml(&ggml))
        }
        false => {
            checkpoint = Checkpoint::open(&args.result)?;
            checkpoint.validate()?;
            (Subject::plain(&checkpoint), Rounding::of(&checkpoint)?)
        }
    };
    let mut roundings = vec![rounding];
    if inputs.into != inputs.trained {
        roundings.push(Rounding::AnotherBase);
    }
    let interrupt = Interrupt::listen()?;
    verification.run(&reference, &result, &roundings, &args.result, &interrupt)?;
    Ok(())
}
