//! The models: shapes, shared variables, a gradient for every parameter, dropout.

mod common;

use candle_batch_norm::layers::InstanceNormConfig;
use candle_batch_norm::models::{
    Architecture, Dropout, DropoutKind, Model, ModelConfig, Norm, Placement,
};
use candle_batch_norm::ops::cross_entropy;
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, devices, random, tensor, values};

fn build(
    architecture: Architecture,
    norm: Norm,
    placement: Placement,
    device: &Device,
) -> Result<(Model, Vec<(String, Var)>)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let model = Model::new(architecture, &ModelConfig { norm, placement }, vb)?;
    let mut vars: Vec<_> = vars.data().lock().unwrap().clone().into_iter().collect();
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    for (i, (name, var)) in vars.iter().enumerate() {
        if !of_a_norm(name) {
            let fan_in = var.dims().iter().skip(1).product::<usize>().max(1) as f64;
            let start: Vec<f64> = random(i as u64, var.elem_count(), 0.0);
            let start: Vec<f64> = start.iter().map(|v| v / fan_in.sqrt()).collect();
            var.set(&tensor(&start, var.dims(), DType::F32, device)?)?;
        }
    }
    Ok((model, vars))
}

fn images(architecture: Architecture, n: usize, device: &Device) -> Result<Tensor> {
    let [c, h, w] = architecture.input_shape();
    tensor(
        &random(9, n * c * h * w, 0.0),
        &[n, c, h, w],
        DType::F32,
        device,
    )
}

fn norms() -> [Norm; 7] {
    [
        Norm::None,
        Norm::batch(),
        Norm::renorm(),
        Norm::group(),
        Norm::layer(),
        Norm::instance(),
        Norm::candle_nn(),
    ]
}

/// Whether a variable belongs to a norm.
fn of_a_norm(name: &str) -> bool {
    name.starts_with("bn") || name.starts_with("norm")
}

/// Whether a variable is learned.
fn is_trained(name: &str) -> bool {
    !name.contains("running") && !name.contains("num_batches")
}

