//! The products on the CPU: over slices, without candle's types but its trait of dtypes.

use std::ops::Range;

use candle_core::WithDType;
use gemm::Parallelism;

use super::Spec;
use crate::ops::output::{Output, Parts};
use crate::ops::parallel::{for_each, map};
use crate::ops::slices::vectorised;
use crate::ops::weighted::{Grads, Wants, Weighted};

/// So many multiplications take as long as a value in a plain loop.
const PER_VALUE: usize = 16;

/// Rows and columns of a result that are one task's. They do not depend on the number of threads.
const BLOCK_ROWS: usize = 256;
const BLOCK_COLUMNS: usize = 64;

impl<T: WithDType> Weighted<T> for Spec {
    /// `y`, `[n, outputs]`.
    fn forward(&self, x: &[T], weight: &[T], bias: Option<&[T]>) -> Vec<T> {
        let product = Product {
            rows: self.n,
            columns: self.outputs,
            depth: self.inputs,
            left: Matrix::new(x, self.inputs, 1),
            right: Matrix::new(weight, 1, self.inputs),
        };
        product.compute(bias)
    }

    /// The gradients for `dy`, `[n, outputs]`.
    fn backward(&self, x: &[T], weight: &[T], dy: &[T], wants: Wants) -> Grads<Vec<T>> {
        let Spec { n, inputs, outputs } = *self;
        let dx = Product {
            rows: n,
            columns: inputs,
            depth: outputs,
            left: Matrix::new(dy, outputs, 1),
            right: Matrix::new(weight, inputs, 1),
        };
        let dweight = Product {
            rows: outputs,
            columns: inputs,
            depth: n,
            left: Matrix::new(dy, 1, outputs),
            right: Matrix::new(x, inputs, 1),
        };
        Grads {
            dx: wants.dx.then(|| dx.compute(None)),
            dweight: wants.dweight.then(|| dweight.compute(None)),
            dbias: wants.dbias.then(|| sums_of_columns(dy, outputs)),
        }
    }
}

/// So many values of a matrix are one task's, about, where its columns are summed up.
const PART: usize = 1 << 14;

/// The sum of each column of a matrix, in F64 and rounded once.
fn sums_of_columns<T: WithDType>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns.max(1);
    let of_part = PART.div_ceil(columns.max(1)).max(rows.div_ceil(MOST_PARTS));
    let parts = map(rows.div_ceil(of_part.max(1)), values.len(), |part| {
        let range = part * of_part * columns..values.len().min((part + 1) * of_part * columns);
        let mut sums = vec![0.0; columns];
        vectorised(
            #[inline(always)]
            || {
                for row in values[range].chunks_exact(columns) {
                    for (sum, value) in sums.iter_mut().zip(row) {
                        *sum += value.to_f64();
                    }
                }
            },
        );
        sums
    });
    let sum = |column: usize| T::from_f64(parts.iter().map(|sums| sums[column]).sum());
    (0..columns).map(sum).collect()
}

/// The sums of not more parts are added up in the end.
const MOST_PARTS: usize = 64;

/// A matrix in a slice: where the next row begins, and the next column.
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    values: &'a [T],
    row: usize,
    column: usize,
}

impl<'a, T> Matrix<'a, T> {
    fn new(values: &'a [T], row: usize, column: usize) -> Self {
        Self {
            values,
            row,
            column,
        }
    }

    /// Whether it has so many rows and columns.
    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0
            || columns == 0
            || (rows - 1) * self.row + (columns - 1) * self.column < self.values.len()
    }
}

/// `left·right`, `[rows, columns]`, as sums over `depth`.
struct Product<'a, T> {
    rows: usize,
    columns: usize,
    depth: usize,
    left: Matrix<'a, T>,
    right: Matrix<'a, T>,
}

impl<T: WithDType> Product<'_, T> {
    /// The product, with `bias` added to each row.
    fn compute(&self, bias: Option<&[T]>) -> Vec<T> {
        let (rows, columns) = (self.rows, self.columns);
        if self.depth == 0 {
            // A sum over nothing.
            let zeros = || vec![T::zero(); columns];
            return bias.map_or_else(zeros, <[T]>::to_vec).repeat(rows);
        }
        let mut out = Output::new(rows * columns);
        let parts = out.parts();
        let across = columns.div_ceil(BLOCK_COLUMNS);
        let work = rows * columns * self.depth / PER_VALUE;
        for_each(rows.div_ceil(BLOCK_ROWS) * across, work, |block| {
            let (row, column) = (block / across * BLOCK_ROWS, block % across * BLOCK_COLUMNS);
            let block_rows = row..rows.min(row + BLOCK_ROWS);
            let block_columns = column..columns.min(column + BLOCK_COLUMNS);
            // SAFETY: the blocks do not overlap.
            unsafe { self.block(block_rows.clone(), block_columns.clone(), parts) };
            if let Some(bias) = bias {
                for row in block_rows {
                    let range =
                        row * columns + block_columns.start..row * columns + block_columns.end;
                    // SAFETY: within the block, which is this task's.
                    let row = unsafe { parts.part(range) };
                    for (value, &bias) in row.iter_mut().zip(&bias[block_columns.clone()]) {
                        // SAFETY: `block` has written it.
                        let sum = unsafe { value.assume_init() } + bias;
                        value.write(sum);
                    }
                }
            }
        });
        // SAFETY: the blocks make up the whole.
        unsafe { out.finish() }
    }

    /// Writes some rows and columns of the product.
    ///
    /// # Safety
    /// Nobody else writes or reads them meanwhile.
    unsafe fn block(&self, rows: Range<usize>, columns: Range<usize>, out: Parts<T>) {
        let (left, right) = (&self.left, &self.right);
        assert!(left.holds(rows.end, self.depth) && right.holds(self.depth, columns.end));
        assert!(rows.end <= self.rows && columns.end <= self.columns);
        // SAFETY: rows and columns lie in the matrices, as has been checked, and in `out`, which has
        // `self.rows` of `self.columns`; `gemm` panics for a `T` that it does not know.
        unsafe {
            gemm::gemm(
                rows.len(),
                columns.len(),
                self.depth,
                out.as_ptr().add(rows.start * self.columns + columns.start),
                1,
                self.columns as isize,
                false,
                left.values.as_ptr().add(rows.start * left.row),
                left.column as isize,
                left.row as isize,
                right.values.as_ptr().add(columns.start * right.column),
                right.column as isize,
                right.row as isize,
                T::zero(),
                T::one(),
                false,
                false,
                false,
                Parallelism::None,
            )
        }
    }
}
