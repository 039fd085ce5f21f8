//! Batch norm with a maximum over windows behind it, in one op.

mod common;

use candle_batch_norm::models::{Architecture, Model, ModelConfig, Norm};
use candle_batch_norm::ops::{
    batch_norm_inference, batch_norm_train, batch_norm_vjp, max_pool2d, Activation, BatchNormArgs,
};
use candle_batch_norm::{batch_norm, BatchNormConfig};
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, assert_error, devices, random, rounding, tensor, values, var, Case};

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

/// `[n, c, h, w]` and the kernel: even and odd sides, planes that are too small and too large for one
/// op, the smallest and one longer than a task's share, more channels than threads and fewer.
const SHAPES: [([usize; 4], usize); 16] = [
    ([2, 1, 2, 2], 2),
    ([4, 3, 7, 7], 2),
    ([3, 2, 8, 8], 2),
    ([3, 2, 5, 13], 2),
    ([2, 3, 35, 3], 2),
    ([2, 1, 260, 255], 2),
    ([2, 20, 28, 28], 2),
    ([5, 4, 14, 18], 2),
    ([2, 2, 5, 32], 2),
    ([2, 2, 4, 33], 2),
    ([2, 2, 7, 34], 2),
    ([3, 2, 6, 17], 2),
    ([2, 2, 97, 101], 2),
    ([3, 2, 4, 4], 1),
    ([2, 3, 9, 11], 3),
    ([2, 3, 8, 8], 8),
];

/// A case with parameters of both signs.
fn case(shape: [usize; 4], relu: bool) -> Case {
    let [n, c, h, w] = shape;
    let count = n * c * h * w;
    Case {
        shape: shape.to_vec(),
        x: random(1, count, 0.5),
        weight: Some(random(2, c, 0.3)),
        bias: Some(random(3, c, 0.0)),
        relu,
        eps: 1e-5,
        ..Case::default()
    }
}

/// The maxima of the windows of `y`, and `dy` in the place of the (first) maximum of each.
fn pooled(shape: [usize; 4], kernel: usize, y: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let [n, c, h, w] = shape;
    let (mut maxima, mut gradient) = (vec![], vec![0.0; y.len()]);
    for plane in 0..n * c {
        for (i, j) in (0..h / kernel).flat_map(|i| (0..w / kernel).map(move |j| (i, j))) {
            let pixels = (0..kernel * kernel)
                .map(|k| plane * h * w + (i * kernel + k / kernel) * w + j * kernel + k % kernel);
            let largest = pixels.reduce(|best, at| if y[at] > y[best] { at } else { best });
            let largest = largest.expect("a kernel above 0");
            gradient[largest] = dy[maxima.len()];
            maxima.push(y[largest]);
        }
    }
    (maxima, gradient)
}

fn activation(relu: bool) -> Activation {
    match relu {
        true => Activation::Relu,
        false => Activation::Identity,
    }
}

#[test]
fn closed_forms() -> Result<()> {
    for device in &devices() {
        for (shape, kernel) in SHAPES {
            for (relu, frozen) in [(true, false), (false, false), (true, true), (false, true)] {
                let [n, c, h, w] = shape;
                let dy = random(4, n * c * (h / kernel) * (w / kernel), 0.0);
                let mut case = case(shape, relu);
                case.dy = vec![0.0; case.x.len()];
                if frozen {
                    let var = random(6, c, 0.0).iter().map(|v| v * v + 0.5).collect();
                    case.given = Some((random(5, c, 0.0), var));
                }
                let (y, routed) = pooled(shape, kernel, &case.truth().y, &dy);
                case.dy = routed;
                let truth = case.truth();
                for dtype in [DType::F64, DType::F32] {
                    let at = format!("{shape:?} {kernel} {relu} {frozen} {dtype:?}");
                    let get = |values: &[f64], shape: &[usize]| var(values, shape, dtype, device);
                    let x = get(&case.x, &shape)?;
                    let weight = get(case.weight.as_deref().unwrap_or(&[]), &[c])?;
                    let bias = get(case.bias.as_deref().unwrap_or(&[]), &[c])?;
                    let args = BatchNormArgs {
                        weight: Some(&weight),
                        bias: Some(&bias),
                        activation: activation(relu),
                        max_pool: Some(kernel),
                        ..BatchNormArgs::new()
                    };
                    let got = match &case.given {
                        None => batch_norm_train(&x, &args)?.0,
                        Some((mean, var)) => {
                            let mean = tensor(mean, &[c], dtype, device)?;
                            let var = tensor(var, &[c], dtype, device)?;
                            batch_norm_inference(&x, &mean, &var, &args)?
                        }
                    };
                    assert_eq!(got.dims(), [n, c, h / kernel, w / kernel], "{at}");
                    let dy = tensor(&dy, got.dims(), dtype, device)?;
                    let grads = (&got * &dy)?.sum_all()?.backward()?;
                    let grad = |of: &Var| values(grads.get(of).expect("a gradient"));
                    let tolerance = 4.0 * rounding(dtype);
                    let close = |what: &str, got: &[f64], expected: &[f64]| {
                        let what = format!("{at} {what}");
                        assert_close(&what, got, expected, tolerance, tolerance)
                    };
                    close("y", &values(&got)?, &y);
                    close("dx", &grad(&x)?, &truth.dx);
                    let scale = truth.dweight_scale.iter().fold(1.0, |a: f64, &b| a.max(b));
                    let sums = tolerance * scale;
                    assert_close(&at, &grad(&weight)?, &truth.dweight, sums, 0.0);
                    assert_close(&at, &grad(&bias)?, &truth.dbias, sums, 0.0);
                }
            }
        }
    }
    Ok(())
}

