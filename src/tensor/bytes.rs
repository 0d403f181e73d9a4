//! Bytes borrowed from something that is kept alive.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// A range of bytes inside something that stays alive as long as they are used: a memory-mapped file.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    /// The bytes `range` of `owner`. Panics when the range lies outside: callers check what files claim.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= (*owner).as_ref().len(),
            "byte range {range:?} outside its owner"
        );
        Self { owner, range }
    }

    /// The bytes themselves.
    pub fn as_slice(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Are there no bytes?
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({:?})", self.range)
    }
}

/// Bytes of a scratch file that is mapped to be written: the file is the memory, the system's page cache what of it is at
/// hand.
pub trait ScratchBytes: Send + Sync {
    /// The bytes.
    fn as_slice(&self) -> &[u8];

    /// The bytes, to write.
    fn as_mut_slice(&mut self) -> &mut [u8];

    /// Asks the system to begin to read them from the disk.
    fn will_be_read(&self);
}
