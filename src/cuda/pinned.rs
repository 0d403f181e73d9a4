//! Page-locked host memory with an owner: what the card's copy engines read and write by themselves.

use std::sync::Arc;

use super::memory::Memory;
use super::pending::Pending;
use super::{Device, device};
use crate::error::Result;
use crate::tensor::ledger::{Counted, Pool};

/// Bytes of host memory that copies of one device go to and come from directly; freed when dropped.
#[derive(Debug)]
pub(crate) struct Pinned {
    device: &'static Device,
    pub(super) address: u64,
    bytes: usize,
    pub(super) pending: Pending,
    _counted: Counted,
}

impl Pinned {
    /// `bytes` bytes, all 0, beside device `ordinal`; aligned for every element type.
    ///
    /// # Errors
    /// There is no such device, or the system does not lock so much memory.
    pub fn new(ordinal: u8, bytes: usize) -> Result<Self> {
        let device = device(ordinal)?;
        let address = device.pin(bytes)?;
        Ok(Self {
            device,
            address,
            bytes,
            pending: Pending::default(),
            _counted: Counted::new(Pool::Pinned, bytes),
        })
    }

    /// The number of the device whose copies reach it.
    pub fn ordinal(&self) -> u8 {
        self.device.ordinal
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Waits for the copy that writes the bytes, if one is under way.
    ///
    /// # Errors
    /// It failed, or something before it did: the bytes are of no use.
    pub fn arrive(&self) -> Result<()> {
        let mut copies = self.pending.lock();
        for fence in copies.before_reading() {
            self.device.call("store", |driver| driver.wait(fence))?;
        }
        copies.written();
        Ok(())
    }

    /// The bytes, as soon as no copy writes them any more. Panics when that copy failed: there are no such bytes.
    /// [`Pinned::arrive`] returns the error.
    pub fn as_slice(&self) -> &[u8] {
        if let Err(error) = self.arrive() {
            panic!("{error}");
        }
        // SAFETY: `bytes` initialised bytes, owned by this; a copy that writes them is asked for with `&mut self`.
        unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) }
    }

    /// The bytes, to write, as soon as no copy writes or reads them any more. Panics as [`Pinned::as_slice`].
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        if let Err(error) = self.settle() {
            panic!("{error}");
        }
        // SAFETY: `bytes` initialised bytes, owned by this and borrowed once, and no copy is under way.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) }
    }

    /// Waits for every copy under way.
    fn settle(&mut self) -> Result<()> {
        let copies = self.pending.get_mut();
        for fence in copies.before_writing() {
            self.device.call("copy", |driver| driver.wait(fence))?;
        }
        copies.over();
        Ok(())
    }

    /// Asks for `bytes` bytes from `from_at` of `from` to be copied to `at..`, on the download stream: after all that was asked
    /// of the device so far, beside what is asked of it later.
    ///
    /// # Errors
    /// One of the two is shorter, they belong to different devices, or the driver refuses.
    pub fn store_from(&mut self, at: usize, from: &Memory, from_at: usize, bytes: usize) -> Result<()> {
        from.check_transfer("store", from_at, self, at, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let mut source = from.pending.lock();
        let copies = self.pending.get_mut();
        let after: Vec<_> = source.before_reading().chain(copies.before_writing()).collect();
        let address = (self.address + at as u64, from.plain_address() + from_at as u64);
        // SAFETY: both ranges are inside their memories, which wait for the fence before they are written or freed.
        let fence = self.device.call("store", |driver| unsafe {
            driver.store(address.0, address.1, bytes, &after)
        })?;
        let fence = Arc::new(fence);
        source.reads(Arc::clone(&fence));
        copies.writes(fence);
        super::count(|transfers| &mut transfers.stored, bytes);
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for fence in self.pending.get_mut().before_writing() {
            // A failure is one of earlier work: the next call that can return it does.
            let _ = self.device.driver.wait(fence);
        }
        self.device.driver.unpin(self.address);
    }
}
