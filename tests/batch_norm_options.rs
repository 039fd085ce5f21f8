//! The layer's options that other frameworks have: the channels' dimension, Keras' conventions, initial
//! values.

mod common;

use candle_batch_norm::layers::{Constraint, Penalty};
use candle_batch_norm::models::{Architecture, Model, ModelConfig, Norm};
use candle_batch_norm::ops::batch_stats;
use candle_batch_norm::{
    batch_norm, Activation, BatchNorm, BatchNormConfig, Freeze, InitialValues,
};
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, assert_error, devices, random, tensor, values, var};

fn layer(c: usize, config: BatchNormConfig, device: &Device) -> Result<BatchNorm> {
    let vars = VarMap::new();
    batch_norm(
        c,
        config,
        VarBuilder::from_varmap(&vars, DType::F64, device),
    )
}

/// Normalises over all dimensions but `axis`, in plain loops.
fn normalised(x: &[f64], shape: &[usize], axis: usize, eps: f64) -> Vec<f64> {
    let after: usize = shape[axis + 1..].iter().product();
    let channel = |i: usize| i / after % shape[axis];
    let m = (x.len() / shape[axis]) as f64;
    let (mut mean, mut var) = (vec![0.0; shape[axis]], vec![0.0; shape[axis]]);
    for (i, x) in x.iter().enumerate() {
        mean[channel(i)] += x / m;
    }
    for (i, x) in x.iter().enumerate() {
        var[channel(i)] += (x - mean[channel(i)]).powi(2) / m;
    }
    let y = |(i, x): (usize, &f64)| (x - mean[channel(i)]) / (var[channel(i)] + eps).sqrt();
    x.iter().enumerate().map(y).collect()
}

#[test]
fn any_dimension_may_hold_the_channels() -> Result<()> {
    for device in devices() {
        for shape in [&[5, 3][..], &[4, 3, 5], &[2, 3, 4, 5], &[3, 2, 4, 2, 3]] {
            let count = shape.iter().product();
            let x_values = random(1, count, 7.0);
            for axis in 0..shape.len() {
                let expected = normalised(&x_values, shape, axis, 1e-5);
                for axis in [axis as isize, axis as isize - shape.len() as isize] {
                    let config = BatchNormConfig {
                        axis,
                        ..Default::default()
                    };
                    let x = tensor(&x_values, shape, DType::F64, &device)?;
                    let bn = layer(
                        shape[axis.rem_euclid(shape.len() as isize) as usize],
                        config,
                        &device,
                    )?;
                    let y = bn.forward_t(&x, true)?;
                    assert_eq!(y.dims(), shape);
                    assert_close(
                        &format!("{shape:?} {axis}"),
                        &values(&y)?,
                        &expected,
                        1e-12,
                        0.0,
                    );
                }
            }
        }
    }
    Ok(())
}

/// As the same layer over a tensor whose dimensions are exchanged by hand.
#[test]
fn gradients_and_residuals_go_with_the_axis() -> Result<()> {
    for device in devices() {
        let shape = [3, 4, 5, 6];
        let count = shape.iter().product();
        let [x, residual, dy] = [1, 2, 3].map(|seed| random(seed, count, 0.5));
        let x = var(&x, &shape, DType::F64, &device)?;
        let residual = var(&residual, &shape, DType::F64, &device)?;
        let dy = tensor(&dy, &shape, DType::F64, &device)?;
        let gradients =
            |bn: &BatchNorm, there: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<[Vec<f64>; 4]> {
                let y = bn.forward_residual_t(&there(&x)?, &there(&residual)?, true)?;
                let grads = (&y * there(&dy)?)?.sum_all()?.backward()?;
                let of = |t: &Tensor| values(grads.get(t).expect("a gradient"));
                Ok([
                    of(x.as_tensor())?,
                    of(residual.as_tensor())?,
                    of(bn.weight().expect("a weight"))?,
                    of(bn.bias().expect("a bias"))?,
                ])
            };
        let config = BatchNormConfig {
            activation: Activation::Relu,
            ..Default::default()
        };
        for (axis, dims) in [(-1, [0, 3, 1, 2]), (0, [1, 0, 2, 3]), (2, [0, 2, 1, 3])] {
            let channels = shape[dims[1]];
            let got = gradients(
                &layer(channels, BatchNormConfig { axis, ..config }, &device)?,
                &|t| Ok(t.clone()),
            )?;
            let permuted = |t: &Tensor| t.permute(dims)?.contiguous();
            let expected = gradients(&layer(channels, config, &device)?, &permuted)?;
            for (got, expected) in got.iter().zip(&expected) {
                assert_close(&format!("axis {axis}"), got, expected, 1e-12, 0.0);
            }
        }
    }
    Ok(())
}

