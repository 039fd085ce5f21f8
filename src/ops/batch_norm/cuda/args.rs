//! Tensors as the arguments of a launch: views, and null pointers for those that are absent.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::{bail, CudaStorage, DType, Result};
use cudarc::driver::{CudaSlice, CudaView, LaunchArgs, PushKernelArg};
use half::{bf16, f16};

use crate::ops::batch_norm::op::Operand;

/// The pointer that stands for an absent tensor.
const NULL: u64 = 0;

/// A tensor with one value per channel, in any of its dtypes.
pub(super) enum PerChannel<'a> {
    F32(CudaView<'a, f32>),
    F64(CudaView<'a, f64>),
    F16(CudaView<'a, f16>),
    BF16(CudaView<'a, bf16>),
}

impl<'a> PerChannel<'a> {
    pub fn new(operand: &Operand<'a, CudaStorage>) -> Result<Self> {
        Ok(match operand.0.dtype() {
            DType::F32 => Self::F32(view(operand)?),
            DType::F64 => Self::F64(view(operand)?),
            DType::F16 => Self::F16(view(operand)?),
            DType::BF16 => Self::BF16(view(operand)?),
            dtype => bail!("batch norm expects floating-point values per channel, got {dtype:?}"),
        })
    }

    pub fn of(operand: &Option<Operand<'a, CudaStorage>>) -> Result<Option<Self>> {
        operand.as_ref().map(Self::new).transpose()
    }

    pub fn push<'b: 'l, 'l>(this: &'b Option<Self>, args: &mut LaunchArgs<'l>) {
        match this {
            None => args.arg(&NULL),
            Some(Self::F32(view)) => args.arg(view),
            Some(Self::F64(view)) => args.arg(view),
            Some(Self::F16(view)) => args.arg(view),
            Some(Self::BF16(view)) => args.arg(view),
        };
    }
}

pub(super) fn push_view<'l, 'b: 'l, T>(
    view: &'b Option<CudaView<'b, T>>,
    args: &mut LaunchArgs<'l>,
) {
    match view {
        None => args.arg(&NULL),
        Some(view) => args.arg(view),
    };
}

pub(super) fn push_mut<'l, 'b: 'l, T>(
    slice: &'b mut Option<CudaSlice<T>>,
    args: &mut LaunchArgs<'l>,
) {
    match slice {
        None => args.arg(&NULL),
        Some(slice) => args.arg(slice),
    };
}

/// The values of a contiguous tensor, from its offset on.
pub(super) fn view<'a, T: CudaDType>(
    (storage, layout): &Operand<'a, CudaStorage>,
) -> Result<CudaView<'a, T>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("batch norm expects a contiguous tensor here, got {layout:?}")
    };
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}

pub(super) fn push_storage<'l, 'b: 'l>(
    storage: &'b mut Option<CudaStorage>,
    args: &mut LaunchArgs<'l>,
) -> Result<()> {
    let Some(storage) = storage else {
        args.arg(&NULL);
        return Ok(());
    };
    match storage.dtype() {
        DType::F32 => args.arg(storage.as_cuda_slice_mut::<f32>()?),
        DType::F64 => args.arg(storage.as_cuda_slice_mut::<f64>()?),
        DType::F16 => args.arg(storage.as_cuda_slice_mut::<f16>()?),
        _ => args.arg(storage.as_cuda_slice_mut::<bf16>()?),
    };
    Ok(())
}
