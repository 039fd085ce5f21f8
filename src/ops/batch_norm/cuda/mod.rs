//! Launches of `kernels/batch_norm.cu`: no maths here.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};
use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
use cudarc::driver::{CudaFunction, CudaSlice, DeviceRepr, LaunchConfig, PushKernelArg};

use super::division::{Division, THREADS};
use super::op::{BackwardTensors, BatchNormOp, Operands, TensorGrads};
use super::running::MoveTowards;
use super::{Activation, Spec, Wants, NAME};
use crate::ops::slices::dispatch;
use crate::shape::Dims;
use args::{push_mut, push_storage, push_view, view, PerChannel};

mod args;

mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
}

/// The name under which candle keeps the compiled module, among all modules of a device.
const MODULE: &str = concat!("candle-batch-norm ", env!("CARGO_PKG_VERSION"));

/// A dtype that the kernels are compiled for.
trait Kernel: CudaDType + DeviceRepr + candle_core::WithDType {}
impl<T: CudaDType + DeviceRepr + candle_core::WithDType> Kernel for T {}

/// `struct Problem` of kernels/common.cuh, which says what the fields mean.
#[repr(C)]
#[derive(Clone, Copy)]
struct Problem {
    c: i64,
    s: i64,
    m: i64,
    eps: f64,
    splits: i32,
    width: i32,
    params_dtype: i32,
    given_dtype: i32,
    relu: i32,
    remove_mean: i32,
    training: i32,
}

const _: () = assert!(size_of::<Problem>() == 64);

// SAFETY: plain numbers in the layout of the kernels' struct of the same name, without pointers.
unsafe impl DeviceRepr for Problem {}

impl Problem {
    fn new(spec: &Spec, division: Division, params: Option<DType>, given: Option<DType>) -> Self {
        Self {
            c: spec.dims.c as i64,
            s: spec.dims.s as i64,
            m: spec.dims.m() as i64,
            eps: spec.eps,
            splits: division.splits as i32,
            width: division.width as i32,
            params_dtype: params.map_or(0, dtype_code),
            given_dtype: given.map_or(0, dtype_code),
            relu: (spec.activation == Activation::Relu).into(),
            remove_mean: spec.remove_mean.into(),
            training: spec.training.into(),
        }
    }
}

/// `enum DType` of kernels/common.cuh.
fn dtype_code(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::F64 => 1,
        DType::F16 => 2,
        _ => 3,
    }
}

/// How `dims` are divided among the blocks of `device`.
fn division_on(dims: Dims, device: &CudaDevice) -> Result<Division> {
    let context = device.cuda_stream().context().clone();
    let multiprocessors = context
        .attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)
        .w()?;
    Ok(Division::new(dims, multiprocessors.max(1) as usize))
}

/// Room for two numbers of every part of every channel.
fn partials(division: Division, dims: Dims, device: &CudaDevice) -> Result<CudaSlice<f64>> {
    // SAFETY: the first pass writes every value before the second reads it.
    unsafe { device.alloc(2 * dims.c * division.splits) }
}

fn launch_config(blocks: usize) -> Result<LaunchConfig> {
    let Some(blocks) = u32::try_from(blocks).ok().filter(|&b| b <= i32::MAX as u32) else {
        bail!("batch norm would need {blocks} blocks, more than a CUDA grid has")
    };
    Ok(LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: 0,
    })
}

fn cuda_storage(storage: &Storage) -> Result<&CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("batch norm expects all of its tensors on one CUDA device"),
    }
}

fn dtype_of(operands: &Operands<CudaStorage>) -> Option<DType> {
    let (storage, _) = operands.weight.as_ref().or(operands.bias.as_ref())?;
    Some(storage.dtype())
}

fn function<T: Kernel>(device: &CudaDevice, kernel: &str) -> Result<CudaFunction> {
    let name = format!("bn_{kernel}_{}", T::DTYPE.as_str());
    let function = device.get_or_load_custom_func(&name, MODULE, ptx::BATCH_NORM)?;
    Ok(function.into_cuda_function())
}

