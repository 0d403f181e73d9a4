//! Copies beside the kernels: page-locked host memory, the streams of either direction, and the fences between them.

use std::ffi::c_void;
use std::sync::PoisonError;

use cudarc::driver::{DriverError, result, sys};

use super::{Driver, Failure, Fence, Result, failed};

impl Driver {
    /// Page-locked host memory that the card's copy engines read and write, all 0.
    pub fn pin(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // Not write-combined: the CPU reads it too.
        // SAFETY: plain allocation; used as bytes only after they were written, below.
        match unsafe { result::malloc_host(bytes.max(1), sys::CU_MEMHOSTALLOC_PORTABLE) } {
            Ok(memory) => {
                // SAFETY: the memory is that long. Zeroed, so that a slice of it is one of initialised bytes.
                unsafe { memory.cast::<u8>().write_bytes(0, bytes) };
                Ok(memory as u64)
            }
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let asked = bytes as u64;
                Err(Failure::OutOfPinned { asked })
            }
            Err(error) => Err(failed("lock host memory", error)),
        }
    }

    /// Frees what [`Driver::pin`] gave. The caller has waited for the copies it takes part in.
    pub fn unpin(&self, address: u64) {
        if self.enter().is_ok() {
            // SAFETY: the address came from `pin` and is freed once, by its owner.
            let _ = unsafe { result::free_host(address as *mut c_void) };
        }
    }

    /// Copies page-locked host memory to the device beside the kernels: after those asked for so far, and after `after`.
    ///
    /// # Safety
    /// Both ranges are allocated, and whoever writes or frees one of them waits for the returned fence before.
    // SAFETY: as above.
    pub unsafe fn fetch(&self, to: u64, from: u64, bytes: usize, after: &[&Fence]) -> Result<Fence> {
        self.beside("fetch", self.uploads, after, || {
            // SAFETY: the caller's promise; the bytes are initialised, as all page-locked memory.
            let from = unsafe { std::slice::from_raw_parts(from as *const u8, bytes) };
            // SAFETY: the caller's promise.
            unsafe { result::memcpy_htod_async(to, from, self.uploads) }.map_err(|e| failed("fetch", e))
        })
    }

    /// [`Driver::fetch`] of ordinary memory, through the staging buffers; returns when `from` may be reused.
    pub fn fetch_staged(&self, to: u64, from: &[u8], after: &[&Fence]) -> Result<Fence> {
        let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
        self.beside("fetch", self.uploads, after, || {
            // SAFETY: Memory checks that `from` fits the allocation at `to`, and waits for the fence.
            unsafe { staging.upload(self.uploads, to, from) }
        })
    }

    /// Copies device memory to page-locked host memory beside the kernels: after those asked for so far, and after `after`.
    ///
    /// # Safety
    /// As [`Driver::fetch`].
    // SAFETY: as above.
    pub unsafe fn store(&self, to: u64, from: u64, bytes: usize, after: &[&Fence]) -> Result<Fence> {
        self.beside("store", self.downloads, after, || {
            // SAFETY: the caller's promise; the bytes are initialised, as all page-locked memory.
            let to = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
            // SAFETY: the caller's promise.
            unsafe { result::memcpy_dtoh_async(to, from, self.downloads) }.map_err(|e| failed("store", e))
        })
    }

    /// Lets `stream` do what `copy` asks of it, after the present end of the compute stream and after `after`.
    fn beside(
        &self,
        what: &'static str,
        stream: sys::CUstream,
        after: &[&Fence],
        copy: impl FnOnce() -> Result<()>,
    ) -> Result<Fence> {
        self.enter()?;
        let (present, done) = (Fence::new()?, Fence::new()?);
        present.record(self.stream)?;
        for fence in after.iter().copied().chain([&present]) {
            fence.hold(stream)?;
        }
        let asked = copy().and_then(|()| done.record(stream));
        if let Err(failure) = asked {
            // What was asked of the stream all the same must not go on behind the owners' backs.
            // SAFETY: the stream lives as long as the process.
            unsafe { result::stream::synchronize(stream) }.map_err(|e| failed(what, e))?;
            return Err(failure);
        }
        Ok(done)
    }

    /// What is asked of the compute stream from now on runs after `fence`.
    pub fn join(&self, fence: &Fence) -> Result<()> {
        self.enter()?;
        fence.hold(self.stream)
    }

    /// Waits for `fence`.
    pub fn wait(&self, fence: &Fence) -> Result<()> {
        self.enter()?;
        // SAFETY: the event is alive, and was recorded when it was made.
        unsafe { result::event::synchronize(fence.0) }.map_err(|e| failed("wait for a copy", e))
    }
}

impl Fence {
    /// Of nothing yet.
    fn new() -> Result<Self> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        let event = result::event::create(flags).map_err(|e| failed("create an event", e))?;
        Ok(Self(event))
    }

    /// Stands for the present end of `stream`.
    fn record(&self, stream: sys::CUstream) -> Result<()> {
        // SAFETY: event and stream are of the same context and alive.
        unsafe { result::event::record(self.0, stream) }.map_err(|e| failed("record an event", e))
    }

    /// What is asked of `stream` from now on runs after this.
    fn hold(&self, stream: sys::CUstream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are alive.
        unsafe { result::stream::wait_event(stream, self.0, flags) }.map_err(|e| failed("wait for a copy", e))
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once. The driver keeps what a pending record or wait needs.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
