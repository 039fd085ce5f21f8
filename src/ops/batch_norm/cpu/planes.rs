//! A tensor `[n, c, s]`, whose channels are planes of `s` values that lie together: a group each.

use std::ops::Range;

use super::passes::{Summing, Tiling};
use super::rows::{ChannelRow, GradRow, Pair};
use super::Backward;
use crate::ops::loops::convert::{Element, Real};
use crate::ops::loops::element::{Channel, ChannelGrad, Mask, Same};
use crate::ops::loops::lanes::{moments, GradSums};
use crate::ops::loops::prefetch::Ahead;
use crate::ops::loops::sweep::{Division, Tile, PART};
use crate::shape::Dims;

pub(super) struct Planes(pub Dims);

impl Tiling for Planes {
    type Row<A: Real> = [A; 1];
    type Channels<'a, A: Real + 'a> = Same<Channel<A>>;

    fn division(&self) -> Division {
        Division {
            groups: self.0.c,
            parts: self.0.m().div_ceil(PART),
            values: self.0.numel(),
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
    fn runs(&self, tile: Tile) -> impl Iterator<Item = (Range<usize>, usize)> {
        let Dims { c, s, .. } = self.0;
        let end = tile.part * PART + self.values(tile.part);
        let mut next = tile.part * PART;
        // Plane by plane, from value `next` of the channel to `end`.
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let (n, offset) = (next / s, next % s);
            let len = (s - offset).min(end - next);
            next += len;
            let start = (n * c + tile.group) * s + offset;
            Some((start..start + len, 0))
        })
    }

    #[inline(always)]
    fn at<A: Real>(&self, row: &ChannelRow<Self, A>, _run: usize) -> Same<Channel<A>> {
        Same(Channel {
            hi: row.hi[0],
            lo: row.lo[0],
            scale: row.scale[0],
            shift: row.shift[0],
        })
    }
}

impl Summing for Planes {
    type Grads<'a, A: Real + 'a> = Same<ChannelGrad<A>>;

    fn values(&self, part: usize) -> usize {
        (self.0.m() - part * PART).min(PART)
    }

    #[inline(always)]
    fn moments<T: Element>(&self, x: &[T], tile: Tile, remove_mean: bool) -> Pair<[f64; 1]> {
        let Dims { c, s, .. } = self.0;
        let runs = || {
            self.runs(tile).map(
                #[inline(always)]
                |(run, _)| &x[run],
            )
        };
        let ahead = Ahead::in_slices::<T>(s, c * s);
        let m = self.values(tile.part) as f64;
        let (mean, squares) = moments::<true, _, _>(runs, m, remove_mean, ahead);
        Pair([mean], [squares])
    }

    #[inline(always)]
    fn grad_sums<T: Element, M: Mask<T>>(
        &self,
        job: &Backward<T>,
        tile: Tile,
        row: &ChannelRow<Self, T::Real>,
    ) -> Pair<[f64; 1]> {
        let (Same(channel), mean) = (self.at(row, 0), row.mean[0]);
        let (tensors, mut sums) = (job.tensors(), GradSums::<true>::new());
        let Dims { c, s, .. } = self.0;
        let ahead = Ahead::in_slices::<T>(s, c * s);
        for (run, _) in self.runs(tile) {
            sums.add::<T, M>(&tensors.part(run), &channel, mean, ahead);
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

/// The same tensor in the order of memory: all channels one group, for a pass that needs no sums.
pub(super) struct InOrder(pub Dims);

impl Tiling for InOrder {
    type Row<A: Real> = Vec<A>;
    type Channels<'a, A: Real + 'a> = Same<Channel<A>>;

    fn division(&self) -> Division {
        Division {
            groups: 1,
            parts: self.0.numel().div_ceil(PART),
            values: self.0.numel(),
        }
    }

    fn channels(&self, _group: usize) -> Range<usize> {
        0..self.0.c
    }

    fn repeats(&self) -> usize {
        1
    }

    fn row<A: Real>(&self, len: usize) -> Vec<A> {
        vec![A::ZERO; len]
    }

    #[inline(always)]
    fn runs(&self, tile: Tile) -> impl Iterator<Item = (Range<usize>, usize)> {
        let Dims { c, s, .. } = self.0;
        let end = self.0.numel().min((tile.part + 1) * PART);
        let mut next = tile.part * PART;
        std::iter::from_fn(move || {
            if next >= end {
                return None;
            }
            let (plane, start) = (next / s, next);
            next = end.min((plane + 1) * s);
            Some((start..next, plane % c))
        })
    }

    #[inline(always)]
    fn at<A: Real>(&self, row: &ChannelRow<Self, A>, channel: usize) -> Same<Channel<A>> {
        Same(Channel {
            hi: row.hi[channel],
            lo: row.lo[channel],
            scale: row.scale[channel],
            shift: row.shift[channel],
        })
    }
}
