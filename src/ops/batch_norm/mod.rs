//! Batch norm over dimension 1, fused with what follows it.

mod args;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod differentiable;
mod host;
mod op;
pub mod plan;
mod renorm;
mod running;
mod vjp;

use std::sync::{Arc, OnceLock};

use candle_core::{bail, DType, Result, Tensor};

use crate::ops::graph;
use crate::ops::max_pool2d::max_pool2d;
use crate::ops::max_pool2d::windows::Windows;
use crate::shape::{check_eps, check_one_dtype, check_parameter, Dims, Order};
use args::{check, check_training, Pooling};
pub use args::{Activation, BatchNormArgs};
use op::{BatchNormOp, Slots};
pub use renorm::{batch_renorm_train, RenormLimits};
pub use running::BatchStats;
pub use vjp::{batch_norm_vjp, BatchNormGrads, BatchNormPullback};

/// For errors.
const NAME: &str = "batch norm";

/// What a backend has to know beside the tensors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Spec {
    pub dims: Dims,
    pub eps: f64,
    pub activation: Activation,
    /// The output is the maximum over these windows.
    pub windows: Option<Windows>,
    /// The statistics are those of the input, and gradients flow through them.
    pub training: bool,
    pub remove_mean: bool,
}

/// Which gradients somebody asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wants {
    pub dx: bool,
    pub dparams: bool,
    pub dresidual: bool,
}

impl Wants {
    /// Whether there have to be sums over a channel.
    pub fn sums(&self, spec: &Spec) -> bool {
        self.dparams || (self.dx && spec.training)
    }
}

impl Spec {
    /// `1 / √(var + eps)`
    #[inline(always)]
    pub fn rstd(&self, var: f64) -> f64 {
        1.0 / (var + self.eps).sqrt()
    }

    /// Values of the output.
    pub fn outputs(&self) -> usize {
        let Dims { n, c, s } = self.dims;
        n * c * self.windows.map_or(s, |windows| windows.outputs())
    }
}

/// Batch norm with the statistics of the batch itself: what a layer does in training.
///
/// For `x: [n, c, …]`, with `m` values per channel:
///
/// ```text
/// mean = Σx / m        var = Σ(x - mean)² / m        rstd = 1 / √(var + eps)
/// y    = activation((x - mean)·rstd·weight + bias + residual)
/// ```
///
/// and the maximum over windows of that, if there is a `max_pool`.
///
/// Gradients, with `g = dy` where the activation let through (at the maximum of each window) and 0
/// elsewhere, `x̂ = (x - mean)·rstd`:
///
/// ```text
/// dbias = Σg      dweight = Σg·x̂      dresidual = g
/// dx    = weight·rstd·(g - dbias/m - x̂·dweight/m)
/// ```
///
/// Returns `y`, with the dtype and (without `max_pool`) the shape of `x`, and the statistics, which are constants to
/// autograd. An empty `x` gives an empty `y` and statistics over no values.
///
/// `x` is F32, F64, F16 or BF16 with at least 2 dimensions. Its layout is free: contiguous tensors
/// and those with the channels last in memory (`[n, …, c]` permuted) are taken as they are, others
/// are copied first, and so are all but contiguous ones if there is a `max_pool`. Values are computed in F32 (F64 for F64) and summed in F64.
///
/// PyTorch: `torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)`.
/// Source: Ioffe and Szegedy 2015, <https://arxiv.org/abs/1502.03167>.
///
/// # Errors
/// `x` of another rank or dtype, or on a device without an implementation; parameters or residual
/// of another shape, dtype or device; a `max_pool` for another rank than 4, of 0 or larger than the
/// images; `eps <= 0` or NaN; a single value per channel, whose variance
/// says nothing.
///
/// ```
/// use candle_batch_norm::ops::{batch_norm_train, BatchNormArgs};
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 10.0], [3.0, 30.0]], &Device::Cpu)?;
/// let (y, stats) = batch_norm_train(&x, &BatchNormArgs::new())?;
/// assert_eq!(stats.mean()?.to_vec1::<f64>()?, [2.0, 20.0]);
/// assert_eq!(stats.var()?.to_vec1::<f64>()?, [1.0, 100.0]);
/// let y = y.to_vec2::<f32>()?;
/// assert!((y[0][0] + 1.0).abs() < 1e-5 && (y[1][1] - 1.0).abs() < 1e-5);
/// # Ok(())
/// # }
/// ```
pub fn batch_norm_train(x: &Tensor, args: &BatchNormArgs) -> Result<(Tensor, BatchStats)> {
    let dims = check_training(x, args)?;
    let pooling = args.pooling(x)?;
    if dims.numel() == 0 {
        return Ok((of_nothing(x, pooling)?, BatchStats::of_nothing(x)?));
    }
    let (y, stats) = apply(x, args, dims, pooling, Normalise::Batch)?;
    Ok((y, BatchStats::new(stats, dims.m())))
}

