//! Page-locked tensors, and the copies between them and a device: see [`crate::ops::fetch`].

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::buffer::{Buffer, Planned};
use super::{ALLOCATIONS, DType, Device, Shape, Tensor, exclusive, ledger};
use crate::cuda::Pinned;
use crate::error::{Error, Result};

impl Tensor {
    /// A tensor of zeros on the host, in page-locked memory that the copy engines of `device` read and write by themselves;
    /// for the CPU in ordinary memory. A clone of it is an ordinary tensor.
    ///
    /// # Errors
    /// There is no such device, or the system does not lock so much memory.
    pub fn zeros_pinned(device: Device, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let Device::Cuda(ordinal) = device else {
            return Ok(Self::zeros(dtype, shape));
        };
        let bytes = shape.elements() * dtype.size();
        let buffer = if ledger::planning() {
            Buffer::Planned(Planned::pinned(device, bytes))
        } else {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
            Buffer::Pinned(Box::new(Pinned::new(ordinal, bytes)?))
        };
        Ok(Self { buffer, shape, dtype })
    }

    /// Is the tensor in page-locked memory, so that copies from and to it run beside the kernels?
    pub fn is_pinned(&self) -> bool {
        match &self.buffer {
            Buffer::Pinned(_) => true,
            Buffer::Planned(planned) => planned.is_of(ledger::Pool::Pinned),
            _ => false,
        }
    }

    /// The device that the tensor belongs to: the one that it lies on, or the one beside whose memory it waits in page-locked
    /// memory.
    pub fn beside(&self) -> Device {
        match &self.buffer {
            Buffer::Pinned(pinned) => Device::Cuda(pinned.ordinal()),
            Buffer::Planned(planned) => planned.beside,
            _ => self.device(),
        }
    }

    /// Waits for the copy that writes a page-locked tensor, if one is under way: what the host reads next is there. Reading
    /// waits too, but cannot return an error.
    ///
    /// # Errors
    /// The copy failed, or something before it on the device did.
    pub fn arrive(&self) -> Result<()> {
        match &self.buffer {
            Buffer::Pinned(pinned) => pinned.arrive(),
            _ => Ok(()),
        }
    }

    /// [`crate::ops::fetch_range`], which has checked both.
    pub(crate) fn fetch_from(&mut self, at: usize, from: &Tensor, range: Range<usize>) -> Result<()> {
        if self.is_planned() || from.is_planned() {
            return Ok(());
        }
        let size = self.dtype.size();
        let (at, range) = (at * size, range.start * size..range.end * size);
        match (&mut self.buffer, &from.buffer) {
            (Buffer::Cuda(to), Buffer::Pinned(from)) if to.ordinal() == from.ordinal() => {
                exclusive(to).fetch_from(at, from, range.start, range.len())
            }
            (Buffer::Cuda(to), _) => exclusive(to).fetch_staged(at, &from.bytes()[range]),
            _ => {
                self.bytes_mut()[at..][..range.len()].copy_from_slice(&from.bytes()[range]);
                Ok(())
            }
        }
    }

    /// [`crate::ops::store_range`], which has checked both.
    pub(crate) fn store_to(&self, range: Range<usize>, to: &mut Tensor, at: usize) -> Result<()> {
        if self.is_planned() || to.is_planned() {
            return Ok(());
        }
        let size = self.dtype.size();
        let (at, range) = (at * size, range.start * size..range.end * size);
        match (&self.buffer, &mut to.buffer) {
            (Buffer::Cuda(from), Buffer::Pinned(to)) => to.store_from(at, from, range.start, range.len()),
            (Buffer::Cuda(_), _) => Err(Error::Shape {
                operation: "store",
                found: "to in ordinary memory".into(),
                expected: "to in page-locked memory".into(),
            }),
            _ => {
                to.bytes_mut()[at..][..range.len()].copy_from_slice(&self.bytes()[range]);
                Ok(())
            }
        }
    }
}
