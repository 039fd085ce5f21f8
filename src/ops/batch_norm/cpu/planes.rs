//! A tensor `[n, c, s]`, whose channels are planes of `s` values that lie together: a group each.

use std::ops::Range;

use super::outputs::{GradParts, YParts};
use super::passes::{plain_grads, plain_y, Summing, Tiling};
use super::pooling::{windows_of, Pooling};
use super::rows::{ChannelRow, GradRow, Pair};
use super::{Backward, Forward, Spec};
use crate::ops::loops::convert::{Element, Real};
use crate::ops::loops::element::{Channel, ChannelGrad, Mask, Same};
use crate::ops::loops::lanes::{moments, GradSums};
use crate::ops::loops::prefetch::Ahead;
use crate::ops::loops::sweep::{Division, Tile, PART};
use crate::ops::max_pool2d::windows::Windows;
use crate::shape::Dims;

pub(super) struct AnyPlanes<const POOLED: bool> {
    dims: Dims,
    /// Values of a part.
    part: usize,
}

pub(super) type Planes = AnyPlanes<false>;

/// With a maximum over windows behind the normalisation, which takes planes as a whole.
pub(super) type PooledPlanes = AnyPlanes<true>;

impl<const POOLED: bool> AnyPlanes<POOLED> {
    pub fn new(spec: &Spec) -> Self {
        let (dims, s) = (spec.dims, spec.dims.s);
        let part = if POOLED { (PART / s).max(1) * s } else { PART };
        Self { dims, part }
    }

    fn pooling<'a, T: Element>(
        &self,
        spec: &'a Spec,
        row: &ChannelRow<Self, T::Real>,
    ) -> Option<Pooling<'a, T>> {
        let windows = spec.windows.as_ref().filter(|_| POOLED)?;
        Some(Pooling::new(windows, spec.activation, self.at(row, 0).0))
    }
}

impl<const POOLED: bool> Tiling for AnyPlanes<POOLED> {
    type Row<A: Real> = [A; 1];
    type Channels<'a, A: Real + 'a> = Same<Channel<A>>;

    fn division(&self) -> Division {
        Division {
            groups: self.dims.c,
            parts: self.dims.m().div_ceil(self.part),
            values: self.dims.numel(),
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
        let Dims { c, s, .. } = self.dims;
        let end = tile.part * self.part + self.values(tile.part);
        let mut next = tile.part * self.part;
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

    #[inline(always)]
    fn write_y<T: Element>(
        &self,
        job: &Forward<T>,
        tile: Tile,
        row: &ChannelRow<Self, T::Real>,
        to: YParts<T>,
    ) {
        let Some(mut pooling) = self.pooling::<T>(job.spec, row) else {
            return plain_y(self, job, tile, row, to);
        };
        assert!(job.residual.is_none(), "no pooling behind a residual");
        for (plane, _) in self.runs(tile) {
            let windows = windows_of(pooling.windows, &plane);
            // SAFETY: each run is a plane of its own, and so are its windows.
            let y = unsafe { to.y.part(windows.clone()) };
            // SAFETY: as above.
            let maxima = to.maxima.map(|maxima| unsafe { maxima.part(windows) });
            pooling.write_y(&job.x[plane.start..], y, maxima);
        }
    }
}

impl<const POOLED: bool> Summing for AnyPlanes<POOLED> {
    type Grads<'a, A: Real + 'a> = Same<ChannelGrad<A>>;

    fn values(&self, part: usize) -> usize {
        (self.dims.m() - part * self.part).min(self.part)
    }

    #[inline(always)]
    fn moments<T: Element>(&self, x: &[T], tile: Tile, remove_mean: bool) -> Pair<[f64; 1]> {
        let Dims { c, s, .. } = self.dims;
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
        let windows = job.spec.windows.as_ref().filter(|_| POOLED);
        let s = windows.map_or(self.dims.s, Windows::outputs);
        let ahead = Ahead::in_slices::<T>(s, self.dims.c * s);
        for (run, _) in self.runs(tile) {
            let run = match windows {
                Some(windows) => windows_of(windows, &run),
                None => run,
            };
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

    #[inline(always)]
    fn write_grads<T: Element, M: Mask<T>>(
        &self,
        job: &Backward<T>,
        tile: Tile,
        row: &ChannelRow<Self, T::Real>,
        grads: &GradRow<Self, T::Real>,
        to: GradParts<T>,
    ) {
        let Some(mut pooling) = self.pooling::<T>(job.spec, row) else {
            return plain_grads::<_, T, M>(self, job, tile, row, grads, to);
        };
        assert!(to.dresidual.is_none(), "no pooling behind a residual");
        let Some(dx) = to.dx else { return };
        let (Same(channel), Same(grad)) = (self.at(row, 0), self.grad_at(grads));
        for (plane, _) in self.runs(tile) {
            let (x, dy) = (
                &job.x[plane.start..],
                &job.dy[windows_of(pooling.windows, &plane).start..],
            );
            // SAFETY: each run is a plane of its own.
            let dx = unsafe { dx.part(plane) };
            if job.spec.training {
                pooling.write_dx(x, dy, dx, |x, g| grad.dx(&channel, x, g));
            } else {
                pooling.write_dx(x, dy, dx, |_, g| channel.scale * g);
            }
        }
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
