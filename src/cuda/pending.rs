//! The copies between host and device that some memory takes part in, and that go on beside the kernels.
//!
//! Every copy ends in a fence, and both of its memories remember it: the one that it writes and the one that it reads. Whoever
//! comes next to either of them waits for that fence, the compute stream, the other copies or the host; so nobody above this
//! file has to remember that a copy is under way. All copies of one direction run on one stream in the order they were asked
//! for: the last fence stands for all before it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::Fence;

/// The copies of one piece of memory that nobody has waited for yet.
#[derive(Debug, Default)]
pub(super) struct Pending(Mutex<Copies>);

/// The last of each kind.
#[derive(Debug, Default)]
pub(super) struct Copies {
    /// It writes the memory: nobody may read or write that yet.
    written: Option<Arc<Fence>>,
    /// It reads the memory: nobody may write that yet.
    read: Option<Arc<Fence>>,
}

impl Pending {
    /// The copies, to look at or to change.
    pub fn lock(&self) -> MutexGuard<'_, Copies> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// [`Pending::lock`] for the only owner.
    pub fn get_mut(&mut self) -> &mut Copies {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Copies {
    /// What a reader of the memory waits for.
    pub fn before_reading(&self) -> impl Iterator<Item = &Fence> {
        self.written.as_deref().into_iter()
    }

    /// What a writer of the memory waits for.
    pub fn before_writing(&self) -> impl Iterator<Item = &Fence> {
        self.written.as_deref().into_iter().chain(self.read.as_deref())
    }

    /// A copy that reads the memory was asked for.
    pub fn reads(&mut self, fence: Arc<Fence>) {
        self.read = Some(fence);
    }

    /// A copy that writes the memory was asked for; it waits for those before it.
    pub fn writes(&mut self, fence: Arc<Fence>) {
        *self = Self {
            written: Some(fence),
            read: None,
        };
    }

    /// Nothing writes the memory any more.
    pub fn written(&mut self) {
        self.written = None;
    }

    /// No copy takes part in the memory any more.
    pub fn over(&mut self) {
        *self = Self::default();
    }
}
