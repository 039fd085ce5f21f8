//! Windows of 2×2, in blocks of neighbours: a loop over a block has a number of turns that the compiler
//! knows, and becomes a few instructions on whole registers however short the rows are.
//!
//! A block at the end of a row goes on into the next one. What it writes there is written again when that
//! row has its turn, and what it reads there is for nobody.

// The loops go over several arrays side by side.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;

use super::windows::{larger, Pixel, Windows};

/// Calls a method that is generic over the size of a block: its windows, and its pixels in a row.
macro_rules! in_blocks {
    ($self:ident.$method:ident($($arg:expr),*)) => {
        match $self.0.ow() {
            ..=8 => $self.$method::<_, 8, 16>($($arg),*),
            _ => $self.$method::<_, 16, 32>($($arg),*),
        }
    };
}

/// [`Windows`] of two by two pixels. The methods do what those of the windows say.
#[derive(Clone, Copy)]
pub(super) struct TwoByTwo<'a>(pub &'a Windows);

impl TwoByTwo<'_> {
    #[inline(always)]
    pub fn forward<V: Pixel>(
        self,
        x: &[V],
        y: &mut [MaybeUninit<V>],
        value: impl Fn(V) -> V,
        finish: impl Fn(V) -> V,
    ) {
        in_blocks!(self.forward_by(x, y, value, finish));
    }

    #[inline(always)]
    pub fn forward_with_maxima<V: Pixel>(
        self,
        x: &[V],
        y: &mut [MaybeUninit<V>],
        maxima: &mut [MaybeUninit<V>],
        value: impl Fn(V) -> V,
        finish: impl Fn(V) -> V,
    ) {
        in_blocks!(self.forward_with_maxima_by(x, y, maxima, value, finish));
    }

    #[inline(always)]
    pub fn backward<V: Pixel>(
        self,
        x: &[V],
        dy: &[V],
        dx: &mut [MaybeUninit<V>],
        value: impl Fn(V) -> V,
        mask: impl Fn(V, V) -> V,
        gradient: impl Fn(V, V) -> V,
    ) {
        in_blocks!(self.backward_by(x, dy, dx, value, mask, gradient));
    }

    #[inline(always)]
    fn forward_by<V: Pixel, const N: usize, const P: usize>(
        self,
        x: &[V],
        y: &mut [MaybeUninit<V>],
        value: impl Fn(V) -> V,
        finish: impl Fn(V) -> V,
    ) {
        let mut rooms = [[V::default(); P]; 2];
        self.for_blocks::<N>(
            #[inline(always)]
            |pixel, window| {
                let rows = self.rows(x, pixel, &mut rooms);
                put(y, window, &maxima::<V, N, P>(rows, &value, &finish));
            },
        );
    }

    #[inline(always)]
    fn forward_with_maxima_by<V: Pixel, const N: usize, const P: usize>(
        self,
        x: &[V],
        y: &mut [MaybeUninit<V>],
        maxima: &mut [MaybeUninit<V>],
        value: impl Fn(V) -> V,
        finish: impl Fn(V) -> V,
    ) {
        let mut rooms = [[V::default(); P]; 2];
        self.for_blocks::<N>(
            #[inline(always)]
            |pixel, window| {
                let rows = self.rows(x, pixel, &mut rooms);
                let [values, pixels] = with_maxima::<V, N, P>(rows, &value, &finish);
                put(y, window, &values);
                put(maxima, window, &pixels);
            },
        );
    }

    #[inline(always)]
    fn backward_by<V: Pixel, const N: usize, const P: usize>(
        self,
        x: &[V],
        dy: &[V],
        dx: &mut [MaybeUninit<V>],
        value: impl Fn(V) -> V,
        mask: impl Fn(V, V) -> V,
        gradient: impl Fn(V, V) -> V,
    ) {
        let w = self.0.w;
        let (mut rooms, mut dy_room) = ([[V::default(); P]; 2], [V::default(); N]);
        self.for_blocks::<N>(
            #[inline(always)]
            |pixel, window| {
                let rows = self.rows(x, pixel, &mut rooms);
                let dy = block(dy, window, &mut dy_room);
                let [upper, lower] = gradients::<V, N, P>(rows, dy, &value, &mask, &gradient);
                put(dx, pixel, &upper);
                put(dx, pixel + w, &lower);
            },
        );
        if w % 2 == 1 {
            for row in 0..2 * self.0.oh() {
                let last = row * w + w - 1;
                dx[last].write(gradient(x[last], V::default()));
            }
        }
    }

    /// Calls `f` with the first pixel and the window of every block, such that each row of pixels and of windows
    /// is written after all that go on into it.
    #[inline(always)]
    fn for_blocks<const N: usize>(self, mut f: impl FnMut(usize, usize)) {
        let (w, ow) = (self.0.w, self.0.ow());
        for row in 0..self.0.oh() {
            let mut start = (ow - 1) / N * N;
            loop {
                f(2 * (row * w + start), row * ow + start);
                if start == 0 {
                    break;
                }
                start -= N;
            }
        }
    }

    /// The pixels of a block in the row of `pixel` and in the next.
    #[inline(always)]
    fn rows<'a, V: Pixel, const P: usize>(
        self,
        x: &'a [V],
        pixel: usize,
        [upper, lower]: &'a mut [[V; P]; 2],
    ) -> [&'a [V; P]; 2] {
        [block(x, pixel, upper), block(x, pixel + self.0.w, lower)]
    }
}

