//! Which kernels normalise the rows of a tensor, and how threads share them: plain arithmetic, without a
//! device. Rows are tiles of one channel to the planner of batch norm.

use crate::dims::{Dims, Rows};
use crate::ops::plan::{self, Blocks, DTypeCode, Direction, Limits, Plan, Tile};

/// Vectors of a row at most, if lanes of one warp share it: eight for each.
const MOST_VECTORS: usize = 256;

/// Vectors that a lane takes before more lanes share a row.
const VECTORS_PER_LANE: usize = 4;

/// Lanes of a row at least, if it has as many vectors: they read a line of the cache together.
const LEAST_LANES: usize = 8;

/// Lanes of a warp.
const WARP: usize = 32;

/// Threads of a block whose lanes share rows: of many rows, and of so few that small blocks spread them
/// over more multiprocessors.
const THREADS: [usize; 2] = [256, 64];

/// Rows in memory, and how threads share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowPlan {
    /// The sizes.
    pub rows: Rows,
    /// The memory is `[n, s, c]`.
    pub channels_last: bool,
    /// Lanes of a warp that share a row; else blocks do, as the plan says.
    pub lanes: Option<usize>,
    /// The launches.
    pub plan: Plan,
}

/// How threads share a row: kinds to choose from in a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// So many lanes of a warp, in blocks of so many threads.
    Lanes(usize, usize),
    /// How blocks share it, how many do, and their threads.
    Blocks(Blocks, usize, usize),
}

impl RowPlan {
    /// The launches that suit the device.
    pub fn new(
        rows: Rows,
        channels_last: bool,
        value_bytes: usize,
        direction: Direction,
        limits: &Limits,
    ) -> Self {
        let tile = tile(rows, channels_last, value_bytes);
        let vectors = tile.vectors_or_rows();
        let lanes = vectors
            .div_ceil(VECTORS_PER_LANE)
            .max(vectors.min(LEAST_LANES))
            .next_power_of_two()
            .min(WARP);
        let is_busy = rows.rows() * lanes >= THREADS[0] * limits.multiprocessors;
        let threads = if is_busy { THREADS[0] } else { THREADS[1] };
        let kind = Kind::Lanes(lanes, threads);
        let by_lanes = Self::of_kind(rows, channels_last, value_bytes, direction, kind);
        // A row of more than a warp's first vectors is better off with a block, if there are few.
        let is_short = vectors <= WARP * VECTORS_PER_LANE || is_busy;
        if vectors <= MOST_VECTORS && is_short && by_lanes.plan.fits(limits) {
            return by_lanes;
        }
        let plan = tile
            .resident(direction, limits)
            .unwrap_or_else(|| tile.two_passes(direction, limits));
        Self {
            lanes: None,
            plan,
            ..by_lanes
        }
    }

    /// The launches that every device runs.
    pub fn two_passes(
        rows: Rows,
        channels_last: bool,
        value_bytes: usize,
        direction: Direction,
        limits: &Limits,
    ) -> Self {
        Self {
            rows,
            channels_last,
            lanes: None,
            plan: tile(rows, channels_last, value_bytes).two_passes(direction, limits),
        }
    }

    /// Launches of a given kind, whether they fit or not.
    pub fn of_kind(
        rows: Rows,
        channels_last: bool,
        value_bytes: usize,
        direction: Direction,
        kind: Kind,
    ) -> Self {
        let tile = tile(rows, channels_last, value_bytes);
        let (lanes, plan) = match kind {
            Kind::Blocks(blocks, splits, threads) => {
                (None, tile.plan(direction, blocks, splits, threads))
            }
            Kind::Lanes(lanes, threads) => {
                let mut plan = tile.plan(direction, Blocks::Group, 1, lanes);
                let rows_of_a_block = threads / lanes;
                plan.threads = threads;
                plan.grid = rows.rows().div_ceil(rows_of_a_block);
                plan.shared_bytes *= rows_of_a_block;
                (Some(lanes), plan)
            }
        };
        Self {
            rows,
            channels_last,
            lanes,
            plan,
        }
    }

