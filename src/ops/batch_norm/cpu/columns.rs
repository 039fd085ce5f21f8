//! A matrix `[m, c]`, whose channels are its columns: one task per block of neighbouring columns.

use std::ops::Range;

use super::element::{write_y, Channel, ChannelGrad, Channels, Element, Mask, Real, Slice};
use super::output::Output;
use super::{for_each, Backward, Forward, Grads};

/// Columns of a task: enough for whole cache lines in every row, few enough for the L1 cache.
const WIDTH: usize = 64;

/// One value for each column of a block.
type Row<T> = [T; WIDTH];

pub(super) fn forward<T: Element>(job: &Forward<T>) -> (Vec<T>, Vec<f64>) {
    let spec = job.spec;
    let (m, c) = (spec.dims.m(), spec.dims.c);
    let (mut y, mut saved) = (Output::new(m * c), Output::new(2 * c));
    let (y_parts, saved_parts) = (y.parts(), saved.parts());
    for_each(c.div_ceil(WIDTH), m * c, |block| {
        let block = Block::new(block, m, c);
        let (mut mean, mut var) = ([0.0; WIDTH], [0.0; WIDTH]);
        match job.given {
            Some([given_mean, given_var]) => {
                for (j, column) in block.columns.clone().enumerate() {
                    (mean[j], var[j]) = (given_mean.get(column), given_var.get(column));
                }
            }
            None => (mean, var) = statistics(job.x, &block, spec.remove_mean),
        }
        let mut normalise = ChannelRow::new();
        for (j, column) in block.columns.clone().enumerate() {
            let (weight, bias) = (job.params.weight(column), job.params.bias(column));
            normalise.set(j, Channel::new(mean[j], spec.rstd(var[j]), weight, bias));
            for (row, value) in [(0, mean[j]), (1, var[j])] {
                let index = row * c + column;
                // SAFETY: no other task writes this column's two values.
                unsafe { saved_parts.write(index, value) };
            }
        }
        for range in block.rows() {
            let residual = job.residual.map(|residual| &residual[range.clone()]);
            // SAFETY: the rows of different blocks do not overlap, nor do those of one.
            let y = unsafe { y_parts.part(range.clone()) };
            write_y(y, &job.x[range], residual, &normalise, spec.activation);
        }
    });
    // SAFETY: the rows of all blocks make up the whole of `y`, and `saved` has two per column.
    unsafe { (y.finish(), saved.finish()) }
}

pub(super) fn backward<T: Element, M: Mask<T>>(job: &Backward<T>, mask: M) -> Grads<T> {
    let spec = job.spec;
    let (m, c) = (spec.dims.m(), spec.dims.c);
    let mut dx = job.wants.dx.then(|| Output::new(m * c));
    let mut dresidual = job.wants.dresidual.then(|| Output::new(m * c));
    let mut dparams = job.wants.dparams.then(|| Output::new(2 * c));
    let dx_parts = dx.as_mut().map(Output::parts);
    let dresidual_parts = dresidual.as_mut().map(Output::parts);
    let dparams_parts = dparams.as_mut().map(Output::parts);
    for_each(c.div_ceil(WIDTH), m * c, |block| {
        let block = Block::new(block, m, c);
        let slice = |range: Range<usize>| Slice {
            x: &job.x[range.clone()],
            dy: &job.dy[range.clone()],
            mask: mask.slice(range),
        };
        let (mut mean, mut rstd) = ([0.0; WIDTH], [0.0; WIDTH]);
        let mut normalise = ChannelRow::new();
        for (j, column) in block.columns.clone().enumerate() {
            (mean[j], rstd[j]) = (job.saved[column], spec.rstd(job.saved[c + column]));
            let (weight, bias) = (job.params.weight(column), job.params.bias(column));
            normalise.set(j, Channel::new(mean[j], rstd[j], weight, bias));
        }
        let (mut sum_g, mut sum_gx) = ([0.0; WIDTH], [0.0; WIDTH]);
        if job.wants.dparams || (job.wants.dx && spec.training) {
            for range in block.rows() {
                add_sums(&mut sum_g, &mut sum_gx, &slice(range), &normalise, &mean);
            }
        }
        let mut grad = ChannelGradRow::new();
        for (j, column) in block.columns.clone().enumerate() {
            let m = m as f64;
            grad.mean_g[j] = Real::from_f64(if spec.remove_mean { sum_g[j] / m } else { 0.0 });
            grad.slope[j] = Real::from_f64(rstd[j] * rstd[j] * sum_gx[j] / m);
            if let Some(parts) = dparams_parts {
                for (row, value) in [(0, rstd[j] * sum_gx[j]), (1, sum_g[j])] {
                    let index = row * c + column;
                    // SAFETY: no other task writes this column's two values.
                    unsafe { parts.write(index, value) };
                }
            }
        }
        for range in block.rows() {
            let slice = slice(range.clone());
            if let Some(parts) = dx_parts {
                // SAFETY: the rows of different blocks do not overlap, nor do those of one.
                let dx = unsafe { parts.part(range.clone()) };
                if spec.training {
                    slice.write_dx_training(dx, &normalise, &grad);
                } else {
                    slice.write_dx_given(dx, &normalise);
                }
            }
            if let Some(parts) = dresidual_parts {
                // SAFETY: as for `dx`.
                slice.write_g(unsafe { parts.part(range) }, &normalise);
            }
        }
    });
    // SAFETY: the rows of all blocks make up the whole of `dx` and of `dresidual`, and `dparams`
    // has two values per column.
    unsafe {
        Grads {
            dx: dx.map(|dx| dx.finish()),
            dparams: dparams.map(|dparams| dparams.finish()),
            dresidual: dresidual.map(|dresidual| dresidual.finish()),
        }
    }
}

