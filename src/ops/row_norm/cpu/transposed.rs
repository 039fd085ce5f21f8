//! Row norms of tensors with the channels last, `[n, s, c]`: the channels of one row, or of a few narrow ones, are
//! brought in front of the values of a sample, in room of its own, and the results back. A sample with only one
//! row has room for all of it.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::affine::ByPlane;
use super::backward::{by_channel, plane_sums, saved_row, write_dx};
use super::forward::{saved, statistics, write_row};
use super::{Backward, Forward, Grads};
use crate::dims::Rows;
use crate::ops::loops::convert::Element;
use crate::ops::loops::element::{Mask, Slice};
use crate::ops::output::{written, Output, Parts};
use crate::ops::parallel;
use crate::ops::slices::vectorised;

/// As many neighbouring channels fill the lines of a cache.
const CHANNELS: usize = 16;

/// The neighbouring rows of a sample that are gone through together.
#[derive(Clone, Copy)]
struct Bunches {
    rows: Rows,
    /// Rows of a bunch; the last of a sample may have fewer.
    size: usize,
}

/// A bunch: some rows of a sample.
struct Bunch {
    sample: usize,
    groups: Range<usize>,
    /// Those of its rows.
    channels: Range<usize>,
}

impl Bunches {
    fn new(rows: Rows) -> Self {
        let size = CHANNELS.div_ceil(rows.channels()).min(rows.groups);
        Self { rows, size }
    }

    fn of_sample(&self) -> usize {
        self.rows.groups.div_ceil(self.size)
    }

    fn count(&self) -> usize {
        self.rows.n * self.of_sample()
    }

    fn get(&self, index: usize) -> Bunch {
        let (sample, first) = (
            index / self.of_sample(),
            index % self.of_sample() * self.size,
        );
        let groups = first..self.rows.groups.min(first + self.size);
        let channels = self.rows.channels();
        Bunch {
            sample,
            channels: groups.start * channels..groups.end * channels,
            groups,
        }
    }

    /// The bunch's values of `x`, channel by channel.
    #[inline(always)]
    fn gather<T: Element>(&self, bunch: &Bunch, x: &[T]) -> Vec<T> {
        let Rows { c, s, .. } = self.rows;
        let (first, count) = (bunch.channels.start, bunch.channels.len());
        let x = &x[bunch.sample * s * c..(bunch.sample + 1) * s * c];
        let mut out = Output::new(count * s);
        let parts = out.parts();
        // SAFETY: there is one part, which is all of it.
        let to = unsafe { parts.part(0..count * s) };
        for (row, values) in x.chunks_exact(c).enumerate() {
            for (channel, value) in values[first..first + count].iter().enumerate() {
                to[channel * s + row].write(*value);
            }
        }
        // SAFETY: all channels of all rows have been written.
        unsafe { out.finish() }
    }

    /// The way back.
    ///
    /// # Safety
    /// Nobody else holds a part of the values.
    #[inline(always)]
    unsafe fn scatter<T: Element>(&self, bunch: &Bunch, values: &[T], to: Parts<T>) {
        let Rows { c, s, .. } = self.rows;
        for row in 0..s {
            let start = (bunch.sample * s + row) * c;
            let run = start + bunch.channels.start..start + bunch.channels.end;
            // SAFETY: the caller promises it.
            let to = unsafe { to.part(run) };
            for (channel, to) in to.iter_mut().enumerate() {
                to.write(values[channel * s + row]);
            }
        }
    }
}

pub(super) fn forward<T: Element>(job: &Forward<T>, affine: &ByPlane) -> (Vec<T>, Vec<f64>) {
    let (spec, len) = (job.spec, job.spec.rows.len());
    let mut y = Output::new(job.x.len());
    let y_parts = y.parts();
    let bunches = Bunches::new(spec.rows);
    let rows = parallel::map(bunches.count(), job.x.len(), |index| {
        vectorised(
            #[inline(always)]
            || {
                let bunch = bunches.get(index);
                let x = bunches.gather(&bunch, job.x);
                let mut y = vec![MaybeUninit::uninit(); x.len()];
                let mut rows = Vec::new();
                for (i, group) in bunch.groups.clone().enumerate() {
                    let run = i * len..(i + 1) * len;
                    let (x, y) = (&x[run.clone()], &mut y[run]);
                    let row = statistics(spec, x);
                    write_row(affine, &row, group * len, x, y, spec.activation);
                    rows.push(row);
                }
                // SAFETY: `write_row` has written each row, and no two bunches have a value in common.
                unsafe { bunches.scatter(&bunch, written(&y), y_parts) };
                rows
            },
        )
    });
    // SAFETY: the bunches have all values.
    (unsafe { y.finish() }, saved(rows.iter().flatten()))
}

pub(super) fn backward<T: Element, M: Mask<T>>(job: &Backward<T>, affine: &ByPlane) -> Grads<T> {
    let (spec, len) = (job.spec, job.spec.rows.len());
    let mut dx = job.wants.dx.then(|| Output::new(job.x.len()));
    let dx_parts = dx.as_mut().map(Output::parts);
    let bunches = Bunches::new(spec.rows);
    let planes = parallel::map(bunches.count(), job.x.len(), |index| {
        vectorised(
            #[inline(always)]
            || {
                let bunch = bunches.get(index);
                let x = bunches.gather(&bunch, job.x);
                let dy = bunches.gather(&bunch, job.dy);
                let mut dx = vec![MaybeUninit::uninit(); dx_parts.map_or(0, |_| x.len())];
                let mut planes = Vec::new();
                for (i, group) in bunch.groups.clone().enumerate() {
                    let (row, start) = (
                        &saved_row(job, bunch.sample * spec.rows.groups + group),
                        group * len,
                    );
                    let run = i * len..(i + 1) * len;
                    let slice = Slice {
                        x: &x[run.clone()],
                        dy: &dy[run.clone()],
                        y: &x[run.clone()],
                    };
                    let sums = plane_sums::<T, M>(affine, row, start, &slice, &mut planes);
                    if dx_parts.is_some() {
                        write_dx::<T, M, _>(spec, affine, row, sums, start, &slice, &mut dx[run]);
                    }
                }
                if let Some(parts) = dx_parts {
                    // SAFETY: `write_dx` has written each row, and no two bunches have a value in common.
                    unsafe { bunches.scatter(&bunch, written(&dx), parts) };
                }
                planes
            },
        )
    });
    let dparams = || by_channel(spec, planes.iter().flatten());
    Grads {
        dparams: job.wants.dparams.then(dparams),
        // SAFETY: the bunches have all values.
        dx: dx.map(|dx| unsafe { dx.finish() }),
    }
}
