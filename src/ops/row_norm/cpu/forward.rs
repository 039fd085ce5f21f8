//! The forward pass over contiguous rows.

use std::mem::MaybeUninit;

use super::affine::{Affine, Row};
use super::blocks::Blocks;
use super::{Forward, Spec};
use crate::ops::loops::convert::{Element, Real};
use crate::ops::loops::element::write_y;
use crate::ops::loops::lanes::moments;
use crate::ops::loops::prefetch::Ahead;
use crate::ops::loops::stores::Stores;
use crate::ops::output::Output;
use crate::ops::parallel;
use crate::ops::slices::vectorised;
use crate::ops::Activation;

pub(super) fn forward<T: Element, P: Affine<T::Real>>(
    job: &Forward<T>,
    affine: &P,
) -> (Vec<T>, Vec<f64>) {
    let blocks = Blocks::new(job.spec.rows);
    match blocks.division().parts {
        1 => whole_rows(job, affine, blocks),
        _ => rows_in_parts(job, affine, blocks),
    }
}

fn whole_rows<T: Element, P: Affine<T::Real>>(
    job: &Forward<T>,
    affine: &P,
    blocks: Blocks,
) -> (Vec<T>, Vec<f64>) {
    let (spec, x) = (job.spec, job.x);
    let (sample, count) = (spec.rows.c * spec.rows.s, spec.rows.rows());
    let (mut y, mut stats) = (Output::new(x.len()), Output::new(2 * count));
    let (y_parts, stats_parts) = (y.parts(), stats.parts());
    let division = blocks.division();
    parallel::for_each(division.groups, division.values, |block| {
        vectorised(
            #[inline(always)]
            || {
                let mut rows = Vec::new();
                for batch in blocks.batches(block) {
                    rows.clear();
                    for index in batch.clone() {
                        let row = statistics(spec, &x[blocks.row(index)]);
                        // SAFETY: each row is in one batch of one block, and has a place of its own for both.
                        unsafe {
                            stats_parts.write(index, row.mean);
                            stats_parts.write(count + index, row.var);
                        }
                        rows.push(row);
                    }
                    for (row, index) in rows.iter().zip(batch) {
                        let run = blocks.row(index);
                        // SAFETY: each row is in one batch of one block; no two overlap.
                        let y = unsafe { y_parts.part(run.clone()) };
                        let start = run.start % sample;
                        write_row(affine, row, start, &x[run], y, spec.activation);
                    }
                }
            },
        )
    });
    // SAFETY: the blocks have all rows, of which each was written, and both of its statistics.
    unsafe { (y.finish(), stats.finish()) }
}

fn rows_in_parts<T: Element, P: Affine<T::Real>>(
    job: &Forward<T>,
    affine: &P,
    blocks: Blocks,
) -> (Vec<T>, Vec<f64>) {
    let (spec, x) = (job.spec, job.x);
    let sample = spec.rows.c * spec.rows.s;
    let mut y = Output::new(x.len());
    let y_parts = y.parts();
    let rows = blocks.division().sweep(
        |tile| {
            vectorised(
                #[inline(always)]
                || {
                    let x = &x[blocks.part(tile)];
                    let m = x.len() as f64;
                    let (mean, squares) =
                        moments(|| std::iter::once(x), m, spec.remove_mean, Ahead::IN_LINE);
                    (m, (mean, squares))
                },
            )
        },
        |_, parts| {
            let (mean, var) = merge(parts.iter().copied());
            Row::new(spec, mean, var)
        },
        |tile, row| {
            vectorised(
                #[inline(always)]
                || {
                    let run = blocks.part(tile);
                    // SAFETY: no two tiles overlap.
                    let y = unsafe { y_parts.part(run.clone()) };
                    let start = run.start % sample;
                    write_row(affine, row, start, &x[run], y, spec.activation);
                },
            )
        },
    );
    // SAFETY: the tiles make up the whole tensor.
    (unsafe { y.finish() }, saved(rows.iter()))
}

/// Writes `y` for the values `x` of a row, the first of which is value `start` of the sample.
#[inline(always)]
pub(super) fn write_row<T: Element, P: Affine<T::Real>>(
    affine: &P,
    row: &Row<T::Real>,
    start: usize,
    x: &[T],
    y: &mut [MaybeUninit<T>],
    activation: Activation,
) {
    for (run, channels) in affine.runs(row, start, x.len()) {
        let y = &mut y[run.clone()];
        write_y(y, &Stores::CACHED, &x[run], None, channels, activation);
    }
}

/// The statistics of whole rows.
#[inline(always)]
pub(super) fn statistics<T: Element>(spec: &Spec, x: &[T]) -> Row<T::Real> {
    let m = x.len() as f64;
    let (mean, squares) = moments(|| std::iter::once(x), m, spec.remove_mean, Ahead::IN_LINE);
    Row::new(spec, mean, squares / m)
}

/// `[2, rows]`
pub(super) fn saved<'a, A: Real + 'a>(rows: impl Iterator<Item = &'a Row<A>> + Clone) -> Vec<f64> {
    let means = rows.clone().map(|row| row.mean);
    means.chain(rows.map(|row| row.var)).collect()
}

/// Mean and biased variance of a row from the number of values, the mean and the sum of squares around it of
/// each part (Chan et al. 1983, <https://doi.org/10.1080/00031305.1983.10483115>).
fn merge(parts: impl Iterator<Item = (f64, (f64, f64))> + Clone) -> (f64, f64) {
    let first = parts.clone().next().map_or(0.0, |(_, (mean, _))| mean);
    let m: f64 = parts.clone().map(|(values, _)| values).sum();
    let distances = parts
        .clone()
        .map(|(values, (mean, _))| values / m * (mean - first));
    let mean = first + distances.sum::<f64>();
    let squares = parts.map(|(values, (part, squares))| squares + values * (part - mean).powi(2));
    (mean, squares.sum::<f64>() / m)
}
