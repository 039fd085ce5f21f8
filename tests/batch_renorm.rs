//! Batch renormalisation: closed forms, finite differences, batch norm as a special case, its schedule.

mod common;

use candle_batch_norm::layers::RenormSchedule;
use candle_batch_norm::ops::{
    batch_norm_train, batch_renorm_train, batch_stats, Activation, BatchNormArgs, RenormLimits,
};
use candle_batch_norm::{batch_norm, BatchNormConfig};
use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, assert_error, devices, differences, random, tensor, values, var};

const EPS: f64 = 1e-5;
const N: usize = 7;
const C: usize = 3;
const S: usize = 5;
const LIMITS: RenormLimits = RenormLimits {
    r_max: 1.5,
    d_max: 0.5,
};

/// Mean and biased variance of each channel of `[N, C, S]`, in plain loops.
fn statistics(x: &[f64]) -> Vec<(f64, f64)> {
    let channel = |c: usize| x.iter().enumerate().filter(move |(i, _)| i / S % C == c);
    let m = (N * S) as f64;
    let of = |c| {
        let mean = channel(c).map(|(_, x)| x).sum::<f64>() / m;
        (
            mean,
            channel(c).map(|(_, x)| (x - mean).powi(2)).sum::<f64>() / m,
        )
    };
    (0..C).map(of).collect()
}

/// `r` and `d` of each channel.
fn corrections(x: &[f64], running: &[(f64, f64)], limits: RenormLimits) -> Vec<(f64, f64)> {
    let RenormLimits { r_max, d_max } = limits;
    let of = |((mean, var), (running_mean, running_var)): (&(f64, f64), &(f64, f64))| {
        let sigma = (running_var + EPS).sqrt();
        let r = (var + EPS).sqrt() / sigma;
        let d = (mean - running_mean) / sigma;
        (r.clamp(1.0 / r_max, r_max), d.clamp(-d_max, d_max))
    };
    statistics(x).iter().zip(running).map(of).collect()
}

/// The output for given corrections, with a ReLU behind it.
fn output(x: &[f64], rd: &[(f64, f64)], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let stats = statistics(x);
    let y = |(i, x): (usize, &f64)| {
        let c = i / S % C;
        let ((mean, var), (r, d)) = (stats[c], rd[c]);
        let normalised = (x - mean) / (var + EPS).sqrt();
        ((normalised * r + d) * weight[c] + bias[c]).max(0.0)
    };
    x.iter().enumerate().map(y).collect()
}

/// The first channel is within the limits, the others are cut off above and below.
const RUNNING: [(f64, f64); C] = [(0.7, 1.3), (-2.0, 0.01), (4.0, 30.0)];

fn running(device: &Device, dtype: DType) -> Result<[Tensor; 2]> {
    let mean = RUNNING.map(|(mean, _)| mean);
    let var = RUNNING.map(|(_, var)| var);
    Ok([
        tensor(&mean, &[C], dtype, device)?,
        tensor(&var, &[C], dtype, device)?,
    ])
}

