//! What `merge` and `export` start from: a base, adapters, and which form of the base they go into.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::export::merged::{Held, Into};
use crate::model::config::Linears;
use crate::model::tune::{Merger, Strength};
use crate::quant::QuantType;
use crate::train::{TrainedOn, base_fingerprint};

/// Which form of the base adapters go into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IntoArg {
    /// What the adapter was trained on: dequantized after QLoRA, original after LoRA
    Auto,
    /// The weights as they were published
    Original,
    /// What 4 bits leave of them, as floats: exactly what QLoRA trained on
    Dequantized,
    /// The same, rounded to 4 bits once more
    Requantized,
}

/// Base and adapters.
#[derive(Debug, Args)]
pub struct SourceArgs {
    /// Folder of the base model (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Folder of a trained LoRA adapter; give the flag again for each of several
    #[arg(long, value_name = "DIR")]
    pub adapter: Vec<PathBuf>,
    /// Multiplies an adapter's effect: 1 is as trained, 0 nothing of it; one for all, or one for each --adapter
    #[arg(
        long,
        value_name = "FACTOR",
        requires = "adapter",
        allow_negative_numbers = true
    )]
    pub adapter_scale: Vec<f64>,
    /// Which form of the base the adapters go into
    #[arg(long, value_enum, default_value = "auto")]
    pub into: IntoArg,
    /// Go on although the base is not the one that the adapter was trained on
    #[arg(long)]
    pub another_base: bool,
}

/// A base and adapters that belong to it.
pub struct Inputs {
    /// The base.
    pub base: Checkpoint,
    /// What the adapters were trained on.
    pub trained: Into,
    /// What they go into.
    pub into: Into,
    /// Shall the result be in 4 bits again?
    pub requantize: bool,
    adapters: Vec<(PathBuf, f64)>,
    /// Adapters that were merged into the base before these were trained.
    before: Vec<PathBuf>,
}

impl SourceArgs {
    /// Opens what the flags name, and finds out what the adapters were trained on.
    ///
    /// # Errors
    /// The flags contradict each other, or a folder is not what it should be: the base is incomplete or another one, adapters were
    /// trained on different forms of it.
    pub fn open(&self) -> Result<Inputs> {
        let adapters = self.strengths()?;
        refuse_adapter(&self.model)?;
        let base = Checkpoint::open(&self.model)?;
        base.validate()?;
        let mut trained: Vec<(&Path, TrainedOn)> = Vec::new();
        for dir in &self.adapter {
            if let Some(run) = TrainedOn::find(dir)? {
                trained.push((dir, run));
            }
        }
        let linears = base.config().linears();
        let few_bits = linears != Linears::Dense;
        if !self.another_base && !few_bits {
            for (dir, run) in &trained {
                check_base(&base, dir, run)?;
            }
        }
        let before = before(&trained, &self.adapter)?;
        let (forms, dequantized) = forms(&trained, few_bits);
        let first = forms.first().map_or(Into::Original, |(_, into)| *into);
        // Where nothing tells what it was, it was what the flag says.
        let own = match (forms.is_empty(), few_bits, self.into) {
            (true, true, _) => dequantized,
            (true, false, IntoArg::Dequantized | IntoArg::Requantized) => dequantized,
            _ => first,
        };
        if forms.is_empty() && !adapters.is_empty() && !few_bits {
            eprintln!(
                "note: nothing beside the adapter tells what it was trained on; taken for it: {} (--into says otherwise)",
                in_words(own, linears)
            );
        }
        if self.into == IntoArg::Auto
            && let Some((dir, _)) = forms.iter().find(|(_, into)| *into != first)
        {
            let found = format!(
                "one of {} and one of {}",
                in_words(first, linears),
                in_words(other(&forms, first), linears)
            );
            let expected = "adapters that were trained on one form of the base";
            let remedy = "say which one: --into original or --into dequantized";
            return Err(Error::input(dir.display(), found, expected, remedy));
        }
        let (into, requantize) = match self.into {
            IntoArg::Auto => (own, false),
            IntoArg::Original => (Into::Original, false),
            IntoArg::Dequantized => (dequantized, false),
            IntoArg::Requantized => (dequantized, true),
        };
        Ok(Inputs {
            base,
            trained: own,
            into,
            requantize,
            adapters,
            before,
        })
    }

