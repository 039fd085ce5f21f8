//! Convolution on the CPU: loops over slices, without candle's types.
//!
//! Forward pass and gradients are matrix products over the windows of the images. One loop
//! ([`kernel`]) does all of them; it gathers the windows through lists of offsets ([`plan`]), so
//! that no image is ever unfolded. The images go to the threads one by one; the gradient of the
//! weights is summed up per task, for a number of tasks that only depends on the batch, and the
//! tasks in their order: the result does not depend on the threads.

mod kernel;
mod pack;
mod plan;
mod scratch;
mod vector;

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use super::Spec;
use crate::ops::output::Output;
use crate::ops::parallel::for_each;
pub(crate) use kernel::Element;
use kernel::Sweep;
use pack::{to_panel, Lanes, Panels, Pass, DEPTH, ROWS};
use plan::{Phases, Windows};
use scratch::with_scratch;

/// Input of [`forward`]. All tensors are contiguous.
pub(crate) struct Forward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub weight: &'a [T],
    pub bias: Option<&'a [T]>,
}

/// Input of [`backward`]. All tensors are contiguous.
pub(crate) struct Backward<'a, T> {
    pub spec: &'a Spec,
    pub x: &'a [T],
    pub weight: &'a [T],
    pub dy: &'a [T],
    pub wants: Wants,
}

/// Which gradients somebody asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wants {
    pub dx: bool,
    pub dweight: bool,
    pub dbias: bool,
}

/// The gradients that were asked for.
pub(crate) struct Grads<T> {
    pub dx: Option<Vec<T>>,
    pub dweight: Option<Vec<T>>,
    pub dbias: Option<Vec<T>>,
}

