//! Max pooling on the CPU: loops over slices, without candle's types.

use candle_core::WithDType;

use super::windows::Windows;
use crate::ops::output::Output;
use crate::ops::parallel::for_each;
use crate::ops::slices::vectorised;

/// The output, plane by plane.
pub(super) fn forward<T: WithDType + Default>(windows: &Windows, x: &[T]) -> Vec<T> {
    let (inputs, outputs) = (windows.inputs(), windows.outputs());
    let planes = x.len() / inputs;
    let mut y = Output::new(planes * outputs);
    let parts = y.parts();
    for_each(planes, x.len(), |plane| {
        // SAFETY: each plane is one task's.
        let y = unsafe { parts.part(plane * outputs..(plane + 1) * outputs) };
        vectorised(
            #[inline(always)]
            || windows.forward(&x[plane * inputs..][..inputs], y, &mut Vec::new()),
        );
    });
    // SAFETY: every plane has been written, as many rows and columns as it has windows.
    unsafe { y.finish() }
}

/// The gradient of the input.
pub(super) fn backward<T: WithDType + Default>(windows: &Windows, x: &[T], dy: &[T]) -> Vec<T> {
    let (inputs, outputs) = (windows.inputs(), windows.outputs());
    let mut dx = Output::new(x.len());
    let parts = dx.parts();
    for_each(x.len() / inputs, x.len(), |plane| {
        let x = &x[plane * inputs..][..inputs];
        let dy = &dy[plane * outputs..][..outputs];
        // SAFETY: each plane is one task's.
        let dx = unsafe { parts.part(plane * inputs..(plane + 1) * inputs) };
        vectorised(
            #[inline(always)]
            || windows.backward(x, dy, dx, &mut Vec::new()),
        );
    });
    // SAFETY: every plane has been written: the rows with windows, then the rest.
    unsafe { dx.finish() }
}
