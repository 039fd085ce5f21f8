//! Max pooling behind the normalisation, plane by plane: what lies between the two is never stored, but
//! computed again from the input.

use std::mem::MaybeUninit;
use std::ops::Range;

use crate::ops::batch_norm::Activation;
use crate::ops::loops::convert::{Element, Real};
use crate::ops::loops::element::{cut, relu, Channel};
use crate::ops::max_pool2d::windows::Windows;

/// The windows of a plane among those of all planes.
pub(super) fn windows_of(windows: &Windows, plane: &Range<usize>) -> Range<usize> {
    let start = plane.start / windows.inputs() * windows.outputs();
    start..start + windows.outputs()
}

/// Batch norm, an activation and a maximum over windows, of the planes of one channel.
pub(super) struct Pooling<'a, T: Element> {
    pub windows: &'a Windows,
    activation: Activation,
    channel: Channel<T::Real>,
    x: Vec<T::Real>,
    dy: Vec<T::Real>,
    to: [Vec<MaybeUninit<T::Real>>; 2],
}

impl<'a, T: Element> Pooling<'a, T> {
    pub fn new(windows: &'a Windows, activation: Activation, channel: Channel<T::Real>) -> Self {
        Self {
            windows,
            activation,
            channel,
            x: Vec::new(),
            dy: Vec::new(),
            to: [Vec::new(), Vec::new()],
        }
    }

    /// Writes the output of the plane that `x` begins with, and the pixels that it comes from.
    #[inline(always)]
    pub fn write_y(
        &mut self,
        x: &[T],
        y: &mut [MaybeUninit<T>],
        maxima: Option<&mut [MaybeUninit<T>]>,
    ) {
        let x = T::reals(x, self.windows.inputs(), &mut self.x);
        let [y_room, maxima_room] = &mut self.to;
        let (windows, activation, value) =
            (self.windows, self.activation, value::<T>(self.channel));
        // SAFETY: `forward` writes all that it is given, and so does `write_reals` of the maxima within.
        unsafe {
            T::write_reals(
                y,
                y_room,
                #[inline(always)]
                |y| match maxima {
                    None => forward(windows, activation, x, y, None, value),
                    Some(maxima) => T::write_reals(
                        maxima,
                        maxima_room,
                        #[inline(always)]
                        |maxima| forward(windows, activation, x, y, Some(maxima), value),
                    ),
                },
            )
        }
    }

    /// Writes `gradient(x, g)` for the plane that `x` begins with, where `dy` begins with that of its windows.
    #[inline(always)]
    pub fn write_dx(
        &mut self,
        x: &[T],
        dy: &[T],
        dx: &mut [MaybeUninit<T>],
        gradient: impl Fn(T::Real, T::Real) -> T::Real,
    ) {
        let (windows, channel) = (self.windows, self.channel);
        let x = T::reals(x, windows.inputs(), &mut self.x);
        let dy = T::reals(dy, windows.outputs(), &mut self.dy);
        let (activation, [to, _]) = (self.activation, &mut self.to);
        // SAFETY: `backward` writes every value.
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
fn forward<A: Real>(
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
