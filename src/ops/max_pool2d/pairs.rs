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
    let (pairs, rows) = room(scratch, windows);
    let (upper, lower) = rows.split_at_mut(windows);
    maxima_of_pairs(x, w, pairs);
    split(pairs, w / 2, upper, lower);
    for i in 0..windows {
        let (upper, lower) = (upper[i], lower[i]);
        y[i].write(if wins(lower, upper) { lower } else { upper });
    }
}

/// Writes the gradient of every window to its maximum, and 0 to all other pixels.
#[inline(always)]
pub(super) fn backward<T: Pixel>(
    x: &[T],
    w: usize,
    dy: &[T],
    dx: &mut [MaybeUninit<T>],
    scratch: &mut Vec<T>,
) {
    let windows = dy.len();
    let (pairs, rows) = room(scratch, windows);
    let (upper, lower) = rows.split_at_mut(windows);
    maxima_of_pairs(x, w, pairs);
    split(pairs, w / 2, upper, lower);
    // The gradients of the pairs take the place of their maxima.
    for i in 0..windows {
        let (dy, lower_wins) = (dy[i], wins(lower[i], upper[i]));
        upper[i] = if lower_wins { T::default() } else { dy };
        lower[i] = if lower_wins { dy } else { T::default() };
    }
    join(upper, lower, w / 2, pairs);
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

/// Room for the two pairs of every window, in the order of the rows, and once more: upper, lower.
fn room<T: Pixel>(scratch: &mut Vec<T>, windows: usize) -> (&mut [T], &mut [T]) {
    scratch.resize(4 * windows, T::default());
    scratch.split_at_mut(2 * windows)
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

/// Copies rows of `len`, in turns to `upper` and to `lower`.
fn split<T: Pixel>(rows: &[T], len: usize, upper: &mut [T], lower: &mut [T]) {
    let to = upper.chunks_exact_mut(len).zip(lower.chunks_exact_mut(len));
    for (rows, (upper, lower)) in rows.chunks_exact(2 * len).zip(to) {
        upper.copy_from_slice(&rows[..len]);
        lower.copy_from_slice(&rows[len..]);
    }
}

/// The way back.
fn join<T: Pixel>(upper: &[T], lower: &[T], len: usize, rows: &mut [T]) {
    let from = upper.chunks_exact(len).zip(lower.chunks_exact(len));
    for (rows, (upper, lower)) in rows.chunks_exact_mut(2 * len).zip(from) {
        rows[..len].copy_from_slice(upper);
        rows[len..].copy_from_slice(lower);
    }
}
