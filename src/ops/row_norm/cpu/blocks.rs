//! How the rows of a tensor are divided.

use std::ops::Range;

use crate::dims::Rows;
use crate::ops::loops::sweep::{Division, Outer, Tile, PART};

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
            sums: 1,
            outer: Outer::Groups,
        }
    }

    /// The rows of a block, in batches.
    #[inline(always)]
    pub fn batches(&self, block: usize) -> impl Iterator<Item = Range<usize>> {
        let first = block * self.rows_of_block;
        let end = self.rows.rows().min(first + self.rows_of_block);
        batches(first..end, self.rows.len())
    }

    /// The values of a whole row.
    #[inline(always)]
    pub fn row(&self, row: usize) -> Range<usize> {
        row * self.rows.len()..(row + 1) * self.rows.len()
    }

    /// The values of a tile where rows are in parts, each row being a group.
    pub fn part(&self, Tile { group, part }: Tile) -> Range<usize> {
        let Range { start, end } = self.row(group);
        start + part * PART..end.min(start + (part + 1) * PART)
    }
}

/// Rows of `len` values in batches, the values of which are read and soon read again to be written.
///
/// A single row is one too: where one is written while the next one is fetched, memory has work all the time.
/// Short ones are several, that their roots and quotients need not be waited for one by one.
#[inline(always)]
pub(super) fn batches(rows: Range<usize>, len: usize) -> impl Iterator<Item = Range<usize>> {
    let step = (BATCH / len).max(1);
    let end = rows.end;
    rows.step_by(step).map(move |row| row..end.min(row + step))
}
