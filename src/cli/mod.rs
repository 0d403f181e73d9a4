//! The command line: flags in, exit code out. One file per subcommand.
// Doc comments of flags are help texts: they name special tokens plainly.
#![allow(rustdoc::invalid_html_tags, rustdoc::broken_intra_doc_links)]

pub mod adapter;
pub mod bench;
pub mod chat;
pub mod demo;
pub mod doctor;
pub mod eval;
pub mod export;
pub mod generate;
pub mod generation;
pub mod inspect;
pub mod merge;
pub mod plan;
pub mod quantize;
pub mod report;
pub mod sources;
pub mod synth;
pub mod train;
pub mod verification;
pub mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::{Error, Result};

/// Fine-tune ChatGLM-6B at home: QLoRA, LoRA, P-Tuning v2, freeze and full, from checkpoint to chat, in one binary.
#[derive(Debug, Parser)]
#[command(
    name = "glmtune",
    version,
    arg_required_else_help = true,
    propagate_version = true
)]
#[command(after_help = "New here? `glmtune demo` trains the built-in tiny model in about a minute.")]
pub struct Cli {
    /// CPU threads to use [default: GLMTUNE_THREADS, else every core]
    #[arg(long, global = true, value_name = "N", help_heading = "Machine")]
    threads: Option<usize>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fine-tune a checkpoint on your data; writes a PEFT adapter
    Train(Box<train::TrainArgs>),
    /// Say what a run would allocate, what fits a card, and what to change
    Plan(Box<plan::PlanArgs>),
    /// Measure a model on records with answers: loss, BLEU-4, ROUGE, classes, what it forgot
    Eval(Box<eval::EvalArgs>),
    /// Answer the prompts of a file, or one prompt
    Generate(generate::GenerateArgs),
    /// Talk to a model, with or without an adapter
    Chat(chat::ChatArgs),
    /// Merge adapters into their base; writes a model folder
    Merge(merge::MergeArgs),
    /// Write a model in the format of another program
    Export(export::ExportArgs),
    /// Compare a merged or exported model with base and adapters
    Verify(verify::VerifyResultArgs),
    /// Look into adapters, and calculate with them
    Adapter(adapter::AdapterArgs),
    /// Write a 4-bit copy of a checkpoint that training maps without quantising again
    Quantize(quantize::QuantizeArgs),
    /// Say what is in a checkpoint, adapter or cache
    Inspect(inspect::InspectArgs),
    /// Show a run: curves, samples, metrics and warnings in one HTML file
    Report(report::ReportArgs),
    /// Write a synthetic checkpoint with ChatGLM-6B's tensor names and shapes
    Synth(synth::SynthArgs),
    /// Measure speed and memory on this machine
    Bench(bench::BenchArgs),
    /// Say what this program can compute on here, and what is in the way
    Doctor(doctor::DoctorArgs),
    /// Train the built-in tiny model and show what it learned
    Demo(demo::DemoArgs),
}

/// Runs the program: parses the command line, runs the command, prints one line when it fails.
///
/// Exit codes: 0 done, 1 failed, 2 wrong command line, 130 interrupted.
pub fn main() -> ExitCode {
    leave_quietly_on_broken_pipe();
    let cli = Cli::parse();
    let result = set_threads(cli.threads).and_then(|()| run(cli.command));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error @ (Error::Interrupted { .. } | Error::Stopped(_))) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
        Err(error) => {
            eprintln!("error: {}", error.to_string().replace('\n', " "));
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Train(args) => train::run(*args),
        Command::Plan(args) => plan::run(*args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Merge(args) => merge::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Adapter(args) => adapter::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Synth(args) => synth::run(args),
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Demo(args) => demo::run(args),
    }
}

/// Sets the size of the thread pool: the flag, else `GLMTUNE_THREADS`, else every core.
fn set_threads(flag: Option<usize>) -> Result<()> {
    let threads = match (flag, std::env::var("GLMTUNE_THREADS")) {
        (Some(n), _) => Some(("--threads", n.to_string())),
        (None, Ok(text)) if !text.is_empty() => Some(("GLMTUNE_THREADS", text)),
        _ => None,
    };
    let Some((place, text)) = threads else {
        return Ok(());
    };
    let n = text
        .parse::<usize>()
        .ok()
        .filter(|n| (1..=1024).contains(n))
        .ok_or_else(|| {
            Error::Usage(format!(
                "{place}: found {text}, expected a whole number from 1 to 1024"
            ))
        })?;
    rayon::ThreadPoolBuilder::new()
        .num_threads(n)
        .build_global()
        .map_err(|e| Error::input(place, n, "a number of threads the system can start", e))
}

/// `glmtune ... | head` ends without a word when `head` has seen enough. `println!` panics when its reader is gone, and
/// every line of every command would have to be written another way to prevent that; so the panic itself is caught here.
fn leave_quietly_on_broken_pipe() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let message = info.payload().downcast_ref::<String>().map_or("", String::as_str);
        if message.starts_with("failed printing to std") && message.contains("Broken pipe") {
            std::process::exit(0);
        }
        usual(info);
    }));
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