#[test]
fn values_and_gradients() -> Result<()> {
    let [x, dy] = [1, 2].map(|seed| random(seed, N * C * S, 0.5));
    let (weight, bias) = (random(3, C, 1.0), random(4, C, 0.3));
    let rd = corrections(&x, &RUNNING, LIMITS);
    assert!(rd[0].0 != LIMITS.r_max && rd[0].1.abs() < LIMITS.d_max);
    assert_eq!(rd[1], (LIMITS.r_max, LIMITS.d_max));
    assert_eq!(rd[2], (1.0 / LIMITS.r_max, -LIMITS.d_max));
    // `r` and `d` stay as they are while anything else moves.
    let loss = |x: &[f64], weight: &[f64], bias: &[f64]| -> f64 {
        output(x, &rd, weight, bias)
            .iter()
            .zip(&dy)
            .map(|(y, dy)| y * dy)
            .sum()
    };
    for device in devices() {
        let x_var = var(&x, &[N, C, S], DType::F64, &device)?;
        let weight_var = var(&weight, &[C], DType::F64, &device)?;
        let bias_var = var(&bias, &[C], DType::F64, &device)?;
        let [mean, variance] = running(&device, DType::F64)?;
        let args = BatchNormArgs {
            weight: Some(&weight_var),
            bias: Some(&bias_var),
            activation: Activation::Relu,
            eps: EPS,
            ..BatchNormArgs::new()
        };
        let (y, stats) = batch_renorm_train(&x_var, &mean, &variance, LIMITS, &args)?;
        assert_close(
            "y",
            &values(&y)?,
            &output(&x, &rd, &weight, &bias),
            1e-12,
            0.0,
        );
        let means: Vec<f64> = statistics(&x).iter().map(|(mean, _)| *mean).collect();
        assert_close("mean", &values(&stats.mean()?)?, &means, 1e-12, 0.0);
        let dy = tensor(&dy, &[N, C, S], DType::F64, &device)?;
        let grads = (y * dy)?.sum_all()?.backward()?;
        let grad = |t: &Tensor| values(grads.get(t).expect("a gradient"));
        let dx = differences(&x, 1e-6, |x| loss(x, &weight, &bias));
        assert_close("dx", &grad(&x_var)?, &dx, 1e-7, 0.0);
        let dweight = differences(&weight, 1e-6, |weight| loss(&x, weight, &bias));
        assert_close("dweight", &grad(&weight_var)?, &dweight, 1e-7, 0.0);
        let dbias = differences(&bias, 1e-6, |bias| loss(&x, &weight, bias));
        assert_close("dbias", &grad(&bias_var)?, &dbias, 1e-7, 0.0);
    }
    Ok(())
}

/// Without corrections, bit for bit; in all dtypes and layouts, at sizes of one thread and of several.
#[test]
fn without_corrections_it_is_batch_norm() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for (shape, last) in [
                (&[65, 33][..], false),
                (&[9, 33, 23, 25], false),
                (&[9, 7, 5, 33], true),
            ] {
                let x = var(
                    &random(1, shape.iter().product(), 3.0),
                    shape,
                    dtype,
                    &device,
                )?;
                let input = match last {
                    true => x.permute((0, 3, 1, 2))?,
                    false => x.as_tensor().clone(),
                };
                let params = match dtype {
                    DType::F16 | DType::BF16 => DType::F32,
                    dtype => dtype,
                };
                let weight = var(&random(2, 33, 1.0), &[33], params, &device)?;
                let bias = var(&random(3, 33, 0.0), &[33], params, &device)?;
                let args = BatchNormArgs {
                    weight: Some(&weight),
                    bias: Some(&bias),
                    ..BatchNormArgs::new()
                };
                let (expected, expected_stats) = batch_norm_train(&input, &args)?;
                // Running statistics that are those of the batch: r is 1, and d is 0.
                let (mean, variance) = (expected_stats.mean()?, expected_stats.var()?);
                let (y, stats) = batch_renorm_train(&input, &mean, &variance, LIMITS, &args)?;
                assert_eq!(values(&y)?, values(&expected)?, "{dtype:?} {shape:?}");
                assert_eq!(values(&stats.mean()?)?, values(&expected_stats.mean()?)?);
                assert_eq!(values(&stats.var()?)?, values(&expected_stats.var()?)?);
                let (grads, expected) = (y.sqr()?.sum_all()?, expected.sqr()?.sum_all()?);
                let (grads, expected) = (grads.backward()?, expected.backward()?);
                for t in [&x, &weight, &bias] {
                    let of = |grads: &candle_core::backprop::GradStore| {
                        values(grads.get(t).expect("a gradient"))
                    };
                    assert_eq!(of(&grads)?, of(&expected)?, "{dtype:?} {shape:?}");
                }
            }
        }
    }
    Ok(())
}

