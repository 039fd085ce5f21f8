//! The backward pass over contiguous rows.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::affine::{Affine, ByPlane, ByValue, Row, RowGrad};
use super::blocks::{batches, Blocks};
use super::{Backward, Grads, Spec};
use crate::dims::Rows;
use crate::ops::loops::convert::{chunks, Element, Real};
use crate::ops::loops::element::{Channels, Mask, Same, Slice};
use crate::ops::loops::lanes::{self, ones, GradSums};
use crate::ops::loops::prefetch::Ahead;
use crate::ops::loops::stores::Stores;
use crate::ops::output::Output;
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
        let mut sums = GradSums::new();
        let of_plane = affine.channel(row, channel);
        let ahead = Ahead::IN_LINE;
        sums.add::<T, M, _>(&slice.part(run), Same(of_plane), ones, row.mean, ahead);
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
            &Stores::CACHED,
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
    let (sample, len) = (c * s, job.spec.rows.len());
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
        let mut dparams = (job.wants.dparams).then(|| [vec![0.0; sample], vec![0.0; sample]]);
        let samples = chunk * of_chunk..n.min((chunk + 1) * of_chunk);
        vectorised(
            #[inline(always)]
            || {
                let mut rows = Vec::new();
                for batch in batches(samples.start * groups..samples.end * groups, len) {
                    rows.clear();
                    for index in batch.clone() {
                        let (row, start) = (saved_row(job, index), index % groups * len);
                        let slice = slice(job, index * len..(index + 1) * len);
                        // Only `dx` needs them.
                        let sums =
                            dx_parts.map(|_| value_sums::<T, M>(affine, &row, start, &slice));
                        rows.push((row, sums));
                    }
                    for ((row, sums), index) in rows.iter().zip(batch) {
                        let (start, run) = (index % groups * len, index * len..(index + 1) * len);
                        let slice = slice(job, run.clone());
                        if let Some([dweight, dbias]) = &mut dparams {
                            let to = start..start + len;
                            let to = [&mut dweight[to.clone()], &mut dbias[to]];
                            add_dparams::<T, M>(affine, row, start, &slice, to);
                        }
                        if let (Some(parts), Some(sums)) = (dx_parts, *sums) {
                            // SAFETY: no two chunks have a sample in common.
                            let dx = unsafe { parts.part(run) };
                            write_dx::<T, M, _>(job.spec, affine, row, sums, start, &slice, dx);
                        }
                    }
                }
            },
        );
        dparams
    });
    let dparams = || {
        let mut dparams = vec![0.0; 2 * c];
        vectorised(
            #[inline(always)]
            || {
                for sums in parts.iter().flatten() {
                    for (to, sums) in dparams.chunks_exact_mut(c).zip(sums) {
                        add_planes(to, sums, s);
                    }
                }
            },
        );
        dparams
    };
    Grads {
        // SAFETY: the chunks have all samples.
        dx: dx.map(|dx| unsafe { dx.finish() }),
        dparams: job.wants.dparams.then(dparams),
    }
}

/// Adds to a number for each channel what its plane of `s` values comes to.
#[inline(always)]
fn add_planes(to: &mut [f64], planes: &[f64], s: usize) {
    if s == 1 {
        for (to, value) in to.iter_mut().zip(planes) {
            *to += value;
        }
        return;
    }
    for (to, plane) in to.iter_mut().zip(planes.chunks_exact(s)) {
        *to += lanes::sum(plane);
    }
}

/// The sums of a row, the first value of which is value `start` of the sample.
#[inline(always)]
fn value_sums<T: Element, M: Mask<T>>(
    affine: &ByValue<T::Real>,
    row: &Row<T::Real>,
    start: usize,
    slice: &Slice<T>,
) -> Sums {
    let channels = affine.channels(row, start..start + slice.x.len());
    let mut sums = GradSums::new();
    sums.add::<T, M, _>(
        slice,
        channels,
        #[inline(always)]
        |range| {
            let weight = &channels.weight[range];
            #[inline(always)]
            |i| weight[i].to_f64()
        },
        row.mean,
        Ahead::IN_LINE,
    );
    sums.totals()
}

/// Adds what a row has for the gradients of its values' weights and biases.
#[inline(always)]
fn add_dparams<T: Element, M: Mask<T>>(
    affine: &ByValue<T::Real>,
    row: &Row<T::Real>,
    start: usize,
    slice: &Slice<T>,
    [dweight, dbias]: [&mut [f64]; 2],
) {
    let channels = affine.channels(row, start..start + slice.x.len());
    let mut rooms = [T::ROOM; 3];
    for range in chunks::<T>(0..slice.x.len()) {
        let channels = channels.part(range.clone());
        let (dweight, dbias) = (&mut dweight[range.clone()], &mut dbias[range.clone()]);
        let values = slice.part(range);
        let load = values.load::<M>(&mut rooms);
        for i in 0..values.x.len() {
            let (x, g) = load(i, &channels.at(i));
            let g = g.to_f64();
            dweight[i] += row.rstd * (g * (x.to_f64() - row.mean));
            dbias[i] += g;
        }
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
