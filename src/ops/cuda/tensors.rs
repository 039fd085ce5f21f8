//! Tensors as views of their values.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::{bail, CudaStorage, DType, Result};
use cudarc::driver::CudaView;
use half::{bf16, f16};

use super::launch::Args;
use crate::ops::slices;

/// A tensor as a backend gets it.
pub(crate) type Operand<'a> = slices::Operand<'a, CudaStorage>;

/// The dtype of weight and bias, if there is one of them.
pub(crate) fn params_dtype(weight: &Option<Operand>, bias: &Option<Operand>) -> Option<DType> {
    let (storage, _) = weight.as_ref().or(bias.as_ref())?;
    Some(storage.dtype())
}

/// A tensor with one value per channel, in any of its dtypes.
pub(crate) enum PerChannel<'a> {
    F32(CudaView<'a, f32>),
    F64(CudaView<'a, f64>),
    F16(CudaView<'a, f16>),
    BF16(CudaView<'a, bf16>),
}

impl<'a> PerChannel<'a> {
    pub fn new(operand: &Operand<'a>) -> Result<Self> {
        Ok(match operand.0.dtype() {
            DType::F32 => Self::F32(view(operand)?),
            DType::F64 => Self::F64(view(operand)?),
            DType::F16 => Self::F16(view(operand)?),
            DType::BF16 => Self::BF16(view(operand)?),
            dtype => bail!("a norm expects floating-point values per channel, got {dtype:?}"),
        })
    }

    pub fn of(operand: &Option<Operand<'a>>) -> Result<Option<Self>> {
        operand.as_ref().map(Self::new).transpose()
    }

    pub fn push(this: &'a Option<Self>, args: &mut Args<'a>) {
        match this {
            None => args.null(),
            Some(Self::F32(view)) => args.read(view),
            Some(Self::F64(view)) => args.read(view),
            Some(Self::F16(view)) => args.read(view),
            Some(Self::BF16(view)) => args.read(view),
        };
    }

    /// What a kernel writes, in any of the dtypes, if anything.
    pub fn push_storage(storage: &'a mut Option<CudaStorage>, args: &mut Args<'a>) -> Result<()> {
        match storage {
            None => args.null(),
            Some(storage) => return Self::write(storage, args),
        };
        Ok(())
    }

    /// What a kernel writes, in any of the dtypes.
    pub fn write(storage: &'a mut CudaStorage, args: &mut Args<'a>) -> Result<()> {
        match storage.dtype() {
            DType::F32 => args.write(storage.as_cuda_slice_mut::<f32>()?),
            DType::F64 => args.write(storage.as_cuda_slice_mut::<f64>()?),
            DType::F16 => args.write(storage.as_cuda_slice_mut::<f16>()?),
            _ => args.write(storage.as_cuda_slice_mut::<bf16>()?),
        };
        Ok(())
    }
}

/// The values of a contiguous tensor, from its offset on.
pub(crate) fn view<'a, T: CudaDType>((storage, layout): &Operand<'a>) -> Result<CudaView<'a, T>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a norm expects a contiguous tensor here, got {layout:?}")
    };
    Ok(storage.as_cuda_slice::<T>()?.slice(start..end))
}
