//! The layers of row norms: against PyTorch's own numbers, written by scripts/pytorch_row_norms.py, and against
//! what they promise.

mod common;

use std::collections::HashMap;

use candle_batch_norm::layers::{
    group_norm, instance_norm, layer_norm, rms_norm, GroupNorm, GroupNormConfig,
    InstanceNormConfig, LayerNorm, LayerNormConfig,
};
use candle_batch_norm::Activation;
use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{Init, VarBuilder, VarMap};
use common::{assert_close, assert_error, devices, pytorch_tolerance, random, tensor, values};

const DATA: &str = "tests/data/pytorch_row_norms.safetensors";

/// Trains a layer as PyTorch's was, and holds everything against that.
fn check(
    name: &str,
    channels_last: bool,
    build: impl Fn(VarBuilder) -> Result<Box<dyn ModuleT>>,
) -> Result<()> {
    for device in devices() {
        let prefix = format!("{name}/");
        let expected: HashMap<String, Tensor> = candle_core::safetensors::load(DATA, &device)?
            .into_iter()
            .filter_map(|(key, t)| Some((key.strip_prefix(&prefix)?.to_string(), t)))
            .collect();
        assert!(!expected.is_empty(), "no case {name}");
        let dtype = expected["dy"].dtype();
        let vars = VarMap::new();
        let layer = build(VarBuilder::from_varmap(&vars, dtype, &device))?;
        let vars = vars.data().lock().unwrap();
        for (key, var) in vars.iter() {
            if let Some(initial) = expected.get(&format!("initial.{key}")) {
                var.set(initial)?;
            }
        }
        let assert_within = |what: &str, got: &Tensor| -> Result<()> {
            let what_expected = &expected[what];
            assert_eq!(got.dims(), what_expected.dims(), "{name} {what}");
            let bound = pytorch_tolerance(dtype);
            for (i, (got, expected)) in values(got)?.iter().zip(values(what_expected)?).enumerate()
            {
                assert!(
                    (got - expected).abs() <= bound * expected.abs().max(1.0),
                    "{name} {what}[{i}]: got {got}, expected {expected}"
                );
            }
            Ok(())
        };
        for batch in 0.. {
            let Some(x) = expected.get(&format!("x{batch}")) else {
                break;
            };
            let x = Var::from_tensor(x)?;
            let given = match channels_last {
                true => x.transpose(1, 3)?.contiguous()?.transpose(1, 3)?,
                false => x.as_tensor().clone(),
            };
            let y = layer.forward_t(&given, true)?;
            if expected.contains_key(&format!("x{}", batch + 1)) {
                continue;
            }
            assert_within("y", &y)?;
            let grads = (&y * &expected["dy"])?.sum_all()?.backward()?;
            assert_within("dx", grads.get(&x).expect("a gradient of x"))?;
            for (key, var) in vars.iter() {
                match expected.contains_key(&format!("d{key}")) {
                    true => assert_within(&format!("d{key}"), grads.get(var).expect("a gradient"))?,
                    false => assert_within(key, var)?,
                }
            }
            let y = layer.forward_t(&given, false)?;
            if !name.ends_with("relu") {
                assert_within("eval", &y)?;
            }
        }
        let parameters = expected
            .keys()
            .filter(|key| key.starts_with("initial."))
            .count();
        let buffers = expected
            .keys()
            .filter(|key| key.starts_with("running"))
            .count();
        assert_eq!(
            vars.len(),
            parameters + buffers,
            "{name}: {:?}",
            vars.keys()
        );
    }
    Ok(())
}

fn boxed(layer: impl ModuleT + 'static) -> Result<Box<dyn ModuleT>> {
    Ok(Box::new(layer))
}

#[test]
fn layer_norm_is_pytorchs() -> Result<()> {
    check("layer", false, |vb| boxed(layer_norm(33, 1e-5, vb)?))?;
    check("layer_f64", false, |vb| boxed(layer_norm(33, 1e-3, vb)?))?;
    check("layer_bf16", false, |vb| boxed(layer_norm(64, 1e-5, vb)?))?;
    check("layer_images", false, |vb| {
        boxed(layer_norm((3, 5, 7), 1e-5, vb)?)
    })?;
    let config = LayerNormConfig {
        bias: false,
        ..Default::default()
    };
    check("layer_no_bias", false, |vb| {
        boxed(layer_norm(16, config, vb)?)
    })?;
    let config = LayerNormConfig {
        elementwise_affine: false,
        ..Default::default()
    };
    check("layer_plain", false, |vb| {
        boxed(layer_norm(16, config, vb)?)
    })
}

#[test]
fn rms_norm_is_pytorchs() -> Result<()> {
    check("rms", false, |vb| boxed(rms_norm(48, 1e-6, vb)?))?;
    check("rms_f16", false, |vb| boxed(rms_norm(48, 1e-5, vb)?))
}

#[test]
fn group_norm_is_pytorchs() -> Result<()> {
    check("group", false, |vb| boxed(group_norm(3, 6, 1e-5, vb)?))?;
    let config = GroupNormConfig {
        activation: Activation::Relu,
        ..Default::default()
    };
    check("group_relu", false, |vb| {
        boxed(group_norm(2, 8, config, vb)?)
    })?;
    check("group_dense", false, |vb| {
        boxed(group_norm(4, 32, 1e-5, vb)?)
    })?;
    check("group_last", true, |vb| boxed(group_norm(2, 8, 1e-5, vb)?))?;
    check("group_f64", false, |vb| boxed(group_norm(1, 4, 1e-5, vb)?))
}

