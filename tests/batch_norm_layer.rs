//! The layer: a drop-in for candle-nn's, running statistics, options, freezing, conversions.

mod common;

use candle_batch_norm::{batch_norm, Activation, BatchNorm, BatchNormConfig, Freeze};
use candle_core::{DType, Device, Module, ModuleT, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, assert_error, devices, random, tensor, values, Case};

/// A layer with the variables that it made.
fn layer(
    c: usize,
    config: impl Into<BatchNormConfig>,
    dtype: DType,
    device: &Device,
) -> Result<(BatchNorm, VarMap)> {
    let vars = VarMap::new();
    let bn = batch_norm(c, config, VarBuilder::from_varmap(&vars, dtype, device))?;
    Ok((bn, vars))
}

fn names(vars: &VarMap) -> Vec<String> {
    let mut names: Vec<_> = vars.data().lock().unwrap().keys().cloned().collect();
    names.sort();
    names
}

/// One training of a small CNN, written once and compiled twice: only the import differs.
macro_rules! train_with {
    ($library:ident, $device:expr) => {{
        use candle_nn::{conv2d, linear, loss, Optimizer, SGD};
        use $library::{batch_norm, BatchNorm, BatchNormConfig};

        struct Net {
            conv: candle_nn::Conv2d,
            bn1: BatchNorm,
            fc1: candle_nn::Linear,
            bn2: BatchNorm,
            fc2: candle_nn::Linear,
        }
        impl ModuleT for Net {
            fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
                let x = x.apply(&self.conv)?.apply_t(&self.bn1, train)?.relu()?;
                let x = self.fc1.forward(&x.max_pool2d(2)?.flatten_from(1)?)?;
                self.fc2.forward(&self.bn2.forward_t(&x, train)?.relu()?)
            }
        }
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, $device);
        let config = BatchNormConfig {
            eps: 1e-3,
            ..Default::default()
        };
        let net = Net {
            conv: conv2d(1, 8, 3, Default::default(), vb.pp("conv"))?,
            bn1: batch_norm(8, config, vb.pp("bn1"))?,
            fc1: linear(8 * 9, 16, vb.pp("fc1"))?,
            bn2: batch_norm(16, 1e-5, vb.pp("bn2"))?,
            fc2: linear(16, 3, vb.pp("fc2"))?,
        };
        let mut vars: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        let mut trained = vec![];
        for (i, (name, var)) in vars.into_iter().enumerate() {
            if name.starts_with("bn") {
                if name.ends_with("weight") || name.ends_with("bias") {
                    trained.push(var);
                }
                continue;
            }
            let start: Vec<f64> = random(i as u64, var.elem_count(), 0.0);
            let start: Vec<f64> = start.into_iter().map(|v| v * 0.2).collect();
            var.set(&tensor(&start, var.dims(), DType::F32, $device)?)?;
            trained.push(var);
        }
        let mut sgd = SGD::new(trained, 0.5)?;
        let mut losses = vec![];
        for step in 0..40 {
            let x = tensor(
                &random(100 + step % 5, 20 * 64, 0.3),
                &[20, 1, 8, 8],
                DType::F32,
                $device,
            )?;
            let labels: Vec<u32> = (0..20).map(|i| (i * 7 + step as u32 % 5) % 3).collect();
            let labels = Tensor::new(labels, $device)?;
            let loss = loss::cross_entropy(&net.forward_t(&x, true)?, &labels)?;
            sgd.backward_step(&loss)?;
            let eval = loss::cross_entropy(&net.forward_t(&x, false)?, &labels)?;
            losses.extend([loss.to_scalar::<f32>()?, eval.to_scalar::<f32>()?].map(f64::from));
        }
        let statistics = values(&Tensor::cat(
            &[net.bn1.running_mean(), net.bn2.running_var()],
            0,
        )?)?;
        (losses, statistics)
    }};
}

#[test]
fn a_changed_import_trains_to_the_same_losses() -> Result<()> {
    for device in devices() {
        let (ours, our_statistics) = train_with!(candle_batch_norm, &device);
        let (theirs, their_statistics) = train_with!(candle_nn, &device);
        assert!(
            theirs[78] < 0.7 * theirs[0],
            "the network learns nothing: {theirs:?}"
        );
        // Rounding differences grow as training goes on; a wrong gradient differs in the first digits.
        println!("last loss {} of {}", theirs[78], theirs[0]);
        assert_close("losses", &ours, &theirs, 2e-4, 2e-4);
        assert_close("statistics", &our_statistics, &their_statistics, 2e-4, 2e-4);
    }
    Ok(())
}

