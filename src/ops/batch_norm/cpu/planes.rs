//! Channels whose values lie together, `s` at a time: one task per channel.

use std::ops::Range;

use super::element::{write_y, Channel, ChannelGrad, Element, Mask, Real, Same, Slice};
use super::output::Output;
use super::{for_each, Backward, Forward, Grads};
use crate::shape::Dims;

pub(super) fn forward<T: Element>(job: &Forward<T>) -> (Vec<T>, Vec<f64>) {
    let spec = job.spec;
    let Dims { c, .. } = spec.dims;
    let (mut y, mut saved) = (Output::new(spec.dims.numel()), Output::new(2 * c));
    let (y_parts, saved_parts) = (y.parts(), saved.parts());
    for_each(c, spec.dims.numel(), |channel| {
        let (mean, var) = match job.given {
            Some([mean, var]) => (mean.get(channel), var.get(channel)),
            None => statistics(job.x, spec.dims, channel, spec.remove_mean),
        };
        for (row, value) in [(0, mean), (1, var)] {
            let index = row * c + channel;
            // SAFETY: no other task writes this channel's two values.
            unsafe { saved_parts.write(index, value) };
        }
        let (weight, bias) = (job.params.weight(channel), job.params.bias(channel));
        let normalise = Same(Channel::new(mean, spec.rstd(var), weight, bias));
        for range in slices(spec.dims, channel) {
            let residual = job.residual.map(|residual| &residual[range.clone()]);
            // SAFETY: the slices of different channels do not overlap, nor do those of one.
            let y = unsafe { y_parts.part(range.clone()) };
            write_y(y, &job.x[range], residual, normalise, spec.activation);
        }
    });
    // SAFETY: the slices of all channels make up the whole of `y`, and `saved` has two per channel.
    unsafe { (y.finish(), saved.finish()) }
}

pub(super) fn backward<T: Element, M: Mask<T>>(job: &Backward<T>, mask: M) -> Grads<T> {
    let spec = job.spec;
    let Dims { c, .. } = spec.dims;
    let (numel, m) = (spec.dims.numel(), spec.dims.m() as f64);
    let mut dx = job.wants.dx.then(|| Output::new(numel));
    let mut dresidual = job.wants.dresidual.then(|| Output::new(numel));
    let mut dparams = job.wants.dparams.then(|| Output::new(2 * c));
    let dx_parts = dx.as_mut().map(Output::parts);
    let dresidual_parts = dresidual.as_mut().map(Output::parts);
    let dparams_parts = dparams.as_mut().map(Output::parts);
    for_each(c, numel, |channel| {
        let (mean, rstd) = (job.saved[channel], spec.rstd(job.saved[c + channel]));
        let (weight, bias) = (job.params.weight(channel), job.params.bias(channel));
        let normalise = Channel::new(mean, rstd, weight, bias);
        let slice = |range: Range<usize>| Slice {
            x: &job.x[range.clone()],
            dy: &job.dy[range.clone()],
            mask: mask.slice(range),
        };
        let (mut sum_g, mut sum_gx) = (0.0, 0.0);
        if job.wants.dparams || (job.wants.dx && spec.training) {
            for range in slices(spec.dims, channel) {
                let (g, gx) = sums(&slice(range), &normalise, mean);
                sum_g += g;
                sum_gx += gx;
            }
        }
        if let Some(parts) = dparams_parts {
            for (row, value) in [(0, rstd * sum_gx), (1, sum_g)] {
                let index = row * c + channel;
                // SAFETY: no other task writes this channel's two values.
                unsafe { parts.write(index, value) };
            }
        }
        let grad = Same(ChannelGrad {
            mean_g: T::Real::from_f64(if spec.remove_mean { sum_g / m } else { 0.0 }),
            slope: T::Real::from_f64(rstd * rstd * sum_gx / m),
        });
        for range in slices(spec.dims, channel) {
            let slice = slice(range.clone());
            if let Some(parts) = dx_parts {
                // SAFETY: the slices of different channels do not overlap, nor do those of one.
                let dx = unsafe { parts.part(range.clone()) };
                if spec.training {
                    slice.write_dx_training(dx, Same(normalise), grad);
                } else {
                    slice.write_dx_given(dx, Same(normalise));
                }
            }
            if let Some(parts) = dresidual_parts {
                // SAFETY: as for `dx`.
                slice.write_g(unsafe { parts.part(range) }, Same(normalise));
            }
        }
    });
    // SAFETY: the slices of all channels make up the whole of `dx` and of `dresidual`, and
    // `dparams` has two values per channel.
    unsafe {
        Grads {
            dx: dx.map(|dx| dx.finish()),
            dparams: dparams.map(|dparams| dparams.finish()),
            dresidual: dresidual.map(|dresidual| dresidual.finish()),
        }
    }
}

