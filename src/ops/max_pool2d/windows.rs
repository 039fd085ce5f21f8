//! The windows of one plane, an image of one channel: their maxima, and which pixels those are.

use std::mem::MaybeUninit;

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

/// Windows that are looked at together: a register full of them, and few enough for small images.
const WIDE: usize = 16;
const NARROW: usize = 4;

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

    /// Writes the maximum of every window of the plane `x` to `y`.
    #[inline(always)]
    pub fn forward<T: Pixel>(&self, x: &[T], y: &mut [MaybeUninit<T>]) {
        let rows = x.chunks_exact(self.kernel * self.w);
        let rows = rows.zip(y.chunks_exact_mut(self.ow()));
        if self.kernel == 2 {
            for (x, y) in rows {
                pairs_forward(x, y);
            }
        } else {
            for (x, y) in rows {
                for (j, y) in y.iter_mut().enumerate() {
                    y.write(x[self.largest(x, j)]);
                }
            }
        }
    }

    /// Writes all of `dx`: the gradient of a window to its maximum, 0 to the other pixels.
    #[inline(always)]
    pub fn backward<T: Pixel>(&self, x: &[T], dy: &[T], dx: &mut [MaybeUninit<T>]) {
        let (dx, rest) = dx.split_at_mut(self.oh() * self.kernel * self.w);
        zero(rest);
        let rows = x.chunks_exact(self.kernel * self.w);
        let rows = rows
            .zip(dx.chunks_exact_mut(self.kernel * self.w))
            .zip(dy.chunks_exact(self.ow()));
        if self.kernel == 2 {
            for ((x, dx), dy) in rows {
                pairs_backward(x, dx, dy);
            }
        } else {
            for ((x, dx), dy) in rows {
                zero(dx);
                for (j, &dy) in dy.iter().enumerate() {
                    dx[self.largest(x, j)].write(dy);
                }
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
fn zero<T: Pixel>(values: &mut [MaybeUninit<T>]) {
    for value in values {
        value.write(T::default());
    }
}

/// Whether a value takes the place of the largest before it.
#[inline(always)]
fn wins<T: Pixel>(value: T, largest: T) -> bool {
    #[expect(clippy::eq_op)] // a NaN
    let is_nan = value != value;
    (value > largest) | is_nan
}

/// Two rows of pixels.
type Pair<'a, T> = (&'a [[T; 2]], &'a [[T; 2]]);

#[inline(always)]
fn pair<T>(rows: &[T]) -> Pair<'_, T> {
    let (top, bottom) = rows.split_at(rows.len() / 2);
    (top.as_chunks().0, bottom.as_chunks().0)
}

/// Calls `block` with the start of blocks of `L` among `len` values. The last one may overlap with
/// the one before, and has to come to the same there.
#[inline(always)]
fn blocks<const L: usize>(len: usize, mut block: impl FnMut(usize)) {
    let mut start = 0;
    while start + L < len {
        block(start);
        start += L;
    }
    block(len - L);
}

/// The windows of 2×2 of two rows.
#[inline(always)]
fn pairs_forward<T: Pixel>(x: &[T], y: &mut [MaybeUninit<T>]) {
    let x = pair(x);
    match y.len() {
        WIDE.. => blocks::<WIDE>(
            y.len(),
            #[inline(always)]
            |at| block_forward::<T, WIDE>(x, y, at),
        ),
        NARROW.. => blocks::<NARROW>(
            y.len(),
            #[inline(always)]
            |at| block_forward::<T, NARROW>(x, y, at),
        ),
        len => (0..len).for_each(|at| block_forward::<T, 1>(x, y, at)),
    }
}

#[inline(always)]
fn block_forward<T: Pixel, const L: usize>(
    (top, bottom): Pair<T>,
    y: &mut [MaybeUninit<T>],
    at: usize,
) {
    let (top, bottom, y) = (&top[at..at + L], &bottom[at..at + L], &mut y[at..at + L]);
    for i in 0..L {
        let ([a, b], [c, d]) = (top[i], bottom[i]);
        let max = if wins(b, a) { b } else { a };
        let max = if wins(c, max) { c } else { max };
        y[i].write(if wins(d, max) { d } else { max });
    }
}

/// The gradient of the windows of 2×2 of two rows.
#[inline(always)]
fn pairs_backward<T: Pixel>(x: &[T], dx: &mut [MaybeUninit<T>], dy: &[T]) {
    let x = pair(x);
    let (dx_top, dx_bottom) = dx.split_at_mut(dx.len() / 2);
    let ((dx_top, rest_top), (dx_bottom, rest_bottom)) =
        (dx_top.as_chunks_mut(), dx_bottom.as_chunks_mut());
    zero(rest_top);
    zero(rest_bottom);
    match dy.len() {
        WIDE.. => blocks::<WIDE>(
            dy.len(),
            #[inline(always)]
            |at| block_backward::<T, WIDE>(x, (dx_top, dx_bottom), dy, at),
        ),
        NARROW.. => blocks::<NARROW>(
            dy.len(),
            #[inline(always)]
            |at| block_backward::<T, NARROW>(x, (dx_top, dx_bottom), dy, at),
        ),
        len => (0..len).for_each(|at| block_backward::<T, 1>(x, (dx_top, dx_bottom), dy, at)),
    }
}

type PairMut<'a, T> = (&'a mut [[MaybeUninit<T>; 2]], &'a mut [[MaybeUninit<T>; 2]]);

#[inline(always)]
fn block_backward<T: Pixel, const L: usize>(
    (top, bottom): Pair<T>,
    (dx_top, dx_bottom): PairMut<T>,
    dy: &[T],
    at: usize,
) {
    let (top, bottom, dy) = (&top[at..at + L], &bottom[at..at + L], &dy[at..at + L]);
    let (dx_top, dx_bottom) = (&mut dx_top[at..at + L], &mut dx_bottom[at..at + L]);
    for i in 0..L {
        let ([a, b], [c, d], g) = (top[i], bottom[i], dy[i]);
        let b_wins = wins(b, a);
        let max = if b_wins { b } else { a };
        let c_wins = wins(c, max);
        let max = if c_wins { c } else { max };
        let (g, in_d) = choose(wins(d, max), g);
        let (g, in_c) = choose(c_wins, g);
        let (in_a, in_b) = choose(b_wins, g);
        // Value by value: the compiler makes one number of a pair, and the loop three times as slow.
        dx_top[i][0].write(in_a);
        dx_top[i][1].write(in_b);
        dx_bottom[i][0].write(in_c);
        dx_bottom[i][1].write(in_d);
    }
}

/// A gradient for the one that wins, the second, and 0 for the other.
#[inline(always)]
fn choose<T: Pixel>(second: bool, g: T) -> (T, T) {
    if second {
        (T::default(), g)
    } else {
        (g, T::default())
    }
}
