//! `glmtune report`: one HTML file that shows a run.

use std::path::PathBuf;

use clap::Args;

use crate::error::Result;
use crate::report::{RunFiles, SMOOTHING, write_svgs, write_to};

/// Show a run: its curves, samples, metrics and warnings in one HTML file that needs no network
#[derive(Debug, Args)]
pub struct ReportArgs {
    /// Folder of a run: what --output named when training
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// File to write [default: RUN/report.html]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write every curve as an SVG file into this folder as well
    #[arg(long, value_name = "DIR")]
    pub svg: Option<PathBuf>,
    /// Smoothing of the curves, from 0 (none) to below 1; the values themselves are always shown
    #[arg(long, value_name = "W", default_value_t = SMOOTHING, value_parser = smoothing)]
    pub smoothing: f64,
}

/// Runs `glmtune report`.
///
/// # Errors
/// The folder is not that of a run, a file of it is damaged, or the report cannot be written.
pub fn run(args: &ReportArgs) -> Result<()> {
    let run = RunFiles::read(&args.run)?;
    let output = args
        .output
        .clone()
        .unwrap_or_else(|| args.run.join("report.html"));
    write_to(&run, &output, args.smoothing)?;
    println!("{}", output.display());
    if let Some(dir) = &args.svg {
        for path in write_svgs(&run, dir, args.smoothing)? {
            println!("{}", path.display());
        }
    }
    Ok(())
}

/// `0 <= W < 1`.
fn smoothing(text: &str) -> std::result::Result<f64, String> {
    match text.parse::<f64>() {
        Ok(weight) if (0.0..1.0).contains(&weight) => Ok(weight),
        _ => Err("expected a number from 0 to below 1".into()),
    }
}
