//! The forward and the backward pass, for channels that lie in memory one way or another.

use std::ops::Range;

use super::rows::{by_channel, channel_row, copy, grad_row, merge_moments};
use super::rows::{ChannelRow, GradRow, Pair};
use super::{Backward, Forward, Grads, Normalised, Params, Spec};
use crate::ops::loops::convert::{Element, Real};
use crate::ops::loops::element::{self, Channel, ChannelGrad, Channels, Mask};
use crate::ops::loops::stores::Stores;
use crate::ops::loops::sweep::{Division, Tile};
use crate::ops::output::{Output, Parts};
use crate::ops::parallel;
use crate::ops::slices::vectorised;

/// How the channels of a tensor lie in memory: in groups, and the values of a group in parts, which are summed up
/// channel by channel.
pub(super) trait Tiling: Sync + Sized {
    /// A number for each channel of a group, or [`repeats`](Self::repeats) of them.
    type Row<A: Real>: AsRef<[A]> + AsMut<[A]> + Send + Sync;
    type Channels<'a, A: Real + 'a>: Channels<Channel<A>>
    where
        Self: 'a;
    type Grads<'a, A: Real + 'a>: Channels<ChannelGrad<A>>
    where
        Self: 'a;
    fn division(&self) -> Division;
    fn channels(&self, group: usize) -> Range<usize>;
    /// How often the number of a channel stands in a row.
    fn repeats(&self) -> usize;
    /// Zeros, `len` of them.
    fn row<A: Real>(&self, len: usize) -> Self::Row<A>;
    /// The values of a tile: ranges of the tensor.
    fn runs(&self, tile: Tile) -> impl Iterator<Item = Range<usize>>;
    /// What belongs to the values of a run, each of which has values of the same channels.
    fn at<'a, A: Real>(&self, row: &'a ChannelRow<Self, A>) -> Self::Channels<'a, A>;
    fn grad_at<'a, A: Real>(&self, row: &'a GradRow<Self, A>) -> Self::Grads<'a, A>;
    /// Calls `f` with the way in which to write the values of a tile's runs.
    fn with_stores<T, R>(&self, f: impl FnOnce(&Stores) -> R) -> R;
    /// The number of values that a part has of each of its channels.
    fn values(&self, part: usize) -> usize;
    /// Mean (0 without `remove_mean`) and sum of squares around it, of the values of a tile.
    fn moments<T: Element>(&self, x: &[T], tile: Tile, remove_mean: bool) -> Pair<Self::Row<f64>>;
    /// `Σg` and `Σ(g·(x - mean))` over a tile.
    fn grad_sums<T: Element, M: Mask<T>>(
        &self,
        job: &Backward<T>,
        tile: Tile,
        channels: &ChannelRow<Self, T::Real>,
    ) -> Pair<Self::Row<f64>>;
}

/// Where the gradients that are wanted go, as large as `x`.
#[derive(Clone, Copy)]
pub(super) struct GradParts<'a, T> {
    dx: Option<Parts<'a, T>>,
    dresidual: Option<Parts<'a, T>>,
}

impl<'a, T> GradParts<'a, T> {
    pub fn new(dx: &'a mut Option<Output<T>>, dresidual: &'a mut Option<Output<T>>) -> Self {
        Self {
            dx: dx.as_mut().map(Output::parts),
            dresidual: dresidual.as_mut().map(Output::parts),
        }
    }

    /// Whether there are any.
    pub fn is_some(&self) -> bool {
        self.dx.is_some() || self.dresidual.is_some()
    }
}

/// Writes the output of a run.
///
/// # Safety
/// Nobody else holds any of it.
#[inline(always)]
pub(super) unsafe fn write_y<T: Element>(
    job: &Forward<T>,
    run: Range<usize>,
    channels: impl Channels<Channel<T::Real>>,
    y: Parts<T>,
    stores: &Stores,
) {
    let residual = job.residual.map(
        #[inline(always)]
        |residual| &residual[run.clone()],
    );
    // SAFETY: the caller promises it.
    let y = unsafe { y.part(run.clone()) };
    let activation = job.spec.activation;
    element::write_y(y, stores, &job.x[run], residual, channels, activation);
}

