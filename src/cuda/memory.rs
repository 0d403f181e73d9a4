//! Device memory with an owner.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::pending::Pending;
use super::pinned::Pinned;
use super::{Device, device};
use crate::error::{Error, Result};
use crate::tensor::ledger::{Counted, Pool};

/// Bytes of device memory that this process holds now, and the most it held since [`forget_peak`].
static HELD: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);

/// Bytes that tensors hold on all devices: now, and at most since the last [`forget_peak`].
pub(super) fn held() -> (u64, u64) {
    (HELD.load(Ordering::Relaxed), PEAK.load(Ordering::Relaxed))
}

/// The peak becomes what is held now.
pub(super) fn forget_peak() {
    PEAK.store(HELD.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// Bytes on a device, freed when dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    device: &'static Device,
    address: u64,
    bytes: usize,
    _counted: Counted,
    pub(super) pending: Pending,
}

impl Memory {
    /// `bytes` bytes, whose contents are unspecified.
    ///
    /// # Errors
    /// There is no such device, or it has not enough memory left.
    pub fn new(ordinal: u8, bytes: usize) -> Result<Self> {
        let device = device(ordinal)?;
        let address = device.allocate(bytes)?;
        let held = HELD.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        PEAK.fetch_max(held, Ordering::Relaxed);
        Ok(Self {
            device,
            address,
            bytes,
            _counted: Counted::new(Pool::Device, bytes),
            pending: Pending::default(),
        })
    }

    /// The device's number.
    pub fn ordinal(&self) -> u8 {
        self.device.ordinal
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Where the bytes are, for kernels that read them: what is asked of the device from now on runs after the copy that
    /// writes them.
    pub fn address(&self) -> u64 {
        let mut copies = self.pending.lock();
        for fence in copies.before_reading() {
            self.device.join(fence);
        }
        copies.written();
        self.address
    }

    /// Where the bytes are, for kernels that write them: what is asked of the device from now on runs after the copies that
    /// read or write them.
    pub fn address_mut(&mut self) -> u64 {
        let copies = self.pending.get_mut();
        for fence in copies.before_writing() {
            self.device.join(fence);
        }
        copies.over();
        self.address
    }

    /// Where the bytes are, for copies that order themselves.
    pub(super) fn plain_address(&self) -> u64 {
        self.address
    }

    /// Copies host bytes to `at..`.
    ///
    /// # Errors
    /// They do not fit, or the copy fails.
    pub fn upload(&mut self, at: usize, from: &[u8]) -> Result<()> {
        self.check("upload", at, from.len())?;
        let to = self.address_mut() + at as u64;
        self.device.call("upload", |driver| driver.upload(to, from))
    }

    /// Copies `at..at + to.len()` to the host, after everything launched before has finished.
    ///
    /// # Errors
    /// The range lies outside, or something launched before failed.
    pub fn download(&self, at: usize, to: &mut [u8]) -> Result<()> {
        self.check("download", at, to.len())?;
        let from = self.address() + at as u64;
        self.device.call("download", |driver| driver.download(from, to))
    }

    /// Copies the first `bytes` of `from`, which lies on the same device.
    ///
    /// # Errors
    /// One of the two is shorter, or on another device.
    pub fn copy_from(&mut self, from: &Memory, bytes: usize) -> Result<()> {
        self.copy_range(0, from, 0, bytes)
    }

    /// Copies `bytes` from `from_at` of `from`, which lies on the same device, to `at..`.
    ///
    /// # Errors
    /// One of the two is shorter, or on another device.
    pub fn copy_range(&mut self, at: usize, from: &Memory, from_at: usize, bytes: usize) -> Result<()> {
        self.check("copy", at, bytes)?;
        from.check("copy", from_at, bytes)?;
        self.check_ordinal("copy", from.ordinal())?;
        let (to, from) = (self.address_mut() + at as u64, from.address() + from_at as u64);
        self.device.call("copy", |driver| driver.copy(to, from, bytes))
    }

    /// Sets the first `bytes` to 0.
    ///
    /// # Errors
    /// There are fewer, or the call fails.
    pub fn zero(&mut self, bytes: usize) -> Result<()> {
        self.check("zero", 0, bytes)?;
        let at = self.address_mut();
        self.device.call("zero", |driver| driver.zero(at, bytes))
    }

    /// Asks for `bytes` bytes from `from_at` of `from` to be copied to `at..`, on the upload stream: after all that was asked of
    /// the device so far, beside what is asked of it later.
    ///
    /// # Errors
    /// One of the two is shorter, they belong to different devices, or the driver refuses.
    pub fn fetch_from(&mut self, at: usize, from: &Pinned, from_at: usize, bytes: usize) -> Result<()> {
        self.check_transfer("fetch", at, from, from_at, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let mut source = from.pending.lock();
        let copies = self.pending.get_mut();
        let after: Vec<_> = source.before_reading().chain(copies.before_writing()).collect();
        let (to, source_address) = (self.address + at as u64, from.address + from_at as u64);
        // SAFETY: both ranges are inside their memories, which wait for the fence before they are written or freed.
        let fence = self.device.call("fetch", |driver| unsafe {
            driver.fetch(to, source_address, bytes, &after)
        })?;
        let fence = Arc::new(fence);
        source.reads(Arc::clone(&fence));
        copies.writes(fence);
        super::count(|transfers| &mut transfers.fetched, bytes);
        Ok(())
    }

    /// [`Memory::fetch_from`] of ordinary memory, through the staging buffers; returns when `from` has been read.
    ///
    /// # Errors
    /// There are fewer bytes here, or the driver refuses.
    pub fn fetch_staged(&mut self, at: usize, from: &[u8]) -> Result<()> {
        self.check("fetch", at, from.len())?;
        if from.is_empty() {
            return Ok(());
        }
        let copies = self.pending.get_mut();
        let after: Vec<_> = copies.before_writing().collect();
        let (device, to) = (self.device, self.address + at as u64);
        let fence = device.call("fetch", |driver| driver.fetch_staged(to, from, &after))?;
        copies.writes(Arc::new(fence));
        super::count(|transfers| &mut transfers.fetched, from.len());
        Ok(())
    }

    /// Can `bytes` bytes go from `at` to `host_at` of `host`, or back?
    pub(super) fn check_transfer(
        &self,
        operation: &'static str,
        at: usize,
        host: &Pinned,
        host_at: usize,
        bytes: usize,
    ) -> Result<()> {
        self.check(operation, at, bytes)?;
        check(operation, host_at, bytes, host.len())?;
        self.check_ordinal(operation, host.ordinal())
    }

    fn check(&self, operation: &'static str, at: usize, bytes: usize) -> Result<()> {
        check(operation, at, bytes, self.bytes)
    }

    fn check_ordinal(&self, operation: &'static str, other: u8) -> Result<()> {
        if self.ordinal() == other {
            return Ok(());
        }
        Err(Error::Shape {
            operation,
            found: format!("memory of device {other}"),
            expected: format!("of device {}", self.ordinal()),
        })
    }
}

fn check(operation: &'static str, at: usize, bytes: usize, len: usize) -> Result<()> {
    if at.checked_add(bytes).is_some_and(|end| end <= len) {
        return Ok(());
    }
    Err(Error::Shape {
        operation,
        found: format!("bytes {at}.. + {bytes}"),
        expected: format!("at most {len} bytes"),
    })
}

impl Drop for Memory {
    fn drop(&mut self) {
        for fence in self.pending.get_mut().before_writing() {
            // A failure is one of earlier work: the next call that can return it does.
            let _ = self.device.driver.wait(fence);
        }
        self.device.free(self.address);
        HELD.fetch_sub(self.bytes as u64, Ordering::Relaxed);
    }
}