fn wrap(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// `y`, and the mean and variance that were used: F64 `[2, c]`.
pub(super) fn forward(
    spec: &Spec,
    operands: &Operands<CudaStorage>,
    given: Option<&(Tensor, Tensor)>,
) -> Result<(CudaStorage, Tensor)> {
    dispatch!(
        NAME,
        operands.x.0.dtype(),
        forward_as(spec, operands, given)
    )
}

fn forward_as<T: Kernel>(
    spec: &Spec,
    operands: &Operands<CudaStorage>,
    given: Option<&(Tensor, Tensor)>,
) -> Result<(CudaStorage, Tensor)> {
    let device = operands.x.0.device().clone();
    let stream = device.cuda_stream();
    let dims = spec.dims;
    let division = division_on(dims, &device)?;
    let config = launch_config(division.blocks)?;
    let given_dtype = given.map(|(mean, _)| mean.dtype());
    let problem = Problem::new(spec, division, dtype_of(operands), given_dtype);

    let x = view::<T>(&operands.x)?;
    let residual = operands.residual.as_ref().map(view::<T>).transpose()?;
    let (weight, bias) = (
        PerChannel::of(&operands.weight)?,
        PerChannel::of(&operands.bias)?,
    );
    let given = given.map(|(mean, var)| (mean.storage_and_layout(), var.storage_and_layout()));
    let (mean, var) = match &given {
        None => (None, None),
        Some((mean, var)) => (
            Some(PerChannel::new(&(cuda_storage(&mean.0)?, mean.1.clone()))?),
            Some(PerChannel::new(&(cuda_storage(&var.0)?, var.1.clone()))?),
        ),
    };

    let mut partials = match given.is_some() {
        true => None,
        false => Some(partials(division, dims, &device)?),
    };
    if let Some(partials) = &mut partials {
        let stats = function::<T>(&device, "stats")?;
        let mut args = stream.launch_builder(&stats);
        args.arg(&x).arg(partials).arg(&problem);
        // SAFETY: the arguments are those of bn_stats, `x` has n·c·s values, and `partials` two for
        // each of the division's parts.
        unsafe { args.launch(config) }.w()?;
    }
    // SAFETY: the kernel writes every value of `y` and of `saved`.
    let mut y = unsafe { device.alloc::<T>(dims.numel())? };
    // SAFETY: as above.
    let mut saved = unsafe { device.alloc::<f64>(2 * dims.c)? };
    let partials = partials.as_ref().map(|partials| partials.slice(..));
    let forward = function::<T>(&device, "forward")?;
    let mut args = stream.launch_builder(&forward);
    args.arg(&x);
    push_view(&residual, &mut args);
    PerChannel::push(&weight, &mut args);
    PerChannel::push(&bias, &mut args);
    PerChannel::push(&mean, &mut args);
    PerChannel::push(&var, &mut args);
    push_view(&partials, &mut args);
    args.arg(&mut y).arg(&mut saved).arg(&problem);
    // SAFETY: the arguments are those of bn_forward; `x`, `residual` and `y` have n·c·s values, the
    // tensors per channel c each, `saved` 2·c, and either mean and variance or `partials` is there.
    unsafe { args.launch(config) }.w()?;
    let saved = CudaStorage::wrap_cuda_slice(saved, device.clone());
    Ok((
        CudaStorage::wrap_cuda_slice(y, device),
        wrap(saved, (2, dims.c)),
    ))
}

pub(super) fn backward(
    op: &BatchNormOp,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<TensorGrads> {
    dispatch!(NAME, tensors.dy.dtype(), backward_as(op, tensors, wants))
}

fn backward_as<T: Kernel>(
    op: &BatchNormOp,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<TensorGrads> {
    let args = tensors.args.map(Tensor::storage_and_layout);
    let operands = op.operands([
        (cuda_storage(&args[0].0)?, args[0].1),
        (cuda_storage(&args[1].0)?, args[1].1),
        (cuda_storage(&args[2].0)?, args[2].1),
    ])?;
    let (dy, dy_layout) = tensors.dy.storage_and_layout();
    let (saved, saved_layout) = tensors.saved.storage_and_layout();
    let y = tensors.y.map(Tensor::storage_and_layout);

    let device = operands.x.0.device().clone();
    let stream = device.cuda_stream();
    let (spec, dims) = (&op.spec, op.spec.dims);
    let division = division_on(dims, &device)?;
    let config = launch_config(division.blocks)?;
    let params_dtype = dtype_of(&operands);
    let problem = Problem::new(spec, division, params_dtype, None);

    let x = view::<T>(&operands.x)?;
    let dy = view::<T>(&(cuda_storage(&dy)?, dy_layout.clone()))?;
    let y = match &y {
        None => None,
        Some((y, layout)) => Some(view::<T>(&(cuda_storage(y)?, (*layout).clone()))?),
    };
    let saved = view::<f64>(&(cuda_storage(&saved)?, saved_layout.clone()))?;
    let (weight, bias) = (
        PerChannel::of(&operands.weight)?,
        PerChannel::of(&operands.bias)?,
    );

    let mut partials = match wants.dparams || (wants.dx && spec.training) {
        true => Some(partials(division, dims, &device)?),
        false => None,
    };
    if let Some(partials) = &mut partials {
        let sums = function::<T>(&device, "backward_sums")?;
        let mut args = stream.launch_builder(&sums);
        args.arg(&x).arg(&dy);
        push_view(&y, &mut args);
        PerChannel::push(&weight, &mut args);
        PerChannel::push(&bias, &mut args);
        args.arg(&saved).arg(partials).arg(&problem);
        // SAFETY: the arguments are those of bn_backward_sums; `x`, `dy` and `y` have n·c·s values,
        // the parameters c, `saved` 2·c, and `partials` two for each of the division's parts.
        unsafe { args.launch(config) }.w()?;
    }
    let like_x = |wanted: bool| -> Result<Option<CudaSlice<T>>> {
        // SAFETY: the kernel writes every value.
        wanted
            .then(|| unsafe { device.alloc::<T>(dims.numel()) })
            .transpose()
    };
    let (mut dx, mut dresidual) = (like_x(wants.dx)?, like_x(wants.dresidual)?);
    let params_shape = Shape::from((2, dims.c));
    let mut dparams = match params_dtype.filter(|_| wants.dparams) {
        // SAFETY: the kernel writes both values of every channel.
        Some(dtype) => Some(unsafe { device.alloc_uninit(&params_shape, dtype)? }),
        None => None,
    };
    let partials = partials.as_ref().map(|partials| partials.slice(..));
    let backward = function::<T>(&device, "backward")?;
    let mut args = stream.launch_builder(&backward);
    args.arg(&x).arg(&dy);
    push_view(&y, &mut args);
    PerChannel::push(&weight, &mut args);
    PerChannel::push(&bias, &mut args);
    args.arg(&saved);
    push_view(&partials, &mut args);
    push_mut(&mut dx, &mut args);
    push_mut(&mut dresidual, &mut args);
    push_storage(&mut dparams, &mut args)?;
    args.arg(&problem);
    // SAFETY: the arguments are those of bn_backward; tensors like `x` have n·c·s values, the
    // parameters c, `saved` and `dparams` 2·c, and `partials` two for each of the division's parts.
    unsafe { args.launch(config) }.w()?;
    drop(args);
    let like_x = |slice: CudaSlice<T>| {
        let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
        wrap(storage, operands.x.1.shape())
    };
    Ok(TensorGrads {
        dx: dx.map(like_x),
        dparams: dparams.map(|storage| wrap(storage, params_shape)),
        dresidual: dresidual.map(like_x),
    })
}

/// `running = keep·running + take·new`
pub(super) fn move_towards(
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
    let function = function::<T>(&device, "running")?;
    let mut args = stream.launch_builder(&function);
    args.arg(&mut running).arg(&new);
    args.arg(&update.keep).arg(&update.take).arg(&count);
    // SAFETY: the arguments are those of bn_running, and both tensors have `count` values.
    unsafe { args.launch(launch_config((end - start).div_ceil(THREADS))?) }.w()?;
    Ok(())
}
