//! Max pooling behind the normalisation, plane by plane: what lies between the two is never stored as
//! a whole, but computed again from a plane of the input while that is in the cache.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::Backward;
use crate::ops::batch_norm::Activation;
use crate::ops::loops::convert::Element;
use crate::ops::loops::element::{cut, write_y, Channel, Channels, Slice};
use crate::ops::loops::prefetch::prefetch;
use crate::ops::max_pool2d::windows::Windows;
use crate::ops::output::{written, Parts};

/// The windows of a plane among those of all planes.
pub(super) fn outputs(windows: &Windows, plane: &Range<usize>) -> Range<usize> {
    let start = plane.start / windows.inputs() * windows.outputs();
    start..start + windows.outputs()
}

/// Room for a plane.
pub(super) struct Scratch<T>(Vec<MaybeUninit<T>>);

impl<T: Element> Scratch<T> {
    pub fn new() -> Self {
        Self(Vec::new())
    }

    fn room(&mut self, len: usize) -> &mut [MaybeUninit<T>] {
        self.0.resize_with(len, MaybeUninit::uninit);
        &mut self.0
    }

    /// The normalised and activated plane `x`.
    #[inline(always)]
    pub fn output(
        &mut self,
        x: &[T],
        channels: impl Channels<Channel<T::Real>>,
        activation: Activation,
    ) -> &[T] {
        let y = self.room(x.len());
        write_y(y, x, None, channels, activation);
        // SAFETY: `write_y` writes every value.
        unsafe { written(y) }
    }
}

/// The tensors that the backward pass reads, `dy` as it is before the pooling and the ReLU in front of that.
pub(super) struct Tensors<'a, T> {
    job: &'a Backward<'a, T>,
    unpooled: Unpooled<'a, T>,
    y: Scratch<T>,
    dy: Scratch<T>,
    maxima: Vec<T>,
}

/// What becomes of such a `dy` of a plane, which two passes need.
#[derive(Clone, Copy)]
pub(super) enum Unpooled<'a, T> {
    /// It is computed and forgotten.
    Once,
    /// It is computed and kept in the place of the plane's `dx`.
    Keep(Parts<'a, T>),
    /// It has been kept there.
    Kept(Parts<'a, T>),
}

impl<'a, T: Element> Tensors<'a, T> {
    /// # Safety
    /// Nobody else holds the parts of an [`Unpooled`] that [`run`](Self::run) asks for, and what is
    /// said to be kept is kept.
    pub unsafe fn new(job: &'a Backward<'a, T>, unpooled: Unpooled<'a, T>) -> Self {
        Self {
            job,
            unpooled,
            y: Scratch::new(),
            dy: Scratch::new(),
            maxima: Vec::new(),
        }
    }

    /// All of them, where there is no pooling.
    #[inline(always)]
    pub fn whole(&self) -> Slice<'a, T> {
        debug_assert!(self.job.spec.windows.is_none());
        Slice {
            x: self.job.x,
            dy: self.job.dy,
            y: self.job.y.unwrap_or(self.job.x),
        }
    }

    /// Asks for the `x` and the `dy` that [`run`](Self::run) will read.
    #[inline(always)]
    pub fn prefetch(&self, run: Range<usize>) {
        let Backward { spec, x, dy, .. } = self.job;
        let of_dy = match &spec.windows {
            None => run.clone(),
            Some(windows) => outputs(windows, &run),
        };
        prefetch(x.get(run));
        prefetch(dy.get(of_dy));
    }

    /// The values in `run`, a whole plane if there is pooling.
    #[inline(always)]
    pub fn run(
        &mut self,
        run: Range<usize>,
        channels: impl Channels<Channel<T::Real>>,
    ) -> Slice<'_, T> {
        let spec = self.job.spec;
        let Some(windows) = &spec.windows else {
            return self.whole().part(run);
        };
        let x = &self.job.x[run.clone()];
        let dy = &self.job.dy[outputs(windows, &run)];
        let unpooled = match self.unpooled {
            Unpooled::Once | Unpooled::Kept(_) => self.dy.room(x.len()),
            // SAFETY: the part is nobody else's, says the caller of `new`.
            Unpooled::Keep(parts) => unsafe { parts.part(run.clone()) },
        };
        if let Unpooled::Kept(parts) = self.unpooled {
            // SAFETY: as above.
            unpooled.copy_from_slice(unsafe { parts.part(run) });
        } else {
            let y = self.y.output(x, channels, spec.activation);
            let maxima = &mut self.maxima;
            match spec.activation {
                Activation::Identity => windows.backward(y, dy, unpooled, maxima, |_, dy| dy),
                Activation::Relu => windows.backward(
                    y,
                    dy,
                    unpooled,
                    maxima,
                    #[inline(always)]
                    |y, dy| cut(y, T::default(), dy),
                ),
            }
        }
        // SAFETY: `backward` writes every value, here or before the copy.
        let dy = unsafe { written(unpooled) };
        Slice { x, dy, y: x }
    }
}
