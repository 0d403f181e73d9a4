//! Where the bytes of a tensor are.

use std::sync::Arc;

use super::bytes::ScratchBytes;
use super::ledger::{Counted, Pool};
use super::{Bytes, Device};
use crate::cuda::{Memory, Pinned};

pub(super) enum Buffer {
    /// Owned host memory.
    Host(Words),
    /// Part of a mapped file.
    Mapped(Bytes),
    /// Part of a scratch file, mapped to be written. A clone of it is an ordinary tensor.
    Scratch(Scratch),
    /// Owned host memory that the copy engines of a device read and write.
    Pinned(Box<Pinned>),
    /// Owned device memory; shared only between clones of a frozen tensor.
    Cuda(Arc<Memory>),
    /// None yet: the tensor is part of a plan.
    Planned(Planned),
}

/// Clones on a device share its memory; a clone of page-locked memory is ordinary memory.
impl Clone for Buffer {
    fn clone(&self) -> Self {
        match self {
            Self::Host(words) => Self::Host(words.clone()),
            Self::Mapped(bytes) => Self::Mapped(bytes.clone()),
            Self::Scratch(scratch) => Self::Host(Words::of(scratch.bytes.as_slice())),
            Self::Pinned(pinned) => Self::Host(Words::of(pinned.as_slice())),
            Self::Cuda(memory) => Self::Cuda(Arc::clone(memory)),
            Self::Planned(planned) => Self::Planned(planned.clone()),
        }
    }
}

/// Host memory in 8-byte words, so that every element type is aligned.
#[derive(Clone)]
pub(super) struct Words {
    pub words: Vec<u64>,
    _counted: Counted,
}

impl Words {
    pub fn zeroed(bytes: usize) -> Self {
        let words = bytes.div_ceil(8);
        Self {
            words: vec![0; words],
            _counted: Counted::new(Pool::Host, 8 * words),
        }
    }

    /// A copy of `bytes`.
    fn of(bytes: &[u8]) -> Self {
        let mut words = Self::zeroed(bytes.len());
        bytemuck::cast_slice_mut(&mut words.words)[..bytes.len()].copy_from_slice(bytes);
        words
    }
}

/// Part of a scratch file, counted.
pub(super) struct Scratch {
    pub bytes: Box<dyn ScratchBytes>,
    _counted: Counted,
}

impl Scratch {
    pub fn new(bytes: Box<dyn ScratchBytes>) -> Self {
        let counted = Counted::new(Pool::Disk, bytes.as_slice().len());
        Self {
            bytes,
            _counted: counted,
        }
    }
}

/// The bytes that a planned tensor will have.
pub(super) struct Planned {
    pub device: Device,
    /// The device that the memory will be of or beside.
    pub beside: Device,
    pub bytes: usize,
    counted: Option<Arc<Counted>>,
}

impl Planned {
    /// Of `device`; host memory in whole words, as [`Words`].
    pub fn new(device: Device, bytes: usize) -> Self {
        let (pool, bytes) = match device {
            Device::Cpu => (Pool::Host, 8 * bytes.div_ceil(8)),
            Device::Cuda(_) => (Pool::Device, bytes),
        };
        Self {
            device,
            beside: device,
            bytes,
            counted: Some(Arc::new(Counted::new(pool, bytes))),
        }
    }

    /// Part of a scratch file.
    pub fn scratch(bytes: usize) -> Self {
        Self {
            device: Device::Cpu,
            beside: Device::Cpu,
            bytes,
            counted: Some(Arc::new(Counted::new(Pool::Disk, bytes))),
        }
    }

    /// Page-locked host memory beside a device.
    pub fn pinned(beside: Device, bytes: usize) -> Self {
        Self {
            device: Device::Cpu,
            beside,
            bytes,
            counted: Some(Arc::new(Counted::new(Pool::Pinned, bytes))),
        }
    }

    /// Part of a mapped file.
    pub fn mapped(bytes: usize) -> Self {
        Self {
            device: Device::Cpu,
            beside: Device::Cpu,
            bytes,
            counted: None,
        }
    }

    /// Will it be memory of `pool`?
    pub fn is_of(&self, pool: Pool) -> bool {
        self.counted
            .as_ref()
            .is_some_and(|counted| counted.pool() == pool)
    }

    /// Bytes that it will own.
    pub fn owned(&self) -> usize {
        if self.counted.is_some() { self.bytes } else { 0 }
    }
}

/// As the memory will behave: clones on a device share it, those on the host are copies.
impl Clone for Planned {
    fn clone(&self) -> Self {
        let counted = self.counted.clone();
        Self {
            device: self.device,
            beside: self.beside,
            bytes: self.bytes,
            counted: match self.device {
                Device::Cuda(_) => counted,
                Device::Cpu => counted.map(|counted| Arc::new(Counted::clone(&counted))),
            },
        }
    }
}