#[test]
fn instance_norm_is_pytorchs() -> Result<()> {
    check("instance", false, |vb| boxed(instance_norm(5, 1e-5, vb)?))?;
    let config = InstanceNormConfig {
        affine: true,
        ..Default::default()
    };
    check("instance_affine", false, |vb| {
        boxed(instance_norm(5, config, vb)?)
    })?;
    let config = InstanceNormConfig {
        track_running_stats: true,
        momentum: 0.3,
        ..config
    };
    check("instance_tracked", false, |vb| {
        boxed(instance_norm(4, config, vb)?)
    })
}

/// Who comes from candle-nn finds the same constructors and the same outputs.
#[test]
fn layers_stand_in_for_candle_nns() -> Result<()> {
    let device = Device::Cpu;
    let x = tensor(&random(1, 6 * 40, 1.0), &[6, 8, 5], DType::F32, &device)?;
    let [w5, b5, w8, b8] =
        [5, 5, 8, 8].map(|c| tensor(&random(c as u64, c, 1.0), &[c], DType::F32, &device).unwrap());
    let pairs = [
        (
            LayerNorm::new(w5.clone(), b5.clone(), 1e-5).forward(&x)?,
            candle_nn::LayerNorm::new(w5.clone(), b5, 1e-5).forward(&x)?,
        ),
        (
            LayerNorm::new_no_bias(w5.clone(), 1e-5).forward(&x)?,
            candle_nn::LayerNorm::new_no_bias(w5.clone(), 1e-5).forward(&x)?,
        ),
        (
            candle_batch_norm::layers::RmsNorm::new(w5.clone(), 1e-5).forward(&x)?,
            candle_nn::RmsNorm::new(w5, 1e-5).forward(&x)?,
        ),
        (
            GroupNorm::new(w8.clone(), b8.clone(), 8, 2, 1e-5)?.forward(&x)?,
            candle_nn::GroupNorm::new(w8, b8, 8, 2, 1e-5)?.forward(&x)?,
        ),
    ];
    for (i, (ours, theirs)) in pairs.iter().enumerate() {
        assert_close(
            &format!("{i}"),
            &values(ours)?,
            &values(theirs)?,
            4e-6,
            4e-6,
        );
    }
    Ok(())
}

/// Running statistics do not move in evaluation, nor after an error.
#[test]
fn running_statistics_move_in_training_alone() -> Result<()> {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let config = InstanceNormConfig {
        track_running_stats: true,
        ..Default::default()
    };
    let layer = instance_norm(
        3,
        config,
        VarBuilder::from_varmap(&vars, DType::F16, &device),
    )?;
    assert_eq!(layer.running_var().unwrap().dtype(), DType::F32);
    let x = tensor(&random(1, 24, 3.0), &[2, 3, 4], DType::F16, &device)?;
    layer.forward_t(&x, false)?;
    assert!(layer.forward_t(&x.narrow(2, 0, 1)?, true).is_err());
    assert_eq!(values(layer.running_mean().unwrap())?, [0.0; 3]);
    layer.forward_t(&x, true)?;
    assert!(values(layer.running_mean().unwrap())?
        .iter()
        .all(|&mean| mean > 0.1));
    Ok(())
}

#[test]
fn errors_say_what_was_given_and_what_was_expected() -> Result<()> {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let vb = || VarBuilder::from_varmap(&vars, DType::F32, &device);
    assert_error(
        group_norm(4, 6, 1e-5, vb()),
        &["divides 6 channels", "got 4"],
    );
    assert_error(group_norm(0, 6, 1e-5, vb()), &["got 0"]);
    assert_error(
        group_norm(2, 6, -1.0, vb()),
        &["group norm", "eps >= 0", "-1"],
    );
    assert_error(
        layer_norm(6, f64::NAN, vb()),
        &["layer norm", "eps >= 0", "NaN"],
    );
    assert_error(layer_norm((), 1e-5, vb()), &["at least one dimension"]);
    assert_error(instance_norm(6, -1.0, vb()), &["instance norm", "eps >= 0"]);
    let config = InstanceNormConfig {
        momentum: 1.5,
        ..Default::default()
    };
    assert_error(
        instance_norm(4, config, vb()),
        &["momentum from 0 to 1", "1.5"],
    );
    let layer = group_norm(2, 6, 1e-5, vb().pp("gn"))?;
    let x = Tensor::zeros((2, 4, 5), DType::F32, &device)?;
    assert_error(layer.forward(&x), &["6 channels", "[2, 4, 5]"]);
    let layer = instance_norm(6, 1e-5, vb().pp("in"))?;
    assert_error(layer.forward_t(&x, true), &["6 channels", "[2, 4, 5]"]);
    let u8s = VarBuilder::from_varmap(&vars, DType::U8, &device);
    assert_error(layer_norm(4, 1e-5, u8s), &["layer norm", "U8"]);
    let vb = vb().pp("wrong");
    vb.get_with_hints(5, "weight", Init::Const(1.0))?;
    assert_error(layer_norm(4, 1e-5, vb), &["shape"]);
    Ok(())
}