/// Writes the gradients of a run.
///
/// # Safety
/// Nobody else holds any of it.
#[inline(always)]
pub(super) unsafe fn write_grads<T: Element, M: Mask<T>>(
    job: &Backward<T>,
    run: Range<usize>,
    channels: impl Channels<Channel<T::Real>>,
    grads: impl Channels<ChannelGrad<T::Real>>,
    to: GradParts<T>,
    stores: &Stores,
) {
    let slice = job.tensors().part(run.clone());
    if let Some(dx) = to.dx {
        // SAFETY: the caller promises it.
        let dx = unsafe { dx.part(run.clone()) };
        if job.spec.training {
            slice.write_dx_training::<M>(dx, stores, channels, grads);
        } else {
            slice.write_dx_given::<M>(dx, stores, channels);
        }
    }
    if let Some(dresidual) = to.dresidual {
        // SAFETY: as for `dx`.
        slice.write_g::<M>(unsafe { dresidual.part(run) }, stores, channels);
    }
}

/// The forward pass with the statistics of the batch.
pub(super) fn forward_training<L: Tiling, T: Element>(
    tiling: &L,
    job: &Forward<T>,
) -> Normalised<T> {
    let mut y = Output::new(job.spec.dims.numel());
    let y_parts = y.parts();
    let groups = tiling.division().sweep(
        |tile| {
            vectorised(
                #[inline(always)]
                || tiling.moments(job.x, tile, job.spec.remove_mean),
            )
        },
        |group, moments| {
            vectorised(
                #[inline(always)]
                || {
                    let moments = merge_moments(tiling, tiling.channels(group), moments);
                    channel_row(
                        tiling,
                        tiling.channels(group),
                        job.spec,
                        job.params,
                        moments,
                    )
                },
            )
        },
        // SAFETY: no two tiles overlap.
        |tile, row| unsafe { write_tile(tiling, tile, row, job, y_parts) },
    );
    let saved = by_channel(tiling, &groups, |row| [row.mean.as_ref(), row.var.as_ref()]);
    Normalised {
        // SAFETY: the runs of all tiles make up the whole tensor.
        y: unsafe { y.finish() },
        stats: saved,
        maxima: None,
    }
}

/// The statistics of the batch alone, `[2, c]`.
pub(super) fn statistics<L: Tiling, T: Element>(tiling: &L, spec: &Spec, x: &[T]) -> Vec<f64> {
    let groups = tiling.division().reduce(
        |tile| {
            vectorised(
                #[inline(always)]
                || tiling.moments(x, tile, spec.remove_mean),
            )
        },
        |group, moments| merge_moments(tiling, tiling.channels(group), moments),
    );
    by_channel(tiling, &groups, |Pair(mean, var)| {
        [mean.as_ref(), var.as_ref()]
    })
}

/// What is computed for a number of a row takes as long as so many values of the tensor.
const PER_NUMBER: usize = 16;

/// The forward pass with given statistics.
pub(super) fn forward_given<L: Tiling, T: Element>(
    tiling: &L,
    job: &Forward<T>,
    [mean, var]: &[Vec<f64>; 2],
) -> Normalised<T> {
    let mut y = Output::new(job.spec.dims.numel());
    let y_parts = y.parts();
    let division = tiling.division();
    let rows = given_rows(tiling, job.spec, job.params, mean, var);
    parallel::for_each(division.groups * division.parts, division.values, |index| {
        let tile = division.tile(index);
        // SAFETY: no two tiles overlap.
        unsafe { write_tile(tiling, tile, &rows[tile.group], job, y_parts) }
    });
    Normalised {
        // SAFETY: the runs of all tiles make up the whole tensor.
        y: unsafe { y.finish() },
        stats: [mean.as_slice(), var].concat(),
        maxima: None,
    }
}

/// What is done with the values of each group, for known statistics.
fn given_rows<L: Tiling, A: Real>(
    tiling: &L,
    spec: &Spec,
    params: &Params,
    mean: &[f64],
    var: &[f64],
) -> Vec<ChannelRow<L, A>> {
    let work = spec.dims.c * tiling.repeats() * PER_NUMBER;
    parallel::map(tiling.division().groups, work, |group| {
        vectorised(
            #[inline(always)]
            || {
                let channels = tiling.channels(group);
                let mean = copy(tiling, &mean[channels.clone()]);
                let var = copy(tiling, &var[channels.clone()]);
                channel_row(tiling, channels, spec, params, Pair(mean, var))
            },
        )
    })
}