/// Where the values of a channel lie: `n` slices of `s`.
fn slices(dims: Dims, channel: usize) -> impl Iterator<Item = Range<usize>> {
    (0..dims.n).map(move |n| {
        let start = (n * dims.c + channel) * dims.s;
        start..start + dims.s
    })
}

/// Mean and biased variance of a channel, in `f64`.
///
/// The first value is taken off before summing, so that a constant channel has exactly its value
/// as mean, and the variance is a second pass over the centred values. Without `remove_mean` the
/// mean counts as 0.
fn statistics<T: Element>(x: &[T], dims: Dims, channel: usize, remove_mean: bool) -> (f64, f64) {
    let m = dims.m() as f64;
    let over_slices =
        |f: &dyn Fn(&[T]) -> f64| -> f64 { slices(dims, channel).map(|range| f(&x[range])).sum() };
    let mean = if remove_mean {
        let pivot = x[channel * dims.s].to_f64();
        pivot + over_slices(&|slice| sum(slice, |x| x - pivot)) / m
    } else {
        0.0
    };
    let var = over_slices(&|slice| sum(slice, |x| (x - mean) * (x - mean))) / m;
    (mean, var)
}

/// As many sums side by side as keep the additions of a core busy.
const LANES: usize = 8;

#[inline(always)]
fn sum<T: Element>(values: &[T], f: impl Fn(f64) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += f(value.to_f64());
        }
    }
    for (lane, value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += f(value.to_f64());
    }
    lanes.iter().sum()
}

/// `Σg` and `Σ(g·(x - mean))` over a slice.
#[inline(always)]
fn sums<T: Element, M: Mask<T>>(
    slice: &Slice<T, M>,
    channel: &Channel<T::Real>,
    mean: f64,
) -> (f64, f64) {
    let (mut g_lanes, mut gx_lanes) = ([0.0; LANES], [0.0; LANES]);
    let (xs, x_rest) = slice.x.as_chunks::<LANES>();
    let (dys, dy_rest) = slice.dy.as_chunks::<LANES>();
    for (chunk, (x, dy)) in xs.iter().zip(dys).enumerate() {
        // One loop for each step, over arrays: this is the form that vectorises.
        let g: [T; LANES] =
            std::array::from_fn(|i| slice.mask.g(chunk * LANES + i, x[i], dy[i], channel));
        let centred: [f64; LANES] = std::array::from_fn(|i| x[i].to_f64() - mean);
        for lane in 0..LANES {
            g_lanes[lane] += g[lane].to_f64();
            gx_lanes[lane] += g[lane].to_f64() * centred[lane];
        }
    }
    let start = slice.x.len() - x_rest.len();
    for (lane, (&x, &dy)) in x_rest.iter().zip(dy_rest).enumerate() {
        let g = slice.mask.g(start + lane, x, dy, channel).to_f64();
        g_lanes[lane] += g;
        gx_lanes[lane] += g * (x.to_f64() - mean);
    }
    (g_lanes.iter().sum(), gx_lanes.iter().sum())
}
