//! The maximum over windows of images.

pub(crate) mod cpu;
mod two_by_two;
pub(crate) mod windows;

use candle_core::backend::BackendStorage;
use candle_core::{
    bail, CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Result, Shape, Tensor,
    WithDType,
};

use super::backward::gradient_of;
use super::graph::{apply1, contiguous};
use super::keeps_graph::keeps_graph;
use super::slices::{check_float, dispatch, tensor, values, with_values};
use windows::Windows;

const NAME: &str = "max_pool2d";

/// The maximum over square windows that lie side by side.
///
/// For `x: [n, c, h, w]` and a window of `k = kernel` pixels in each direction:
///
/// ```text
/// y[n, c, i, j] = max x[n, c, i·k + a, j·k + b]  over  a, b in 0..k
/// ```
///
/// `y` is `[n, c, h / k, w / k]`, rounded down: rows and columns that fill no window count for
/// nothing. The gradient of a window goes to its maximum, to the first of several, and all other
/// pixels get 0. A NaN counts as the maximum, the last of several, as in PyTorch.
///
/// The CPU has loops of its own, plane by plane on all of candle's threads; nothing is kept for the
/// gradient but `x` itself. On other devices the maximum is candle's, which may pass over a NaN, and
/// several maxima share the gradient. (candle's own gradient is wrong: each of `t` maxima in a window
/// gets `t / k²` of it, a single one `1 / k²`.)
///
/// `x` is F32, F64, F16 or BF16; layouts that are not contiguous are copied first.
///
/// PyTorch: `torch.nn.functional.max_pool2d(x, kernel)`.
///
/// # Errors
/// A tensor of another rank or dtype, a kernel of 0 or one that is larger than the images.
///
/// ```
/// use candle_batch_norm::ops::max_pool2d;
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::arange(0f32, 16.0, &Device::Cpu)?.reshape((1, 1, 4, 4))?;
/// let y = max_pool2d(&x, 2)?;
/// assert_eq!(y.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?, [[5.0, 7.0], [13.0, 15.0]]);
/// # Ok(())
/// # }
/// ```
pub fn max_pool2d(x: &Tensor, kernel: usize) -> Result<Tensor> {
    check_float(NAME, x)?;
    let windows = check_windows(NAME, x, kernel)?;
    // In the op, a copy that is made so would be a constant.
    apply1(&contiguous(x)?, MaxPool(windows))
}

/// The windows on the images `x`, for the op of this name.
pub(crate) fn check_windows(op: &str, x: &Tensor, kernel: usize) -> Result<Windows> {
    let &[_, _, h, w] = x.dims() else {
        bail!("{op} expects an input [n, c, h, w], got {:?}", x.dims())
    };
    if kernel == 0 || kernel > h || kernel > w {
        bail!("{op} expects a kernel from 1 to the height and the width of the input {:?}, got {kernel}", x.dims())
    }
    Ok(Windows { h, w, kernel })
}

/// The gradient of [`max_pool2d`], from its input, its output and the output's gradient.
pub(crate) fn max_pool2d_gradient(
    windows: &Windows,
    x: &Tensor,
    y: &Tensor,
    dy: &Tensor,
) -> Result<Tensor> {
    if !keeps_graph() {
        return constant_gradient(windows, x, y, dy);
    }
    let shares = constant_gradient(windows, x, y, &dy.ones_like()?)?;
    spread(windows, dy)? * shares
}

/// What a window gets, at all of its pixels, with a gradient to `dy`; 0 for pixels in no window.
fn spread(windows: &Windows, dy: &Tensor) -> Result<Tensor> {
    let (n, c, oh, ow) = dy.dims4()?;
    let &Windows { h, w, kernel } = windows;
    dy.reshape((n * c, oh, 1, ow, 1))?
        .broadcast_as((n * c, oh, kernel, ow, kernel))?
        .reshape((n, c, oh * kernel, ow * kernel))?
        .pad_with_zeros(2, 0, h - oh * kernel)?
        .pad_with_zeros(3, 0, w - ow * kernel)
}