    /// The adapters with their factors.
    fn strengths(&self) -> Result<Vec<(PathBuf, f64)>> {
        let (adapters, factors) = (&self.adapter, &self.adapter_scale);
        if factors.len() > 1 && factors.len() != adapters.len() {
            return Err(Error::Usage(format!(
                "--adapter-scale: found {} factors for {} adapters, expected one for all or one for each",
                factors.len(),
                adapters.len()
            )));
        }
        if let Some(bad) = factors.iter().find(|factor| !factor.is_finite()) {
            return Err(Error::Usage(format!(
                "--adapter-scale: found {bad}, expected a finite number; 1 is as trained"
            )));
        }
        let factor = |i: usize| factors.get(i).or(factors.first()).copied().unwrap_or(1.0);
        let named = adapters.iter().enumerate();
        Ok(named.map(|(i, dir)| (dir.clone(), factor(i))).collect())
    }
}

impl Inputs {
    /// The adapters with their factors.
    pub fn strengths(&self) -> Vec<Strength<'_>> {
        self.adapters
            .iter()
            .map(|(dir, factor)| Strength { dir, factor: *factor })
            .collect()
    }

    /// The adapters, opened.
    ///
    /// # Errors
    /// As [`Merger::open`].
    pub fn merger(&self) -> Result<Merger> {
        Merger::open(self.base.config(), &self.strengths())
    }

    /// The base in the form `into`, with the adapters that were merged into it before.
    ///
    /// # Errors
    /// As [`Held::new`] and [`Merger::open`].
    pub fn held(&self, into: Into) -> Result<Held<'_>> {
        let config = self.base.config();
        let whole = |dir: &PathBuf| Merger::open(config, &[Strength { dir, factor: 1.0 }]);
        let before: Result<Vec<Merger>> = self.before.iter().map(whole).collect();
        Held::new(&self.base, into, before?)
    }

    /// What is read from, each with what a message calls it: none of it may be written over.
    pub fn folders(&self) -> Vec<(&'static str, &Path)> {
        let adapters = self
            .adapters
            .iter()
            .map(|(dir, _)| ("the adapter itself", dir.as_path()));
        let before = self.before.iter();
        let before = before.map(|dir| ("an adapter that was merged before", dir.as_path()));
        [("the base model itself", self.base.dir())]
            .into_iter()
            .chain(adapters)
            .chain(before)
            .collect()
    }

    /// What the adapters go into, for people.
    pub fn in_words(&self) -> String {
        in_words(self.into, self.base.config().linears())
    }

    /// The adapters that were merged into the base before these were trained.
    pub fn before(&self) -> &[PathBuf] {
        &self.before
    }
}

/// For people. `linears` is how the base stores its linears: few bits stay what they are.
fn in_words(into: Into, linears: Linears) -> String {
    match (into, linears) {
        (Into::Original, _) => "the base as it is stored".to_string(),
        (Into::Dequantized { quant_type, .. }, Linears::Dense) => {
            format!("the base in 4 bits ({quant_type})")
        }
        (_, Linears::FourBit { .. }) => "the base in the 4 bits that it is stored in".to_string(),
        (_, Linears::RowInt4) => "the base in the int4 that it is stored in".to_string(),
        (_, Linears::RowInt8) => "the base in the int8 that it is stored in".to_string(),
    }
}

fn other(forms: &[(&Path, Into)], first: Into) -> Into {
    let other = forms.iter().find(|(_, into)| *into != first);
    other.map_or(first, |(_, into)| *into)
}