/// With the channels last nothing is copied, so that the output has the layout of the input.
#[test]
fn channels_last_stay_last() -> Result<()> {
    for device in devices() {
        let x = tensor(&random(1, 240, 0.0), &[2, 4, 5, 6], DType::F32, &device)?;
        let bn = layer(6, BatchNormConfig::keras(), &device)?;
        for train in [true, false] {
            assert!(bn
                .forward_t(&x.to_dtype(DType::F64)?, train)?
                .is_contiguous());
        }
    }
    Ok(())
}

#[test]
fn an_axis_or_a_size_that_is_not_there_is_an_error() -> Result<()> {
    let x = Tensor::zeros((4, 3), DType::F64, &Device::Cpu)?;
    for axis in [2, -3, isize::MIN, isize::MAX] {
        let config = BatchNormConfig {
            axis,
            ..Default::default()
        };
        let bn = layer(3, config, &Device::Cpu)?;
        let axis = axis.to_string();
        assert_error(bn.forward_t(&x, true), &["dimension", &axis, "[4, 3]"]);
    }
    let bn = layer(5, BatchNormConfig::keras(), &Device::Cpu)?;
    assert_error(
        bn.forward_t(&x, true),
        &["5 channels", "dimension -1", "[4, 3]"],
    );
    let residual = Tensor::zeros((3, 4), DType::F64, &Device::Cpu)?;
    let bn = layer(3, BatchNormConfig::keras(), &Device::Cpu)?;
    assert_error(
        bn.forward_residual_t(&x, &residual, true),
        &["residual", "[4, 3]", "[3, 4]"],
    );
    Ok(())
}

/// `moving = moving·0.99 + batch·0.01` of the biased variance, and eps of 1e-3, as in Keras'
/// documentation: <https://keras.io/api/layers/normalization_layers/batch_normalization/>.
#[test]
fn keras_conventions() -> Result<()> {
    for device in devices() {
        let x = tensor(&[1.0, 2.0, 3.0, 6.0], &[4, 1], DType::F64, &device)?;
        let bn = layer(1, BatchNormConfig::keras(), &device)?;
        let y = bn.forward_t(&x, true)?;
        // The mean is 3 and the biased variance 3.5; the unbiased one would be 14/3.
        let expected = [-2.0, -1.0, 0.0, 3.0].map(|v| v / 3.501f64.sqrt());
        assert_close("y", &values(&y)?, &expected, 1e-12, 0.0);
        assert_close("mean", &values(bn.running_mean())?, &[0.03], 1e-12, 0.0);
        assert_close(
            "var",
            &values(bn.running_var())?,
            &[0.99 + 0.035],
            1e-12,
            0.0,
        );
        assert_error(
            candle_nn::BatchNorm::try_from(&bn),
            &["axis -1", "unbiased_running_var = false"],
        );
    }
    Ok(())
}

