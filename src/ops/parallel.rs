//! Loops on candle's threads.

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

/// Runs `task` for `0..tasks`, on candle's threads if there are enough `values` in all.
///
/// A task must not call this again: the pool would wait for itself.
pub(crate) fn for_each(tasks: usize, values: usize, task: impl Fn(usize) + Sync) {
    if tasks < 2 || !is_parallel(values) {
        (0..tasks).for_each(task);
    } else {
        candle_core::utils::barrier_pool().execute_chunked(tasks, |range| range.for_each(&task));
    }
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
