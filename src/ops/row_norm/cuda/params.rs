//! The gradients of weight and bias.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{DType, Result, Shape, Tensor};

use super::super::plan::{ParamsPlan, ROW_OF};
use super::{options, Inputs};
use crate::ops::cuda::{
    address_of, aligned, function, limits, partials, view, wrap, Args, Grid, Kernel, Module,
    PerChannel,
};
use crate::ops::plan::Blocks;
use crate::ops::slices::computed_in;

/// `[2, c]` of weight and bias.
pub(super) fn dparams_as<T: Kernel>(inputs: &Inputs, params: DType) -> Result<Tensor> {
    let Inputs { spec, operands, .. } = *inputs;
    let device = operands.x.0.device().clone();
    let stream = device.cuda_stream();
    let rows = spec.rows;
    let limits = limits(&device)?;
    let plan = ParamsPlan::new(rows, spec.channels_last, size_of::<T>(), &limits);
    let problem = plan.problem(&options(spec, Some(params)));
    let grid_of = |blocks| Grid {
        blocks,
        threads: plan.plan.threads,
        shared_bytes: 0,
        cluster: 1,
        is_cooperative: false,
    };

    let (mut x_copy, mut dy_copy) = (None, None);
    let x = aligned(view::<T>(&operands.x)?, &mut x_copy, &device)?;
    let dy = aligned(view::<T>(&inputs.dy)?, &mut dy_copy, &device)?;
    let saved = view::<f64>(&inputs.saved)?;
    let weight = PerChannel::of(&operands.weight)?;
    let bias = PerChannel::of(&operands.bias)?;
    let real = computed_in(T::DTYPE);
    // SAFETY: the kernel below writes the three values of every row that are read.
    let mut table = unsafe { device.alloc_uninit(&Shape::from((rows.rows(), ROW_OF)), real)? };
    let mut partials = partials(&plan.plan, true, &device)?;
    let shape = Shape::from((2, rows.c));
    // SAFETY: the last kernel writes both values of every channel.
    let mut dparams = unsafe { device.alloc_uninit(&shape, params)? };

    let count = rows.rows() as i64;
    let name = format!("rn_rows_{}", real.as_str());
    let make_rows = function(&device, &name, Module::RowParams, real)?;
    let mut args = Args::new(&stream);
    args.read(&saved);
    PerChannel::write(&mut table, &mut args)?;
    let values = [address_of(&spec.eps), address_of(&count)];
    // SAFETY: the arguments are those of rn_rows; `saved` has 2·rows values and the table four for each.
    unsafe { args.launch(&make_rows, grid_of(plan.blocks_of_rows(&rows)), &values)? };

    let sizes = [rows.groups, rows.channels(), plan.lines()].map(|size| size as i64);
    let name = plan.plan.kernel_of("rn", "param_sums", T::DTYPE.as_str());
    let module = Module::RowNorm(Blocks::TwoPasses);
    let param_sums = function(&device, &name, module, T::DTYPE)?;
    let mut args = Args::new(&stream);
    args.read(&x).read(&dy);
    PerChannel::push(&weight, &mut args);
    PerChannel::push(&bias, &mut args);
    PerChannel::write(&mut table, &mut args)?;
    args.write_optional(&mut partials);
    let [groups, channels, lines] = &sizes;
    let values = [
        address_of(&problem),
        address_of(groups),
        address_of(channels),
        address_of(lines),
    ];
    // SAFETY: the arguments are those of rn_param_sums; `x` and `dy` have n·c·s values, the parameters c,
    // the table is of all rows, and `partials` are the plan's.
    unsafe { args.launch(&param_sums, (&plan.plan).into(), &values)? };

    let params_kernel = function(&device, "rn_params", Module::RowParams, real)?;
    let mut args = Args::new(&stream);
    args.write_optional(&mut partials);
    PerChannel::write(&mut dparams, &mut args)?;
    let grid = grid_of(plan.blocks_of_params(&rows));
    // SAFETY: the arguments are those of rn_params; `partials` have the sums, and `dparams` has 2·c values.
    unsafe { args.launch(&params_kernel, grid, &[address_of(&problem)])? };
    Ok(wrap(dparams, shape))
}
