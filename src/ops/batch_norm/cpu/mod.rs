//! Batch norm on the CPU: loops over slices, without candle's types.
//!
//! [`forward`] and [`backward`] take whole tensors and go over their channels in parallel: a plane
//! at a time where the values of a channel lie together ([`planes`]), a block of neighbouring
//! columns at a time for `[m, c]` ([`columns`]). What is computed per value is the same for both and
//! stands in [`element`]. Each channel belongs to one task, which adds in a fixed order: the result
//! does not depend on the number of threads.

mod columns;
mod element;
mod planes;

use half::{bf16, f16};

use super::{Activation, Spec};
use crate::ops::{output, parallel::for_each};
pub(crate) use element::Element;
use element::{FromInput, FromOutput, Mask, NoMask};

/// A tensor of one value per channel, in any of its dtypes.
#[derive(Clone, Copy)]
pub(crate) enum PerChannel<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
}

impl PerChannel<'_> {
    fn get(&self, channel: usize) -> f64 {
        match self {
            Self::F32(values) => f64::from(values[channel]),
            Self::F64(values) => values[channel],
            Self::F16(values) => values[channel].to_f64(),
            Self::BF16(values) => values[channel].to_f64(),
        }
    }
}

/// The optional learned parameters; an absent weight is 1, an absent bias 0.
#[derive(Clone, Copy)]
pub(crate) struct Params<'a> {
    pub weight: Option<PerChannel<'a>>,
    pub bias: Option<PerChannel<'a>>,
}

impl Params<'_> {
    fn weight(&self, channel: usize) -> f64 {
        self.weight.map_or(1.0, |weight| weight.get(channel))
    }

    fn bias(&self, channel: usize) -> f64 {
        self.bias.map_or(0.0, |bias| bias.get(channel))
    }
}

/// Input of [`forward`]. All tensors are contiguous, `x` and `residual` are `[n, c, s]`.
pub(crate) struct Forward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub params: Params<'a>,
    pub residual: Option<&'a [T]>,
    /// Mean and variance to normalise with; without them, those of `x`.
    pub given: Option<[PerChannel<'a>; 2]>,
}

/// Input of [`backward`]. All tensors are contiguous, `x`, `y` and `dy` are `[n, c, s]`.
pub(crate) struct Backward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub dy: &'a [T],
    /// The output, from which the ReLU's mask is read. Without it the mask is computed from `x`.
    pub y: Option<&'a [T]>,
    pub params: Params<'a>,
    /// Mean and variance that the forward pass used, `[2, c]`.
    pub saved: &'a [f64],
    pub wants: Wants,
}

/// Which gradients somebody asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wants {
    pub dx: bool,
    pub dparams: bool,
    pub dresidual: bool,
}

/// The gradients that were asked for; `dparams` is `[2, c]`: of the weight, then of the bias.
pub(crate) struct Grads<T> {
    pub dx: Option<Vec<T>>,
    pub dparams: Option<Vec<f64>>,
    pub dresidual: Option<Vec<T>>,
}

/// The output `[n, c, s]`, and the mean and the (biased) variance that were used, `[2, c]`.
pub(crate) fn forward<T: Element>(job: &Forward<T>) -> (Vec<T>, Vec<f64>) {
    if job.spec.dims.s == 1 {
        columns::forward(job)
    } else {
        planes::forward(job)
    }
}

/// The gradients of [`forward`].
pub(crate) fn backward<T: Element>(job: &Backward<T>) -> Grads<T> {
    match (job.spec.activation, job.y) {
        (Activation::Identity, _) => backward_masked(job, NoMask),
        (Activation::Relu, None) => backward_masked(job, FromInput),
        (Activation::Relu, Some(y)) => backward_masked(job, FromOutput(y)),
    }
}

fn backward_masked<T: Element, M: Mask<T>>(job: &Backward<T>, mask: M) -> Grads<T> {
    if job.spec.dims.s == 1 {
        columns::backward(job, mask)
    } else {
        planes::backward(job, mask)
    }
}
