//! What is known of a row, and which weight and bias belong to its values.

use std::ops::Range;

use super::Spec;
use crate::ops::loops::convert::Real;
use crate::ops::loops::element::{in_two, Channel, Channels, Same};
use crate::ops::loops::Params;

/// The statistics of a row, as numbers to compute with.
#[derive(Clone, Copy)]
pub(super) struct Row<A> {
    pub mean: f64,
    pub var: f64,
    pub rstd: f64,
    hi: A,
    lo: A,
}

impl<A: Real> Row<A> {
    #[inline(always)]
    pub fn new(spec: &Spec, mean: f64, var: f64) -> Self {
        let (hi, lo) = in_two(mean);
        Self {
            mean,
            var,
            rstd: spec.rstd(var),
            hi,
            lo,
        }
    }

    fn channel(&self, weight: f64, bias: f64) -> Channel<A> {
        Channel {
            hi: self.hi,
            lo: self.lo,
            scale: A::from_f64(weight * self.rstd),
            shift: A::from_f64(bias),
        }
    }
}

/// What a row needs for `dx = scale·g - rstd·(mean_h + (x - mean)·slope)`, `scale = rstd·weight`.
///
/// With `h = weight·g`, `mean_h = Σh / len` and `slope = rstd²·Σ(h·(x - mean)) / len`.
#[derive(Clone, Copy)]
pub(super) struct RowGrad<A> {
    rstd: A,
    mean_h: A,
    slope: A,
}

impl<A: Real> RowGrad<A> {
    /// From `Σh` and `Σ(h·(x - mean))`.
    pub fn new(spec: &Spec, row: &Row<A>, h: f64, hx: f64) -> Self {
        let len = spec.rows.len() as f64;
        Self {
            rstd: A::from_f64(row.rstd),
            mean_h: A::from_f64(if spec.remove_mean { h / len } else { 0.0 }),
            slope: A::from_f64(row.rstd * row.rstd * hx / len),
        }
    }

    #[inline(always)]
    pub fn dx(&self, channel: &Channel<A>, x: A, g: A) -> A {
        channel.scale * g - self.rstd * (self.mean_h + channel.centre(x) * self.slope)
    }
}

/// Which weight and bias belong to the values of a sample.
pub(super) trait Affine<A: Real>: Sync {
    type Channels<'a>: Channels<Channel<A>>
    where
        Self: 'a,
        A: 'a;

    /// The values of a row from `start` on, counted in the sample, in runs: each with the range of it,
    /// counted from `start`.
    fn runs<'a>(
        &'a self,
        row: &'a Row<A>,
        start: usize,
        len: usize,
    ) -> impl Iterator<Item = (Range<usize>, Self::Channels<'a>)>;
}

/// One of each for a plane of `s` values.
pub(super) struct ByPlane<'a> {
    pub params: &'a Params,
    s: usize,
}

impl<'a> ByPlane<'a> {
    pub fn new(params: &'a Params, s: usize) -> Self {
        Self { params, s }
    }

    /// The runs of [`Affine::runs`] with the channel of each.
    #[inline(always)]
    pub fn planes(&self, start: usize, len: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
        let (s, mut next) = (self.s, 0);
        std::iter::from_fn(move || {
            if next >= len {
                return None;
            }
            let (channel, begin) = ((start + next) / s, next);
            next = len.min((channel + 1) * s - start);
            Some((begin..next, channel))
        })
    }

    #[inline(always)]
    pub fn channel<A: Real>(&self, row: &Row<A>, channel: usize) -> Channel<A> {
        row.channel(self.params.weight[channel], self.params.bias[channel])
    }
}

impl<A: Real> Affine<A> for ByPlane<'_> {
    type Channels<'a>
        = Same<Channel<A>>
    where
        Self: 'a,
        A: 'a;

    #[inline(always)]
    fn runs<'a>(
        &'a self,
        row: &'a Row<A>,
        start: usize,
        len: usize,
    ) -> impl Iterator<Item = (Range<usize>, Same<Channel<A>>)> {
        self.planes(start, len)
            .map(|(run, channel)| (run, Same(self.channel(row, channel))))
    }
}

/// One of each for every value of a sample.
pub(super) struct ByValue<A> {
    pub weight: Vec<A>,
    pub bias: Vec<A>,
}

impl<A: Real> ByValue<A> {
    pub fn new(params: &Params, s: usize) -> Self {
        let spread = |values: &[f64]| {
            let values = values.iter().map(|&value| A::from_f64(value));
            match s {
                1 => values.collect(),
                s => values
                    .flat_map(|value| std::iter::repeat_n(value, s))
                    .collect(),
            }
        };
        Self {
            weight: spread(&params.weight),
            bias: spread(&params.bias),
        }
    }

    #[inline(always)]
    pub fn channels(&self, row: &Row<A>, values: Range<usize>) -> Each<'_, A> {
        Each {
            hi: row.hi,
            lo: row.lo,
            rstd: A::from_f64(row.rstd),
            weight: &self.weight[values.clone()],
            bias: &self.bias[values],
        }
    }
}

impl<A: Real> Affine<A> for ByValue<A> {
    type Channels<'a>
        = Each<'a, A>
    where
        Self: 'a,
        A: 'a;

    #[inline(always)]
    fn runs<'a>(
        &'a self,
        row: &'a Row<A>,
        start: usize,
        len: usize,
    ) -> impl Iterator<Item = (Range<usize>, Each<'a, A>)> {
        std::iter::once((0..len, self.channels(row, start..start + len)))
    }
}

/// A row, with a weight and a bias for each of its values.
#[derive(Clone, Copy)]
pub(super) struct Each<'a, A> {
    hi: A,
    lo: A,
    rstd: A,
    pub weight: &'a [A],
    bias: &'a [A],
}

impl<A: Real> Channels<Channel<A>> for Each<'_, A> {
    #[inline(always)]
    fn part(self, range: Range<usize>) -> Self {
        Self {
            weight: &self.weight[range.clone()],
            bias: &self.bias[range],
            ..self
        }
    }

    #[inline(always)]
    fn at(&self, j: usize) -> Channel<A> {
        Channel {
            hi: self.hi,
            lo: self.lo,
            scale: self.rstd * self.weight[j],
            shift: self.bias[j],
        }
    }
}
