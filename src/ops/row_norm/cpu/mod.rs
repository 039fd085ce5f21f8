//! Row norms on the CPU: loops over slices, without candle's types.
//!
//! [`forward`] and [`backward`] take whole tensors. What is known of a row, and which weight and bias belong
//! to its values, stands in [`affine`]. Tensors with the channels last go through the same steps a few rows
//! at a time ([`transposed`]).

// As in `loops`: with an index below a length, loops have no checks of bounds.
#![allow(clippy::needless_range_loop)]

mod affine;
mod backward;
mod blocks;
mod forward;
mod transposed;

use super::{Spec, Wants};
use crate::ops::loops::convert::Element;
use crate::ops::loops::element::{FromInput, Mask, NoMask};
use crate::ops::loops::{Params, PLANE};
use crate::ops::Activation;
use affine::{ByPlane, ByValue};

/// Input of [`forward`]. `x` is contiguous.
pub(crate) struct Forward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub params: &'a Params,
}

/// Input of [`backward`]. All tensors are contiguous, `dy` like `x`.
pub(crate) struct Backward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub dy: &'a [T],
    pub params: &'a Params,
    /// Mean and variance of the forward pass, `[2, rows]`.
    pub saved: &'a [f64],
    pub wants: Wants,
}

/// The gradients that were asked for; `dparams` is `[2, c]`: of the weight, then of the bias.
pub(crate) struct Grads<T> {
    pub dx: Option<Vec<T>>,
    pub dparams: Option<Vec<f64>>,
}

/// The output, like `x`, and the mean and the (biased) variance of each row, `[2, rows]`.
pub(crate) fn forward<T: Element>(job: &Forward<T>) -> (Vec<T>, Vec<f64>) {
    let rows = job.spec.rows;
    match (job.spec.channels_last, rows.s >= PLANE) {
        (true, _) => transposed::forward(job, &ByPlane::new(job.params, rows.s)),
        (false, true) => forward::forward(job, &ByPlane::new(job.params, rows.s)),
        (false, false) => forward::forward(job, &ByValue::new(job.params, rows.s)),
    }
}

/// The gradients of [`forward`].
pub(crate) fn backward<T: Element>(job: &Backward<T>) -> Grads<T> {
    match job.spec.activation {
        Activation::Identity => backward_masked::<_, NoMask>(job),
        Activation::Relu => backward_masked::<_, FromInput>(job),
    }
}

fn backward_masked<T: Element, M: Mask<T>>(job: &Backward<T>) -> Grads<T> {
    let rows = job.spec.rows;
    match (job.spec.channels_last, rows.s >= PLANE) {
        (true, _) => transposed::backward::<T, M>(job, &ByPlane::new(job.params, rows.s)),
        (false, true) => backward::planes::<T, M>(job, &ByPlane::new(job.params, rows.s)),
        (false, false) => backward::values::<T, M>(job, &ByValue::new(job.params, rows.s)),
    }
}
