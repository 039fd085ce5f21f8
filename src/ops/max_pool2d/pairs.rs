//! Windows of 2×2 in two steps: pairs of neighbours in a row, and then those above each other.
//!
//! Rows can be shorter than a register, so that all loops go over the whole plane; upper and lower
//! rows are copied apart for that. The loops count and load before they choose: the compiler then
//! has wide registers for them.

use std::mem::MaybeUninit;

use super::windows::{wins, zero, Pixel};

/// Writes the maximum of every window of `x`, an even number of rows of `w` pixels.
#[inline(always)]
pub(super) fn forward<T: Pixel>(x: &[T], w: usize, y: &mut [MaybeUninit<T>], scratch: &mut Vec<T>) {
    let windows = y.len();
    let [pairs, upper, lower] = room(scratch, windows);
    maxima_of_pairs(x, w, pairs);
    split(pairs, windows, w / 2, upper, lower);
    for i in 0..windows {
        let (upper, lower) = (upper[i], lower[i]);
        y[i].write(if wins(lower, upper) { lower } else { upper });
    }
}

/// Writes `gradient(maximum, dy)` of every window to its maximum, and 0 to all other pixels.
#[inline(always)]
pub(super) fn backward<T: Pixel>(
    x: &[T],
    w: usize,
    dy: &[T],
    dx: &mut [MaybeUninit<T>],
    scratch: &mut Vec<T>,
    gradient: impl Fn(T, T) -> T,
) {
    let windows = dy.len();
    let [pairs, upper, lower] = room(scratch, windows);
    maxima_of_pairs(x, w, pairs);
    split(pairs, windows, w / 2, upper, lower);
    // The gradients of the pairs take the place of their maxima.
    for i in 0..windows {
        let (above, below) = (upper[i], lower[i]);
        let lower_wins = wins(below, above);
        let dy = gradient(if lower_wins { below } else { above }, dy[i]);
        upper[i] = if lower_wins { T::default() } else { dy };
        lower[i] = if lower_wins { dy } else { T::default() };
    }
    join(upper, lower, windows, w / 2, pairs);
    let (run, per_run) = runs(x.len(), w);
    for index in 0..x.len() / run {
        let (dx, rest) = dx[index * run..][..run].split_at_mut(2 * per_run);
        let x = &x[index * run..][..2 * per_run];
        let dy = &pairs[index * per_run..][..per_run];
        for i in 0..per_run {
            let (dy, right_wins) = (dy[i], wins(x[2 * i + 1], x[2 * i]));
            dx[2 * i].write(if right_wins { T::default() } else { dy });
            dx[2 * i + 1].write(if right_wins { dy } else { T::default() });
        }
        zero(rest);
    }
}

/// Values that are copied together: a register or two.
const WIDE: usize = 16;

/// Room for the two pairs of every window, in the order of the rows, and once more: upper ones, lower
/// ones. [`copy`] may write and read beyond the end of each.
#[inline(always)]
fn room<T: Pixel>(scratch: &mut Vec<T>, windows: usize) -> [&mut [T]; 3] {
    scratch.resize(4 * windows + 3 * WIDE, T::default());
    let (pairs, rows) = scratch.split_at_mut(2 * windows + WIDE);
    let (upper, lower) = rows.split_at_mut(windows + WIDE);
    [pairs, upper, lower]
}

/// Copies `len` values, and what follows them up to a whole number of registers: the rows of a plane
/// are too short for a call.
#[inline(always)]
fn copy<T: Pixel>(from: &[T], to: &mut [T], len: usize) {
    for at in (0..len).step_by(WIDE) {
        to[at..at + WIDE].copy_from_slice(&from[at..at + WIDE]);
    }
}

/// The pixels that can be gone through in one run, and the pairs in it: all of them, but a row at a
/// time where its last pixel belongs to no pair.
fn runs(pixels: usize, w: usize) -> (usize, usize) {
    let run = if w.is_multiple_of(2) { pixels } else { w };
    (run, run / 2)
}

#[inline(always)]
fn maxima_of_pairs<T: Pixel>(x: &[T], w: usize, maxima: &mut [T]) {
    let (run, per_run) = runs(x.len(), w);
    for index in 0..x.len() / run {
        let x = &x[index * run..][..2 * per_run];
        let maxima = &mut maxima[index * per_run..][..per_run];
        for i in 0..per_run {
            let (left, right) = (x[2 * i], x[2 * i + 1]);
            maxima[i] = if wins(right, left) { right } else { left };
        }
    }
}

/// Copies rows of `len` of two for each of `windows`, in turns to `upper` and to `lower`.
#[inline(always)]
fn split<T: Pixel>(rows: &[T], windows: usize, len: usize, upper: &mut [T], lower: &mut [T]) {
    for start in (0..windows).step_by(len) {
        copy(&rows[2 * start..], &mut upper[start..], len);
        copy(&rows[2 * start + len..], &mut lower[start..], len);
    }
}

/// The way back.
#[inline(always)]
fn join<T: Pixel>(upper: &[T], lower: &[T], windows: usize, len: usize, rows: &mut [T]) {
    for start in (0..windows).step_by(len) {
        copy(&upper[start..], &mut rows[2 * start..], len);
        copy(&lower[start..], &mut rows[2 * start + len..], len);
    }
}
