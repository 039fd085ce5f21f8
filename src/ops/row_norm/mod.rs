//! Norms of the rows of a tensor, each by its own statistics: layer, group, instance and RMS norm.

mod args;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod differentiable;
mod host;
mod op;
pub mod plan;
mod vjp;

use candle_core::{Result, Shape, Tensor};

use super::batch_norm::BatchStats;
use super::Activation;
use crate::dims::Rows;
pub use args::RowNormArgs;
use args::{groups, last_dimensions};
pub use vjp::{group_norm_vjp, layer_norm_vjp, rms_norm_vjp, RowNormGrads, RowNormPullback};

/// What a backend has to know beside the tensors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub rows: Rows,
    /// The tensor is `[n, s, c]` in memory, otherwise `[n, c, s]`.
    pub channels_last: bool,
    pub eps: f64,
    pub activation: Activation,
    pub remove_mean: bool,
}

impl Spec {
    /// `1 / √(var + eps)`
    #[inline(always)]
    pub fn rstd(&self, var: f64) -> f64 {
        1.0 / (var + self.eps).sqrt()
    }
}

/// Which gradients somebody asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wants {
    pub dx: bool,
    pub dparams: bool,
}

/// Layer norm: each sample is normalised over its last dimensions, which are `normalized_shape`.
///
/// For a row of `m` values that have all other indices in common:
///
/// ```text
/// mean = Σx / m        var = Σ(x - mean)² / m        rstd = 1 / √(var + eps)
/// y    = activation((x - mean)·rstd·weight + bias)
/// ```
///
/// Weight and bias have the shape `normalized_shape`. With `x̂ = (x - mean)·rstd` and `g = dy` where the
/// activation let through, 0 elsewhere, and `h = weight·g`, the gradients are
///
/// ```text
/// dbias = Σg      dweight = Σg·x̂      (over all rows)
/// dx    = rstd·(h - Σh/m - x̂·Σ(h·x̂)/m)      (Σ over the row)
/// ```
///
/// `x` is F32, F64, F16 or BF16, and `y` has its shape and dtype; it is copied first if it is not contiguous.
/// Values are computed in F32 (F64 for F64) and summed in F64 (on CUDA, 4 to 32 values of F32 at a time are summed in
/// F32 first). A row of constant values gives exactly the bias, or NaN if `eps` is 0.
///
/// PyTorch: `torch.nn.functional.layer_norm(x, normalized_shape, weight, bias, eps)`. Source: Ba, Kiros and
/// Hinton 2016, <https://arxiv.org/abs/1607.06450>.
///
/// # Errors
/// A `normalized_shape` that is empty or not that of the last dimensions; another dtype, or a device without
/// an implementation; parameters of another shape, dtype or device; `eps < 0` or NaN.
///
/// ```
/// use candle_batch_norm::ops::{layer_norm, RowNormArgs};
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f64, 3.0], [10.0, 30.0]], &Device::Cpu)?;
/// let args = RowNormArgs { eps: 0.0, ..RowNormArgs::new() };
/// let y = layer_norm(&x, 2, &args)?;
/// assert_eq!(y.to_vec2::<f64>()?, [[-1.0, 1.0], [-1.0, 1.0]]);
/// # Ok(())
/// # }
/// ```
pub fn layer_norm(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    args: &RowNormArgs,
) -> Result<Tensor> {
    Ok(
        last_dimensions(LAYER, x, normalized_shape.into(), args, true)?
            .run(x)?
            .0,
    )
}

/// RMS norm: [`layer_norm`] that leaves the mean where it is.
///
/// ```text
/// y = activation(x / √(Σx² / m + eps)·weight + bias)
/// ```
///
/// The gradients are those of [`layer_norm`] without `Σh/m`.
///
/// PyTorch: `torch.nn.functional.rms_norm(x, normalized_shape, weight, eps)`, whose `eps` is by default that
/// of the dtype. Source: Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>.
///
/// # Errors
/// Those of [`layer_norm`].
///
/// ```
/// use candle_batch_norm::ops::{rms_norm, RowNormArgs};
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[0f64, 8.0, 0.0, 0.0]], &Device::Cpu)?; // mean square 16
/// let args = RowNormArgs { eps: 0.0, ..RowNormArgs::new() };
/// assert_eq!(rms_norm(&x, 4, &args)?.to_vec2::<f64>()?, [[0.0, 2.0, 0.0, 0.0]]);
/// # Ok(())
/// # }
/// ```
pub fn rms_norm(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    args: &RowNormArgs,
) -> Result<Tensor> {
    Ok(
        last_dimensions(RMS, x, normalized_shape.into(), args, false)?
            .run(x)?
            .0,
    )
}

