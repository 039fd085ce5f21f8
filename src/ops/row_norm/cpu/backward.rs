//! The backward pass over contiguous rows.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::affine::{Affine, ByPlane, ByValue, Row, RowGrad};
use super::blocks::Blocks;
use super::{Backward, Grads, Spec};
use crate::dims::Rows;
use crate::ops::loops::convert::{chunks, Element, Real};
use crate::ops::loops::element::{Channels, Mask, Same, Slice};
use crate::ops::loops::lanes::{blocks, total, GradSums, Lanes};
use crate::ops::loops::prefetch::Ahead;
use crate::ops::output::{Output, Parts};
use crate::ops::parallel;
use crate::ops::slices::vectorised;

/// `Σh` and `Σ(h·(x - mean))` of values of a row, `h = weight·g`.
type Sums = (f64, f64);

/// What a plane adds to the gradients of its channel's parameters.
#[derive(Clone, Copy)]
pub(super) struct PlaneSums {
    channel: usize,
    dweight: f64,
    dbias: f64,
}

/// A row, from what the forward pass saved.
#[inline(always)]
pub(super) fn saved_row<T: Element>(job: &Backward<T>, index: usize) -> Row<T::Real> {
    let (means, vars) = job.saved.split_at(job.spec.rows.rows());
    Row::new(job.spec, means[index], vars[index])
}

/// The backward pass where weight and bias belong to whole planes.
pub(super) fn planes<T: Element, M: Mask<T>>(job: &Backward<T>, affine: &ByPlane) -> Grads<T> {
    let blocks = Blocks::new(job.spec.rows);
    match blocks.division().parts {
        1 => whole_rows::<T, M>(job, affine, blocks),
        _ => rows_in_parts::<T, M>(job, affine, blocks),
    }
}

fn whole_rows<T: Element, M: Mask<T>>(
    job: &Backward<T>,
    affine: &ByPlane,
    blocks: Blocks,
) -> Grads<T> {
    let spec = job.spec;
    let sample = spec.rows.c * spec.rows.s;
    let mut dx = job.wants.dx.then(|| Output::new(job.x.len()));
    let dx_parts = dx.as_mut().map(Output::parts);
    let division = blocks.division();
    let planes = parallel::map(division.groups, division.values, |block| {
        vectorised(
            #[inline(always)]
            || {
                let (mut rows, mut planes) = (Vec::new(), Vec::new());
                for batch in blocks.batches(block) {
                    rows.clear();
                    for index in batch.clone() {
                        let (row, run) = (saved_row(job, index), blocks.row(index));
                        let (start, slice) = (run.start % sample, slice(job, run));
                        let sums = plane_sums::<T, M>(affine, &row, start, &slice, &mut planes);
                        rows.push((row, sums));
                    }
                    let Some(parts) = dx_parts else { continue };
                    for ((row, sums), index) in rows.iter().zip(batch) {
                        let run = blocks.row(index);
                        // SAFETY: each row is in one batch of one block; no two overlap.
                        let dx = unsafe { parts.part(run.clone()) };
                        let (start, slice) = (run.start % sample, slice(job, run));
                        write_dx::<T, M, _>(spec, affine, row, *sums, start, &slice, dx);
                    }
                }
                planes
            },
        )
    });
    Grads {
        // SAFETY: the blocks have all rows, of which each was written.
        dx: dx.map(|dx| unsafe { dx.finish() }),
        dparams: (job.wants.dparams).then(|| by_channel(spec, planes.iter().flatten())),
    }
}

