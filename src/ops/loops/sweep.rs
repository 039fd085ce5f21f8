//! How the work on a tensor is divided: first sums over its values, then a second look at each.

use crate::ops::output::Output;
use crate::ops::parallel::{for_each, is_parallel, map, threads};

/// Which values a piece of work is about: a part of those of a group of channels.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub group: usize,
    pub part: usize,
}

/// A tensor's groups of channels, and the parts of each. It depends on the shape alone, and sums are
/// merged part by part, so that results do not depend on the number of threads.
#[derive(Clone, Copy)]
pub(crate) struct Division {
    pub groups: usize,
    pub parts: usize,
    /// In the whole tensor.
    pub values: usize,
    /// Of a tile, about: what there is to be merged.
    pub sums: usize,
    pub outer: Outer,
}

/// What of a tensor lies together in memory. Tiles are visited in that order, in which the op before has most likely written it, unless each
/// group stays with a thread: then a thread reads what it has written itself.
///
/// Where others read it, reading takes longer, and so does the next writing to the same memory.
#[derive(Clone, Copy)]
pub(crate) enum Outer {
    /// Each group, with all of its parts.
    Groups,
    /// Each part, of all groups.
    Parts,
}

/// Values of a part, about: few enough for a core's own caches, enough to make the merging cheap.
pub(crate) const PART: usize = 1 << 13;

/// What is done with a sum of a tile takes as long as so many values of the tensor.
const PER_SUM: usize = 32;

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
        if self.is_for_groups() {
            return map(self.groups, self.values, |group| {
                let finished = self.of_group(group, &reduce, &finish);
                self.tiles(group).for_each(|tile| visit(tile, &finished));
                finished
            });
        }
        let finished = self.by_tile(reduce, finish);
        for_each(self.groups * self.parts, self.values, |index| {
            let tile = self.tile(index);
            visit(tile, &finished[tile.group]);
        });
        finished
    }

    /// The same without a second look at the tiles. No group has to stay in a cache for that, and the tiles are visited in the order of
    /// memory where groups have more than one.
    pub fn reduce<P: Send + Sync, G: Send>(
        self,
        reduce: impl Fn(Tile) -> P + Sync,
        finish: impl Fn(usize, &[P]) -> G + Sync,
    ) -> Vec<G> {
        if self.parts == 1 || !is_parallel(self.values) {
            return map(self.groups, self.values, |group| {
                self.of_group(group, &reduce, &finish)
            });
        }
        self.by_tile(reduce, finish)
    }

    /// What comes of the groups, from tiles in the order of memory.
    fn by_tile<P: Send + Sync, G: Send>(
        &self,
        reduce: impl Fn(Tile) -> P + Sync,
        finish: impl Fn(usize, &[P]) -> G + Sync,
    ) -> Vec<G> {
        let tiles = self.groups * self.parts;
        let mut reduced = Output::new(tiles);
        let to = reduced.parts();
        for_each(tiles, self.values, |index| {
            let tile = self.tile(index);
            let result = reduce(tile);
            // SAFETY: each tile has one index.
            unsafe { to.write(tile.group * self.parts + tile.part, result) }
        });
        // SAFETY: every tile has its result.
        let reduced = unsafe { reduced.finish() };
        map(self.groups, tiles * self.sums * PER_SUM, |group| {
            finish(group, &reduced[group * self.parts..][..self.parts])
        })
    }

    /// Whether a task is about a group, not about a tile.
    pub fn is_for_groups(&self) -> bool {
        let enough = GROUPS_PER_THREAD * threads();
        self.parts == 1 || self.groups >= enough || !is_parallel(self.values)
    }

    /// What comes of the tiles of a group, on one thread.
    fn of_group<P, G>(
        &self,
        group: usize,
        reduce: impl Fn(Tile) -> P,
        finish: impl Fn(usize, &[P]) -> G,
    ) -> G {
        finish(group, &self.tiles(group).map(reduce).collect::<Vec<_>>())
    }

    fn tiles(&self, group: usize) -> impl Iterator<Item = Tile> {
        (0..self.parts).map(move |part| Tile { group, part })
    }

    /// Of all tiles, in the order of memory.
    pub fn tile(&self, index: usize) -> Tile {
        match self.outer {
            Outer::Groups => Tile {
                group: index / self.parts,
                part: index % self.parts,
            },
            Outer::Parts => Tile {
                group: index % self.groups,
                part: index / self.groups,
            },
        }
    }
}
