//! How the rows of a tensor are divided.

use std::ops::Range;

use crate::dims::Rows;
use crate::ops::loops::sweep::{Division, Tile, PART};

/// Values of a batch of short rows, about.
const BATCH: usize = 1 << 10;

/// Neighbouring rows in blocks of about [`PART`] values: several short ones, or a long one in parts.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    rows: Rows,
    rows_of_block: usize,
}

impl Blocks {
    pub fn new(rows: Rows) -> Self {
        let rows_of_block = (PART / rows.len()).max(1);
        Self {
            rows,
            rows_of_block,
        }
    }

    pub fn division(&self) -> Division {
        let parts = match self.rows_of_block {
            1 => self.rows.len().div_ceil(PART),
            _ => 1,
        };
        Division {
            groups: self.rows.rows().div_ceil(self.rows_of_block),
            parts,
            values: self.rows.numel(),
        }
    }

    /// The number of rows in a block.
    pub fn rows(&self, block: usize) -> usize {
        let first = block * self.rows_of_block;
        (self.rows.rows() - first).min(self.rows_of_block)
    }

    /// The number of values that a part has of each of its rows.
    pub fn values(&self, part: usize) -> usize {
        (self.rows.len() - part * PART).min(match self.rows_of_block {
            1 => PART,
            _ => self.rows.len(),
        })
    }

    /// The rows of a block in batches, the values of which are read and soon read again to be written.
    ///
    /// A single row is one too: where one is written while the next one is fetched, memory has work all the time.
    /// Short ones are several, that their roots and quotients need not be waited for one by one.
    #[inline(always)]
    pub fn batches(&self, block: usize) -> impl Iterator<Item = Range<usize>> {
        let first = block * self.rows_of_block;
        let end = first + self.rows(block);
        let step = (BATCH / self.rows.len()).max(1);
        (first..end)
            .step_by(step)
            .map(move |row| row..end.min(row + step))
    }

    /// The values of a whole row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> Range<usize> {
        row * self.rows.len()..(row + 1) * self.rows.len()
    }

    /// The rows of a tile, as far as they are part of it: ranges of the tensor.
    #[inline(always)]
    pub fn runs(&self, tile: Tile) -> impl Iterator<Item = Range<usize>> {
        let (len, values) = (self.rows.len(), self.values(tile.part));
        let first = tile.group * self.rows_of_block;
        (first..first + self.rows(tile.group)).map(move |row| {
            let start = row * len + tile.part * PART;
            start..start + values
        })
    }
}
