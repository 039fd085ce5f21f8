//! Inputs with padded positions: closed forms over the others, garbage at the padded ones.

mod common;

use candle_batch_norm::layers::RenormSchedule;
use candle_batch_norm::ops::{batch_renorm_train, BatchNormArgs, RenormLimits};
use candle_batch_norm::{batch_norm, Activation, BatchNorm, BatchNormConfig, Freeze};
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::VarBuilder;
use common::{
    assert_close, assert_error, devices, differences, random, rounding, tensor, values, var, Case,
};

const N: usize = 4;
const C: usize = 3;
const S: usize = 5;
const RUNNING: [[f64; C]; 2] = [[0.3, -0.2, 0.9], [0.5, 2.0, 1.5]];
/// Sequences of 5, 3, 0 and 4 values.
const MASK: [[u8; S]; N] = [[1; S], [1, 1, 7, 0, 0], [0; S], [1, 1, 1, 1, 0]];
const REAL: usize = 12;

fn mask(device: &Device) -> Result<Tensor> {
    Tensor::new(&MASK, device)
}

/// A layer whose weight and bias are variables.
fn layer(config: BatchNormConfig, dtype: DType, device: &Device) -> Result<(BatchNorm, [Var; 2])> {
    let weight = var(&[0.5, 1.0, -1.5], &[C], dtype, device)?;
    let bias = var(&[0.1, -0.2, 0.3], &[C], dtype, device)?;
    let tensors = [
        ("weight", weight.as_tensor().clone()),
        ("bias", bias.as_tensor().clone()),
        (
            "running_mean",
            tensor(&RUNNING[0], &[C], DType::F64, device)?,
        ),
        (
            "running_var",
            tensor(&RUNNING[1], &[C], DType::F64, device)?,
        ),
        ("num_batches_tracked", Tensor::new(3i64, device)?),
    ];
    let tensors = tensors.map(|(name, t)| (name.to_string(), t)).into();
    let vb = VarBuilder::from_tensors(tensors, dtype, device);
    Ok((batch_norm(C, config, vb)?, [weight, bias]))
}

/// Where the rows of the real positions are in `[n, c, s]`, in their order.
fn real_indices() -> Vec<usize> {
    let positions = (0..N * S).filter(|i| MASK[i / S][i % S] != 0);
    positions
        .flat_map(|i| (0..C).map(move |c| (i / S * C + c) * S + i % S))
        .collect()
}

fn at(values: &[f64], indices: &[usize]) -> Vec<f64> {
    indices.iter().map(|&i| values[i]).collect()
}

/// `values` with something at the masked positions that would spoil every sum.
fn with_garbage(values: &[f64]) -> Vec<f64> {
    let garbage = [f64::NAN, f64::INFINITY, -1e4];
    let real = real_indices();
    let value = |(i, &v): (usize, &f64)| match real.contains(&i) {
        true => v,
        false => garbage[i % 3],
    };
    values.iter().enumerate().map(value).collect()
}

