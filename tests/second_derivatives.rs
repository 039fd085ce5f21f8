//! Gradients of gradients: with CANDLE_GRAD_DO_NOT_DETACH, every op's gradient is differentiable.

mod common;

use std::collections::HashMap;
use std::sync::Once;

use candle_batch_norm::ops::{
    batch_norm_inference, batch_norm_train, batch_norm_vjp, batch_renorm_train, conv2d,
    cross_entropy, group_norm, instance_norm, layer_norm, linear, max_pool2d, relu, rms_norm,
    Activation, BatchNormArgs, RenormLimits, RowNormArgs,
};
use candle_batch_norm::{backward, batch_norm, BatchNormConfig};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder};
use common::{assert_close, devices, differences, random, tensor, values, var};

/// Comes before anything else in a test: candle reads the variable once for each thread.
fn keep_graph() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| std::env::set_var("CANDLE_GRAD_DO_NOT_DETACH", "1"));
}

/// A gradient, or zeros in the place of none.
fn grad(grads: &GradStore, var: &Var) -> Result<Tensor> {
    match grads.get(var) {
        Some(grad) => Ok(grad.clone()),
        None => var.zeros_like(),
    }
}

/// `Σ weights·t + t²/2`: something of which every value of `t` has a gradient of its own.
fn mixed(t: &Tensor, seed: u64) -> Result<Tensor> {
    let weights = tensor(
        &random(seed, t.elem_count(), 0.0),
        t.dims(),
        t.dtype(),
        t.device(),
    )?;
    (t * weights)?.sum_all()? + (t.sqr()?.sum_all()? * 0.5)?
}

/// The gradients of a loss of `f`, and of a penalty on those gradients, against finite differences. `f` gets
/// the inputs that are given, in F64.
#[track_caller]
fn check(
    what: &str,
    inputs: &[(&[usize], Vec<f64>)],
    device: &Device,
    f: impl Fn(&[&Tensor]) -> Result<Tensor>,
) -> Result<()> {
    keep_graph();
    let vars = |values: &[Vec<f64>]| -> Result<Vec<Var>> {
        let shapes = inputs.iter().map(|(shape, _)| shape);
        let pairs = shapes.zip(values);
        pairs
            .map(|(shape, values)| var(values, shape, DType::F64, device))
            .collect()
    };
    let loss = |vars: &[Var]| {
        let tensors: Vec<&Tensor> = vars.iter().map(|var| var.as_tensor()).collect();
        mixed(&f(&tensors)?, 77)
    };
    let penalty = |vars: &[Var], grads: &GradStore| -> Result<Tensor> {
        let mut sum = Tensor::zeros((), DType::F64, device)?;
        for (seed, var) in vars.iter().enumerate() {
            sum = (sum + mixed(&grad(grads, var)?, seed as u64)?)?;
        }
        Ok(sum)
    };
    let at: Vec<Vec<f64>> = inputs.iter().map(|(_, values)| values.clone()).collect();
    let start = vars(&at)?;
    let first = loss(&start)?.backward()?;
    let second = penalty(&start, &first)?.backward()?;
    for (i, var) in start.iter().enumerate() {
        let with = |moved: &[f64]| {
            let mut at = at.clone();
            at[i] = moved.to_vec();
            vars(&at).unwrap()
        };
        let expected = differences(&at[i], 1e-5, |moved| {
            loss(&with(moved)).unwrap().to_scalar().unwrap()
        });
        let got = values(&grad(&first, var)?)?;
        assert_close(&format!("{what}: d{i}"), &got, &expected, 1e-6, 1e-6);
        let expected = differences(&at[i], 1e-5, |moved| {
            let vars = with(moved);
            let grads = loss(&vars).unwrap().backward().unwrap();
            penalty(&vars, &grads).unwrap().to_scalar().unwrap()
        });
        let got = values(&grad(&second, var)?)?;
        let scale = expected.iter().fold(1f64, |max, v| max.max(v.abs()));
        assert_close(
            &format!("{what}: dd{i}"),
            &got,
            &expected,
            1e-6 * scale,
            0.0,
        );
    }
    Ok(())
}

/// Shape and values of an input.
fn input(seed: u64, shape: &'static [usize], offset: f64) -> (&'static [usize], Vec<f64>) {
    (shape, random(seed, shape.iter().product(), offset))
}

