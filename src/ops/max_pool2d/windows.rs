//! The windows of one plane, an image of one channel: their maxima, and which pixels those are.

use std::mem::MaybeUninit;

use super::pairs;

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

    /// Writes the maximum of every window of the plane `x` to `y`. `scratch` is overwritten.
    #[inline(always)]
    pub fn forward<T: Pixel>(&self, x: &[T], y: &mut [MaybeUninit<T>], scratch: &mut Vec<T>) {
        if self.kernel == 2 {
            return pairs::forward(&x[..2 * self.oh() * self.w], self.w, y, scratch);
        }
        let rows = x.chunks_exact(self.kernel * self.w);
        for (x, y) in rows.zip(y.chunks_exact_mut(self.ow())) {
            for (j, y) in y.iter_mut().enumerate() {
                y.write(x[self.largest(x, j)]);
            }
        }
    }

    /// Writes all of `dx`: `gradient(maximum, dy)` of a window to its maximum, 0 to the other pixels.
    /// `scratch` is overwritten.
    #[inline(always)]
    pub fn backward<T: Pixel>(
        &self,
        x: &[T],
        dy: &[T],
        dx: &mut [MaybeUninit<T>],
        scratch: &mut Vec<T>,
        gradient: impl Fn(T, T) -> T,
    ) {
        let (dx, rest) = dx.split_at_mut(self.oh() * self.kernel * self.w);
        zero(rest);
        if self.kernel == 2 {
            return pairs::backward(&x[..dx.len()], self.w, dy, dx, scratch, gradient);
        }
        let rows = x.chunks_exact(self.kernel * self.w);
        let rows = rows
            .zip(dx.chunks_exact_mut(self.kernel * self.w))
            .zip(dy.chunks_exact(self.ow()));
        for ((x, dx), dy) in rows {
            zero(dx);
            for (j, &dy) in dy.iter().enumerate() {
                let at = self.largest(x, j);
                dx[at].write(gradient(x[at], dy));
            }
        }
    }

    /// Where the maximum of window `j` is in the rows of its windows.
    fn largest<T: Pixel>(&self, rows: &[T], j: usize) -> usize {
        let start = j * self.kernel;
        let mut at = start;
        for row in 0..self.kernel {
            for index in row * self.w + start..row * self.w + start + self.kernel {
                if wins(rows[index], rows[at]) {
                    at = index;
                }
            }
        }
        at
    }
}

#[inline(always)]
pub(super) fn zero<T: Pixel>(values: &mut [MaybeUninit<T>]) {
    for value in values {
        value.write(T::default());
    }
}

/// Whether a value takes the place of the largest before it.
#[inline(always)]
pub(super) fn wins<T: Pixel>(value: T, largest: T) -> bool {
    #[expect(clippy::eq_op)] // a NaN
    let is_nan = value != value;
    (value > largest) | is_nan
}
