//! Batch renormalisation: the statistics of the batch, corrected towards the running ones.

use candle_core::{bail, DType, Result, Tensor};

use super::{
    apply, batch_norm_train, batch_stats, check_training, of_nothing, BatchNormArgs, BatchStats,
    Normalise, NAME,
};
use crate::ops::slices::computed_in;
use crate::shape::check_parameter;

/// How far batch renormalisation may go from the batch's own statistics.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RenormLimits {
    /// At least 1. With 1 there is no correction of the scale.
    pub r_max: f64,
    /// At least 0. With 0 there is no correction of the mean.
    pub d_max: f64,
}

impl RenormLimits {
    /// No correction: batch norm.
    pub const NONE: Self = Self {
        r_max: 1.0,
        d_max: 0.0,
    };

    pub(crate) fn check(&self) -> Result<()> {
        let Self { r_max, d_max } = *self;
        if r_max >= 1.0 && d_max >= 0.0 {
            return Ok(());
        }
        bail!("batch renorm expects r_max >= 1 and d_max >= 0, got {r_max} and {d_max}")
    }
}

/// Batch norm in training whose output is near to what evaluation would give.
///
/// With `mean` and `var` of the batch as in [`batch_norm_train`](super::batch_norm_train), `σ = √(running_var + eps)` and
/// `σ_B = √(var + eps)`:
///
/// ```text
/// r = clamp(σ_B / σ, 1 / r_max, r_max)        d = clamp((mean - running_mean) / σ, -d_max, d_max)
/// y = activation((x̂·r + d)·weight + bias + residual)        x̂ = (x - mean) / σ_B
/// ```
///
/// `r` and `d` are constants to autograd: for the same `g`, `dx` is that of batch norm times `r`, and
/// `dweight = Σg·(x̂·r + d)`. With [`RenormLimits::NONE`] this is batch norm; with wide
/// limits `y` is what the running statistics give, but still with gradients through those of the batch.
///
/// `running_mean` and `running_var` are `[c]`, F32 or F64, as they are before this batch moves them.
/// Returns `y` and the statistics of the batch. `x` and the arguments are those of `batch_norm_train`.
/// A NaN in the running statistics gives NaN in its channel on the CPU. The statistics of the batch are
/// found first, by [`batch_stats`](super::batch_stats): that reads `x` once more, and on CUDA is a whole
/// forward pass more.
///
/// Source: Ioffe 2017, <https://arxiv.org/abs/1702.03275>; the running variance stands in the place of
/// its running standard deviation. There is no counterpart in PyTorch;
/// `tf.compat.v1.keras.layers.BatchNormalization(renorm=True, renorm_clipping=…)` keeps further
/// statistics of its own.
///
/// # Errors
/// Those of `batch_norm_train`; running statistics of another shape, dtype or device; limits out of
/// range; no `remove_mean`.
///
/// ```
/// use candle_batch_norm::ops::{batch_renorm_train, BatchNormArgs, RenormLimits};
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f64], [3.0]], &Device::Cpu)?;
/// let (mean, var) = (Tensor::new(&[1f64], &Device::Cpu)?, Tensor::new(&[4f64], &Device::Cpu)?);
/// let limits = RenormLimits { r_max: 3.0, d_max: 5.0 };
/// let args = BatchNormArgs { eps: 1e-12, ..BatchNormArgs::new() };
/// let (y, _) = batch_renorm_train(&x, &mean, &var, limits, &args)?;
/// let y = y.flatten_all()?.to_vec1::<f64>()?; // (x - 1) / 2
/// assert!(y[0].abs() < 1e-9 && (y[1] - 1.0).abs() < 1e-9);
/// # Ok(())
/// # }
/// ```
pub fn batch_renorm_train(
    x: &Tensor,
    running_mean: &Tensor,
    running_var: &Tensor,
    limits: RenormLimits,
    args: &BatchNormArgs,
) -> Result<(Tensor, BatchStats)> {
    let dims = check_training(x, args)?;
    for (what, running) in [
        ("a running_mean", running_mean),
        ("a running_var", running_var),
    ] {
        check_parameter(NAME, what, running, &[dims.c], x, &[DType::F32, DType::F64])?;
    }
    limits.check()?;
    if !args.remove_mean {
        bail!("batch renorm expects remove_mean, for it corrects the mean")
    }
    if limits == RenormLimits::NONE {
        return batch_norm_train(x, args);
    }
    let pooling = args.pooling(x)?;
    if dims.numel() == 0 {
        return Ok((of_nothing(x, pooling)?, BatchStats::of_nothing(x)?));
    }
    let stats = batch_stats(x)?;
    let (mean, var) = (stats.mean()?, stats.var()?);
    let sigma = |var: &Tensor| (var + args.eps)?.sqrt();
    let constant = |t: &Tensor| t.detach().to_dtype(DType::F64);
    let running_sigma = sigma(&constant(running_var)?)?;
    let RenormLimits { r_max, d_max } = limits;
    let r = (sigma(&var)? / &running_sigma)?.clamp(1.0 / r_max, r_max)?;
    let d = ((&mean - constant(running_mean)?)? / &running_sigma)?.clamp(-d_max, d_max)?;
    // (x̂·r + d)·weight + bias = x̂·(weight·r) + (bias + weight·d)
    let dtype = computed_in(x.dtype());
    let (r, d) = (r.to_dtype(dtype)?, d.to_dtype(dtype)?);
    let (weight, shift) = match args.weight {
        Some(weight) => {
            let weight = weight.to_dtype(dtype)?;
            ((&weight * r)?, (weight * d)?)
        }
        None => (r, d),
    };
    let bias = match args.bias {
        Some(bias) => (bias.to_dtype(dtype)? + shift)?,
        None => shift,
    };
    let args = BatchNormArgs {
        weight: Some(&weight),
        bias: Some(&bias),
        ..*args
    };
    let (y, _) = apply(x, &args, dims, pooling, Normalise::Known((mean, var)))?;
    Ok((y, stats))
}