#[test]
fn batch_norm_in_training_and_inference() -> Result<()> {
    for device in devices() {
        let shape: &[usize] = &[4, 3, 2, 2];
        let inputs = [
            input(1, shape, 0.5),
            input(2, &[3], 1.0),
            input(3, &[3], 0.2),
            input(4, shape, 0.0),
        ];
        let mean = tensor(&[0.2, 0.9, -0.3], &[3], DType::F64, &device)?;
        let variance = tensor(&[0.8, 1.9, 0.3], &[3], DType::F64, &device)?;
        for activation in [Activation::Identity, Activation::Relu] {
            for remove_mean in [true, false] {
                for training in [true, false] {
                    // Which of weight, bias and residual there are.
                    for present in [
                        [0, 0, 0],
                        [1, 0, 0],
                        [0, 1, 0],
                        [1, 1, 0],
                        [1, 1, 1],
                        [0, 0, 1],
                    ] {
                        let chosen = |t: &[&'static str]| t.join(" ");
                        let names: Vec<_> = ["weight", "bias", "residual"]
                            .into_iter()
                            .zip(present)
                            .filter_map(|(name, present)| (present == 1).then_some(name))
                            .collect();
                        let what = format!(
                            "{} {activation:?} training {training} remove_mean {remove_mean}",
                            chosen(&names)
                        );
                        check(&what, &inputs, &device, |t| {
                            let args = BatchNormArgs {
                                weight: (present[0] == 1).then_some(t[1]),
                                bias: (present[1] == 1).then_some(t[2]),
                                residual: (present[2] == 1).then_some(t[3]),
                                activation,
                                remove_mean,
                                eps: 1e-2,
                                ..BatchNormArgs::new()
                            };
                            match training {
                                true => Ok(batch_norm_train(t[0], &args)?.0),
                                false => batch_norm_inference(t[0], &mean, &variance, &args),
                            }
                        })?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Fused with it and behind it, and with the channels last.
#[test]
fn with_a_maximum_over_windows() -> Result<()> {
    for device in devices() {
        for shape in [&[2, 2, 9, 8][..], &[3, 2, 4, 5]] {
            let inputs = [(shape, random(1, shape.iter().product(), 0.5))];
            check("max_pool", &inputs, &device, |t| {
                let args = BatchNormArgs {
                    activation: Activation::Relu,
                    max_pool: Some(2),
                    ..BatchNormArgs::new()
                };
                Ok(batch_norm_train(t[0], &args)?.0)
            })?;
            check("channels last", &inputs, &device, |t| {
                let last = t[0].permute((0, 2, 3, 1))?.contiguous()?;
                let x = last.permute((0, 3, 1, 2))?;
                Ok(batch_norm_train(&x, &BatchNormArgs::new())?.0)
            })?;
        }
    }
    Ok(())
}

/// Where the limits hold everywhere, the corrections do not move with `x`: they are constants to autograd.
#[test]
fn batch_renorm() -> Result<()> {
    for device in devices() {
        let mean = tensor(&[5.0, -5.0], &[2], DType::F64, &device)?;
        let variance = tensor(&[100.0, 0.01], &[2], DType::F64, &device)?;
        let limits = RenormLimits {
            r_max: 1.5,
            d_max: 0.25,
        };
        let inputs = [input(1, &[5, 2, 3], 0.5), input(2, &[2], 1.0)];
        check("renorm", &inputs, &device, |t| {
            let args = BatchNormArgs {
                weight: Some(t[1]),
                activation: Activation::Relu,
                ..BatchNormArgs::new()
            };
            Ok(batch_renorm_train(t[0], &mean, &variance, limits, &args)?.0)
        })?;
    }
    Ok(())
}

#[test]
fn the_other_ops() -> Result<()> {
    for device in devices() {
        let images = input(1, &[2, 4, 5, 7], 0.1);
        check("relu", &[input(1, &[30], 0.1)], &device, |t| relu(t[0]))?;
        check("max_pool2d", std::slice::from_ref(&images), &device, |t| {
            max_pool2d(t[0], 2)
        })?;
        check(
            "max_pool2d of 3",
            std::slice::from_ref(&images),
            &device,
            |t| max_pool2d(t[0], 3),
        )?;
        let labels = Tensor::new(&[0u32, 2, 1, 1], &device)?;
        check("cross_entropy", &[input(1, &[4, 3], 0.0)], &device, |t| {
            cross_entropy(t[0], &labels)
        })?;
        let inputs = [
            input(1, &[2, 3, 4], 0.0),
            input(2, &[5, 4], 0.0),
            input(3, &[5], 0.0),
        ];
        check("linear", &inputs, &device, |t| {
            linear(t[0], t[1], Some(t[2]))
        })?;
        for (padding, stride, dilation) in [(0, 1, 1), (1, 1, 1), (1, 2, 1), (2, 3, 2), (0, 2, 1)] {
            for groups in [1, 2] {
                if groups == 2 && !device.is_cpu() {
                    continue; // candle's own
                }
                let weight: &[usize] = if groups == 2 {
                    &[2, 2, 3, 2]
                } else {
                    &[2, 4, 3, 2]
                };
                let inputs = [
                    images.clone(),
                    (weight, random(2, weight.iter().product(), 0.0)),
                    input(3, &[2], 0.0),
                ];
                let config = Conv2dConfig {
                    padding,
                    stride,
                    dilation,
                    groups,
                    cudnn_fwd_algo: None,
                };
                let what = format!("conv2d {padding} {stride} {dilation} {groups}");
                check(&what, &inputs, &device, |t| {
                    conv2d(t[0], t[1], Some(t[2]), &config)
                })?;
            }
        }
    }
    Ok(())
}

type RowNorm = fn(&Tensor, &RowNormArgs) -> Result<Tensor>;

#[test]
fn norms_of_rows() -> Result<()> {
    for device in devices() {
        let shape: &[usize] = &[3, 4, 2, 3];
        let inputs = [
            input(1, shape, 0.5),
            input(2, &[4], 1.0),
            input(3, &[4], 0.2),
        ];
        for activation in [Activation::Identity, Activation::Relu] {
            for present in [[false, false], [true, false], [false, true], [true, true]] {
                let with = |t: &[&Tensor], f: RowNorm| {
                    let args = RowNormArgs {
                        weight: present[0].then_some(t[1]),
                        bias: present[1].then_some(t[2]),
                        activation,
                        eps: 1e-2,
                    };
                    f(t[0], &args)
                };
                let ways: [(&str, RowNorm); 5] = [
                    ("layer norm", |x, args| {
                        layer_norm(&x.permute((0, 2, 3, 1))?, 4, args)
                    }),
                    ("rms norm", |x, args| {
                        rms_norm(&x.permute((0, 2, 3, 1))?, 4, args)
                    }),
                    ("group norm", |x, args| group_norm(x, 2, args)),
                    ("group norm, channels last", |x, args| {
                        let last = x.permute((0, 2, 3, 1))?.contiguous()?;
                        group_norm(&last.permute((0, 3, 1, 2))?, 2, args)
                    }),
                    ("instance norm", |x, args| Ok(instance_norm(x, args)?.0)),
                ];
                for (name, way) in ways {
                    let what = format!("{name} {activation:?} {present:?}");
                    check(&what, &inputs, &device, |t| with(t, way))?;
                }
            }
        }
    }
    Ok(())
}

/// The gradients that the pullback gives are functions of its arguments and of `dy`.
#[test]
fn batch_norm_vjp_has_differentiable_gradients() -> Result<()> {
    for device in devices() {
        for max_pool in [None, Some(2)] {
            let pooled: &'static [usize] = if max_pool.is_some() {
                &[2, 2, 2, 2]
            } else {
                &[2, 2, 4, 4]
            };
            let inputs = [
                input(1, &[2, 2, 4, 4], 0.5),
                input(2, &[2], 1.0),
                input(3, pooled, 0.0),
            ];
            for which in 0..2 {
                check("vjp", &inputs, &device, |t| {
                    let args = BatchNormArgs {
                        weight: Some(t[1]),
                        activation: Activation::Relu,
                        max_pool,
                        ..BatchNormArgs::new()
                    };
                    let (_, _, pullback) = batch_norm_vjp(t[0], &args)?;
                    let grads = pullback.gradients(t[2])?;
                    Ok([grads.dx, grads.dweight.unwrap()][which].clone())
                })?;
            }
        }
    }
    Ok(())
}

/// In other dtypes the same second derivatives as in F64, for an input with an offset.
#[test]
fn all_dtypes() -> Result<()> {
    keep_graph();
    for device in devices() {
        for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F16, 5e-3), (DType::BF16, 4e-2)] {
            let start = tensor(&random(1, 5 * 3 * 4, 3.0), &[5, 3, 4], dtype, &device)?;
            let second = |dtype| -> Result<[Vec<f64>; 2]> {
                let x = Var::from_tensor(&start.to_dtype(dtype)?)?;
                let weight = var(&[0.5, 1.0, 1.5], &[3], DType::F32, &device)?;
                let parameter = match dtype {
                    DType::F64 => weight.to_dtype(dtype)?,
                    _ => weight.as_tensor().clone(),
                };
                let args = BatchNormArgs {
                    weight: Some(&parameter),
                    ..BatchNormArgs::new()
                };
                let y = batch_norm_train(&x, &args)?.0.to_dtype(DType::F64)?;
                let grads = mixed(&y, 7)?.backward()?;
                let penalty = mixed(&grad(&grads, &x)?.to_dtype(DType::F64)?, 8)?;
                let second = penalty.backward()?;
                Ok([
                    values(&grad(&second, &x)?)?,
                    values(&grad(&second, &weight)?)?,
                ])
            };
            let (got, expected) = (second(dtype)?, second(DType::F64)?);
            for (got, expected) in got.iter().zip(&expected) {
                let scale = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
                assert!(scale > 0.1);
                assert_close(&format!("{dtype:?}"), got, expected, tolerance * scale, 0.0);
            }
        }
    }
    Ok(())
}

/// A critic of a convolution, batch norm, ReLU and a linear layer: the penalty of WGAN-GP on the norm of its
/// gradient, against PyTorch.
#[test]
fn a_gradient_penalty_is_pytorch_s() -> Result<()> {
    keep_graph();
    for device in devices() {
        let file = "tests/data/pytorch_batch_norm.safetensors";
        let case: HashMap<String, Var> = candle_core::safetensors::load(file, &device)?
            .into_iter()
            .filter_map(|(name, t)| Some((name.strip_prefix("penalty/")?.to_string(), t)))
            .map(|(name, t)| Ok((name, Var::from_tensor(&t)?)))
            .collect::<Result<_>>()?;
        let parameters = ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias"];
        // By candle's `backward` and by ours.
        let ways: [fn(&Tensor) -> Result<GradStore>; 2] = [|loss| loss.backward(), backward];
        for (way, fused) in ways.into_iter().zip([true, false]) {
            let critic = || -> Result<(Tensor, Tensor)> {
                let tensors = |name: &str| case[name].as_tensor().clone();
                let mut held = HashMap::new();
                for (name, value) in [("weight", 1f64), ("bias", 0.0)] {
                    held.insert(name.to_string(), tensors(&format!("1.{name}")));
                    let value = Tensor::full(value, 3, &device)?;
                    held.insert(
                        format!("running_{}", if name == "bias" { "mean" } else { "var" }),
                        value,
                    );
                }
                let activation = match fused {
                    true => Activation::Relu,
                    false => Activation::Identity,
                };
                let config = BatchNormConfig {
                    activation,
                    ..Default::default()
                };
                let vb = VarBuilder::from_tensors(held, DType::F64, &device);
                let bn = batch_norm(3, config, vb)?;
                let config = Conv2dConfig {
                    padding: 1,
                    ..Default::default()
                };
                let y = conv2d(
                    &case["x"],
                    &case["0.weight"],
                    Some(&case["0.bias"]),
                    &config,
                )?;
                let y = bn.forward_t(&y, true)?;
                let y = if fused { y } else { relu(&y)? };
                let loss = linear(
                    &y.flatten_from(1)?,
                    &case["4.weight"],
                    Some(&case["4.bias"]),
                )?;
                let grads = way(&loss.sum_all()?)?;
                let dx = grad(&grads, &case["x"])?;
                let norm = dx.flatten_from(1)?.sqr()?.sum(1)?.sqrt()?;
                Ok((dx, (norm - 1.0)?.sqr()?.mean_all()?))
            };
            let (dx, penalty) = critic()?;
            let close = |what: &str, got: &Tensor| -> Result<()> {
                let expected = values(case[what].as_tensor())?;
                assert_close(what, &values(got)?, &expected, 1e-13, 1e-11);
                Ok(())
            };
            close("dx", &dx)?;
            close("penalty", &penalty)?;
            let grads = way(&penalty)?;
            close("penalty_dx", &grad(&grads, &case["x"])?)?;
            for name in parameters {
                let got = grad(&grads, &case[name])?;
                let what = format!("penalty_d{name}");
                match case.contains_key(&what) {
                    true => close(&what, &got)?,
                    // PyTorch says that there is none.
                    false => assert!(values(&got)?.iter().all(|v| *v == 0.0), "{what}"),
                }
            }
        }
    }
    Ok(())
}
