//! What tells two data sets or two sets of base weights apart.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};

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

/// Of a whole file.
///
/// # Errors
/// It cannot be read.
pub fn of_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io(path, "open"))?;
    let mut hash = Sha256::new();
    let mut part = vec![0; 1 << 20];
    loop {
        match file.read(&mut part).map_err(Error::io(path, "read"))? {
            0 => return Ok(hex(hash)),
            n => hash.update(&part[..n]),
        }
    }
}

/// Of an adapter folder: its weights, whichever file holds them, and what its configuration makes of them.
///
/// # Errors
/// There are none, or they cannot be read.
pub fn of_adapter(dir: &Path) -> Result<String> {
    let names = [
        "adapter_model.safetensors",
        "adapter_model.bin",
        "pytorch_model.bin",
    ];
    let path = names
        .map(|name| dir.join(name))
        .into_iter()
        .find(|path| path.exists());
    let weights = of_file(&path.unwrap_or_else(|| dir.join(names[0])))?;
    let config = std::fs::read(dir.join("adapter_config.json")).unwrap_or_default();
    Ok(of_bytes(|hash| {
        hash(weights.as_bytes());
        hash(&config);
    }))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
