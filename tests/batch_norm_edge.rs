//! What the ops do at the edges: bad input, NaN, nothing, constants, repetition.

mod common;

use candle_batch_norm::ops::{batch_norm_inference, batch_norm_train, Activation, BatchNormArgs};
use candle_core::{DType, Device, Result, Tensor, Var};
use common::{assert_close, assert_error, devices, random, tensor, values, var, Case};
use proptest::prelude::*;

const CPU: Device = Device::Cpu;

#[test]
fn bad_arguments_get_errors_that_name_them() -> Result<()> {
    let args = BatchNormArgs::new();
    let ones = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &CPU);
    let x = tensor(&random(1, 24, 0.0), &[4, 3, 2], DType::F32, &CPU)?;
    let (c3, c4) = (ones(&[3], DType::F32)?, ones(&[4], DType::F32)?);
    let train = |x: &Tensor, args: BatchNormArgs| batch_norm_train(x, &args).map(|_| ());

    assert_error(
        train(&ones(&[3], DType::F32)?, args),
        &["at least 2 dimensions", "[3]"],
    );
    assert_error(
        train(&ones(&[2, 3], DType::U8)?, args),
        &["F32, F64, F16 or BF16", "U8"],
    );
    let one = ones(&[1, 3, 1], DType::F32)?;
    assert_error(
        train(&one, args),
        &["more than one value per channel", "[1, 3, 1]"],
    );
    for eps in [0.0, -1e-5, f64::NAN] {
        let args = BatchNormArgs { eps, ..args };
        assert_error(train(&x, args), &["eps > 0", &eps.to_string()]);
    }
    for (weight, bias, parts) in [
        (Some(&c4), None, ["weight of shape [3]", "[4]"]),
        (None, Some(&c4), ["bias of shape [3]", "[4]"]),
        (
            Some(&ones(&[3], DType::F64)?),
            None,
            ["weight of dtype F32", "F64"],
        ),
        (
            Some(&ones(&[3], DType::F16)?),
            None,
            ["weight of dtype F32", "F16"],
        ),
    ] {
        assert_error(
            train(
                &x,
                BatchNormArgs {
                    weight,
                    bias,
                    ..args
                },
            ),
            &parts,
        );
    }
    let half = x.to_dtype(DType::F16)?;
    let (weight, bias) = (Some(&c3), ones(&[3], DType::F16)?);
    let mixed = BatchNormArgs {
        weight,
        bias: Some(&bias),
        ..args
    };
    assert_error(train(&half, mixed), &["one dtype", "F32", "F16"]);
    let residual = ones(&[4, 3, 3], DType::F32)?;
    let residual = BatchNormArgs {
        residual: Some(&residual),
        ..args
    };
    assert_error(train(&x, residual), &["residual", "[4, 3, 2]", "[4, 3, 3]"]);

    let inference = |mean: &Tensor, var: &Tensor, args: BatchNormArgs| {
        batch_norm_inference(&x, mean, var, &args)
    };
    assert_error(inference(&c4, &c3, args), &["mean of shape [3]", "[4]"]);
    assert_error(inference(&c3, &c4, args), &["variance of shape [3]", "[4]"]);
    let integers = ones(&[3], DType::U32)?;
    assert_error(
        inference(&integers, &c3, args),
        &["mean of dtype F32 or F64", "U32"],
    );
    let double = ones(&[3], DType::F64)?;
    assert_error(
        inference(&c3, &double, args),
        &["mean and variance of one dtype", "F32", "F64"],
    );
    for eps in [-1.0, f64::NAN] {
        assert_error(
            inference(&c3, &c3, BatchNormArgs { eps, ..args }),
            &["eps >= 0"],
        );
    }
    Ok(())
}

