//! A tensor `[n, c, s]` with a small `s` as a matrix of `n` rows and `c·s` columns, `s` of them for each
//! channel: a group is some neighbouring channels, its parts are some rows each.

use std::ops::Range;

use super::passes::Tiling;
use super::rows::{ChannelRow, GradRow, Pair};
use super::Backward;
use crate::ops::loops::convert::{Element, Real};
use crate::ops::loops::element::{Channel, ChannelGrad, Channels, Mask, Slice};
use crate::ops::loops::lanes::spread;
use crate::ops::loops::stores::Stores;
use crate::ops::loops::sweep::{Division, Outer, Tile, PART};
use crate::shape::Dims;

/// Fewer rows in a part would make its sums a burden to store and to merge.
const FEWEST_ROWS: usize = 64;

/// Columns of a group, about: its rows are long enough to be read in a stream.
const GROUP: usize = 1024;

/// Columns that are summed side by side: a matrix of not more is read from end to end, which other cores, where its
/// values have just been computed, hand over faster than parts of its rows.
const STRIP: usize = 256;

/// Numbers where registers are loaded from one line of the cache.
#[repr(align(64))]
struct Aligned<T>(T);

/// Rows that are added up before they are added to the sums.
const ROWS: usize = 4;

pub(super) struct Columns {
    dims: Dims,
    /// Channels of a group.
    channels: usize,
    /// Of a part.
    rows: usize,
}

impl Columns {
    pub fn new(dims: Dims) -> Self {
        let channels = (GROUP / dims.s).clamp(1, dims.c);
        Self {
            dims,
            channels,
            rows: (PART / (channels * dims.s)).max(FEWEST_ROWS),
        }
    }

    /// The columns of a group.
    fn columns(&self, group: usize) -> Range<usize> {
        let Range { start, end } = self.channels(group);
        start * self.dims.s..end * self.dims.s
    }

    /// The values of a tile and those of the other columns in between: where they begin and end.
    fn extent(&self, tile: Tile) -> Range<usize> {
        let (first, stride) = (tile.part * self.rows, self.dims.c * self.dims.s);
        let columns = self.columns(tile.group);
        let last = first + self.values(tile.part) - 1;
        first * stride + columns.start..last * stride + columns.end
    }

    /// Calls `f` for each strip of a group's columns, counted from the first.
    #[inline(always)]
    fn strips(&self, group: usize, mut f: impl FnMut(Range<usize>)) {
        let (len, mut start) = (self.columns(group).len(), 0);
        while start < len {
            let end = len.min(start + STRIP);
            f(start..end);
            start = end;
        }
    }
}

impl Tiling for Columns {
    type Row<A: Real> = Vec<A>;
    type Channels<'a, A: Real + 'a> = ChannelSlices<'a, A>;
    type Grads<'a, A: Real + 'a> = GradSlices<'a, A>;

    fn division(&self) -> Division {
        Division {
            groups: self.dims.c.div_ceil(self.channels),
            parts: self.dims.n.div_ceil(self.rows),
            values: self.dims.numel(),
            sums: self.channels * self.dims.s,
            outer: Outer::Parts,
        }
    }

    fn channels(&self, group: usize) -> Range<usize> {
        let start = group * self.channels;
        start..self.dims.c.min(start + self.channels)
    }

    fn repeats(&self) -> usize {
        self.dims.s
    }

    fn row<A: Real>(&self, len: usize) -> Vec<A> {
        vec![A::ZERO; len]
    }

    #[inline(always)]
    fn runs(&self, tile: Tile) -> impl Iterator<Item = Range<usize>> {
        let stride = self.dims.c * self.dims.s;
        let columns = self.columns(tile.group);
        let first = tile.part * self.rows;
        let rows = first..first + self.values(tile.part);
        rows.map(move |row| row * stride + columns.start..row * stride + columns.end)
    }

