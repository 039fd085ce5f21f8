//! From candle's CPU storages to slices and back.

use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, Device, Layout, Result, Storage, Tensor, WithDType};

use super::cpu::{self, Backward, Element, Forward};
use super::op::{BackwardTensors, BatchNormOp, Operand, Operands, TensorGrads};
use super::{Spec, Wants};

/// A dtype of candle's that the loops can work on.
trait HostElement: Element + WithDType {}
impl<T: Element + WithDType> HostElement for T {}

/// `y`, and the mean and variance that were used: F64 `[2, c]`.
pub(super) fn forward(
    spec: &Spec,
    operands: &Operands<CpuStorage>,
    given: Option<&(Tensor, Tensor)>,
) -> Result<(CpuStorage, Tensor)> {
    use candle_core::backend::BackendStorage;
    dispatch!(operands.x.0.dtype(), forward_as(spec, operands, given))
}

fn forward_as<T: HostElement>(
    spec: &Spec,
    operands: &Operands<CpuStorage>,
    given: Option<&(Tensor, Tensor)>,
) -> Result<(CpuStorage, Tensor)> {
    let given = given.map(|(mean, var)| [mean.storage_and_layout(), var.storage_and_layout()]);
    let given = match &given {
        None => None,
        Some([mean, var]) => Some([
            per_channel(&(cpu_storage(&mean.0)?, mean.1.clone()))?,
            per_channel(&(cpu_storage(&var.0)?, var.1.clone()))?,
        ]),
    };
    let (y, stats) = cpu::forward(&Forward {
        spec,
        x: values::<T>(&operands.x)?,
        params: params(operands, spec.dims.c)?,
        residual: operands.residual.as_ref().map(values::<T>).transpose()?,
        given,
    });
    let stats = Tensor::from_vec(stats, (2, spec.dims.c), &Device::Cpu)?;
    Ok((T::to_cpu_storage_owned(y), stats))
}

pub(super) fn backward(
    op: &BatchNormOp,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<TensorGrads> {
    dispatch!(tensors.dy.dtype(), backward_as(op, tensors, wants))
}

fn backward_as<T: HostElement>(
    op: &BatchNormOp,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<TensorGrads> {
    let args = tensors.args.map(Tensor::storage_and_layout);
    let operands = op.operands([
        (cpu_storage(&args[0].0)?, args[0].1),
        (cpu_storage(&args[1].0)?, args[1].1),
        (cpu_storage(&args[2].0)?, args[2].1),
    ])?;
    let (dy, dy_layout) = tensors.dy.storage_and_layout();
    let (saved, saved_layout) = tensors.saved.storage_and_layout();
    let y = tensors.y.map(Tensor::storage_and_layout);
    let y = match &y {
        None => None,
        Some((y, layout)) => Some((cpu_storage(y)?, (*layout).clone())),
    };
    let grads = cpu::backward(&Backward {
        spec: &op.spec,
        x: values::<T>(&operands.x)?,
        dy: values::<T>(&(cpu_storage(&dy)?, dy_layout.clone()))?,
        y: y.as_ref().map(values::<T>).transpose()?,
        params: params(&operands, op.spec.dims.c)?,
        saved: values::<f64>(&(cpu_storage(&saved)?, saved_layout.clone()))?,
        wants,
    });
    let like_x = |values| {
        let storage = Storage::Cpu(T::to_cpu_storage_owned(values));
        Tensor::from_storage(storage, args[0].1.shape(), BackpropOp::none(), false)
    };
    let dparams = match grads.dparams {
        None => None,
        Some(values) => {
            let dtype = tensors.args[1].dtype();
            let dparams = Tensor::from_vec(values, (2, op.spec.dims.c), &Device::Cpu)?;
            Some(dparams.to_dtype(dtype)?)
        }
    };
    Ok(TensorGrads {
        dx: grads.dx.map(like_x),
        dparams,
        dresidual: grads.dresidual.map(like_x),
    })
}

fn cpu_storage(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("batch norm expects all of its tensors on the CPU"),
    }
}

fn params(operands: &Operands<CpuStorage>, c: usize) -> Result<cpu::Params> {
    let resolve = |operand: &Option<Operand<CpuStorage>>, absent: f64| match operand {
        None => Ok(vec![absent; c]),
        Some(operand) => per_channel(operand),
    };
    Ok(cpu::Params {
        weight: resolve(&operands.weight, 1.0)?,
        bias: resolve(&operands.bias, 0.0)?,
    })
}

/// The values of a contiguous tensor, from its offset on.
fn values<'a, T: WithDType>((storage, layout): &Operand<'a, CpuStorage>) -> Result<&'a [T]> {
    Ok(&T::cpu_storage_as_slice(storage)?[offsets(layout)?])
}

/// One value per channel, from any of the floating-point dtypes.
fn per_channel((storage, layout): &Operand<CpuStorage>) -> Result<Vec<f64>> {
    let range = offsets(layout)?;
    Ok(match storage {
        CpuStorage::F32(values) => values[range].iter().map(|&v| f64::from(v)).collect(),
        CpuStorage::F64(values) => values[range].to_vec(),
        CpuStorage::F16(values) => values[range].iter().map(|v| v.to_f64()).collect(),
        CpuStorage::BF16(values) => values[range].iter().map(|v| v.to_f64()).collect(),
        _ => bail!("batch norm expects floating-point values per channel"),
    })
}

fn offsets(layout: &Layout) -> Result<std::ops::Range<usize>> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(start..end),
        None => bail!("batch norm expects a contiguous tensor here, got {layout:?}"),
    }
}
