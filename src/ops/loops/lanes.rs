//! Sums over slices, side by side in lanes.

use std::ops::Range;

use super::convert::{Element, Real};
use super::element::{Channel, Mask, Slice};
use super::prefetch::Ahead;

/// As many sums as fit into the registers of a core, or nearly; the loops over short slices still fill some.
pub(crate) const LANES: usize = 32;

/// A sum in `f64`, added up in a fixed order.
///
/// Where it goes on behind the rest of a slice, rests are to be added up `APART`: were they added to the lanes of
/// the others, those would be written by parts and read as a whole, for which a core has to wait.
struct Sum<const APART: bool> {
    whole: Lanes,
    short: Lanes,
}

/// On cache lines: where a register is stored across two of them, the next one to read it waits too.
#[repr(align(64))]
pub(crate) struct Lanes(pub [f64; LANES]);

impl Lanes {
    #[inline(always)]
    pub fn new() -> Self {
        Self([0.0; LANES])
    }
}

impl<const APART: bool> Sum<APART> {
    #[inline(always)]
    fn new() -> Self {
        Self {
            whole: Lanes::new(),
            short: Lanes::new(),
        }
    }

    /// The lanes for `len` values at the end of a slice.
    #[inline(always)]
    fn rest(&mut self, len: usize) -> &mut [f64] {
        let to = if APART {
            &mut self.short
        } else {
            &mut self.whole
        };
        &mut to.0[..len]
    }

    #[inline(always)]
    fn total(self) -> f64 {
        let whole = total(&self.whole.0);
        if APART {
            whole + total(&self.short.0)
        } else {
            whole
        }
    }
}