    #[inline(always)]
    fn at<'a, A: Real>(&self, row: &'a ChannelRow<Self, A>) -> ChannelSlices<'a, A> {
        ChannelSlices {
            hi: &row.hi,
            lo: &row.lo,
            scale: &row.scale,
            shift: &row.shift,
        }
    }

    // The runs of a row lie close to each other.
    #[inline(always)]
    fn with_stores<T, R>(&self, f: impl FnOnce(&Stores) -> R) -> R {
        f(&Stores::CACHED)
    }

    fn values(&self, part: usize) -> usize {
        (self.dims.n - part * self.rows).min(self.rows)
    }

    #[inline(always)]
    fn moments<T: Element>(&self, x: &[T], tile: Tile, remove_mean: bool) -> Pair<Vec<f64>> {
        let (m, stride) = (self.values(tile.part) as f64, self.dims.c * self.dims.s);
        let x = &x[self.extent(tile)];
        let len = self.columns(tile.group).len();
        let (mut means, mut squares) = (self.row(len), self.row(len));
        self.strips(
            tile.group,
            #[inline(always)]
            |columns| {
                // As for planes: a constant column has exactly its value as mean.
                let Aligned(pivot) = &mut Aligned([0.0; STRIP]);
                if remove_mean {
                    for (pivot, x) in pivot.iter_mut().zip(&x[columns.clone()]) {
                        *pivot = x.to_f64();
                    }
                }
                let mut mean = [0.0; STRIP];
                let mut square = [0.0; STRIP];
                if T::SQUARES_FIT && remove_mean {
                    let Aligned(sums) = &mut Aligned([[0.0; STRIP]; 2]);
                    add_rows(
                        sums,
                        x,
                        stride,
                        &columns,
                        #[inline(always)]
                        |j, x| [x - pivot[j], (x - pivot[j]) * (x - pivot[j])],
                    );
                    let [sum, squares] = &*sums;
                    for j in 0..STRIP {
                        mean[j] = pivot[j] + sum[j] / m;
                        square[j] = spread(sum[j], squares[j], m);
                    }
                } else {
                    if remove_mean {
                        let Aligned(sums) = &mut Aligned([[0.0; STRIP]]);
                        add_rows(
                            sums,
                            x,
                            stride,
                            &columns,
                            #[inline(always)]
                            |j, x| [x - pivot[j]],
                        );
                        for j in 0..STRIP {
                            mean[j] = pivot[j] + sums[0][j] / m;
                        }
                    }
                    let Aligned(squares) = &mut Aligned([[0.0; STRIP]]);
                    add_rows(
                        squares,
                        x,
                        stride,
                        &columns,
                        #[inline(always)]
                        |j, x| [(x - mean[j]) * (x - mean[j])],
                    );
                    square = squares[0];
                }
                means[columns.clone()].copy_from_slice(&mean[..columns.len()]);
                squares[columns.clone()].copy_from_slice(&square[..columns.len()]);
            },
        );
        Pair(means, squares)
    }

    #[inline(always)]
    fn grad_sums<T: Element, M: Mask<T>>(
        &self,
        job: &Backward<T>,
        tile: Tile,
        channels: &ChannelRow<Self, T::Real>,
    ) -> Pair<Vec<f64>> {
        let stride = self.dims.c * self.dims.s;
        let tensors = job.tensors().part(self.extent(tile));
        let len = self.columns(tile.group).len();
        let (mut gs, mut gxs) = (self.row(len), self.row(len));
        self.strips(
            tile.group,
            #[inline(always)]
            |columns| {
                let channel = self.at(channels);
                let mut sums = StripSums::<T::Real>::new(channel, &channels.mean, &columns);
                let mut rooms = [T::ROOM; 3];
                let mut row = columns.clone();
                while row.end <= tensors.x.len() {
                    sums.add::<T, M>(&tensors.part(row.clone()), &mut rooms);
                    row = row.start + stride..row.end + stride;
                }
                gs[columns.clone()].copy_from_slice(&sums.g[..columns.len()]);
                gxs[columns.clone()].copy_from_slice(&sums.gx[..columns.len()]);
            },
        );
        Pair(gs, gxs)
    }

    #[inline(always)]
    fn grad_at<'a, A: Real>(&self, row: &'a GradRow<Self, A>) -> GradSlices<'a, A> {
        GradSlices {
            mean_g: &row.mean_g,
            slope: &row.slope,
        }
    }
}