#[test]
fn running_statistics_follow_pytorch_s_rule() -> Result<()> {
    for device in devices() {
        for (momentum, shape) in [(0.1, &[5, 3][..]), (0.3, &[2, 3]), (1.0, &[4, 3, 5])] {
            let config = BatchNormConfig {
                momentum: Some(momentum),
                ..Default::default()
            };
            let (bn, _) = layer(3, config, DType::F32, &device)?;
            let (mut mean, mut var) = ([0.0; 3], [1.0; 3]);
            for step in 0..3 {
                let numel: usize = shape.iter().product();
                let case = Case {
                    shape: shape.to_vec(),
                    x: random(step, numel, 2.0),
                    dy: vec![0.0; numel],
                    ..Case::default()
                };
                bn.forward_t(&tensor(&case.x, shape, DType::F32, &device)?, true)?;
                let (truth, m) = (case.truth(), (numel / 3) as f64);
                for channel in 0..3 {
                    let unbiased = truth.var[channel] * m / (m - 1.0);
                    mean[channel] += momentum * (truth.mean[channel] - mean[channel]);
                    var[channel] += momentum * (unbiased - var[channel]);
                }
            }
            assert_close("mean", &values(bn.running_mean())?, &mean, 1e-6, 1e-6);
            assert_close("var", &values(bn.running_var())?, &var, 1e-6, 1e-6);
        }
    }
    Ok(())
}

#[test]
fn without_momentum_the_statistics_are_averages() -> Result<()> {
    for device in devices() {
        let config = BatchNormConfig {
            momentum: None,
            ..Default::default()
        };
        let (bn, vars) = layer(2, config, DType::F64, &device)?;
        assert!(names(&vars).contains(&"num_batches_tracked".to_string()));
        let mut sum = [0.0; 2];
        for step in 0..4 {
            let x = tensor(&random(step, 12, step as f64), &[6, 2], DType::F64, &device)?;
            bn.forward_t(&x, true)?;
            for (sum, mean) in sum.iter_mut().zip(values(&x.mean(0)?)?) {
                *sum += mean;
            }
        }
        let average = sum.map(|sum| sum / 4.0);
        assert_close("mean", &values(bn.running_mean())?, &average, 1e-12, 0.0);
        let count = bn.num_batches_tracked().expect("a count");
        assert_eq!(count.to_scalar::<i64>()?, 4);
    }
    Ok(())
}

