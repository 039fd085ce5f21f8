//! The forward and the backward pass, for channels that lie in memory one way or another.

use std::ops::Range;

use super::convert::{Element, Real};
use super::element::{write_y, Channel, ChannelGrad, Channels, Mask, Slice};
use super::sweep::{Division, Tile};
use super::{Backward, Forward, Grads};
use crate::ops::output::Output;
use crate::ops::parallel;

/// How the channels of a tensor lie in memory: in groups, and the values of a group in parts.
pub(super) trait Tiling: Sync + Sized {
    /// A number for each channel of a group.
    type Row<A: Real>: AsRef<[A]> + AsMut<[A]> + Send + Sync;
    type Channels<'a, A: Real + 'a>: Channels<Channel<A>>
    where
        Self: 'a;
    type Grads<'a, A: Real + 'a>: Channels<ChannelGrad<A>>
    where
        Self: 'a;

    fn division(&self) -> Division;
    fn channels(&self, group: usize) -> Range<usize>;
    /// Zeros.
    fn row<A: Real>(&self) -> Self::Row<A>;
    /// The number of values that a part has of each of its channels.
    fn values(&self, part: usize) -> usize;
    /// The values of a tile: ranges of the tensor.
    fn runs(&self, tile: Tile) -> impl Iterator<Item = Range<usize>>;
    /// Mean (0 without `remove_mean`) and sum of squares around it, of the values of a tile.
    fn moments<T: Element>(&self, x: &[T], tile: Tile, remove_mean: bool) -> Pair<Self::Row<f64>>;
    /// `Σg` and `Σ(g·(x - mean))` over a tile.
    fn grad_sums<T: Element, M: Mask<T>>(
        &self,
        tensors: Slice<T>,
        tile: Tile,
        channels: &ChannelRow<Self, T::Real>,
    ) -> Pair<Self::Row<f64>>;
    /// What belongs to the values of each of a group's runs.
    fn at<'a, A: Real>(&self, row: &'a ChannelRow<Self, A>) -> Self::Channels<'a, A>;
    fn grad_at<'a, A: Real>(&self, row: &'a GradRow<Self, A>) -> Self::Grads<'a, A>;
}

pub(super) struct Pair<R>(pub R, pub R);

/// A [`Channel`] for each channel of a group, and the statistics behind it.
pub(super) struct ChannelRow<L: Tiling, A: Real> {
    pub mean: L::Row<f64>,
    pub var: L::Row<f64>,
    pub rstd: L::Row<f64>,
    pub hi: L::Row<A>,
    pub lo: L::Row<A>,
    pub scale: L::Row<A>,
    pub shift: L::Row<A>,
}

/// A [`ChannelGrad`] for each channel of a group, and the gradients of its parameters.
pub(super) struct GradRow<L: Tiling, A: Real> {
    pub dweight: L::Row<f64>,
    pub dbias: L::Row<f64>,
    pub mean_g: L::Row<A>,
    pub slope: L::Row<A>,
}

pub(super) fn forward<L: Tiling, T: Element>(tiling: &L, job: &Forward<T>) -> (Vec<T>, Vec<f64>) {
    let spec = job.spec;
    let mut y = Output::new(spec.dims.numel());
    let y_parts = y.parts();
    let groups = tiling.division().sweep(
        |tile| match job.given {
            Some(_) => None,
            None => Some(vectorised(
                #[inline(always)]
                || tiling.moments(job.x, tile, spec.remove_mean),
            )),
        },
        |group, moments| {
            let channels = tiling.channels(group);
            let Pair(mean, var) = match &job.given {
                Some([mean, var]) => Pair(
                    copy(tiling, &mean[channels.clone()]),
                    copy(tiling, &var[channels.clone()]),
                ),
                None => vectorised(
                    #[inline(always)]
                    || merge_moments(tiling, moments),
                ),
            };
            vectorised(
                #[inline(always)]
                || channel_row(tiling, channels, job.spec, &job.params, mean, var),
            )
        },
        |tile, row| {
            vectorised(
                #[inline(always)]
                || {
                    for run in tiling.runs(tile) {
                        let residual = job.residual.map(|residual| &residual[run.clone()]);
                        // SAFETY: no two runs of any two tiles overlap.
                        let y = unsafe { y_parts.part(run.clone()) };
                        write_y(y, &job.x[run], residual, tiling.at(row), spec.activation);
                    }
                },
            )
        },
    );
    let saved = by_channel(&groups, |row| [row.mean.as_ref(), row.var.as_ref()]);
    // SAFETY: the runs of all tiles make up the whole tensor.
    (unsafe { y.finish() }, saved)
}

