//! From candle's CPU storages to slices and back.

use candle_core::{CpuStorage, Device, Result, Shape, Tensor, WithDType};

use super::cpu::{self, Backward, Element, Forward, Normalised};
use super::op::{BackwardTensors, BatchNormOp, Operands, TensorGrads};
use super::{Spec, Wants, NAME};
use crate::ops::param_grads::ParamGrads;
use crate::ops::slices::{self, cpu_storage, dispatch, Operand};

/// A dtype of candle's that the loops can work on.
trait HostElement: Element + WithDType {}
impl<T: Element + WithDType> HostElement for T {}

/// `y`, and the mean and variance that were used: F64 `[2, c]`. Sets the maxima of the op.
pub(super) fn forward(
    op: &BatchNormOp,
    operands: &Operands<CpuStorage>,
    y_shape: &Shape,
) -> Result<(CpuStorage, Tensor)> {
    use candle_core::backend::BackendStorage;
    dispatch!(
        NAME,
        operands.x.0.dtype(),
        forward_as(op, operands, y_shape)
    )
}

fn forward_as<T: HostElement>(
    op: &BatchNormOp,
    operands: &Operands<CpuStorage>,
    y_shape: &Shape,
) -> Result<(CpuStorage, Tensor)> {
    let (spec, given) = (&op.spec, op.given.as_ref());
    let given = given.map(|(mean, var)| [mean.storage_and_layout(), var.storage_and_layout()]);
    let given = match &given {
        None => None,
        Some([mean, var]) => Some([
            slices::to_f64(NAME, cpu_storage(NAME, &mean.0)?, mean.1)?,
            slices::to_f64(NAME, cpu_storage(NAME, &var.0)?, var.1)?,
        ]),
    };
    let params = slices::params(NAME, &operands.weight, &operands.bias, spec.dims.c)?;
    let Normalised { y, stats, maxima } = cpu::forward(&Forward {
        spec,
        x: values::<T>(&operands.x)?,
        params: &params,
        residual: operands.residual.as_ref().map(values::<T>).transpose()?,
        given,
        keeps_maxima: op.keeps_maxima,
    });
    if let Some(maxima) = maxima {
        op.maxima.get_or_init(|| slices::tensor(maxima, y_shape));
    }
    let stats = Tensor::from_vec(stats, (2, spec.dims.c), &Device::Cpu)?;
    Ok((T::to_cpu_storage_owned(y), stats))
}

/// The mean and the variance of a contiguous `x`: F64 `[2, c]`.
pub(super) fn statistics(spec: &Spec, x: &Tensor) -> Result<Tensor> {
    dispatch!(NAME, x.dtype(), statistics_as(spec, x))
}

fn statistics_as<T: HostElement>(spec: &Spec, x: &Tensor) -> Result<Tensor> {
    slices::with_values(NAME, x, |x: &[T]| {
        let stats = cpu::statistics(spec, x);
        Tensor::from_vec(stats, (2, spec.dims.c), &Device::Cpu)
    })
}

pub(super) fn backward(
    op: &BatchNormOp,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<TensorGrads> {
    dispatch!(NAME, tensors.dy.dtype(), backward_as(op, tensors, wants))
}

fn backward_as<T: HostElement>(
    op: &BatchNormOp,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<TensorGrads> {
    let args = tensors.args.map(Tensor::storage_and_layout);
    let operands = op.operands([
        (cpu_storage(NAME, &args[0].0)?, args[0].1),
        (cpu_storage(NAME, &args[1].0)?, args[1].1),
        (cpu_storage(NAME, &args[2].0)?, args[2].1),
    ])?;
    let (dy, dy_layout) = tensors.dy.storage_and_layout();
    let (saved, saved_layout) = tensors.saved.storage_and_layout();
    let y = tensors.y.map(Tensor::storage_and_layout);
    let y = match &y {
        None => None,
        Some((y, layout)) => Some((cpu_storage(NAME, y)?, (*layout).clone())),
    };
    let maxima = op.maxima.get().map(Tensor::storage_and_layout);
    let maxima = match &maxima {
        None => None,
        Some((maxima, layout)) => Some((cpu_storage(NAME, maxima)?, (*layout).clone())),
    };
    let params = slices::params(NAME, &operands.weight, &operands.bias, op.spec.dims.c)?;
    let grads = cpu::backward(&Backward {
        spec: &op.spec,
        x: values::<T>(&operands.x)?,
        dy: values::<T>(&(cpu_storage(NAME, &dy)?, dy_layout.clone()))?,
        y: y.as_ref().map(values::<T>).transpose()?,
        maxima: maxima.as_ref().map(values::<T>).transpose()?,
        params: &params,
        saved: values::<f64>(&(cpu_storage(NAME, &saved)?, saved_layout.clone()))?,
        wants,
    });
    let like_x = |values| slices::tensor(values, args[0].1.shape());
    let dtype = tensors.args[1].dtype();
    let dparams = |sums: Vec<f64>| ParamGrads::from_sums(NAME, &sums, dtype);
    Ok(TensorGrads {
        dx: grads.dx.map(like_x),
        dparams: grads.dparams.map(dparams).transpose()?,
        dresidual: grads.dresidual.map(like_x),
    })
}

/// The values of a contiguous tensor, from its offset on.
fn values<'a, T: WithDType>((storage, layout): &Operand<'a, CpuStorage>) -> Result<&'a [T]> {
    slices::values(NAME, storage, layout)
}
