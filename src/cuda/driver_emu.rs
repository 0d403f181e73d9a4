//! The emulated driver: host memory, and the kernels of `cuda/` compiled by g++ against `cuda/emu/`.
//!
//! Kernels happen at once, in the calling thread; copies beside them as late as they may. Memory is counted against a limit, and
//! every allocation lies between guard bytes that are checked when it is freed, so that a kernel that writes past its output is
//! found.

// With its path: this file stands in for another module.
#[path = "driver/copies_emu.rs"]
mod copies;

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::failure::{Failure, Result};
use super::{Description, Loaded};
pub(super) use copies::Fence;
use copies::{DOWNLOADS, Source, UPLOADS, under_way};
pub use copies::{Landing, copies_under_way, land_copies};

// SAFETY: the signature is that of cuda/emu/emu.h, which g++ compiles into this program.
unsafe extern "C" {
    fn emu_launch(
        kernel: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared_bytes: u32,
        params: *const c_void,
        params_bytes: u64,
        error: *mut c_char,
        error_len: u64,
    ) -> c_int;
    fn emu_kernel_count() -> u32;
}

/// Bytes before and after every allocation that nothing may write: more than a row of what tests work on.
const GUARD: usize = 4096;
/// Where allocations begin, as on a card.
const ALIGNMENT: usize = 256;
/// What they hold.
const PATTERN: u8 = 0xA5;
/// What fresh memory holds: every float type reads it as NaN.
const FRESH: u8 = 0xFF;
/// Device memory, unless `GLMTUNE_EMU_MEMORY` (bytes) says otherwise.
const MEMORY: u64 = 4 << 30;

/// One emulated device.
#[derive(Debug)]
pub(super) struct Driver {
    total: u64,
    /// Size of every allocation by address.
    allocations: Mutex<BTreeMap<u64, usize>>,
    /// The same of page-locked host memory.
    pinned: Mutex<BTreeMap<u64, usize>>,
}

/// A point in time.
#[derive(Debug)]
pub(super) struct Event(Instant);

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.checked_add(2 * GUARD)?, ALIGNMENT).ok()
}

/// `bytes` bytes of `fill` between two guards.
fn guarded(bytes: usize, fill: u8) -> Option<u64> {
    let layout = layout(bytes)?;
    // SAFETY: the layout is not empty: it holds two guards.
    let base = unsafe { alloc(layout) };
    if base.is_null() {
        return None;
    }
    // SAFETY: `base` is `bytes + 2 GUARD` bytes long.
    unsafe {
        base.write_bytes(PATTERN, GUARD);
        base.add(GUARD).write_bytes(fill, bytes);
        base.add(GUARD + bytes).write_bytes(PATTERN, GUARD);
    }
    Some(base as u64 + GUARD as u64)
}

/// Frees what [`guarded`] made, and ends the process when a guard was written: `who` wrote where it must not; or when a copy is
/// under way in it.
fn release(address: u64, bytes: usize, who: &str) {
    if under_way(address, bytes) && !std::thread::panicking() {
        panic!("emulated device: {bytes} bytes were freed while a copy reads or writes them");
    }
    let base = (address - GUARD as u64) as *mut u8;
    // SAFETY: `base` came from `guarded` with this size and is freed once.
    let guards = unsafe {
        [
            std::slice::from_raw_parts(base, GUARD),
            std::slice::from_raw_parts(base.add(GUARD + bytes), GUARD),
        ]
    };
    let intact = guards
        .iter()
        .all(|guard| guard.iter().all(|&byte| byte == PATTERN));
    if let Some(layout) = layout(bytes) {
        // SAFETY: allocated in `guarded` with the same layout.
        unsafe { dealloc(base, layout) };
    }
    if !intact && !std::thread::panicking() {
        panic!("emulated device: {who} wrote past an allocation of {bytes} bytes");
    }
}

impl Driver {
    /// Is this device emulated on the CPU?
    pub const EMULATED: bool = true;

    /// Opens the only device there is.
    pub fn open(ordinal: u8) -> Result<Self> {
        if ordinal > 0 {
            return Err(Failure::Unavailable {
                found: format!("no device {ordinal}"),
                expected: "device 0, the only emulated one".into(),
                remedy: "use --device cuda:0".into(),
            });
        }
        let asked = std::env::var("GLMTUNE_EMU_MEMORY").ok();
        Ok(Self {
            total: asked.and_then(|bytes| bytes.parse().ok()).unwrap_or(MEMORY),
            allocations: Mutex::default(),
            pinned: Mutex::default(),
        })
    }

    /// One.
    pub fn device_count() -> Result<usize> {
        Ok(1)
    }

    pub fn describe(&self) -> Description {
        Description {
            name: "emulated device".into(),
            capability: (8, 0),
            total_bytes: self.total,
            driver_version: (0, 0),
            multiprocessors: 1,
        }
    }

    pub fn loaded(&self) -> Vec<Loaded> {
        // SAFETY: it counts a table that is filled before `main`.
        let kernels = unsafe { emu_kernel_count() } as usize;
        vec![Loaded {
            unit: "cuda".into(),
            code: "host code".into(),
            kernels,
        }]
    }