/// What each adapter with a `run.toml` was trained on; and the 4 bits that are meant if 4 bits are asked for.
fn forms<'a>(trained: &[(&'a Path, TrainedOn)], few_bits: bool) -> (Vec<(&'a Path, Into)>, Into) {
    let quantized = |run: &TrainedOn| Into::Dequantized {
        quant_type: run.quant_type,
        double_quant: run.double_quant,
    };
    let forms: Vec<_> = trained
        .iter()
        .map(|(dir, run)| match few_bits || run.four_bits && !run.pissa {
            true => (*dir, quantized(run)),
            false => (*dir, Into::Original),
        })
        .collect();
    let four = trained.iter().find(|(_, run)| run.four_bits);
    let usual = Into::Dequantized {
        quant_type: QuantType::Nf4,
        double_quant: true,
    };
    (forms, four.map_or(usual, |(_, run)| quantized(run)))
}

/// The adapters that were merged into the base before `adapters` were trained, the same for each of them.
fn before(trained: &[(&Path, TrainedOn)], adapters: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let Some((_, first)) = trained.first() else {
        return Ok(Vec::new());
    };
    let unequal = trained.iter().find(|(_, run)| run.merged != first.merged);
    let partly = !first.merged.is_empty() && trained.len() < adapters.len();
    if unequal.is_none() && !partly {
        return Ok(first.merged.clone());
    }
    let one = trained.iter().find(|(_, run)| !run.merged.is_empty());
    let (dir, merged) = one.map_or((trained[0].0, &first.merged), |(dir, run)| (*dir, &run.merged));
    let names: Vec<String> = merged.iter().map(|dir| dir.display().to_string()).collect();
    Err(Error::input(
        dir.display(),
        format!(
            "an adapter that was trained with {} in the base",
            names.join(", ")
        ),
        "adapters that were trained on one base",
        "merge it alone: what was in the base goes in by itself",
    ))
}

/// Shapes tell an adapter of another size apart, not one of another model of the same size.
fn check_base(base: &Checkpoint, adapter: &Path, run: &TrainedOn) -> Result<()> {
    match &run.base {
        Some(trained) if base_fingerprint(base, &run.merged)? != *trained => Err(Error::input(
            base.dir().display(),
            format!(
                "other weights than those that {} was trained on",
                adapter.display()
            ),
            "its base",
            "give --model that base, or --another-base to go on with this one",
        )),
        _ => Ok(()),
    }
}

/// Formats mixed up: an adapter, or a file, where a model folder should be.
fn refuse_adapter(model: &Path) -> Result<()> {
    let expected = "a model folder";
    let wrong = |found: &str, remedy: &str| Err(Error::input(model.display(), found, expected, remedy));
    if model.join("adapter_config.json").exists() {
        return wrong("an adapter", "give it with --adapter, and its base with --model");
    }
    if model.is_file() {
        let remedy = "give the Hugging Face folder that the file was made from";
        let mut start = [0; 4];
        let read =
            std::fs::File::open(model).and_then(|mut file| std::io::Read::read_exact(&mut file, &mut start));
        return match (read, &start) {
            (Ok(()), b"ggml") => wrong("a GGML file", remedy),
            (Ok(()), b"GGUF") => wrong("a GGUF file", remedy),
            _ => wrong("a file", remedy),
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_in_few_bits_is_named_by_those() {
        let into = Into::Dequantized {
            quant_type: QuantType::Nf4,
            double_quant: true,
        };
        assert_eq!(in_words(into, Linears::Dense), "the base in 4 bits (nf4)");
        for (linears, name) in [(Linears::RowInt8, "int8"), (Linears::RowInt4, "int4")] {
            let words = in_words(into, linears);
            assert!(words.contains(name) && !words.contains("nf4"), "{words}");
        }
        assert_eq!(
            in_words(Into::Original, Linears::Dense),
            "the base as it is stored"
        );
    }
}
