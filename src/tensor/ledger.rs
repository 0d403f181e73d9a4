//! Who holds how many bytes of which memory: the books of a run, and of a plan of one.
//!
//! A [`Ledger`] counts every tensor that is made in its scope, until it is dropped, under the account that was named by
//! [`account`] when it was made. In the scope of [`Ledger::plan`] tensors have no memory at all: the constructors of a run,
//! called there, say what the run will allocate, because they are what allocates it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A kind of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pool {
    /// Of the card.
    Device,
    /// Of the host, page-locked for the card's copy engines.
    Pinned,
    /// Of the host.
    Host,
    /// A scratch file, mapped: in host memory as far as the system likes.
    Disk,
}

impl Pool {
    /// Every pool, in the order of tables.
    pub const ALL: [Pool; 4] = [Pool::Device, Pool::Pinned, Pool::Host, Pool::Disk];

    /// For tables.
    pub const fn name(self) -> &'static str {
        match self {
            Pool::Device => "device",
            Pool::Pinned => "pinned host",
            Pool::Host => "host",
            Pool::Disk => "disk",
        }
    }
}

/// What one account holds in one pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// The memory.
    pub pool: Pool,
    /// What it is for.
    pub account: &'static str,
    /// Bytes now.
    pub bytes: u64,
}

#[derive(Debug, Default)]
struct Books {
    accounts: BTreeMap<(Pool, &'static str), u64>,
    held: [u64; 4],
    peaks: [u64; 4],
}

/// Books of memory; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Ledger(Arc<Mutex<Books>>);

/// What tensors are counted under when no account was named.
const OTHER: &str = "other";

thread_local! {
    static CURRENT: RefCell<Option<Ledger>> = const { RefCell::new(None) };
    static ACCOUNT: Cell<&'static str> = const { Cell::new(OTHER) };
    static PLANNING: Cell<bool> = const { Cell::new(false) };
}

/// Puts a thread's setting back, whatever happens.
struct Restore<F: FnMut()>(F);

impl<F: FnMut()> Drop for Restore<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Counts the tensors that `f` makes under `name`.
pub fn account<R>(name: &'static str, f: impl FnOnce() -> R) -> R {
    let before = ACCOUNT.replace(name);
    let _restore = Restore(|| ACCOUNT.set(before));
    f()
}

/// Are tensors of this thread made without memory?
pub fn planning() -> bool {
    PLANNING.get()
}

impl Ledger {
    /// Empty books.
    pub fn new() -> Self {
        Self::default()
    }

    /// Counts what `f` makes on this thread.
    pub fn scope<R>(&self, f: impl FnOnce() -> R) -> R {
        let before = CURRENT.replace(Some(self.clone()));
        let _restore = Restore(|| drop(CURRENT.replace(before.clone())));
        f()
    }

    /// [`Ledger::scope`] in which tensors have sizes but no memory and no contents.
    pub fn plan<R>(&self, f: impl FnOnce() -> R) -> R {
        let before = PLANNING.replace(true);
        let _restore = Restore(|| PLANNING.set(before));
        self.scope(f)
    }

    /// What every account holds now, the empty ones left out.
    pub fn lines(&self) -> Vec<Line> {
        let books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = books.accounts.iter().filter(|(_, bytes)| **bytes > 0);
        lines
            .map(|(&(pool, account), &bytes)| Line { pool, account, bytes })
            .collect()
    }

    /// Bytes that are held in `pool` now.
    pub fn held(&self, pool: Pool) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).held[pool as usize]
    }

    /// Bytes that were held in `pool` at most.
    pub fn peak(&self, pool: Pool) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).peaks[pool as usize]
    }

    fn change(&self, pool: Pool, account: &'static str, f: impl Fn(u64) -> u64) {
        let mut books = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = books.accounts.entry((pool, account)).or_default();
        *bytes = f(*bytes);
        let at = pool as usize;
        books.held[at] = f(books.held[at]);
        books.peaks[at] = books.peaks[at].max(books.held[at]);
    }
}

/// Bytes in the books of the ledger that was in force when they were made.
#[derive(Debug)]
pub(crate) struct Counted {
    ledger: Option<Ledger>,
    pool: Pool,
    account: &'static str,
    bytes: u64,
}

impl Counted {
    /// Enters `bytes` of `pool`.
    pub fn new(pool: Pool, bytes: usize) -> Self {
        Self::of(
            CURRENT.with_borrow(Clone::clone),
            pool,
            ACCOUNT.get(),
            bytes as u64,
        )
    }

    /// The memory that they are of.
    pub fn pool(&self) -> Pool {
        self.pool
    }

    fn of(ledger: Option<Ledger>, pool: Pool, account: &'static str, bytes: u64) -> Self {
        if let Some(ledger) = &ledger {
            ledger.change(pool, account, |held| held + bytes);
        }
        Self {
            ledger,
            pool,
            account,
            bytes,
        }
    }
}

/// A clone is of other memory.
impl Clone for Counted {
    fn clone(&self) -> Self {
        Self::of(self.ledger.clone(), self.pool, self.account, self.bytes)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(ledger) = &self.ledger {
            ledger.change(self.pool, self.account, |held| held - self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{DType, Device, Tensor};

    #[test]
    fn tensors_are_counted_by_account_until_they_are_dropped() {
        let ledger = Ledger::new();
        let (a, b) = ledger.scope(|| {
            let a = account("weights", || Tensor::zeros(DType::F32, [10]));
            (a.clone(), account("gradients", || Tensor::zeros(DType::F16, [4])))
        });
        let _elsewhere = Tensor::zeros(DType::F32, [1000]);
        let line = |account, bytes| Line {
            pool: Pool::Host,
            account,
            bytes,
        };
        assert_eq!(ledger.lines(), [line("gradients", 8), line("weights", 40)]);
        drop((a, b));
        assert_eq!((ledger.held(Pool::Host), ledger.lines().len()), (0, 0));
        assert_eq!(ledger.peak(Pool::Host), 88);
    }

    #[test]
    fn planned_tensors_are_counted_and_have_no_memory() {
        let ledger = Ledger::new();
        let tensors = ledger.plan(|| {
            let host = Tensor::from_slice(&[1f32; 6], [2, 3]);
            let there = Tensor::zeros_on(Device::Cuda(0), DType::BF16, [1 << 40]).unwrap();
            let shared = there.clone();
            let narrow = host.to_dtype(DType::F16);
            (host, there, shared, narrow)
        });
        assert!(tensors.0.is_planned() && tensors.3.is_planned());
        assert_eq!(ledger.held(Pool::Device), 2 << 40);
        // 24 and 12 bytes in words of 8.
        assert_eq!(ledger.held(Pool::Host), 24 + 16);
        assert_eq!(tensors.1.device(), Device::Cuda(0));
        drop(tensors);
        assert_eq!(ledger.held(Pool::Device) + ledger.held(Pool::Host), 0);
        assert!(!planning());
    }
}
