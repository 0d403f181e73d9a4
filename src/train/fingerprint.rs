//! What tells two data sets or two sets of base weights apart.

use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::error::Result;

/// Bytes hashed at the start, the middle and the end of each tensor.
const SAMPLE: usize = 4096;

/// Of base weights: every tensor's name, type, shape and a sample of its bytes. Training changes weights everywhere, so
/// 12 KB of each tensor tell two checkpoints apart without reading 12 GB.
///
/// # Errors
/// A tensor cannot be read.
pub fn of_weights(checkpoint: &Checkpoint) -> Result<String> {
    let mut names: Vec<&str> = checkpoint.names().collect();
    names.sort_unstable();
    let mut hash = Sha256::new();
    for name in names {
        let tensor = checkpoint.tensor(name)?;
        hash.update(format!("{name} {} {}\n", tensor.dtype(), tensor.shape()));
        let bytes = tensor.bytes();
        for start in [
            0,
            (bytes.len() / 2).saturating_sub(SAMPLE / 2),
            bytes.len().saturating_sub(SAMPLE),
        ] {
            hash.update(&bytes[start..(start + SAMPLE).min(bytes.len())]);
        }
    }
    Ok(hex(hash))
}

/// Of samples: everything `write` feeds in.
pub fn of_bytes(write: impl FnOnce(&mut dyn FnMut(&[u8]))) -> String {
    let mut hash = Sha256::new();
    write(&mut |bytes| hash.update(bytes));
    hex(hash)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
