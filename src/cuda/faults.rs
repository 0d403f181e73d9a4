//! Allocations that fail as the card would let them fail, for the tests of what comes after.

use std::cell::Cell;

use super::failure::Result;

thread_local! {
    static MADE: Cell<u64> = const { Cell::new(0) };
    static FAILS: Cell<u64> = Cell::new(asked());
}

/// For programs: `GLMTUNE_EMU_FAIL_ALLOCATION` is what they would give [`fail_allocation`].
fn asked() -> u64 {
    let asked = std::env::var("GLMTUNE_EMU_FAIL_ALLOCATION").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// The `n`-th allocation of device or page-locked memory that this thread asks for from now on fails, once; 0: none does.
/// The scratch memory of a device, which is reserved once in a process, does not count.
pub fn fail_allocation(n: u64) {
    FAILS.set(n);
}

/// How many allocations of device or page-locked memory this thread has asked for so far.
pub fn allocations() -> u64 {
    MADE.get()
}

/// One more allocation; `refuse` says how it fails when its turn has come.
pub(super) fn count_allocation(refuse: impl FnOnce() -> Result<()>) -> Result<()> {
    MADE.set(MADE.get() + 1);
    match FAILS.get() {
        0 => Ok(()),
        left => {
            FAILS.set(left - 1);
            if left == 1 { refuse() } else { Ok(()) }
        }
    }
}
