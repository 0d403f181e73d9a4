//! Models for other programs: adapters merged into the base, written in the formats that people's tools read, and each file read
//! back and compared with what it was made from.
//!
//! Everything works on a [`Source`](crate::checkpoint::Source): a weight at a time from the base through the adapters into the
//! file, so that host memory holds one tensor and not a model.

pub mod bnb;
pub mod card;
pub mod ggml;
pub mod huggingface;
pub mod merged;
pub mod peft;
pub mod thudm;
pub mod verify;

/// Told of every step: bytes written, bytes in all, the tensor or file at hand. Its error ends the work and leaves nothing behind.
pub type Progress<'a> = dyn FnMut(u64, u64, &str) -> crate::error::Result<()> + 'a;
