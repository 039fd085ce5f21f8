//! Row norms and their gradients without candle's autograd in between.

use candle_core::{bail, Result, Shape, Tensor};

use super::args::{groups, last_dimensions, Prepared, RowNormArgs};
use super::op::TensorGrads;
use super::{Wants, GROUP, LAYER, RMS};
use crate::ops::keeps_graph::for_gradients;
use crate::ops::param_grads::Param;
use crate::shape::check_like;

/// [`layer_norm`](super::layer_norm()) and what gives its gradients, for programs that go back through a network by
/// themselves. The output is a constant to autograd.
///
/// JAX: `jax.vjp`. PyTorch: `torch.ops.aten.native_layer_norm` and `native_layer_norm_backward`.
///
/// # Errors
/// Those of [`layer_norm`](super::layer_norm()), and an empty input.
///
/// ```
/// use candle_batch_norm::ops::{layer_norm_vjp, RowNormArgs};
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f64, 3.0, 5.0], [7.0, 5.0, 0.0]], &Device::Cpu)?;
/// let bias = Tensor::new(&[0f64, 1.0, 2.0], &Device::Cpu)?;
/// let args = RowNormArgs { bias: Some(&bias), ..RowNormArgs::new() };
/// let (y, pullback) = layer_norm_vjp(&x, 3, &args)?;
/// let grads = pullback.gradients(&Tensor::new(&[[1f64, 2.0, 3.0], [4.0, 5.0, 6.0]], &Device::Cpu)?)?;
/// assert_eq!(grads.dbias.unwrap().to_vec1::<f64>()?, [5.0, 7.0, 9.0]);
/// assert_eq!(grads.dx.dims(), y.dims());
/// assert!(grads.dweight.is_none());
/// # Ok(())
/// # }
/// ```
pub fn layer_norm_vjp(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    args: &RowNormArgs,
) -> Result<(Tensor, RowNormPullback)> {
    pull(x, args, |x, args| {
        last_dimensions(LAYER, x, normalized_shape.into(), args, true)
    })
}

/// [`layer_norm_vjp`] of [`rms_norm`](super::rms_norm()).
///
/// # Errors
/// Those of [`layer_norm_vjp`].
pub fn rms_norm_vjp(
    x: &Tensor,
    normalized_shape: impl Into<Shape>,
    args: &RowNormArgs,
) -> Result<(Tensor, RowNormPullback)> {
    pull(x, args, |x, args| {
        last_dimensions(RMS, x, normalized_shape.into(), args, false)
    })
}

/// [`layer_norm_vjp`] of [`group_norm`](super::group_norm()); with as many groups as channels, of an instance norm.
///
/// # Errors
/// Those of [`group_norm`](super::group_norm()), and an empty input.
pub fn group_norm_vjp(
    x: &Tensor,
    num_groups: usize,
    args: &RowNormArgs,
) -> Result<(Tensor, RowNormPullback)> {
    pull(x, args, |x, args| groups(GROUP, x, Some(num_groups), args))
}

/// The way back through one call of [`layer_norm_vjp`] or its relatives. It holds the tensors that it needs.
pub struct RowNormPullback {
    prepared: Prepared,
    x: Tensor,
    y_kernel: Tensor,
}

/// The gradients of the arguments that there were, each with shape and dtype of its argument.
#[derive(Debug, Clone)]
pub struct RowNormGrads {
    /// Of the input.
    pub dx: Tensor,
    /// Of the weight.
    pub dweight: Option<Tensor>,
    /// Of the bias.
    pub dbias: Option<Tensor>,
}

fn pull(
    x: &Tensor,
    args: &RowNormArgs,
    prepare: impl FnOnce(&Tensor, &RowNormArgs) -> Result<Prepared>,
) -> Result<(Tensor, RowNormPullback)> {
    let x = for_gradients(x);
    let [weight, bias] = [args.weight, args.bias].map(|t| t.map(for_gradients));
    let args = RowNormArgs {
        weight: weight.as_ref(),
        bias: bias.as_ref(),
        ..*args
    };
    let prepared = prepare(&x, &args)?;
    if x.elem_count() == 0 {
        bail!(
            "{} has no gradients of an empty input, got shape {:?}",
            prepared.op.name,
            x.dims()
        )
    }
    let [x_kernel, weight, bias] = &prepared.tensors;
    let y_kernel = x_kernel.apply_op3_no_bwd(weight, bias, &prepared.op)?;
    let y = prepared.order.out_of_kernel(&y_kernel, &x)?;
    let pullback = RowNormPullback {
        prepared,
        x,
        y_kernel,
    };
    Ok((y, pullback))
}

impl RowNormPullback {
    /// The gradients for the gradient `dy` of the output. May be called again. Input, weight and bias are read: an
    /// in-place op on them in between would reach the gradients.
    ///
    /// # Errors
    /// `dy` of another shape, dtype or device than the output.
    pub fn gradients(&self, dy: &Tensor) -> Result<RowNormGrads> {
        let Prepared { op, order, tensors } = &self.prepared;
        check_like(op.name, "a gradient", dy, "the output", &self.x)?;
        let dy = order.into_kernel(&for_gradients(dy))?;
        let wants = Wants {
            dx: true,
            dparams: op.has_weight || op.has_bias,
        };
        let [x, weight, bias] = tensors;
        let TensorGrads { dx, dparams } =
            op.gradients([x, weight, bias], &self.y_kernel, &dy, wants)?;
        let Some(dx) = dx else {
            bail!("{}: the backward pass left no gradient", op.name)
        };
        let gradient = |present: bool, param, like: &Tensor| match &dparams {
            Some(dparams) if present => dparams.get(param)?.reshape(like.shape()).map(Some),
            _ => Ok(None),
        };
        Ok(RowNormGrads {
            dx: order.out_of_kernel(&dx, &self.x)?,
            dweight: gradient(op.has_weight, Param::Weight, weight)?,
            dbias: gradient(op.has_bias, Param::Bias, bias)?,
        })
    }
}