#[test]
fn bad_running_statistics_get_errors_and_stay() -> Result<()> {
    let x = tensor(&random(1, 24, 5.0), &[4, 3, 2], DType::F32, &CPU)?;
    let (_, stats) = batch_norm_train(&x, &BatchNormArgs::new())?;
    let (mean, variance) = (
        Var::zeros(3, DType::F32, &CPU)?,
        Var::ones(3, DType::F32, &CPU)?,
    );
    let wrong = Var::ones(4, DType::F32, &CPU)?;
    assert_error(
        stats.update_running(Some(&mean), &wrong, 0.1),
        &["shape [3]", "[4]"],
    );
    for momentum in [-0.1, 1.1, f64::NAN] {
        let result = stats.update_running(Some(&mean), &variance, momentum);
        assert_error(result, &["momentum from 0 to 1", &momentum.to_string()]);
    }
    let half = Var::ones(3, DType::F16, &CPU)?;
    assert_error(
        stats.update_running(Some(&mean), &half, 0.1),
        &["F32 or F64", "F16"],
    );
    assert_eq!(
        (values(&mean)?, values(&variance)?),
        (vec![0.0; 3], vec![1.0; 3])
    );
    Ok(())
}

#[test]
fn an_empty_batch_gives_an_empty_output() -> Result<()> {
    for device in devices() {
        for shape in [&[0, 3][..], &[0, 3, 4, 4], &[2, 3, 0], &[2, 0, 3]] {
            let x = Tensor::zeros(shape, DType::F32, &device)?;
            let (y, stats) = batch_norm_train(&x, &BatchNormArgs::new())?;
            assert_eq!((y.dims(), stats.count()), (shape, 0));
            let ones = Tensor::ones(shape[1], DType::F32, &device)?;
            let y = batch_norm_inference(&x, &ones, &ones, &BatchNormArgs::new())?;
            assert_eq!(y.dims(), shape);
            stats.update_running(Some(&ones), &ones, 0.5)?;
            assert_eq!(values(&ones)?, vec![1.0; shape[1]]);
        }
    }
    Ok(())
}

