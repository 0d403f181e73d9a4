//! A training run from configuration to adapter.

mod fingerprint;
mod folder;
mod inputs;
mod interrupt;
mod metrics;
mod progress;
mod run;
mod scale;
mod state;
mod steps;
mod trainer;

pub use fingerprint::of_weights;
pub use folder::RunFolder;
pub use inputs::Inputs;
pub use interrupt::Interrupt;
pub use metrics::Metrics;
pub use progress::{Progress, StepLine, clock, preparing_weights};
pub use run::{Summary, run};
pub use scale::LossScale;
pub use state::{Checkpoints, OPTIMIZER, RunState};
pub use trainer::{Options, StepReport, Trainer};