/// Any of the arguments may be there or not; the output is that of the formula, with a residual before the
/// ReLU.
#[test]
fn arguments_that_may_be_absent() -> Result<()> {
    let [x, residual] = [1, 5].map(|seed| random(seed, N * C * S, 0.5));
    let (weight, bias) = (random(3, C, 1.0), random(4, C, 0.3));
    let rd = corrections(&x, &RUNNING, LIMITS);
    let stats = statistics(&x);
    for device in devices() {
        let like_x = |values: &[f64], dtype| tensor(values, &[N, C, S], dtype, &device);
        for (dtype, params, tolerance) in [
            (DType::F64, DType::F64, 1e-12),
            (DType::F32, DType::F32, 1e-6),
            (DType::BF16, DType::F32, 4e-3),
            (DType::BF16, DType::BF16, 4e-3),
            (DType::F16, DType::F16, 5e-4),
        ] {
            // What is left of them in the dtype.
            let weight_tensor = tensor(&weight, &[C], params, &device)?;
            let bias_tensor = tensor(&bias, &[C], params, &device)?;
            let (weight, bias) = (values(&weight_tensor)?, values(&bias_tensor)?);
            let (x_tensor, residual_tensor) = (like_x(&x, dtype)?, like_x(&residual, dtype)?);
            let residual = values(&residual_tensor)?;
            let [mean, variance] = running(&device, DType::F64)?;
            for bits in 0..8 {
                let has = |bit: usize| bits >> bit & 1 == 1;
                let args = BatchNormArgs {
                    weight: has(0).then_some(&weight_tensor),
                    bias: has(1).then_some(&bias_tensor),
                    residual: has(2).then_some(&residual_tensor),
                    activation: Activation::Relu,
                    eps: EPS,
                    ..BatchNormArgs::new()
                };
                let (y, _) = batch_renorm_train(&x_tensor, &mean, &variance, LIMITS, &args)?;
                let expected: Vec<f64> = (values(&x_tensor)?.iter().enumerate())
                    .map(|(i, x)| {
                        let c = i / S % C;
                        let ((mean, var), (r, d)) = (stats[c], rd[c]);
                        let y = (x - mean) / (var + EPS).sqrt() * r + d;
                        let y = if has(0) { y * weight[c] } else { y };
                        let y = if has(1) { y + bias[c] } else { y };
                        (if has(2) { y + residual[i] } else { y }).max(0.0)
                    })
                    .collect();
                // The statistics are those of rounded values: that moves all of a channel.
                let absolute = if tolerance > 1e-4 {
                    2.0 * tolerance
                } else {
                    tolerance
                };
                assert_close(
                    &format!("{dtype:?} {bits}"),
                    &values(&y)?,
                    &expected,
                    absolute,
                    tolerance,
                );
            }
        }
    }
    Ok(())
}

/// After the pool as without it, forward and backward: fused where planes are large, else composed.
#[test]
fn pooled() -> Result<()> {
    for device in devices() {
        for side in [4, 10] {
            let shape = [3, C, side, side];
            let x = var(
                &random(1, shape.iter().product(), 0.5),
                &shape,
                DType::F64,
                &device,
            )?;
            let [mean, variance] = running(&device, DType::F64)?;
            let args = BatchNormArgs::new();
            let pooled = BatchNormArgs {
                max_pool: Some(2),
                ..args
            };
            let renorm = |args| batch_renorm_train(&x, &mean, &variance, LIMITS, args);
            let (y, _) = renorm(&pooled)?;
            let expected = candle_batch_norm::ops::max_pool2d(&renorm(&args)?.0, 2)?;
            assert_eq!(values(&y)?, values(&expected)?);
            let gradient = |y: Tensor| -> Result<Vec<f64>> {
                let grads = y.sqr()?.sum_all()?.backward()?;
                values(grads.get(&x).expect("a gradient"))
            };
            assert_close("dx", &gradient(y)?, &gradient(expected)?, 1e-12, 0.0);
        }
    }
    Ok(())
}

