//! What happens to one value: normalised, masked, its gradient.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::convert::{Element, Real};
use crate::ops::batch_norm::Activation;

/// How a channel is normalised: `y = ((x - hi) - lo)·scale + shift`.
///
/// `hi + lo` is the mean as two numbers, so that `x - mean` is right to the last bit of the
/// dtype however far the mean is from zero; `scale = weight·rstd` and `shift = bias`.
#[derive(Clone, Copy)]
pub(super) struct Channel<A> {
    pub hi: A,
    pub lo: A,
    pub scale: A,
    pub shift: A,
}

impl<A: Real> Channel<A> {
    pub fn new(mean: f64, rstd: f64, weight: f64, bias: f64) -> Self {
        let hi = A::from_f64(mean);
        Self {
            hi,
            lo: A::from_f64(mean - hi.to_f64()),
            scale: A::from_f64(weight * rstd),
            shift: A::from_f64(bias),
        }
    }

    /// `x - mean`
    #[inline(always)]
    pub fn centre(&self, x: A) -> A {
        (x - self.hi) - self.lo
    }

    /// The output before activation and residual.
    #[inline(always)]
    pub fn normalise(&self, x: A) -> A {
        self.centre(x) * self.scale + self.shift
    }
}

/// What a channel needs for `dx = scale·(g - mean_g - (x - mean)·slope)`, where `g` is the masked
/// `dy`, `mean_g = Σg / m` and `slope = rstd²·Σ(g·(x - mean)) / m`.
#[derive(Clone, Copy)]
pub(super) struct ChannelGrad<A> {
    pub mean_g: A,
    pub slope: A,
}

impl<A: Real> ChannelGrad<A> {
    #[inline(always)]
    pub fn dx(&self, channel: &Channel<A>, x: A, g: A) -> A {
        channel.scale * (g - self.mean_g - channel.centre(x) * self.slope)
    }
}

/// What belongs to the channel of each value of a slice: the same for a plane, one each for a row.
pub(super) trait Channels<C>: Copy {
    /// Those of the first `len` values: with this before a loop, the compiler knows their number.
    fn first(self, len: usize) -> Self;
    fn at(&self, index: usize) -> C;
}

/// A plane: all of its values belong to one channel.
#[derive(Clone, Copy)]
pub(super) struct Same<C>(pub C);

impl<C: Copy> Channels<C> for Same<C> {
    #[inline(always)]
    fn first(self, _len: usize) -> Self {
        self
    }

    #[inline(always)]
    fn at(&self, _index: usize) -> C {
        self.0
    }
}

/// The rectifier, which lets NaN through: a NaN in is a NaN out, as in PyTorch.
#[inline(always)]
fn relu<A: Real>(v: A) -> A {
    if v < A::ZERO {
        A::ZERO
    } else {
        v
    }
}

/// Writes `y` for one slice: `activation(normalise(x) + residual)`.
#[inline(always)]
pub(super) fn write_y<T: Element>(
    y: &mut [MaybeUninit<T>],
    x: &[T],
    residual: Option<&[T]>,
    channels: impl Channels<Channel<T::Real>>,
    activation: Activation,
) {
    let channels = channels.first(y.len());
    // One loop per case, so that each of them vectorises.
    let normalise = |i: usize, x: T| channels.at(i).normalise(x.to_real());
    match (residual, activation) {
        (None, Activation::Identity) => map1(y, x, normalise),
        (None, Activation::Relu) => map1(y, x, |i, x| relu(normalise(i, x))),
        (Some(residual), Activation::Identity) => {
            map2(y, x, residual, |i, x, r| normalise(i, x) + r.to_real())
        }
        (Some(residual), Activation::Relu) => map2(y, x, residual, |i, x, r| {
            relu(normalise(i, x) + r.to_real())
        }),
    }
}

#[inline(always)]
fn map1<T: Element>(out: &mut [MaybeUninit<T>], a: &[T], f: impl Fn(usize, T) -> T::Real) {
    let a = &a[..out.len()];
    for (i, out) in out.iter_mut().enumerate() {
        out.write(T::from_real(f(i, a[i])));
    }
}

#[inline(always)]
fn map2<T: Element>(
    out: &mut [MaybeUninit<T>],
    a: &[T],
    b: &[T],
    f: impl Fn(usize, T, T) -> T::Real,
) {
    let (a, b) = (&a[..out.len()], &b[..out.len()]);
    for (i, out) in out.iter_mut().enumerate() {
        out.write(T::from_real(f(i, a[i], b[i])));
    }
}