/// The columns of one task.
struct Block {
    columns: Range<usize>,
    m: usize,
    c: usize,
}

impl Block {
    fn new(index: usize, m: usize, c: usize) -> Self {
        let start = index * WIDTH;
        let columns = start..c.min(start + WIDTH);
        Self { columns, m, c }
    }

    /// Where the block's part of each row lies.
    fn rows(&self) -> impl Iterator<Item = Range<usize>> {
        let (columns, c) = (self.columns.clone(), self.c);
        (0..self.m).map(move |row| row * c + columns.start..row * c + columns.end)
    }
}

/// Mean and biased variance of the columns of a block, in `f64`, as for planes.
fn statistics<T: Element>(x: &[T], block: &Block, remove_mean: bool) -> (Row<f64>, Row<f64>) {
    let m = block.m as f64;
    let (mut mean, mut var) = ([0.0; WIDTH], [0.0; WIDTH]);
    if remove_mean {
        let mut pivot = [0.0; WIDTH];
        for (pivot, x) in pivot.iter_mut().zip(&x[block.columns.clone()]) {
            *pivot = x.to_f64();
        }
        for range in block.rows() {
            for ((sum, x), pivot) in mean.iter_mut().zip(&x[range]).zip(&pivot) {
                *sum += x.to_f64() - pivot;
            }
        }
        for (mean, pivot) in mean.iter_mut().zip(&pivot) {
            *mean = pivot + *mean / m;
        }
    }
    for range in block.rows() {
        for ((sum, x), mean) in var.iter_mut().zip(&x[range]).zip(&mean) {
            let centred = x.to_f64() - mean;
            *sum += centred * centred;
        }
    }
    for var in &mut var {
        *var /= m;
    }
    (mean, var)
}

/// Adds `g` and `g·(x - mean)` of one row to the sums of the columns.
#[inline(always)]
fn add_sums<T: Element, M: Mask<T>>(
    sum_g: &mut Row<f64>,
    sum_gx: &mut Row<f64>,
    slice: &Slice<T, M>,
    channels: &ChannelRow<T::Real>,
    mean: &Row<f64>,
) {
    let width = slice.x.len().min(WIDTH);
    let (x, dy) = (&slice.x[..width], &slice.dy[..width]);
    for j in 0..width {
        let g = slice.mask.g(j, x[j], dy[j], &channels.at(j)).to_f64();
        sum_g[j] += g;
        sum_gx[j] += g * (x[j].to_f64() - mean[j]);
    }
}

/// A [`Channel`] for each column of a block, field by field so that loops over them vectorise.
struct ChannelRow<A> {
    hi: Row<A>,
    lo: Row<A>,
    scale: Row<A>,
    shift: Row<A>,
}

impl<A: Real> ChannelRow<A> {
    fn new() -> Self {
        let zeros = [A::ZERO; WIDTH];
        Self {
            hi: zeros,
            lo: zeros,
            scale: zeros,
            shift: zeros,
        }
    }

    fn set(&mut self, j: usize, channel: Channel<A>) {
        self.hi[j] = channel.hi;
        self.lo[j] = channel.lo;
        self.scale[j] = channel.scale;
        self.shift[j] = channel.shift;
    }
}

impl<A: Real> Channels<Channel<A>> for &ChannelRow<A> {
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

/// A [`ChannelGrad`] for each column of a block.
struct ChannelGradRow<A> {
    mean_g: Row<A>,
    slope: Row<A>,
}

impl<A: Real> ChannelGradRow<A> {
    fn new() -> Self {
        let zeros = [A::ZERO; WIDTH];
        Self {
            mean_g: zeros,
            slope: zeros,
        }
    }
}

impl<A: Real> Channels<ChannelGrad<A>> for &ChannelGradRow<A> {
    #[inline(always)]
    fn at(&self, j: usize) -> ChannelGrad<A> {
        ChannelGrad {
            mean_g: self.mean_g[j],
            slope: self.slope[j],
        }
    }
}
