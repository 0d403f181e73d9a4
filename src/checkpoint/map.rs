//! Files mapped into memory: weights to be read, scratch files to be written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut, MmapOptions};

use crate::error::{Error, Result};
use crate::tensor::{Bytes, ScratchBytes};

/// An open file whose ranges are mapped one by one.
///
/// Every tensor gets a mapping of its own, so dropping the tensor gives its pages back to the system; that is what
/// keeps the host memory of a pass over a whole checkpoint near the size of one tensor.
#[derive(Debug)]
pub(super) struct MappedFile {
    path: PathBuf,
    file: File,
    len: usize,
}

impl MappedFile {
    /// Opens a regular file to be mapped.
    pub(super) fn open(path: &Path) -> Result<Self> {
        // Looked at before it is opened: opening a pipe would wait for a writer.
        let metadata = std::fs::metadata(path).map_err(Error::io(path, "open"))?;
        if !metadata.is_file() {
            return Err(Error::input(
                path.display(),
                "no regular file",
                "a file of weights",
                "check the path",
            ));
        }
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        let len = usize::try_from(metadata.len()).map_err(|_| {
            Error::input(
                path.display(),
                format!("{} bytes", metadata.len()),
                "a file that fits the address space",
                "use a 64-bit system",
            )
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            len,
        })
    }

    /// The path it was opened by.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The size in bytes when it was opened.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Maps the bytes `range`.
    ///
    /// # Errors
    /// The range lies outside the file, the file shrank since it was opened, or the system refuses.
    pub(super) fn bytes(&self, range: Range<usize>) -> Result<Bytes> {
        let now = self
            .file
            .metadata()
            .map_err(Error::io(&self.path, "look at"))?
            .len();
        if range.start > range.end || range.end > self.len || now < self.len as u64 {
            return Err(Error::input(
                self.path.display(),
                format!("{} bytes", now.min(self.len as u64)),
                format!("at least {} bytes", range.end.max(self.len)),
                "the file is truncated or being written: download or copy it again",
            ));
        }
        let length = range.len();
        if length == 0 {
            return Ok(Bytes::new(Arc::new([0u8; 0]), 0..0));
        }
        Ok(Bytes::new(Arc::new(self.map(range)?), 0..length))
    }

    /// Asks the system to begin to read the bytes `range` from the disk: a hint, so nothing that goes wrong is an error.
    pub(super) fn will_be_read(&self, range: Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty()
            && range.end <= self.len
            && let Ok(map) = self.map(range)
        {
            // The pages stay in the system's cache when the mapping goes.
            let _ = map.advise(memmap2::Advice::WillNeed);
        }
        #[cfg(not(unix))]
        let _ = range;
    }

    fn map(&self, range: Range<usize>) -> Result<Mmap> {
        let mut options = MmapOptions::new();
        options.offset(range.start as u64).len(range.len());
        // SAFETY: the mapping is private and read-only, `bytes` above checked that the range lies inside the file, and
        // every value read through it is plain data (integers and floats, all bit patterns valid). What no check can
        // exclude is another process truncating the file meanwhile: then the system ends this process (SIGBUS) rather
        // than giving it wrong bytes. We ourselves never write weights in place, only new files that are renamed.
        unsafe { options.map(&self.file) }.map_err(Error::io(&self.path, "map"))
    }
}

/// Maps `at..at + bytes` of a scratch file to be read and written.
pub(super) fn map_scratch(file: &File, at: u64, bytes: usize) -> io::Result<Box<dyn ScratchBytes>> {
    let mut options = MmapOptions::new();
    options.offset(at).len(bytes);
    // SAFETY: the range has just been reserved on the disk; the file was created by this process for itself alone, and
    // each range of it is mapped once. As above, nothing can keep another process from truncating it.
    unsafe { options.map_mut(file) }.map(|map| Box::new(ScratchMap(map)) as _)
}

struct ScratchMap(MmapMut);

impl ScratchBytes for ScratchMap {
    fn as_slice(&self) -> &[u8] {
        &self.0
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.0
    }

    fn will_be_read(&self) {
        // A hint: without it the pages come when they are read.
        #[cfg(unix)]
        let _ = self.0.advise(memmap2::Advice::WillNeed);
    }
}