/// What is not stored is computed again to the last bit: the output is that of two ops, but for the
/// order in which the statistics are summed up, which only F64 shows.
#[test]
fn one_op_as_two() -> Result<()> {
    let layouts: [fn(&Tensor) -> Result<Tensor>; 3] = [
        |x| Ok(x.clone()),
        |x| x.permute((0, 2, 3, 1))?.contiguous()?.permute((0, 3, 1, 2)),
        |x| x.transpose(2, 3)?.contiguous()?.transpose(2, 3),
    ];
    for device in &devices() {
        for (shape, kernel) in SHAPES {
            for (dtype, relu) in DTYPES.into_iter().flat_map(|d| [(d, true), (d, false)]) {
                for (layout, with_residual) in [(0, false), (1, false), (2, false), (1, true)] {
                    let at =
                        format!("{shape:?} {kernel} {dtype:?} {relu} {layout} {with_residual}");
                    let case = case(shape, relu);
                    let c = shape[1];
                    let x = var(&case.x, &shape, dtype, device)?;
                    let residual = var(&random(7, case.x.len(), 0.0), &shape, dtype, device)?;
                    let weight = var(&random(2, c, 0.3), &[c], dtype, device)?;
                    let bias = var(&random(3, c, 0.0), &[c], dtype, device)?;
                    let two = BatchNormArgs {
                        weight: Some(&weight),
                        bias: Some(&bias),
                        residual: with_residual.then_some(&residual),
                        activation: activation(relu),
                        ..BatchNormArgs::new()
                    };
                    let one = BatchNormArgs {
                        max_pool: Some(kernel),
                        ..two
                    };
                    let laid_out = layouts[layout](&x)?;
                    let (y_two, stats_two) = batch_norm_train(&laid_out, &two)?;
                    let y_two = max_pool2d(&y_two, kernel)?;
                    let (y_one, stats_one) = batch_norm_train(&laid_out, &one)?;
                    let bound = if dtype == DType::F64 { 1e-13 } else { 0.0 };
                    assert_close(&at, &values(&y_one)?, &values(&y_two)?, bound, bound);
                    let mean = (values(&stats_one.mean()?)?, values(&stats_two.mean()?)?);
                    assert_close(&at, &mean.0, &mean.1, 1e-14, 1e-14);

                    let dy = random(8, y_one.elem_count(), 0.0);
                    let dy = tensor(&dy, y_one.dims(), dtype, device)?;
                    let gradients = |y: &Tensor| -> Result<_> {
                        let grads = (y * &dy)?.sum_all()?.backward()?;
                        let dx = values(grads.get(&x).expect("a gradient"))?;
                        let dweight = values(grads.get(&weight).expect("a gradient"))?;
                        let dbias = values(grads.get(&bias).expect("a gradient"))?;
                        let dresidual = grads.get(&residual).map(values).transpose()?;
                        Ok((dx, [dweight, dbias].concat(), dresidual))
                    };
                    let (of_one, of_two) = (gradients(&y_one)?, gradients(&y_two)?);
                    let tolerance = rounding(dtype);
                    assert_close(&at, &of_one.0, &of_two.0, tolerance, tolerance);
                    assert_close(&at, &of_one.1, &of_two.1, tolerance, tolerance);
                    assert_eq!(of_one.2, of_two.2, "{at}");

                    // The same gradients of the parameters where the input is a constant.
                    let constant = layouts[layout](&x.as_detached_tensor())?;
                    let (y, _) = batch_norm_train(&constant, &one)?;
                    let grads = (&y * &dy)?.sum_all()?.backward()?;
                    let dweight = values(grads.get(&weight).expect("a gradient"))?;
                    let dbias = values(grads.get(&bias).expect("a gradient"))?;
                    assert_eq!([dweight, dbias].concat(), of_one.1, "{at}");

                    let (y, _, pullback) = batch_norm_vjp(&laid_out, &one)?;
                    assert_eq!(values(&y)?, values(&y_one)?, "{at}");
                    let grads = pullback.gradients(&dy)?;
                    let value = |t: &Option<Tensor>| t.as_ref().map(values).transpose();
                    assert_eq!(values(&grads.dx)?, of_one.0, "{at}");
                    let params = [value(&grads.dweight)?, value(&grads.dbias)?];
                    assert_eq!(
                        params.map(|t| t.unwrap_or_default()).concat(),
                        of_one.1,
                        "{at}"
                    );
                    assert_eq!(value(&grads.dresidual)?, of_one.2, "{at}");
                }
            }
        }
    }
    Ok(())
}

