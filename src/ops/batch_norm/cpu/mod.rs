//! Batch norm on the CPU: loops over slices, without candle's types.
//!
//! [`forward`] and [`backward`] take whole tensors. Both go over a tensor part by part: first for sums, merged to what
//! a channel needs, and then for every value, channel by channel ([`passes`]) or in the order of memory
//! ([`in_order`], [`pooled`]). How a tensor is divided among threads and what is computed per value stand in
//! [`loops`](crate::ops::loops); where its channels lie, in [`planes`] and [`columns`].

// With an index below a length, the compiler leaves out the checks of bounds behind closures; with
// an enumerated iterator it keeps them, and a scalar rest of each loop.
#![allow(clippy::needless_range_loop)]

mod columns;
mod in_order;
mod passes;
mod planes;
mod pooled;
mod rows;

use super::{Activation, Spec, Wants};
use columns::Columns;
use planes::Planes;

use crate::ops::cache;
pub(crate) use crate::ops::loops::convert::Element;
use crate::ops::loops::element::{FromInput, FromOutput, Mask, NoMask, Slice};
use crate::ops::loops::{Params, PLANE};

/// Input of [`forward`]. All tensors are contiguous, `x` and `residual` are `[n, c, s]`.
pub(crate) struct Forward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub params: &'a Params,
    pub residual: Option<&'a [T]>,
    /// Mean and variance to normalise with; without them, those of `x`.
    pub given: Option<[Vec<f64>; 2]>,
    /// Whether there will be sums over gradients: where the output is pooled, they need its pixels.
    pub keeps_maxima: bool,
}

/// What becomes of [`Forward`].
pub(crate) struct Normalised<T> {
    /// `[n, c, s]`, or with the windows of each plane.
    pub y: Vec<T>,
    /// The mean and the (biased) variance that were used, `[2, c]`.
    pub stats: Vec<f64>,
    /// The pixels of `x` that became `y`, where it is pooled and they are to be kept.
    pub maxima: Option<Vec<T>>,
}

/// Input of [`backward`]. All tensors are contiguous and `[n, c, s]`; with pooling, `dy` and `maxima` are as large
/// as the output.
pub(crate) struct Backward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub dy: &'a [T],
    /// The output, from which the ReLU's mask is read, where a residual took part in it. Without it the mask is
    /// computed from `x`, with pooling from `maxima`.
    pub y: Option<&'a [T]>,
    /// The pixels of `x` that became the output, where that is pooled.
    pub maxima: Option<&'a [T]>,
    pub params: &'a Params,
    /// Mean and variance that the forward pass used, `[2, c]`.
    pub saved: &'a [f64],
    pub wants: Wants,
}

impl<'a, T> Backward<'a, T> {
    /// What the loops read.
    fn tensors(&self) -> Slice<'a, T> {
        Slice {
            x: self.x,
            dy: self.dy,
            y: self.y.unwrap_or(self.x),
        }
    }
}

/// The gradients that were asked for; `dparams` is `[2, c]`: of the weight, then of the bias.
pub(crate) struct Grads<T> {
    pub dx: Option<Vec<T>>,
    pub dparams: Option<Vec<f64>>,
    pub dresidual: Option<Vec<T>>,
}

/// The output, with given statistics or with those of `x`.
pub(crate) fn forward<T: Element>(job: &Forward<T>) -> Normalised<T> {
    let (spec, x) = (job.spec, job.x);
    check(spec, x);
    if let Some(windows) = &spec.windows {
        return pooled::forward(job, windows);
    }
    let tensors = 2 + usize::from(job.residual.is_some());
    match (&job.given, as_columns(spec)) {
        (None, true) => passes::forward_training(&Columns::new(spec.dims), job),
        (None, false) if stays_in_cache(tensors, x) => in_order::forward(job, statistics(spec, x)),
        (None, false) => passes::forward_training(&Planes::new(spec.dims), job),
        (Some(given), true) => passes::forward_given(&Columns::new(spec.dims), job, given),
        (Some([mean, var]), false) => in_order::forward(job, [mean.as_slice(), var].concat()),
    }
}

/// The loops rely on it.
fn check<T>(spec: &Spec, x: &[T]) {
    assert_eq!(x.len(), spec.dims.numel());
    if let Some(windows) = &spec.windows {
        assert_eq!(windows.inputs(), spec.dims.s);
    }
}

/// Whether so many tensors like `x` are still in the cache after a pass for sums over some of them. Then the next one
/// is faster in the order of memory; else it has to follow channel by channel.
fn stays_in_cache<T>(tensors: usize, x: &[T]) -> bool {
    cache::holds(tensors * size_of_val(x))
}

/// The mean and the (biased) variance of `x: [n, c, s]`, `[2, c]`.
pub(crate) fn statistics<T: Element>(spec: &Spec, x: &[T]) -> Vec<f64> {
    match as_columns(spec) {
        true => passes::statistics(&Columns::new(spec.dims), spec, x),
        false => passes::statistics(&Planes::new(spec.dims), spec, x),
    }
}

fn as_columns(spec: &Spec) -> bool {
    spec.dims.s < PLANE
}

/// Calls a function that is generic over the mask.
macro_rules! by_mask {
    ($f:ident($job:expr)) => {
        match ($job.spec.activation, $job.y) {
            (Activation::Identity, _) => $f::<_, NoMask>($job),
            (Activation::Relu, None) => $f::<_, FromInput>($job),
            (Activation::Relu, Some(_)) => $f::<_, FromOutput>($job),
        }
    };
}

/// The gradients of [`forward`].
pub(crate) fn backward<T: Element>(job: &Backward<T>) -> Grads<T> {
    check(job.spec, job.x);
    match &job.spec.windows {
        Some(windows) => pooled::backward(job, windows),
        None => by_mask!(backward_masked(job)),
    }
}

fn backward_masked<T: Element, M: Mask<T>>(job: &Backward<T>) -> Grads<T> {
    let (spec, wants) = (job.spec, job.wants);
    let tensors = [true, true, job.y.is_some(), wants.dx, wants.dresidual];
    let tensors = tensors.into_iter().map(usize::from).sum();
    if as_columns(spec) {
        passes::backward::<_, T, M>(&Columns::new(spec.dims), job)
    } else if stays_in_cache(tensors, job.x) {
        let dparams = wants.sums(spec);
        in_order::backward::<T, M>(job, dparams.then(|| param_grads_masked::<T, M>(job)))
    } else {
        passes::backward::<_, T, M>(&Planes::new(spec.dims), job)
    }
}

/// The gradients of weight and bias, `[2, c]`, where nothing is pooled.
fn param_grads<T: Element>(job: &Backward<T>) -> Vec<f64> {
    by_mask!(param_grads_masked(job))
}

fn param_grads_masked<T: Element, M: Mask<T>>(job: &Backward<T>) -> Vec<f64> {
    match as_columns(job.spec) {
        true => passes::param_grads::<_, T, M>(&Columns::new(job.spec.dims), job),
        false => passes::param_grads::<_, T, M>(&Planes::new(job.spec.dims), job),
    }
}

#[cfg(test)]
mod tests;
