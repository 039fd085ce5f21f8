//! How a tensor is divided among the blocks of a CUDA grid, and which kernels go through it: plain
//! arithmetic, without a device.

pub use crate::dims::Dims;

pub use problem::{DTypeCode, Options, Problem};
pub use tile::{Layout, Tile};

mod problem;
mod tile;

/// Threads of a block that leaves room for others on its multiprocessor, and of one that does not.
const THREADS: [usize; 2] = [256, 512];

/// A tile of so many bytes is one block's: to share it would cost more than it brings.
const SMALL_TILE: usize = 16 << 10;

/// Blocks of a cluster, any of which every GPU with clusters can run.
const CLUSTERS: [usize; 3] = [2, 4, 8];

/// In two passes: so many blocks for each multiprocessor, of which two to four run at a time.
const BLOCKS_PER_MULTIPROCESSOR: usize = 8;

/// In two passes: vectors that a thread has at least.
const VECTORS_PER_THREAD: usize = 4;

/// In two passes: more parts than this would only lengthen the merging of their sums.
const MOST_SPLITS: usize = 256;

/// Shared memory of each block that the system keeps for itself.
const RESERVED: usize = 1 << 10;

/// What a GPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many of them run blocks side by side.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block can have.
    pub shared_per_block: usize,
    /// Bytes of shared memory of a multiprocessor.
    pub shared_per_multiprocessor: usize,
    /// Whether blocks can read each other's shared memory: from compute capability 9.0 on.
    pub clusters: bool,
}

impl Limits {
    /// NVIDIA H100 and H200 SXM.
    pub const H100: Self = Self {
        multiprocessors: 132,
        shared_per_block: 227 << 10,
        shared_per_multiprocessor: 228 << 10,
        clusters: true,
    };

    /// NVIDIA A100.
    pub const A100: Self = Self {
        multiprocessors: 108,
        shared_per_block: 163 << 10,
        shared_per_multiprocessor: 164 << 10,
        clusters: false,
    };
}

/// The way through a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From x to y.
    Forward,
    /// From dy to dx.
    Backward,
}

impl Direction {
    /// The kernel that is the last on this way.
    pub fn kernel(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
        }
    }
}

/// How the blocks that share a tile come to its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocks {
    /// A kernel finds the sums, and a second one uses them: the tensor is read twice.
    TwoPasses,
    /// All blocks of the grid run at the same time and wait for each other in global memory; a
    /// single block of a tile for nobody.
    Group,
    /// The blocks of a tile are a cluster.
    Cluster,
}

/// The launches of one batch norm, forward or backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Which way.
    pub direction: Direction,
    /// Of tiles and vectors.
    pub layout: Layout,
    /// How blocks come to the sums of their tile.
    pub blocks: Blocks,
    /// Channels of a tile.
    pub channels: usize,
    /// Blocks that share a tile.
    pub splits: usize,
    /// Vectors of a block, except for the last of a tile; rows, if a tile has several channels.
    pub part: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Blocks in all.
    pub grid: usize,
    /// Dynamic shared memory of a block.
    pub shared_bytes: usize,
    /// Bytes that have to come from the tensors of `dims` and go to them, without caches, residual
    /// and mask.
    pub dram_bytes: usize,
    tiles: usize,
}

impl Plan {
    /// The launches for training.
    pub fn new(dims: Dims, value_bytes: usize, direction: Direction, limits: &Limits) -> Self {
        let tile = Tile::new(dims, value_bytes);
        tile.resident(direction, limits)
            .unwrap_or_else(|| tile.two_passes(direction, limits))
    }

    /// The launches where statistics are given, and of gradients that need no sums.
    pub fn two_passes(
        dims: Dims,
        value_bytes: usize,
        direction: Direction,
        limits: &Limits,
    ) -> Self {
        Tile::new(dims, value_bytes).two_passes(direction, limits)
    }

    /// Launches of a given kind, whether they fit or not.
    pub fn of_kind(
        dims: Dims,
        value_bytes: usize,
        direction: Direction,
        (blocks, splits, threads): (Blocks, usize, usize),
    ) -> Self {
        Tile::new(dims, value_bytes).plan(direction, blocks, splits, threads)
    }

    /// Whether a block has the shared memory that it needs.
    pub fn fits(&self, limits: &Limits) -> bool {
        self.shared_bytes + self.layout.static_shared_bytes() <= limits.shared_per_block
    }

    /// Whether all blocks have to run at the same time.
    pub fn is_cooperative(&self) -> bool {
        self.blocks == Blocks::Group && self.splits > 1
    }

    /// Blocks of a cluster.
    pub fn cluster(&self) -> usize {
        match self.blocks {
            Blocks::Cluster => self.splits,
            _ => 1,
        }
    }

    /// The name of a kernel for a dtype, by what it does: "stats", "forward", ….
    pub fn kernel(&self, what: &str, dtype: &str) -> String {
        self.kernel_of("bn", what, dtype)
    }

    /// As [`kernel`](Self::kernel), of the batch norm "bn" or of the row norms "rn".
    pub fn kernel_of(&self, norm: &str, what: &str, dtype: &str) -> String {
        let how = match self.blocks {
            Blocks::TwoPasses => "",
            Blocks::Group => "group_",
            Blocks::Cluster => "cluster_",
        };
        format!("{norm}_{what}_{how}{}_{dtype}", self.layout.name())
    }

