//! What is known of the channels of a group, and how it comes from the sums of the group's parts.

use std::ops::Range;

use super::passes::Tiling;
use super::{Params, Spec};
use crate::ops::loops::convert::Real;
use crate::ops::loops::element::{Channel, ChannelGrad};

pub(super) struct Pair<R>(pub R, pub R);

/// A [`Channel`] for each channel of a group, and the statistics behind it.
pub(super) struct ChannelRow<L: Tiling, A: Real> {
    pub mean: L::Row<f64>,
    pub var: L::Row<f64>,
    pub rstd: L::Row<f64>,
    pub hi: L::Row<A>,
    pub lo: L::Row<A>,
    pub scale: L::Row<A>,
    pub shift: L::Row<A>,
}

/// A [`ChannelGrad`] for each channel of a group, and the gradients of its parameters.
pub(super) struct GradRow<L: Tiling, A: Real> {
    pub dweight: L::Row<f64>,
    pub dbias: L::Row<f64>,
    pub mean_g: L::Row<A>,
    pub slope: L::Row<A>,
}

/// A row with the numbers of a group's channels.
pub(super) fn copy<L: Tiling>(tiling: &L, values: &[f64]) -> L::Row<f64> {
    let repeats = tiling.repeats();
    let mut row = tiling.row(values.len() * repeats);
    if repeats == 1 {
        row.as_mut().copy_from_slice(values);
        return row;
    }
    for (entries, value) in row.as_mut().chunks_exact_mut(repeats).zip(values) {
        entries.fill(*value);
    }
    row
}

/// `[2, c]` from two rows of every group.
pub(super) fn by_channel<L: Tiling, G>(
    tiling: &L,
    groups: &[G],
    rows: fn(&G) -> [&[f64]; 2],
) -> Vec<f64> {
    let mut values = Vec::new();
    for index in 0..2 {
        for group in groups {
            let row = rows(group)[index];
            match tiling.repeats() {
                1 => values.extend_from_slice(row),
                repeats => values.extend(row.iter().step_by(repeats)),
            }
        }
    }
    values
}

/// Mean and biased variance of a group from the moments of its parts, and of the columns of each
/// channel (Chan et al. 1983, <https://doi.org/10.1080/00031305.1983.10483115>).
#[inline(always)]
pub(super) fn merge_moments<L: Tiling>(
    tiling: &L,
    channels: Range<usize>,
    parts: &[Pair<L::Row<f64>>],
) -> Pair<L::Row<f64>> {
    let repeats = tiling.repeats();
    let len = channels.len() * repeats;
    let (mut mean, mut var) = (tiling.row::<f64>(len), tiling.row::<f64>(len));
    let parts = || parts.iter().enumerate();
    let m = parts().map(|(part, _)| tiling.values(part)).sum::<usize>() as f64;
    let first = parts().next().map(|(_, Pair(mean, _))| mean.as_ref());
    let first = first.unwrap_or(&[]);
    for (part, Pair(part_mean, _)) in parts() {
        let share = tiling.values(part) as f64 / m;
        let part = part_mean.as_ref().iter().zip(first);
        for (mean, (part_mean, first)) in mean.as_mut().iter_mut().zip(part) {
            *mean += share * (part_mean - first);
        }
    }
    for (mean, first) in mean.as_mut().iter_mut().zip(first) {
        *mean += first;
    }
    for (part, Pair(part_mean, squares)) in parts() {
        let values = tiling.values(part) as f64;
        let part = part_mean.as_ref().iter().zip(squares.as_ref());
        let merged = var.as_mut().iter_mut().zip(mean.as_ref());
        for ((var, mean), (part_mean, squares)) in merged.zip(part) {
            let distance = part_mean - mean;
            *var += squares + values * distance * distance;
        }
    }
    for var in var.as_mut() {
        *var /= m;
    }
    if repeats > 1 {
        let means = mean.as_mut().chunks_exact_mut(repeats);
        for (means, vars) in means.zip(var.as_mut().chunks_exact_mut(repeats)) {
            let first = means[0];
            // Quotients, not products with the reciprocal: whole numbers stay what they are.
            let count = repeats as f64;
            let mean = first + means.iter().map(|mean| mean - first).sum::<f64>() / count;
            let spread = means.iter().map(|m| (m - mean) * (m - mean)).sum::<f64>();
            let var = (vars.iter().sum::<f64>() + spread) / count;
            means.fill(mean);
            vars.fill(var);
        }
    }
    Pair(mean, var)
}

