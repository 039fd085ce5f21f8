//! Max pooling behind the normalisation, plane by plane: what lies between the two is never stored,
//! but computed again for every pass while the plane is in the cache.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::convert::Element;
use super::element::{write_y, Channel, Channels, Slice};
use super::Backward;
use crate::ops::batch_norm::Activation;
use crate::ops::max_pool2d::windows::Windows;

/// The windows of a plane among those of all planes.
pub(super) fn outputs(windows: &Windows, plane: &Range<usize>) -> Range<usize> {
    let start = plane.start / windows.inputs() * windows.outputs();
    start..start + windows.outputs()
}

/// Room for a plane of the output before pooling.
pub(super) struct Scratch<T>(Vec<T>);

impl<T: Element> Scratch<T> {
    pub fn new() -> Self {
        Self(Vec::new())
    }

    /// The normalised and activated plane `x`.
    #[inline(always)]
    pub fn output(
        &mut self,
        x: &[T],
        channels: impl Channels<Channel<T::Real>>,
        activation: Activation,
    ) -> &[T] {
        // SAFETY: `write_y` writes every value.
        unsafe {
            self.fill(
                x.len(),
                #[inline(always)]
                |y| write_y(y, x, None, channels, activation),
            )
        }
    }

    /// Values that `write` writes.
    ///
    /// # Safety
    /// It writes all of them.
    #[inline(always)]
    unsafe fn fill(&mut self, len: usize, write: impl FnOnce(&mut [MaybeUninit<T>])) -> &[T] {
        self.0.clear();
        self.0.reserve(len);
        write(&mut self.0.spare_capacity_mut()[..len]);
        // SAFETY: there is room for them, and the caller says that they are written.
        unsafe { self.0.set_len(len) };
        &self.0
    }
}

/// The tensors that the backward pass reads, `dy` as it is before the pooling.
pub(super) struct Tensors<'a, T> {
    job: &'a Backward<'a, T>,
    y: Scratch<T>,
    dy: Scratch<T>,
    maxima: Vec<T>,
}

impl<'a, T: Element> Tensors<'a, T> {
    pub fn new(job: &'a Backward<'a, T>) -> Self {
        Self {
            job,
            y: Scratch::new(),
            dy: Scratch::new(),
            maxima: Vec::new(),
        }
    }

    /// All of them, where there is no pooling.
    #[inline(always)]
    pub fn whole(&self) -> Slice<'a, T> {
        Slice {
            x: self.job.x,
            dy: self.job.dy,
            y: self.job.y.unwrap_or(self.job.x),
        }
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
        let dy = &self.job.dy[outputs(windows, &run)];
        let x = &self.job.x[run];
        let y = self.y.output(x, channels, spec.activation);
        // SAFETY: `backward` writes every value.
        let dy = unsafe {
            self.dy.fill(
                x.len(),
                #[inline(always)]
                |dx| windows.backward(y, dy, dx, &mut self.maxima),
            )
        };
        Slice { x, dy, y: x }
    }
}