/// `dy` behind the activation, `g`: zero where the ReLU cut off.
pub(super) trait Mask<T: Element>: Copy + Send + Sync {
    fn g(x: T, dy: T, y: T, channel: &Channel<T::Real>) -> T::Real;
}

/// No activation.
#[derive(Clone, Copy)]
pub(super) struct NoMask;

/// The mask computed from `x` in the steps of the forward pass, down to the rounding to the dtype.
#[derive(Clone, Copy)]
pub(super) struct FromInput;

/// The mask read from `y`: where a residual took part in it.
#[derive(Clone, Copy)]
pub(super) struct FromOutput;

impl<T: Element> Mask<T> for NoMask {
    #[inline(always)]
    fn g(_: T, dy: T, _: T, _: &Channel<T::Real>) -> T::Real {
        dy.to_real()
    }
}

impl<T: Element> Mask<T> for FromInput {
    #[inline(always)]
    fn g(x: T, dy: T, _: T, channel: &Channel<T::Real>) -> T::Real {
        let y = channel.normalise(x.to_real());
        cut(y, T::ROUNDS_TO_ZERO, dy.to_real())
    }
}

impl<T: Element> Mask<T> for FromOutput {
    #[inline(always)]
    fn g(_: T, dy: T, y: T, _: &Channel<T::Real>) -> T::Real {
        cut(y.to_real(), T::Real::ZERO, dy.to_real())
    }
}

/// `dy` unless `y <= zero`: a NaN in `y` lets the gradient through, as in PyTorch.
#[inline(always)]
fn cut<A: Real>(y: A, zero: A, dy: A) -> A {
    if y <= zero {
        A::ZERO
    } else {
        dy
    }
}

/// One slice of the tensors that the backward pass reads, all of the same length.
#[derive(Clone, Copy)]
pub(super) struct Slice<'a, T> {
    pub x: &'a [T],
    pub dy: &'a [T],
    /// `x` again where no mask is read from the output.
    pub y: &'a [T],
}

impl<'a, T: Element> Slice<'a, T> {
    #[inline(always)]
    pub fn part(&self, range: Range<usize>) -> Slice<'a, T> {
        Slice {
            x: &self.x[range.clone()],
            dy: &self.dy[range.clone()],
            y: &self.y[range],
        }
    }

    /// Writes `value(index, x, g, channel)` for every value of the slice.
    #[inline(always)]
    fn write<M: Mask<T>>(
        &self,
        out: &mut [MaybeUninit<T>],
        channels: impl Channels<Channel<T::Real>>,
        value: impl Fn(usize, T, T::Real, &Channel<T::Real>) -> T,
    ) {
        let Slice { x, dy, y } = self.part(0..out.len());
        let channels = channels.first(out.len());
        for (i, out) in out.iter_mut().enumerate() {
            let channel = channels.at(i);
            let g = M::g(x[i], dy[i], y[i], &channel);
            out.write(value(i, x[i], g, &channel));
        }
    }

    /// Writes the gradient of the slice of the input, in training.
    #[inline(always)]
    pub fn write_dx_training<M: Mask<T>>(
        &self,
        dx: &mut [MaybeUninit<T>],
        channels: impl Channels<Channel<T::Real>>,
        grads: impl Channels<ChannelGrad<T::Real>>,
    ) {
        let grads = grads.first(dx.len());
        self.write::<M>(dx, channels, |i, x, g, channel| {
            T::from_real(grads.at(i).dx(channel, x.to_real(), g))
        });
    }

    /// Writes the gradient of the slice of the input where the statistics were given: `scale·g`.
    #[inline(always)]
    pub fn write_dx_given<M: Mask<T>>(
        &self,
        dx: &mut [MaybeUninit<T>],
        channels: impl Channels<Channel<T::Real>>,
    ) {
        self.write::<M>(dx, channels, |_, _, g, channel| {
            T::from_real(channel.scale * g)
        });
    }

    /// Writes `g`, the gradient of the slice of the residual.
    #[inline(always)]
    pub fn write_g<M: Mask<T>>(
        &self,
        out: &mut [MaybeUninit<T>],
        channels: impl Channels<Channel<T::Real>>,
    ) {
        self.write::<M>(out, channels, |_, _, g, _| T::from_real(g));
    }
}