/// Writes the output of a tile.
///
/// # Safety
/// Nobody else holds any of it.
unsafe fn write_tile<L: Tiling, T: Element>(
    tiling: &L,
    tile: Tile,
    row: &ChannelRow<L, T::Real>,
    job: &Forward<T>,
    y: Parts<T>,
) {
    vectorised(
        #[inline(always)]
        || {
            let channels = tiling.at(row);
            tiling.with_stores::<T, _>(
                #[inline(always)]
                |stores| {
                    for run in tiling.runs(tile) {
                        // SAFETY: the caller promises it.
                        unsafe { write_y(job, run, channels, y, stores) }
                    }
                },
            )
        },
    )
}

/// The gradients of weight and bias alone, `[2, c]`.
pub(super) fn param_grads<L: Tiling, T: Element, M: Mask<T>>(
    tiling: &L,
    job: &Backward<T>,
) -> Vec<f64> {
    let spec = job.spec;
    let (means, vars) = job.saved.split_at(spec.dims.c);
    let rows = given_rows(tiling, spec, job.params, means, vars);
    let groups = tiling.division().reduce(
        |tile| {
            vectorised(
                #[inline(always)]
                || Some(tiling.grad_sums::<T, M>(job, tile, &rows[tile.group])),
            )
        },
        |group, sums| finish_grads(tiling, spec, &rows[group], sums),
    );
    by_channel(tiling, &groups, dparams)
}

/// What becomes of the sums over the parts of a group.
fn finish_grads<L: Tiling, A: Real>(
    tiling: &L,
    spec: &Spec,
    row: &ChannelRow<L, A>,
    parts: &[Option<Pair<L::Row<f64>>>],
) -> GradRow<L, A> {
    vectorised(
        #[inline(always)]
        || grad_row(tiling, row, parts, spec.dims.m(), spec.remove_mean),
    )
}

/// The gradients of weight and bias, of a group.
fn dparams<L: Tiling, A: Real>(row: &GradRow<L, A>) -> [&[f64]; 2] {
    [row.dweight.as_ref(), row.dbias.as_ref()]
}

/// The backward pass.
pub(super) fn backward<L: Tiling, T: Element, M: Mask<T>>(
    tiling: &L,
    job: &Backward<T>,
) -> Grads<T> {
    let (spec, wants) = (job.spec, job.wants);
    let numel = spec.dims.numel();
    let mut dx = wants.dx.then(|| Output::new(numel));
    let mut dresidual = wants.dresidual.then(|| Output::new(numel));
    let to = GradParts::new(&mut dx, &mut dresidual);
    let (means, vars) = job.saved.split_at(spec.dims.c);
    let division = tiling.division();
    let rows = given_rows(tiling, spec, job.params, means, vars);
    let wants_sums = wants.sums(spec);
    let groups = division.sweep(
        |tile| {
            wants_sums.then(|| {
                vectorised(
                    #[inline(always)]
                    || tiling.grad_sums::<T, M>(job, tile, &rows[tile.group]),
                )
            })
        },
        |group, sums| finish_grads(tiling, spec, &rows[group], sums),
        |tile, grads| {
            if to.is_some() {
                vectorised(
                    #[inline(always)]
                    || {
                        let channels = tiling.at(&rows[tile.group]);
                        let grads = tiling.grad_at(grads);
                        tiling.with_stores::<T, _>(
                            #[inline(always)]
                            |stores| {
                                for run in tiling.runs(tile) {
                                    // SAFETY: no two runs of any two tiles overlap.
                                    unsafe {
                                        write_grads::<T, M>(job, run, channels, grads, to, stores)
                                    }
                                }
                            },
                        )
                    },
                )
            }
        },
    );
    let dparams = (wants.dparams).then(|| by_channel(tiling, &groups, dparams));
    // SAFETY: the runs of all tiles make up the whole tensor, and each is written to all that there is.
    unsafe {
        Grads {
            dx: dx.map(|dx| dx.finish()),
            dparams,
            dresidual: dresidual.map(|dresidual| dresidual.finish()),
        }
    }
}