/// With wide limits the output is that of the running statistics.
#[test]
fn with_wide_limits_it_is_what_evaluation_gives() -> Result<()> {
    for device in devices() {
        let x = random(1, N * C * S, 0.5);
        let [mean, variance] = running(&device, DType::F32)?;
        let wide = RenormLimits {
            r_max: 1e6,
            d_max: 1e6,
        };
        let args = BatchNormArgs::new();
        let input = tensor(&x, &[N, C, S], DType::F64, &device)?;
        let (y, _) = batch_renorm_train(&input, &mean, &variance, wide, &args)?;
        let expected: Vec<f64> = (x.iter().enumerate())
            .map(|(i, x)| {
                let (mean, var) = RUNNING[i / S % C];
                (x - f64::from(mean as f32)) / (f64::from(var as f32) + EPS).sqrt()
            })
            .collect();
        assert_close("y", &values(&y)?, &expected, 1e-10, 0.0);
    }
    Ok(())
}

#[test]
fn statistics_alone() -> Result<()> {
    for device in devices() {
        let x = random(1, N * C * S, 1e6);
        let stats = batch_stats(&tensor(&x, &[N, C, S], DType::F64, &device)?)?;
        let (mean, variance): (Vec<f64>, Vec<f64>) = statistics(&x).into_iter().unzip();
        assert_eq!(stats.count(), N * S);
        assert_close("mean", &values(&stats.mean()?)?, &mean, 0.0, 1e-14);
        assert_close("var", &values(&stats.var()?)?, &variance, 0.0, 1e-9);
        let one = batch_stats(&Tensor::full(3f32, (1, 2), &device)?)?;
        assert_eq!(
            (values(&one.mean()?)?, values(&one.var()?)?),
            (vec![3.0; 2], vec![0.0; 2])
        );
        let none = batch_stats(&Tensor::zeros((0, 2), DType::F32, &device)?)?;
        assert_eq!(none.count(), 0);
        assert!(values(&none.mean()?)?.iter().all(|mean| mean.is_nan()));
    }
    assert_error(
        batch_stats(&Tensor::zeros(3, DType::F32, &Device::Cpu)?),
        &["2 dimensions", "[3]"],
    );
    Ok(())
}

#[test]
fn limits_grow_with_the_steps() {
    let schedule = RenormSchedule::default();
    for (step, r_max, d_max) in [
        (0, 1.0, 0.0),
        (5_000, 1.0, 0.0),
        (15_000, 1.0 + 2.0 * 10.0 / 35.0, 2.5),
        (25_000, 1.0 + 2.0 * 20.0 / 35.0, 5.0),
        (40_000, 3.0, 5.0),
        (u64::MAX, 3.0, 5.0),
    ] {
        let limits = schedule.limits_at(step);
        assert_close(
            &format!("step {step}"),
            &[limits.r_max, limits.d_max],
            &[r_max, d_max],
            1e-12,
            0.0,
        );
    }
    assert_eq!(RenormSchedule::constant(LIMITS).limits_at(0), LIMITS);
    let boundless = RenormSchedule {
        limits: RenormLimits {
            r_max: f64::INFINITY,
            d_max: f64::INFINITY,
        },
        ..schedule
    };
    assert_eq!(boundless.limits_at(5_000), RenormLimits::NONE);
    assert_eq!(boundless.limits_at(40_000), boundless.limits);
}

