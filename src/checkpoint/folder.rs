//! Folders that appear under their name when they are whole.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Held while a folder is being made.
const LOCK: &str = ".lock";

/// A folder being made beside the one it will become; dropped, it is removed.
#[derive(Debug)]
pub(crate) struct PartialFolder {
    dir: PathBuf,
    lock: Option<File>,
}

impl PartialFolder {
    /// Starts the folder that will be `output_dir`.
    ///
    /// # Errors
    /// The path has no name, its parent cannot be written, or another process is making the same.
    pub fn create(output_dir: &Path) -> Result<Self> {
        let name = output_dir.file_name().ok_or_else(|| {
            Error::input(
                output_dir.display(),
                "no name",
                "the path of a folder to make",
                "give the folder a name",
            )
        })?;
        let dir = output_dir.with_file_name(format!(".{}.partial", name.to_string_lossy()));
        let unwritable = |e: std::io::Error| {
            let remedy = "give a folder that can be written: --cache-dir DIR (or --output DIR)";
            Error::input(dir.display(), e, "a folder that can be made", remedy)
        };
        fs::create_dir_all(&dir).map_err(unwritable)?;
        let lock = File::create(dir.join(LOCK)).map_err(unwritable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let found = "another glmtune that is writing it";
                let remedy = "wait until that one is done, then start again";
                return Err(Error::input(dir.display(), found, "one writer", remedy));
            }
            // A file system without locks: rather unguarded than not at all.
            Err(TryLockError::Error(_)) => {}
        }
        // What a killed run left behind.
        for entry in fs::read_dir(&dir).map_err(Error::io(&dir, "list"))?.flatten() {
            if entry.file_name() != LOCK {
                fs::remove_file(entry.path()).map_err(Error::io(entry.path(), "remove"))?;
            }
        }
        Ok(Self {
            dir,
            lock: Some(lock),
        })
    }

    /// Where to write.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Gives the folder its name, in place of an older one.
    ///
    /// # Errors
    /// The system refuses.
    pub fn commit(mut self, output_dir: &Path) -> Result<()> {
        let lock = self.dir.join(LOCK);
        fs::remove_file(&lock).map_err(Error::io(&lock, "remove"))?;
        let old = self.dir.with_extension("old");
        if output_dir.exists() {
            let _ = fs::remove_dir_all(&old);
            fs::rename(output_dir, &old).map_err(Error::io(output_dir, "replace"))?;
        }
        fs::rename(&self.dir, output_dir).map_err(Error::io(output_dir, "create"))?;
        self.lock = None;
        if old.exists() {
            fs::remove_dir_all(&old).map_err(Error::io(&old, "remove"))?;
        }
        Ok(())
    }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if self.lock.take().is_some() {
            // The failure that led here is on its way to the user.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