/// The gradient, by a fused pass on the CPU.
fn constant_gradient(windows: &Windows, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (x, y, dy) = (x.detach(), y.detach(), dy.detach().contiguous()?);
    if !x.device().is_cpu() {
        return composed(windows, &x, &y, &dy);
    }
    dispatch!(NAME, x.dtype(), backward(windows, &x, &dy))
}

struct MaxPool(Windows);

impl MaxPool {
    fn shape(&self, layout: &Layout) -> Result<Shape> {
        let (n, c, _, _) = layout.shape().dims4()?;
        Ok((n, c, self.0.oh(), self.0.ow()).into())
    }

    fn on_device<S: BackendStorage>(&self, x: &S, layout: &Layout) -> Result<(S, Shape)> {
        let kernel = (self.0.kernel, self.0.kernel);
        Ok((x.max_pool2d(layout, kernel, kernel)?, self.shape(layout)?))
    }
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = dispatch!(NAME, x.dtype(), forward(&self.0, x, layout))?;
        Ok((y, self.shape(layout)?))
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_device(x, layout)
    }

    fn metal_fwd(&self, x: &MetalStorage, layout: &Layout) -> Result<(MetalStorage, Shape)> {
        self.on_device(x, layout)
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = max_pool2d_gradient(&self.0, x, y, dy)?;
        gradient_of(x, Some(dx))
    }
}

fn forward<T: WithDType + Default>(
    windows: &Windows,
    x: &CpuStorage,
    layout: &Layout,
) -> Result<CpuStorage> {
    let y = cpu::forward::<T>(windows, values(NAME, x, layout)?);
    Ok(T::to_cpu_storage_owned(y))
}

fn backward<T: WithDType + Default>(windows: &Windows, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let dx = with_values(NAME, x, |values| {
        with_values(NAME, dy, |dy| Ok(cpu::backward::<T>(windows, values, dy)))
    })?;
    Ok(tensor(dx, x.shape()))
}

/// The gradient by candle's ops: several maxima share that of their window.
fn composed(windows: &Windows, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let kernel = windows.kernel;
    let (h, w) = (windows.oh() * kernel, windows.ow() * kernel);
    let whole = x.narrow(2, 0, h)?.narrow(3, 0, w)?;
    let is_max = whole
        .eq(&y.upsample_nearest2d(h, w)?)?
        .to_dtype(x.dtype())?;
    let count = (is_max.avg_pool2d(kernel)? * (kernel * kernel) as f64)?;
    // A window with a NaN may have no value that equals its maximum.
    let count = count.maximum(&count.ones_like()?)?;
    let dx = ((dy / count)?.upsample_nearest2d(h, w)? * is_max)?;
    dx.pad_with_zeros(2, 0, windows.h - h)?
        .pad_with_zeros(3, 0, windows.w - w)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// What other devices do, here on the CPU.
    #[test]
    fn several_maxima_share_the_gradient() -> Result<()> {
        let device = &Device::Cpu;
        let x = [
            [1f32, 2.0, 3.0, 3.0, 9.0],
            [0.0, 1.0, 3.0, -1.0, 9.0],
            [9.0; 5],
        ];
        let x = Tensor::new(&x, device)?.reshape((1, 1, 3, 5))?;
        let dy = Tensor::new(&[[[[5f32, 6.0]]]], device)?;
        let windows = Windows {
            h: 3,
            w: 5,
            kernel: 2,
        };
        let dx = composed(&windows, &x, &x.max_pool2d(2)?, &dy)?;
        let expected = [
            [0f32, 5.0, 2.0, 2.0, 0.0],
            [0.0, 0.0, 2.0, 0.0, 0.0],
            [0.0; 5],
        ];
        let dx = dx.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?;
        for (got, expected) in dx.concat().iter().zip(expected.concat()) {
            assert!((got - expected).abs() < 1e-6, "{dx:?}");
        }
        Ok(())
    }
}