/// Of equal pixels the first one has the gradient, in windows without a positive value none; with given statistics
/// and constant parameters, where there is nothing to sum up, and in training.
#[test]
fn ties_as_two_ops() -> Result<()> {
    let device = &Device::Cpu;
    for (shape, kernel) in SHAPES {
        for (dtype, relu) in DTYPES.into_iter().flat_map(|d| [(d, true), (d, false)]) {
            let at = format!("{shape:?} {kernel} {dtype:?} {relu}");
            let case = case(shape, relu);
            let x: Vec<_> = case.x.iter().map(|v| v.round()).collect();
            let x = var(&x, &shape, dtype, device)?;
            let get = |seed: u64| tensor(&random(seed, shape[1], 0.3), &[shape[1]], dtype, device);
            let (weight, bias, mean, variance) = (get(2)?, get(3)?, get(5)?, get(6)?.sqr()?);
            let two = BatchNormArgs {
                weight: Some(&weight),
                bias: Some(&bias),
                activation: activation(relu),
                ..BatchNormArgs::new()
            };
            let one = BatchNormArgs {
                max_pool: Some(kernel),
                ..two
            };
            let given = |args| batch_norm_inference(&x, &mean, &variance, args);
            let train = |args| Ok::<_, candle_core::Error>(batch_norm_train(&x, args)?.0);
            let pairs = [
                (given(&one)?, max_pool2d(&given(&two)?, kernel)?),
                (train(&one)?, max_pool2d(&train(&two)?, kernel)?),
            ];
            for (y_one, y_two) in pairs {
                let dy = random(8, y_one.elem_count(), 3.0);
                let dy = tensor(&dy, y_one.dims(), dtype, device)?;
                let dx = |y: &Tensor| -> Result<_> {
                    values(
                        (y * &dy)?
                            .sum_all()?
                            .backward()?
                            .get(&x)
                            .expect("a gradient"),
                    )
                };
                let tolerance = rounding(dtype);
                assert_close(&at, &dx(&y_one)?, &dx(&y_two)?, tolerance, tolerance);
            }
        }
    }
    Ok(())
}

/// In windows with a NaN it is the maximum, and other channels know nothing of it.
#[test]
fn nan_as_two_ops() -> Result<()> {
    let device = &Device::Cpu;
    let mut x = random(1, 2 * 3 * 8 * 8, 0.0);
    x[70] = f64::NAN;
    x[4 * 64 + 3] = f64::INFINITY;
    let x = var(&x, &[2, 3, 8, 8], DType::F32, device)?;
    let zeros = Tensor::zeros(3, DType::F32, device)?;
    let ones = zeros.ones_like()?;
    let two = BatchNormArgs {
        activation: Activation::Relu,
        ..BatchNormArgs::new()
    };
    let one = BatchNormArgs {
        max_pool: Some(2),
        ..two
    };
    let bits = |t: &Tensor| -> Result<Vec<Option<u64>>> {
        let values = values(t)?.into_iter();
        Ok(values
            .map(|v| (!v.is_nan()).then_some(v.to_bits()))
            .collect())
    };
    let y_one = batch_norm_inference(&x, &zeros, &ones, &one)?;
    let y_two = max_pool2d(&batch_norm_inference(&x, &zeros, &ones, &two)?, 2)?;
    assert_eq!(bits(&y_one)?, bits(&y_two)?);
    assert_eq!(bits(&y_one)?.iter().filter(|v| v.is_none()).count(), 1);
    let (one, two) = (y_one.backward()?, y_two.backward()?);
    let dx = |grads: &candle_core::backprop::GradStore| bits(grads.get(&x).expect("a gradient"));
    assert_eq!(dx(&one)?, dx(&two)?);
    // The gradient of a window with a NaN is the NaN's.
    assert!(dx(&one)?[70].is_some_and(|bits| f64::from_bits(bits) > 0.9));

    // In training it is in the statistics, but in those of its channel alone.
    let args = BatchNormArgs {
        max_pool: Some(2),
        ..BatchNormArgs::new()
    };
    let (y, _) = batch_norm_train(&x, &args)?;
    let grads = y.backward()?;
    for t in [&y, grads.get(&x).expect("a gradient")] {
        let nans = |channel| Ok(bits(&t.narrow(1, channel, 1)?)?.contains(&None));
        let nans: Result<Vec<bool>> = (0..3).map(nans).collect();
        assert_eq!(nans?, [false, true, false], "{t}");
    }
    Ok(())
}