/// The statistics of a batch, as [`batch_norm_train`] finds them.
///
/// ```text
/// mean = Σx / m        var = Σ(x - mean)² / m
/// ```
///
/// `x` is as there, and empty it has statistics over no values; one value per channel is fine. They are
/// constants to autograd. On the CPU this reads `x` once; on CUDA it is a whole forward pass, with an
/// output that nobody gets.
///
/// PyTorch: `torch.var_mean(x, dims, correction=0)`.
///
/// # Errors
/// `x` of another rank or dtype, or on a device without an implementation.
///
/// ```
/// use candle_batch_norm::ops::batch_stats;
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 10.0], [3.0, 30.0]], &Device::Cpu)?;
/// assert_eq!(batch_stats(&x)?.var()?.to_vec1::<f64>()?, [1.0, 100.0]);
/// # Ok(())
/// # }
/// ```
pub fn batch_stats(x: &Tensor) -> Result<BatchStats> {
    let (x, args) = (x.detach(), BatchNormArgs::new());
    let dims = check(&x, &args)?;
    if dims.numel() == 0 {
        return BatchStats::of_nothing(&x);
    }
    let stats = match x.device().is_cpu() {
        true => {
            let Prepared { op, tensors, .. } =
                prepare(&x, &args, dims, Pooling::None, Normalise::Batch)?;
            host::statistics(&op.spec, &tensors[0])?
        }
        false => apply(&x, &args, dims, Pooling::None, Normalise::Batch)?.1,
    };
    Ok(BatchStats::new(stats, dims.m()))
}

/// Batch norm with given statistics: what a layer does in evaluation, or while it is frozen.
///
/// ```text
/// y = activation((x - mean) / √(var + eps)·weight + bias + residual)
/// ```
///
/// and the maximum over windows of that, if there is a `max_pool`.
///
/// `mean` and `var` are `[c]`, both F32, F64 or of the input's dtype, and constants to autograd. The
/// gradients are those of [`batch_norm_train`] but for `dx = weight·rstd·g`, so that what lies below
/// a frozen layer still trains. They use the statistics as they were, whatever happens to `mean` and
/// `var` afterwards.
///
/// PyTorch: `torch.nn.functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)`.
///
/// # Errors
/// As for [`batch_norm_train`], but for the last two: here `eps` may be 0, and a single value per
/// channel is fine.
///
/// ```
/// use candle_batch_norm::ops::{batch_norm_inference, BatchNormArgs};
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 30.0]], &Device::Cpu)?;
/// let mean = Tensor::new(&[0f32, 20.0], &Device::Cpu)?;
/// let var = Tensor::new(&[4f32, 100.0], &Device::Cpu)?;
/// let args = BatchNormArgs { eps: 0.0, ..BatchNormArgs::new() };
/// let y = batch_norm_inference(&x, &mean, &var, &args)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[0.5, 1.0]]);
/// # Ok(())
/// # }
/// ```
pub fn batch_norm_inference(
    x: &Tensor,
    mean: &Tensor,
    var: &Tensor,
    args: &BatchNormArgs,
) -> Result<Tensor> {
    let dims = check(x, args)?;
    let dtypes = [DType::F32, DType::F64, x.dtype()];
    for (what, given) in [("a mean", mean), ("a variance", var)] {
        check_parameter(NAME, what, given, &[dims.c], x, &dtypes)?;
    }
    check_one_dtype(NAME, "mean and variance", mean, var)?;
    check_eps(NAME, args.eps)?;
    let pooling = args.pooling(x)?;
    if dims.numel() == 0 {
        return of_nothing(x, pooling);
    }
    let given = (mean.detach().contiguous()?, var.detach().contiguous()?);
    Ok(apply(x, args, dims, pooling, Normalise::Given(given))?.0)
}

