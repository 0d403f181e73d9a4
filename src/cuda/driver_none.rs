//! The driver of a program that was built without CUDA: there is no device, and it says so.

use std::ffi::c_void;

use super::failure::{Failure, Result};
use super::{Description, Loaded};

/// A device that cannot be opened: the type has no value.
#[derive(Debug)]
pub(super) enum Driver {}

/// A point in time on a device; there is none.
#[derive(Debug)]
pub(super) enum Event {}

/// The end of a copy; there is none.
#[derive(Debug)]
pub(super) enum Fence {}

fn unavailable<T>() -> Result<T> {
    Err(Failure::Unavailable {
        found: "a program built without CUDA".into(),
        expected: "one built with it".into(),
        remedy: "use --device cpu, or build with: cargo build --release --features cuda".into(),
    })
}

impl Driver {
    /// Is this device emulated on the CPU?
    pub const EMULATED: bool = false;

    /// There is none.
    pub fn open(_ordinal: u8) -> Result<Self> {
        unavailable()
    }

    /// There are none.
    pub fn device_count() -> Result<usize> {
        unavailable()
    }

    pub fn describe(&self) -> Description {
        match *self {}
    }

    pub fn loaded(&self) -> Vec<Loaded> {
        match *self {}
    }

    pub fn memory(&self) -> Result<(u64, u64)> {
        match *self {}
    }

    pub fn allocate(&self, _bytes: usize) -> Result<u64> {
        match *self {}
    }

    pub fn free(&self, _address: u64) {
        match *self {}
    }

    pub fn pin(&self, _bytes: usize) -> Result<u64> {
        match *self {}
    }

    pub fn unpin(&self, _address: u64) {
        match *self {}
    }

    pub fn upload(&self, _to: u64, _from: &[u8]) -> Result<()> {
        match *self {}
    }

    pub fn download(&self, _from: u64, _to: &mut [u8]) -> Result<()> {
        match *self {}
    }

    /// # Safety
    /// None: there is no value to call this on.
    // SAFETY: as above.
    pub unsafe fn fetch(&self, _to: u64, _from: u64, _bytes: usize, _after: &[&Fence]) -> Result<Fence> {
        match *self {}
    }

    pub fn fetch_staged(&self, _to: u64, _from: &[u8], _after: &[&Fence]) -> Result<Fence> {
        match *self {}
    }

    /// # Safety
    /// None: there is no value to call this on.
    // SAFETY: as above.
    pub unsafe fn store(&self, _to: u64, _from: u64, _bytes: usize, _after: &[&Fence]) -> Result<Fence> {
        match *self {}
    }

    pub fn join(&self, _fence: &Fence) -> Result<()> {
        match *self {}
    }

    pub fn wait(&self, _fence: &Fence) -> Result<()> {
        match *self {}
    }

    pub fn copy(&self, _to: u64, _from: u64, _bytes: usize) -> Result<()> {
        match *self {}
    }

    pub fn zero(&self, _at: u64, _bytes: usize) -> Result<()> {
        match *self {}
    }

    /// # Safety
    /// None: there is no value to call this on.
    // SAFETY: as above.
    pub unsafe fn launch(
        &self,
        _kernel: &str,
        _blocks: [u32; 3],
        _threads: u32,
        _shared_bytes: u32,
        _params: *const c_void,
        _params_bytes: usize,
    ) -> Result<()> {
        match *self {}
    }

    pub fn synchronize(&self) -> Result<()> {
        match *self {}
    }

    pub fn record(&self) -> Result<Event> {
        match *self {}
    }

    pub fn elapsed_ms(&self, _from: &Event, _to: &Event) -> Result<f32> {
        match *self {}
    }
}
