//! Row norms on CUDA: which kernels are launched, and with which tensors. No maths here.

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape, Tensor};
use cudarc::driver::CudaFunction;

use super::op::{BackwardTensors, Operands, RowNormOp, TensorGrads};
use super::plan::{self, RowPlan};
use super::{Activation, Spec, Wants};
use crate::ops::cuda::{
    address_of, aligned, code_of, cuda_storage, function, limits, params_dtype, partials, prepare,
    view, wrap, Args, Counters, Kernel, Module, Operand, PerChannel,
};
use crate::ops::param_grads::ParamGrads;
use crate::ops::plan::{Blocks, Direction, Options};
use crate::ops::slices::dispatch;
use params::dparams_as;

mod params;

fn options(spec: &Spec, params: Option<DType>) -> Options {
    let relu = spec.activation == Activation::Relu;
    plan::options(spec.eps, params.map(code_of), relu, spec.remove_mean)
}

fn kernel<T: Kernel>(plan: &RowPlan, what: &str, device: &CudaDevice) -> Result<CudaFunction> {
    let name = plan.kernel(what, T::DTYPE.as_str());
    function(device, &name, Module::RowNorm(plan.plan.blocks), T::DTYPE)
}

/// The plan of a launch, and its last kernel. What the device does not run as one pass takes two.
fn choose<T: Kernel>(
    spec: &Spec,
    direction: Direction,
    device: &CudaDevice,
) -> Result<(RowPlan, CudaFunction)> {
    let limits = limits(device)?;
    let what = direction.kernel();
    let (rows, last, bytes) = (spec.rows, spec.channels_last, size_of::<T>());
    let plan = RowPlan::new(rows, last, bytes, direction, &limits);
    let last_kernel = kernel::<T>(&plan, what, device)?;
    let grid = (&plan.plan).into();
    if plan.plan.blocks == Blocks::TwoPasses
        || prepare(&last_kernel, grid, &limits, &device.cuda_stream())?
    {
        return Ok((plan, last_kernel));
    }
    let plan = RowPlan::two_passes(rows, last, bytes, direction, &limits);
    let last_kernel = kernel::<T>(&plan, what, device)?;
    Ok((plan, last_kernel))
}

/// `y`, and the mean and biased variance of the rows: F64 `[2, rows]`.
pub(super) fn forward(
    op: &RowNormOp,
    operands: &Operands<CudaStorage>,
) -> Result<(CudaStorage, Tensor)> {
    let dtype = operands.x.0.dtype();
    dispatch!(op.name, dtype, forward_as(&op.spec, operands))
}

fn forward_as<T: Kernel>(
    spec: &Spec,
    operands: &Operands<CudaStorage>,
) -> Result<(CudaStorage, Tensor)> {
    let device = operands.x.0.device().clone();
    let stream = device.cuda_stream();
    let (plan, forward) = choose::<T>(spec, Direction::Forward, &device)?;
    let problem = plan.problem(&options(
        spec,
        params_dtype(&operands.weight, &operands.bias),
    ));
    let values = [address_of(&problem)];

    let mut x_copy = None;
    let x = aligned(view::<T>(&operands.x)?, &mut x_copy, &device)?;
    let weight = PerChannel::of(&operands.weight)?;
    let bias = PerChannel::of(&operands.bias)?;
    // SAFETY: the kernels write every value of `y` and of `saved`.
    let mut y = unsafe { device.alloc::<T>(spec.rows.numel())? };
    // SAFETY: as above.
    let mut saved = unsafe { device.alloc::<f64>(2 * spec.rows.rows())? };
    let mut partials = partials(&plan.plan, true, &device)?;
    let mut counters = Counters::of(&plan.plan, &device)?;

    if plan.plan.blocks == Blocks::TwoPasses {
        let stats = kernel::<T>(&plan, "stats", &device)?;
        let mut args = Args::new(&stream);
        args.read(&x).write_optional(&mut partials);
        // SAFETY: the arguments are those of rn_stats, `x` has n·c·s values, and `partials` are the
        // plan's.
        unsafe { args.launch(&stats, (&plan.plan).into(), &values)? };
    }
    let mut args = Args::new(&stream);
    args.read(&x);
    PerChannel::push(&weight, &mut args);
    PerChannel::push(&bias, &mut args);
    args.write_optional(&mut partials);
    if plan.plan.blocks != Blocks::TwoPasses {
        Counters::push(&mut counters, &mut args);
    }
    args.write(&mut y).write(&mut saved);
    // SAFETY: the arguments are those of rn_forward or of its resident forms; `x` and `y` have n·c·s
    // values, the parameters c, `saved` 2·rows, `partials` and counters are the plan's, and in two
    // passes `partials` have the sums.
    unsafe { args.launch(&forward, (&plan.plan).into(), &values)? };
    let saved = CudaStorage::wrap_cuda_slice(saved, device.clone());
    Ok((
        CudaStorage::wrap_cuda_slice(y, device),
        wrap(saved, (2, spec.rows.rows())),
    ))
}

