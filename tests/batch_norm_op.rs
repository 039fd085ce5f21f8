//! The ops against closed forms in `f64`, over shapes, layouts, dtypes, devices and options.

mod common;

use candle_batch_norm::ops::{
    batch_norm_inference, batch_norm_train, batch_norm_vjp, Activation, BatchNormArgs, BatchStats,
};
use candle_core::{DType, Device, Result, Tensor};
use common::{
    assert_close, assert_error, devices, random, rounding, tensor, values, var, Case, Truth,
};

/// Which of the optional arguments a case has.
#[derive(Clone, Copy, Debug)]
struct Options {
    weight: bool,
    bias: bool,
    residual: bool,
    relu: bool,
    given: bool,
}

impl Options {
    fn all() -> impl Iterator<Item = Self> {
        (0..32).map(|bits| Self {
            weight: bits & 1 != 0,
            bias: bits & 2 != 0,
            residual: bits & 4 != 0,
            relu: bits & 8 != 0,
            given: bits & 16 != 0,
        })
    }

    /// Those that differ in the code that they reach.
    fn some() -> impl Iterator<Item = Self> {
        Self::all().filter(|o| o.weight && o.bias && (o.relu || !o.residual))
    }
}

/// A case whose values are what `dtype` can hold.
fn case(shape: &[usize], options: Options, dtype: DType, offset: f64) -> Result<Case> {
    let round = |values: Vec<f64>, dtype| -> Result<Vec<f64>> {
        let shape = [values.len()];
        common::values(&tensor(&values, &shape, dtype, &Device::Cpu)?)
    };
    let (count, c) = (shape.iter().product(), shape[1]);
    let data = |seed, offset| round(random(seed, count, offset), dtype);
    let per_channel = |seed, offset| round(random(seed, c, offset), dtype);
    Ok(Case {
        shape: shape.to_vec(),
        x: data(1, offset)?,
        dy: data(2, 0.0)?,
        weight: options.weight.then(|| per_channel(3, 1.0)).transpose()?,
        bias: options.bias.then(|| per_channel(4, 0.0)).transpose()?,
        residual: options.residual.then(|| data(5, 0.0)).transpose()?,
        relu: options.relu,
        eps: 1e-5,
        given: match options.given {
            true => Some((per_channel(6, offset)?, per_channel(7, 9.0)?)),
            false => None,
        },
    })
}

/// What the op makes of a case.
struct Got {
    y: Tensor,
    stats: Option<BatchStats>,
    truth: Truth,
    dx: Vec<f64>,
    dweight: Option<Vec<f64>>,
    dbias: Option<Vec<f64>>,
    dresidual: Option<Vec<f64>>,
}

