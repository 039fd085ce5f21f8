//! A tensor `[n, c, s]` in the order of memory, plane by plane: for passes that need no sums, or have them already.

use std::ops::Range;

use super::passes::{write_grads, write_y, GradParts};
use super::{Backward, Forward, Grads, Normalised, Spec};
use crate::ops::loops::convert::{Element, Real};
use crate::ops::loops::element::{Channel, ChannelGrad, Mask, Same};
use crate::ops::loops::stores::Stores;
use crate::ops::loops::sweep::PART;
use crate::ops::loops::Params;
use crate::ops::output::Output;
use crate::ops::parallel;
use crate::ops::slices::vectorised;
use crate::shape::Dims;

/// The forward pass with the statistics of each channel, `[2, c]`.
pub(super) fn forward<T: Element>(job: &Forward<T>, stats: Vec<f64>) -> Normalised<T> {
    let channels = channels::<T::Real>(job.spec, job.params, &stats);
    let mut y = Output::new(job.spec.dims.numel());
    let parts = y.parts();
    for_parts(job.spec.dims, |part| {
        vectorised(
            #[inline(always)]
            || {
                for (run, c) in runs(job.spec.dims, part) {
                    // SAFETY: no two runs of any two parts overlap.
                    unsafe { write_y(job, run, Same(channels[c]), parts, &Stores::CACHED) }
                }
            },
        )
    });
    Normalised {
        // SAFETY: the runs of all parts make up the whole tensor.
        y: unsafe { y.finish() },
        stats,
        maxima: None,
    }
}

/// The backward pass with the gradients of weight and bias, `[2, c]`, which have to be there in training.
pub(super) fn backward<T: Element, M: Mask<T>>(
    job: &Backward<T>,
    dparams: Option<Vec<f64>>,
) -> Grads<T> {
    let (spec, wants) = (job.spec, job.wants);
    let channels = channels::<T::Real>(spec, job.params, job.saved);
    let grads = match dparams.as_ref().filter(|_| spec.training) {
        Some(dparams) => grads::<T::Real>(spec, job.saved, dparams),
        // Nothing flows through given statistics, and nobody looks at these.
        None => vec![ChannelGrad::default(); spec.dims.c],
    };
    let numel = spec.dims.numel();
    let mut dx = wants.dx.then(|| Output::new(numel));
    let mut dresidual = wants.dresidual.then(|| Output::new(numel));
    let to = GradParts::new(&mut dx, &mut dresidual);
    if to.is_some() {
        for_parts(spec.dims, |part| {
            vectorised(
                #[inline(always)]
                || {
                    for (run, c) in runs(spec.dims, part) {
                        let grad = Same(grads[c]);
                        // SAFETY: no two runs of any two parts overlap.
                        unsafe {
                            let channel = Same(channels[c]);
                            write_grads::<T, M>(job, run, channel, grad, to, &Stores::CACHED)
                        }
                    }
                },
            )
        });
    }
    // SAFETY: the runs of all parts make up the whole tensor, and each is written to all that there is.
    let [dx, dresidual] = [dx, dresidual].map(|of| of.map(|of| unsafe { of.finish() }));
    Grads {
        dx,
        dparams: dparams.filter(|_| wants.dparams),
        dresidual,
    }
}

fn for_parts(dims: Dims, task: impl Fn(usize) + Sync) {
    parallel::for_each(dims.numel().div_ceil(PART), dims.numel(), task);
}

/// The values of a part plane by plane, with the channel of each.
#[inline(always)]
fn runs(dims: Dims, part: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
    let Dims { c, s, .. } = dims;
    let end = dims.numel().min((part + 1) * PART);
    let mut next = part * PART;
    std::iter::from_fn(move || {
        if next >= end {
            return None;
        }
        let (plane, start) = (next / s, next);
        next = end.min((plane + 1) * s);
        Some((start..next, plane % c))
    })
}

/// How the channels are normalised, from the means and the variances.
pub(super) fn channels<A: Real>(spec: &Spec, params: &Params, stats: &[f64]) -> Vec<Channel<A>> {
    let (means, vars) = stats.split_at(spec.dims.c);
    let channel = |c: usize| {
        let rstd = spec.rstd(vars[c]);
        Channel::new(means[c], rstd, params.weight[c], params.bias[c])
    };
    (0..spec.dims.c).map(channel).collect()
}

/// What the channels need for `dx`, from the gradients of their weights and biases.
pub(super) fn grads<A: Real>(spec: &Spec, stats: &[f64], dparams: &[f64]) -> Vec<ChannelGrad<A>> {
    let (vars, m) = (&stats[spec.dims.c..], spec.dims.m() as f64);
    let (dweight, dbias) = dparams.split_at(spec.dims.c);
    let grad = |c: usize| {
        let rstd = spec.rstd(vars[c]);
        ChannelGrad::new(rstd, dweight[c], dbias[c], m, spec.remove_mean)
    };
    (0..spec.dims.c).map(grad).collect()
}
