//! Which channels a block takes at a time, and in which vectors.

use crate::dims::Dims;

/// Bytes of the widest vector, `WIDE` in kernels/tiles.cuh.
const WIDE: usize = 16;

/// Channels of a tile of columns at most, `MOST_CHANNELS` in kernels/tiles.cuh.
pub(super) const MOST_CHANNELS: usize = 128;

/// Columns of a tile with more than one channel at most, `MOST_COLUMNS` in kernels/tiles.cuh.
pub(super) const MOST_COLUMNS: usize = 1024;

/// Planes of fewer bytes are taken several at a time, so that rows are read in longer runs: whole
/// vectors, and others, which would share a vector with their neighbours.
const SMALL_PLANE: usize = 512;
const SMALL_RAGGED_PLANE: usize = 1024;

/// Bytes of a row in a tile of several planes, about.
const RUN: usize = 1024;

/// Bytes of a row in a tile of single columns: a line of the cache.
const LINE: usize = 128;

/// Vectors of a row in a tile of several channels at most, so that every one has a thread.
const MOST_VECTORS: usize = 256;

/// How values lie in vectors; kernels/tiles.cuh has a type for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// One channel at a time, whose rows are whole vectors.
    Planes,
    /// One channel at a time, whose rows begin and end anywhere.
    Ragged,
    /// Several channels at a time, each thread with columns of its own.
    Columns,
    /// The same, one value at a time: rows begin anywhere.
    Odd,
}

impl Layout {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Planes, Self::Ragged, Self::Columns, Self::Odd];

    /// In the names of kernels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Planes => "planes",
            Self::Ragged => "ragged",
            Self::Columns => "columns",
            Self::Odd => "odd",
        }
    }

    fn has_one_channel(self) -> bool {
        matches!(self, Self::Planes | Self::Ragged)
    }

    /// Values of a vector.
    pub fn vector(self, value_bytes: usize) -> usize {
        match self {
            Self::Planes | Self::Ragged => WIDE / value_bytes,
            Self::Columns if value_bytes == 8 => 2,
            Self::Columns => 4,
            Self::Odd => 1,
        }
    }

    /// Shared memory of a block beside what it keeps of the tensor, at most.
    pub(super) fn static_shared_bytes(self) -> usize {
        match self.has_one_channel() {
            true => 1 << 10,
            // Two sums for each column, the same twice for each channel, and six numbers.
            false => MOST_COLUMNS * 16 + MOST_CHANNELS * (2 * 16 + 6 * 8) + 256,
        }
    }
}

/// What the tiles of a tensor have in common.
#[derive(Debug, Clone, Copy)]
pub struct Tile {
    /// Of their values.
    pub layout: Layout,
    /// Channels of a tile.
    pub channels: usize,
    /// Tiles of the tensor.
    pub count: usize,
    pub(super) rows: usize,
    /// Vectors of a row in a tile.
    pub(super) vectors: usize,
    pub(super) tensor_bytes: usize,
    value_bytes: usize,
}

impl Tile {
    /// As a batch norm has them.
    pub fn new(dims: Dims, value_bytes: usize) -> Self {
        Self::of(dims, value_bytes, layout_of(dims, value_bytes))
    }

    /// Of one channel each, however small it is.
    pub fn of_one_channel(dims: Dims, value_bytes: usize) -> Self {
        let layout = match dims.s.is_multiple_of(WIDE / value_bytes) {
            true => Layout::Planes,
            false => Layout::Ragged,
        };
        Self::of(dims, value_bytes, (layout, 1))
    }

    /// Of so many tensors of this size.
    pub fn times(self, tensors: usize) -> Self {
        Self {
            count: self.count * tensors,
            tensor_bytes: self.tensor_bytes * tensors,
            ..self
        }
    }

    fn of(dims: Dims, value_bytes: usize, (layout, channels): (Layout, usize)) -> Self {
        let v = layout.vector(value_bytes);
        Self {
            layout,
            channels,
            count: dims.c.div_ceil(channels),
            rows: dims.n,
            vectors: match layout {
                // A row that begins with the last value of a vector has one vector more.
                Layout::Ragged => (dims.s + 2 * v - 2) / v,
                _ => channels * dims.s / v,
            },
            tensor_bytes: dims.numel() * value_bytes,
            value_bytes,
        }
    }

    /// Of one vector.
    pub fn vector_bytes(&self) -> usize {
        self.layout.vector(self.value_bytes) * self.value_bytes
    }

    /// What is cut into parts: vectors, or rows if a tile has several channels.
    pub fn vectors_or_rows(&self) -> usize {
        match self.layout.has_one_channel() {
            true => self.rows * self.vectors,
            false => self.rows,
        }
    }

    /// So many of them are taken at a time by a block of so many threads.
    pub fn step(&self, threads: usize) -> usize {
        match self.layout.has_one_channel() {
            true => threads,
            false => threads / self.vectors,
        }
    }
}

/// The layout of a tensor, and the channels of a tile.
fn layout_of(dims: Dims, value_bytes: usize) -> (Layout, usize) {
    let Dims { c, s, .. } = dims;
    let (planes, small) = match s.is_multiple_of(WIDE / value_bytes) {
        true => (Layout::Planes, SMALL_PLANE),
        false => (Layout::Ragged, SMALL_RAGGED_PLANE),
    };
    if s == 1 || s * value_bytes < small {
        for layout in [Layout::Columns, Layout::Odd] {
            let v = layout.vector(value_bytes);
            // Tiles begin with a whole vector, and so does every row if the first one does.
            let step = v / gcd(v, s);
            let run = if s == 1 { LINE } else { RUN };
            let most = (MOST_VECTORS * v / s).min(MOST_CHANNELS);
            let wanted = (run / value_bytes / s).min(most) / step * step;
            let channels = wanted.max(step).min(c);
            if (c * s).is_multiple_of(v) && channels * s <= MOST_VECTORS * v {
                return (layout, channels);
            }
        }
    }
    (planes, 1)
}

fn gcd(a: usize, b: usize) -> usize {
    match b {
        0 => a,
        _ => gcd(b, a % b),
    }
}
