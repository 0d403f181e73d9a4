//! Copies beside the kernels, as late or as early as a card may run them: a wait that is missing shows in the numbers.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::FRESH;

/// When copies happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Landing {
    /// When something first waits for them: until then their destination holds NaN, and they read their source only then.
    Late,
    /// When they are asked for.
    Early,
}

/// What a copy reads.
pub(super) enum Source {
    /// Memory, when the copy happens.
    Memory(u64),
    /// What staging buffers held when it was asked for.
    Staged(Vec<u8>),
}

struct Copy {
    to: u64,
    from: Source,
    bytes: usize,
}

/// One stream of copies. Each thread has its own of either direction, so that threads do not hide each other's missing waits.
#[derive(Default)]
pub(super) struct Stream(Arc<Mutex<Queue>>);

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Copy>,
    /// How many of all that ever waited have happened.
    done: u64,
}

/// The end of a copy.
pub(in super::super) struct Fence {
    queue: Arc<Mutex<Queue>>,
    /// It has happened when so many of the queue's have.
    at: u64,
}

impl std::fmt::Debug for Fence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fence({})", self.at)
    }
}

thread_local! {
    pub(super) static UPLOADS: Stream = Stream::default();
    pub(super) static DOWNLOADS: Stream = Stream::default();
    static LANDING: Cell<Option<Landing>> = const { Cell::new(None) };
}

/// From now on copies that this thread asks for happen then. Otherwise `GLMTUNE_EMU_COPIES` says it: `late`, as without it, or
/// `early`.
pub fn land_copies(landing: Landing) {
    LANDING.set(Some(landing));
}

/// How many copies that this thread asked for nothing has waited for yet.
pub fn copies_under_way() -> usize {
    let waiting = |stream: &Stream| stream.queue().waiting.len();
    UPLOADS.with(waiting) + DOWNLOADS.with(waiting)
}

/// Does a copy that this thread asked for, and that has not happened, read or write this memory?
pub(super) fn under_way(address: u64, bytes: usize) -> bool {
    let here = |at: u64, len: usize| at < address + bytes as u64 && address < at + len as u64;
    let touches = |copy: &Copy| {
        here(copy.to, copy.bytes) || matches!(copy.from, Source::Memory(from) if here(from, copy.bytes))
    };
    let waiting = |stream: &Stream| stream.queue().waiting.iter().any(touches);
    UPLOADS.with(waiting) || DOWNLOADS.with(waiting)
}

fn landing() -> Landing {
    static ASKED: OnceLock<Landing> = OnceLock::new();
    LANDING.get().unwrap_or_else(|| {
        *ASKED.get_or_init(|| match std::env::var("GLMTUNE_EMU_COPIES").as_deref() {
            Ok("early") => Landing::Early,
            _ => Landing::Late,
        })
    })
}

impl Stream {
    /// Asks for a copy after `after`.
    ///
    /// # Safety
    /// Both ranges are allocated, and whoever writes or frees one of them waits for the returned fence before.
    // SAFETY: as above.
    pub unsafe fn ask(&self, to: u64, from: Source, bytes: usize, after: &[&Fence]) -> Fence {
        for fence in after {
            fence.wait();
        }
        let mut queue = self.queue();
        if landing() == Landing::Late {
            // SAFETY: the caller's promise.
            unsafe { (to as *mut u8).write_bytes(FRESH, bytes) };
        }
        queue.waiting.push_back(Copy { to, from, bytes });
        let fence = Fence {
            at: queue.done + queue.waiting.len() as u64,
            queue: Arc::clone(&self.0),
        };
        drop(queue);
        if landing() == Landing::Early {
            fence.wait();
        }
        fence
    }

    /// Lets everything happen that was asked for.
    pub fn finish(&self) {
        self.queue().finish(u64::MAX);
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fence {
    /// The copy has happened when this returns, and so have those before it.
    pub fn wait(&self) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .finish(self.at);
    }
}

impl Queue {
    fn finish(&mut self, at: u64) {
        while self.done < at {
            let Some(Copy { to, from, bytes }) = self.waiting.pop_front() else {
                return;
            };
            let from = match &from {
                Source::Memory(address) => *address as *const u8,
                Source::Staged(staged) => staged.as_ptr(),
            };
            // SAFETY: whoever asked promised that both ranges stay as they are until somebody has waited; they are of two
            // allocations.
            unsafe { (to as *mut u8).copy_from_nonoverlapping(from, bytes) };
            self.done += 1;
        }
    }
}