#[test]
fn new_variables_begin_as_configured_and_old_ones_stay() -> Result<()> {
    let init = InitialValues {
        weight: 0.0,
        bias: 0.5,
        running_mean: -1.0,
        running_var: 2.0,
    };
    let config = BatchNormConfig {
        init,
        ..Default::default()
    };
    let vars = VarMap::new();
    let old = Var::from_slice(&[7.0, 8.0], 2, &Device::Cpu)?;
    vars.data().lock().unwrap().insert("old.weight".into(), old);
    let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
    for (name, weight) in [("new", [0.0, 0.0]), ("old", [7.0, 8.0])] {
        let bn = batch_norm(2, config, vb.pp(name))?;
        let (got, bias) = bn.weight_and_bias().expect("parameters");
        assert_eq!(values(got)?, weight);
        assert_eq!(values(bias)?, [0.5; 2]);
        assert_eq!(values(bn.running_mean())?, [-1.0; 2]);
        assert_eq!(values(bn.running_var())?, [2.0; 2]);
    }
    for running_var in [-1.0, f64::NAN] {
        let init = InitialValues {
            running_var,
            ..init
        };
        let bad = BatchNormConfig { init, ..config };
        assert_error(
            batch_norm(2, bad, vb.pp("bad")),
            &[
                "running_var >= 0",
                "running_var: ",
                &running_var.to_string(),
            ],
        );
    }
    assert!(!vars
        .data()
        .lock()
        .unwrap()
        .keys()
        .any(|name| name.starts_with("bad")));
    Ok(())
}

/// The value, and a gradient of `l1·sign(w) + 2·l2·w`: none at 0.
#[test]
fn penalties() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::F64] {
            let w = var(&[0.5, -2.0, 0.0], &[3], dtype, &device)?;
            let penalty = Penalty { l1: 0.25, l2: 0.5 };
            let term = penalty.of(&w)?;
            assert!(term.dims().is_empty() && term.dtype() == dtype);
            assert_close("penalty", &values(&term)?, &[0.625 + 2.125], 1e-6, 0.0);
            let grads = term.backward()?;
            let grad = values(grads.get(&w).expect("a gradient"))?;
            assert_close("gradient", &grad, &[0.75, -2.25, 0.0], 1e-6, 0.0);
        }
        let init = InitialValues {
            weight: -3.0,
            bias: 2.0,
            ..Default::default()
        };
        let one = |weight, bias| {
            let config = BatchNormConfig {
                init,
                weight,
                bias,
                ..Default::default()
            };
            layer(2, config, &device)
        };
        let (l1, l2) = (Penalty { l1: 1.0, l2: 0.0 }, Penalty { l1: 0.0, l2: 1.0 });
        for (weight, bias, expected) in [(true, true, 14.0), (true, false, 6.0), (false, true, 8.0)]
        {
            let penalty = one(weight, bias)?.penalty(l1, l2)?.expect("a parameter");
            assert_eq!(values(&penalty)?, [expected]);
        }
        assert!(one(false, false)?.penalty(l1, l2)?.is_none());
        let bad = Penalty { l1: 0.0, l2: -1.0 };
        assert_error(one(true, true)?.penalty(l1, bad), &["l2 >= 0", "-1"]);
    }
    Ok(())
}

/// candle's own sums in half precision stop at 256 (BF16) or 2048 (F16), and at what overflows.
#[test]
fn penalties_in_half_precision() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F16, DType::BF16] {
            let ones = var(&[1.0; 4000], &[4000], dtype, &device)?;
            let both = Penalty { l1: 1e-6, l2: 1e-6 };
            let term = both.of(&ones)?;
            assert_eq!(term.dtype(), DType::F32);
            assert_close("many", &values(&term)?, &[0.008], 1e-8, 0.0);
            let large = var(&[300.0], &[1], dtype, &device)?;
            for (l1, l2, expected) in [(0.5, 0.0, 150.0), (0.0, 0.5, 45_000.0), (0.0, 0.0, 0.0)] {
                let term = Penalty { l1, l2 }.of(&large)?;
                assert_close("large", &values(&term)?, &[expected], 0.0, 4e-3);
            }
        }
    }
    Ok(())
}

/// Whose weight and bias are kept gets no gradient from their penalty.
#[test]
fn frozen_parameters_are_not_moved_by_penalties() -> Result<()> {
    let mut bn = layer(2, BatchNormConfig::default(), &Device::Cpu)?;
    let l2 = Penalty { l1: 0.0, l2: 1.0 };
    for (freeze, is_trained) in [
        (Freeze::Statistics, true),
        (Freeze::StatisticsAndParameters, false),
    ] {
        bn.set_freeze(freeze)?;
        let penalty = bn.penalty(l2, l2)?.expect("parameters");
        assert_eq!(values(&penalty)?, [2.0]);
        let grads = penalty.backward()?;
        let gradient = grads.get(bn.weight().expect("a weight"));
        let gradient = gradient.map(values).transpose()?;
        assert_eq!(gradient, is_trained.then(|| vec![2.0; 2]));
    }
    Ok(())
}