    /// The name of a kernel for a dtype, by what it does: "stats", "forward", ….
    pub fn kernel(&self, what: &str, dtype: &str) -> String {
        match self.lanes {
            Some(_) => format!("rn_{what}_lanes_{}_{dtype}", self.plan.layout.name()),
            None => self.plan.kernel_of("rn", what, dtype),
        }
    }

    /// What a kernel is told.
    pub fn problem(&self, options: &plan::Options) -> RowProblem {
        let rows = &self.rows;
        RowProblem {
            tile: plan::Problem::new(tile_dims(*rows, self.channels_last), &self.plan, options),
            rows: rows.rows() as i64,
            groups: rows.groups as i64,
            channels: rows.channels() as i64,
            s: if self.channels_last { 1 } else { rows.s as i64 },
            width: self.lanes.unwrap_or(self.plan.threads) as i64,
        }
    }
}

/// The gradients of weight and bias: one launch that leaves numbers of all rows, one that sums them up
/// for parts of the tensor, and one that merges the parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamsPlan {
    /// The second launch.
    pub plan: Plan,
    dims: Dims,
    lines: usize,
}

impl ParamsPlan {
    /// The launches for a tensor.
    pub fn new(rows: Rows, channels_last: bool, value_bytes: usize, limits: &Limits) -> Self {
        let plan = |dims| Plan::two_passes(dims, value_bytes, Direction::Backward, limits);
        Self::with(rows, channels_last, plan)
    }

    /// Where so many blocks of so many threads share a tile.
    pub fn of_kind(
        rows: Rows,
        channels_last: bool,
        value_bytes: usize,
        (splits, threads): (usize, usize),
    ) -> Self {
        let kind = (Blocks::TwoPasses, splits, threads);
        let plan = |dims| Plan::of_kind(dims, value_bytes, Direction::Backward, kind);
        Self::with(rows, channels_last, plan)
    }

    fn with(rows: Rows, channels_last: bool, plan: impl FnOnce(Dims) -> Plan) -> Self {
        let Rows { n, c, s, .. } = rows;
        let (dims, lines) = match channels_last {
            false => (Dims { n, c, s }, 1),
            true => (Dims { n: n * s, c, s: 1 }, s),
        };
        Self {
            plan: plan(dims),
            dims,
            lines,
        }
    }

    /// What the second and the third kernel are told.
    pub fn problem(&self, options: &plan::Options) -> plan::Problem {
        plan::Problem::new(self.dims, &self.plan, options)
    }

    /// Lines of a sample in the matrix that is cut into parts.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// Blocks of the first kernel: a thread for each row.
    pub fn blocks_of_rows(&self, rows: &Rows) -> usize {
        rows.rows().div_ceil(self.plan.threads)
    }

    /// Blocks of the last kernel: a warp for each channel.
    pub fn blocks_of_params(&self, rows: &Rows) -> usize {
        rows.c.div_ceil(self.plan.threads / WARP)
    }
}

/// Values of each row in the table of the first kernel, `RowOf` of kernels/param_sums.cuh.
pub const ROW_OF: usize = 4;

/// `struct RowProblem` of kernels/rows.cuh, which says what the fields mean.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub struct RowProblem {
    pub tile: plan::Problem,
    pub rows: i64,
    pub groups: i64,
    pub channels: i64,
    pub s: i64,
    pub width: i64,
}

const _: () = assert!(size_of::<RowProblem>() == 112);

/// What the kernels know beside the sizes.
pub fn options(
    eps: f64,
    params: Option<DTypeCode>,
    relu: bool,
    remove_mean: bool,
) -> plan::Options {
    plan::Options {
        eps,
        params_dtype: params,
        given_dtype: None,
        relu,
        remove_mean,
        training: true,
    }
}

/// The rows as channels of a batch norm: of one sample with the channels last, else of all.
fn tile_dims(rows: Rows, channels_last: bool) -> Dims {
    match channels_last {
        false => Dims {
            n: 1,
            c: rows.rows(),
            s: rows.len(),
        },
        true => Dims {
            n: rows.s,
            c: rows.groups,
            s: rows.channels(),
        },
    }
}

fn tile(rows: Rows, channels_last: bool, value_bytes: usize) -> Tile {
    let dims = tile_dims(rows, channels_last);
    Tile::of_one_channel(dims, value_bytes).times(rows.rows() / dims.c)
}

#[cfg(test)]
mod tests;