/// Adds the numbers `f(j, value)` of column `j` of a strip to `sums[…][j]`, for all rows of `x`, the last
/// of which may be shorter than the `stride` from row to row.
#[inline(always)]
fn add_rows<T: Element, const N: usize>(
    sums: &mut [[f64; STRIP]; N],
    x: &[T],
    stride: usize,
    columns: &Range<usize>,
    f: impl Fn(usize, f64) -> [f64; N],
) {
    const { assert!(STRIP <= T::CHUNK) };
    let width = columns.len().min(STRIP);
    let count = (x.len() - columns.end) / stride + 1;
    let row = |i: usize| &x[i * stride + columns.start..][..width];
    let in_fours = count - count % ROWS;
    let mut rooms = [T::ROOM; ROWS];
    for i in (0..in_fours).step_by(ROWS) {
        let [a, b, c, d] = &mut rooms;
        let (a, b) = (T::load(row(i), a), T::load(row(i + 1), b));
        let (c, d) = (T::load(row(i + 2), c), T::load(row(i + 3), d));
        for j in 0..width {
            let rows = [a(j), b(j), c(j), d(j)];
            let [a, b, c, d] = [
                f(j, rows[0].to_f64()),
                f(j, rows[1].to_f64()),
                f(j, rows[2].to_f64()),
                f(j, rows[3].to_f64()),
            ];
            for k in 0..N {
                sums[k][j] += (a[k] + b[k]) + (c[k] + d[k]);
            }
        }
    }
    for i in in_fours..count {
        let row = T::load(row(i), &mut rooms[0]);
        for j in 0..width {
            let add = f(j, row(j).to_f64());
            for k in 0..N {
                sums[k][j] += add[k];
            }
        }
    }
}

/// The sums of the backward pass over a strip, with what they need of its channels.
#[repr(align(64))]
struct StripSums<A> {
    hi: [A; STRIP],
    lo: [A; STRIP],
    scale: [A; STRIP],
    shift: [A; STRIP],
    mean: [f64; STRIP],
    g: [f64; STRIP],
    gx: [f64; STRIP],
}

impl<A: Real> StripSums<A> {
    #[inline(always)]
    fn new(channels: ChannelSlices<A>, mean: &[f64], columns: &Range<usize>) -> Self {
        let copy = |from: &[A]| {
            let mut to = [A::ZERO; STRIP];
            to[..columns.len()].copy_from_slice(&from[columns.clone()]);
            to
        };
        let mut means = [0.0; STRIP];
        means[..columns.len()].copy_from_slice(&mean[columns.clone()]);
        Self {
            hi: copy(channels.hi),
            lo: copy(channels.lo),
            scale: copy(channels.scale),
            shift: copy(channels.shift),
            mean: means,
            g: [0.0; STRIP],
            gx: [0.0; STRIP],
        }
    }

    /// Adds a row.
    #[inline(always)]
    fn add<T: Element<Real = A>, M: Mask<T>>(&mut self, row: &Slice<T>, rooms: &mut [T::Room; 3]) {
        let width = row.x.len().min(STRIP);
        let row = row.part(0..width);
        let load = row.load::<M>(rooms);
        for j in 0..width {
            let channel = Channel {
                hi: self.hi[j],
                lo: self.lo[j],
                scale: self.scale[j],
                shift: self.shift[j],
            };
            let (x, g) = load(j, &channel);
            self.g[j] += g.to_f64();
            self.gx[j] += g.to_f64() * (x.to_f64() - self.mean[j]);
        }
    }
}

/// A [`Channel`] for each value of a row, field by field so that loops over them vectorise.
#[derive(Clone, Copy)]
pub(super) struct ChannelSlices<'a, A> {
    hi: &'a [A],
    lo: &'a [A],
    scale: &'a [A],
    shift: &'a [A],
}

impl<A: Real> Channels<Channel<A>> for ChannelSlices<'_, A> {
    #[inline(always)]
    fn part(self, range: Range<usize>) -> Self {
        Self {
            hi: &self.hi[range.clone()],
            lo: &self.lo[range.clone()],
            scale: &self.scale[range.clone()],
            shift: &self.shift[range.clone()],
        }
    }

    #[inline(always)]
    fn at(&self, j: usize) -> Channel<A> {
        Channel {
            hi: self.hi[j],
            lo: self.lo[j],
            scale: self.scale[j],
            shift: self.shift[j],
        }
    }
}

/// A [`ChannelGrad`] for each value of a row.
#[derive(Clone, Copy)]
pub(super) struct GradSlices<'a, A> {
    mean_g: &'a [A],
    slope: &'a [A],
}

impl<A: Real> Channels<ChannelGrad<A>> for GradSlices<'_, A> {
    #[inline(always)]
    fn part(self, range: Range<usize>) -> Self {
        Self {
            mean_g: &self.mean_g[range.clone()],
            slope: &self.slope[range.clone()],
        }
    }

    #[inline(always)]
    fn at(&self, j: usize) -> ChannelGrad<A> {
        ChannelGrad {
            mean_g: self.mean_g[j],
            slope: self.slope[j],
        }
    }
}
