//! Max pooling behind the normalisation, plane by plane in the order of memory: what lies between the two is never
//! stored, but computed again from the input.

use std::mem::MaybeUninit;

use super::in_order::{channels, grads};
use super::{statistics, Backward, Forward, Grads, Normalised, Spec};
use crate::ops::batch_norm::Activation;
use crate::ops::loops::convert::{Element, Real};
use crate::ops::loops::element::{cut, relu, Channel};
use crate::ops::max_pool2d::cpu::for_planes;
use crate::ops::max_pool2d::windows::Windows;
use crate::ops::output::Output;
use crate::ops::slices::vectorised;
use crate::shape::Dims;

/// The forward pass, with given statistics or with those of `x`.
pub(super) fn forward<T: Element>(job: &Forward<T>, windows: &Windows) -> Normalised<T> {
    assert!(job.residual.is_none(), "no pooling behind a residual");
    let (spec, x) = (job.spec, job.x);
    let stats = match &job.given {
        Some([mean, var]) => [mean.as_slice(), var].concat(),
        None => statistics(spec, x),
    };
    let channels = channels::<T::Real>(spec, job.params, &stats);
    let (inputs, outputs) = (windows.inputs(), windows.outputs());
    let mut y = Output::new(spec.outputs());
    let mut maxima = job.keeps_maxima.then(|| Output::new(spec.outputs()));
    let (y_parts, maxima_parts) = (y.parts(), maxima.as_mut().map(Output::parts));
    for_planes(windows, x.len(), |planes| {
        vectorised(
            #[inline(always)]
            || {
                let mut pooling = Pooling::<T>::new(windows, spec.activation);
                for plane in planes {
                    let channel = channels[plane % spec.dims.c];
                    let windows = plane * outputs..(plane + 1) * outputs;
                    // SAFETY: each plane is one task's, and so are its windows.
                    let y = unsafe { y_parts.part(windows.clone()) };
                    // SAFETY: as above.
                    let maxima = maxima_parts.map(|maxima| unsafe { maxima.part(windows) });
                    pooling.write_y(channel, &x[plane * inputs..], y, maxima);
                }
            },
        )
    });
    // SAFETY: the windows of all planes make up the output.
    unsafe {
        Normalised {
            y: y.finish(),
            stats,
            maxima: maxima.map(|maxima| maxima.finish()),
        }
    }
}

/// The backward pass.
pub(super) fn backward<T: Element>(job: &Backward<T>, windows: &Windows) -> Grads<T> {
    let (spec, wants, c) = (job.spec, job.wants, job.spec.dims.c);
    assert!(!wants.dresidual, "no pooling behind a residual");
    let dparams = (wants.sums(spec)).then(|| param_grads(job, windows));
    let sums = dparams.as_ref().filter(|_| spec.training);
    let grads = sums.map(|sums| grads::<T::Real>(spec, job.saved, sums));
    let channels = channels::<T::Real>(spec, job.params, job.saved);
    let (inputs, outputs) = (windows.inputs(), windows.outputs());
    let mut dx = wants.dx.then(|| Output::new(job.x.len()));
    if let Some(parts) = dx.as_mut().map(Output::parts) {
        for_planes(windows, job.x.len(), |planes| {
            vectorised(
                #[inline(always)]
                || {
                    let mut pooling = Pooling::<T>::new(windows, spec.activation);
                    for plane in planes {
                        let channel = channels[plane % c];
                        let pixels = plane * inputs..(plane + 1) * inputs;
                        let (x, dy) = (&job.x[pixels.start..], &job.dy[plane * outputs..]);
                        // SAFETY: each plane is one task's.
                        let dx = unsafe { parts.part(pixels) };
                        match grads.as_ref().map(|grads| grads[plane % c]) {
                            Some(grad) => {
                                pooling
                                    .write_dx(channel, x, dy, dx, |x, g| grad.dx(&channel, x, g));
                            }
                            // Nothing flows through given statistics.
                            None => pooling.write_dx(channel, x, dy, dx, |_, g| channel.scale * g),
                        }
                    }
                },
            )
        });
    }
    Grads {
        // SAFETY: every plane has been written.
        dx: dx.map(|dx| unsafe { dx.finish() }),
        dparams: dparams.filter(|_| wants.dparams),
        dresidual: None,
    }
}

