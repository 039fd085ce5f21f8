//! The windows of one plane, an image of one channel: their maxima, and which pixels those are.

use std::mem::MaybeUninit;

use super::two_by_two::TwoByTwo;

/// Square windows that lie side by side on a plane of `h` by `w` pixels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows {
    pub h: usize,
    pub w: usize,
    pub kernel: usize,
}

/// The value of a pixel.
pub(crate) trait Pixel: Copy + PartialOrd + Default {}
impl<T: Copy + PartialOrd + Default> Pixel for T {}

impl Windows {
    pub fn oh(&self) -> usize {
        self.h / self.kernel
    }

    pub fn ow(&self) -> usize {
        self.w / self.kernel
    }

    /// Pixels of a plane.
    pub fn inputs(&self) -> usize {
        self.h * self.w
    }

    /// Windows on a plane.
    pub fn outputs(&self) -> usize {
        self.oh() * self.ow()
    }

    /// Writes `finish(the largest value)` of every window to `y`, where `value` is that of a pixel of the plane
    /// `x`, and the pixel with that value to `maxima`. (What follows the plane in `x` is no part of it; it may
    /// be read, and is not used.)
    #[inline(always)]
    pub fn forward<V: Pixel>(
        &self,
        x: &[V],
        y: &mut [MaybeUninit<V>],
        maxima: Option<&mut [MaybeUninit<V>]>,
        value: impl Fn(V) -> V,
        finish: impl Fn(V) -> V,
    ) {
        assert_eq!(y.len(), self.outputs());
        assert!(maxima.as_ref().is_none_or(|maxima| maxima.len() == y.len()));
        if self.kernel == 2 {
            return match maxima {
                None => TwoByTwo(self).forward(x, y, value, finish),
                Some(maxima) => TwoByTwo(self).forward_with_maxima(x, y, maxima, value, finish),
            };
        }
        let mut maxima = maxima;
        for (window, y) in y.iter_mut().enumerate() {
            let (at, largest) = self.largest(x, window, &value);
            y.write(finish(largest));
            if let Some(maxima) = &mut maxima {
                maxima[window].write(x[at]);
            }
        }
    }

    /// Writes all of `dx`: `gradient(pixel, g)`, where `g` is `mask(the largest value, dy)` of its window for the
    /// pixel with that value, and 0 for all others.
    #[inline(always)]
    pub fn backward<V: Pixel>(
        &self,
        x: &[V],
        dy: &[V],
        dx: &mut [MaybeUninit<V>],
        value: impl Fn(V) -> V,
        mask: impl Fn(V, V) -> V,
        gradient: impl Fn(V, V) -> V,
    ) {
        assert_eq!(dx.len(), self.inputs());
        let mut without = |from: usize| {
            for (dx, &x) in dx.iter_mut().zip(x).skip(from) {
                dx.write(gradient(x, V::default()));
            }
        };
        if self.kernel == 2 {
            let rows = 2 * self.oh() * self.w;
            without(rows);
            return TwoByTwo(self).backward(x, dy, &mut dx[..rows], value, mask, gradient);
        }
        without(0);
        for (window, &dy) in dy.iter().enumerate().take(self.outputs()) {
            let (at, largest) = self.largest(x, window, &value);
            dx[at].write(gradient(x[at], mask(largest, dy)));
        }
    }

    /// The pixel of a window with the largest value, and that.
    fn largest<V: Pixel>(&self, x: &[V], window: usize, value: impl Fn(V) -> V) -> (usize, V) {
        let (row, column) = (window / self.ow(), window % self.ow());
        let start = (row * self.w + column) * self.kernel;
        let mut found = (start, value(x[start]));
        for row in 0..self.kernel {
            let first = start + row * self.w;
            for (at, &pixel) in (first..).zip(&x[first..first + self.kernel]) {
                let (largest, is_here) = larger(found.1, value(pixel));
                found = (if is_here { at } else { found.0 }, largest);
            }
        }
        found
    }
}

/// The larger of two values, the first of equal ones and the last NaN, and whether it is the second.
#[inline(always)]
pub(super) fn larger<V: Pixel>(first: V, second: V) -> (V, bool) {
    #[expect(clippy::eq_op)] // a NaN
    let is_nan = second != second;
    let is_second = (second > first) | is_nan;
    (if is_second { second } else { first }, is_second)
}