pub(super) fn backward<L: Tiling, T: Element, M: Mask<T>>(
    tiling: &L,
    job: &Backward<T>,
) -> Grads<T> {
    let (spec, wants) = (job.spec, job.wants);
    let numel = spec.dims.numel();
    let mut dx = wants.dx.then(|| Output::new(numel));
    let mut dresidual = wants.dresidual.then(|| Output::new(numel));
    let dx_parts = dx.as_mut().map(Output::parts);
    let dresidual_parts = dresidual.as_mut().map(Output::parts);
    let tensors = Slice {
        x: job.x,
        dy: job.dy,
        y: job.y.unwrap_or(job.x),
    };
    let (means, vars) = job.saved.split_at(spec.dims.c);
    let division = tiling.division();
    let rows = parallel::map(division.groups, division.values, |group| {
        let channels = tiling.channels(group);
        let mean = copy(tiling, &means[channels.clone()]);
        let var = copy(tiling, &vars[channels.clone()]);
        vectorised(
            #[inline(always)]
            || channel_row(tiling, channels, spec, &job.params, mean, var),
        )
    });
    let wants_sums = wants.dparams || (wants.dx && spec.training);
    let groups = division.sweep(
        |tile| {
            wants_sums.then(|| {
                vectorised(
                    #[inline(always)]
                    || tiling.grad_sums::<T, M>(tensors, tile, &rows[tile.group]),
                )
            })
        },
        |group, sums| {
            vectorised(
                #[inline(always)]
                || grad_row(tiling, &rows[group], sums, spec.dims.m(), spec.remove_mean),
            )
        },
        |tile, grads| {
            vectorised(
                #[inline(always)]
                || {
                    let channels = tiling.at(&rows[tile.group]);
                    for run in tiling.runs(tile) {
                        let slice = tensors.part(run.clone());
                        if let Some(parts) = dx_parts {
                            // SAFETY: no two runs of any two tiles overlap.
                            let dx = unsafe { parts.part(run.clone()) };
                            if spec.training {
                                let grads = tiling.grad_at(grads);
                                slice.write_dx_training::<M>(dx, channels, grads);
                            } else {
                                slice.write_dx_given::<M>(dx, channels);
                            }
                        }
                        if let Some(parts) = dresidual_parts {
                            // SAFETY: as for `dx`.
                            slice.write_g::<M>(unsafe { parts.part(run) }, channels);
                        }
                    }
                },
            )
        },
    );
    let dparams = wants
        .dparams
        .then(|| by_channel(&groups, |row| [row.dweight.as_ref(), row.dbias.as_ref()]));
    // SAFETY: the runs of all tiles make up the whole tensor.
    unsafe {
        Grads {
            dx: dx.map(|dx| dx.finish()),
            dparams,
            dresidual: dresidual.map(|dresidual| dresidual.finish()),
        }
    }
}

/// Runs loops with the widest registers that the machine has. `f` has to be inlined into it.
#[inline(always)]
fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

fn copy<L: Tiling>(tiling: &L, values: &[f64]) -> L::Row<f64> {
    let mut row = tiling.row();
    row.as_mut().copy_from_slice(values);
    row
}

/// `[2, c]` from two rows of every group.
fn by_channel<G>(groups: &[G], rows: fn(&G) -> [&[f64]; 2]) -> Vec<f64> {
    let rows = |index: usize| groups.iter().map(move |group| rows(group)[index]);
    let rows: Vec<&[f64]> = rows(0).chain(rows(1)).collect();
    rows.concat()
}