/// The statistics that correct a batch are those before it; then they move as batch norm's do.
#[test]
fn the_layer_counts_its_batches() -> Result<()> {
    for device in devices() {
        let vars = VarMap::new();
        let schedule = RenormSchedule {
            limits: LIMITS,
            begin: 0,
            r_end: 2,
            d_end: 1,
        };
        let config = BatchNormConfig {
            renorm: Some(schedule),
            eps: EPS,
            ..Default::default()
        };
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &device);
        let bn = batch_norm(C, config, vb)?;
        let ones = [1.0; C];
        let mut running = vec![(0.0, 1.0); C];
        for step in 0..4 {
            let values_of_x = random(step + 1, N * C * S, 0.5);
            let x = tensor(&values_of_x, &[N, C, S], DType::F64, &device)?;
            let rd = corrections(&values_of_x, &running, schedule.limits_at(step));
            // Without the ReLU of `output`: a bias that keeps all of it above 0, and the same again.
            let high = [100.0; C];
            let expected: Vec<f64> = (output(&values_of_x, &rd, &ones, &high).iter())
                .map(|y| y - 100.0)
                .collect();
            let y = values(&bn.forward_t(&x, true)?)?;
            assert_close(&format!("step {step}"), &y, &expected, 1e-11, 0.0);
            let m = (N * S) as f64;
            for ((mean, var), (batch_mean, batch_var)) in
                running.iter_mut().zip(statistics(&values_of_x))
            {
                *mean = 0.9 * *mean + 0.1 * batch_mean;
                *var = 0.9 * *var + 0.1 * batch_var * m / (m - 1.0);
            }
            let (means, variances): (Vec<f64>, Vec<f64>) = running.iter().copied().unzip();
            assert_close(
                "running_mean",
                &values(bn.running_mean())?,
                &means,
                1e-12,
                0.0,
            );
            assert_close(
                "running_var",
                &values(bn.running_var())?,
                &variances,
                1e-12,
                0.0,
            );
            assert_eq!(
                bn.num_batches_tracked()
                    .expect("a count")
                    .to_scalar::<i64>()?,
                step as i64 + 1
            );
        }
    }
    Ok(())
}

#[test]
fn bad_arguments_get_errors() -> Result<()> {
    let x = Tensor::zeros((4, 3), DType::F32, &Device::Cpu)?;
    let three = Tensor::ones(3, DType::F32, &Device::Cpu)?;
    let two = Tensor::ones(2, DType::F32, &Device::Cpu)?;
    let args = BatchNormArgs::new();
    let renorm = |mean: &Tensor, limits, args| batch_renorm_train(&x, mean, &three, limits, args);
    assert_error(renorm(&two, LIMITS, &args), &["running_mean", "[3]", "[2]"]);
    let integers = three.to_dtype(DType::I64)?;
    assert_error(renorm(&integers, LIMITS, &args), &["running_mean", "I64"]);
    for (r_max, d_max) in [(0.5, 1.0), (f64::NAN, 1.0), (2.0, -1.0), (2.0, f64::NAN)] {
        let limits = RenormLimits { r_max, d_max };
        let parts = ["r_max >= 1", &r_max.to_string(), &d_max.to_string()];
        assert_error(renorm(&three, limits, &args), &parts);
        let config = BatchNormConfig {
            renorm: Some(RenormSchedule::constant(limits)),
            ..Default::default()
        };
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        assert_error(batch_norm(3, config, vb), &parts);
    }
    let uncentred = BatchNormArgs {
        remove_mean: false,
        ..args
    };
    assert_error(renorm(&three, LIMITS, &uncentred), &["remove_mean"]);
    let late = RenormSchedule {
        begin: 30_000,
        ..Default::default()
    };
    for config in [
        BatchNormConfig {
            renorm: Some(late),
            ..Default::default()
        },
        BatchNormConfig {
            renorm: Some(RenormSchedule::default()),
            track_running_stats: false,
            ..Default::default()
        },
    ] {
        let vb = VarBuilder::zeros(DType::F32, &Device::Cpu);
        assert_error(batch_norm(3, config, vb), &["batch renorm expects"]);
    }
    Ok(())
}
