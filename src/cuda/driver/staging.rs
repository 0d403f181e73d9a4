//! Page-locked host memory between ordinary memory and the card: the card's copy engine reads nothing else without stopping
//! the program, and a pair of buffers keeps it busy while the next part is copied into the other one.

use std::ffi::c_void;

use cudarc::driver::{result, sys};
use rayon::prelude::*;

use super::{Result, failed};

/// Small copies (token ids, a step's numbers) have buffers of their own: they need not wait for large ones, and so many can
/// be under way before the program has to wait for the card at all.
const SMALL: (usize, usize) = (64 << 10, 16);
/// Large copies (weights): enough to reach the bus's speed.
const LARGE: (usize, usize) = (32 << 20, 2);
/// One thread copies about as fast as the bus; parts of this size are shared out, which also reads a mapped file in parallel.
const PART: usize = 1 << 20;

/// The two sets of buffers of a device. The caller holds the device's lock, and its context is current.
#[derive(Default)]
pub(super) struct Staging {
    small: Ring,
    large: Ring,
}

#[derive(Default)]
struct Ring {
    buffers: Vec<Buffer>,
    next: usize,
}

struct Buffer {
    memory: *mut u8,
    /// When the card has finished with what was last asked of this buffer.
    done: sys::CUevent,
}

// SAFETY: page-locked memory and events belong to the context, not to a thread.
unsafe impl Send for Buffer {}

impl Staging {
    /// Asks for `from` to be copied to the device; returns when `from` has been read.
    ///
    /// # Safety
    /// `to` is device memory of at least `from.len()` bytes.
    // SAFETY: as above.
    pub unsafe fn upload(&mut self, stream: sys::CUstream, to: u64, from: &[u8]) -> Result<()> {
        let (ring, (size, _)) = self.ring(from.len())?;
        for (i, part) in from.chunks(size).enumerate() {
            let buffer = ring.take();
            buffer.wait("upload")?;
            // SAFETY: a buffer holds `size` bytes, and the card has finished with it.
            let staged = unsafe { std::slice::from_raw_parts_mut(buffer.memory, part.len()) };
            copy(staged, part);
            // SAFETY: `staged` is page-locked and not touched before `done`; the caller answers for `to`.
            unsafe { result::memcpy_htod_async(to + (i * size) as u64, staged, stream) }
                .map_err(|e| failed("upload", e))?;
            buffer.mark(stream, "upload")?;
        }
        Ok(())
    }

    /// Copies from the device, after all that was asked of the stream before; returns when `to` is filled.
    ///
    /// # Safety
    /// `from` is device memory of at least `to.len()` bytes.
    // SAFETY: as above.
    pub unsafe fn download(&mut self, stream: sys::CUstream, from: u64, to: &mut [u8]) -> Result<()> {
        let (ring, (size, _)) = self.ring(to.len())?;
        let mut arriving: Option<(&Buffer, &mut [u8])> = None;
        // With two buffers, the one before has arrived and been emptied when it is taken again.
        let buffers = &ring.buffers;
        for (i, part) in to.chunks_mut(size).enumerate() {
            let buffer = &buffers[i % buffers.len()];
            buffer.wait("download")?;
            // SAFETY: a buffer holds `size` bytes, and the card has finished with it.
            let staged = unsafe { std::slice::from_raw_parts_mut(buffer.memory, part.len()) };
            // SAFETY: `staged` is page-locked and not touched before `done`; the caller answers for `from`.
            unsafe { result::memcpy_dtoh_async(staged, from + (i * size) as u64, stream) }
                .map_err(|e| failed("download", e))?;
            buffer.mark(stream, "download")?;
            if let Some((buffer, part)) = arriving.replace((buffer, part)) {
                buffer.empty_into(part)?;
            }
        }
        arriving.map_or(Ok(()), |(buffer, part)| buffer.empty_into(part))
    }

    /// The buffers for a copy of `bytes` bytes, made at their first use.
    fn ring(&mut self, bytes: usize) -> Result<(&mut Ring, (usize, usize))> {
        let (ring, kind) = match bytes <= SMALL.0 {
            true => (&mut self.small, SMALL),
            false => (&mut self.large, LARGE),
        };
        let (size, count) = kind;
        while ring.buffers.len() < count {
            ring.buffers.push(Buffer::new(size)?);
        }
        Ok((ring, kind))
    }
}

impl Ring {
    fn take(&mut self) -> &Buffer {
        self.next = (self.next + 1) % self.buffers.len();
        &self.buffers[self.next]
    }
}

impl Buffer {
    fn new(bytes: usize) -> Result<Buffer> {
        let what = "allocate page-locked host memory";
        // Not write-combined: downloads are read by the CPU.
        // SAFETY: plain allocation; used as bytes only after they were written.
        let memory = unsafe { result::malloc_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        let memory: *mut c_void = memory.map_err(|e| failed(what, e))?;
        // SAFETY: the memory is `bytes` long. Zeroed, so that a slice of it is a slice of initialised bytes.
        unsafe { memory.cast::<u8>().write_bytes(0, bytes) };
        let done = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let done = done.map_err(|e| failed(what, e))?;
        let memory = memory.cast();
        Ok(Buffer { memory, done })
    }

    fn wait(&self, what: &'static str) -> Result<()> {
        // SAFETY: the event lives as long as the buffer; one never recorded counts as done.
        unsafe { result::event::synchronize(self.done) }.map_err(|e| failed(what, e))
    }

    fn mark(&self, stream: sys::CUstream, what: &'static str) -> Result<()> {
        // SAFETY: event and stream are of the same context and alive.
        unsafe { result::event::record(self.done, stream) }.map_err(|e| failed(what, e))
    }

    fn empty_into(&self, part: &mut [u8]) -> Result<()> {
        self.wait("download")?;
        // SAFETY: a buffer is at least as long as the part that was sent for, and the card has finished writing it.
        copy(part, unsafe {
            std::slice::from_raw_parts(self.memory, part.len())
        });
        Ok(())
    }
}

fn copy(to: &mut [u8], from: &[u8]) {
    if to.len() <= PART {
        to.copy_from_slice(from);
    } else {
        let parts = to.par_chunks_mut(PART).zip(from.par_chunks(PART));
        parts.for_each(|(to, from)| to.copy_from_slice(from));
    }
}
