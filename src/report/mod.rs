//! What a run leaves for people to look at: TensorBoard event files while it trains, `run.json` that says what it was,
//! and one `report.html` made of what its folder holds.
//!
//! | file of a run | written by | read here |
//! |---|---|---|
//! | `run.json` | the loop, as a [`RunRecord`] | must be there |
//! | `metrics.jsonl` | the loop, one object per logged step | must be there |
//! | `samples.jsonl` | the loop, one [`Sample`] a line | if it is there |
//! | `run.toml` | the loop, the resolved configuration | if it is there |
//!
//! The room knows nothing of models and training: it works on any folder with these files, also on another machine.

mod answers;
mod curves;
mod escape;
mod event;
mod figures;
mod folder;
mod html;
mod number;
mod overview;
mod record;
mod scale;
mod series;
mod tables;
mod tensorboard;
mod trace;

use std::fs;
use std::path::{Path, PathBuf};

pub use curves::{Chart, Size};
pub use folder::RunFiles;
pub use record::{
    Best, Digest, MAX_FORMAT, Memory, MemoryPart, Parameters, Program, RunRecord, Sample, Status, Times,
    Warning,
};
pub use series::{Point, Series, read_metrics};
pub use tensorboard::EventWriter;

use crate::checkpoint::atomic;
use crate::error::{Error, Result};

/// The weight of the past in the smoothed curves, as TensorBoard's slider starts.
pub const SMOOTHING: f64 = 0.6;

/// Writes `report.html` into the folder of a run and returns its path.
///
/// The file depends on nothing but the files of the folder: equal folders give equal bytes.
///
/// # Errors
/// The folder is not that of a run, one of its files is damaged, or the report cannot be written.
pub fn write(run_dir: &Path) -> Result<PathBuf> {
    let output = run_dir.join("report.html");
    write_to(&RunFiles::read(run_dir)?, &output, SMOOTHING)?;
    Ok(output)
}

/// Writes the report of `run` to `output`, with curves smoothed by `smoothing` (`0 <= smoothing < 1`; 0: not at all).
///
/// # Errors
/// The report cannot be written.
pub fn write_to(run: &RunFiles, output: &Path, smoothing: f64) -> Result<()> {
    atomic::write(output, html::page(run, smoothing).as_bytes())
}

/// Writes every curve of `run` as a file of its own into `dir` (`loss.svg`, `learning_rate.svg`, `grad_norm.svg`, ...)
/// and returns the paths.
///
/// # Errors
/// The folder cannot be made or written.
pub fn write_svgs(run: &RunFiles, dir: &Path, smoothing: f64) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    let charts = figures::charts(&run.series, &run.record);
    charts
        .iter()
        .map(|chart| {
            let path = dir.join(format!("{}.svg", chart.name()));
            atomic::write(&path, chart.document(Size::WIDE, smoothing).as_bytes())?;
            Ok(path)
        })
        .collect()
}
