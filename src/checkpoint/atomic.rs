//! Files that are either wholly the old one or wholly the new one, whenever the power goes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Writes `bytes` to `path`: temporary file in the same folder, fsync, rename.
///
/// # Errors
/// The disk is full, the folder is missing or read-only; an old file is then untouched.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::metadata(path).is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        // A device or a pipe such as /dev/stdout is written to, never replaced.
        return fs::write(path, bytes).map_err(Error::io(path, "write"));
    }
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes).map_err(Error::io(path, "write"))?;
    file.commit()
}

/// A file being written under a temporary name; [`AtomicFile::commit`] gives it its real one, dropping removes it.
///
/// A killed process leaves the temporary file `.<name>.<process>-<n>.tmp` behind and the old file whole.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    file: File,
    committed: bool,
    /// A write failed: the file is lost, and whoever goes on writing (an archive that is dropped ends itself) is not
    /// told again.
    failed: bool,
}

static COUNTER: AtomicU64 = AtomicU64::new(0);

impl AtomicFile {
    /// Creates the temporary file beside `path`.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let name = path.file_name().ok_or_else(|| {
            Error::input(
                path.display(),
                "a folder",
                "the path of a file",
                "give the file a name",
            )
        })?;
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(
            ".{}.{}-{number}.tmp",
            name.to_string_lossy(),
            std::process::id()
        ));
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(&temporary)
            .map_err(Error::io(path, "create"))?;
        Ok(Self {
            path: path.to_path_buf(),
            temporary,
            file,
            committed: false,
            failed: false,
        })
    }

    /// Where it lies until then: to be read back before it gets its name.
    pub(crate) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Brings everything to the disk, then replaces the old file.
    pub(crate) fn commit(mut self) -> Result<()> {
        if self.failed {
            let source = io::Error::other("an earlier write failed");
            return Err(Error::io(&self.path, "write")(source));
        }
        self.file.sync_all().map_err(Error::io(&self.path, "write"))?;
        fs::rename(&self.temporary, &self.path).map_err(Error::io(&self.path, "replace"))?;
        self.committed = true;
        // The rename itself must survive a power cut too; folders cannot be opened for that everywhere.
        if cfg!(unix) {
            let folder = match self.path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent,
                _ => Path::new("."),
            };
            File::open(folder)
                .and_then(|f| f.sync_all())
                .map_err(Error::io(folder, "sync"))?;
        }
        Ok(())
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.committed {
            // Nothing to report to: the failure that led here is already on its way to the user.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.failed {
            return Ok(bytes.len());
        }
        let written = self.file.write(bytes);
        self.failed = matches!(&written, Err(e) if e.kind() != io::ErrorKind::Interrupted);
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abandoned_file_leaves_the_old_one_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        write(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"half of the ne").unwrap();
        drop(file);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        write(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