#[test]
fn parameters_are_there_as_configured() -> Result<()> {
    let all = ["bias", "running_mean", "running_var", "weight"];
    let cases: [(BatchNormConfig, &[&str]); 5] = [
        (BatchNormConfig::default(), &all),
        (
            BatchNormConfig {
                affine: false,
                ..Default::default()
            },
            &all[1..3],
        ),
        (
            BatchNormConfig {
                bias: false,
                ..Default::default()
            },
            &all[1..],
        ),
        (
            BatchNormConfig {
                weight: false,
                ..Default::default()
            },
            &all[..3],
        ),
        (
            BatchNormConfig {
                track_running_stats: false,
                ..Default::default()
            },
            &["bias", "weight"],
        ),
    ];
    for device in devices() {
        for (config, expected) in cases {
            let (bn, vars) = layer(3, config, DType::F32, &device)?;
            assert_eq!(names(&vars), expected);
            assert_eq!(bn.weight().is_some(), expected.contains(&"weight"));
            assert_eq!(bn.bias().is_some(), expected.contains(&"bias"));
            assert_eq!(
                bn.weight_and_bias().is_some(),
                bn.weight().is_some() && bn.bias().is_some()
            );
            let x = tensor(&random(1, 30, 2.0), &[5, 3, 2], DType::F32, &device)?;
            let y = values(&bn.forward_t(&x, true)?)?;
            let grads = bn.forward_t(&x, true)?.sqr()?.sum_all()?.backward()?;
            for parameter in bn.weight().iter().chain(bn.bias().iter()) {
                assert!(grads.get(parameter).is_some(), "{config:?}");
            }
            if !config.track_running_stats {
                assert_eq!(
                    values(&bn.forward_t(&x, false)?)?,
                    y,
                    "evaluates with the batch"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn a_half_precision_layer_keeps_its_statistics_in_f32() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F16, DType::BF16] {
            let (bn, _) = layer(3, 1e-5, dtype, &device)?;
            assert_eq!(bn.running_var().dtype(), DType::F32);
            assert_eq!(bn.weight().expect("a weight").dtype(), dtype);
            // A variance of a million, more than F16 can hold.
            let x: Vec<f64> = random(1, 60, 0.0).iter().map(|v| v * 1000.0).collect();
            let x = tensor(&x, &[20, 3], dtype, &device)?;
            assert_eq!(bn.forward_t(&x, true)?.dtype(), dtype);
            assert!(values(bn.running_var())?
                .iter()
                .all(|var| var.is_finite() && *var > 3e4));
            assert_eq!(bn.forward_t(&x, false)?.dtype(), dtype);
        }
    }
    Ok(())
}

#[test]
fn evaluation_uses_the_running_statistics_and_leaves_them() -> Result<()> {
    for device in devices() {
        let (bn, _) = layer(2, 0.0, DType::F32, &device)?;
        let x = Tensor::new(&[[1f32, -2.0], [3.0, 4.0]], &device)?;
        assert_eq!(
            values(&bn.forward_t(&x, false)?)?,
            values(&x)?,
            "mean 0, variance 1"
        );
        assert_eq!(values(bn.running_mean())?, [0.0, 0.0]);
        let one = Tensor::new(&[[7f32, 8.0]], &device)?;
        assert_eq!(
            values(&bn.forward_t(&one, false)?)?,
            [7.0, 8.0],
            "a batch of one is fine"
        );
    }
    Ok(())
}

#[test]
fn frozen_layers_keep_what_they_should_and_pass_the_gradient_on() -> Result<()> {
    for device in devices() {
        for freeze in [Freeze::Statistics, Freeze::StatisticsAndParameters] {
            let (mut bn, vars) = layer(3, 1e-5, DType::F32, &device)?;
            let x = tensor(&random(1, 30, 2.0), &[10, 3], DType::F32, &device)?;
            bn.forward_t(&x, true)?;
            let statistics = values(bn.running_mean())?;
            bn.set_freeze(freeze)?;
            let input = common::var(&random(2, 30, 1.0), &[10, 3], DType::F32, &device)?;
            let y = bn.forward_t(&input, true)?;
            assert_eq!(values(&y)?, values(&bn.forward_t(&input, false)?)?);
            assert_eq!(values(bn.running_mean())?, statistics);
            let grads = y.sqr()?.sum_all()?.backward()?;
            let trains = freeze == Freeze::Statistics;
            for name in ["weight", "bias"] {
                let var = vars.data().lock().unwrap()[name].clone();
                assert_eq!(grads.get(&var).is_some(), trains, "{freeze:?} {name}");
            }
            let dx = values(grads.get(&input).expect("a gradient"))?;
            assert!(dx.iter().all(|v| *v != 0.0));
            bn.set_freeze(Freeze::Nothing)?;
            bn.forward_t(&input, true)?;
            assert_ne!(values(bn.running_mean())?, statistics);
        }
    }
    Ok(())
}

#[test]
fn fused_relu_and_residual_equal_the_separate_ops() -> Result<()> {
    for device in devices() {
        let config = BatchNormConfig {
            activation: Activation::Relu,
            ..Default::default()
        };
        let (fused, _) = layer(3, config, DType::F64, &device)?;
        let (plain, _) = layer(3, 1e-5, DType::F64, &device)?;
        let x = tensor(&random(1, 60, 0.5), &[4, 3, 5], DType::F64, &device)?;
        let residual = tensor(&random(2, 60, 0.0), &[4, 3, 5], DType::F64, &device)?;
        for train in [true, false] {
            let expected = values(&plain.forward_t(&x, train)?.relu()?)?;
            assert_close(
                "relu",
                &values(&fused.forward_t(&x, train)?)?,
                &expected,
                1e-13,
                0.0,
            );
            let expected = values(&(plain.forward_t(&x, train)? + &residual)?.relu()?)?;
            let got = fused.forward_residual_t(&x, &residual, train)?;
            assert_close("residual", &values(&got)?, &expected, 1e-13, 0.0);
        }
    }
    Ok(())
}

#[test]
fn errors_leave_the_statistics_as_they_were() -> Result<()> {
    for device in devices() {
        let (bn, _) = layer(3, 1e-5, DType::F32, &device)?;
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &device);
        let train = |x: Tensor| bn.forward_t(&x, true);
        assert_error(
            train(zeros(&[1, 3], DType::F32)?),
            &["more than one value", "[1, 3]", "`forward_t(x, false)`"],
        );
        assert_error(
            train(zeros(&[5, 4], DType::F32)?),
            &["3 channels", "[5, 4]"],
        );
        assert_error(train(zeros(&[3], DType::F32)?), &["at least 2 dimensions"]);
        assert_error(train(zeros(&[5, 3], DType::U32)?), &["U32"]);
        assert_error(
            train(zeros(&[5, 3], DType::F64)?),
            &["weight of dtype F64", "F32"],
        );
        let residual = zeros(&[5, 2], DType::F32)?;
        let x = zeros(&[5, 3], DType::F32)?;
        assert_error(
            bn.forward_residual_t(&x, &residual, true),
            &["residual", "[5, 2]"],
        );
        bn.forward_t(&zeros(&[0, 3], DType::F32)?, true)?;
        assert_eq!(values(bn.running_mean())?, [0.0; 3]);
        assert_eq!(values(bn.running_var())?, [1.0; 3]);
    }
    Ok(())
}

#[test]
fn bad_configurations_get_errors() -> Result<()> {
    let build = |config: BatchNormConfig| layer(3, config, DType::F32, &Device::Cpu);
    for eps in [-1.0, f64::NAN] {
        assert_error(build(eps.into()), &["eps >= 0", &eps.to_string()]);
    }
    for momentum in [-0.1, 1.5, f64::NAN] {
        let config = BatchNormConfig {
            momentum: Some(momentum),
            ..Default::default()
        };
        assert_error(
            build(config),
            &["momentum from 0 to 1", &momentum.to_string()],
        );
    }
    let config = BatchNormConfig {
        track_running_stats: false,
        freeze: Freeze::Statistics,
        ..Default::default()
    };
    assert_error(build(config), &["track_running_stats"]);
    let (zeros, ones) = (
        Tensor::zeros(3, DType::F32, &Device::Cpu)?,
        Tensor::ones(4, DType::F32, &Device::Cpu)?,
    );
    assert_error(
        BatchNorm::new_no_bias(3, zeros.clone(), ones.clone(), 1e-5),
        &["running_var", "[3]", "[4]"],
    );
    let args = (zeros.clone(), zeros.clone(), zeros.clone());
    assert_error(
        BatchNorm::new(3, args.0, args.1, args.2, ones, 1e-5),
        &["bias", "[3]", "[4]"],
    );
    let half = zeros.to_dtype(DType::F16)?;
    let bn = BatchNorm::new_no_bias(3, half.clone(), half, 1e-5)?;
    assert_eq!(bn.running_var().dtype(), DType::F32);
    let integers = zeros.to_dtype(DType::U32)?;
    assert_error(
        BatchNorm::new_no_bias(3, integers, zeros, 1e-5),
        &["floating-point running_mean", "U32"],
    );
    Ok(())
}

#[test]
fn candle_s_layer_converts_both_ways_and_shares_its_tensors() -> Result<()> {
    for device in devices() {
        let (bn, _) = layer(3, 1e-3, DType::F32, &device)?;
        let x = tensor(&random(1, 48, 1.0), &[4, 3, 2, 2], DType::F32, &device)?;
        bn.forward_t(&x, true)?;
        let theirs = candle_nn::BatchNorm::try_from(&bn)?;
        assert_eq!((theirs.eps(), theirs.momentum()), (1e-3, 0.1));
        let back = BatchNorm::try_from(&theirs)?;
        let expected = values(&bn.forward_t(&x, false)?)?;
        assert_close(
            "theirs",
            &values(&theirs.forward_t(&x, false)?)?,
            &expected,
            1e-6,
            1e-6,
        );
        assert_eq!(values(&back.forward_t(&x, false)?)?, expected);
        back.forward_t(&x, true)?;
        assert_eq!(values(bn.running_mean())?, values(theirs.running_mean())?);

        let relu = BatchNormConfig {
            activation: Activation::Relu,
            ..Default::default()
        };
        let relu = layer(3, relu, DType::F32, &device)?.0;
        assert_error(candle_nn::BatchNorm::try_from(&relu), &["Relu"]);
        let mut frozen = layer(3, 1e-5, DType::F32, &device)?.0;
        frozen.set_freeze(Freeze::Statistics)?;
        assert_error(candle_nn::BatchNorm::try_from(&frozen), &["Statistics"]);
        let average = BatchNormConfig {
            momentum: None,
            ..Default::default()
        };
        let average = layer(3, average, DType::F32, &device)?.0;
        assert_error(candle_nn::BatchNorm::try_from(&average), &["momentum"]);
    }
    Ok(())
}

#[test]
fn a_convolution_absorbs_the_layer() -> Result<()> {
    let device = Device::Cpu;
    let (bn, vars) = layer(4, 1e-5, DType::F32, &device)?;
    for (seed, (name, offset)) in [
        ("weight", 1.0),
        ("bias", 0.0),
        ("running_mean", 0.0),
        ("running_var", 9.0),
    ]
    .into_iter()
    .enumerate()
    {
        let value = tensor(&random(seed as u64, 4, offset), &[4], DType::F32, &device)?;
        vars.data().lock().unwrap()[name].set(&value)?;
    }
    let weight = tensor(
        &random(5, 4 * 2 * 9, 0.0),
        &[4, 2, 3, 3],
        DType::F32,
        &device,
    )?;
    let bias = tensor(&random(6, 4, 0.0), &[4], DType::F32, &device)?;
    let conv = candle_nn::Conv2d::new(weight, Some(bias), Default::default());
    let x = tensor(
        &random(7, 2 * 2 * 36, 0.0),
        &[2, 2, 6, 6],
        DType::F32,
        &device,
    )?;
    let folded = conv.absorb_bn(&candle_nn::BatchNorm::try_from(&bn)?)?;
    let expected = values(&bn.forward_t(&conv.forward(&x)?, false)?)?;
    assert_close(
        "folded",
        &values(&folded.forward(&x)?)?,
        &expected,
        1e-5,
        1e-5,
    );
    Ok(())
}

#[test]
fn variables_are_saved_and_loaded_with_the_var_map() -> Result<()> {
    let device = Device::Cpu;
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("bn.safetensors");
    let config = BatchNormConfig {
        momentum: None,
        ..Default::default()
    };
    let (bn, vars) = layer(3, config, DType::F32, &device)?;
    for step in 0..2 {
        bn.forward_t(
            &tensor(&random(step, 30, 2.0), &[10, 3], DType::F32, &device)?,
            true,
        )?;
    }
    vars.save(&path)?;
    let (other, mut other_vars) = layer(3, config, DType::F32, &device)?;
    other_vars.load(&path)?;
    assert_eq!(values(other.running_var())?, values(bn.running_var())?);
    assert_eq!(
        other
            .num_batches_tracked()
            .expect("a count")
            .to_scalar::<i64>()?,
        2
    );
    // candle-nn's layer reads the same file.
    let theirs = VarMap::new();
    candle_nn::batch_norm(
        3,
        1e-5,
        VarBuilder::from_varmap(&theirs, DType::F32, &device),
    )?;
    theirs.clone().load(&path)?;
    Ok(())
}

/// A `VarMap` hands out what it holds: statistics in half precision are refused when the layer is built.
#[test]
fn statistics_in_half_precision_are_refused_from_a_var_map() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F16, &Device::Cpu);
    vb.get_with_hints(3, "running_mean", candle_nn::Init::Const(0.0))?;
    assert_error(
        batch_norm(3, 1e-5, vb),
        &["running_mean", "F32 or F64", "F16"],
    );
    Ok(())
}

#[test]
fn channels_in_the_wrong_place_are_pointed_out() -> Result<()> {
    let (bn, _vars) = layer(3, 1e-5, DType::F32, &Device::Cpu)?;
    let x = Tensor::zeros((2, 5, 4, 3), DType::F32, &Device::Cpu)?;
    assert_error(
        bn.forward_t(&x, true),
        &["3 channels", "[2, 5, 4, 3]", "axis to -1"],
    );
    assert_eq!(
        bn.forward_t(&x.permute((0, 3, 1, 2))?, true)?.dims(),
        [2, 3, 5, 4]
    );
    Ok(())
}
