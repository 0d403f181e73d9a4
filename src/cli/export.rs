//! `glmtune export`: a model in the format of another program.

mod target;

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;

pub use self::target::FormatArg;
use self::target::{Form, Target};
use super::quantize::QuantizeProgress;
use super::sources::{Inputs, SourceArgs};
use super::verification::{Verification, VerifyArgs};
use crate::checkpoint::ggml::GgmlFile;
use crate::checkpoint::{Checkpoint, PartialFolder, Source, check_output};
use crate::error::{Error, Result};
use crate::export::card::{self, Card};
use crate::export::merged::{Held, Merged};
use crate::export::verify::{Rounding, Subject, Verified};
use crate::export::{Progress, bnb, ggml, peft, thudm};
use crate::model::tune::{self, Loaded, Merger};
use crate::quant::GgmlType;
use crate::tensor::DType;
use crate::train::{Interrupt, TrainedOn};

/// Write a model, with or without adapters, in the format of another program
///
/// The result is read back and compared with what it was made from before it gets its name.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Base and adapters
    #[command(flatten)]
    pub sources: SourceArgs,
    /// Format to write
    #[arg(long, value_enum)]
    pub format: FormatArg,
    /// Type of the matrices. ggml: f32, f16, q8_0, q5_1, q5_0, q4_1 or q4_0 [default: q4_0]; bnb: nf4 or fp4 [default: nf4, or
    /// what the model is in]
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Option<String>,
    /// bnb: keep the block scales in 32 bits (4.5 bits a weight instead of 4.13)
    #[arg(long)]
    pub no_double_quant: bool,
    /// File (ggml) or folder to write
    #[arg(long, value_name = "PATH")]
    pub output: PathBuf,
    /// Replace what glmtune wrote to --output before
    #[arg(long)]
    pub overwrite: bool,
    /// How the result is compared
    #[command(flatten)]
    pub verify: VerifyArgs,
}

/// Runs `glmtune export`.
///
/// # Errors
/// Files that cannot be used or written; a result that is not what it was made from.
pub fn run(args: &ExportArgs) -> Result<()> {
    target::check(args.format, args.kind.as_deref(), args.no_double_quant)?;
    for dir in &args.sources.adapter {
        refuse_prefix(args.format, dir)?;
    }
    let inputs = args.sources.open()?;
    let form = Form::of(&inputs)?;
    let target = Target::new(args, &inputs, &form)?;
    let output: PathBuf = args.output.components().collect();
    check(&target, &output, &inputs, args.overwrite)?;
    // A prefix that goes through is no change of weights, and there is nothing to compare.
    let weights = |dir: &PathBuf| !matches!(tune::adapter_kind(dir), Ok(Loaded::Prefix(_)));
    let merger = match args.sources.adapter.iter().all(weights) && !args.sources.adapter.is_empty() {
        true => Some(inputs.merger()?),
        false => None,
    };
    let export = Export {
        args,
        verification: args.verify.prepare(&args.sources.model, inputs.base.config())?,
        interrupt: Interrupt::listen()?,
        start: Instant::now(),
        inputs,
        merger,
        form,
        target,
        output,
    };
    export.run()
}

/// A prefix of P-Tuning is no change of weights; only `--format peft` knows what to do with one.
fn refuse_prefix(format: FormatArg, dir: &Path) -> Result<()> {
    if format == FormatArg::Peft || !matches!(tune::adapter_kind(dir), Ok(Loaded::Prefix(_))) {
        return Ok(());
    }
    let reason = match format {
        FormatArg::Ggml => {
            "chatglm.cpp reads no keys and values of a prefix for ChatGLM-6B, only for ChatGLM2 and later"
        }
        _ => "a prefix has no weight that it could be added to",
    };
    Err(Error::input(
        dir.display(),
        format!("a prefix of P-Tuning v2: {reason}"),
        "a LoRA adapter",
        "use the prefix with `glmtune chat --adapter`, or train LoRA to export",
    ))
}

