//! `glmtune chat`: a conversation in the terminal, or one line per turn from a pipe.

mod command;
mod conversation;
mod editor;
mod speaker;
mod talk;

use std::io::IsTerminal;

use clap::Args;

use crate::error::{Error, Result};

use super::generation::{ModelArgs, SamplingArgs};
use editor::{Editor, Pipe, history_file};
use speaker::Machine;
use talk::Talk;

/// Talk to a model, with or without an adapter
#[derive(Debug, Args)]
pub struct ChatArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Keep no lines for the next time, and take none from the last
    #[arg(long)]
    no_history: bool,
}

/// Runs `glmtune chat`.
///
/// # Errors
/// Files that cannot be used, logits that are not finite, output that cannot be written.
pub fn run(args: ChatArgs) -> Result<()> {
    let config = args.sampling.config()?;
    let mut machine = Machine::load(args.model)?;
    let mut output = std::io::stdout().lock();
    let mut talk = Talk::new(&mut machine, &mut output, config);
    let input = std::io::stdin();
    if !input.is_terminal() {
        return talk.run(&mut Pipe::new(input.lock()));
    }
    listen().map_err(|e| Error::Usage(format!("cannot listen for Ctrl-C: {e}")))?;
    let history = match args.no_history {
        true => None,
        false => history_file(),
    };
    eprintln!("Ask something. /help lists the commands, Ctrl-D leaves.");
    talk.run(&mut Editor::new(history)?)
}

/// Listens for Ctrl-C alone: SIGTERM and SIGHUP end the program as they end any. (The crate `ctrlc` would not tell them apart.)
#[cfg(unix)]
fn listen() -> std::io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGINT])?;
    std::thread::Builder::new()
        .name("ctrl-c".into())
        .spawn(move || signals.forever().for_each(|_| stop()))?;
    Ok(())
}

#[cfg(not(unix))]
fn listen() -> std::result::Result<(), ctrlc::Error> {
    ctrlc::set_handler(stop)
}

/// Ends the answer under way, or the program: the terminal is as it was while an answer is made.
fn stop() {
    if !speaker::stop_answer() {
        eprintln!();
        std::process::exit(130);
    }
}
