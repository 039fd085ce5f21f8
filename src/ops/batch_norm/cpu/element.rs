//! What happens to one value, in each dtype: the only place with the formulas.

use std::mem::MaybeUninit;
use std::ops::Range;

use half::{bf16, f16};

use crate::ops::batch_norm::Activation;

/// A value of a tensor. Half precision is computed in `f32`, and sums are always in `f64`.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    type Real: Real;
    fn to_real(self) -> Self::Real;
    fn from_real(real: Self::Real) -> Self;
    fn to_f64(self) -> f64;
}

/// `f32` and `f64`, in which values are computed.
pub(crate) trait Real:
    Copy
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
{
    const ZERO: Self;
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
        }
    };
}

macro_rules! element {
    ($t:ty, $real:ty, $from:expr) => {
        impl Element for $t {
            type Real = $real;
            #[inline(always)]
            fn to_real(self) -> $real {
                self.into()
            }
            #[inline(always)]
            fn from_real(real: $real) -> Self {
                $from(real)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self.into()
            }
        }
    };
}

real!(f32);
real!(f64);
element!(f32, f32, |real| real);
element!(f64, f64, |real| real);
element!(f16, f32, f16::from_f32);
element!(bf16, f32, bf16::from_f32);

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

/// The channel of each value of a slice: the same for a plane, one each for a row of columns.
pub(super) trait Channels<C>: Copy {
    fn at(&self, index: usize) -> C;
}

/// A plane: all of its values belong to one channel.
#[derive(Clone, Copy)]
pub(super) struct Same<C>(pub C);

impl<C: Copy> Channels<C> for Same<C> {
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
    for (i, (out, &a)) in out.iter_mut().zip(a).enumerate() {
        out.write(T::from_real(f(i, a)));
    }
}

#[inline(always)]
fn map2<T: Element>(
    out: &mut [MaybeUninit<T>],
    a: &[T],
    b: &[T],
    f: impl Fn(usize, T, T) -> T::Real,
) {
    for (i, ((out, &a), &b)) in out.iter_mut().zip(a).zip(b).enumerate() {
        out.write(T::from_real(f(i, a, b)));
    }
}

/// `dy` behind the activation, `g`, for the values of one slice: zero where the ReLU cut off.
///
/// Where the residual took part in the output, the mask is read from `y`; else it is computed
/// from `x` in the same steps as in the forward pass, down to the rounding to the dtype.
pub(super) trait Mask<T: Element>: Copy + Sync {
    /// The mask of a slice, from that of the whole tensor.
    fn slice(self, range: Range<usize>) -> Self;
    fn g(&self, i: usize, x: T, dy: T, channel: &Channel<T::Real>) -> T;
}

/// No activation.
#[derive(Clone, Copy)]
pub(super) struct NoMask;

#[derive(Clone, Copy)]
pub(super) struct FromInput;

#[derive(Clone, Copy)]
pub(super) struct FromOutput<'a, T>(pub &'a [T]);

impl<T: Element> Mask<T> for NoMask {
    #[inline(always)]
    fn slice(self, _: Range<usize>) -> Self {
        self
    }

    #[inline(always)]
    fn g(&self, _: usize, _: T, dy: T, _: &Channel<T::Real>) -> T {
        dy
    }
}

impl<T: Element> Mask<T> for FromInput {
    #[inline(always)]
    fn slice(self, _: Range<usize>) -> Self {
        self
    }

    #[inline(always)]
    fn g(&self, _: usize, x: T, dy: T, channel: &Channel<T::Real>) -> T {
        cut(T::from_real(channel.normalise(x.to_real())), dy)
    }
}

impl<T: Element> Mask<T> for FromOutput<'_, T> {
    #[inline(always)]
    fn slice(self, range: Range<usize>) -> Self {
        Self(&self.0[range])
    }

    #[inline(always)]
    fn g(&self, i: usize, _: T, dy: T, _: &Channel<T::Real>) -> T {
        cut(self.0[i], dy)
    }
}

/// `dy` unless `y <= 0`: a NaN in `y` lets the gradient through, as in PyTorch.
#[inline(always)]
fn cut<T: Element>(y: T, dy: T) -> T {
    if y.to_real() <= T::Real::ZERO {
        T::from_real(T::Real::ZERO)
    } else {
        dy
    }
}

/// One slice of the tensors that the backward pass reads.
#[derive(Clone, Copy)]
pub(super) struct Slice<'a, T, M> {
    pub x: &'a [T],
    pub dy: &'a [T],
    pub mask: M,
}

impl<T: Element, M: Mask<T>> Slice<'_, T, M> {
    /// Writes `value(index, x, g, channel)` for every value of the slice.
    #[inline(always)]
    pub fn write(
        &self,
        out: &mut [MaybeUninit<T>],
        channels: impl Channels<Channel<T::Real>>,
        value: impl Fn(usize, T, T, &Channel<T::Real>) -> T,
    ) {
        for (i, ((out, &x), &dy)) in out.iter_mut().zip(self.x).zip(self.dy).enumerate() {
            let channel = channels.at(i);
            let g = self.mask.g(i, x, dy, &channel);
            out.write(value(i, x, g, &channel));
        }
    }

    /// Writes the gradient of the slice of the input, in training.
    #[inline(always)]
    pub fn write_dx_training(
        &self,
        dx: &mut [MaybeUninit<T>],
        channels: impl Channels<Channel<T::Real>>,
        grads: impl Channels<ChannelGrad<T::Real>>,
    ) {
        self.write(dx, channels, |i, x, g, channel| {
            T::from_real(grads.at(i).dx(channel, x.to_real(), g.to_real()))
        });
    }

    /// Writes the gradient of the slice of the input where the statistics were given: `scale·g`.
    #[inline(always)]
    pub fn write_dx_given(
        &self,
        dx: &mut [MaybeUninit<T>],
        channels: impl Channels<Channel<T::Real>>,
    ) {
        self.write(dx, channels, |_, _, g, channel| {
            T::from_real(channel.scale * g.to_real())
        });
    }

    /// Writes `g`, the gradient of the slice of the residual.
    #[inline(always)]
    pub fn write_g(&self, out: &mut [MaybeUninit<T>], channels: impl Channels<Channel<T::Real>>) {
        self.write(out, channels, |_, _, g, _| g);
    }
}