#[test]
fn wrong_windows_get_an_error() -> Result<()> {
    let device = &Device::Cpu;
    let args = |max_pool| BatchNormArgs {
        max_pool: Some(max_pool),
        ..BatchNormArgs::new()
    };
    let x = Tensor::zeros((4, 2, 6, 5), DType::F32, device)?;
    let flat = x.flatten_from(1)?;
    let wrong = batch_norm_train(&flat.narrow(0, 0, 0)?, &args(2));
    assert_error(wrong, &["batch norm", "[n, c, h, w]", "[0, 60]"]);
    for kernel in [0, 6, 7] {
        let expected = [
            "batch norm",
            "kernel from 1",
            "[4, 2, 6, 5]",
            &kernel.to_string(),
        ];
        assert_error(batch_norm_train(&x, &args(kernel)), &expected);
        let stats = Tensor::ones(2, DType::F32, device)?;
        let inference = batch_norm_inference(&x, &stats, &stats, &args(kernel));
        assert_error(inference, &expected);
        assert_error(batch_norm_vjp(&x, &args(kernel)).map(|_| ()), &expected);
    }
    assert_error(
        batch_norm_train(&flat, &args(2)),
        &["[n, c, h, w]", "[4, 60]"],
    );
    let (y, _, pullback) = batch_norm_vjp(&x, &args(2))?;
    assert_eq!(y.dims(), [4, 2, 3, 2]);
    assert_error(
        pullback.gradients(&x),
        &["the output", "[4, 2, 3, 2]", "[4, 2, 6, 5]"],
    );
    let empty = x.narrow(0, 0, 0)?;
    let (y, _) = batch_norm_train(&empty, &args(2))?;
    assert_eq!(y.dims(), [0, 2, 3, 2]);
    Ok(())
}

/// The layer, with its running statistics, and what candle-nn cannot take over.
#[test]
fn layer() -> Result<()> {
    let device = &Device::Cpu;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let config = BatchNormConfig {
        activation: Activation::Relu,
        ..Default::default()
    };
    let x = tensor(
        &random(1, 2 * 3 * 8 * 8, 1.0),
        &[2, 3, 8, 8],
        DType::F32,
        device,
    )?;
    let two = batch_norm(3, config, vb.pp("two"))?;
    let pooled = |kernel| BatchNormConfig {
        max_pool: Some(kernel),
        ..config
    };
    let one = batch_norm(3, pooled(2), vb.pp("one"))?;
    assert_error(batch_norm(3, pooled(0), vb.pp("zero")), &["max_pool", "0"]);
    let model = ModelConfig {
        norm: Norm::Batch(pooled(2)),
        ..Default::default()
    };
    assert_error(
        Model::new(Architecture::Cnn, &model, vb.clone()),
        &["max_pool", "Some(2)"],
    );
    for train in [true, false] {
        let y = max_pool2d(&two.forward_t(&x, train)?, 2)?;
        assert_eq!(values(&one.forward_t(&x, train)?)?, values(&y)?);
    }
    assert_eq!(values(one.running_mean())?, values(two.running_mean())?);
    assert_eq!(values(one.running_var())?, values(two.running_var())?);
    let config = BatchNormConfig {
        max_pool: Some(2),
        ..Default::default()
    };
    let layer = batch_norm(3, config, vb.pp("three"))?;
    assert_error(
        candle_nn::BatchNorm::try_from(&layer),
        &["max_pool Some(2)"],
    );
    Ok(())
}
