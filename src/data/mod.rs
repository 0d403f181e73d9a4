//! Records in every format, prompts, samples and batches.

pub mod batch;
pub mod collate;
pub mod loader;
pub mod preview;
pub mod record;
pub mod sample;
pub mod template;
