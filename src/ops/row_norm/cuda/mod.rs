//! Row norms on CUDA: which kernels are launched, and with which tensors. No maths here.

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor};
use cudarc::driver::CudaFunction;

use super::plan::{self, RowPlan};
use super::{Activation, Spec, Wants, NAME};
use crate::ops::cuda::{
    address_of, aligned, code_of, cuda_storage, function, limits, partials, prepare, view, wrap,
    Args, Counters, Kernel, Module, Operand, PerChannel,
};
use crate::ops::plan::{Blocks, Direction, Options};
use crate::ops::slices::dispatch;
use params::dparams_as;

mod params;

/// What the way back starts from. All tensors are contiguous.
pub(crate) struct BackwardTensors<'a> {
    pub x: &'a Tensor,
    pub dy: &'a Tensor,
    pub weight: Option<&'a Tensor>,
    pub bias: Option<&'a Tensor>,
    /// Mean and variance of the rows, from [`forward`].
    pub saved: &'a Tensor,
}

/// The same on this backend.
struct Operands<'a> {
    x: Operand<'a>,
    dy: Operand<'a>,
    weight: Option<Operand<'a>>,
    bias: Option<Operand<'a>>,
    saved: Operand<'a>,
}

fn options(spec: &Spec, params: Option<DType>) -> Options {
    let relu = spec.activation == Activation::Relu;
    plan::options(spec.eps, params.map(code_of), relu, spec.remove_mean)
}

fn dtype_of(weight: Option<&Operand>, bias: Option<&Operand>) -> Option<DType> {
    weight.or(bias).map(|(storage, _)| storage.dtype())
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
    let what = match direction {
        Direction::Forward => "forward",
        Direction::Backward => "backward",
    };
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
pub(crate) fn forward(
    spec: &Spec,
    x: &Operand,
    weight: Option<&Operand>,
    bias: Option<&Operand>,
) -> Result<(CudaStorage, Tensor)> {
    dispatch!(NAME, x.0.dtype(), forward_as(spec, x, weight, bias))
}

fn forward_as<T: Kernel>(
    spec: &Spec,
    x: &Operand,
    weight: Option<&Operand>,
    bias: Option<&Operand>,
) -> Result<(CudaStorage, Tensor)> {
    let device = x.0.device().clone();
    let stream = device.cuda_stream();
    let (plan, forward) = choose::<T>(spec, Direction::Forward, &device)?;
    let problem = plan.problem(&options(spec, dtype_of(weight, bias)));
    let values = [address_of(&problem)];

    let mut x_copy = None;
    let x = aligned(view::<T>(x)?, &mut x_copy, &device)?;
    let weight = weight.map(PerChannel::new).transpose()?;
    let bias = bias.map(PerChannel::new).transpose()?;
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

/// `dx`, like `x`, and `dparams`, `[2, c]` of weight and bias in the dtype of these, as far as they are
/// wanted and there are any.
pub(crate) fn backward(
    spec: &Spec,
    tensors: &BackwardTensors,
    wants: Wants,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let (x, dy, saved) = (
        tensors.x.storage_and_layout(),
        tensors.dy.storage_and_layout(),
        tensors.saved.storage_and_layout(),
    );
    let weight = tensors.weight.map(Tensor::storage_and_layout);
    let bias = tensors.bias.map(Tensor::storage_and_layout);
    macro_rules! operand {
        ($of:expr) => {
            (cuda_storage(&$of.0)?, Layout::clone($of.1))
        };
    }
    let operands = Operands {
        x: operand!(x),
        dy: operand!(dy),
        weight: match &weight {
            None => None,
            Some(weight) => Some(operand!(weight)),
        },
        bias: match &bias {
            None => None,
            Some(bias) => Some(operand!(bias)),
        },
        saved: operand!(saved),
    };
    let dtype = tensors.dy.dtype();
    let dx = match wants.dx {
        false => None,
        true => Some(dispatch!(NAME, dtype, dx_as(spec, &operands))?),
    };
    let dparams = match dtype_of(operands.weight.as_ref(), operands.bias.as_ref()) {
        Some(params) if wants.dparams => {
            Some(dispatch!(NAME, dtype, dparams_as(spec, &operands, params))?)
        }
        _ => None,
    };
    Ok((dx, dparams))
}

fn dx_as<T: Kernel>(spec: &Spec, operands: &Operands) -> Result<Tensor> {
    let device = operands.x.0.device().clone();
    let stream = device.cuda_stream();
    let (plan, backward) = choose::<T>(spec, Direction::Backward, &device)?;
    let (weight, bias) = (operands.weight.as_ref(), operands.bias.as_ref());
    let problem = plan.problem(&options(spec, dtype_of(weight, bias)));
    let values = [address_of(&problem)];

    let (mut x_copy, mut dy_copy) = (None, None);
    let x = aligned(view::<T>(&operands.x)?, &mut x_copy, &device)?;
    let dy = aligned(view::<T>(&operands.dy)?, &mut dy_copy, &device)?;
    let saved = view::<f64>(&operands.saved)?;
    let weight = weight.map(PerChannel::new).transpose()?;
    let bias = bias.map(PerChannel::new).transpose()?;
    // SAFETY: the kernels write every value.
    let mut dx = unsafe { device.alloc::<T>(spec.rows.numel())? };
    let mut partials = partials(&plan.plan, true, &device)?;
    let mut counters = Counters::of(&plan.plan, &device)?;
    let inputs = || {
        let mut args = Args::new(&stream);
        args.read(&x).read(&dy);
        PerChannel::push(&weight, &mut args);
        PerChannel::push(&bias, &mut args);
        args.read(&saved);
        args
    };

    if plan.plan.blocks == Blocks::TwoPasses {
        let sums = kernel::<T>(&plan, "backward_sums", &device)?;
        let mut args = inputs();
        args.write_optional(&mut partials);
        // SAFETY: the arguments are those of rn_backward_sums; `x` and `dy` have n·c·s values, the
        // parameters c, `saved` 2·rows, and `partials` are the plan's.
        unsafe { args.launch(&sums, (&plan.plan).into(), &values)? };
    }
    let mut args = inputs();
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
