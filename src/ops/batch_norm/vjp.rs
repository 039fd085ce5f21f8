//! Batch norm and its gradients without candle's autograd in between.

use candle_core::{bail, Result, Tensor};

use super::op::{BatchNormOp, Slots, TensorGrads};
use super::{check_training, prepare, statistics, Normalise, Prepared};
use super::{BatchNormArgs, BatchStats, Pooling, Wants, NAME};
use crate::ops::keeps_graph::for_gradients;
use crate::ops::max_pool2d::windows::Windows;
use crate::ops::max_pool2d::{max_pool2d, max_pool2d_gradient};
use crate::ops::param_grads::Param;
use crate::shape::{check_like, Order};

/// [`batch_norm_train`](super::batch_norm_train) and what gives its gradients, for programs that go
/// back through a network by themselves.
///
/// The output is a constant to autograd, and so are the gradients, unless
/// [gradients are to have gradients](crate::ops#gradients-of-gradients). What candle's `backward` adds to an op, a tensor of zeros and
/// the sum of the gradient with it for each argument that comes from candle's ops, is not there: that is as much work
/// as the op itself, in half precision many times as much.
///
/// JAX: `jax.vjp`. PyTorch: `torch.ops.aten.native_batch_norm` and `native_batch_norm_backward`.
///
/// # Errors
/// Those of [`batch_norm_train`](super::batch_norm_train), and an empty input.
///
/// ```
/// use candle_batch_norm::ops::{batch_norm_vjp, BatchNormArgs};
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f64, 10.0], [3.0, 30.0], [5.0, 20.0]], &Device::Cpu)?;
/// let bias = Tensor::new(&[0f64, 1.0], &Device::Cpu)?;
/// let args = BatchNormArgs { bias: Some(&bias), ..BatchNormArgs::new() };
/// let (y, _stats, pullback) = batch_norm_vjp(&x, &args)?;
/// let dy = Tensor::new(&[[1f64, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?;
/// let grads = pullback.gradients(&dy)?;
/// assert_eq!(grads.dbias.unwrap().to_vec1::<f64>()?, [9.0, 12.0]);
/// assert_eq!(grads.dx.dims(), y.dims());
/// assert!(grads.dweight.is_none());
/// # Ok(())
/// # }
/// ```
pub fn batch_norm_vjp(
    x: &Tensor,
    args: &BatchNormArgs,
) -> Result<(Tensor, BatchStats, BatchNormPullback)> {
    let dims = check_training(x, args)?;
    if dims.numel() == 0 {
        bail!(
            "batch norm has no gradients of an empty input, got shape {:?}",
            x.dims()
        )
    }
    let constant = |t: Option<&Tensor>| t.map(for_gradients);
    let (weight, bias, residual) = (
        constant(args.weight),
        constant(args.bias),
        constant(args.residual),
    );
    let args = BatchNormArgs {
        weight: weight.as_ref(),
        bias: bias.as_ref(),
        residual: residual.as_ref(),
        ..*args
    };
    let x = for_gradients(x);
    let pooling = args.pooling(&x)?;
    let Prepared {
        mut op,
        order,
        tensors,
    } = prepare(&x, &args, dims, pooling, Normalise::Batch)?;
    op.keeps_maxima = true;
    let y_kernel = tensors[0].apply_op3_no_bwd(&tensors[1], &tensors[2], &op)?;
    let stats = BatchStats::new(statistics(&op.saved)?, dims.m());
    let normalised = order.out_of_kernel(&y_kernel, &x)?;
    let (y, pooled) = match pooling {
        Pooling::None | Pooling::Fused(_) => (normalised, None),
        Pooling::After(windows) => {
            let normalised = normalised.contiguous()?;
            let y = max_pool2d(&normalised, windows.kernel)?;
            (y, Some((windows, normalised)))
        }
    };
    let pullback = BatchNormPullback {
        op,
        order,
        tensors,
        x,
        y_kernel,
        pooled,
        y: y.clone(),
    };
    Ok((y, stats, pullback))
}

/// The way back through one call of [`batch_norm_vjp`]. It holds the tensors that it needs.
pub struct BatchNormPullback {
    op: BatchNormOp,
    order: Order,
    tensors: [Tensor; 3],
    x: Tensor,
    y_kernel: Tensor,
    /// What the maximum was taken of, where that was not part of the op.
    pooled: Option<(Windows, Tensor)>,
    y: Tensor,
}

/// The gradients of the arguments that there were, each with shape and dtype of its argument.
#[derive(Debug, Clone)]
pub struct BatchNormGrads {
    /// Of the input.
    pub dx: Tensor,
    /// Of the weight, `[c]`.
    pub dweight: Option<Tensor>,
    /// Of the bias, `[c]`.
    pub dbias: Option<Tensor>,
    /// Of the residual.
    pub dresidual: Option<Tensor>,
}

impl BatchNormPullback {
    /// The gradients for the gradient `dy` of the output. May be called again. Input, weight, bias and
    /// output are read: an in-place op on them in between would reach the gradients.
    ///
    /// # Errors
    /// `dy` of another shape, dtype or device than the output.
    pub fn gradients(&self, dy: &Tensor) -> Result<BatchNormGrads> {
        check_like(NAME, "a gradient", dy, "the output", &self.y)?;
        let [x, second, third] = &self.tensors;
        let dy = match &self.pooled {
            Some((windows, normalised)) => max_pool2d_gradient(windows, normalised, &self.y, dy)?,
            None => for_gradients(dy),
        };
        let dy = self.order.into_kernel(&dy)?;
        let wants = Wants {
            dx: true,
            dparams: self.op.params != Slots::None,
            dresidual: self.op.has_residual,
        };
        let saved = statistics(&self.op.saved)?;
        let args = [x, second, third];
        let TensorGrads {
            dx,
            dparams,
            dresidual,
        } = self
            .op
            .gradients(args, &self.y_kernel, &dy, &saved, wants)?;
        let Some(dx) = dx else {
            bail!("batch norm: the backward pass left no gradient")
        };
        let out = |t: Tensor| self.order.out_of_kernel(&t, &self.x);
        let gradient = |present: bool, param| match &dparams {
            Some(dparams) if present => dparams.get(param).map(Some),
            _ => Ok(None),
        };
        Ok(BatchNormGrads {
            dx: out(dx)?,
            dweight: gradient(
                !matches!(self.op.params, Slots::None | Slots::Bias),
                Param::Weight,
            )?,
            dbias: gradient(
                !matches!(self.op.params, Slots::None | Slots::Weight),
                Param::Bias,
            )?,
            // Without a ReLU it is `dy` itself, which is the caller's.
            dresidual: dresidual.map(|t| out(t)?.copy()).transpose()?,
        })
    }
}