    /// Free and total bytes.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let allocations = self.allocations.lock().unwrap_or_else(PoisonError::into_inner);
        let used: u64 = allocations.values().map(|&bytes| bytes as u64).sum();
        Ok((self.total.saturating_sub(used), self.total))
    }

    pub fn allocate(&self, bytes: usize) -> Result<u64> {
        let (free, total) = self.memory()?;
        let refused = Failure::OutOfMemory {
            asked: bytes as u64,
            free,
            total,
        };
        if bytes as u64 > free {
            return Err(refused);
        }
        let address = guarded(bytes, FRESH).ok_or(refused)?;
        let mut allocations = self.allocations.lock().unwrap_or_else(PoisonError::into_inner);
        allocations.insert(address, bytes);
        Ok(address)
    }

    pub fn free(&self, address: u64) {
        let mut allocations = self.allocations.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = allocations.remove(&address);
        drop(allocations);
        if let Some(bytes) = bytes {
            release(address, bytes, "a kernel or copy");
        }
    }

    pub fn pin(&self, bytes: usize) -> Result<u64> {
        let asked = bytes as u64;
        let address = guarded(bytes, 0).ok_or(Failure::OutOfPinned { asked })?;
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        pinned.insert(address, bytes);
        Ok(address)
    }

    pub fn unpin(&self, address: u64) {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = pinned.remove(&address);
        drop(pinned);
        if let Some(bytes) = bytes {
            release(address, bytes, "a copy");
        }
    }

    pub fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        // SAFETY: Memory checks that `from` fits the allocation at `to`.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    pub fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        // SAFETY: Memory checks that `to` fits the allocation at `from`.
        unsafe {
            to.as_mut_ptr()
                .copy_from_nonoverlapping(from as *const u8, to.len())
        };
        Ok(())
    }

    /// # Safety
    /// Both ranges are allocated, and whoever writes or frees one of them waits for the returned fence before.
    // SAFETY: as above.
    pub unsafe fn fetch(&self, to: u64, from: u64, bytes: usize, after: &[&Fence]) -> Result<Fence> {
        // SAFETY: the caller's promise.
        Ok(UPLOADS.with(|stream| unsafe { stream.ask(to, Source::Memory(from), bytes, after) }))
    }

    pub fn fetch_staged(&self, to: u64, from: &[u8], after: &[&Fence]) -> Result<Fence> {
        let source = Source::Staged(from.to_vec());
        // SAFETY: Memory checks that `from` fits the allocation at `to`, and waits for the fence.
        Ok(UPLOADS.with(|stream| unsafe { stream.ask(to, source, from.len(), after) }))
    }

    /// # Safety
    /// As [`Driver::fetch`].
    // SAFETY: as above.
    pub unsafe fn store(&self, to: u64, from: u64, bytes: usize, after: &[&Fence]) -> Result<Fence> {
        // SAFETY: the caller's promise.
        Ok(DOWNLOADS.with(|stream| unsafe { stream.ask(to, Source::Memory(from), bytes, after) }))
    }

    /// Kernels happen at once: those to come run after what has happened now.
    pub fn join(&self, fence: &Fence) -> Result<()> {
        fence.wait();
        Ok(())
    }

    pub fn wait(&self, fence: &Fence) -> Result<()> {
        fence.wait();
        Ok(())
    }

    pub fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: Memory checks both ranges; they are of two allocations.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes) };
        Ok(())
    }

    pub fn zero(&self, at: u64, bytes: usize) -> Result<()> {
        // SAFETY: Memory checks the range.
        unsafe { (at as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    /// # Safety
    /// `params` are the kernel's, and every pointer in them is good for what the kernel does with it.
    // SAFETY: as above.
    pub unsafe fn launch(
        &self,
        kernel: &str,
        blocks: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        params: *const c_void,
        params_bytes: usize,
    ) -> Result<()> {
        let failed = |what: String| Failure::Call {
            code: "emulator".into(),
            what,
        };
        let name = CString::new(kernel).map_err(|_| failed(format!("{kernel:?} is no kernel")))?;
        let mut error = [0u8; 512];
        let block = [threads, 1, 1];
        // SAFETY: the caller answers for `params`; the arrays are as long as the function reads.
        let code = unsafe {
            emu_launch(
                name.as_ptr(),
                blocks.as_ptr(),
                block.as_ptr(),
                shared_bytes,
                params,
                params_bytes as u64,
                error.as_mut_ptr().cast(),
                error.len() as u64,
            )
        };
        if code == 0 {
            return Ok(());
        }
        let end = error.iter().position(|&b| b == 0).unwrap_or(error.len());
        Err(failed(String::from_utf8_lossy(&error[..end]).into_owned()))
    }

    /// Of what this thread asked for.
    pub fn synchronize(&self) -> Result<()> {
        UPLOADS.with(copies::Stream::finish);
        DOWNLOADS.with(copies::Stream::finish);
        Ok(())
    }

    pub fn record(&self) -> Result<Event> {
        Ok(Event(Instant::now()))
    }

    pub fn elapsed_ms(&self, from: &Event, to: &Event) -> Result<f32> {
        Ok(to.0.duration_since(from.0).as_secs_f32() * 1e3)
    }
}