/// The gradients of weight and bias: sums over the maxima, for all other pixels have a gradient of 0. (With given
/// statistics and an infinite one among them, two ops have a NaN in the sums, `0·∞`, which is left out here.)
fn param_grads<T: Element>(job: &Backward<T>, windows: &Windows) -> Vec<f64> {
    let s = windows.outputs();
    let spec = Spec {
        dims: Dims { s, ..job.spec.dims },
        windows: None,
        ..*job.spec
    };
    super::param_grads(&Backward {
        spec: &spec,
        x: job.maxima.expect("the maxima of a pooled output"),
        maxima: None,
        ..*job
    })
}

/// Batch norm, an activation and a maximum over windows, of one plane after the other.
struct Pooling<'a, T: Element> {
    windows: &'a Windows,
    activation: Activation,
    x: Vec<T::Real>,
    dy: Vec<T::Real>,
    to: [Vec<MaybeUninit<T::Real>>; 2],
}

impl<'a, T: Element> Pooling<'a, T> {
    fn new(windows: &'a Windows, activation: Activation) -> Self {
        Self {
            windows,
            activation,
            x: Vec::new(),
            dy: Vec::new(),
            to: [Vec::new(), Vec::new()],
        }
    }

    /// Writes the output of the plane that `x` begins with, and the pixels that it comes from.
    #[inline(always)]
    fn write_y(
        &mut self,
        channel: Channel<T::Real>,
        x: &[T],
        y: &mut [MaybeUninit<T>],
        maxima: Option<&mut [MaybeUninit<T>]>,
    ) {
        let x = T::reals(x, self.windows.inputs(), &mut self.x);
        let [y_room, maxima_room] = &mut self.to;
        let (windows, activation, value) = (self.windows, self.activation, value::<T>(channel));
        // SAFETY: `write_maxima` writes all that it is given, and so does `write_reals` of the maxima within.
        unsafe {
            T::write_reals(
                y,
                y_room,
                #[inline(always)]
                |y| match maxima {
                    None => write_maxima(windows, activation, x, y, None, value),
                    Some(maxima) => T::write_reals(
                        maxima,
                        maxima_room,
                        #[inline(always)]
                        |maxima| write_maxima(windows, activation, x, y, Some(maxima), value),
                    ),
                },
            )
        }
    }

    /// Writes `gradient(x, g)` for the plane that `x` begins with, where `dy` begins with that of its windows.
    #[inline(always)]
    fn write_dx(
        &mut self,
        channel: Channel<T::Real>,
        x: &[T],
        dy: &[T],
        dx: &mut [MaybeUninit<T>],
        gradient: impl Fn(T::Real, T::Real) -> T::Real,
    ) {
        let windows = self.windows;
        let x = T::reals(x, windows.inputs(), &mut self.x);
        let dy = T::reals(dy, windows.outputs(), &mut self.dy);
        let (activation, [to, _]) = (self.activation, &mut self.to);
        // SAFETY: `Windows::backward` writes every value.
        unsafe {
            T::write_reals(
                dx,
                to,
                #[inline(always)]
                |dx| match activation {
                    Activation::Identity => {
                        windows.backward(x, dy, dx, value::<T>(channel), |_, dy| dy, gradient);
                    }
                    Activation::Relu => {
                        windows.backward(x, dy, dx, value::<T>(channel), mask, gradient);
                    }
                },
            )
        }
    }
}

#[inline(always)]
fn write_maxima<A: Real>(
    windows: &Windows,
    activation: Activation,
    x: &[A],
    y: &mut [MaybeUninit<A>],
    maxima: Option<&mut [MaybeUninit<A>]>,
    value: impl Fn(A) -> A,
) {
    match activation {
        Activation::Identity => windows.forward(x, y, maxima, value, |y| y),
        // Of the maximum it is the maximum of the ReLUs.
        Activation::Relu => windows.forward(x, y, maxima, value, relu),
    }
}

/// The output before the activation, which is looked at for the maxima.
#[inline(always)]
fn value<T: Element>(channel: Channel<T::Real>) -> impl Fn(T::Real) -> T::Real {
    #[inline(always)]
    move |x| T::round(channel.normalise(x))
}

#[inline(always)]
fn mask<A: Real>(y: A, dy: A) -> A {
    cut(y, A::ZERO, dy)
}