fn rows_in_parts<T: Element, M: Mask<T>>(
    job: &Backward<T>,
    affine: &ByPlane,
    blocks: Blocks,
) -> Grads<T> {
    let spec = job.spec;
    let sample = spec.rows.c * spec.rows.s;
    let mut dx = job.wants.dx.then(|| Output::new(job.x.len()));
    let dx_parts = dx.as_mut().map(Output::parts);
    let groups = blocks.division().sweep(
        |tile| {
            vectorised(
                #[inline(always)]
                || {
                    let mut planes = Vec::new();
                    let (row, run) = (saved_row(job, tile.group), blocks.part(tile));
                    let (start, slice) = (run.start % sample, slice(job, run));
                    let sums = plane_sums::<T, M>(affine, &row, start, &slice, &mut planes);
                    (sums, planes)
                },
            )
        },
        |_, parts: &[(Sums, Vec<PlaneSums>)]| {
            let sums = parts.iter().map(|(sums, _)| sums);
            let sums = sums.fold((0.0, 0.0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
            let planes = parts.iter().flat_map(|(_, planes)| planes);
            (sums, planes.copied().collect::<Vec<_>>())
        },
        |tile, (sums, _)| {
            let Some(parts) = dx_parts else { return };
            vectorised(
                #[inline(always)]
                || {
                    let (row, run) = (&saved_row(job, tile.group), blocks.part(tile));
                    // SAFETY: no two tiles overlap.
                    let dx = unsafe { parts.part(run.clone()) };
                    let (start, slice) = (run.start % sample, slice(job, run));
                    write_dx::<T, M, _>(spec, affine, row, *sums, start, &slice, dx);
                },
            )
        },
    );
    let planes = groups.iter().flat_map(|(_, planes)| planes);
    Grads {
        // SAFETY: the tiles make up the whole tensor.
        dx: dx.map(|dx| unsafe { dx.finish() }),
        dparams: job.wants.dparams.then(|| by_channel(spec, planes)),
    }
}

/// `[2, c]` from all planes, in their order.
pub(super) fn by_channel<'a>(spec: &Spec, planes: impl Iterator<Item = &'a PlaneSums>) -> Vec<f64> {
    let mut dparams = vec![0.0; 2 * spec.rows.c];
    let (dweight, dbias) = dparams.split_at_mut(spec.rows.c);
    for plane in planes {
        dweight[plane.channel] += plane.dweight;
        dbias[plane.channel] += plane.dbias;
    }
    dparams
}

/// The sums of the values of a row from `start` on, and those of its planes.
#[inline(always)]
pub(super) fn plane_sums<T: Element, M: Mask<T>>(
    affine: &ByPlane,
    row: &Row<T::Real>,
    start: usize,
    slice: &Slice<T>,
    planes: &mut Vec<PlaneSums>,
) -> Sums {
    let mut row_sums = (0.0, 0.0);
    for (run, channel) in affine.planes(start, slice.x.len()) {
        let mut sums = GradSums::<false>::new();
        let of_plane = affine.channel(row, channel);
        sums.add::<T, M>(&slice.part(run), &of_plane, row.mean, Ahead::IN_LINE);
        let (g, gx) = sums.totals();
        planes.push(PlaneSums {
            channel,
            dweight: row.rstd * gx,
            dbias: g,
        });
        let weight = affine.params.weight[channel];
        row_sums.0 += weight * g;
        row_sums.1 += weight * gx;
    }
    row_sums
}

/// Writes `dx` for the values of a row from `start` on, given the sums of the whole row.
#[inline(always)]
pub(super) fn write_dx<T: Element, M: Mask<T>, P: Affine<T::Real>>(
    spec: &Spec,
    affine: &P,
    row: &Row<T::Real>,
    (h, hx): Sums,
    start: usize,
    slice: &Slice<T>,
    dx: &mut [MaybeUninit<T>],
) {
    let grad = RowGrad::new(spec, row, h, hx);
    for (run, channels) in affine.runs(row, start, slice.x.len()) {
        let slice = slice.part(run.clone());
        slice.write::<M, _>(
            &mut dx[run],
            channels,
            Same(grad),
            #[inline(always)]
            |x, g, channel, grad| grad.dx(channel, x, g),
        );
    }
}

/// At least so many samples share the sums of the parameters' gradients, which are two `f64` for each value
/// of a sample, if there are enough of them for several threads. Fewer samples have sums each: four times the
/// memory of an F32 tensor.
const SAMPLES: usize = 8;

/// Samples of at least so many values share them, too.
const CHUNK: usize = 1 << 15;

/// At most so many tasks have such sums, for in the end those are added up, on one thread.
const CHUNKS: usize = 64;

/// The backward pass where each value of a sample has a weight and a bias of its own.
pub(super) fn values<T: Element, M: Mask<T>>(
    job: &Backward<T>,
    affine: &ByValue<T::Real>,
) -> Grads<T> {
    let Rows { n, groups, c, s } = job.spec.rows;
    let sample = c * s;
    let mut dx = job.wants.dx.then(|| Output::new(job.x.len()));
    let dx_parts = dx.as_mut().map(Output::parts);
    let of_chunk = CHUNK
        .div_ceil(sample)
        .max(n.div_ceil(SAMPLES).min(SAMPLES))
        .max(if job.wants.dparams {
            n.div_ceil(CHUNKS)
        } else {
            1
        });
    let parts = parallel::map(n.div_ceil(of_chunk), job.x.len(), |chunk| {
        let mut sums = (job.wants.dparams).then(|| [vec![0.0; sample], vec![0.0; sample]]);
        let samples = chunk * of_chunk..n.min((chunk + 1) * of_chunk);
        vectorised(
            #[inline(always)]
            || {
                for index in samples.start * groups..samples.end * groups {
                    let columns = index % groups * (sample / groups);
                    let columns = columns..columns + sample / groups;
                    let dparams = sums.as_mut().map(|[dweight, dbias]| {
                        (&mut dweight[columns.clone()], &mut dbias[columns])
                    });
                    // SAFETY: no two chunks have a sample in common.
                    unsafe { row::<T, M>(job, affine, index, dparams, dx_parts) }
                }
            },
        );
        sums
    });
    let dparams = || {
        let mut dparams = Vec::with_capacity(2 * c);
        for index in 0..2 {
            let mut total = vec![0.0; sample];
            for sums in parts.iter().flatten() {
                for i in 0..sample {
                    total[i] += sums[index][i];
                }
            }
            dparams.extend(total.chunks(s).map(|plane| plane.iter().sum::<f64>()));
        }
        dparams
    };
    Grads {
        // SAFETY: the chunks have all samples.
        dx: dx.map(|dx| unsafe { dx.finish() }),
        dparams: job.wants.dparams.then(dparams),
    }
}

/// Writes `dx` of a row, if it is asked for, and adds to the gradients of the parameters of its values.
///
/// # Safety
/// Nobody else holds the part of this row.
#[inline(always)]
unsafe fn row<T: Element, M: Mask<T>>(
    job: &Backward<T>,
    affine: &ByValue<T::Real>,
    index: usize,
    dparams: Option<(&mut [f64], &mut [f64])>,
    dx: Option<Parts<T>>,
) {
    let (groups, len) = (job.spec.rows.groups, job.spec.rows.len());
    let (row, start) = (&saved_row(job, index), index % groups * len);
    let run = index * len..(index + 1) * len;
    let slice = slice(job, run.clone());
    let channels = affine.channels(row, start..start + len);
    let mut rooms = [T::ROOM; 3];
    let (mut h, mut hx) = (Lanes::new(), Lanes::new());
    blocks(
        len,
        #[inline(always)]
        |range| {
            let len = range.len();
            let channels = channels.part(range.clone());
            let values = slice.part(range);
            values.prefetch::<M>(Ahead::IN_LINE);
            let load = values.load::<M>(&mut rooms);
            let (h, hx) = (&mut h.0[..len], &mut hx.0[..len]);
            for i in 0..len {
                let (x, g) = load(i, &channels.at(i));
                let (weight, g) = (channels.weight[i].to_f64(), g.to_f64());
                h[i] += weight * g;
                hx[i] += weight * (g * (x.to_f64() - row.mean));
            }
        },
    );
    // In a loop of its own, for so many sums at once are slower.
    if let Some((dweight, dbias)) = dparams {
        for range in chunks::<T>(len) {
            let channels = channels.part(range.clone());
            let (dweight, dbias) = (&mut dweight[range.clone()], &mut dbias[range.clone()]);
            let values = slice.part(range.clone());
            let load = values.load::<M>(&mut rooms);
            for i in 0..range.len() {
                let (x, g) = load(i, &channels.at(i));
                let g = g.to_f64();
                dweight[i] += row.rstd * (g * (x.to_f64() - row.mean));
                dbias[i] += g;
            }
        }
    }
    if let Some(parts) = dx {
        // SAFETY: the caller promises it.
        let dx = unsafe { parts.part(run) };
        write_dx::<T, M, _>(
            job.spec,
            affine,
            row,
            (total(&h.0), total(&hx.0)),
            start,
            &slice,
            dx,
        );
    }
}

#[inline(always)]
fn slice<'a, T: Element>(job: &Backward<'a, T>, run: Range<usize>) -> Slice<'a, T> {
    Slice {
        x: &job.x[run.clone()],
        dy: &job.dy[run.clone()],
        y: &job.x[run],
    }
}
