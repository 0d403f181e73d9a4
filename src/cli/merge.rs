//! `glmtune merge`: adapters into the weights of their base.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::quantize::QuantizeProgress;
use super::sources::{Inputs, SourceArgs};
use super::verification::{Verification, VerifyArgs};
use crate::checkpoint::{Checkpoint, PartialFolder, Source, WORD_EMBEDDINGS, check_output};
use crate::error::{Error, Result};
use crate::export::card::{self, Card, Loads};
use crate::export::merged::{Into, Merged};
use crate::export::verify::{Rounding, Subject, Verified};
use crate::export::{bnb, huggingface};
use crate::model::tune::Merger;
use crate::tensor::DType;
use crate::train::Interrupt;

/// Merge adapters into their base; writes a model folder
///
/// The result is read back and compared with base and adapters before it gets its name.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Base and adapters
    #[command(flatten)]
    pub sources: SourceArgs,
    /// Folder to write
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Type of the weights [default: as the base stores each of them]
    #[arg(long = "type", value_name = "TYPE", value_enum)]
    pub kind: Option<TypeArg>,
    /// Largest file of weights: 5GB, 900MB, 2GiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = shard_size)]
    pub shard_size: u64,
    /// Replace a model that glmtune wrote to --output before
    #[arg(long)]
    pub overwrite: bool,
    /// How the result is compared
    #[command(flatten)]
    pub verify: VerifyArgs,
}

/// What `--type` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TypeArg {
    /// float16
    Fp16,
    /// bfloat16
    Bf16,
    /// float32
    Fp32,
}

impl From<TypeArg> for DType {
    fn from(arg: TypeArg) -> Self {
        match arg {
            TypeArg::Fp16 => DType::F16,
            TypeArg::Bf16 => DType::BF16,
            TypeArg::Fp32 => DType::F32,
        }
    }
}

/// `5GB`: a number and B, kB, MB, GB (powers of 1000), KiB, MiB or GiB.
fn shard_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "b" | "" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err("expected a number with B, kB, MB, GB, KiB, MiB or GiB".into()),
    };
    match number.parse::<f64>() {
        Ok(number) if number * factor >= 1.0 && number * factor < 1e18 => Ok((number * factor) as u64),
        _ => Err("expected a size of at least one byte, such as 5GB".into()),
    }
}

/// Runs `glmtune merge`.
///
/// # Errors
/// Files that cannot be used or written; a result that is not what it was made from.
pub fn run(args: &MergeArgs) -> Result<()> {
    if args.sources.adapter.is_empty() {
        return Err(Error::Usage(
            "merge: found no --adapter, expected at least one; `glmtune export` writes a model without any"
                .into(),
        ));
    }
    let start = Instant::now();
    let inputs = args.sources.open()?;
    let output = without_slash(&args.output);
    check_output(&output, &inputs.folders(), args.overwrite)?;
    let merger = inputs.merger()?;
    if inputs.requantize && args.kind.is_some() {
        return Err(Error::Usage(
            "--type: found it with --into requantized, which has a type of its own; expected one of the two"
                .into(),
        ));
    }
    let held = inputs.held(inputs.into)?;
    let merged = Merged::new(&held, &merger, args.kind.map(DType::from));
    let verification = args.verify.prepare(&args.sources.model, inputs.base.config())?;
    say(&inputs, &merger);

    let interrupt = Interrupt::listen()?;
    let folder = PartialFolder::create(&output)?;
    let mut bar = QuantizeProgress::of("merging");
    let mut progress = |done: u64, total: u64, name: &str| {
        bar.update(done, total, name);
        interrupt.check(0)
    };
    let (base, dir) = (args.sources.model.as_path(), folder.dir());
    match (inputs.requantize, inputs.into) {
        (
            true,
            Into::Dequantized {
                quant_type,
                double_quant,
            },
        ) => bnb::write(&merged, base, dir, quant_type, double_quant, &mut progress)?,
        _ => huggingface::write(&merged, base, dir, None, args.shard_size, &mut progress)?,
    }
    bar.finish();
    // What was written counts, not what was meant.
    let result = Checkpoint::open(folder.dir())?;
    result.validate()?;
    let dtype = merged.dtype(WORD_EMBEDDINGS)?;
    let verified = match &verification {
        Some(verification) => {
            let roundings = roundings(&inputs, &merged)?;
            Some(verify(
                verification,
                &inputs,
                &merger,
                &result,
                &roundings,
                &output,
                &interrupt,
            )?)
        }
        None => None,
    };
    drop(result);
    interrupt.check(0)?;
    let files = files(dir);
    let bytes = files.iter().map(|(_, bytes)| bytes).sum();
    let (weights, format, loads) = in_words_of(&inputs, dtype);
    let card = Card {
        title: &output.file_name().unwrap_or_default().to_string_lossy(),
        base,
        config: inputs.base.config(),
        adapters: &inputs.strengths(),
        weights: &weights,
        format: &format,
        loads,
        files: &files,
        verified: verified.as_ref(),
    };
    card::write(&dir.join("README.md"), &card)?;
    folder.commit(&output)?;
    println!(
        "{}: written ({}, {:.1} s)",
        output.display(),
        indicatif::HumanBytes(bytes),
        start.elapsed().as_secs_f64()
    );
    println!("next: glmtune chat --model {}", output.display());
    Ok(())
}

