//! What the norms share on CUDA: devices, launches, and tensors as kernels get them.

use std::ffi::c_void;
use std::ptr;

use candle_core::cuda_backend::CudaDType;
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaDevice, CudaStorage, DType, Result, Shape, Storage, Tensor};
use cudarc::driver::{CudaSlice, CudaView, DeviceRepr};

use super::plan::{DTypeCode, Plan};
pub(crate) use device::{aligned, function, limits, Counters, Module};
pub(crate) use launch::{prepare, Args, Grid};
pub(crate) use tensors::{params_dtype, view, Operand, PerChannel};

mod device;
mod launch;
mod tensors;

/// A dtype that the kernels are compiled for.
pub(crate) trait Kernel: CudaDType + DeviceRepr + candle_core::WithDType {}
impl<T: CudaDType + DeviceRepr + candle_core::WithDType> Kernel for T {}

/// As the kernels know it.
pub(crate) fn code_of(dtype: DType) -> DTypeCode {
    match dtype {
        DType::F32 => DTypeCode::F32,
        DType::F64 => DTypeCode::F64,
        DType::F16 => DTypeCode::F16,
        _ => DTypeCode::BF16,
    }
}

/// As a launch takes what is passed by value.
pub(crate) fn address_of<V>(value: &V) -> *const c_void {
    ptr::from_ref(value).cast()
}

/// Room for what the blocks of a plan leave for each other, if there is anything.
pub(crate) fn partials(
    plan: &Plan,
    needs_sums: bool,
    device: &CudaDevice,
) -> Result<Option<CudaSlice<f64>>> {
    let count = if needs_sums { plan.partials() } else { 0 };
    // SAFETY: the kernels write every value before they read it.
    (count > 0)
        .then(|| unsafe { device.alloc(count) })
        .transpose()
}

/// The storage of a tensor that has to be on a GPU.
pub(crate) fn cuda_storage(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("a norm expects all of its tensors on one CUDA device"),
    }
}

/// As [`aligned`], of a tensor that may be absent.
pub(crate) fn optional<'a, T: Kernel>(
    operand: &Option<Operand<'a>>,
    copy: &'a mut Option<CudaSlice<T>>,
    device: &CudaDevice,
) -> Result<Option<CudaView<'a, T>>> {
    match operand {
        None => Ok(None),
        Some(operand) => Ok(Some(aligned(view::<T>(operand)?, copy, device)?)),
    }
}

/// A tensor without a history.
pub(crate) fn wrap(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}
