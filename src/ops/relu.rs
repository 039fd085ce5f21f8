//! The rectifier.

use std::mem::MaybeUninit;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, WithDType};

use super::backward::gradient_of;
use super::graph::{apply1, contiguous};
use super::keeps_graph::keeps_graph;
use super::loops::element::cut;
use super::output::Output;
use super::parallel::for_each;
use super::slices::{check_float, dispatch, tensor, values, vectorised, with_values};

const NAME: &str = "relu";

/// `max(x, 0)`, value by value.
///
/// ```text
/// y = 0 if x < 0, x otherwise        dx = 0 if x <= 0, dy otherwise
/// ```
///
/// `x` may have any shape, which is that of `y`. A NaN stays one, and lets the gradient through. (The
/// gradient of candle's `relu` is `dy` where `x` is 0.)
///
/// On the CPU this is one pass in each direction, on all of candle's threads. On other devices it is
/// candle's `relu`.
///
/// `x` is F32, F64, F16 or BF16; layouts that are not contiguous are copied first.
///
/// PyTorch: `torch.nn.functional.relu(x)`.
///
/// # Errors
/// A tensor of another dtype.
///
/// ```
/// use candle_batch_norm::ops::relu;
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[-1f32, 0.0, 2.0], &Device::Cpu)?;
/// assert_eq!(relu(&x)?.to_vec1::<f32>()?, [0.0, 0.0, 2.0]);
/// # Ok(())
/// # }
/// ```
pub fn relu(x: &Tensor) -> Result<Tensor> {
    check_float(NAME, x)?;
    if !x.device().is_cpu() {
        return x.relu();
    }
    // In the op, a copy that is made so would be a constant.
    apply1(&contiguous(x)?, Relu)
}

struct Relu;

impl CustomOp1 for Relu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = dispatch!(NAME, x.dtype(), forward(x, layout))?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dx = match keeps_graph() {
            true => through_relu(x, dy)?,
            false => dispatch!(NAME, x.dtype(), backward(x, &dy.detach().contiguous()?))?,
        };
        gradient_of(x, Some(dx))
    }
}

fn forward<T: WithDType>(x: &CpuStorage, layout: &Layout) -> Result<CpuStorage> {
    let x = values::<T>(NAME, x, layout)?;
    let y = in_parts(x, x, |x, _| if x < T::zero() { T::zero() } else { x });
    Ok(T::to_cpu_storage_owned(y))
}

fn backward<T: WithDType + Default>(x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let dx = with_values(NAME, x, |x| {
        with_values(NAME, dy, |dy| {
            Ok(in_parts::<T>(x, dy, |x, dy| cut(x, T::zero(), dy)))
        })
    })?;
    Ok(tensor(dx, x.shape()))
}

/// `dy` where a ReLU let through, 0 elsewhere, with a gradient to `dy`. `values` are those before the
/// ReLU or behind it.
pub(super) fn through_relu(values: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let cut = values.detach().le(0.0)?;
    cut.where_cond(&dy.zeros_like()?, dy)
}

/// Values of a task.
const PART: usize = 1 << 13;

/// `f` of each value of `a` and the one of `b` in its place.
#[inline(always)]
fn in_parts<T: WithDType>(a: &[T], b: &[T], f: impl Fn(T, T) -> T + Copy + Sync) -> Vec<T> {
    let mut out = Output::new(a.len());
    let parts = out.parts();
    for_each(a.len().div_ceil(PART), a.len(), |part| {
        let range = part * PART..a.len().min((part + 1) * PART);
        // SAFETY: the ranges of two parts do not overlap.
        let out = unsafe { parts.part(range.clone()) };
        let (a, b) = (&a[range.clone()], &b[range]);
        vectorised(
            #[inline(always)]
            || map2(out, a, b, f),
        );
    });
    // SAFETY: the parts make up the whole.
    unsafe { out.finish() }
}

#[inline(always)]
fn map2<T: Copy>(out: &mut [MaybeUninit<T>], a: &[T], b: &[T], f: impl Fn(T, T) -> T) {
    let (a, b) = (&a[..out.len()], &b[..out.len()]);
    for (i, out) in out.iter_mut().enumerate() {
        out.write(f(a[i], b[i]));
    }
}
