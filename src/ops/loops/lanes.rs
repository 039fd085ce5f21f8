//! Sums over slices, side by side in lanes.

use std::ops::Range;

use super::convert::{Element, Real};
use super::element::{Channel, Channels, Mask, Slice};
use super::prefetch::Ahead;

/// Enough sums side by side that none has to wait for itself, and few enough that two times as many stay in registers, those of AVX2 too.
pub(crate) const LANES: usize = 16;

/// A sum in `f64`, added up in a fixed order.
struct Sum {
    lanes: Lanes,
    /// Of slices that do not fill the lanes once.
    short: f64,
}

/// On cache lines: where a register is stored across two of them, the next one to read it waits.
#[repr(align(64))]
struct Lanes([f64; LANES]);

impl Lanes {
    #[inline(always)]
    fn new() -> Self {
        Self([0.0; LANES])
    }
}

impl Sum {
    #[inline(always)]
    fn new() -> Self {
        Self {
            lanes: Lanes::new(),
            short: 0.0,
        }
    }

    #[inline(always)]
    fn total(&self) -> f64 {
        total(&self.lanes.0) + self.short
    }
}

/// A cache line.
#[repr(align(64))]
struct Line([f64; 8]);

/// The sum of all lanes, by halves.
#[inline(always)]
pub(crate) fn total(lanes: &[f64; LANES]) -> f64 {
    let mut eight = Line([0.0; 8]);
    for i in 0..8 {
        eight.0[i] = lanes[i] + lanes[i + 8];
    }
    // Through memory: the compiler would take wide registers apart to add up their numbers one by one, and for that it even keeps the
    // lanes out of registers while they are added to, which takes twice the time.
    let Line([a, b, c, d, e, f, g, h]) = std::hint::black_box(eight);
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// Adds up `len` values: calls `block` for the ranges of [`LANES`] of them, or `one` for each of fewer; both have to be inlined.
///
/// Sums stay in registers where every loop goes over all lanes. What is left behind the last whole block is therefore the end of a
/// further one, which begins with values that have been counted: `block` gets the number of these.
#[inline(always)]
fn blocks<S>(
    sums: &mut S,
    len: usize,
    mut block: impl FnMut(&mut S, Range<usize>, usize),
    mut one: impl FnMut(&mut S, usize),
) {
    let mut start = 0;
    while start + LANES <= len {
        block(sums, start..start + LANES, 0);
        start += LANES;
    }
    if start == 0 {
        for i in 0..len {
            one(sums, i);
        }
    } else if start < len {
        block(sums, len - LANES..len, start + LANES - len);
    }
}

/// The factors where there are none.
#[inline(always)]
pub(crate) fn ones(_range: Range<usize>) -> impl Fn(usize) -> f64 {
    #[inline(always)]
    |_| 1.0
}

/// `value`, or 0 if value `i` of a block is one of those that have been counted.
#[inline(always)]
fn unseen(i: usize, seen: usize, value: f64) -> f64 {
    if i < seen {
        0.0
    } else {
        value
    }
}

impl Sum {
    /// Adds `f` of every value.
    #[inline(always)]
    fn add<T: Element>(&mut self, values: &[T], ahead: Ahead, f: impl Fn(f64) -> f64) {
        const { assert!(LANES <= T::CHUNK) };
        let mut room = T::ROOM;
        blocks(
            self,
            values.len(),
            #[inline(always)]
            |sum, range, seen| {
                let block = &values[range];
                ahead.of(block);
                let values = T::load(block, &mut room);
                for i in 0..block.len() {
                    sum.lanes.0[i] += unseen(i, seen, f(values(i).to_f64()));
                }
            },
            #[inline(always)]
            |sum, i| sum.short += f(values[i].to_f64()),
        );
    }
}

/// The sum of values.
#[inline(always)]
pub(crate) fn sum<T: Element>(values: &[T]) -> f64 {
    let mut sum = Sum::new();
    sum.add(values, Ahead::IN_LINE, |x| x);
    sum.total()
}

/// `Σd` and `Σd²` of the distances `d` from a pivot.
struct Distances {
    sum: Sum,
    squares: Sum,
}

impl Distances {
    #[inline(always)]
    fn new() -> Self {
        Self {
            sum: Sum::new(),
            squares: Sum::new(),
        }
    }

    #[inline(always)]
    fn add<T: Element>(&mut self, values: &[T], ahead: Ahead, pivot: f64) {
        const { assert!(LANES <= T::CHUNK) };
        let mut room = T::ROOM;
        blocks(
            self,
            values.len(),
            #[inline(always)]
            |sums, range, seen| {
                let block = &values[range];
                ahead.of(block);
                let values = T::load(block, &mut room);
                for i in 0..block.len() {
                    let distance = unseen(i, seen, values(i).to_f64() - pivot);
                    sums.sum.lanes.0[i] += distance;
                    sums.squares.lanes.0[i] += distance * distance;
                }
            },
            #[inline(always)]
            |sums, i| {
                let distance = values[i].to_f64() - pivot;
                sums.sum.short += distance;
                sums.squares.short += distance * distance;
            },
        );
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
pub(crate) fn moments<'a, T: Element, I: Iterator<Item = &'a [T]>>(
    runs: impl Fn() -> I,
    m: f64,
    remove_mean: bool,
    ahead: Ahead,
) -> (f64, f64) {
    // With the first value taken off, the mean of constant values is exactly their value.
    let first = || runs().next().map_or(0.0, |run| run[0].to_f64());
    if T::SQUARES_FIT && remove_mean {
        let (pivot, mut distances) = (first(), Distances::new());
        for run in runs() {
            distances.add(run, ahead, pivot);
        }
        let (sum, squares) = (distances.sum.total(), distances.squares.total());
        return (pivot + sum / m, spread(sum, squares, m));
    }
    let mut mean = 0.0;
    if remove_mean {
        let (pivot, mut sum) = (first(), Sum::new());
        for run in runs() {
            sum.add(run, ahead, |x| x - pivot);
        }
        mean = pivot + sum.total() / m;
    }
    let mut squares = Sum::new();
    for run in runs() {
        squares.add(run, ahead, |x| (x - mean) * (x - mean));
    }
    (mean, squares.total())
}

/// `Σg` and `Σ(g·(x - mean))`, each `g` with a factor.
pub(crate) struct GradSums {
    g: Sum,
    gx: Sum,
}

impl GradSums {
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            g: Sum::new(),
            gx: Sum::new(),
        }
    }

    #[inline(always)]
    pub fn totals(&self) -> (f64, f64) {
        (self.g.total(), self.gx.total())
    }

    /// Adds the values of a slice; `ahead` says where the next ones lie. `weights` gives the factors of `g` for a range of the slice.
    #[inline(always)]
    pub fn add<T: Element, M: Mask<T>, W: Fn(usize) -> f64>(
        &mut self,
        slice: &Slice<T>,
        channels: impl Channels<Channel<T::Real>>,
        weights: impl Fn(Range<usize>) -> W,
        mean: f64,
        ahead: Ahead,
    ) {
        const { assert!(LANES <= T::CHUNK) };
        let mut rooms = [T::ROOM; 3];
        blocks(
            self,
            slice.x.len(),
            #[inline(always)]
            |sums, range, seen| {
                let (channels, weight) = (channels.part(range.clone()), weights(range.clone()));
                let values = slice.part(range);
                values.prefetch::<M>(ahead);
                let load = values.load::<M>(&mut rooms);
                for i in 0..values.x.len() {
                    let (x, g) = load(i, &channels.at(i));
                    let (weight, g) = (weight(i), g.to_f64());
                    sums.g.lanes.0[i] += unseen(i, seen, weight * g);
                    sums.gx.lanes.0[i] += unseen(i, seen, weight * (g * (x.to_f64() - mean)));
                }
            },
            #[inline(always)]
            |sums, i| {
                let (channels, weight) = (channels.part(i..i + 1), weights(i..i + 1)(0));
                let value = slice.part(i..i + 1);
                let (x, g) = value.load::<M>(&mut [T::ROOM; 3])(0, &channels.at(0));
                let g = g.to_f64();
                sums.g.short += weight * g;
                sums.gx.short += weight * (g * (x.to_f64() - mean));
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::ops::loops::element::{NoMask, Same};

    /// Whole numbers, whose sums are exact in any order.
    fn numbers(len: usize, step: usize) -> impl Iterator<Item = f64> + Clone {
        (0..len).map(move |i| ((i + 1) * step % 23) as f64 - 9.0)
    }

    /// Slices of every length up to four blocks, and another one behind each.
    fn for_lengths(check: impl Fn([usize; 2])) {
        for len in 0..=4 * LANES {
            check([len, (len * 7 + 1) % (2 * LANES)]);
        }
    }

    fn check_moments<T: Element>(of: impl Fn(f64) -> T + Copy) {
        for_lengths(|lens| {
            let slices = lens.map(|len| numbers(len, 5).map(of).collect::<Vec<_>>());
            let all = || lens.into_iter().flat_map(|len| numbers(len, 5));
            let pivot = 2.0;
            let (mut distances, mut sum) = (Distances::new(), Sum::new());
            for slice in &slices {
                distances.add(slice, Ahead::IN_LINE, pivot);
                sum.add(slice, Ahead::IN_LINE, |x| x * x * x);
            }
            let expected = |power| all().map(|x| (x - pivot).powi(power)).sum::<f64>();
            assert_eq!(distances.sum.total(), expected(1), "{lens:?}");
            assert_eq!(distances.squares.total(), expected(2), "{lens:?}");
            assert_eq!(
                sum.total(),
                all().map(|x| x.powi(3)).sum::<f64>(),
                "{lens:?}"
            );
        });
    }

    #[test]
    fn every_value_of_slices_of_any_length_is_added_once() {
        check_moments(|x| x as f32);
        check_moments(|x| x);
        check_moments(bf16::from_f64);
        check_moments(f16::from_f64);
    }

    #[test]
    fn every_gradient_of_slices_of_any_length_is_added_once() {
        for_lengths(|lens| {
            let (mut sums, mean) = (GradSums::new(), 3.0);
            let mut expected = (0.0, 0.0);
            for len in lens {
                let [x, dy, weights] = [5, 7, 11].map(|step| numbers(len, step));
                for ((x, dy), weight) in x.clone().zip(dy.clone()).zip(weights.clone()) {
                    expected.0 += weight * dy;
                    expected.1 += weight * dy * (x - mean);
                }
                let (x, dy): (Vec<_>, Vec<_>) = (x.collect(), dy.collect());
                let weights: Vec<_> = weights.collect();
                let (x, dy) = (&x[..], &dy[..]);
                let of = |range: Range<usize>| {
                    let weights = &weights[range];
                    |i: usize| weights[i]
                };
                let channel = Same(Channel::new(0.0, 1.0, 1.0, 0.0));
                let slice = Slice { x, dy, y: x };
                sums.add::<f64, NoMask, _>(&slice, channel, of, mean, Ahead::IN_LINE);
            }
            assert_eq!(sums.totals(), expected, "{lens:?}");
        });
    }
}