#[test]
fn the_real_positions_are_all_there_is() -> Result<()> {
    let real = real_indices();
    for device in devices() {
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            for (axis, relu, train) in [
                (1, false, true),
                (1, true, true),
                (-1, true, true),
                (1, true, false),
                (-1, false, false),
            ] {
                let what = format!("{dtype:?} axis {axis} relu {relu} train {train}");
                let config = BatchNormConfig {
                    axis,
                    activation: match relu {
                        true => Activation::Relu,
                        false => Activation::Identity,
                    },
                    ..Default::default()
                };
                let (bn, [weight, bias]) = layer(config, dtype, &device)?;
                let [x, dy] = [1, 2].map(|seed| with_garbage(&random(seed, N * C * S, 2.0)));
                let x = tensor(&x, &[N, C, S], dtype, &device)?;
                let dy = tensor(&dy, &[N, C, S], dtype, &device)?;
                let rounded = |t: &Tensor| Ok::<_, candle_core::Error>(at(&values(t)?, &real));
                let case = Case {
                    shape: vec![REAL, C],
                    x: rounded(&x)?,
                    dy: rounded(&dy)?,
                    weight: Some(values(&weight)?),
                    bias: Some(values(&bias)?),
                    relu,
                    eps: 1e-5,
                    given: (!train).then(|| (RUNNING[0].to_vec(), RUNNING[1].to_vec())),
                    ..Case::default()
                };
                let truth = case.truth();
                // The layer sees the channels in their place, the test in dimension 1.
                let x = Var::from_tensor(&x)?;
                let input = match axis {
                    1 => x.as_tensor().clone(),
                    _ => x.transpose(1, 2)?.contiguous()?,
                };
                let y = bn.forward_masked_t(&input, &mask(&device)?, train)?;
                assert!(y.is_contiguous());
                let y = if axis == 1 { y } else { y.transpose(1, 2)? };
                let grads = (&y * dy)?.sum_all()?.backward()?;
                let grad = |t: &Tensor| values(grads.get(t).expect("a gradient"));
                let tolerance = 4.0 * rounding(dtype);
                for (name, got, expected) in
                    [("y", values(&y)?, &truth.y), ("dx", grad(&x)?, &truth.dx)]
                {
                    let name = format!("{what}: {name}");
                    assert_close(&name, &at(&got, &real), expected, tolerance, tolerance);
                    let masked = (0..got.len()).filter(|i| !real.contains(i));
                    assert!(masked.map(|i| got[i]).all(|v| v == 0.0), "{name}: {got:?}");
                }
                let scale = truth.dweight_scale.iter().fold(1f64, |max, v| max.max(*v));
                let tolerance = tolerance * scale;
                assert_close(&what, &grad(&weight)?, &truth.dweight, tolerance, 0.0);
                assert_close(&what, &grad(&bias)?, &truth.dbias, tolerance, 0.0);
                let unbiased = REAL as f64 / (REAL - 1) as f64;
                let share = if train { 0.1 } else { 0.0 };
                let unbiased: Vec<f64> = truth.var.iter().map(|var| var * unbiased).collect();
                for (running, start, new) in [
                    (bn.running_mean(), RUNNING[0], &truth.mean),
                    (bn.running_var(), RUNNING[1], &unbiased),
                ] {
                    let moved = start.iter().zip(new);
                    let moved: Vec<f64> = moved
                        .map(|(old, new)| (1.0 - share) * old + share * new)
                        .collect();
                    assert_close(&what, &values(running)?, &moved, 1e-6, 0.0);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_by_finite_differences() -> Result<()> {
    let dy = random(2, N * C * S, 0.0);
    for device in devices() {
        let config = BatchNormConfig {
            activation: Activation::Relu,
            ..Default::default()
        };
        let (bn, _) = layer(config, DType::F64, &device)?;
        let loss = |x: &[f64]| -> Result<(Var, Tensor)> {
            let x = var(x, &[N, C, S], DType::F64, &device)?;
            let dy = tensor(&dy, &[N, C, S], DType::F64, &device)?;
            let y = bn.forward_masked_t(&x, &mask(&device)?, true)?;
            Ok((x, (y * dy)?.sum_all()?))
        };
        let x = random(1, N * C * S, 0.5);
        let (x_var, value) = loss(&x)?;
        let grads = value.backward()?;
        let expected = differences(&x, 1e-5, |x| loss(x).unwrap().1.to_scalar().unwrap());
        let got = values(grads.get(&x_var).expect("a gradient"))?;
        assert_close("dx", &got, &expected, 1e-8, 0.0);
    }
    Ok(())
}

/// Dimensions of the mask that are 1 stand for all of the input's.
#[test]
fn masks_of_fewer_values() -> Result<()> {
    for device in devices() {
        let x = tensor(
            &random(1, 2 * C * 4 * 3, 0.5),
            &[2, C, 4, 3],
            DType::F64,
            &device,
        )?;
        let full = [
            Tensor::new(&[[[1u8, 0, 1]; 4]; 2], &device)?,
            Tensor::new(&[[[1u8; 3]; 4], [[0; 3]; 4]], &device)?,
        ];
        let small = [
            Tensor::new(&[[[1u8, 0, 1]]], &device)?,
            Tensor::new(&[[[1u8]], [[0]]], &device)?,
        ];
        for (full, small) in full.iter().zip(&small) {
            let [(a, _), (b, _)] = [
                layer(Default::default(), DType::F64, &device)?,
                layer(Default::default(), DType::F64, &device)?,
            ];
            let expected = values(&a.forward_masked_t(&x, full, true)?)?;
            assert_eq!(values(&b.forward_masked_t(&x, small, true)?)?, expected);
            assert_eq!(values(a.running_var())?, values(b.running_var())?);
            assert!(expected.contains(&0.0));
        }
    }
    Ok(())
}

#[test]
fn without_masked_positions_it_is_forward_t_and_with_nothing_else_zeros() -> Result<()> {
    for device in devices() {
        for train in [true, false] {
            let x = var(&random(1, N * C * S, 0.5), &[N, C, S], DType::F32, &device)?;
            let [(a, _), (b, _)] = [
                layer(Default::default(), DType::F32, &device)?,
                layer(Default::default(), DType::F32, &device)?,
            ];
            let ones = Tensor::ones((N, S), DType::U8, &device)?;
            let y = a.forward_masked_t(&x, &ones, train)?;
            assert_eq!(values(&y)?, values(&b.forward_t(&x, train)?)?);
            assert_eq!(values(a.running_var())?, values(b.running_var())?);
            let y = a.forward_masked_t(&x, &ones.zeros_like()?, train)?;
            assert!(values(&y)?.iter().all(|v| *v == 0.0) && y.dims() == x.dims());
            assert!(y.sum_all()?.backward()?.get(&x).is_none());
            assert_eq!(values(a.running_var())?, values(b.running_var())?);
            let count = |bn: &BatchNorm| bn.num_batches_tracked().unwrap().to_scalar::<i64>();
            assert_eq!(count(&a)?, count(&b)?);
        }
    }
    Ok(())
}

#[test]
fn with_the_other_options() -> Result<()> {
    let real = real_indices();
    for device in devices() {
        let x = tensor(
            &with_garbage(&random(1, N * C * S, 0.5)),
            &[N, C, S],
            DType::F64,
            &device,
        )?;
        let rows = tensor(&at(&values(&x)?, &real), &[REAL, C], DType::F64, &device)?;
        let configs = [
            BatchNormConfig {
                freeze: Freeze::Statistics,
                ..Default::default()
            },
            BatchNormConfig {
                track_running_stats: false,
                ..Default::default()
            },
            BatchNormConfig {
                momentum: None,
                unbiased_running_var: false,
                ..Default::default()
            },
        ];
        for config in configs {
            let [(a, _), (b, _)] = [
                layer(config, DType::F64, &device)?,
                layer(config, DType::F64, &device)?,
            ];
            let y = values(&a.forward_masked_t(&x, &mask(&device)?, true)?)?;
            assert_eq!(at(&y, &real), values(&b.forward_t(&rows, true)?)?);
            if config.track_running_stats {
                assert_eq!(values(a.running_var())?, values(b.running_var())?);
            }
        }
        let limits = RenormLimits {
            r_max: 1.2,
            d_max: 0.1,
        };
        let config = BatchNormConfig {
            renorm: Some(RenormSchedule::constant(limits)),
            ..Default::default()
        };
        let (bn, [weight, bias]) = layer(config, DType::F64, &device)?;
        let args = BatchNormArgs {
            weight: Some(&weight),
            bias: Some(&bias),
            ..BatchNormArgs::new()
        };
        let [mean, var] = RUNNING.map(|v| tensor(&v, &[C], DType::F64, &device));
        let (expected, _) = batch_renorm_train(&rows, &mean?, &var?, limits, &args)?;
        let y = values(&bn.forward_masked_t(&x, &mask(&device)?, true)?)?;
        assert_close("renorm", &at(&y, &real), &values(&expected)?, 1e-12, 0.0);
    }
    Ok(())
}

#[test]
fn errors_change_nothing() -> Result<()> {
    for device in devices() {
        let (bn, _) = layer(Default::default(), DType::F32, &device)?;
        let x = Tensor::ones((N, C, S), DType::F32, &device)?;
        let with = |mask: &Tensor| bn.forward_masked_t(&x, mask, true);
        let masks: [(Tensor, &[&str]); 4] = [
            (mask(&device)?.unsqueeze(1)?, &["[4, 5]", "[4, 1, 5]"]),
            (
                Tensor::ones((N, 4), DType::U8, &device)?,
                &["[4, 5]", "[4, 4]"],
            ),
            (mask(&device)?.to_dtype(DType::F32)?, &["U8", "F32"]),
            // A single real value.
            (
                Tensor::new(&[[0u8, 1, 0, 0, 0], [0; S], [0; S], [0; S]], &device)?,
                &["more than one value per channel", "[1, 3]"],
            ),
        ];
        for (mask, parts) in masks {
            assert_error(with(&mask), parts);
        }
        let wrong = Tensor::ones((N, 2, S), DType::F32, &device)?;
        assert_error(
            bn.forward_masked_t(&wrong, &mask(&device)?, true),
            &["3 channels", "[4, 2, 5]"],
        );
        let kept = RUNNING[0].map(|v| v as f32);
        assert_eq!(bn.running_mean().to_vec1::<f32>()?, kept);
        let config = BatchNormConfig {
            max_pool: Some(2),
            ..Default::default()
        };
        let (bn, _) = layer(config, DType::F32, &device)?;
        assert_error(
            bn.forward_masked_t(&x, &mask(&device)?, true),
            &["max_pool", "mask"],
        );
    }
    Ok(())
}