/// What goes into what.
fn say(inputs: &Inputs, merger: &Merger) {
    for dir in inputs.before() {
        eprintln!(
            "before: {} (it was in the base that was trained on)",
            dir.display()
        );
    }
    for ((dir, config), strength) in merger.adapters().zip(inputs.strengths()) {
        let factor = match strength.factor {
            1.0 => String::new(),
            factor => format!(" times {factor}"),
        };
        eprintln!("adapter: {}{factor} (r {})", dir.display(), config.r);
    }
    let changed = merger.changed().count();
    eprintln!("into: {}, {changed} of its weights change", inputs.in_words());
}

/// What may make the result differ from what was trained.
fn roundings(inputs: &Inputs, merged: &Merged<'_>) -> Result<Vec<Rounding>> {
    let mut roundings = vec![match inputs.requantize {
        true => Rounding::Bits4,
        false => Rounding::of_floats(merged)?,
    }];
    if inputs.into != inputs.trained {
        roundings.push(Rounding::AnotherBase);
    }
    Ok(roundings)
}

/// What the card says: of the weights that the adapters were added to, of the format, and who reads it.
fn in_words_of(inputs: &Inputs, dtype: DType) -> (String, String, Loads) {
    let before: Vec<String> = inputs
        .before()
        .iter()
        .map(|dir| format!(", with {}", dir.display()))
        .collect();
    let weights = format!("{}{}", inputs.in_words(), before.concat());
    match inputs.into {
        Into::Dequantized { quant_type, .. } if inputs.requantize => {
            let format = format!("bitsandbytes {quant_type}");
            (weights, format, Loads::Bitsandbytes)
        }
        _ => (weights, format!("safetensors, {dtype}"), Loads::HuggingFace),
    }
}

/// Compares what was written with the base as it was trained on and the adapters alive on it.
fn verify(
    verification: &Verification,
    inputs: &Inputs,
    merger: &Merger,
    result: &Checkpoint,
    roundings: &[Rounding],
    output: &Path,
    interrupt: &Interrupt,
) -> Result<Verified> {
    let trained = inputs.held(inputs.trained)?;
    let reference = Subject {
        source: &trained,
        adapters: Some(merger),
    };
    verification.run(&reference, &Subject::plain(result), roundings, output, interrupt)
}

/// `out/` is the folder `out`.
fn without_slash(path: &Path) -> PathBuf {
    path.components().collect()
}

/// The files of a folder with their sizes, by name.
fn files(dir: &Path) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<(String, u64)> = entries
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.metadata().ok()?)))
        .filter(|(name, metadata)| metadata.is_file() && !name.starts_with('.'))
        .map(|(name, metadata)| (name, metadata.len()))
        .collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::huggingface::SHARD_BYTES;

    #[test]
    fn sizes_have_units() {
        assert_eq!(shard_size("5GB"), Ok(SHARD_BYTES));
        assert_eq!(shard_size("1.5 MiB"), Ok(3 << 19));
        assert_eq!(shard_size("700"), Ok(700));
        for bad in ["", "GB", "-1GB", "5 bytes", "0", "1e3", "nanGB"] {
            assert!(shard_size(bad).is_err(), "{bad}");
        }
    }
}
