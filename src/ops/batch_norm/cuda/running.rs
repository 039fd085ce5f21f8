//! Running statistics on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::{bail, CudaStorage, DType, Layout, Result};

use crate::ops::batch_norm::running::MoveTowards;
use crate::ops::cuda::{address_of, function, view, Args, Grid, Kernel, Module};

/// `running = keep·running + take·new`
pub(in crate::ops::batch_norm) fn move_towards(
    update: &MoveTowards,
    running: &mut CudaStorage,
    running_layout: &Layout,
    new: &CudaStorage,
    new_layout: &Layout,
) -> Result<()> {
    match running.dtype() {
        DType::F32 => move_towards_as::<f32>(update, running, running_layout, new, new_layout),
        DType::F64 => move_towards_as::<f64>(update, running, running_layout, new, new_layout),
        dtype => bail!("batch norm expects running statistics of dtype F32 or F64, got {dtype:?}"),
    }
}

fn move_towards_as<T: Kernel>(
    update: &MoveTowards,
    running: &mut CudaStorage,
    running_layout: &Layout,
    new: &CudaStorage,
    new_layout: &Layout,
) -> Result<()> {
    let device = new.device().clone();
    let stream = device.cuda_stream();
    let Some((start, end)) = running_layout.contiguous_offsets() else {
        bail!("batch norm expects contiguous running statistics, got {running_layout:?}")
    };
    let new = view::<f64>(&(new, new_layout.clone()))?;
    let count = (end - start) as i64;
    let mut running = running.as_cuda_slice_mut::<T>()?.slice_mut(start..end);
    let name = format!("bn_running_{}", T::DTYPE.as_str());
    let function = function(&device, &name, Module::Running, T::DTYPE)?;
    let threads = 256;
    let grid = Grid {
        blocks: (end - start).div_ceil(threads),
        threads,
        shared_bytes: 0,
        cluster: 1,
        is_cooperative: false,
    };
    let values = [
        address_of(&update.keep),
        address_of(&update.take),
        address_of(&count),
    ];
    let mut args = Args::new(&stream);
    args.write(&mut running).read(&new);
    // SAFETY: the arguments are those of bn_running, and both tensors have `count` values.
    unsafe { args.launch(&function, grid, &values) }
}
