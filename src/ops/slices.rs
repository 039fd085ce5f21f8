//! From candle's CPU tensors to slices and back, and loops over them in wide registers.

use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, DType, Layout, Result, Shape, Storage, Tensor, WithDType};

use super::loops::Params;

/// Calls a function that is generic over the dtype of a tensor.
macro_rules! dispatch {
    ($op:expr, $dtype:expr, $f:ident($($arg:expr),*)) => {
        match $dtype {
            candle_core::DType::F32 => $f::<f32>($($arg),*),
            candle_core::DType::F64 => $f::<f64>($($arg),*),
            candle_core::DType::F16 => $f::<half::f16>($($arg),*),
            candle_core::DType::BF16 => $f::<half::bf16>($($arg),*),
            dtype => candle_core::bail!(
                "{} expects a tensor of dtype F32, F64, F16 or BF16, got {dtype:?}",
                $op
            ),
        }
    };
}
pub(super) use dispatch;

/// The values of a contiguous tensor, from its offset on.
pub(super) fn values<'a, T: WithDType>(
    op: &str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => bail!("{op} expects a contiguous tensor here, got {layout:?}"),
    }
}

/// Calls `f` with the values of a contiguous tensor.
pub(super) fn with_values<T: WithDType, R>(
    op: &str,
    tensor: &Tensor,
    f: impl FnOnce(&[T]) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(values(op, storage, layout)?),
        _ => bail!(
            "{op} expects all of its tensors on the CPU, got one on {:?}",
            tensor.device().location()
        ),
    }
}

/// A tensor as a backend gets it.
pub(super) type Operand<'a, S> = (&'a S, Layout);

/// Weight and bias of a norm over `c` channels.
pub(super) fn params(
    op: &str,
    weight: &Option<Operand<CpuStorage>>,
    bias: &Option<Operand<CpuStorage>>,
    c: usize,
) -> Result<Params> {
    let resolve = |operand: &Option<Operand<CpuStorage>>, absent: f64| match operand {
        None => Ok(vec![absent; c]),
        Some((storage, layout)) => to_f64(op, storage, layout),
    };
    Ok(Params {
        weight: resolve(weight, 1.0)?,
        bias: resolve(bias, 0.0)?,
    })
}

/// The storage of a CPU tensor.
pub(super) fn cpu_storage<'a>(op: &str, storage: &'a Storage) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("{op} expects all of its tensors on the CPU"),
    }
}

/// The values of a small contiguous tensor of any of the floating-point dtypes.
pub(super) fn to_f64(op: &str, storage: &CpuStorage, layout: &Layout) -> Result<Vec<f64>> {
    use candle_core::backend::BackendStorage;
    fn of<T: WithDType>(op: &str, storage: &CpuStorage, layout: &Layout) -> Result<Vec<f64>> {
        let values = values::<T>(op, storage, layout)?;
        Ok(values.iter().map(|value| value.to_f64()).collect())
    }
    dispatch!(op, storage.dtype(), of(op, storage, layout))
}

/// A tensor that autograd knows nothing of.
pub(super) fn tensor<T: WithDType>(values: Vec<T>, shape: &Shape) -> Tensor {
    let storage = Storage::Cpu(T::to_cpu_storage_owned(values));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Checks that an input has a dtype that [`dispatch`] knows.
pub(crate) fn check_float(op: &str, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        dtype => bail!("{op} expects an input of dtype F32, F64, F16 or BF16, got {dtype:?}"),
    }
}

/// The dtype in which values of `dtype` are computed: F32 for half precision.
pub(crate) fn computed_in(dtype: DType) -> DType {
    match dtype {
        DType::F16 | DType::BF16 => DType::F32,
        dtype => dtype,
    }
}

/// Runs loops with the widest registers that the machine has. `f` has to be inlined into it.
#[inline(always)]
pub(super) fn vectorised<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}
