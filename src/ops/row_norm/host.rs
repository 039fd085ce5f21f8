//! From candle's CPU storages to slices and back.

use candle_core::{CpuStorage, Device, Result, Tensor, WithDType};

use super::cpu::{self, Backward, Forward};
use super::op::{BackwardTensors, Operands, RowNormOp, TensorGrads};
use super::Wants;
use crate::ops::loops::convert::Element;
use crate::ops::loops::Params;
use crate::ops::param_grads::ParamGrads;
use crate::ops::slices::{self, cpu_storage, dispatch};

/// `y`, and the statistics of the rows: F64 `[2, rows]`.
pub(super) fn forward(
    op: &RowNormOp,
    operands: &Operands<CpuStorage>,
) -> Result<(CpuStorage, Tensor)> {
    use candle_core::backend::BackendStorage;
    dispatch!(op.name, operands.x.0.dtype(), forward_as(op, operands))
}

fn forward_as<T: Element + WithDType>(
    op: &RowNormOp,
    operands: &Operands<CpuStorage>,
) -> Result<(CpuStorage, Tensor)> {
    let (y, stats) = cpu::forward(&Forward::<T> {
        spec: &op.spec,
        x: slices::values(op.name, operands.x.0, &operands.x.1)?,
        params: &params(op, operands)?,
    });
    let stats = Tensor::from_vec(stats, (2, op.spec.rows.rows()), &Device::Cpu)?;
    Ok((T::to_cpu_storage_owned(y), stats))
}

pub(super) fn backward(
    op: &RowNormOp,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<TensorGrads> {
    dispatch!(op.name, tensors.dy.dtype(), backward_as(op, tensors, wants))
}

fn backward_as<T: Element + WithDType>(
    op: &RowNormOp,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<TensorGrads> {
    let args = tensors.args.map(Tensor::storage_and_layout);
    let [x, weight, bias] = &args;
    let operands = op.operands([
        (cpu_storage(op.name, &x.0)?, x.1),
        (cpu_storage(op.name, &weight.0)?, weight.1),
        (cpu_storage(op.name, &bias.0)?, bias.1),
    ]);
    let params = params(op, &operands)?;
    let grads = slices::with_values(op.name, tensors.dy, |dy: &[T]| {
        slices::with_values(op.name, tensors.saved, |saved: &[f64]| {
            Ok(cpu::backward(&Backward {
                spec: &op.spec,
                x: slices::values(op.name, operands.x.0, &operands.x.1)?,
                dy,
                params: &params,
                saved,
                wants,
            }))
        })
    })?;
    let parameter = if op.has_weight { 1 } else { 2 };
    let dtype = tensors.args[parameter].dtype();
    let dparams = |sums: Vec<f64>| ParamGrads::from_sums(op.name, &sums, dtype);
    Ok(TensorGrads {
        dx: grads.dx.map(|dx| slices::tensor(dx, x.1.shape())),
        dparams: grads.dparams.map(dparams).transpose()?,
    })
}

fn params(op: &RowNormOp, operands: &Operands<CpuStorage>) -> Result<Params> {
    slices::params(op.name, &operands.weight, &operands.bias, op.spec.rows.c)
}
