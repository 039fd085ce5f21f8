//! What happens to one value: normalised, masked, its gradient.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::convert::{Element, Real};
use super::prefetch::Ahead;
use super::stores::Stores;
use crate::ops::Activation;

/// How a channel is normalised: `y = ((x - hi) - lo)·scale + shift`.
///
/// `hi + lo` is the mean as two numbers, so that `x - mean` is right to the last bit of the
/// dtype however far the mean is from zero; `scale = weight·rstd` and `shift = bias`.
#[derive(Clone, Copy)]
pub(crate) struct Channel<A> {
    pub hi: A,
    pub lo: A,
    pub scale: A,
    pub shift: A,
}

/// `hi` and `lo` of a mean.
#[inline(always)]
pub(crate) fn in_two<A: Real>(mean: f64) -> (A, A) {
    let hi = A::from_f64(mean);
    (hi, A::from_f64(mean - hi.to_f64()))
}

impl<A: Real> Channel<A> {
    pub fn new(mean: f64, rstd: f64, weight: f64, bias: f64) -> Self {
        let (hi, lo) = in_two(mean);
        Self {
            hi,
            lo,
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
#[derive(Clone, Copy, Default)]
pub(crate) struct ChannelGrad<A> {
    pub mean_g: A,
    pub slope: A,
}

impl<A: Real> ChannelGrad<A> {
    /// From the sums over `m` values: the gradients of weight and bias, `rstd·Σ(g·(x - mean))` and `Σg`.
    #[inline(always)]
    pub fn new(rstd: f64, dweight: f64, dbias: f64, m: f64, remove_mean: bool) -> Self {
        Self {
            mean_g: A::from_f64(if remove_mean { dbias / m } else { 0.0 }),
            slope: A::from_f64(rstd * dweight / m),
        }
    }

    #[inline(always)]
    pub fn dx(&self, channel: &Channel<A>, x: A, g: A) -> A {
        channel.scale * (g - self.mean_g - channel.centre(x) * self.slope)
    }
}

/// What belongs to the channel of each value of a slice: the same for a plane, one each for a row.
pub(crate) trait Channels<C>: Copy {
    /// Those of a part of the values: with this before a loop, the compiler knows their number.
    fn part(self, range: Range<usize>) -> Self;
    fn at(&self, index: usize) -> C;
}

/// A plane: all of its values belong to one channel.
#[derive(Clone, Copy)]
pub(crate) struct Same<C>(pub C);

impl<C: Copy> Channels<C> for Same<C> {
    #[inline(always)]
    fn part(self, _range: Range<usize>) -> Self {
        self
    }

    #[inline(always)]
    fn at(&self, _index: usize) -> C {
        self.0
    }
}

/// The rectifier, which lets NaN through: a NaN in is a NaN out, as in PyTorch.
#[inline(always)]
pub(crate) fn relu<A: Real>(v: A) -> A {
    if v < A::ZERO {
        A::ZERO
    } else {
        v
    }
}

/// Writes `y` for one slice: `activation(normalise(x) + residual)`.
#[inline(always)]
pub(crate) fn write_y<T: Element>(
    y: &mut [MaybeUninit<T>],
    stores: &Stores,
    x: &[T],
    residual: Option<&[T]>,
    channels: impl Channels<Channel<T::Real>>,
    activation: Activation,
) {
    let [mut x_room, mut r_room, mut y_room] = [T::ROOM; 3];
    // SAFETY: `store` writes all that it is given.
    unsafe {
        stores.write(
            y,
            #[inline(always)]
            |range, y| {
                let channels = channels.part(range.clone());
                let x = &x[range.clone()];
                if let Some(ahead) = stores.ahead() {
                    ahead.of(x);
                }
                let x = T::load(x, &mut x_room);
                let normalise = |i| channels.at(i).normalise(x(i));
                let residual = residual.map(|residual| T::load(&residual[range], &mut r_room));
                // One loop per case, so that each of them vectorises.
                match (residual, activation) {
                    (None, Activation::Identity) => T::store(y, &mut y_room, normalise),
                    (None, Activation::Relu) => T::store(y, &mut y_room, |i| relu(normalise(i))),
                    (Some(r), Activation::Identity) => {
                        T::store(y, &mut y_room, |i| normalise(i) + r(i));
                    }
                    (Some(r), Activation::Relu) => {
                        T::store(y, &mut y_room, |i| relu(normalise(i) + r(i)));
                    }
                }
            },
        )
    }
}

/// `dy` behind the activation, `g`: zero where the ReLU cut off.
pub(crate) trait Mask<T: Element>: Copy + Send + Sync {
    /// Whether it is read from `y`, which otherwise is not asked for.
    const READS_Y: bool;
    fn g(x: T::Real, dy: T::Real, y: impl Fn() -> T::Real, channel: &Channel<T::Real>) -> T::Real;
}

/// No activation.
#[derive(Clone, Copy)]
pub(crate) struct NoMask;

/// The mask computed from `x` in the steps of the forward pass, down to the rounding to the dtype.
#[derive(Clone, Copy)]
pub(crate) struct FromInput;

/// The mask read from `y`: where a residual took part in it.
#[derive(Clone, Copy)]
pub(crate) struct FromOutput;

impl<T: Element> Mask<T> for NoMask {
    const READS_Y: bool = false;
    #[inline(always)]
    fn g(_: T::Real, dy: T::Real, _: impl Fn() -> T::Real, _: &Channel<T::Real>) -> T::Real {
        dy
    }
}

impl<T: Element> Mask<T> for FromInput {
    const READS_Y: bool = false;
    #[inline(always)]
    fn g(x: T::Real, dy: T::Real, _: impl Fn() -> T::Real, channel: &Channel<T::Real>) -> T::Real {
        cut(channel.normalise(x), T::ROUNDS_TO_ZERO, dy)
    }
}

impl<T: Element> Mask<T> for FromOutput {
    const READS_Y: bool = true;
    #[inline(always)]
    fn g(_: T::Real, dy: T::Real, y: impl Fn() -> T::Real, _: &Channel<T::Real>) -> T::Real {
        cut(y(), T::Real::ZERO, dy)
    }
}

/// `dy` unless `y <= zero`: a NaN in `y` lets the gradient through, as in PyTorch.
#[inline(always)]
pub(crate) fn cut<V: PartialOrd + Default>(y: V, zero: V, dy: V) -> V {
    if y <= zero {
        V::default()
    } else {
        dy
    }
}

/// One slice of the tensors that the backward pass reads, all of the same length.
#[derive(Clone, Copy)]
pub(crate) struct Slice<'a, T> {
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

    /// Asks for what lies behind the values that are read for `g`.
    #[inline(always)]
    pub fn prefetch<M: Mask<T>>(&self, ahead: Ahead) {
        ahead.of(self.x);
        ahead.of(self.dy);
        if M::READS_Y {
            ahead.of(self.y);
        }
    }

    /// `x` and `g` of a chunk, by index and channel.
    #[inline(always)]
    pub fn load<'b, M: Mask<T>>(
        &self,
        [x_room, dy_room, y_room]: &'b mut [T::Room; 3],
    ) -> impl Fn(usize, &Channel<T::Real>) -> (T::Real, T::Real) + 'b
    where
        'a: 'b,
    {
        let (x, dy) = (T::load(self.x, x_room), T::load(self.dy, dy_room));
        let y = T::load(if M::READS_Y { self.y } else { &[] }, y_room);
        #[inline(always)]
        move |i, channel| {
            let x = x(i);
            (x, M::g(x, dy(i), || y(i), channel))
        }
    }

    /// Writes `value(x, g, channel, grad)` for every value of the slice.
    #[inline(always)]
    pub fn write<M: Mask<T>, G>(
        &self,
        out: &mut [MaybeUninit<T>],
        stores: &Stores,
        channels: impl Channels<Channel<T::Real>>,
        grads: impl Channels<G>,
        value: impl Fn(T::Real, T::Real, &Channel<T::Real>, G) -> T::Real,
    ) {
        let (mut rooms, mut out_room) = ([T::ROOM; 3], T::ROOM);
        // SAFETY: `store` writes all that it is given.
        unsafe {
            stores.write(
                out,
                #[inline(always)]
                |range, out| {
                    let (channels, grads) =
                        (channels.part(range.clone()), grads.part(range.clone()));
                    let values = self.part(range);
                    if let Some(ahead) = stores.ahead() {
                        values.prefetch::<M>(ahead);
                    }
                    let load = values.load::<M>(&mut rooms);
                    T::store(
                        out,
                        &mut out_room,
                        #[inline(always)]
                        |i| {
                            let channel = channels.at(i);
                            let (x, g) = load(i, &channel);
                            value(x, g, &channel, grads.at(i))
                        },
                    );
                },
            )
        }
    }

    /// Writes the gradient of the slice of the input, in training.
    #[inline(always)]
    pub fn write_dx_training<M: Mask<T>>(
        &self,
        dx: &mut [MaybeUninit<T>],
        stores: &Stores,
        channels: impl Channels<Channel<T::Real>>,
        grads: impl Channels<ChannelGrad<T::Real>>,
    ) {
        self.write::<M, _>(dx, stores, channels, grads, |x, g, channel, grad| {
            grad.dx(channel, x, g)
        });
    }

    /// Writes the gradient of the slice of the input where the statistics were given: `scale·g`.
    #[inline(always)]
    pub fn write_dx_given<M: Mask<T>>(
        &self,
        dx: &mut [MaybeUninit<T>],
        stores: &Stores,
        channels: impl Channels<Channel<T::Real>>,
    ) {
        self.write::<M, _>(dx, stores, channels, Same(()), |_, g, channel, ()| {
            channel.scale * g
        });
    }

    /// Writes `g`, the gradient of the slice of the residual.
    #[inline(always)]
    pub fn write_g<M: Mask<T>>(
        &self,
        out: &mut [MaybeUninit<T>],
        stores: &Stores,
        channels: impl Channels<Channel<T::Real>>,
    ) {
        self.write::<M, _>(out, stores, channels, Same(()), |_, g, _, ()| g);
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// Something else for each index.
    #[derive(Clone, Copy)]
    struct ByIndex<F> {
        start: usize,
        f: F,
    }

    impl<C, F: Fn(usize) -> C + Copy> Channels<C> for ByIndex<F> {
        fn part(self, range: Range<usize>) -> Self {
            let start = self.start + range.start;
            Self { start, ..self }
        }

        fn at(&self, index: usize) -> C {
            (self.f)(self.start + index)
        }
    }

    fn written(len: usize, write: impl FnOnce(&mut [MaybeUninit<f16>])) -> Vec<f16> {
        let mut out = vec![MaybeUninit::new(f16::PI); len];
        write(&mut out);
        // SAFETY: they were initialised above.
        out.iter().map(|out| unsafe { out.assume_init() }).collect()
    }

    /// Values in half precision are converted in chunks, of which nothing may be seen.
    #[test]
    fn slices_of_any_length_are_their_values_one_by_one() {
        let values = |step: usize, len: usize| -> Vec<_> {
            let value = |i: usize| f16::from_f32((i * step % 83) as f32 / 16.0 - 2.5);
            (0..len).map(value).collect()
        };
        let channel = |i: usize| Channel::<f32>::new(0.1 * (i % 7) as f64, 1.5, 0.7, 0.3);
        let grad = |i: usize| ChannelGrad {
            mean_g: 0.01 * i as f32,
            slope: 0.03,
        };
        let channels = ByIndex {
            start: 0,
            f: channel,
        };
        let grads = ByIndex { start: 0, f: grad };
        let lens = [0, 1, 100, f16::CHUNK, f16::CHUNK + 1, 3 * f16::CHUNK + 19];
        let lens = lens
            .into_iter()
            .flat_map(|len| [0, 1 << 30].map(|numel| (len, numel)));
        for (len, numel) in lens {
            // Streamed or not.
            let written = |write: &dyn Fn(&mut [MaybeUninit<f16>], &Stores)| {
                written(len, |out| {
                    Stores::far_apart::<f16, _>(numel, numel, None, |stores| write(out, stores));
                })
            };
            let (x, dy, y) = (values(37, len), values(29, len), values(53, len));
            let one_by_one = |f: &dyn Fn(usize, [f32; 3]) -> f32| -> Vec<_> {
                let value = |i: usize| f(i, [&x, &dy, &y].map(|of| of[i].to_f32()));
                (0..len).map(|i| f16::from_f32(value(i))).collect()
            };
            for (activation, residual) in [
                (Activation::Identity, false),
                (Activation::Identity, true),
                (Activation::Relu, false),
                (Activation::Relu, true),
            ] {
                let r = residual.then_some(&dy[..]);
                let ours =
                    written(&|out, stores| write_y(out, stores, &x, r, channels, activation));
                let truth = one_by_one(&|i, [x, r, _]| {
                    let y = channel(i).normalise(x);
                    let y = if residual { y + r } else { y };
                    match activation {
                        Activation::Identity => y,
                        Activation::Relu => y.max(0.0),
                    }
                });
                assert_eq!(ours, truth, "{activation:?}, {residual}, {len}");
            }
            let slice = Slice {
                x: &x,
                dy: &dy,
                y: &y,
            };
            let ours = written(&|dx, stores| {
                slice.write_dx_training::<FromOutput>(dx, stores, channels, grads);
            });
            let truth = one_by_one(&|i, [x, dy, y]| {
                grad(i).dx(&channel(i), x, if y > 0.0 { dy } else { 0.0 })
            });
            assert_eq!(ours, truth, "{len}");
            let ours = written(&|g, stores| slice.write_g::<FromInput>(g, stores, channels));
            let truth = one_by_one(&|i, [x, dy, _]| {
                let y = f16::from_f32(channel(i).normalise(x));
                if y > f16::ZERO {
                    dy
                } else {
                    0.0
                }
            });
            assert_eq!(ours, truth, "{len}");
        }
    }
}
