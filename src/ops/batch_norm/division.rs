//! How a tensor is divided among the blocks of a CUDA grid: plain arithmetic, without a device.

use crate::shape::Dims;

/// Threads of every block, `THREADS` in kernels/common.cuh.
pub(super) const THREADS: usize = 256;

/// Values that a thread takes at a time, `CHUNK` in kernels/common.cuh.
const CHUNK: usize = 8;

/// More parts than this would only lengthen the merging of their sums.
const MOST_SPLITS: usize = 256;

/// The shape of the grid for one tensor; `Problem` in kernels/common.cuh explains it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Division {
    /// Neighbouring channels of a block.
    pub width: usize,
    /// Blocks that share the values of a channel.
    pub splits: usize,
    pub blocks: usize,
}

impl Division {
    /// Four blocks for each multiprocessor, as long as a thread keeps a chunk of values.
    pub fn new(dims: Dims, multiprocessors: usize) -> Self {
        let width = if dims.s == 1 { 32 } else { 1 };
        let tiles = dims.c.div_ceil(width);
        let values_of_a_block = CHUNK * THREADS / width;
        let splits = (4 * multiprocessors)
            .div_ceil(tiles)
            .min(dims.m().div_ceil(values_of_a_block))
            .clamp(1, MOST_SPLITS);
        Self {
            width,
            splits,
            blocks: tiles * splits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_channels_have_blocks() {
        for (n, c, s) in [
            (64, 256, 1),
            (1, 1, 2),
            (256, 64, 3136),
            (20, 6, 65536),
            (4096, 1025, 1),
        ] {
            let dims = Dims { n, c, s };
            let division = Division::new(dims, 132);
            let tiles = c.div_ceil(division.width);
            assert_eq!(division.blocks, tiles * division.splits, "{dims:?}");
            assert!(tiles * division.width >= c, "{dims:?}");
            assert!((1..=MOST_SPLITS).contains(&division.splits), "{dims:?}");
        }
    }

    #[test]
    fn few_channels_are_shared_by_many_blocks_and_many_by_none() {
        let splits = |n, c, s| Division::new(Dims { n, c, s }, 132).splits;
        assert_eq!(splits(20, 6, 65536), 88);
        assert_eq!(splits(8, 2048, 49), 1);
        assert_eq!(splits(2, 1, 2), 1);
    }
}
