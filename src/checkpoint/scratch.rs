//! Memory on disk: a file that tensors are read and written in while a program runs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::map::map_scratch;
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor, ledger};

/// Where the tensors of a file begin: at pages of memory.
const ALIGNMENT: u64 = 4096;

/// Makes the system forget what it has cached of the file at `path`, so that the next to read it reads the disk. Where a system has
/// no such call, nothing happens.
///
/// # Errors
/// The file cannot be opened, or what was written to it cannot be brought to the disk.
pub fn evict(path: &Path) -> Result<()> {
    let file = File::open(path).map_err(Error::io(path, "open"))?;
    // What is not yet on the disk cannot be forgotten.
    file.sync_all().map_err(Error::io(path, "write"))?;
    #[cfg(target_os = "linux")]
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)
        .map_err(|e| Error::io(path, "forget")(e.into()))?;
    Ok(())
}

/// Bytes that this user may still write where `path` lies or would lie; nothing where the system does not say.
pub fn free_disk(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|path| path.exists())?;
    #[cfg(target_os = "linux")]
    {
        let volume = rustix::fs::statvfs(there).ok()?;
        volume.f_bavail.checked_mul(volume.f_frsize)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = there;
        None
    }
}

/// A file that holds tensors of this program and of nobody else: it is removed when this is dropped, and what a killed
/// program left under its name is replaced.
///
/// Its blocks are reserved when a tensor is made. A mapped file has no way to say that the disk is full other than to end
/// the program, so that is said before.
#[derive(Debug)]
pub struct ScratchFile {
    path: PathBuf,
    /// None in a plan.
    file: Option<File>,
    len: u64,
}

impl ScratchFile {
    /// An empty file at `path`, in a folder that exists; in a plan there is no file.
    ///
    /// # Errors
    /// The system refuses, or something else than a file is there.
    pub fn create(path: &Path) -> Result<Self> {
        let file = if ledger::planning() {
            None
        } else {
            match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::io(path, "replace")(error));
                }
                _ => {}
            }
            // A new file, not the old one cut short: should a program still run on that, it keeps what it has.
            let options = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .open(path);
            Some(options.map_err(Error::io(path, "create"))?)
        };
        Ok(Self {
            path: path.to_path_buf(),
            file,
            len: 0,
        })
    }

    /// A tensor of zeros in the file.
    ///
    /// # Errors
    /// The disk is full, or the system does not map the file.
    pub fn tensor(&mut self, dtype: DType, shape: impl Into<Shape>) -> Result<Tensor> {
        let shape = shape.into();
        let bytes = shape.elements() * dtype.size();
        let Some(file) = &self.file else {
            return Ok(Tensor::planned_scratch(dtype, shape));
        };
        if bytes == 0 {
            return Ok(Tensor::zeros(dtype, shape));
        }
        reserve(file, self.len, bytes as u64).map_err(|error| {
            Error::input(
                self.path.display(),
                format!(
                    "no room for {:.1} MB beside its {:.1} MB ({error})",
                    bytes as f64 / 1e6,
                    self.len as f64 / 1e6
                ),
                "a disk with enough of it",
                "free some of it, or give a folder on another disk",
            )
        })?;
        let mapped = map_scratch(file, self.len, bytes).map_err(Error::io(&self.path, "map"))?;
        self.len = (self.len + bytes as u64).next_multiple_of(ALIGNMENT);
        Tensor::from_scratch(mapped, dtype, shape)
    }
}

/// The tensors outlive the name of their file.
impl Drop for ScratchFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // What cannot be removed now is replaced by the next run.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes `at..at + bytes` part of the file, 0, with blocks of the disk behind them.
fn reserve(file: &File, at: u64, bytes: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    loop {
        use rustix::fs::{FallocateFlags, fallocate};
        use rustix::io::Errno;
        match fallocate(file, FallocateFlags::empty(), at, bytes) {
            Err(Errno::INTR) => {}
            // A file system that cannot: the zeros are written.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
            other => return Ok(other?),
        }
    }
    write_zeros(file, at, bytes)
}

fn write_zeros(mut file: &File, at: u64, bytes: u64) -> io::Result<()> {
    use io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(at))?;
    let zeros = vec![0; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(zeros.len() as u64);
        file.write_all(&zeros[..part as usize])?;
        left -= part;
    }
    // Some file systems find room only when they write.
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_live_in_the_file_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        fs::write(&path, [7; 10_000]).unwrap();
        let mut file = ScratchFile::create(&path).unwrap();
        let mut a = file.tensor(DType::F32, [1000]).unwrap();
        let b = file.tensor(DType::U8, [3, 5]).unwrap();
        let none = file.tensor(DType::F32, [0]).unwrap();
        for tensor in [&a, &b, &none] {
            assert!(tensor.bytes().iter().all(|&byte| byte == 0));
        }
        a.as_mut_slice::<f32>()[999] = 1.5;
        a.will_be_read();
        assert_eq!(a.owned_bytes(), 4000);
        assert_eq!(fs::read(&path).unwrap()[3996..4000], 1.5f32.to_le_bytes());
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096 + 15);
        drop(file);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(a.as_slice::<f32>()[999], 1.5);
    }

    #[test]
    fn zeros_are_written_where_blocks_cannot_be_reserved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let file = File::create(&path).unwrap();
        write_zeros(&file, 4096, (1 << 20) + 1).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 4096 + (1 << 20) + 1);
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let error = ScratchFile::create(folder.path()).unwrap_err().to_string();
        assert!(error.contains("cannot replace"), "{error}");
    }

    #[test]
    fn in_a_plan_there_is_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let books = ledger::Ledger::new();
        let tensor = books.plan(|| {
            let mut file = ScratchFile::create(&folder.path().join("state")).unwrap();
            file.tensor(DType::F32, [1 << 40]).unwrap()
        });
        assert_eq!(books.held(ledger::Pool::Disk), 4 << 40);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        drop(tensor);
        assert_eq!(books.held(ledger::Pool::Disk), 0);
    }
}