/// What lies where the result shall go.
fn check(target: &Target, output: &Path, inputs: &Inputs, overwrite: bool) -> Result<()> {
    if !matches!(target, Target::Ggml(_)) {
        return check_output(output, &inputs.folders(), overwrite);
    }
    let wrong = |path: &Path, found: &str, remedy: &str| {
        Err(Error::input(
            path.display(),
            found,
            "the name of a file to write",
            remedy,
        ))
    };
    if output.is_dir() {
        return wrong(
            output,
            "a folder",
            "give --output the name of a file, such as model.bin",
        );
    }
    if output.exists() && !GgmlFile::recognizes(output) {
        return wrong(output, "another file than one of GGML", "give another --output");
    }
    let card = card_of(output);
    let text = std::fs::read_to_string(&card).unwrap_or_default();
    if card.exists() && !text.contains("\n- glmtune\n") {
        return wrong(
            &card,
            "a file that is no model card",
            "move it away, or give another --output",
        );
    }
    for path in [output.to_path_buf(), card] {
        if path.exists() && !overwrite {
            return wrong(
                &path,
                "a file",
                "give --overwrite to replace it, or another --output",
            );
        }
    }
    Ok(())
}

/// The model card beside a file.
fn card_of(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".md");
    PathBuf::from(name)
}

/// An export that waits to be done: everything was checked, nothing is written.
struct Export<'a> {
    args: &'a ExportArgs,
    inputs: Inputs,
    merger: Option<Merger>,
    form: Form,
    target: Target,
    output: PathBuf,
    verification: Option<Verification>,
    interrupt: Interrupt,
    start: Instant,
}

