//! The models: shapes, shared variables, a gradient for every parameter, dropout.

mod common;

use candle_batch_norm::models::{
    Architecture, Dropout, DropoutKind, Model, ModelConfig, Norm, Placement,
};
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
        if !name.starts_with("bn") {
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

fn norms() -> [Norm; 3] {
    [Norm::None, Norm::batch(), Norm::candle_nn()]
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
                    for (name, var) in vars.iter().filter(|(name, _)| !name.contains("running")) {
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
        let [plain, fused, candle] = norms().map(shapes);
        let (plain, fused) = (plain?, fused?);
        assert_eq!(fused, candle?);
        let without_bn: Vec<_> = fused
            .iter()
            .filter(|(name, _)| !name.starts_with("bn"))
            .cloned()
            .collect();
        assert_eq!(plain, without_bn);
        assert!(fused.len() > plain.len());
    }
    Ok(())
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
