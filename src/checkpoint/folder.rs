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
    /// Was there something to replace when it was begun?
    replaces: bool,
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
            replaces: output_dir.exists(),
        })
    }

    /// Where to write.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Brings everything to the disk and gives the folder its name, in place of an older one, which is back if that fails.
    ///
    /// # Errors
    /// Something lies there that did not when this began; the system refuses.
    pub fn commit(mut self, output_dir: &Path) -> Result<()> {
        if output_dir.exists() && !self.replaces {
            return Err(Error::input(
                output_dir.display(),
                "something that was not there when this began",
                "nothing",
                "move it away, or give another --output, and start again",
            ));
        }
        for entry in fs::read_dir(&self.dir)
            .map_err(Error::io(&self.dir, "list"))?
            .flatten()
        {
            // Copies by the system are not on the disk yet.
            File::open(entry.path())
                .and_then(|file| file.sync_all())
                .map_err(Error::io(entry.path(), "write"))?;
        }
        sync_folder(&self.dir)?;
        let old = self.dir.with_extension("old");
        let replaced = output_dir.exists();
        if replaced {
            let _ = fs::remove_dir_all(&old);
            fs::rename(output_dir, &old).map_err(Error::io(output_dir, "replace"))?;
        }
        // The lock goes along: whoever comes now makes a folder of his own.
        if let Err(error) = fs::rename(&self.dir, output_dir) {
            if replaced {
                fs::rename(&old, output_dir).map_err(Error::io(&old, "bring back"))?;
            }
            return Err(Error::io(output_dir, "create")(error));
        }
        self.lock = None;
        let lock = output_dir.join(LOCK);
        fs::remove_file(&lock).map_err(Error::io(&lock, "remove"))?;
        sync_folder(match output_dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        })?;
        if replaced {
            fs::remove_dir_all(&old).map_err(Error::io(&old, "remove"))?;
        }
        Ok(())
    }
}

/// Names must survive a power cut too; folders cannot be opened for that everywhere.
fn sync_folder(dir: &Path) -> Result<()> {
    match cfg!(unix) {
        true => File::open(dir)
            .and_then(|folder| folder.sync_all())
            .map_err(Error::io(dir, "sync")),
        false => Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_appears_whole_and_in_place_of_the_old_one() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("model");
        for text in ["one", "two"] {
            let folder = PartialFolder::create(&output).unwrap();
            assert!(PartialFolder::create(&output).is_err(), "one writer");
            fs::write(folder.dir().join("a"), text).unwrap();
            folder.commit(&output).unwrap();
            assert_eq!(fs::read_to_string(output.join("a")).unwrap(), text);
            let names = |dir: &Path| fs::read_dir(dir).unwrap().count();
            assert_eq!(
                (names(&output), names(root.path())),
                (1, 1),
                "nothing else is left"
            );
        }
    }

    #[test]
    fn what_appears_meanwhile_is_not_replaced() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("model");
        let folder = PartialFolder::create(&output).unwrap();
        fs::create_dir(&output).unwrap();
        fs::write(output.join("mine"), "x").unwrap();
        let error = folder.commit(&output).unwrap_err().to_string();
        assert!(error.contains("was not there when this began"), "{error}");
        assert_eq!(fs::read_to_string(output.join("mine")).unwrap(), "x");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