impl Export<'_> {
    fn run(&self) -> Result<()> {
        self.say();
        if self.target == Target::Peft {
            // An adapter goes into nothing: it stays what it is on what it was trained on.
            return self.adapter(&self.inputs.held(self.inputs.trained)?);
        }
        let held = self.inputs.held(self.inputs.into)?;
        let merged;
        let source: &dyn Source = match &self.merger {
            Some(merger) => {
                // A file in float32 is not to lose what float16 cannot hold.
                let dtype = (self.target == Target::Ggml(GgmlType::F32)).then_some(DType::F32);
                merged = Merged::new(&held, merger, dtype);
                &merged
            }
            None => &held,
        };
        match self.target {
            Target::Ggml(kind) => self.file(source, kind),
            _ => self.folder(source),
        }
    }

    /// A GGML file.
    fn file(&self, source: &dyn Source, kind: GgmlType) -> Result<()> {
        let written = self.progress(|progress| {
            ggml::write(source, &self.args.sources.model, &self.output, kind, progress)
        })?;
        // What was written counts, not what was meant.
        let result = written.open()?;
        let bytes = result.bytes();
        let verified = self.verify(&Subject::plain(&result), source)?;
        drop(result);
        written.commit()?;
        let name = file_name(&self.output);
        self.card(&card_of(&self.output), &[(name, bytes)], verified.as_ref())?;
        self.done(bytes);
        Ok(())
    }

    /// A model folder.
    fn folder(&self, source: &dyn Source) -> Result<()> {
        let folder = PartialFolder::create(&self.output)?;
        let (model, dir) = (self.args.sources.model.as_path(), folder.dir());
        self.progress(|progress| match self.target {
            Target::Thudm(bits) => thudm::write(source, model, dir, bits, progress),
            Target::Bnb {
                quant_type,
                double_quant,
            } => bnb::write(source, model, dir, quant_type, double_quant, progress),
            Target::Ggml(_) | Target::Peft => Ok(()),
        })?;
        let result = Checkpoint::open(folder.dir())?;
        result.validate()?;
        let verified = self.verify(&Subject::plain(&result), source)?;
        drop(result);
        self.commit(folder, verified.as_ref())
    }

    /// The adapters as one folder that every version of PEFT loads.
    fn adapter(&self, held: &Held<'_>) -> Result<()> {
        let strengths = self.inputs.strengths();
        if let Some(first) = self.inputs.before().first() {
            return Err(Error::input(
                strengths.first().map_or(Path::new(""), |s| s.dir).display(),
                format!(
                    "an adapter of a base into which {} had been merged",
                    first.display()
                ),
                "one of the base as it is stored, which is all that PEFT is told",
                "write the whole model with `glmtune merge`",
            ));
        }
        let folder = PartialFolder::create(&self.output)?;
        let written = peft::write(&strengths, Some(&self.args.sources.model), folder.dir())?;
        println!("{written}");
        if let Some(run) = strengths.iter().find_map(|s| TrainedOn::find(s.dir).transpose()) {
            run?.write_note(folder.dir())?;
        }
        let verified = match &self.merger {
            None => None,
            Some(_) => {
                let whole = tune::Strength {
                    dir: folder.dir(),
                    factor: 1.0,
                };
                let exported = Merger::open(held.config(), &[whole])?;
                let result = Subject {
                    source: held,
                    adapters: Some(&exported),
                };
                self.verify(&result, held)?
            }
        };
        self.commit(folder, verified.as_ref())
    }

    fn commit(&self, folder: PartialFolder, verified: Option<&Verified>) -> Result<()> {
        let files = files(folder.dir());
        let bytes = files.iter().map(|(_, bytes)| bytes).sum();
        self.card(&folder.dir().join("README.md"), &files, verified)?;
        folder.commit(&self.output)?;
        self.done(bytes);
        Ok(())
    }

    /// What goes into what.
    fn say(&self) {
        let inputs = &self.inputs;
        for dir in inputs.before() {
            eprintln!(
                "before: {} (it was in the base that was trained on)",
                dir.display()
            );
        }
        for strength in inputs.strengths() {
            eprintln!("adapter: {} times {}", strength.dir.display(), strength.factor);
        }
        if self.merger.is_some() && self.target != Target::Peft {
            eprintln!("into: {}", inputs.in_words());
        }
        if self.form.is_rounded() && self.target.rounds() && !self.keeps_bits() {
            eprintln!(
                "note: linears that are in few bits are decoded and rounded a second time; a float16 base would be rounded once"
            );
        }
    }

    /// Do the linears go through in the few bits that they are in?
    fn keeps_bits(&self) -> bool {
        self.merger.is_none() && self.form.is_kept_by(self.target)
    }

    fn progress<T>(&self, work: impl FnOnce(&mut Progress<'_>) -> Result<T>) -> Result<T> {
        let mut bar = QuantizeProgress::of("exporting");
        let done = work(&mut |done, total, name| {
            bar.update(done, total, name);
            self.interrupt.check(0)
        });
        bar.finish();
        done
    }

    /// Compares the result with the base as it was trained on and the adapters alive on it.
    fn verify(&self, result: &Subject<'_>, source: &dyn Source) -> Result<Option<Verified>> {
        self.interrupt.check(0)?;
        let Some(verification) = &self.verification else {
            return Ok(None);
        };
        let trained = self.inputs.held(self.inputs.trained)?;
        let reference = Subject {
            source: &trained,
            adapters: self.merger.as_ref(),
        };
        let mut roundings = Vec::new();
        if self.target != Target::Peft {
            if self.merger.is_some() {
                roundings.push(Rounding::of_floats(source)?);
            }
            if !self.keeps_bits() {
                roundings.extend(self.target.rounding());
            }
            if self.inputs.into != self.inputs.trained {
                roundings.push(Rounding::AnotherBase);
            }
        }
        let verified = verification.run(&reference, result, &roundings, &self.output, &self.interrupt)?;
        self.interrupt.check(0)?;
        Ok(Some(verified))
    }

    fn card(&self, path: &Path, files: &[(String, u64)], verified: Option<&Verified>) -> Result<()> {
        let card = Card {
            title: &file_name(&self.output),
            base: &self.args.sources.model,
            config: self.inputs.base.config(),
            adapters: &self.inputs.strengths(),
            weights: &self.inputs.in_words(),
            format: &self.target.in_words(),
            loads: self.target.loads(),
            files,
            verified,
        };
        card::write(path, &card)
    }

    fn done(&self, bytes: u64) {
        println!(
            "{}: written ({}, {}, {:.1} s)",
            self.output.display(),
            self.target.in_words(),
            indicatif::HumanBytes(bytes),
            self.start.elapsed().as_secs_f64()
        );
    }
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

/// The files of a folder with their sizes, by name; not those with a dot before.
fn files(dir: &Path) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<(String, u64)> = entries
        .filter_map(|entry| {
            Some((
                entry.file_name().to_string_lossy().into_owned(),
                entry.metadata().ok()?.len(),
            ))
        })
        .filter(|(name, _)| !name.starts_with('.'))
        .collect();
    files.sort();
    files
}