#[test]
fn every_parameter_gets_a_gradient() -> Result<()> {
    for device in devices() {
        for architecture in Architecture::ALL {
            for norm in norms() {
                for placement in [Placement::BeforeActivation, Placement::AfterActivation] {
                    let (model, vars) = build(architecture, norm.clone(), placement, &device)?;
                    let logits = model.forward_t(&images(architecture, 3, &device)?, true)?;
                    assert_eq!(logits.dims(), [3, 10]);
                    let labels = Tensor::new(&[1u32, 2, 3], &device)?;
                    let loss = candle_nn::loss::cross_entropy(&logits, &labels)?;
                    let grads = loss.backward()?;
                    for (name, var) in vars.iter().filter(|(name, _)| is_trained(name)) {
                        let what = format!("{architecture:?} {norm:?} {placement:?} {name}");
                        let grad = grads
                            .get(var)
                            .unwrap_or_else(|| panic!("{what}: no gradient"));
                        assert!(values(grad)?.iter().any(|&v| v != 0.0), "{what}: all zero");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_models_share_has_one_name_and_shape() -> Result<()> {
    for architecture in Architecture::ALL {
        let shapes = |norm| -> Result<Vec<(String, Vec<usize>)>> {
            let (_, vars) = build(architecture, norm, Placement::default(), &Device::Cpu)?;
            Ok(vars
                .into_iter()
                .map(|(name, var)| (name, var.dims().to_vec()))
                .collect())
        };
        let plain = shapes(Norm::None)?;
        assert_eq!(shapes(Norm::batch())?, shapes(Norm::candle_nn())?);
        for norm in norms() {
            let all = shapes(norm.clone())?;
            let shared: Vec<_> = all
                .into_iter()
                .filter(|(name, _)| !of_a_norm(name))
                .collect();
            assert_eq!(plain, shared, "{norm:?}");
        }
    }
    Ok(())
}

#[test]
fn norms_have_their_variables() -> Result<()> {
    let parameters = |norm| -> Result<Vec<String>> {
        let (_, vars) = build(Architecture::Cnn, norm, Placement::default(), &Device::Cpu)?;
        let names = vars.into_iter().map(|(name, _)| name);
        Ok(names
            .filter(|name| of_a_norm(name) && is_trained(name))
            .collect())
    };
    let named = |start: &str, layers: &[usize]| -> Vec<String> {
        let of = |i| ["bias", "weight"].map(|parameter| format!("{start}{i}.{parameter}"));
        layers.iter().flat_map(of).collect()
    };
    assert_eq!(parameters(Norm::renorm())?, named("bn", &[1, 2, 3]));
    assert_eq!(parameters(Norm::group())?, named("norm", &[1, 2, 3]));
    assert_eq!(parameters(Norm::layer())?, named("norm", &[1, 2, 3]));
    // The third is dense.
    assert_eq!(parameters(Norm::instance())?, named("norm", &[1, 2]));
    Ok(())
}

/// A step downhill on the batch that it was taken on, which is short enough to help.
#[test]
fn a_step_of_training_lowers_the_loss() -> Result<()> {
    for device in devices() {
        for norm in norms() {
            for placement in [Placement::BeforeActivation, Placement::AfterActivation] {
                let (model, vars) = build(Architecture::Cnn, norm.clone(), placement, &device)?;
                let x = images(Architecture::Cnn, 6, &device)?;
                let labels = Tensor::new(&[1u32, 2, 3, 4, 5, 6], &device)?;
                let loss = || cross_entropy(&model.forward_t(&x, true)?, &labels);
                let before = loss()?;
                let grads = before.backward()?;
                for (_, var) in &vars {
                    if let Some(grad) = grads.get(var) {
                        var.set(&(var.as_tensor() - (grad * 1e-3)?)?)?;
                    }
                }
                let (before, after) = (values(&before)?[0], values(&loss()?)?[0]);
                assert!(after < before, "{norm:?} {placement:?}: {before} {after}");
            }
        }
    }
    Ok(())
}

/// The same networks from the layers' parts: each norm's logits by hand, from its definition.
#[test]
fn norms_normalise_what_they_say() -> Result<()> {
    let x = images(Architecture::Cnn, 3, &Device::Cpu)?;
    let logits = |norm: Norm| -> Result<Vec<f64>> {
        let (model, _) = build(Architecture::Cnn, norm, Placement::default(), &Device::Cpu)?;
        values(&model.forward_t(&x, true)?)
    };
    let (_, vars) = build(
        Architecture::Cnn,
        Norm::None,
        Placement::default(),
        &Device::Cpu,
    )?;
    let var = |name: &str| {
        let found = vars.iter().find(|(other, _)| other == name);
        found.unwrap().1.as_tensor().clone()
    };
    // Weights of 1 and biases of 0 are left out.
    let normalised = |x: &Tensor, groups: usize| -> Result<Tensor> {
        let rows = x.reshape((x.dim(0)? * groups, ()))?;
        let centred = rows.broadcast_sub(&rows.mean_keepdim(1)?)?;
        let var = centred.sqr()?.mean_keepdim(1)?;
        centred
            .broadcast_div(&(var + 1e-5)?.sqrt()?)?
            .reshape(x.shape())?
            .relu()
    };
    let by_hand = |groups: [usize; 3]| -> Result<Vec<f64>> {
        let mut h = x.clone();
        for (i, groups) in (1..).zip(&groups[..2]) {
            let bias = var(&format!("conv{i}.bias")).reshape((1, (), 1, 1))?;
            h = h
                .conv2d(&var(&format!("conv{i}.weight")), 1, 1, 1, 1)?
                .broadcast_add(&bias)?;
            h = normalised(&h, *groups)?.max_pool2d(2)?;
        }
        let dense = |h: &Tensor, i: usize| -> Result<Tensor> {
            let product = h.matmul(&var(&format!("fc{i}.weight")).t()?)?;
            product.broadcast_add(&var(&format!("fc{i}.bias")))
        };
        let h = normalised(&dense(&h.flatten_from(1)?, 1)?, groups[2])?;
        values(&dense(&h, 2)?)
    };
    let check = |norm: Norm, groups| -> Result<()> {
        let what = format!("{norm:?}");
        assert_close(&what, &logits(norm)?, &by_hand(groups)?, 1e-4, 1e-4);
        Ok(())
    };
    check(Norm::group(), [8, 8, 8])?;
    check(Norm::layer(), [1, 1, 1])?;
    check(Norm::instance(), [32, 64, 1])
}

#[test]
fn norms_that_do_not_fit_get_an_error() {
    let error = |norm| {
        let built = build(Architecture::Cnn, norm, Placement::default(), &Device::Cpu);
        built.err().unwrap().to_string()
    };
    let groups = error(Norm::Group {
        num_groups: 5,
        config: 1e-5.into(),
    });
    assert!(groups.contains("divides 32 channels, got 5"), "{groups}");
    let tracking = error(Norm::Instance(InstanceNormConfig {
        track_running_stats: true,
        ..Default::default()
    }));
    assert!(
        tracking.contains("track_running_stats of false, got true"),
        "{tracking}"
    );
}

#[test]
fn the_mlp_has_its_layers() -> Result<()> {
    let (_, vars) = build(
        Architecture::Mlp,
        Norm::batch(),
        Placement::default(),
        &Device::Cpu,
    )?;
    let shape = |name: &str| {
        vars.iter()
            .find(|(n, _)| n == name)
            .map(|(_, var)| var.dims().to_vec())
    };
    assert_eq!(shape("fc1.weight"), Some(vec![256, 784]));
    assert_eq!(shape("bn2.running_var"), Some(vec![128]));
    assert_eq!(shape("fc3.bias"), Some(vec![10]));
    Ok(())
}

#[test]
fn fused_and_candle_s_batch_norm_give_the_same_logits() -> Result<()> {
    for device in devices() {
        for architecture in [
            Architecture::Mlp,
            Architecture::Cnn,
            Architecture::ThreeBlock,
        ] {
            for placement in [Placement::BeforeActivation, Placement::AfterActivation] {
                let x = images(architecture, 4, &device)?;
                let logits = |norm, train| -> Result<Vec<f64>> {
                    let (model, _) = build(architecture, norm, placement, &device)?;
                    values(&model.forward_t(&x, train)?)
                };
                for train in [true, false] {
                    let (ours, theirs) = (
                        logits(Norm::batch(), train)?,
                        logits(Norm::candle_nn(), train)?,
                    );
                    assert_close(&format!("{architecture:?}"), &ours, &theirs, 1e-4, 1e-4);
                }
            }
        }
    }
    Ok(())
}

#[test]
fn placement_changes_the_order() -> Result<()> {
    let x = images(Architecture::Mlp, 4, &Device::Cpu)?;
    let logits = |placement| -> Result<Vec<f64>> {
        let (model, _) = build(Architecture::Mlp, Norm::batch(), placement, &Device::Cpu)?;
        values(&model.forward_t(&x, true)?)
    };
    assert_ne!(
        logits(Placement::BeforeActivation)?,
        logits(Placement::AfterActivation)?
    );
    Ok(())
}

#[test]
fn wrong_images_get_an_error() -> Result<()> {
    let (model, _) = build(
        Architecture::ConvNet,
        Norm::None,
        Placement::default(),
        &Device::Cpu,
    )?;
    let error = model
        .forward_t(&images(Architecture::Mlp, 2, &Device::Cpu)?, false)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("[n, 3, 32, 32], got [2, 1, 28, 28]"),
        "{error}"
    );
    Ok(())
}

#[test]
fn dropout_is_the_identity_in_evaluation() -> Result<()> {
    for device in devices() {
        let x = tensor(&random(1, 120, 0.0), &[2, 3, 4, 5], DType::F32, &device)?;
        for kind in [DropoutKind::Values, DropoutKind::Channels] {
            let dropout = Dropout::new(0.5, kind)?;
            assert_eq!(values(&dropout.forward_t(&x, false)?)?, values(&x)?);
            assert_ne!(values(&dropout.forward_t(&x, true)?)?, values(&x)?);
        }
        let model = build(
            Architecture::Regularised,
            Norm::None,
            Placement::default(),
            &device,
        )?
        .0;
        let x = images(Architecture::Regularised, 2, &device)?;
        let logits = values(&model.forward_t(&x, false)?)?;
        assert_eq!(values(&model.forward_t(&x, false)?)?, logits);
        model.reseed_dropout(3);
        let first = values(&model.forward_t(&x, true)?)?;
        assert_ne!(values(&model.forward_t(&x, true)?)?, first);
        model.reseed_dropout(3);
        assert_eq!(values(&model.forward_t(&x, true)?)?, first);
    }
    Ok(())
}

#[test]
fn dropout_drops_its_share_and_scales_the_rest() -> Result<()> {
    let ones = Tensor::ones((100, 20, 10), DType::F32, &Device::Cpu)?;
    for kind in [DropoutKind::Values, DropoutKind::Channels] {
        let y = values(&Dropout::new(0.2, kind)?.forward_t(&ones, true)?)?;
        let kept = y.iter().filter(|&&v| v != 0.0).count() as f64 / y.len() as f64;
        assert!((0.77..0.83).contains(&kept), "{kind:?} kept {kept}");
        assert!(y.iter().all(|&v| v == 0.0 || v == 1.25), "{kind:?}");
        let whole = y
            .chunks(10)
            .all(|channel| channel.iter().all(|&v| v == channel[0]));
        assert_eq!(whole, kind == DropoutKind::Channels);
    }
    for p in [-0.1, 1.0, f32::NAN] {
        let error = Dropout::new(p, DropoutKind::Values)
            .unwrap_err()
            .to_string();
        assert!(error.contains(&p.to_string()), "{error}");
    }
    Ok(())
}

#[test]
fn no_images_have_no_logits() -> Result<()> {
    for architecture in Architecture::ALL {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let config = ModelConfig {
            norm: Norm::batch(),
            ..Default::default()
        };
        let model = Model::new(architecture, &config, vb)?;
        let [c, h, w] = architecture.input_shape();
        let x = Tensor::zeros((0, c, h, w), DType::F32, &Device::Cpu)?;
        assert_eq!(model.forward_t(&x, false)?.dims(), &[0, 10]);
    }
    Ok(())
}
