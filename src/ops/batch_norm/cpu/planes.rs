//! A tensor `[n, c, s]`, whose channels are planes of `s` values that lie together: a group each.

use std::ops::Range;

use super::passes::Tiling;
use super::rows::{ChannelRow, GradRow, Pair};
use super::Backward;
use crate::ops::cache;
use crate::ops::loops::convert::{Element, Real};
use crate::ops::loops::element::{Channel, ChannelGrad, Mask, Same};
use crate::ops::loops::lanes::{moments, ones, GradSums};
use crate::ops::loops::prefetch::Ahead;
use crate::ops::loops::stores::Stores;
use crate::ops::loops::sweep::{Division, Outer, Tile};
use crate::ops::parallel::threads;
use crate::shape::Dims;

/// Values of a part of a long channel, about.
const PART_OF_CHANNEL: usize = 1 << 14;

/// No fewer values are a part: what is done for a part's sums would take as long.
const SMALLEST_PART: usize = 1 << 11;

/// Parts of a channel of some of the smallest ones: the number of threads that there often are.
const FEWEST_PARTS: usize = 4;

/// Tiles of a tensor with few channels, for more threads than these are.
const FEWEST_TILES: usize = 32;

pub(super) struct Planes {
    dims: Dims,
    /// Parts of a channel, as a power of 2.
    log_parts: u32,
    /// What of a channel is shared out among the parts, planes or values, and how many values each of these has.
    pieces: [usize; 2],
}

impl Planes {
    pub fn new(dims: Dims) -> Self {
        let (Dims { n, c, s }, m) = (dims, dims.m());
        // A power of two, as batches and numbers of threads often are: then a thread mostly gets the parts of those samples that it
        // has computed in the op before.
        let parts = if m < FEWEST_PARTS * SMALLEST_PART {
            1
        } else {
            let parts = (m / PART_OF_CHANNEL).max(FEWEST_TILES / c);
            let parts = parts.clamp(FEWEST_PARTS, m / SMALLEST_PART);
            parts.next_power_of_two()
        };
        // Parts begin with a plane, if they are about as long as each other then.
        let by_plane = n.is_multiple_of(parts) || n >= 4 * parts;
        Self {
            dims,
            log_parts: parts.ilog2(),
            pieces: if by_plane { [n, s] } else { [m, 1] },
        }
    }

    fn parts(&self) -> usize {
        1 << self.log_parts
    }

    /// Where in a channel a part begins.
    #[inline(always)]
    fn start(&self, part: usize) -> usize {
        let [pieces, len] = self.pieces;
        // Not `part * pieces / parts`, which is too large a number where `usize` has 32 bits.
        let left = pieces & (self.parts() - 1);
        (part * (pieces >> self.log_parts) + ((part * left) >> self.log_parts)) * len
    }
}

impl Tiling for Planes {
    type Row<A: Real> = [A; 1];
    type Channels<'a, A: Real + 'a> = Same<Channel<A>>;
    type Grads<'a, A: Real + 'a> = Same<ChannelGrad<A>>;

    fn division(&self) -> Division {
        Division {
            groups: self.dims.c,
            parts: self.parts(),
            values: self.dims.numel(),
            sums: 1,
            outer: Outer::Parts,
        }
    }

    fn channels(&self, group: usize) -> Range<usize> {
        group..group + 1
    }

    fn repeats(&self) -> usize {
        1
    }

    fn row<A: Real>(&self, _len: usize) -> [A; 1] {
        [A::ZERO]
    }

    #[inline(always)]
    fn runs(&self, tile: Tile) -> impl Iterator<Item = Range<usize>> {
        let Dims { c, s, .. } = self.dims;
        let end = self.start(tile.part + 1);
        let mut next = self.start(tile.part);
        // Plane by plane, from value `next` of the channel to `end`.
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let (n, offset) = (next / s, next % s);
            let len = (s - offset).min(end - next);
            next += len;
            let start = (n * c + tile.group) * s + offset;
            Some(start..start + len)
        })
    }

    #[inline(always)]
    fn at<A: Real>(&self, row: &ChannelRow<Self, A>) -> Same<Channel<A>> {
        Same(Channel {
            hi: row.hi[0],
            lo: row.lo[0],
            scale: row.scale[0],
            shift: row.shift[0],
        })
    }

    #[inline(always)]
    fn with_stores<T, R>(&self, f: impl FnOnce(&Stores) -> R) -> R {
        let (channel, s) = (self.dims.m() * size_of::<T>(), self.dims.s);
        // A thread goes from a channel to the next one, whose planes follow in memory. Both tensors of both of them have
        // to stay in the cache, for every thread.
        let next = (self.division().is_for_groups() && cache::holds(4 * threads() * channel))
            .then(|| Ahead::in_next_slice::<T>(s));
        Stores::far_apart::<T, _>(self.dims.numel(), s, next, f)
    }

    fn values(&self, part: usize) -> usize {
        self.start(part + 1) - self.start(part)
    }

    #[inline(always)]
    fn moments<T: Element>(&self, x: &[T], tile: Tile, remove_mean: bool) -> Pair<[f64; 1]> {
        let Dims { n, c, s } = self.dims;
        let runs = || {
            self.runs(tile).map(
                #[inline(always)]
                |run| &x[run],
            )
        };
        let ahead = Ahead::in_slices::<T>(n, s, c * s);
        let m = self.values(tile.part) as f64;
        let (mean, squares) = moments(runs, m, remove_mean, ahead);
        Pair([mean], [squares])
    }

    #[inline(always)]
    fn grad_sums<T: Element, M: Mask<T>>(
        &self,
        job: &Backward<T>,
        tile: Tile,
        row: &ChannelRow<Self, T::Real>,
    ) -> Pair<[f64; 1]> {
        let (channel, mean) = (self.at(row), row.mean[0]);
        let (tensors, mut sums) = (job.tensors(), GradSums::new());
        let Dims { n, c, s } = self.dims;
        let ahead = Ahead::in_slices::<T>(n, s, c * s);
        for run in self.runs(tile) {
            sums.add::<T, M, _>(&tensors.part(run), channel, ones, mean, ahead);
        }
        let (g, gx) = sums.totals();
        Pair([g], [gx])
    }

    #[inline(always)]
    fn grad_at<A: Real>(&self, row: &GradRow<Self, A>) -> Same<ChannelGrad<A>> {
        Same(ChannelGrad {
            mean_g: row.mean_g[0],
            slope: row.slope[0],
        })
    }
}
