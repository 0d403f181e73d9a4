//! What a 4-bit cache was made from: enough to notice any change of the source.
//!
//! Size, mtime and ctime are compared first: a program can set a file's mtime back but not its ctime. When one of them
//! moved, the SHA-256 of every file decides.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::UNIX_EPOCH;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// Files are hashed in pieces of this size.
const PIECE: usize = 1 << 20;

/// When a file last changed, as the file system says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// The file's name within the model folder.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Modification time in nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Change time in nanoseconds since 1970; `None` where the system keeps none.
    pub ctime_ns: Option<i64>,
}

/// One source file with its content's hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Name, size and times.
    #[serde(flatten)]
    pub stamp: Stamp,
    /// SHA-256 of the content in hexadecimal.
    pub sha256: String,
}

impl Stamp {
    /// Reads a file's stamp.
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(Error::io(path, "look at"))?;
        let modified = metadata.modified().map_err(Error::io(path, "look at"))?;
        let mtime_ns = match modified.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |ns| -ns),
        };
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        Ok(Self {
            name,
            size: metadata.len(),
            mtime_ns,
            ctime_ns: ctime_ns(&metadata),
        })
    }
}

#[cfg(unix)]
fn ctime_ns(metadata: &fs::Metadata) -> Option<i64> {
    use std::os::unix::fs::MetadataExt;
    metadata
        .ctime()
        .checked_mul(1_000_000_000)?
        .checked_add(metadata.ctime_nsec())
}

#[cfg(not(unix))]
fn ctime_ns(_: &fs::Metadata) -> Option<i64> {
    None
}

/// The stamps of all files.
///
/// # Errors
/// A file cannot be looked at.
pub(super) fn stamps(paths: &[PathBuf]) -> Result<Vec<Stamp>> {
    paths.iter().map(|path| Stamp::read(path)).collect()
}

/// SHA-256 of each file, the files side by side.
///
/// # Errors
/// A file cannot be read.
pub(super) fn hashes(paths: &[PathBuf]) -> Result<Vec<String>> {
    let never = AtomicBool::new(false);
    paths.par_iter().map(|path| hash(path, &never)).collect()
}

/// SHA-256 of a file's content in hexadecimal; gives up with what it has when `cancelled` is set.
///
/// # Errors
/// The file cannot be read.
pub(super) fn hash(path: &Path, cancelled: &AtomicBool) -> Result<String> {
    let mut file = File::open(path).map_err(Error::io(path, "open"))?;
    let mut piece = vec![0; PIECE];
    let mut hasher = Sha256::new();
    while !cancelled.load(Ordering::Relaxed) {
        let n = file.read(&mut piece).map_err(Error::io(path, "read"))?;
        if n == 0 {
            break;
        }
        hasher.update(&piece[..n]);
    }
    Ok(hexadecimal(&hasher.finalize()))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_is_sha256() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        fs::write(&path, "abc").unwrap();
        let want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hashes(&[path]).unwrap(), [want]);
    }
}