/// The values from `start` on; behind the last one anything.
#[inline(always)]
fn block<'a, V: Pixel, const N: usize>(
    values: &'a [V],
    start: usize,
    room: &'a mut [V; N],
) -> &'a [V; N] {
    let values = &values[start..];
    match values.first_chunk() {
        Some(block) => block,
        None => {
            room[..values.len()].copy_from_slice(values);
            room
        }
    }
}

/// Writes the values from `start` on, as far as there is room.
#[inline(always)]
fn put<V: Pixel, const N: usize>(to: &mut [MaybeUninit<V>], start: usize, values: &[V; N]) {
    #[inline(always)]
    fn copy<V: Pixel>(to: &mut [MaybeUninit<V>], values: &[V]) {
        for (to, value) in to.iter_mut().zip(values) {
            to.write(*value);
        }
    }
    let to = &mut to[start..];
    match to.first_chunk_mut::<N>() {
        Some(to) => copy(to, values),
        None => copy(to, values),
    }
}

#[inline(always)]
fn maxima<V: Pixel, const N: usize, const P: usize>(
    rows: [&[V; P]; 2],
    value: impl Fn(V) -> V,
    finish: impl Fn(V) -> V,
) -> [V; N] {
    let mut maxima = [V::default(); N];
    for i in 0..N {
        maxima[i] = finish(Largest::of(i, rows, &value).value);
    }
    maxima
}

#[inline(always)]
fn with_maxima<V: Pixel, const N: usize, const P: usize>(
    rows: [&[V; P]; 2],
    value: impl Fn(V) -> V,
    finish: impl Fn(V) -> V,
) -> [[V; N]; 2] {
    let mut maxima = [[V::default(); N]; 2];
    for i in 0..N {
        let largest = Largest::of(i, rows, &value);
        maxima[0][i] = finish(largest.value);
        maxima[1][i] = largest.pixel(i, rows);
    }
    maxima
}

#[inline(always)]
fn gradients<V: Pixel, const N: usize, const P: usize>(
    rows: [&[V; P]; 2],
    dy: &[V; N],
    value: impl Fn(V) -> V,
    mask: impl Fn(V, V) -> V,
    gradient: impl Fn(V, V) -> V,
) -> [[V; P]; 2] {
    let [upper, lower] = rows;
    let mut dx = [[V::default(); P]; 2];
    for i in 0..N {
        let largest = Largest::of(i, rows, &value);
        let dy = mask(largest.value, dy[i]);
        let (dupper, dlower) = for_one_of_two(largest.is_lower, dy);
        let (left, right) = for_one_of_two(largest.upper_is_right, dupper);
        dx[0][2 * i] = gradient(upper[2 * i], left);
        dx[0][2 * i + 1] = gradient(upper[2 * i + 1], right);
        let (left, right) = for_one_of_two(largest.lower_is_right, dlower);
        dx[1][2 * i] = gradient(lower[2 * i], left);
        dx[1][2 * i + 1] = gradient(lower[2 * i + 1], right);
    }
    dx
}

/// The maximum of a window, and where it is.
struct Largest<V> {
    value: V,
    upper_is_right: bool,
    lower_is_right: bool,
    is_lower: bool,
}

impl<V: Pixel> Largest<V> {
    /// Of window `i` of a block.
    #[inline(always)]
    fn of<const P: usize>(i: usize, [upper, lower]: [&[V; P]; 2], value: impl Fn(V) -> V) -> Self {
        let of_pair = |row: &[V; P]| larger(value(row[2 * i]), value(row[2 * i + 1]));
        let (upper, upper_is_right) = of_pair(upper);
        let (lower, lower_is_right) = of_pair(lower);
        let (value, is_lower) = larger(upper, lower);
        Self {
            value,
            upper_is_right,
            lower_is_right,
            is_lower,
        }
    }

    /// The pixel whose value it is.
    #[inline(always)]
    fn pixel<const P: usize>(&self, i: usize, rows: [&[V; P]; 2]) -> V {
        // All are loaded before one is chosen: the compiler then has wide registers for it.
        let [[a, b], [c, d]] = rows.map(|row| [row[2 * i], row[2 * i + 1]]);
        let upper = if self.upper_is_right { b } else { a };
        let lower = if self.lower_is_right { d } else { c };
        if self.is_lower {
            lower
        } else {
            upper
        }
    }
}

/// A gradient for one of two, and 0 for the other.
#[inline(always)]
fn for_one_of_two<V: Pixel>(is_second: bool, dy: V) -> (V, V) {
    if is_second {
        (V::default(), dy)
    } else {
        (dy, V::default())
    }
}