/// Mean and biased variance of a group from the moments of its parts (Chan et al. 1983,
/// <https://doi.org/10.1080/00031305.1983.10483115>).
#[inline(always)]
fn merge_moments<L: Tiling>(tiling: &L, parts: &[Option<Pair<L::Row<f64>>>]) -> Pair<L::Row<f64>> {
    let (mut mean, mut var) = (tiling.row::<f64>(), tiling.row::<f64>());
    let parts = || parts.iter().flatten().enumerate();
    let m = parts().map(|(part, _)| tiling.values(part)).sum::<usize>() as f64;
    let first = parts().next().map(|(_, Pair(mean, _))| mean.as_ref());
    let first = first.unwrap_or(&[]);
    for (part, Pair(part_mean, _)) in parts() {
        let share = tiling.values(part) as f64 / m;
        for ((mean, part_mean), first) in
            mean.as_mut().iter_mut().zip(part_mean.as_ref()).zip(first)
        {
            *mean += share * (part_mean - first);
        }
    }
    for (mean, first) in mean.as_mut().iter_mut().zip(first) {
        *mean += first;
    }
    for (part, Pair(part_mean, squares)) in parts() {
        let values = tiling.values(part) as f64;
        let part = part_mean.as_ref().iter().zip(squares.as_ref());
        for ((var, mean), (part_mean, squares)) in
            var.as_mut().iter_mut().zip(mean.as_ref()).zip(part)
        {
            let distance = part_mean - mean;
            *var += squares + values * distance * distance;
        }
    }
    for var in var.as_mut() {
        *var /= m;
    }
    Pair(mean, var)
}

/// What is done with the values of a group's channels.
#[inline(always)]
fn channel_row<L: Tiling, A: Real>(
    tiling: &L,
    channels: Range<usize>,
    spec: &super::Spec,
    params: &super::Params,
    mean: L::Row<f64>,
    var: L::Row<f64>,
) -> ChannelRow<L, A> {
    let mut row = ChannelRow::<L, A> {
        mean,
        var,
        rstd: tiling.row(),
        hi: tiling.row(),
        lo: tiling.row(),
        scale: tiling.row(),
        shift: tiling.row(),
    };
    let len = channels.len();
    let (weight, bias) = (&params.weight[channels.clone()], &params.bias[channels]);
    let (mean, var) = (&row.mean.as_ref()[..len], &row.var.as_ref()[..len]);
    let rstd = &mut row.rstd.as_mut()[..len];
    let (hi, lo) = (&mut row.hi.as_mut()[..len], &mut row.lo.as_mut()[..len]);
    let (scale, shift) = (
        &mut row.scale.as_mut()[..len],
        &mut row.shift.as_mut()[..len],
    );
    for j in 0..len {
        rstd[j] = spec.rstd(var[j]);
        let channel = Channel::<A>::new(mean[j], rstd[j], weight[j], bias[j]);
        (hi[j], lo[j]) = (channel.hi, channel.lo);
        (scale[j], shift[j]) = (channel.scale, channel.shift);
    }
    row
}

/// The gradients of a group's parameters, and what `dx` needs, from the sums of its parts.
#[inline(always)]
fn grad_row<L: Tiling, A: Real>(
    tiling: &L,
    channels: &ChannelRow<L, A>,
    parts: &[Option<Pair<L::Row<f64>>>],
    m: usize,
    remove_mean: bool,
) -> GradRow<L, A> {
    let (mut sum_g, mut sum_gx) = (tiling.row::<f64>(), tiling.row::<f64>());
    for Pair(g, gx) in parts.iter().flatten() {
        let part = g.as_ref().iter().zip(gx.as_ref());
        for ((sum_g, sum_gx), (g, gx)) in sum_g.as_mut().iter_mut().zip(sum_gx.as_mut()).zip(part) {
            *sum_g += g;
            *sum_gx += gx;
        }
    }
    let (mut mean_g, mut slope) = (tiling.row::<A>(), tiling.row::<A>());
    let (m, rstd) = (m as f64, channels.rstd.as_ref());
    let len = rstd.len();
    let (sums_g, sums_gx) = (&sum_g.as_ref()[..len], &mut sum_gx.as_mut()[..len]);
    let (means_g, slopes) = (&mut mean_g.as_mut()[..len], &mut slope.as_mut()[..len]);
    for j in 0..len {
        means_g[j] = A::from_f64(if remove_mean { sums_g[j] / m } else { 0.0 });
        slopes[j] = A::from_f64(rstd[j] * rstd[j] * sums_gx[j] / m);
        sums_gx[j] *= rstd[j];
    }
    GradRow {
        dweight: sum_gx,
        dbias: sum_g,
        mean_g,
        slope,
    }
}