/// Runs the op forward and backward; `layout` may rearrange the input in memory.
fn run(
    case: &Case,
    dtype: DType,
    params: DType,
    device: &Device,
    layout: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Got> {
    let c = [case.shape[1]];
    let x = var(&case.x, &case.shape, dtype, device)?;
    let per_channel = |values: &Option<Vec<f64>>| match values {
        Some(values) => var(values, &c, params, device).map(Some),
        None => Ok(None),
    };
    let (weight, bias) = (per_channel(&case.weight)?, per_channel(&case.bias)?);
    let residual = match &case.residual {
        Some(values) => Some(var(values, &case.shape, dtype, device)?),
        None => None,
    };
    let laid_out = layout(&x)?;
    let args = BatchNormArgs {
        weight: weight.as_deref(),
        bias: bias.as_deref(),
        residual: residual.as_deref(),
        activation: match case.relu {
            true => Activation::Relu,
            false => Activation::Identity,
        },
        max_pool: None,
        eps: case.eps,
        remove_mean: true,
    };
    let (y, stats) = match &case.given {
        None => {
            let (y, stats) = batch_norm_train(&laid_out, &args)?;
            (y, Some(stats))
        }
        Some((mean, var)) => {
            let mean = tensor(mean, &c, DType::F64, device)?;
            let var = tensor(var, &c, DType::F64, device)?;
            (batch_norm_inference(&laid_out, &mean, &var, &args)?, None)
        }
    };
    assert_eq!((y.dims(), y.dtype()), (&case.shape[..], dtype));
    let dy = tensor(&case.dy, &case.shape, dtype, device)?;
    let grads = (&y * dy)?.sum_all()?.backward()?;
    let grad = |v: &Option<candle_core::Var>| match v {
        Some(v) => {
            let grad = grads.get(v).expect("a gradient");
            assert_eq!((grad.dims(), grad.dtype()), (v.dims(), v.dtype()));
            values(grad).map(Some)
        }
        None => Ok(None),
    };
    Ok(Got {
        y,
        stats,
        truth: case.truth(),
        dx: grad(&Some(x.clone()))?.expect("a gradient"),
        dweight: grad(&weight)?,
        dbias: grad(&bias)?,
        dresidual: grad(&residual)?,
    })
}

impl Got {
    /// Holds everything against the closed forms,.
    #[track_caller]
    fn check(&self, what: &str, dtype: DType, params: DType) -> Result<()> {
        let truth = &self.truth;
        let (absolute, relative) = match dtype {
            DType::F64 => (1e-11, 1e-12),
            // The bound for F32, at any offset: 2e-6 for values of order 1.
            _ => (2e-6, rounding(dtype)),
        };
        let y = values(&self.y)?;
        assert_close(&format!("{what} y"), &y, &truth.y, absolute, relative);
        assert_close(
            &format!("{what} dx"),
            &self.dx,
            &truth.dx,
            absolute,
            relative,
        );
        if let Some(stats) = &self.stats {
            let (mean, var) = (values(&stats.mean()?)?, values(&stats.var()?)?);
            let scale = truth.mean.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
            assert_close(
                &format!("{what} mean"),
                &mean,
                &truth.mean,
                1e-7 + scale * 1e-12,
                0.0,
            );
            assert_close(&format!("{what} var"), &var, &truth.var, 1e-12, 1e-6);
        }
        let sums = [
            ("dweight", &self.dweight, &truth.dweight),
            ("dbias", &self.dbias, &truth.dbias),
        ];
        for (name, got, expected) in sums {
            let Some(got) = got else { continue };
            for (channel, scale) in truth.dweight_scale.iter().enumerate() {
                let bound = match params {
                    DType::F64 => 1e-13 * (scale + 10.0),
                    _ => 1e-7 * (scale + 1.0) + rounding(params) * expected[channel].abs(),
                };
                let error = (got[channel] - expected[channel]).abs();
                assert!(
                    error <= bound,
                    "{what} {name}[{channel}]: got {}, expected {} ± {bound:e}",
                    got[channel],
                    expected[channel]
                );
            }
        }
        if let Some(dresidual) = &self.dresidual {
            // The mask decides all or nothing: not a bit may differ.
            assert_eq!(dresidual, &truth.dresidual, "{what} dresidual");
        }
        Ok(())
    }
}

/// Shapes around a lane, a warp, a block of columns and a thread block, of rank 2 to 5.
const SHAPES: [&[usize]; 31] = [
    &[2, 1],
    &[2, 3],
    &[31, 33],
    &[32, 32],
    &[33, 31],
    &[5, 63],
    &[5, 65],
    &[3, 1025],
    &[1025, 3],
    &[1024, 64],
    &[1, 3, 7],
    &[2, 3, 1],
    &[3, 5, 31],
    &[2, 2, 1025],
    &[1, 1, 2],
    &[2, 5, 3, 4],
    &[3, 33, 7, 7],
    &[1, 2, 32, 33],
    &[16, 3, 8, 9],
    &[2, 3, 2, 3, 4],
    &[4, 70, 1, 1, 1],
    &[2, 3, 2, 1, 3, 2],
    // Of several parts on the CPU: few channels and many, whole planes and pieces, rows.
    &[2, 1, 130, 131],
    &[7, 3, 50, 51],
    &[3, 17, 3000],
    &[20, 40, 21, 21],
    &[64, 5, 24, 24],
    &[1000, 37],
    &[67, 1100],
    &[150, 50, 5, 5],
    &[5, 2500],
];

#[test]
fn shapes_match_closed_forms() -> Result<()> {
    for device in devices() {
        for shape in SHAPES {
            for dtype in [DType::F32, DType::F64] {
                for options in Options::some() {
                    let case = case(shape, options, dtype, 0.5)?;
                    let got = run(&case, dtype, dtype, &device, |x| Ok(x.clone()))?;
                    got.check(&format!("{shape:?} {dtype:?} {options:?}"), dtype, dtype)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn every_combination_of_options_matches_closed_forms() -> Result<()> {
    for device in devices() {
        for shape in [&[9, 70][..], &[3, 5, 4, 4]] {
            for options in Options::all() {
                let case = case(shape, options, DType::F32, 0.5)?;
                let got = run(&case, DType::F32, DType::F32, &device, |x| Ok(x.clone()))?;
                got.check(&format!("{shape:?} {options:?}"), DType::F32, DType::F32)?;
            }
        }
    }
    Ok(())
}

#[test]
fn half_precision_matches_closed_forms() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F16, DType::BF16] {
            for params in [DType::F32, dtype] {
                for shape in [&[33, 65][..], &[4, 3, 7, 7], &[2, 3, 1025]] {
                    for options in Options::some() {
                        let case = case(shape, options, dtype, 0.5)?;
                        let got = run(&case, dtype, params, &device, |x| Ok(x.clone()))?;
                        let what = format!("{shape:?} {dtype:?} {params:?} {options:?}");
                        got.check(&what, dtype, params)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Sums over more than half precision can hold: 70,000 ones are more than F16's largest number.
#[test]
fn sums_are_not_in_half_precision() -> Result<()> {
    for device in devices() {
        let options = Options::some().next().expect("an option");
        let mut case = case(&[1000, 2, 70], options, DType::F16, 0.0)?;
        case.dy.fill(1.0);
        let got = run(&case, DType::F16, DType::F32, &device, |x| Ok(x.clone()))?;
        assert_eq!(got.dbias.as_deref(), Some(&[70_000.0, 70_000.0][..]));
        got.check("F16 sums", DType::F16, DType::F32)?;
    }
    Ok(())
}

#[test]
fn offsets_cost_no_accuracy() -> Result<()> {
    for device in devices() {
        for offset in [0.0, 1e3, 1e5, 1e6] {
            for shape in [&[1024, 64][..], &[8, 3, 20, 20]] {
                for options in Options::some().filter(|o| !o.given) {
                    let case = case(shape, options, DType::F32, offset)?;
                    let got = run(&case, DType::F32, DType::F32, &device, |x| Ok(x.clone()))?;
                    got.check(
                        &format!("{shape:?} offset {offset}"),
                        DType::F32,
                        DType::F32,
                    )?;
                }
            }
        }
    }
    Ok(())
}

/// A tensor with the same values as `x`, whose memory is arranged otherwise.
type Rearrange = fn(&Tensor) -> Result<Tensor>;

const LAYOUTS: [(&str, Rearrange); 6] = [
    ("transposed", |x| {
        let last = x.rank() - 1;
        x.transpose(0, last)?.contiguous()?.transpose(0, last)
    }),
    ("channels first of all", |x| {
        x.transpose(0, 1)?.contiguous()?.transpose(0, 1)
    }),
    ("channels last", |x| {
        let mut order: Vec<usize> = (0..x.rank()).filter(|&dim| dim != 1).collect();
        order.push(1);
        let mut back: Vec<usize> = (0..x.rank() - 1).collect();
        back.insert(1, x.rank() - 1);
        x.permute(order)?.contiguous()?.permute(back)
    }),
    ("narrowed batch", |x| {
        Tensor::cat(&[x, x, x], 0)?.narrow(0, x.dims()[0], x.dims()[0])
    }),
    ("narrowed channels", |x| {
        Tensor::cat(&[x, x, x], 1)?.narrow(1, x.dims()[1], x.dims()[1])
    }),
    ("narrowed last dimension", |x| {
        let last = x.rank() - 1;
        Tensor::cat(&[x, x], last)?.narrow(last, x.dims()[last], x.dims()[last])
    }),
];

#[test]
fn layouts_do_not_matter() -> Result<()> {
    for device in devices() {
        for shape in [&[5, 7][..], &[4, 3, 5], &[4, 3, 5, 6], &[2, 3, 2, 3, 4]] {
            for (name, layout) in LAYOUTS {
                for options in Options::some() {
                    let case = case(shape, options, DType::F32, 0.5)?;
                    let got = run(&case, DType::F32, DType::F32, &device, layout)?;
                    got.check(&format!("{shape:?} {name}"), DType::F32, DType::F32)?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn channels_last_stays_channels_last() -> Result<()> {
    for device in devices() {
        let x = tensor(
            &random(1, 2 * 4 * 5 * 3, 0.0),
            &[2, 4, 5, 3],
            DType::F32,
            &device,
        )?;
        let x = x.permute((0, 3, 1, 2))?;
        let (y, _) = batch_norm_train(&x, &BatchNormArgs::new())?;
        assert_eq!(y.layout().stride(), x.layout().stride());
    }
    Ok(())
}

#[test]
fn parameters_may_be_views() -> Result<()> {
    for device in devices() {
        let mut case = case(
            &[6, 3, 4],
            Options::all().nth(3).expect("options"),
            DType::F32,
            0.0,
        )?;
        let table = tensor(&random(8, 3 * 4, 1.0), &[3, 4], DType::F32, &device)?;
        let x = tensor(&case.x, &case.shape, DType::F32, &device)?;
        let (weight, bias) = (
            table.narrow(1, 1, 1)?.squeeze(1)?,
            table.get(2)?.narrow(0, 1, 3)?,
        );
        case.weight = Some(values(&weight)?);
        case.bias = Some(values(&bias)?);
        let args = BatchNormArgs {
            weight: Some(&weight),
            bias: Some(&bias),
            ..BatchNormArgs::new()
        };
        let (y, _) = batch_norm_train(&x, &args)?;
        assert_close("y", &values(&y)?, &case.truth().y, 2e-6, 1e-6);
    }
    Ok(())
}

#[test]
fn finite_differences_agree() -> Result<()> {
    for device in devices() {
        for shape in [&[6, 3][..], &[3, 2, 4]] {
            for options in Options::some() {
                let case = case(shape, options, DType::F64, 0.5)?;
                let got = run(&case, DType::F64, DType::F64, &device, |x| Ok(x.clone()))?;
                // The loss Σ y·dy, with one value of one argument moved by h.
                let loss = |change: &dyn Fn(&mut Case)| -> Result<f64> {
                    let mut moved = case.clone();
                    change(&mut moved);
                    let got = run(&moved, DType::F64, DType::F64, &device, |x| Ok(x.clone()))?;
                    Ok(values(&got.y)?
                        .iter()
                        .zip(&case.dy)
                        .map(|(y, dy)| y * dy)
                        .sum())
                };
                let h = 1e-6;
                let slope = |field: &dyn Fn(&mut Case) -> &mut f64| -> Result<f64> {
                    let up = loss(&|case| *field(case) += h)?;
                    let down = loss(&|case| *field(case) -= h)?;
                    Ok((up - down) / (2.0 * h))
                };
                for i in 0..case.x.len() {
                    let slope = slope(&|case| &mut case.x[i])?;
                    assert_close(
                        &format!("dx {i} {options:?}"),
                        &[got.dx[i]],
                        &[slope],
                        1e-7,
                        1e-6,
                    );
                }
                let params = [(&got.dweight, 0), (&got.dbias, 1)];
                for (grads, which) in params {
                    for (i, grad) in grads.iter().flatten().enumerate() {
                        let slope = slope(&|case| {
                            let field = [&mut case.weight, &mut case.bias];
                            &mut field.into_iter().nth(which).unwrap().as_mut().unwrap()[i]
                        })?;
                        assert_close(
                            &format!("parameter {which}"),
                            &[*grad],
                            &[slope],
                            1e-7,
                            1e-6,
                        );
                    }
                }
                for (i, grad) in got.dresidual.iter().flatten().enumerate() {
                    let slope = slope(&|case| &mut case.residual.as_mut().unwrap()[i])?;
                    assert_close("dresidual", &[*grad], &[slope], 1e-7, 1e-6);
                }
            }
        }
    }
    Ok(())
}

/// The way back without autograd gives what the way with it gives, to the bit.
#[test]
fn vjp_has_the_gradients_of_autograd() -> Result<()> {
    for device in devices() {
        for (seed, dtype) in [DType::F32, DType::F64, DType::BF16]
            .into_iter()
            .enumerate()
        {
            // Small planes, and large ones in several parts.
            let shapes = [[6, 5, 7, 3], [7, 5, 50, 51]];
            let options = Options::all().filter(|options| !options.given);
            for (options, shape) in options.flat_map(|o| shapes.map(|shape| (o, shape))) {
                let count = shape.iter().product();
                let dy = tensor(
                    &random(40 + seed as u64, count, 0.0),
                    &shape,
                    dtype,
                    &device,
                )?;
                let x = var(
                    &random(50 + seed as u64, count, 2.0),
                    &shape,
                    dtype,
                    &device,
                )?;
                let residual = var(&random(60, count, 0.0), &shape, dtype, &device)?;
                let (weight, bias) = (
                    var(&random(70, 5, 1.0), &[5], dtype, &device)?,
                    var(&random(80, 5, 0.0), &[5], dtype, &device)?,
                );
                let args = BatchNormArgs {
                    weight: options.weight.then_some(weight.as_tensor()),
                    bias: options.bias.then_some(bias.as_tensor()),
                    residual: options.residual.then_some(residual.as_tensor()),
                    activation: match options.relu {
                        true => Activation::Relu,
                        false => Activation::Identity,
                    },
                    ..BatchNormArgs::new()
                };
                // Also in the order of memory in which the channels come last.
                for last in [false, true] {
                    let order = |t: &Tensor| match last {
                        true => t.permute((0, 2, 3, 1))?.contiguous()?.permute((0, 3, 1, 2)),
                        false => Ok(t.clone()),
                    };
                    let (y, _) = batch_norm_train(&order(&x)?, &args)?;
                    let grads = (&y * &dy)?.sum_all()?.backward()?;
                    let (vjp_y, _, pullback) = batch_norm_vjp(&order(&x)?, &args)?;
                    let vjp = pullback.gradients(&dy)?;
                    assert_eq!(values(&vjp_y)?, values(&y)?);
                    assert!(!vjp_y.track_op() && !vjp.dx.track_op());
                    let pairs = [
                        (Some(&vjp.dx), Some(&x)),
                        (vjp.dweight.as_ref(), options.weight.then_some(&weight)),
                        (vjp.dbias.as_ref(), options.bias.then_some(&bias)),
                        (
                            vjp.dresidual.as_ref(),
                            options.residual.then_some(&residual),
                        ),
                    ];
                    for (index, (got, var)) in pairs.into_iter().enumerate() {
                        assert_eq!(got.is_some(), var.is_some(), "gradient {index}");
                        if let (Some(got), Some(var)) = (got, var) {
                            let expected = grads.get(var).expect("a gradient");
                            assert_eq!(values(got)?, values(expected)?, "gradient {index}");
                        }
                    }
                    assert_error(
                        pullback.gradients(&weight),
                        &["a gradient like the output", "[5]"],
                    );
                }
            }
        }
    }
    Ok(())
}

/// Runs itself again with another number of threads, and compares bits.
#[test]
fn the_number_of_threads_does_not_matter() -> Result<()> {
    let mut bits = vec![];
    for shape in [
        &[7, 3, 50, 51][..],
        &[20, 40, 21, 21],
        &[1000, 37],
        &[67, 1100],
        &[150, 50, 5, 5],
        // Channels enough for one thread, not for three.
        &[6, 8, 60, 61],
    ] {
        for options in Options::some() {
            let case = case(shape, options, DType::F32, 0.5)?;
            let got = run(&case, DType::F32, DType::F32, &Device::Cpu, |x| {
                Ok(x.clone())
            })?;
            let mut results = vec![values(&got.y)?, got.dx];
            results.extend(
                [got.dweight, got.dbias, got.dresidual]
                    .into_iter()
                    .flatten(),
            );
            bits.extend(results.concat());
        }
    }
    common::assert_bits_for_any_number_of_threads("the_number_of_threads_does_not_matter", &bits)
}
