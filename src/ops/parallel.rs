//! Loops on candle's threads.

/// Below this many values a second thread costs more than it brings.
const PARALLEL_FROM: usize = 1 << 15;

/// Runs `task` for `0..tasks`, on candle's threads if there are enough `values` in all.
pub(crate) fn for_each(tasks: usize, values: usize, task: impl Fn(usize) + Sync) {
    if tasks < 2 || values < PARALLEL_FROM {
        (0..tasks).for_each(task);
    } else {
        candle_core::utils::barrier_pool().execute_chunked(tasks, |range| range.for_each(&task));
    }
}