/// The sum of all lanes.
#[inline(always)]
pub(crate) fn total(lanes: &[f64; LANES]) -> f64 {
    let mut eight = [0.0; 8];
    for lanes in lanes.chunks_exact(8) {
        for i in 0..8 {
            eight[i] += lanes[i];
        }
    }
    let [a, b, c, d, e, f, g, h] = eight;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

/// Calls `f`, which has to be inlined, with the ranges of [`LANES`] of `len` values, and with what is left.
#[inline(always)]
pub(crate) fn blocks(len: usize, mut f: impl FnMut(Range<usize>)) {
    let mut start = 0;
    while start + LANES <= len {
        f(start..start + LANES);
        start += LANES;
    }
    if start < len {
        f(start..len);
    }
}

impl<const APART: bool> Sum<APART> {
    /// Adds `f` of every value.
    #[inline(always)]
    fn add<T: Element>(&mut self, values: &[T], ahead: Ahead, f: impl Fn(f64) -> f64) {
        const { assert!(LANES <= T::CHUNK) };
        let mut room = T::ROOM;
        // Not in chunks of a length that it knows: the compiler writes out a loop over so few values with so little to do, one by one,
        // before it thinks of wide registers.
        for chunk in values.chunks(LANES) {
            ahead.of(chunk);
            let lanes = &mut self.whole.0[..chunk.len()];
            let values = T::load(chunk, &mut room);
            for i in 0..chunk.len() {
                lanes[i] += f(values(i).to_f64());
            }
        }
    }
}

/// `Σd` and `Σd²` of the distances `d` from a pivot.
struct Distances<const APART: bool> {
    sum: Sum<APART>,
    squares: Sum<APART>,
}

impl<const APART: bool> Distances<APART> {
    #[inline(always)]
    fn new() -> Self {
        Self {
            sum: Sum::new(),
            squares: Sum::new(),
        }
    }

    #[inline(always)]
    fn add<T: Element>(&mut self, values: &[T], ahead: Ahead, pivot: f64) {
        let mut room = T::ROOM;
        const { assert!(LANES <= T::CHUNK) };
        // Whole chunks in a loop without a case for the rest: the compiler makes more of it.
        let chunks = values.chunks_exact(LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            ahead.of(chunk);
            let sums = &mut self.sum.whole.0[..chunk.len()];
            let squares = &mut self.squares.whole.0[..chunk.len()];
            let values = T::load(chunk, &mut room);
            for i in 0..chunk.len() {
                let distance = values(i).to_f64() - pivot;
                sums[i] += distance;
                squares[i] += distance * distance;
            }
        }
        let (sums, squares) = (self.sum.rest(rest.len()), self.squares.rest(rest.len()));
        let values = T::load(rest, &mut room);
        for i in 0..rest.len() {
            let distance = values(i).to_f64() - pivot;
            sums[i] += distance;
            squares[i] += distance * distance;
        }
    }
}

/// The sum of squares around the mean of `m` values, from `Σd` and `Σd²` of the distances from a pivot,
/// one of the values.
///
/// No value is further from the mean than √m standard deviations, the pivot neither: the difference
/// loses no more than the digits of m.
#[inline(always)]
pub(crate) fn spread(sum: f64, squares: f64, m: f64) -> f64 {
    let spread = squares - sum * sum / m;
    // A NaN stays.
    if spread < 0.0 {
        0.0
    } else {
        spread
    }
}

/// Mean (0 without `remove_mean`) of `m` values and the sum of squares around it. `runs` gives the slices
/// that they stand in, again with each call, `ahead` says where the next ones lie. (Loops over it, for what iterators do inside is not compiled for
/// wide registers.)
#[inline(always)]
pub(crate) fn moments<'a, const APART: bool, T: Element, I: Iterator<Item = &'a [T]>>(
    runs: impl Fn() -> I,
    m: f64,
    remove_mean: bool,
    ahead: Ahead,
) -> (f64, f64) {
    // With the first value taken off, the mean of constant values is exactly their value.
    let first = || runs().next().map_or(0.0, |run| run[0].to_f64());
    if T::SQUARES_FIT && remove_mean {
        let (pivot, mut distances) = (first(), Distances::<APART>::new());
        for run in runs() {
            distances.add(run, ahead, pivot);
        }
        let (sum, squares) = (distances.sum.total(), distances.squares.total());
        return (pivot + sum / m, spread(sum, squares, m));
    }
    let mut mean = 0.0;
    if remove_mean {
        let (pivot, mut sum) = (first(), Sum::<false>::new());
        for run in runs() {
            sum.add(run, ahead, |x| x - pivot);
        }
        mean = pivot + sum.total() / m;
    }
    let mut squares = Sum::<false>::new();
    for run in runs() {
        squares.add(run, ahead, |x| (x - mean) * (x - mean));
    }
    (mean, squares.total())
}

/// `Σg` and `Σ(g·(x - mean))`.
pub(crate) struct GradSums<const APART: bool> {
    g: Sum<APART>,
    gx: Sum<APART>,
}

impl<const APART: bool> GradSums<APART> {
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            g: Sum::new(),
            gx: Sum::new(),
        }
    }

    #[inline(always)]
    pub fn totals(self) -> (f64, f64) {
        (self.g.total(), self.gx.total())
    }

    /// Adds the values of a slice of one channel; `ahead` says where the next ones lie.
    #[inline(always)]
    pub fn add<T: Element, M: Mask<T>>(
        &mut self,
        slice: &Slice<T>,
        channel: &Channel<T::Real>,
        mean: f64,
        ahead: Ahead,
    ) {
        let mut rooms = [T::ROOM; 3];
        const { assert!(LANES <= T::CHUNK) };
        // As for the distances.
        let mut left = *slice;
        while left.x.len() >= LANES {
            let values = left.part(0..LANES);
            values.prefetch::<M>(ahead);
            let load = values.load::<M>(&mut rooms);
            let (gs, gxs) = (&mut self.g.whole.0, &mut self.gx.whole.0);
            for i in 0..values.x.len() {
                let (x, g) = load(i, channel);
                gs[i] += g.to_f64();
                gxs[i] += g.to_f64() * (x.to_f64() - mean);
            }
            left = left.part(LANES..left.x.len());
        }
        let len = left.x.len();
        let (gs, gxs) = (self.g.rest(len), self.gx.rest(len));
        let load = left.load::<M>(&mut rooms);
        for i in 0..len {
            let (x, g) = load(i, channel);
            gs[i] += g.to_f64();
            gxs[i] += g.to_f64() * (x.to_f64() - mean);
        }
    }
}
