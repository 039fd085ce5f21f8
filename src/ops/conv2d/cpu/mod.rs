//! Convolution on the CPU: loops over slices, without candle's types.
//!
//! Forward pass and gradients are matrix products over the windows of the images. One loop
//! ([`kernel`]) does all of them; it gathers the windows through lists of offsets ([`plan`]), so
//! that no image is ever unfolded. The images go to the threads one by one; the gradient of the
//! weights is summed up per task, for a number of tasks that only depends on the batch, and the
//! tasks in their order: the result does not depend on the threads.

mod gradients;
mod kernel;
mod pack;
mod plan;
mod scratch;
mod vector;

use super::Spec;
use crate::ops::loops::lanes::{total, LANES};
use crate::ops::output::Output;
use crate::ops::parallel::{for_each, map};
use crate::ops::slices::vectorised;
use crate::ops::weighted::{Grads, Wants, Weighted};
use gradients::{Sums, ToInput, ToWeight};
use kernel::Element;
use pack::{Lanes, Panels, Pass, ROWS};
use plan::Windows;
use scratch::with_scratch;

/// Input of [`forward`]. All tensors are contiguous.
struct Forward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub weight: &'a [T],
    pub bias: Option<&'a [T]>,
}

/// Input of [`backward`]. All tensors are contiguous.
struct Backward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub weight: &'a [T],
    pub dy: &'a [T],
    pub wants: Wants,
}

impl<T: Element> Weighted<T> for Spec {
    fn forward(&self, x: &[T], weight: &[T], bias: Option<&[T]>) -> Vec<T> {
        forward(&Forward {
            spec: self,
            x,
            weight,
            bias,
        })
    }

    fn backward(&self, x: &[T], weight: &[T], dy: &[T], wants: Wants) -> Grads<Vec<T>> {
        backward(&Backward {
            spec: self,
            x,
            weight,
            dy,
            wants,
        })
    }
}

/// The output `[n, c_out, oh, ow]`.
fn forward<T: Element>(job: &Forward<T>) -> Vec<T> {
    let spec = job.spec;
    let windows = Windows::new(spec);
    let taps = windows.taps.len();
    let panels = Panels::new(
        spec.groups,
        taps,
        Lanes::new(spec.c_out),
        |group, tap, o| job.weight[(group * spec.c_out + o) * taps + tap],
    );
    let targets: Vec<usize> = (0..windows.rows.len()).collect();
    let pass = Pass {
        panels: &panels,
        rows: &windows.rows,
        depth: &windows.taps,
        targets: &targets,
        plane: spec.oh * spec.ow,
    };
    let mut y = Output::new(spec.n * spec.outputs());
    let y_parts = y.parts();
    for_each(spec.n, spec.work() / PER_VALUE, |image| {
        // SAFETY: each image is one task's.
        let y = unsafe { y_parts.part(image * spec.outputs()..(image + 1) * spec.outputs()) };
        let x = &job.x[image * spec.inputs()..][..spec.inputs()];
        let block = ROWS * panels.lanes.kernel.width;
        with_scratch(
            [windows.frame.scratch(spec.groups * spec.c_in), block],
            |[framed, block]| {
                let x = windows.frame.apply(x, framed);
                let x = x.chunks_exact(spec.c_in * windows.frame.plane());
                let y = y.chunks_exact_mut(spec.c_out * pass.plane);
                for (group, (x, y)) in x.zip(y).enumerate() {
                    let bias = job
                        .bias
                        .map(|bias| &bias[group * spec.c_out..][..spec.c_out]);
                    pass.run(group, x, block, y, bias);
                }
            },
        );
    });
    // SAFETY: every image has been written, all of its channels at all of its positions.
    unsafe { y.finish() }
}

/// So many multiplications take as long as a value in a plain loop.
const PER_VALUE: usize = 16;

/// So many tasks share the images of a backward pass, each with a sum of its own.
const TASKS: usize = 16;

/// The gradients of [`forward`].
fn backward<T: Element>(job: &Backward<T>) -> Grads<Vec<T>> {
    let (spec, wants) = (job.spec, job.wants);
    let to_input = wants.dx.then(|| ToInput::new(job));
    let to_weight = wants.dweight.then(|| ToWeight::new(job));
    let mut dx = wants.dx.then(|| Output::new(spec.n * spec.inputs()));
    let dx_parts = dx.as_mut().map(Output::parts);
    let tasks = spec.n.min(TASKS);
    let sums = map(tasks, spec.work() / PER_VALUE, |task| {
        let mut sum = Sums {
            dweight: vec![T::zero(); to_weight.as_ref().map_or(0, ToWeight::sums)],
            dbias: vec![
                0.0;
                if wants.dbias {
                    spec.groups * spec.c_out
                } else {
                    0
                }
            ],
        };
        for image in task * spec.n / tasks..(task + 1) * spec.n / tasks {
            let dy = &job.dy[image * spec.outputs()..][..spec.outputs()];
            vectorised(
                #[inline(always)]
                || {
                    let planes = dy.chunks_exact(spec.oh * spec.ow);
                    for (sum, plane) in sum.dbias.iter_mut().zip(planes) {
                        *sum += sum_of(plane);
                    }
                },
            );
            if let Some(to_weight) = &to_weight {
                let x = &job.x[image * spec.inputs()..][..spec.inputs()];
                to_weight.add(x, dy, &mut sum.dweight);
            }
            if let (Some(to_input), Some(dx)) = (&to_input, dx_parts) {
                // SAFETY: each image is one task's.
                let dx = unsafe { dx.part(image * spec.inputs()..(image + 1) * spec.inputs()) };
                to_input.write(dy, dx);
            }
        }
        sum
    });
    let dbias = |channel| T::from_f64(sums.iter().map(|sum| sum.dbias[channel]).sum());
    Grads {
        // SAFETY: every image has been written: each pixel is in one phase, in all channels.
        dx: dx.map(|dx| unsafe { dx.finish() }),
        dweight: to_weight.map(|to_weight| to_weight.total(&sums)),
        dbias: (wants.dbias).then(|| (0..spec.groups * spec.c_out).map(dbias).collect()),
    }
}

#[inline(always)]
fn sum_of<T: Element>(values: &[T]) -> f64 {
    let mut lanes = [0.0; LANES];
    for chunk in values.chunks(LANES) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += value.to_f64();
        }
    }
    total(&lanes)
}