/// The output `[n, c_out, oh, ow]`.
pub(crate) fn forward<T: Element>(job: &Forward<T>) -> Vec<T> {
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
    for_each(spec.n, spec.work(), |image| {
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

/// So many tasks share the images of a backward pass, each with a sum of its own.
const TASKS: usize = 16;

/// The gradients of [`forward`].
pub(crate) fn backward<T: Element>(job: &Backward<T>) -> Grads<T> {
    let (spec, wants) = (job.spec, job.wants);
    let to_input = wants.dx.then(|| ToInput::new(job));
    let to_weight = wants.dweight.then(|| ToWeight::new(job));
    let mut dx = wants.dx.then(|| Output::new(spec.n * spec.inputs()));
    let dx_parts = dx.as_mut().map(Output::parts);
    let tasks = spec.n.min(TASKS);
    let sums: Vec<OnceLock<Sums<T>>> = (0..tasks).map(|_| OnceLock::new()).collect();
    for_each(tasks, spec.work(), |task| {
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
            for (sum, dy) in sum.dbias.iter_mut().zip(dy.chunks_exact(spec.oh * spec.ow)) {
                *sum += sum_of(dy);
            }
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
        // Each task has a place of its own, so that this is never a second value.
        let _ = sums[task].set(sum);
    });
    let sums: Vec<&Sums<T>> = sums.iter().filter_map(OnceLock::get).collect();
    let dbias = |channel| T::from_f64(sums.iter().map(|sum| sum.dbias[channel]).sum());
    Grads {
        // SAFETY: every image has been written: each pixel is in one phase, in all channels.
        dx: dx.map(|dx| unsafe { dx.finish() }),
        dweight: to_weight.map(|to_weight| to_weight.total(&sums)),
        dbias: (wants.dbias).then(|| (0..spec.groups * spec.c_out).map(dbias).collect()),
    }
}

/// What a task has summed up over its images.
struct Sums<T> {
    /// In the panels of [`ToWeight`].
    dweight: Vec<T>,
    dbias: Vec<f64>,
}

/// The gradient of the input: `dy`, with a border, against the weights of each phase.
struct ToInput<'a, T: 'static> {
    spec: &'a Spec,
    plan: Phases,
    panels: Vec<Panels<T>>,
}

impl<'a, T: Element> ToInput<'a, T> {
    fn new(job: &Backward<'a, T>) -> Self {
        let spec = job.spec;
        let plan = Phases::new(spec);
        let lanes = Lanes::new(spec.c_in);
        let panels = plan.phases.iter().map(|phase| {
            Panels::new(spec.groups, phase.depth.len(), lanes, |group, k, c| {
                let (o, tap) = phase.weights[k];
                let row = (group * spec.c_out + o) * spec.c_in + c;
                job.weight[row * spec.kh * spec.kw + tap]
            })
        });
        Self {
            spec,
            panels: panels.collect(),
            plan,
        }
    }

    fn write(&self, dy: &[T], dx: &mut [MaybeUninit<T>]) {
        let Self { spec, plan, panels } = self;
        let Some(width) = panels.first().map(|panels| panels.lanes.kernel.width) else {
            return;
        };
        let framed = plan.frame.scratch(spec.groups * spec.c_out);
        with_scratch([framed, ROWS * width], |[framed, block]| {
            let dy = plan.frame.apply(dy, framed);
            for (phase, panels) in plan.phases.iter().zip(panels) {
                let pass = Pass {
                    panels,
                    rows: &phase.rows,
                    depth: &phase.depth,
                    targets: &phase.pixels,
                    plane: spec.h * spec.w,
                };
                let dy = dy.chunks_exact(spec.c_out * plan.frame.plane());
                let dx = dx.chunks_exact_mut(spec.c_in * pass.plane);
                for (group, (dy, dx)) in dy.zip(dx).enumerate() {
                    pass.run(group, dy, block, dx, None);
                }
            }
        });
    }
}

/// The gradient of the weights: the roles of windows and taps change places.
struct ToWeight<'a, T: 'static> {
    spec: &'a Spec,
    windows: Windows,
    lanes: Lanes<T>,
}

impl<'a, T: Element> ToWeight<'a, T> {
    fn new(job: &Backward<'a, T>) -> Self {
        Self {
            spec: job.spec,
            windows: Windows::new(job.spec),
            lanes: Lanes::new(job.spec.c_out),
        }
    }

    /// The length of a sum: `[group][panel][tap][lane]`.
    fn sums(&self) -> usize {
        self.spec.groups * self.lanes.panels() * self.panel()
    }

    fn panel(&self) -> usize {
        self.windows.taps.len() * self.lanes.kernel.width
    }

    /// Adds what an image brings.
    fn add(&self, x: &[T], dy: &[T], sum: &mut [T]) {
        let Self {
            spec,
            windows,
            lanes,
        } = self;
        let (plane, width) = (spec.oh * spec.ow, lanes.kernel.width);
        let framed = windows.frame.scratch(spec.groups * spec.c_in);
        with_scratch([framed, DEPTH * width], |[framed, panel]| {
            let x = windows.frame.apply(x, framed);
            let x = x.chunks_exact(spec.c_in * windows.frame.plane());
            let dy = dy.chunks_exact(spec.c_out * plane);
            let sum = sum.chunks_exact_mut(lanes.panels() * self.panel());
            for (x, (dy, sum)) in x.zip(dy.zip(sum)) {
                for (index, sum) in sum.chunks_exact_mut(self.panel()).enumerate() {
                    let channels = lanes.of(index);
                    let dy = &dy[channels.start * plane..channels.end * plane];
                    for (i, depth) in windows.rows.chunks(DEPTH).enumerate() {
                        let panel = &mut panel[..depth.len() * width];
                        to_panel(dy, plane, i * DEPTH, panel, width);
                        lanes.kernel.run(Sweep {
                            x,
                            rows: &windows.taps,
                            depth,
                            panel,
                            out: sum,
                            accumulate: true,
                        });
                    }
                }
            }
        });
    }

    /// The sum of the tasks, in the order of the weights.
    fn total(&self, sums: &[&Sums<T>]) -> Vec<T> {
        let Self {
            spec,
            windows,
            lanes,
        } = self;
        let (taps, width) = (windows.taps.len(), lanes.kernel.width);
        let mut dweight = Output::new(spec.groups * spec.c_out * taps);
        let parts = dweight.parts();
        for_each(taps, sums.len() * self.sums(), |tap| {
            for group in 0..spec.groups {
                for panel in 0..lanes.panels() {
                    let start = (group * lanes.panels() + panel) * self.panel() + tap * width;
                    for (lane, o) in lanes.of(panel).enumerate() {
                        let sum = sums
                            .iter()
                            .map(|sum| sum.dweight[start + lane].to_f64())
                            .sum();
                        let index = (group * spec.c_out + o) * taps + tap;
                        // SAFETY: each tap is one task's.
                        unsafe { parts.write(index, T::from_f64(sum)) };
                    }
                }
            }
        });
        // SAFETY: every weight has been written: the panels cover the channels of each group.
        unsafe { dweight.finish() }
    }
}

fn sum_of<T: Element>(values: &[T]) -> f64 {
    let mut sums = [0.0; 8];
    let chunks = values.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value.to_f64();
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|value| value.to_f64()).sum::<f64>()
}
