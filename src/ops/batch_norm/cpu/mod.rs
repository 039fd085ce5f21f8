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
use passes::Tiling;
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
    /// What is summed up.
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
    if let Some(windows) = &spec.windows {
        return pooled::forward(job, windows);
    }
    match (&job.given, as_columns(spec)) {
        (None, true) => passes::forward_training(&Columns::new(spec.dims), job),
        (None, false) if in_order(2, x) => in_order::forward(job, statistics(spec, x)),
        (None, false) => passes::forward_training(&Planes(spec.dims), job),
        (Some(given), true) => passes::forward_given(&Columns::new(spec.dims), job, given),
        (Some([mean, var]), false) => in_order::forward(job, [mean.as_slice(), var].concat()),
    }
}

/// Whether a pass over planes that has its sums goes in the order of memory, which is faster where the cache still has
/// what was summed up. `tensors` like `x` are read and written.
fn in_order<T>(tensors: usize, x: &[T]) -> bool {
    cache::holds(tensors * size_of_val(x))
}

/// The mean and the (biased) variance of `x: [n, c, s]`, `[2, c]`.
pub(crate) fn statistics<T: Element>(spec: &Spec, x: &[T]) -> Vec<f64> {
    match as_columns(spec) {
        true => passes::statistics(&Columns::new(spec.dims), spec, x),
        false => passes::statistics(&Planes(spec.dims), spec, x),
    }
}

fn as_columns(spec: &Spec) -> bool {
    spec.dims.s < PLANE
}

/// The gradients of [`forward`].
pub(crate) fn backward<T: Element>(job: &Backward<T>) -> Grads<T> {
    if let Some(windows) = &job.spec.windows {
        return pooled::backward(job, windows);
    }
    match (job.spec.activation, job.y) {
        (Activation::Identity, _) => backward_masked::<_, NoMask>(job),
        (Activation::Relu, None) => backward_masked::<_, FromInput>(job),
        (Activation::Relu, Some(_)) => backward_masked::<_, FromOutput>(job),
    }
}

fn backward_masked<T: Element, M: Mask<T>>(job: &Backward<T>) -> Grads<T> {
    let spec = job.spec;
    if as_columns(spec) {
        return passes::backward::<_, T, M>(&Columns::new(spec.dims), job);
    }
    let planes = Planes(spec.dims);
    match in_order(3, job.x) {
        true => in_order::backward::<_, M>(job, sums::<_, _, M>(&planes, job)),
        false => passes::backward::<_, T, M>(&planes, job),
    }
}

/// The gradients of weight and bias, `[2, c]`, if something depends on them.
fn sums<L: Tiling, T: Element, M: Mask<T>>(tiling: &L, job: &Backward<T>) -> Option<Vec<f64>> {
    if !job.wants.sums(job.spec) {
        return None;
    }
    let only_sums = Backward {
        wants: Wants::ONLY_PARAMS,
        ..*job
    };
    passes::backward::<_, T, M>(tiling, &only_sums).dparams
}

#[cfg(test)]
mod tests;
