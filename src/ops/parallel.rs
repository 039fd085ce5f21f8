//! Loops on candle's threads.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::output::Output;

/// Below this many values a second thread costs more than it brings.
const PARALLEL_FROM: usize = 1 << 15;

/// Whether work on so many values is for more than one thread.
pub(crate) fn is_parallel(values: usize) -> bool {
    values >= PARALLEL_FROM
}

/// The number of threads that share parallel work.
pub(crate) fn threads() -> usize {
    candle_core::utils::barrier_pool().n_workers() + 1
}

/// The next task of a thread's share, on a cache line of its own and of the line that is fetched with it.
#[repr(align(128))]
struct Cursor(AtomicUsize);

/// A thread takes about so many pieces of its share.
const PIECES: usize = 8;

/// Runs `task` for `0..tasks`, on candle's threads if there are enough `values` in all.
///
/// Each thread begins with a share of its own, neighbouring tasks and the same ones in each loop with as many, which its
/// caches may still know; whoever is ready takes from what the others have left.
///
/// A task must not call this again: the pool would wait for itself.
pub(crate) fn for_each(tasks: usize, values: usize, task: impl Fn(usize) + Sync) {
    if tasks < 2 || !is_parallel(values) {
        return (0..tasks).for_each(task);
    }
    let threads = threads();
    let piece = tasks.div_ceil(threads * PIECES);
    let end_of = |share: usize| tasks * (share + 1) / threads;
    let cursor = |share: usize| Cursor(AtomicUsize::new(tasks * share / threads));
    let cursors: Vec<_> = (0..threads).map(cursor).collect();
    candle_core::utils::barrier_pool().execute(|thread| {
        for share in (thread..threads).chain(0..thread) {
            let (Cursor(next), end) = (&cursors[share], end_of(share));
            // Whether anything is left is looked up first: that leaves the line with its owner.
            while next.load(Ordering::Relaxed) < end {
                let start = next.fetch_add(piece, Ordering::Relaxed);
                (start..end.min(start + piece)).for_each(&task);
            }
        }
    });
}

/// What `task` gives for `0..tasks`, in this order; run as by [`for_each`].
pub(crate) fn map<R: Send>(
    tasks: usize,
    values: usize,
    task: impl Fn(usize) -> R + Sync,
) -> Vec<R> {
    let mut results = Output::new(tasks);
    let parts = results.parts();
    for_each(tasks, values, |index| {
        let result = task(index);
        // SAFETY: no two tasks have the same index.
        unsafe { parts.write(index, result) }
    });
    // SAFETY: every task has written its result.
    unsafe { results.finish() }
}
