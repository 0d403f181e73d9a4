//! `glmtune bench`: what this program makes of the hardware, beside what the hardware could do.
//!
//! Everything measured goes through [`crate::ops`] or above it, as in training: launch geometry, checks and device memory are
//! those of the product. Inputs are random: a processor is faster on zeros. Nothing here decides what is right (tests do) or
//! fast enough: it prints numbers with their spread.

mod decode;
mod files;
mod inputs;
pub mod kernels;
mod measure;
mod memory;
mod report;
mod train;

pub use decode::{DecodeReport, DecodeSettings, decode};
pub use files::{FilesReport, FilesSettings, files};
pub use inputs::model_config;
pub use kernels::{KernelSettings, kernels};
pub use measure::Protocol;
pub use memory::{MemoryReport, MemorySettings, memory};
pub use report::{KernelReport, Row, machine};
pub use train::{TrainReport, TrainSettings, train};