pub(super) fn backward(
    op: &RowNormOp,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<TensorGrads> {
    let args = tensors.args.map(Tensor::storage_and_layout);
    let operands = op.operands([
        (cuda_storage(&args[0].0)?, args[0].1),
        (cuda_storage(&args[1].0)?, args[1].1),
        (cuda_storage(&args[2].0)?, args[2].1),
    ]);
    let (dy, dy_layout) = tensors.dy.storage_and_layout();
    let (saved, saved_layout) = tensors.saved.storage_and_layout();
    let inputs = Inputs {
        spec: &op.spec,
        operands: &operands,
        dy: (cuda_storage(&dy)?, dy_layout.clone()),
        saved: (cuda_storage(&saved)?, saved_layout.clone()),
    };
    let dtype = tensors.dy.dtype();
    let mut grads = TensorGrads {
        dx: None,
        dparams: None,
    };
    if wants.dx {
        grads.dx = Some(dispatch!(op.name, dtype, dx_as(&inputs))?);
    }
    if let Some(params) = params_dtype(&operands.weight, &operands.bias).filter(|_| wants.dparams) {
        let dparams = dispatch!(op.name, dtype, dparams_as(&inputs, params))?;
        grads.dparams = Some(ParamGrads::Stacked(dparams));
    }
    Ok(grads)
}

/// What the way back starts from.
struct Inputs<'a> {
    spec: &'a Spec,
    operands: &'a Operands<'a, CudaStorage>,
    dy: Operand<'a>,
    saved: Operand<'a>,
}

fn dx_as<T: Kernel>(inputs: &Inputs) -> Result<Tensor> {
    let Inputs { spec, operands, .. } = *inputs;
    let device = operands.x.0.device().clone();
    let stream = device.cuda_stream();
    let (plan, backward) = choose::<T>(spec, Direction::Backward, &device)?;
    let problem = plan.problem(&options(
        spec,
        params_dtype(&operands.weight, &operands.bias),
    ));
    let values = [address_of(&problem)];

    let (mut x_copy, mut dy_copy) = (None, None);
    let x = aligned(view::<T>(&operands.x)?, &mut x_copy, &device)?;
    let dy = aligned(view::<T>(&inputs.dy)?, &mut dy_copy, &device)?;
    let saved = view::<f64>(&inputs.saved)?;
    let weight = PerChannel::of(&operands.weight)?;
    let bias = PerChannel::of(&operands.bias)?;
    // SAFETY: the kernels write every value.
    let mut dx = unsafe { device.alloc::<T>(spec.rows.numel())? };
    let mut partials = partials(&plan.plan, true, &device)?;
    let mut counters = Counters::of(&plan.plan, &device)?;
    let begin = || {
        let mut args = Args::new(&stream);
        args.read(&x).read(&dy);
        PerChannel::push(&weight, &mut args);
        PerChannel::push(&bias, &mut args);
        args.read(&saved);
        args
    };

    if plan.plan.blocks == Blocks::TwoPasses {
        let sums = kernel::<T>(&plan, "backward_sums", &device)?;
        let mut args = begin();
        args.write_optional(&mut partials);
        // SAFETY: the arguments are those of rn_backward_sums; `x` and `dy` have n·c·s values, the
        // parameters c, `saved` 2·rows, and `partials` are the plan's.
        unsafe { args.launch(&sums, (&plan.plan).into(), &values)? };
    }
    let mut args = begin();
    args.write_optional(&mut partials);
    if plan.plan.blocks != Blocks::TwoPasses {
        Counters::push(&mut counters, &mut args);
    }
    args.write(&mut dx);
    // SAFETY: the arguments are those of rn_backward or of its resident forms; tensors like `x` have
    // n·c·s values, the parameters c, `saved` 2·rows, `partials` and counters are the plan's, and in two
    // passes `partials` have the sums.
    unsafe { args.launch(&backward, (&plan.plan).into(), &values)? };
    let dx = CudaStorage::wrap_cuda_slice(dx, device);
    Ok(wrap(dx, Shape::from(operands.x.1.dims())))
}
