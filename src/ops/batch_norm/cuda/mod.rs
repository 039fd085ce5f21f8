//! Batch norm on CUDA: which kernels are launched, and with which tensors. No maths here.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape, Tensor};
use cudarc::driver::{CudaFunction, CudaSlice};

use super::op::{BackwardTensors, BatchNormOp, Operands, TensorGrads};
use super::plan::{self, Blocks, Direction, Plan, Problem};
use super::{Activation, Spec, Wants, NAME};
use crate::ops::cuda::{
    address_of, aligned, code_of, cuda_storage, function, limits, optional, params_dtype, partials,
    prepare, view, wrap, Args, Counters, Kernel, Module, PerChannel,
};
use crate::ops::param_grads::ParamGrads;
use crate::ops::slices::dispatch;
use crate::shape::Dims;
pub(super) use running::move_towards;

mod running;

fn problem(spec: &Spec, plan: &Plan, params: Option<DType>, given: Option<DType>) -> Problem {
    let options = plan::Options {
        eps: spec.eps,
        params_dtype: params.map(code_of),
        given_dtype: given.map(code_of),
        relu: spec.activation == Activation::Relu,
        remove_mean: spec.remove_mean,
        training: spec.training,
    };
    Problem::new(spec.dims, plan, &options)
}

fn kernel<T: Kernel>(plan: &Plan, what: &str, device: &CudaDevice) -> Result<CudaFunction> {
    let name = plan.kernel(what, T::DTYPE.as_str());
    function(device, &name, Module::BatchNorm(plan.blocks), T::DTYPE)
}

