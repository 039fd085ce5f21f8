//! The crate's `backward` beside candle's.

mod common;

use candle_batch_norm::backward;
use candle_batch_norm::models::{Architecture, Model, ModelConfig, Norm};
use candle_batch_norm::ops::{batch_norm_inference, cross_entropy, linear, relu, BatchNormArgs};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{
    assert_close, assert_error, devices, identity_with, random, refuses, rounding, tensor, values,
    var,
};

/// Both have gradients of the same variables, with the same values.
#[track_caller]
fn assert_same(ours: &GradStore, candles: &GradStore, vars: &[Var]) -> Result<()> {
    assert_eq!(ours.get_ids().count(), candles.get_ids().count());
    for (index, var) in vars.iter().enumerate() {
        match (ours.get(var), candles.get(var)) {
            (Some(ours), Some(candles)) => {
                let bound = 4.0 * rounding(ours.dtype());
                let at = format!("variable {index}");
                assert_close(&at, &values(ours)?, &values(candles)?, bound, bound)
            }
            (ours, candles) => assert_eq!(ours.is_some(), candles.is_some(), "variable {index}"),
        }
    }
    Ok(())
}

#[test]
fn every_variable_of_every_model() -> Result<()> {
    for device in &devices() {
        for architecture in Architecture::ALL {
            for norm in [Norm::None, Norm::batch(), Norm::candle_nn()] {
                let vars = VarMap::new();
                let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
                let config = ModelConfig {
                    norm,
                    ..Default::default()
                };
                let model = Model::new(architecture, &config, vb)?;
                let [c, h, w] = architecture.input_shape();
                let shape = [3, c, h, w];
                let x = var(&random(1, 3 * c * h * w, 0.0), &shape, DType::F32, device)?;
                let labels = Tensor::new(&[1u32, 7, 7], device)?;
                let loss = cross_entropy(&model.forward_t(&x, true)?, &labels)?;
                let mut all = vars.all_vars();
                all.push(x);
                assert_same(&backward(&loss)?, &loss.backward()?, &all)?;
            }
        }
    }
    Ok(())
}

/// A weight in two layers, and in a term of the loss that is none of this crate's ops.
#[test]
fn several_gradients_are_summed() -> Result<()> {
    for device in &devices() {
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            let get = |seed, shape: &[usize]| {
                var(
                    &random(seed, shape.iter().product(), 0.0),
                    shape,
                    dtype,
                    device,
                )
            };
            let (x, weight, bias) = (get(1, &[5, 4])?, get(2, &[4, 4])?, get(3, &[4])?);
            let y = relu(&linear(&x, &weight, Some(&bias))?)?;
            let y = linear(&y, &weight, None)?;
            let loss = (y.sqr()?.mean_all()? + weight.sqr()?.sum_all()?)?;
            assert_same(&backward(&loss)?, &loss.backward()?, &[x, weight, bias])?;
        }
    }
    Ok(())
}

/// Nothing is added to zeros: those would take the sign of this one.
#[test]
fn a_single_gradient_is_taken_as_it_is() -> Result<()> {
    let device = &Device::Cpu;
    let x = Var::new(&[[1f32]], device)?;
    let (mean, var) = (Tensor::new(&[0f32], device)?, Tensor::new(&[1f32], device)?);
    let weight = Tensor::new(&[-0f32], device)?;
    let args = BatchNormArgs {
        weight: Some(&weight),
        ..BatchNormArgs::new()
    };
    let y = batch_norm_inference(&x, &mean, &var, &args)?;
    let sign = |grads: GradStore| -> Result<_> {
        let dx = grads.get(&x).expect("a gradient").to_vec2::<f32>()?;
        Ok(dx[0][0].is_sign_negative())
    };
    assert!(sign(backward(&y)?)?);
    assert!(!sign(y.backward()?)?);
    Ok(())
}

#[test]
fn an_error_leaves_nothing_behind() -> Result<()> {
    let device = &Device::Cpu;
    let (x, w) = (
        var(&random(1, 12, 0.0), &[3, 4], DType::F32, device)?,
        var(&random(2, 8, 0.0), &[2, 4], DType::F32, device)?,
    );
    let refused = linear(&refuses(&relu(&x)?)?, &w, None)?.sum_all()?;
    assert_error(backward(&refused).map(|_| ()), &["refused"]);
    let loss = linear(&x, &w, None)?.sum_all()?;
    let (candles, ours) = (loss.backward()?, backward(&loss)?);
    let rows = tensor(&values(&x)?, &[3, 4], DType::F32, device)?.sum(0)?;
    let dw = candles.get(&w).expect("candle's backward has it again");
    assert_eq!(values(&dw.get(0)?)?, values(&rows)?);
    assert_same(&ours, &candles, &[x, w])
}

/// An op that goes back through a graph of its own finds its gradients in its own store.
#[test]
fn one_within_another() -> Result<()> {
    let device = &Device::Cpu;
    let get = |seed, shape: &[usize]| {
        let count = shape.iter().product();
        var(&random(seed, count, 0.0), shape, DType::F64, device)
    };
    for with in [backward, Tensor::backward] {
        let (x, inner, shared) = (get(1, &[3, 4])?, get(2, &[4, 4])?, get(3, &[4, 4])?);
        // An op with a graph of its own, whose way back runs within that of another.
        let nested = |x: &Tensor, with: fn(&Tensor) -> Result<GradStore>| {
            let (inner, shared) = (inner.clone(), shared.clone());
            identity_with(x, move |x, _dy| {
                let x = Var::from_tensor(x)?;
                let product = linear(&linear(&x, &inner, None)?, &shared, None)?;
                let grads = with(&product.sum_all()?)?;
                assert!(grads.get(&inner).is_some());
                Ok(grads.get(&x).cloned())
            })
        };
        let loss = |with| nested(&linear(&x, &shared, None)?, with)?.sum_all();
        let ours = backward(&loss(with)?);
        let expected = loss(Tensor::backward)?.backward()?;
        let dx = |grads: &GradStore| values(grads.get(&x).expect("a gradient"));
        assert_eq!(dx(&ours?)?, dx(&expected)?);
    }
    Ok(())
}
