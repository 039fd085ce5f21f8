//! Max pooling on the CPU: loops over slices, without candle's types.

use std::mem::MaybeUninit;

use candle_core::WithDType;

use crate::ops::output::Output;
use crate::ops::parallel::for_each;
use crate::ops::slices::vectorised;

/// The images, channel by channel, and the windows on them.
pub(super) struct Planes {
    pub count: usize,
    pub h: usize,
    pub w: usize,
    pub kernel: usize,
}

impl Planes {
    pub fn oh(&self) -> usize {
        self.h / self.kernel
    }

    pub fn ow(&self) -> usize {
        self.w / self.kernel
    }
}

/// Windows that are looked at together: a register full of them, and few enough for small images.
const WIDE: usize = 16;
const NARROW: usize = 4;

/// The output, plane by plane.
pub(super) fn forward<T: WithDType>(planes: &Planes, x: &[T]) -> Vec<T> {
    let (inputs, outputs) = (planes.h * planes.w, planes.oh() * planes.ow());
    let mut y = Output::new(planes.count * outputs);
    let parts = y.parts();
    for_each(planes.count, x.len(), |plane| {
        let x = &x[plane * inputs..][..inputs];
        // SAFETY: each plane is one task's.
        let y = unsafe { parts.part(plane * outputs..(plane + 1) * outputs) };
        let rows = x.chunks_exact(planes.kernel * planes.w);
        let rows = rows.zip(y.chunks_exact_mut(planes.ow()));
        if planes.kernel == 2 {
            vectorised(
                #[inline(always)]
                || {
                    for (x, y) in rows {
                        pairs_forward(x, y);
                    }
                },
            );
        } else {
            for (x, y) in rows {
                for (j, y) in y.iter_mut().enumerate() {
                    y.write(x[largest(planes, x, j)]);
                }
            }
        }
    });
    // SAFETY: every plane has been written, as many rows and columns as it has windows.
    unsafe { y.finish() }
}

/// The gradient of the input.
pub(super) fn backward<T: WithDType>(planes: &Planes, x: &[T], dy: &[T]) -> Vec<T> {
    let (inputs, outputs) = (planes.h * planes.w, planes.oh() * planes.ow());
    let mut dx = Output::new(x.len());
    let parts = dx.parts();
    for_each(planes.count, x.len(), |plane| {
        let x = &x[plane * inputs..][..inputs];
        let dy = &dy[plane * outputs..][..outputs];
        // SAFETY: each plane is one task's.
        let dx = unsafe { parts.part(plane * inputs..(plane + 1) * inputs) };
        let (dx, rest) = dx.split_at_mut(planes.oh() * planes.kernel * planes.w);
        zero(rest);
        let rows = x.chunks_exact(planes.kernel * planes.w);
        let rows = rows
            .zip(dx.chunks_exact_mut(planes.kernel * planes.w))
            .zip(dy.chunks_exact(planes.ow()));
        if planes.kernel == 2 {
            vectorised(
                #[inline(always)]
                || {
                    for ((x, dx), dy) in rows {
                        pairs_backward(x, dx, dy);
                    }
                },
            );
        } else {
            for ((x, dx), dy) in rows {
                zero(dx);
                for (j, &dy) in dy.iter().enumerate() {
                    dx[largest(planes, x, j)].write(dy);
                }
            }
        }
    });
    // SAFETY: every plane has been written: the rows with windows, then the rest.
    unsafe { dx.finish() }
}

fn zero<T: WithDType>(values: &mut [MaybeUninit<T>]) {
    for value in values {
        value.write(T::zero());
    }
}

/// Whether a value takes the place of the largest before it.
#[inline(always)]
fn wins<T: WithDType>(value: T, largest: T) -> bool {
    #[expect(clippy::eq_op)] // a NaN
    let is_nan = value != value;
    (value > largest) | is_nan
}

/// Where the maximum of window `j` is in the rows of its windows.
fn largest<T: WithDType>(planes: &Planes, rows: &[T], j: usize) -> usize {
    let start = j * planes.kernel;
    let mut at = start;
    for row in 0..planes.kernel {
        for index in row * planes.w + start..row * planes.w + start + planes.kernel {
            if wins(rows[index], rows[at]) {
                at = index;
            }
        }
    }
    at
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
fn pairs_forward<T: WithDType>(x: &[T], y: &mut [MaybeUninit<T>]) {
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
fn block_forward<T: WithDType, const L: usize>(
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
fn pairs_backward<T: WithDType>(x: &[T], dx: &mut [MaybeUninit<T>], dy: &[T]) {
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
fn block_backward<T: WithDType, const L: usize>(
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
fn choose<T: WithDType>(second: bool, g: T) -> (T, T) {
    if second {
        (T::zero(), g)
    } else {
        (g, T::zero())
    }
}
