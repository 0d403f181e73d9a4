//! Device memory with an owner.

use std::sync::atomic::{AtomicU64, Ordering};

use super::{Device, device};
use crate::error::{Error, Result};

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
}

impl Memory {
    /// `bytes` bytes, whose contents are unspecified.
    ///
    /// # Errors
    /// There is no such device, or it has not enough memory left.
    pub fn new(ordinal: u8, bytes: usize) -> Result<Self> {
        let device = device(ordinal)?;
        // Drivers refuse to allocate nothing.
        let address = device.call("allocate", |driver| driver.allocate(bytes.max(1)))?;
        let held = HELD.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        PEAK.fetch_max(held, Ordering::Relaxed);
        Ok(Self {
            device,
            address,
            bytes,
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

    /// Where the bytes are, for kernels.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Copies host bytes to `at..`.
    ///
    /// # Errors
    /// They do not fit, or the copy fails.
    pub fn upload(&mut self, at: usize, from: &[u8]) -> Result<()> {
        self.check("upload", at, from.len())?;
        self.device
            .call("upload", |driver| driver.upload(self.address + at as u64, from))
    }

    /// Copies `at..at + to.len()` to the host, after everything launched before has finished.
    ///
    /// # Errors
    /// The range lies outside, or something launched before failed.
    pub fn download(&self, at: usize, to: &mut [u8]) -> Result<()> {
        self.check("download", at, to.len())?;
        self.device
            .call("download", |driver| driver.download(self.address + at as u64, to))
    }

    /// Copies the first `bytes` of `from`, which lies on the same device.
    ///
    /// # Errors
    /// One of the two is shorter, or on another device.
    pub fn copy_from(&mut self, from: &Memory, bytes: usize) -> Result<()> {
        self.check("copy", 0, bytes)?;
        from.check("copy", 0, bytes)?;
        if self.ordinal() != from.ordinal() {
            return Err(Error::Shape {
                operation: "copy",
                found: format!("memory of device {}", from.ordinal()),
                expected: format!("of device {}", self.ordinal()),
            });
        }
        self.device
            .call("copy", |driver| driver.copy(self.address, from.address, bytes))
    }

    /// Sets the first `bytes` to 0.
    ///
    /// # Errors
    /// There are fewer, or the call fails.
    pub fn zero(&mut self, bytes: usize) -> Result<()> {
        self.check("zero", 0, bytes)?;
        self.device
            .call("zero", |driver| driver.zero(self.address, bytes))
    }

    fn check(&self, operation: &'static str, at: usize, bytes: usize) -> Result<()> {
        if at.checked_add(bytes).is_some_and(|end| end <= self.bytes) {
            return Ok(());
        }
        Err(Error::Shape {
            operation,
            found: format!("bytes {at}.. + {bytes}"),
            expected: format!("at most {} bytes", self.bytes),
        })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.device.free(self.address);
        HELD.fetch_sub(self.bytes as u64, Ordering::Relaxed);
    }
}
