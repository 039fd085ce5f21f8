//! How the work on a tensor is divided: first sums over its values, then a second look at each.

use super::output::Output;

/// Which values a piece of work is about: a part of those of a group of channels.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub group: usize,
    pub part: usize,
}

/// A tensor's groups of channels, and the parts of each. It depends on the shape alone, and sums are
/// merged part by part, so that results do not depend on the number of threads.
#[derive(Clone, Copy)]
pub(super) struct Division {
    pub groups: usize,
    pub parts: usize,
    /// In the whole tensor.
    pub values: usize,
}

/// Values of a part: few enough for a core's first cache, enough to make the merging cheap.
pub(super) const PART: usize = 1 << 13;

/// Below this many values a second thread costs more than it brings.
const PARALLEL_FROM: usize = 1 << 15;

/// So many groups for each thread keep all of them busy to the end.
const GROUPS_PER_THREAD: usize = 4;

impl Division {
    /// Reduces every tile, finishes every group with what came of its tiles, and then visits every
    /// tile with what came of its group. Gives the latter.
    ///
    /// A group stays with one thread, and in its cache, if there are groups enough.
    pub fn sweep<P: Send + Sync, G: Send + Sync>(
        self,
        reduce: impl Fn(Tile) -> P + Sync,
        finish: impl Fn(usize, &[P]) -> G + Sync,
        visit: impl Fn(Tile, &G) + Sync,
    ) -> Vec<G> {
        let Self { groups, parts, .. } = self;
        let threads = candle_core::utils::barrier_pool().n_workers() + 1;
        if parts == 1 || groups >= GROUPS_PER_THREAD * threads || !self.is_parallel() {
            return self.map(groups, |group| {
                let tiles = (0..parts).map(|part| Tile { group, part });
                let reduced: Vec<_> = tiles.clone().map(&reduce).collect();
                let finished = finish(group, &reduced);
                tiles.for_each(|tile| visit(tile, &finished));
                finished
            });
        }
        let tile = |index: usize| Tile {
            group: index / parts,
            part: index % parts,
        };
        let reduced = self.map(groups * parts, |index| reduce(tile(index)));
        let reduced = reduced.chunks(parts).enumerate();
        let finished: Vec<_> = reduced.map(|(group, tiles)| finish(group, tiles)).collect();
        self.for_each(groups * parts, |index| {
            let tile = tile(index);
            visit(tile, &finished[tile.group]);
        });
        finished
    }

    fn is_parallel(&self) -> bool {
        self.values >= PARALLEL_FROM
    }

    /// Runs `task` for `0..tasks`, on candle's threads if there are values enough.
    fn for_each(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        if tasks < 2 || !self.is_parallel() {
            (0..tasks).for_each(task);
        } else {
            let pool = candle_core::utils::barrier_pool();
            pool.execute_chunked(tasks, |range| range.for_each(&task));
        }
    }

    /// What `task` gives for `0..tasks`, in this order.
    pub fn map<R: Send>(&self, tasks: usize, task: impl Fn(usize) -> R + Sync) -> Vec<R> {
        let mut results = Output::new(tasks);
        let parts = results.parts();
        self.for_each(tasks, |index| {
            // SAFETY: no two tasks have the same index.
            unsafe { parts.write(index, task(index)) }
        });
        // SAFETY: every task has written its result.
        unsafe { results.finish() }
    }
}