/// A variance over one value would be 0/0 as an unbiased estimate.
#[test]
fn one_value_moves_biased_statistics_only() -> Result<()> {
    for device in devices() {
        let stats = batch_stats(&tensor(&[3.0, 5.0], &[1, 2], DType::F64, &device)?)?;
        let mean = tensor(&[1.0, 1.0], &[2], DType::F64, &device)?;
        let variance = tensor(&[1.0, 1.0], &[2], DType::F64, &device)?;
        let error = stats.update_running(Some(&mean), &variance, 0.5);
        assert_error(error, &["more than one value"]);
        assert_eq!(
            (values(&mean)?, values(&variance)?),
            (vec![1.0; 2], vec![1.0; 2])
        );
        stats.update_running_biased(Some(&mean), &variance, 0.5)?;
        assert_eq!(
            (values(&mean)?, values(&variance)?),
            (vec![2.0, 3.0], vec![0.5; 2])
        );
    }
    Ok(())
}

/// A model has its channels where it has them.
#[test]
fn models_take_keras_conventions() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let config = ModelConfig {
        norm: Norm::Batch(BatchNormConfig::keras()),
        ..Default::default()
    };
    let model = Model::new(Architecture::Cnn, &config, vb)?;
    let x = Tensor::randn(0f32, 1.0, (4, 1, 28, 28), &Device::Cpu)?;
    assert_eq!(model.forward_t(&x, true)?.dims(), &[4, 10]);
    Ok(())
}

#[test]
fn constraints() -> Result<()> {
    for device in devices() {
        for (constraint, expected) in [
            (Constraint::NonNegative, [3.0, 0.0, 0.0]),
            (Constraint::UnitNorm, [0.6, -0.8, 0.0]),
            (Constraint::MaxNorm(1.0), [0.6, -0.8, 0.0]),
            (Constraint::MaxNorm(0.0), [0.0, 0.0, 0.0]),
            (Constraint::MaxNorm(6.0), [3.0, -4.0, 0.0]),
        ] {
            for (dtype, tolerance) in [(DType::F32, 1e-7), (DType::F64, 1e-15), (DType::BF16, 4e-3)]
            {
                let w = var(&[3.0, -4.0, 0.0], &[3], dtype, &device)?;
                constraint.apply(&w)?;
                assert_close(
                    &format!("{constraint:?}"),
                    &values(&w)?,
                    &expected,
                    tolerance,
                    0.0,
                );
                assert_eq!(w.dtype(), dtype);
            }
        }
        let zeros = var(&[0.0; 2], &[2], DType::F32, &device)?;
        Constraint::UnitNorm.apply(&zeros)?;
        assert_eq!(values(&zeros)?, [0.0; 2]);
        let diverged = var(&[f64::NAN, -1.0], &[2], DType::F32, &device)?;
        Constraint::NonNegative.apply(&diverged)?;
        assert!(values(&diverged)?[0].is_nan() && values(&diverged)?[1] == 0.0);
        let w = var(&[3.0], &[1], DType::F32, &device)?;
        for radius in [-1.0, f64::NAN] {
            let error = Constraint::MaxNorm(radius).apply(&w);
            assert_error(error, &["radius >= 0", &radius.to_string()]);
        }
        assert_error(
            Constraint::UnitNorm.apply(&w.detach()),
            &["a variable", "[1]"],
        );
        assert_eq!(values(&w)?, [3.0]);
        // Through the layer, whose next pass uses it.
        let init = InitialValues {
            weight: -1.0,
            ..Default::default()
        };
        let bn = layer(
            2,
            BatchNormConfig {
                init,
                ..Default::default()
            },
            &device,
        )?;
        Constraint::NonNegative.apply(bn.weight().expect("a weight"))?;
        let x = tensor(&[1.0, 2.0, 3.0, 4.0], &[2, 2], DType::F64, &device)?;
        assert_eq!(values(&bn.forward_t(&x, true)?)?, [0.0; 4]);
    }
    Ok(())
}
