//! Any tensor as `[n, c, s]`: the one place that checks rank, channels, dtype and device.

use candle_core::{bail, DType, Device, Result, Shape, Tensor};

use crate::ops::graph::{contiguous, view, view_for_one};
use crate::ops::slices::check_float;

pub(crate) use crate::dims::Dims;

/// Checks that `x` has channels in dimension 1, and a dtype and a device that `op` knows; gives its sizes.
pub(crate) fn check_input(op: &str, x: &Tensor) -> Result<Dims> {
    if x.rank() < 2 {
        bail!(
            "{op} expects an input of at least 2 dimensions, [n, c, …], got {:?}",
            x.dims()
        )
    }
    check_values(op, x)?;
    let dims = x.dims();
    Ok(Dims {
        n: dims[0],
        c: dims[1],
        s: dims[2..].iter().product(),
    })
}

/// Checks that `x` has a dtype and a device that `op` knows.
pub(crate) fn check_values(op: &str, x: &Tensor) -> Result<()> {
    check_float(op, x)?;
    match x.device() {
        Device::Cpu => Ok(()),
        Device::Cuda(_) if cfg!(feature = "cuda") => Ok(()),
        Device::Cuda(_) => bail!(
            "{op} got a CUDA tensor, but candle-batch-norm was built without its feature `cuda`: \
             add features = [\"cuda\"] to the dependency"
        ),
        Device::Metal(_) => bail!("{op} has no Metal implementation: move the input to the CPU"),
    }
}

/// Checks what is added to a variance that may be 0.
pub(crate) fn check_eps(op: &str, eps: f64) -> Result<()> {
    if eps.is_nan() || eps < 0.0 {
        bail!("{op} expects eps >= 0, got {eps}")
    }
    Ok(())
}

/// Checks a tensor of a given shape (`what` names it in errors) that belongs to the input.
pub(crate) fn check_parameter(
    op: &str,
    what: &str,
    t: &Tensor,
    shape: &[usize],
    x: &Tensor,
    dtypes: &[DType],
) -> Result<()> {
    if t.dims() != shape {
        bail!(
            "{op} expects {what} of shape {shape:?} for an input of shape {:?}, got {:?}",
            x.dims(),
            t.dims()
        )
    }
    if !dtypes.contains(&t.dtype()) {
        bail!(
            "{op} expects {what} of dtype {} for an input of dtype {:?}, got {:?}",
            list(dtypes),
            x.dtype(),
            t.dtype()
        )
    }
    check_device(op, what, t, x)
}

/// Checks the learned parameters, as far as there are any: in the input's dtype, or in F32 beside half precision.
pub(crate) fn check_parameters(
    op: &str,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    shape: &[usize],
    x: &Tensor,
) -> Result<()> {
    let dtypes = match x.dtype() {
        half @ (DType::F16 | DType::BF16) => vec![DType::F32, half],
        dtype => vec![dtype],
    };
    for (what, parameter) in [("a weight", weight), ("a bias", bias)] {
        if let Some(parameter) = parameter {
            check_parameter(op, what, parameter, shape, x, &dtypes)?;
        }
    }
    match (weight, bias) {
        (Some(weight), Some(bias)) => check_one_dtype(op, "weight and bias", weight, bias),
        _ => Ok(()),
    }
}

/// Checks two tensors that a kernel reads alike (`what` names them in errors).
pub(crate) fn check_one_dtype(op: &str, what: &str, a: &Tensor, b: &Tensor) -> Result<()> {
    if a.dtype() != b.dtype() {
        bail!(
            "{op} expects {what} of one dtype, got {:?} and {:?}",
            a.dtype(),
            b.dtype()
        )
    }
    Ok(())
}

/// Checks a tensor that has to look like `x` (`what` and `like` name the two in errors).
pub(crate) fn check_like(op: &str, what: &str, t: &Tensor, like: &str, x: &Tensor) -> Result<()> {
    if t.dims() != x.dims() || t.dtype() != x.dtype() {
        bail!(
            "{op} expects {what} like {like}, {:?} {:?}, got {:?} {:?}",
            x.dims(),
            x.dtype(),
            t.dims(),
            t.dtype()
        )
    }
    check_device(op, what, t, x)
}

/// Checks the device of a tensor (`what` names it in errors) against the input.
pub(crate) fn check_device(op: &str, what: &str, t: &Tensor, x: &Tensor) -> Result<()> {
    if !t.device().same_device(x.device()) {
        bail!(
            "{op} expects {what} on the input's device, {:?}, got {:?}",
            x.device().location(),
            t.device().location()
        )
    }
    Ok(())
}

fn list(dtypes: &[DType]) -> String {
    let names: Vec<_> = dtypes.iter().map(|dtype| format!("{dtype:?}")).collect();
    names.join(" or ")
}

/// The order in which a tensor `[n, c, …]` lies in memory, as far as a kernel can use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Contiguous, or to be made so by a copy.
    ChannelsFirst,
    /// The channels vary fastest: `[n, …, c]` is contiguous, a matrix `[m, c]` without a copy.
    ChannelsLast,
}

impl Order {
    pub fn of(x: &Tensor) -> Result<Self> {
        if x.rank() > 2 && !x.is_contiguous() && channels_to_back(x)?.is_contiguous() {
            return Ok(Self::ChannelsLast);
        }
        Ok(Self::ChannelsFirst)
    }

    /// `x` in the form that the kernels take: contiguous with the channels in dimension 1.
    pub fn into_kernel(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::ChannelsFirst => contiguous(x),
            Self::ChannelsLast => {
                let matrix = channels_to_back(x)?
                    .contiguous()?
                    .reshape(((), x.dims()[1]))?;
                let shape = x.shape().clone();
                let back = move |gradient: &Tensor| channels_to_1(gradient, &shape);
                Ok(view_for_one(x, matrix, back))
            }
        }
    }

    /// `y` from the kernels in the shape, and in the order in memory, of the input `x`.
    pub fn out_of_kernel(self, y: &Tensor, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::ChannelsFirst => Ok(y.clone()),
            Self::ChannelsLast => {
                let back = |gradient: &Tensor| Self::ChannelsLast.into_kernel(gradient);
                Ok(view(y, channels_to_1(y, x.shape())?, back))
            }
        }
    }
}

/// `[n·s, c]` as `[n, c, …]` of this shape, without a copy.
fn channels_to_1(matrix: &Tensor, shape: &Shape) -> Result<Tensor> {
    let mut dims = shape.dims().to_vec();
    let c = dims.remove(1);
    dims.push(c);
    let mut order: Vec<usize> = (0..dims.len() - 1).collect();
    order.insert(1, dims.len() - 1);
    matrix.reshape(dims)?.permute(order)
}

/// `[n, c, …]` as `[n, …, c]`, without a copy.
fn channels_to_back(x: &Tensor) -> Result<Tensor> {
    let mut order: Vec<usize> = (0..x.rank()).filter(|&dim| dim != 1).collect();
    order.push(1);
    x.permute(order)
}
