//! Work on independent rows, over the threads of the rayon pool when there is enough of it.
//!
//! Cuts never depend on the number of threads, and rows never on each other: one thread and many give the same bits.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rayon::prelude::*;

/// Runs `f`, one pass over the model, with the other threads of the pool standing by.
///
/// A pass is hundreds of operations of some ten microseconds, and waking a sleeping thread costs as much as one of them.
/// Each other thread therefore looks for work without pause until the pass is over, as OpenMP's threads do. One pass of
/// the process is attended at a time; another one beside it runs as it would without.
pub fn attended<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    static ATTENDED: AtomicBool = AtomicBool::new(false);
    // More threads than cores would only take turns at waiting.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let others = rayon::current_num_threads().min(cores) - 1;
    if others == 0 || ATTENDED.swap(true, Ordering::Acquire) {
        return f();
    }
    let _free = SetOnDrop(&ATTENDED, false);
    let (present, begun, over) = (
        AtomicUsize::new(0),
        AtomicBool::new(false),
        AtomicBool::new(false),
    );
    rayon::scope(|scope| {
        for _ in 0..others {
            scope.spawn(|_| {
                present.fetch_add(1, Ordering::AcqRel);
                // Too late: this may be the thread of the pass itself, waiting for a piece of work that another one has.
                if begun.load(Ordering::Acquire) {
                    return;
                }
                let mut idle = 0u32;
                while !over.load(Ordering::Acquire) {
                    if rayon::yield_now() == Some(rayon::Yield::Executed) {
                        idle = 0;
                    } else if idle < PATIENCE {
                        idle += 1;
                        std::hint::spin_loop();
                    } else {
                        std::thread::yield_now();
                    }
                }
            });
        }
        for _ in 0..PATIENCE {
            if present.load(Ordering::Acquire) == others {
                break;
            }
            std::hint::spin_loop();
        }
        begun.store(true, Ordering::Release);
        let _over = SetOnDrop(&over, true);
        f()
    })
}

/// Idle rounds, of some nanoseconds each, before a thread lets others have its core.
const PATIENCE: u32 = 20_000;

/// Sets a flag in the end, also when the pass panics.
struct SetOnDrop<'a>(&'a AtomicBool, bool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(self.1, Ordering::Release);
    }
}

/// Below this many nanoseconds of work, waking another thread costs more than it saves.
const WORTH_A_THREAD: usize = 10_000;

/// Calls `f(first_row, rows)` on pieces of `out`, whose rows are `columns` long and cost about `nanoseconds` each.
pub fn rows<T: Send>(out: &mut [T], columns: usize, nanoseconds: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let count = out.len() / columns.max(1);
    if count.saturating_mul(nanoseconds.max(1)) < 2 * WORTH_A_THREAD || rayon::current_num_threads() == 1 {
        return f(0, out);
    }
    let per_task = (WORTH_A_THREAD / nanoseconds.max(1)).clamp(1, count.div_ceil(2));
    out.par_chunks_mut(per_task * columns)
        .enumerate()
        .for_each(|(i, piece)| f(i * per_task, piece));
}

/// Calls `f` on every item, in parallel when the whole costs at least `nanoseconds` worth a thread.
pub fn items<I: Send>(items: Vec<I>, nanoseconds: usize, f: impl Fn(I) + Sync + Send) {
    if nanoseconds < 2 * WORTH_A_THREAD || items.len() == 1 || rayon::current_num_threads() == 1 {
        return items.into_iter().for_each(f);
    }
    items.into_par_iter().for_each(f);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes of several threads at once, each full of small pieces of work: none waits for another for ever.
    #[test]
    fn passes_beside_each_other_come_to_an_end() {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(3)
            .build()
            .expect("a pool");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let sum = pool.install(|| {
                            attended(|| {
                                let mut out = vec![0u64; 64];
                                for _ in 0..20 {
                                    rows(&mut out, 1, WORTH_A_THREAD, |first, out| {
                                        for (i, out) in out.iter_mut().enumerate() {
                                            *out += (first + i) as u64;
                                        }
                                    });
                                }
                                out.iter().sum::<u64>()
                            })
                        });
                        assert_eq!(sum, 20 * 63 * 64 / 2);
                    }
                });
            }
        });
    }

    #[test]
    fn a_pass_that_panics_leaves_the_next_one_attended() {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(2)
            .build()
            .expect("a pool");
        for _ in 0..3 {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.install(|| attended(|| -> u32 { panic!("on purpose") }))
            }));
            assert!(result.is_err());
            assert_eq!(pool.install(|| attended(|| 7)), 7);
        }
    }
}