/// The plan of a launch, and its last kernel. What the device does not run as one pass takes two.
fn choose<T: Kernel>(
    dims: Dims,
    direction: Direction,
    needs_sums: bool,
    device: &CudaDevice,
) -> Result<(Plan, CudaFunction)> {
    let limits = limits(device)?;
    let what = direction.kernel();
    if needs_sums {
        let plan = Plan::new(dims, size_of::<T>(), direction, &limits);
        let function = kernel::<T>(&plan, what, device)?;
        if plan.blocks == Blocks::TwoPasses
            || prepare(&function, (&plan).into(), &limits, &device.cuda_stream())?
        {
            return Ok((plan, function));
        }
    }
    let plan = Plan::two_passes(dims, size_of::<T>(), direction, &limits);
    let function = kernel::<T>(&plan, what, device)?;
    Ok((plan, function))
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
    let needs_sums = given.is_none();
    let (plan, forward) = choose::<T>(dims, Direction::Forward, needs_sums, &device)?;
    let given_dtype = given.map(|(mean, _)| mean.dtype());
    let problem = problem(
        spec,
        &plan,
        params_dtype(&operands.weight, &operands.bias),
        given_dtype,
    );
    let values = [address_of(&problem)];

    let (mut x_copy, mut residual_copy) = (None, None);
    let x = aligned(view::<T>(&operands.x)?, &mut x_copy, &device)?;
    let residual = optional::<T>(&operands.residual, &mut residual_copy, &device)?;
    let weight = PerChannel::of(&operands.weight)?;
    let bias = PerChannel::of(&operands.bias)?;
    let given = given.map(|(mean, var)| (mean.storage_and_layout(), var.storage_and_layout()));
    let (mean, var) = match &given {
        None => (None, None),
        Some((mean, var)) => (
            Some(PerChannel::new(&(cuda_storage(&mean.0)?, mean.1.clone()))?),
            Some(PerChannel::new(&(cuda_storage(&var.0)?, var.1.clone()))?),
        ),
    };
    // SAFETY: the kernels write every value of `y` and of `saved`.
    let mut y = unsafe { device.alloc::<T>(dims.numel())? };
    // SAFETY: as above.
    let mut saved = unsafe { device.alloc::<f64>(2 * dims.c)? };
    let mut partials = partials(&plan, needs_sums, &device)?;
    let mut counters = Counters::of(&plan, &device)?;

    if plan.blocks == Blocks::TwoPasses && needs_sums {
        let mut args = Args::new(&stream);
        args.read(&x).write_optional(&mut partials);
        // SAFETY: the arguments are those of bn_stats, `x` has n·c·s values, and `partials` are the
        // plan's.
        unsafe {
            args.launch(
                &kernel::<T>(&plan, "stats", &device)?,
                (&plan).into(),
                &values,
            )?
        };
    }
    let mut args = Args::new(&stream);
    args.read(&x).read_optional(&residual);
    PerChannel::push(&weight, &mut args);
    PerChannel::push(&bias, &mut args);
    if plan.blocks == Blocks::TwoPasses {
        PerChannel::push(&mean, &mut args);
        PerChannel::push(&var, &mut args);
    }
    args.write_optional(&mut partials);
    if plan.blocks != Blocks::TwoPasses {
        Counters::push(&mut counters, &mut args);
    }
    args.write(&mut y).write(&mut saved);
    // SAFETY: the arguments are those of bn_forward or of bn_forward_group and bn_forward_cluster;
    // `x`, `residual` and `y` have n·c·s values, the tensors per channel c each, `saved` 2·c,
    // `partials` and counters are the plan's, and in two passes mean and variance are there or else
    // `partials` have their sums.
    unsafe { args.launch(&forward, (&plan).into(), &values)? };
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
    let needs_sums = wants.dparams || (wants.dx && spec.training);
    let (plan, backward) = choose::<T>(dims, Direction::Backward, needs_sums, &device)?;
    let params_dtype = params_dtype(&operands.weight, &operands.bias);
    let problem = problem(spec, &plan, params_dtype, None);
    let values = [address_of(&problem)];

    let (mut x_copy, mut dy_copy, mut y_copy) = (None, None, None);
    let x = aligned(view::<T>(&operands.x)?, &mut x_copy, &device)?;
    let dy = (cuda_storage(&dy)?, dy_layout.clone());
    let dy = aligned(view::<T>(&dy)?, &mut dy_copy, &device)?;
    let y = match &y {
        None => None,
        Some((y, layout)) => Some((cuda_storage(y)?, (*layout).clone())),
    };
    let y = optional::<T>(&y, &mut y_copy, &device)?;
    let saved = view::<f64>(&(cuda_storage(&saved)?, saved_layout.clone()))?;
    let weight = PerChannel::of(&operands.weight)?;
    let bias = PerChannel::of(&operands.bias)?;
    let like_x = |wanted: bool| -> Result<Option<CudaSlice<T>>> {
        // SAFETY: the kernels write every value.
        wanted
            .then(|| unsafe { device.alloc::<T>(dims.numel()) })
            .transpose()
    };
    let (mut dx, mut dresidual) = (like_x(wants.dx)?, like_x(wants.dresidual)?);
    let params_shape = Shape::from((2, dims.c));
    let mut dparams = match params_dtype.filter(|_| wants.dparams) {
        // SAFETY: the kernels write both values of every channel.
        Some(dtype) => Some(unsafe { device.alloc_uninit(&params_shape, dtype)? }),
        None => None,
    };
    let mut partials = partials(&plan, needs_sums, &device)?;
    let mut counters = Counters::of(&plan, &device)?;
    let inputs = || {
        let mut args = Args::new(&stream);
        args.read(&x).read(&dy).read_optional(&y);
        PerChannel::push(&weight, &mut args);
        PerChannel::push(&bias, &mut args);
        args.read(&saved);
        args
    };

    if plan.blocks == Blocks::TwoPasses && needs_sums {
        let mut args = inputs();
        args.write_optional(&mut partials);
        let sums = kernel::<T>(&plan, "backward_sums", &device)?;
        // SAFETY: the arguments are those of bn_backward_sums; `x`, `dy` and `y` have n·c·s values,
        // the parameters c, `saved` 2·c, and `partials` are the plan's.
        unsafe { args.launch(&sums, (&plan).into(), &values)? };
    }
    let mut args = inputs();
    args.write_optional(&mut partials);
    if plan.blocks != Blocks::TwoPasses {
        Counters::push(&mut counters, &mut args);
    }
    args.write_optional(&mut dx).write_optional(&mut dresidual);
    PerChannel::push_storage(&mut dparams, &mut args)?;
    // SAFETY: the arguments are those of bn_backward or of bn_backward_group and bn_backward_cluster;
    // tensors like `x` have n·c·s values, the parameters c, `saved` and `dparams` 2·c, `partials` and
    // counters are the plan's, and in two passes `partials`, if any, have the sums.
    unsafe { args.launch(&backward, (&plan).into(), &values)? };
    let like_x = |slice: CudaSlice<T>| {
        let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
        wrap(storage, operands.x.1.shape())
    };
    Ok(TensorGrads {
        dx: dx.map(like_x),
        dparams: dparams.map(|storage| ParamGrads::Stacked(wrap(storage, params_shape))),
        dresidual: dresidual.map(like_x),
    })
}
