//! What tells two data sets or two sets of base weights apart.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::checkpoint::{Checkpoint, weight_files};
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
    let config = dir.join("adapter_config.json");
    let named = ["adapter_model.safetensors", "adapter_model.bin"]
        .map(|name| dir.join(name))
        .into_iter()
        .find(|path| path.exists());
    let paths = match named {
        Some(path) if config.exists() => vec![path],
        // A folder of the official P-Tuning scripts.
        _ => weight_files(dir)?,
    };
    let weights = paths
        .iter()
        .map(|path| of_file(path))
        .collect::<Result<Vec<_>>>()?;
    let config = std::fs::read(config).unwrap_or_default();
    Ok(of_bytes(|hash| {
        weights.iter().for_each(|weights| hash(weights.as_bytes()));
        hash(&config);
    }))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_adapter_folder_has_a_fingerprint() {
        let dir = tempfile::tempdir().unwrap();
        let folder = |name: &str, files: &[(&str, &str)]| {
            let folder = dir.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            for (file, content) in files {
                std::fs::write(folder.join(file), content).unwrap();
            }
            of_adapter(&folder)
        };
        let index = r#"{"weight_map": {"a": "1.bin", "b": "2.bin"}}"#;
        let name = "pytorch_model.bin.index.json";
        let sharded = folder("sharded", &[(name, index), ("1.bin", "A"), ("2.bin", "B")]).unwrap();
        let other = folder("other", &[(name, index), ("1.bin", "A"), ("2.bin", "C")]).unwrap();
        assert_ne!(sharded, other, "every shard counts");
        let whole = folder("whole", &[("model.safetensors", "A")]).unwrap();
        assert_eq!(folder("bin", &[("pytorch_model.bin", "A")]).unwrap(), whole);
        let peft = [("adapter_model.safetensors", "A"), ("adapter_config.json", "{}")];
        assert_ne!(folder("peft", &peft).unwrap(), whole, "its configuration counts");
        assert!(folder("empty", &[]).is_err());
    }
}