#[test]
fn nan_and_infinity_stay_in_their_channel() -> Result<()> {
    for device in devices() {
        for shape in [&[6, 5][..], &[3, 5, 7], &[40, 70]] {
            for bad in [f64::NAN, f64::INFINITY] {
                for activation in [Activation::Identity, Activation::Relu] {
                    let (c, count) = (shape[1], shape.iter().product());
                    let s: usize = shape[2..].iter().product();
                    let clean = random(1, count, 0.5);
                    let mut dirty = clean.clone();
                    dirty[(c + 2) * s] = bad; // in the second row, channel 2
                    let args = BatchNormArgs {
                        activation,
                        ..BatchNormArgs::new()
                    };
                    let run = |data: &[f64]| -> Result<(Vec<f64>, Vec<f64>)> {
                        let x = var(data, shape, DType::F32, &device)?;
                        let y = batch_norm_train(&x, &args)?.0;
                        let dx = y.sqr()?.sum_all()?.backward()?;
                        Ok((values(&y)?, values(dx.get(&x).expect("a gradient"))?))
                    };
                    let (clean, dirty) = (run(&clean)?, run(&dirty)?);
                    for i in 0..count {
                        if i / s % c == 2 {
                            assert!(dirty.0[i].is_nan() && dirty.1[i].is_nan(), "{shape:?} {i}");
                        } else {
                            assert_eq!((dirty.0[i], dirty.1[i]), (clean.0[i], clean.1[i]));
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_constant_channel_gives_exactly_the_bias() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for shape in [&[31, 5][..], &[1001, 5], &[7, 5, 33], &[3, 5, 1001]] {
                for constant in [0.1, 0.7, -1234.567, 3e4] {
                    let x = tensor(
                        &vec![constant; shape.iter().product()],
                        shape,
                        dtype,
                        &device,
                    )?;
                    let weight = tensor(&random(2, 5, 1.0), &[5], dtype, &device)?;
                    let bias = tensor(&random(3, 5, 0.0), &[5], dtype, &device)?;
                    let (weight, bias) = (Some(&weight), Some(&bias));
                    let args = BatchNormArgs {
                        weight,
                        bias,
                        ..BatchNormArgs::new()
                    };
                    let (y, stats) = batch_norm_train(&x, &args)?;
                    assert_eq!(values(&stats.var()?)?, [0.0; 5]);
                    let s: usize = shape[2..].iter().product();
                    let bias = values(bias.expect("a bias"))?;
                    for (i, y) in values(&y)?.into_iter().enumerate() {
                        assert_eq!(y, bias[i / s % 5], "{dtype:?} {shape:?} {constant}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_outlier_in_the_first_place_costs_no_accuracy() -> Result<()> {
    for device in devices() {
        for shape in [&[4096, 2][..], &[64, 2, 64]] {
            let mut case = Case {
                shape: shape.to_vec(),
                x: random(1, 8192, 0.0),
                dy: random(2, 8192, 0.0),
                eps: 1e-5,
                ..Case::default()
            };
            case.x[0] = 1e6;
            let x = tensor(&case.x, shape, DType::F32, &device)?;
            let (y, stats) = batch_norm_train(&x, &BatchNormArgs::new())?;
            case.x = values(&x)?;
            let truth = case.truth();
            assert_close("y", &values(&y)?, &truth.y, 2e-6, 1e-6);
            assert_close("var", &values(&stats.var()?)?, &truth.var, 0.0, 1e-6);
        }
    }
    Ok(())
}

#[test]
fn backward_may_run_twice_and_two_runs_agree_to_the_bit() -> Result<()> {
    for device in devices() {
        for shape in [&[512, 130][..], &[8, 9, 700]] {
            let x = var(
                &random(1, shape.iter().product(), 10.0),
                shape,
                DType::F32,
                &device,
            )?;
            let weight = var(&random(2, shape[1], 1.0), &[shape[1]], DType::F32, &device)?;
            let args = BatchNormArgs {
                weight: Some(&weight),
                ..BatchNormArgs::new()
            };
            let run = || -> Result<(Tensor, Tensor)> {
                let y = batch_norm_train(&x, &args)?.0;
                let loss = (y.sqr()? * &y)?.sum_all()?;
                Ok((y, loss))
            };
            let ((y1, loss1), (y2, loss2)) = (run()?, run()?);
            assert_eq!(values(&y1)?, values(&y2)?);
            let grads = [loss1.backward()?, loss1.backward()?, loss2.backward()?];
            for var in [&x, &weight] {
                let first = values(grads[0].get(var).expect("a gradient"))?;
                for other in &grads[1..] {
                    assert_eq!(first, values(other.get(var).expect("a gradient"))?);
                }
            }
        }
    }
    Ok(())
}

/// The gradient of inference uses the statistics of its own forward pass.
#[test]
fn later_changes_of_the_statistics_do_not_reach_the_gradient() -> Result<()> {
    for device in devices() {
        let x = var(&random(1, 12, 0.0), &[4, 3], DType::F32, &device)?;
        let mean = Var::zeros(3, DType::F32, &device)?;
        let variance = Var::from_tensor(&Tensor::full(4f32, 3, &device)?)?;
        let args = BatchNormArgs {
            eps: 0.0,
            ..BatchNormArgs::new()
        };
        let y = batch_norm_inference(&x, &mean, &variance, &args)?;
        variance.set(&Tensor::full(100f32, 3, &device)?)?;
        let grads = y.sum_all()?.backward()?;
        assert_eq!(values(grads.get(&x).expect("a gradient"))?, [0.5; 12]);
        assert!(grads.get(&mean).is_none() && grads.get(&variance).is_none());
    }
    Ok(())
}

/// The statistics that a caller gets are its own: an in-place op on them must not reach the gradient.
#[test]
fn changes_of_the_returned_statistics_do_not_reach_the_gradient() -> Result<()> {
    for device in devices() {
        let x = var(&random(1, 12, 0.0), &[4, 3], DType::F32, &device)?;
        let (y, stats) = batch_norm_train(&x, &BatchNormArgs::new())?;
        let dy = tensor(&random(2, 12, 0.0), &[4, 3], DType::F32, &device)?;
        let loss = (y * dy)?.sum_all()?;
        let before = values(loss.backward()?.get(&x).expect("a gradient"))?;
        for t in [stats.mean()?, stats.var()?] {
            t.slice_set(&Tensor::full(7f64, 3, &device)?, 0, 0)?;
        }
        assert_eq!(
            values(loss.backward()?.get(&x).expect("a gradient"))?,
            before
        );
    }
    Ok(())
}

/// The ReLU cuts off what is 0 in the dtype of the output, also where it was a little more before.
#[test]
fn the_mask_is_that_of_the_rounded_output() -> Result<()> {
    for device in devices() {
        for (dtype, scale) in [
            (DType::F16, 1e-8),
            (DType::F16, 3e-8),
            (DType::F16, 1e-3),
            (DType::BF16, 1e-3),
        ] {
            let x = tensor(&random(1, 64, 0.0), &[64, 1], dtype, &device)?;
            let weight = tensor(&[scale], &[1], DType::F32, &device)?;
            let bias = var(&[0.0], &[1], DType::F32, &device)?;
            let args = BatchNormArgs {
                weight: Some(&weight),
                bias: Some(&bias),
                activation: Activation::Relu,
                ..BatchNormArgs::new()
            };
            let (y, _) = batch_norm_train(&x, &args)?;
            let passed = values(&y)?.iter().filter(|&&y| y > 0.0).count();
            assert_eq!(passed == 0, scale < 2e-8, "{passed} of 64");
            let grads = y.backward()?;
            assert_eq!(
                values(grads.get(&bias).expect("a gradient"))?,
                [passed as f64]
            );
        }
    }
    Ok(())
}

/// Without removing the mean: y = x / √(mean(x²) + eps), against candle's own ops and gradients.
#[test]
fn the_mean_may_stay() -> Result<()> {
    for device in devices() {
        for shape in [&[9, 4][..], &[3, 4, 5]] {
            let x = var(
                &random(1, shape.iter().product(), 0.7),
                shape,
                DType::F64,
                &device,
            )?;
            let dy = tensor(
                &random(2, shape.iter().product(), 0.0),
                shape,
                DType::F64,
                &device,
            )?;
            let args = BatchNormArgs {
                remove_mean: false,
                ..BatchNormArgs::new()
            };
            let (y, stats) = batch_norm_train(&x, &args)?;
            let rows = x.transpose(0, 1)?.flatten_from(1)?;
            let mean_square = rows.sqr()?.mean_keepdim(1)?;
            let mut broadcast = vec![1; shape.len()];
            broadcast[1] = shape[1];
            let root = (mean_square.reshape(broadcast)? + 1e-5)?.sqrt()?;
            let composed = x.broadcast_div(&root)?;
            assert_close("y", &values(&y)?, &values(&composed)?, 1e-12, 0.0);
            assert_eq!(values(&stats.mean()?)?, [0.0; 4]);
            let grad = |y: &Tensor| -> Result<Vec<f64>> {
                let grads = (y * &dy)?.sum_all()?.backward()?;
                values(grads.get(&x).expect("a gradient"))
            };
            assert_close("dx", &grad(&y)?, &grad(&composed)?, 1e-12, 0.0);
        }
    }
    Ok(())
}

/// candle's own layer, built of many ops, in F64: the same output and gradients.
#[test]
fn candle_composed_ops_agree() -> Result<()> {
    for device in devices() {
        for shape in [&[32, 33][..], &[5, 31, 7], &[3, 8, 9, 11]] {
            let c = shape[1];
            let x = var(
                &random(1, shape.iter().product(), 3.0),
                shape,
                DType::F64,
                &device,
            )?;
            let dy = tensor(
                &random(2, shape.iter().product(), 0.0),
                shape,
                DType::F64,
                &device,
            )?;
            let weight = var(&random(3, c, 1.0), &[c], DType::F64, &device)?;
            let bias = var(&random(4, c, 0.0), &[c], DType::F64, &device)?;
            let (zeros, ones) = (bias.zeros_like()?, bias.ones_like()?);
            let (w, b) = (weight.as_tensor().clone(), bias.as_tensor().clone());
            let theirs = candle_nn::BatchNorm::new(c, zeros, ones, w, b, 1e-5)?;
            let (weight_arg, bias_arg) = (Some(weight.as_tensor()), Some(bias.as_tensor()));
            let args = BatchNormArgs {
                weight: weight_arg,
                bias: bias_arg,
                ..BatchNormArgs::new()
            };
            let (y, _) = batch_norm_train(&x, &args)?;
            let composed = theirs.forward_train(&x)?;
            assert_close("y", &values(&y)?, &values(&composed)?, 1e-12, 0.0);
            let ours = (y * &dy)?.sum_all()?.backward()?;
            let theirs = (composed * &dy)?.sum_all()?.backward()?;
            for var in [&x, &weight, &bias] {
                let (ours, theirs) = (ours.get(var).unwrap(), theirs.get(var).unwrap());
                assert_close("gradient", &values(ours)?, &values(theirs)?, 1e-11, 1e-12);
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Any shape of rank 2 to 5, cut out of a larger tensor and transposed or not.
    #[test]
    fn any_shape_and_layout_matches_closed_forms(
        shape in prop::collection::vec(1usize..9, 2..=5),
        seed in 0u64..1000,
        offset in -100f64..100.0,
        start in 0usize..3,
        swap in any::<bool>(),
        relu in any::<bool>(),
    ) {
        let m: usize = shape.iter().product::<usize>() / shape[1];
        prop_assume!(m > 1);
        let check = || -> Result<()> {
            let numel = shape.iter().product();
            let mut case = Case {
                shape: shape.clone(),
                x: random(seed, numel, offset),
                dy: random(seed + 1, numel, 0.0),
                weight: Some(random(seed + 2, shape[1], 1.0)),
                bias: Some(random(seed + 3, shape[1], 0.0)),
                relu,
                eps: 1e-3,
                ..Case::default()
            };
            let x = var(&case.x, &shape, DType::F64, &CPU)?;
            let mut view = x.as_tensor().clone();
            if swap {
                let last = shape.len() - 1;
                view = view.transpose(0, last)?.contiguous()?.transpose(0, last)?;
            }
            let before = Tensor::zeros((start, numel), DType::F64, &CPU)?;
            if !swap {
                let padded = Tensor::cat(&[&before, &view.reshape((1, numel))?], 0)?;
                view = padded.get(start)?.reshape(&shape[..])?;
            }
            let weight = tensor(case.weight.as_ref().unwrap(), &[shape[1]], DType::F64, &CPU)?;
            let bias = tensor(case.bias.as_ref().unwrap(), &[shape[1]], DType::F64, &CPU)?;
            let args = BatchNormArgs {
                weight: Some(&weight),
                bias: Some(&bias),
                activation: if relu { Activation::Relu } else { Activation::Identity },
                eps: case.eps,
                ..BatchNormArgs::new()
            };
            let (y, _) = batch_norm_train(&view, &args)?;
            let dy = tensor(&case.dy, &shape, DType::F64, &CPU)?;
            let grads = (&y * dy)?.sum_all()?.backward()?;
            case.x = values(&x)?;
            let truth = case.truth();
            assert_close("y", &values(&y)?, &truth.y, 1e-9, 0.0);
            let dx = values(grads.get(&x).expect("a gradient"))?;
            assert_close("dx", &dx, &truth.dx, 1e-8, 1e-9);
            Ok(())
        };
        check().map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}
