//! The gradients of input and weights, image by image.

use std::mem::MaybeUninit;

use super::kernel::{Element, Sweep};
use super::pack::{to_panel, Lanes, Panels, Pass, DEPTH, ROWS};
use super::plan::{Phases, Windows};
use super::scratch::with_scratch;
use super::{Backward, Spec};
use crate::ops::output::Output;
use crate::ops::parallel::for_each;

/// What a task has summed up over its images.
pub(super) struct Sums<T> {
    /// In the panels of [`ToWeight`].
    pub dweight: Vec<T>,
    pub dbias: Vec<f64>,
}

/// The gradient of the input: `dy`, with a border, against the weights of each phase.
pub(super) struct ToInput<'a, T: 'static> {
    spec: &'a Spec,
    plan: Phases,
    panels: Vec<Panels<T>>,
}

impl<'a, T: Element> ToInput<'a, T> {
    pub fn new(job: &Backward<'a, T>) -> Self {
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

    pub fn write(&self, dy: &[T], dx: &mut [MaybeUninit<T>]) {
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
pub(super) struct ToWeight<'a, T: 'static> {
    spec: &'a Spec,
    windows: Windows,
    lanes: Lanes<T>,
}

impl<'a, T: Element> ToWeight<'a, T> {
    pub fn new(job: &Backward<'a, T>) -> Self {
        Self {
            spec: job.spec,
            windows: Windows::new(job.spec),
            lanes: Lanes::new(job.spec.c_out),
        }
    }

    /// The length of a sum: `[group][panel][tap][lane]`.
    pub fn sums(&self) -> usize {
        self.spec.groups * self.lanes.panels() * self.panel()
    }

    fn panel(&self) -> usize {
        self.windows.taps.len() * self.lanes.kernel.width
    }

    /// Adds what an image brings.
    pub fn add(&self, x: &[T], dy: &[T], sum: &mut [T]) {
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
    pub fn total(&self, sums: &[Sums<T>]) -> Vec<T> {
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