    /// Values of type `double` that the blocks leave for each other.
    pub fn partials(&self) -> usize {
        match self.blocks {
            Blocks::Cluster => 0,
            Blocks::Group if self.splits == 1 => 0,
            _ => 2 * self.tiles * self.splits * self.channels,
        }
    }

    /// Counters by which the blocks wait for each other: `unsigned int`, zero before and after.
    pub fn counters(&self) -> usize {
        match self.is_cooperative() {
            true => 2 * self.grid / self.splits,
            false => 0,
        }
    }
}

impl Tile {
    /// Bytes that a block keeps of its part.
    fn shared_bytes(&self, direction: Direction, part: usize, threads: usize) -> usize {
        let vectors_of_a_thread = part / self.step(threads);
        vectors_of_a_thread * threads * self.vector_bytes() * kept(direction)
    }

    /// A part of as many vectors (or rows) for each thread.
    fn part(&self, splits: usize, threads: usize) -> usize {
        let (all, step) = (self.vectors_or_rows(), self.step(threads));
        all.div_ceil(splits).next_multiple_of(step)
    }

    /// Launches of a given kind, whether they fit or not.
    pub fn plan(
        &self,
        direction: Direction,
        blocks: Blocks,
        splits: usize,
        threads: usize,
    ) -> Plan {
        let part = self.part(splits, threads);
        let passes = match (direction, blocks) {
            (Direction::Forward, Blocks::TwoPasses) => 3,
            (Direction::Backward, Blocks::TwoPasses) => 5,
            (Direction::Forward, _) => 2,
            (Direction::Backward, _) => 3,
        };
        Plan {
            direction,
            layout: self.layout,
            blocks,
            channels: self.channels,
            splits,
            part,
            threads,
            grid: self.count * splits,
            shared_bytes: match blocks {
                Blocks::TwoPasses => 0,
                _ => self.shared_bytes(direction, part, threads),
            },
            dram_bytes: passes * self.tensor_bytes,
            tiles: self.count,
        }
    }

    /// Launches that need no shared memory.
    pub fn two_passes(&self, direction: Direction, limits: &Limits) -> Plan {
        let threads = THREADS[0];
        let blocks = BLOCKS_PER_MULTIPROCESSOR * limits.multiprocessors;
        let least = self.step(threads) * VECTORS_PER_THREAD;
        let splits = blocks
            .div_ceil(self.count)
            .min(self.vectors_or_rows().div_ceil(least))
            .clamp(1, MOST_SPLITS);
        self.plan(direction, Blocks::TwoPasses, splits, threads)
    }

    /// One pass, if the tiles that are under way at a time fit into shared memory.
    pub fn resident(&self, direction: Direction, limits: &Limits) -> Option<Plan> {
        // One block on a multiprocessor, or two, so that one loads while the other waits or writes.
        let room = |blocks: usize| {
            let shared = limits.shared_per_multiprocessor / blocks - RESERVED;
            shared.min(limits.shared_per_block) - self.layout.static_shared_bytes()
        };
        let bytes = self.rows * self.vectors * self.vector_bytes() * kept(direction);
        let plan = |blocks, splits, shared: usize| {
            let plan = self.plan(direction, blocks, splits, THREADS[2 - shared]);
            (plan.shared_bytes <= room(shared)).then_some(plan)
        };
        let is_busy = |splits: usize| self.count * splits >= limits.multiprocessors;

        let alone = plan(Blocks::Group, 1, 2);
        if alone.is_some() && (is_busy(1) || bytes <= SMALL_TILE) {
            return alone;
        }
        if limits.clusters {
            let fitting = CLUSTERS.iter().filter_map(|&k| plan(Blocks::Cluster, k, 2));
            let all: Vec<Plan> = fitting.collect();
            // As few blocks as keep the GPU busy.
            let enough = all.iter().find(|plan| is_busy(plan.splits)).or(all.last());
            let last = CLUSTERS[CLUSTERS.len() - 1];
            if let Some(plan) = enough.copied().or_else(|| plan(Blocks::Cluster, last, 1)) {
                return Some(plan);
            }
        }
        alone.or_else(|| {
            [2, 1].into_iter().find_map(|shared| {
                let at_once = shared * limits.multiprocessors;
                // The parts are whole vectors for each thread, which may make them a little larger.
                let least = bytes.div_ceil(room(shared));
                let fits = |splits| plan(Blocks::Group, splits, shared);
                let least = (least..=(least + 2).min(at_once)).find(|&k| fits(k).is_some())?;
                // As many groups as the tiles need in so few rounds, with all blocks that run at
                // the same time.
                let rounds = self.count.div_ceil(at_once / least);
                let groups = self.count.div_ceil(rounds);
                let mut plan = fits(at_once / groups).or_else(|| fits(least))?;
                plan.grid = groups * plan.splits;
                Some(plan)
            })
        })
    }
}

/// Tensors that a block keeps: x, and on the way back dy.
fn kept(direction: Direction) -> usize {
    match direction {
        Direction::Forward => 1,
        Direction::Backward => 2,
    }
}

#[cfg(test)]
mod tests;
