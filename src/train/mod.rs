//! A training run from configuration to result.

mod best;
mod evaluation;
mod fingerprint;
mod folder;
mod in_backward;
mod inputs;
mod interrupt;
mod journal;
mod ladder;
mod lines;
mod method;
pub mod plan;
mod progress;
mod record;
mod result;
mod run;
mod scale;
mod start;
mod state;
mod steps;
mod trained_on;
mod trainer;
mod watch;

pub use best::BestSoFar;
pub use fingerprint::{
    of_adapter as adapter_fingerprint, of_bytes as bytes_fingerprint, of_file as file_fingerprint,
};
pub use folder::RunFolder;
pub use inputs::Inputs;
pub use interrupt::Interrupt;
pub use progress::{Progress, StepLine, clock, preparing_weights};
pub use run::{Summary, base_fingerprint, run};
pub use scale::LossScale;
pub use state::{Checkpoints, OPTIMIZER, RunState};
pub use trained_on::{NOTE, TrainedOn};
pub use trainer::{Options, StepReport, Trainer};
pub use watch::{Warning, Watch};
