//! What `merge`, `export` and `verify` share: whether and how a result is compared with what it was made from.

use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::generate::ColumnArgs;
use crate::compute;
use crate::error::{Error, Result};
pub use crate::export::verify::Verified;
use crate::export::verify::{BUILT_IN, Bound, Prompts, Rounding, Subject, compare};
use crate::model::ModelConfig;
use crate::tensor::Compute;
use crate::tokenizer::Tokenizer;
use crate::train::Interrupt;

/// As many records of the user's own are enough to find a result that is not what it should be.
const RECORDS: usize = 64;

/// How to compare the result with what it was made from.
#[derive(Debug, Args)]
#[command(next_help_heading = "Verification")]
pub struct VerifyArgs {
    /// Do not compare the result with what it was made from
    #[arg(long)]
    pub no_verify: bool,
    /// Compare on N prompts [default: 16 built-in ones, or the first 64 records of --verify-data]
    #[arg(long, value_name = "N", conflicts_with = "no_verify", value_parser = clap::value_parser!(u32).range(1..))]
    pub verify_prompts: Option<u32>,
    /// Compare on these records (.json or .jsonl), and measure the loss on their answers
    #[arg(long, value_name = "FILE", conflicts_with = "no_verify")]
    pub verify_data: Option<PathBuf>,
    /// The largest difference of a logit that is let pass [default: what the format explains, by the spread of the logits]
    #[arg(
        long,
        value_name = "X",
        conflicts_with = "no_verify",
        allow_negative_numbers = true
    )]
    pub verify_bound: Option<f64>,
    /// Where to compare: auto (the first CUDA device, else the CPU), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Compute type of the comparison: fp32, or bf16 or fp16 on a CUDA device
    #[arg(long, value_name = "TYPE", default_value = "fp32")]
    pub dtype: String,
}

/// A comparison that waits for its result.
#[derive(Debug)]
pub struct Verification {
    prompts: Prompts,
    /// The user's own records.
    data: Option<PathBuf>,
    compute: Compute,
    bound: Option<f64>,
}

impl VerifyArgs {
    /// Reads what is needed, before anything is written: wrong flags and files end the work here. `None` with `--no-verify`.
    /// `model` is the folder of the tokenizer.
    ///
    /// # Errors
    /// A flag out of range, data that cannot be read, a tokenizer of another model, no such device.
    pub fn prepare(&self, model: &Path, config: &ModelConfig) -> Result<Option<Verification>> {
        if self.no_verify {
            return Ok(None);
        }
        if let Some(bound) = self
            .verify_bound
            .filter(|bound| !bound.is_finite() || *bound < 0.0)
        {
            return Err(Error::Usage(format!(
                "--verify-bound: found {bound}, expected a difference of logits, at least 0"
            )));
        }
        let compute = compute::choose(&self.device, &self.dtype)?;
        let tokenizer = Tokenizer::open(model)?;
        tokenizer.check(config)?;
        let longest = config.max_sequence_length;
        let count = self.verify_prompts.map(|n| n as usize);
        let prompts = match &self.verify_data {
            Some(path) => {
                let columns = ColumnArgs::default().columns();
                Prompts::read(path, &columns, &tokenizer, longest, count.unwrap_or(RECORDS))?
            }
            None => Prompts::built_in(&tokenizer, longest, count.unwrap_or(BUILT_IN))?,
        };
        Ok(Some(Verification {
            prompts,
            data: self.verify_data.clone(),
            compute,
            bound: self.verify_bound,
        }))
    }
}

impl Verification {
    /// Compares a result with its reference and prints the table on standard output. `result` is read back from the file that was
    /// just written; `place` is its name for people; `roundings` are what may make it differ, besides the compute type.
    ///
    /// # Errors
    /// The result is further from the reference than the bound; a number that is none; weights that cannot be read; it was
    /// interrupted.
    pub fn run(
        &self,
        reference: &Subject<'_>,
        result: &Subject<'_>,
        roundings: &[Rounding],
        place: &Path,
        interrupt: &Interrupt,
    ) -> Result<Verified> {
        let bar = ProgressBar::new(1000);
        if let Ok(style) = ProgressStyle::with_template("verifying {bar:30} {percent}% {msg} eta {eta}") {
            bar.set_style(style);
        }
        let comparison = compare(
            reference,
            result,
            &self.prompts,
            self.compute,
            &mut |done, what| {
                bar.set_position((1000.0 * done) as u64);
                bar.set_message(what.to_string());
                interrupt.check(0)
            },
        );
        bar.finish_and_clear();
        let comparison = comparison?;
        let computed = Rounding::of_compute(self.compute.dtype);
        let roundings: Vec<Rounding> = roundings.iter().copied().chain(computed).collect();
        let verified = Verified {
            bound: match self.bound {
                Some(largest) => Bound::chosen(largest),
                None => Bound::of(comparison.spread, &roundings),
            },
            chosen: self.bound.is_some(),
            compute: computed_on(self.compute)?,
            comparison,
            data: self.data.clone(),
            roundings,
        };
        println!("{verified}");
        verified.check(place)?;
        Ok(verified)
    }
}

/// "the CPU, float32".
fn computed_on(Compute { device, dtype }: Compute) -> Result<String> {
    Ok(match compute::card(device)? {
        Some(card) => format!("{}, {dtype}", card.description.name),
        None => format!("the CPU, {dtype}"),
    })
}