/// Group norm: of `x: [n, c, …]`, each sample's channels are normalised in `num_groups` groups of neighbours.
///
/// Formula, gradients, dtypes and accuracy are those of [`layer_norm`], where a row is a group of a sample with
/// all of its positions, and weight and bias are `[c]`. Contiguous tensors and those with the channels last in
/// memory (`[n, …, c]` permuted) are taken as they are, others are copied first; on CUDA also those with the channels
/// last and less than 32 bytes of them in a group.
///
/// PyTorch: `torch.nn.functional.group_norm(x, num_groups, weight, bias, eps)`. Source: Wu and He 2018,
/// <https://arxiv.org/abs/1803.08494>.
///
/// # Errors
/// `x` of another rank or dtype, or on a device without an implementation; a number of groups that does not
/// divide the channels; parameters of another shape, dtype or device; `eps < 0` or NaN.
///
/// ```
/// use candle_batch_norm::ops::{group_norm, RowNormArgs};
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f64, 3.0, 10.0, 30.0]], &Device::Cpu)?;
/// let args = RowNormArgs { eps: 0.0, ..RowNormArgs::new() };
/// let y = group_norm(&x, 2, &args)?;
/// assert_eq!(y.to_vec2::<f64>()?, [[-1.0, 1.0, -1.0, 1.0]]);
/// # Ok(())
/// # }
/// ```
pub fn group_norm(x: &Tensor, num_groups: usize, args: &RowNormArgs) -> Result<Tensor> {
    Ok(groups(GROUP, x, Some(num_groups), args)?.run(x)?.0)
}

/// Instance norm: [`group_norm`] with a group for each channel.
///
/// Returns the statistics of the batch too, as they go into running ones: the means over all samples of
/// their means and of their variances, constants to autograd.
///
/// PyTorch: `torch.nn.functional.instance_norm(x, weight=weight, bias=bias, eps=eps)`. Source: Ulyanov,
/// Vedaldi and Lempitsky 2016, <https://arxiv.org/abs/1607.08022>.
///
/// # Errors
/// Those of [`group_norm`], and a single value per channel of a sample, which has no variance.
///
/// ```
/// use candle_batch_norm::ops::{instance_norm, RowNormArgs};
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[[1f64, 3.0]], [[10.0, 30.0]]], &Device::Cpu)?;
/// let args = RowNormArgs { eps: 0.0, ..RowNormArgs::new() };
/// let (y, stats) = instance_norm(&x, &args)?;
/// assert_eq!(y.to_vec3::<f64>()?, [[[-1.0, 1.0]], [[-1.0, 1.0]]]);
/// assert_eq!(stats.mean()?.to_vec1::<f64>()?, [11.0]);
/// assert_eq!(stats.var()?.to_vec1::<f64>()?, [50.5]); // of 1 and 100
/// # Ok(())
/// # }
/// ```
pub fn instance_norm(x: &Tensor, args: &RowNormArgs) -> Result<(Tensor, BatchStats)> {
    let prepared = groups(INSTANCE, x, None, args)?;
    let rows = prepared.op.spec.rows;
    let (y, saved) = prepared.run(x)?;
    let Some(saved) = saved else {
        return Ok((y, BatchStats::of_nothing(x)?));
    };
    let by_sample = saved.reshape((2, rows.n, rows.c))?;
    Ok((y, BatchStats::new(by_sample.mean(1)?, rows.s)))
}

/// [`instance_norm`] for those who need no statistics.
pub(crate) fn instance_norm_alone(x: &Tensor, args: &RowNormArgs) -> Result<Tensor> {
    Ok(groups(INSTANCE, x, None, args)?.run(x)?.0)
}

/// For errors.
const LAYER: &str = "layer norm";
const RMS: &str = "rms norm";
const GROUP: &str = "group norm";
const INSTANCE: &str = "instance norm";