/// The output for an empty input.
fn of_nothing(x: &Tensor, pooling: Pooling) -> Result<Tensor> {
    match pooling {
        Pooling::None => Ok(x.clone()),
        Pooling::Fused(windows) | Pooling::After(windows) => {
            let (n, c, _, _) = x.dims4()?;
            Tensor::zeros((n, c, windows.oh(), windows.ow()), x.dtype(), x.device())
        }
    }
}

/// Where mean and variance come from.
enum Normalise {
    /// From the input.
    Batch,
    /// From the input, where somebody found them before.
    Known((Tensor, Tensor)),
    /// From elsewhere: they do not depend on the input.
    Given((Tensor, Tensor)),
}

/// Runs the op on arguments that have been checked; gives `y` and the statistics, F64 `[2, c]`.
fn apply(
    x: &Tensor,
    args: &BatchNormArgs,
    dims: Dims,
    pooling: Pooling,
    normalise: Normalise,
) -> Result<(Tensor, Tensor)> {
    let Prepared { op, order, tensors } = prepare(x, args, dims, pooling, normalise)?;
    let saved = op.saved.clone();
    let [x_kernel, second, third] = &tensors;
    let y = graph::apply([x_kernel, second, third], op)?;
    let y = match pooling {
        Pooling::After(windows) => max_pool2d(&order.out_of_kernel(&y, x)?, windows.kernel)?,
        Pooling::None | Pooling::Fused(_) => order.out_of_kernel(&y, x)?,
    };
    Ok((y, statistics(&saved)?))
}

/// The op for arguments that have been checked, and the three tensors that it takes.
struct Prepared {
    op: BatchNormOp,
    order: Order,
    tensors: [Tensor; 3],
}

fn prepare(
    x: &Tensor,
    args: &BatchNormArgs,
    dims: Dims,
    pooling: Pooling,
    normalise: Normalise,
) -> Result<Prepared> {
    let (training, given) = match normalise {
        Normalise::Batch => (true, None),
        Normalise::Known(stats) => (true, Some(stats)),
        Normalise::Given(stats) => (false, Some(stats)),
    };
    let (order, windows) = match pooling {
        // Windows are looked for on planes.
        Pooling::Fused(windows) => (Order::ChannelsFirst, Some(windows)),
        Pooling::None | Pooling::After(_) => (Order::of(x)?, None),
    };
    let x_kernel = order.into_kernel(x)?;
    let dims = match order {
        Order::ChannelsFirst => dims,
        Order::ChannelsLast => Dims {
            n: dims.m(),
            c: dims.c,
            s: 1,
        },
    };
    let contiguous = |t: Option<&Tensor>| t.map(Tensor::contiguous).transpose();
    let (weight, bias) = (contiguous(args.weight)?, contiguous(args.bias)?);
    let (params, second) = match (&weight, &bias) {
        // A custom op takes three tensors: with a residual, the parameters travel as one.
        (Some(weight), Some(bias)) if args.residual.is_some() => {
            (Slots::Packed, Some(Tensor::stack(&[weight, bias], 0)?))
        }
        (Some(_), Some(_)) => (Slots::Both, weight),
        (Some(_), None) => (Slots::Weight, weight),
        (None, Some(_)) => (Slots::Bias, bias.clone()),
        (None, None) => (Slots::None, None),
    };
    let third = match args.residual {
        Some(residual) => Some(order.into_kernel(residual)?),
        None if params == Slots::Both => bias,
        None => None,
    };
    let op = BatchNormOp {
        spec: Spec {
            dims,
            eps: args.eps,
            activation: args.activation,
            windows,
            training,
            remove_mean: args.remove_mean,
        },
        params,
        has_residual: args.residual.is_some(),
        given,
        saved: Arc::new(OnceLock::new()),
        keeps_maxima: (training && x.track_op())
            || [args.weight, args.bias]
                .into_iter()
                .flatten()
                .any(Tensor::track_op),
        maxima: OnceLock::new(),
    };
    // In the place of an absent argument stands the input again: it is there, and never read.
    let second = second.unwrap_or_else(|| x_kernel.clone());
    let third = third.unwrap_or_else(|| x_kernel.clone());
    Ok(Prepared {
        op,
        order,
        tensors: [x_kernel, second, third],
    })
}

/// What the forward pass left.
fn statistics(saved: &OnceLock<Tensor>) -> Result<Tensor> {
    match saved.get() {
        Some(stats) => Ok(stats.clone()),
        None => bail!("batch norm: the forward pass left no statistics"),
    }
}
