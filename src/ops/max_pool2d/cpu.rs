//! Max pooling on the CPU: loops over slices, without candle's types.

use std::ops::Range;

use candle_core::WithDType;

use super::windows::Windows;
use crate::ops::output::Output;
use crate::ops::parallel::for_each;
use crate::ops::slices::vectorised;

/// Pixels of a task, about.
const PART: usize = 1 << 13;

/// Runs `task` for some planes at a time, on all threads.
pub(crate) fn for_planes(windows: &Windows, pixels: usize, task: impl Fn(Range<usize>) + Sync) {
    let planes = pixels / windows.inputs();
    let together = (PART / windows.inputs()).max(1);
    for_each(planes.div_ceil(together), pixels, |part| {
        task(part * together..planes.min((part + 1) * together))
    });
}

/// The output, plane by plane.
pub(super) fn forward<T: WithDType + Default>(windows: &Windows, x: &[T]) -> Vec<T> {
    let (inputs, outputs) = (windows.inputs(), windows.outputs());
    let mut y = Output::new(x.len() / inputs * outputs);
    let parts = y.parts();
    for_planes(windows, x.len(), |planes| {
        vectorised(
            #[inline(always)]
            || {
                for plane in planes {
                    let x = &x[plane * inputs..];
                    // SAFETY: each plane is one task's.
                    let y = unsafe { parts.part(plane * outputs..(plane + 1) * outputs) };
                    windows.forward(x, y, None, |x| x, |y| y);
                }
            },
        )
    });
    // SAFETY: every plane has been written, as many rows and columns as it has windows.
    unsafe { y.finish() }
}

/// The gradient of the input.
pub(super) fn backward<T: WithDType + Default>(windows: &Windows, x: &[T], dy: &[T]) -> Vec<T> {
    let (inputs, outputs) = (windows.inputs(), windows.outputs());
    let mut dx = Output::new(x.len());
    let parts = dx.parts();
    for_planes(windows, x.len(), |planes| {
        vectorised(
            #[inline(always)]
            || {
                for plane in planes {
                    let x = &x[plane * inputs..];
                    let dy = &dy[plane * outputs..];
                    // SAFETY: each plane is one task's.
                    let dx = unsafe { parts.part(plane * inputs..(plane + 1) * inputs) };
                    windows.backward(x, dy, dx, |x| x, |_, dy| dy, |_, g| g);
                }
            },
        )
    });
    // SAFETY: every plane has been written: `backward` writes all of it.
    unsafe { dx.finish() }
}