/// What is done with the values of a group's channels.
#[inline(always)]
pub(super) fn channel_row<L: Tiling, A: Real>(
    tiling: &L,
    channels: Range<usize>,
    spec: &Spec,
    params: &Params,
    Pair(mean, var): Pair<L::Row<f64>>,
) -> ChannelRow<L, A> {
    let len = channels.len() * tiling.repeats();
    let mut row = ChannelRow::<L, A> {
        mean,
        var,
        rstd: tiling.row(len),
        hi: tiling.row(len),
        lo: tiling.row(len),
        scale: tiling.row(len),
        shift: tiling.row(len),
    };
    let weight = copy(tiling, &params.weight[channels.clone()]);
    let bias = copy(tiling, &params.bias[channels]);
    let (weight, bias) = (&weight.as_ref()[..len], &bias.as_ref()[..len]);
    let (mean, var) = (&row.mean.as_ref()[..len], &row.var.as_ref()[..len]);
    let rstd = &mut row.rstd.as_mut()[..len];
    let (hi, lo) = (&mut row.hi.as_mut()[..len], &mut row.lo.as_mut()[..len]);
    let (scale, shift) = (
        &mut row.scale.as_mut()[..len],
        &mut row.shift.as_mut()[..len],
    );
    for j in 0..len {
        rstd[j] = spec.rstd(var[j]);
        let channel = Channel::<A>::new(mean[j], rstd[j], weight[j], bias[j]);
        (hi[j], lo[j]) = (channel.hi, channel.lo);
        (scale[j], shift[j]) = (channel.scale, channel.shift);
    }
    row
}

/// The gradients of a group's parameters, and what `dx` needs, from the sums of its parts.
#[inline(always)]
pub(super) fn grad_row<L: Tiling, A: Real>(
    tiling: &L,
    channels: &ChannelRow<L, A>,
    parts: &[Option<Pair<L::Row<f64>>>],
    m: usize,
    remove_mean: bool,
) -> GradRow<L, A> {
    let len = channels.rstd.as_ref().len();
    let (mut sum_g, mut sum_gx) = (tiling.row::<f64>(len), tiling.row::<f64>(len));
    for Pair(g, gx) in parts.iter().flatten() {
        let part = g.as_ref().iter().zip(gx.as_ref());
        for ((sum_g, sum_gx), (g, gx)) in sum_g.as_mut().iter_mut().zip(sum_gx.as_mut()).zip(part) {
            *sum_g += g;
            *sum_gx += gx;
        }
    }
    for sums in [sum_g.as_mut(), sum_gx.as_mut()] {
        let repeats = tiling.repeats();
        if repeats > 1 {
            for sums in sums.chunks_exact_mut(repeats) {
                sums.fill(sums.iter().sum());
            }
        }
    }
    let (mut mean_g, mut slope) = (tiling.row::<A>(len), tiling.row::<A>(len));
    let (m, rstd) = (m as f64, &channels.rstd.as_ref()[..len]);
    let (sums_g, sums_gx) = (&sum_g.as_ref()[..len], &mut sum_gx.as_mut()[..len]);
    let (means_g, slopes) = (&mut mean_g.as_mut()[..len], &mut slope.as_mut()[..len]);
    for j in 0..len {
        sums_gx[j] *= rstd[j];
        let grad = ChannelGrad::<A>::new(rstd[j], sums_gx[j], sums_g[j], m, remove_mean);
        (means_g[j], slopes[j]) = (grad.mean_g, grad.slope);
    }
    GradRow {
        dweight: sum_gx,
        dbias: sum_g,
        mean_g,
        slope,
    }
}
