//! What a device has and keeps: limits, modules of kernels, counters.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::cuda_backend::{CudaDType, DeviceId, WrapErr};
use candle_core::{bail, CudaDevice, DType, Result};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaFunction, CudaSlice, CudaView, DevicePtr, DeviceRepr};

use super::launch::Args;
use crate::ops::plan::{Blocks, Limits, Plan};

mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
}

/// What the planner has to know of a device.
pub(crate) fn limits(device: &CudaDevice) -> Result<Limits> {
    let context = device.cuda_stream().context().clone();
    let of = |attribute| -> Result<usize> { Ok(context.attribute(attribute).w()?.max(0) as usize) };
    Ok(Limits {
        multiprocessors: of(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
        shared_per_block: of(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        shared_per_multiprocessor: of(
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR,
        )?,
        // Their PTX is for 9.0 and later.
        clusters: of(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH)? > 0
            && of(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? >= 9,
    })
}

/// Kernels that are compiled together: for each dtype those that any GPU from compute capability 8.0 on
/// can run, and those for clusters.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Module {
    BatchNorm(Blocks),
    Running,
    RowNorm(Blocks),
    RowParams,
}

impl Module {
    fn ptx(self, dtype: DType) -> Result<(&'static str, &'static str)> {
        use Module::{BatchNorm, RowNorm, RowParams, Running};
        Ok(match (self, dtype) {
            (Running, _) => ("running", ptx::RUNNING),
            (RowParams, _) => ("row_params", ptx::ROW_PARAMS),
            (BatchNorm(Blocks::Cluster), DType::F32) => ("cluster_f32", ptx::CLUSTER_F32),
            (BatchNorm(Blocks::Cluster), DType::F64) => ("cluster_f64", ptx::CLUSTER_F64),
            (BatchNorm(Blocks::Cluster), DType::F16) => ("cluster_f16", ptx::CLUSTER_F16),
            (BatchNorm(Blocks::Cluster), DType::BF16) => ("cluster_bf16", ptx::CLUSTER_BF16),
            (BatchNorm(_), DType::F32) => ("f32", ptx::BATCH_NORM_F32),
            (BatchNorm(_), DType::F64) => ("f64", ptx::BATCH_NORM_F64),
            (BatchNorm(_), DType::F16) => ("f16", ptx::BATCH_NORM_F16),
            (BatchNorm(_), DType::BF16) => ("bf16", ptx::BATCH_NORM_BF16),
            (RowNorm(Blocks::Cluster), DType::F32) => ("cluster_rows_f32", ptx::CLUSTER_ROWS_F32),
            (RowNorm(Blocks::Cluster), DType::F64) => ("cluster_rows_f64", ptx::CLUSTER_ROWS_F64),
            (RowNorm(Blocks::Cluster), DType::F16) => ("cluster_rows_f16", ptx::CLUSTER_ROWS_F16),
            (RowNorm(Blocks::Cluster), DType::BF16) => {
                ("cluster_rows_bf16", ptx::CLUSTER_ROWS_BF16)
            }
            (RowNorm(_), DType::F32) => ("row_norm_f32", ptx::ROW_NORM_F32),
            (RowNorm(_), DType::F64) => ("row_norm_f64", ptx::ROW_NORM_F64),
            (RowNorm(_), DType::F16) => ("row_norm_f16", ptx::ROW_NORM_F16),
            (RowNorm(_), DType::BF16) => ("row_norm_bf16", ptx::ROW_NORM_BF16),
            (_, dtype) => bail!("norms have no CUDA kernels for {dtype:?}"),
        })
    }
}

/// A kernel by its name.
pub(crate) fn function(
    device: &CudaDevice,
    name: &str,
    module: Module,
    dtype: DType,
) -> Result<CudaFunction> {
    let (module, ptx) = module.ptx(dtype)?;
    // Candle keeps modules by their names, among those of all crates.
    let module = format!("candle-batch-norm {} {module}", env!("CARGO_PKG_VERSION"));
    let function = device.get_or_load_custom_func(name, &module, ptx)?;
    Ok(function.into_cuda_function())
}

thread_local! {
    /// Counters of each device, zero between two launches. A thread's own, since candle's devices
    /// launch into the stream of the calling thread: the launches of another run at the same time.
    static COUNTERS: RefCell<HashMap<DeviceId, CudaSlice<u32>>> = RefCell::default();
}

/// The counters of a device, taken from their place until the launches that use them are under way.
pub(crate) struct Counters {
    device: DeviceId,
    /// There until the end.
    values: Option<CudaSlice<u32>>,
}

impl Counters {
    /// As many as a plan needs, if any.
    pub fn of(plan: &Plan, device: &CudaDevice) -> Result<Option<Self>> {
        let count = plan.counters();
        if count == 0 {
            return Ok(None);
        }
        let id = device.id();
        let there = COUNTERS.with_borrow_mut(|counters| counters.remove(&id));
        let values = match there {
            Some(values) if values.len() >= count => values,
            _ => device.alloc_zeros(count.max(1024))?,
        };
        Ok(Some(Self {
            device: id,
            values: Some(values),
        }))
    }

    pub fn push<'a>(this: &'a mut Option<Self>, args: &mut Args<'a>) {
        match this.as_mut().and_then(|this| this.values.as_mut()) {
            None => args.null(),
            Some(values) => args.write(values),
        };
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        if let Some(values) = self.values.take() {
            COUNTERS.with_borrow_mut(|counters| counters.insert(self.device, values));
        }
    }
}

/// The values of type `T` of a tensor, as a kernel of vectors can read them: from a multiple of 16
/// bytes on. Others are copied.
pub(crate) fn aligned<'a, T: CudaDType + DeviceRepr>(
    view: CudaView<'a, T>,
    copy: &'a mut Option<CudaSlice<T>>,
    device: &CudaDevice,
) -> Result<CudaView<'a, T>> {
    let stream = device.cuda_stream();
    let is_aligned = view.device_ptr(&stream).0.is_multiple_of(16);
    if is_aligned {
        return Ok(view);
    }
    let copy = copy.insert(stream.clone_dtod(&view).w()?);
    Ok(copy.slice(..))
}
