//! Every parameter of every layer gets a gradient: what candle-nn's fused layer and RMS norms do not give.

mod common;

use candle_batch_norm::layers::{
    batch_norm_lstm, batch_norm_steps, conv2d, group_norm, instance_norm, layer_norm, linear,
    rms_norm, BatchNormLstmConfig, GroupNormConfig, InstanceNormConfig, LayerNormConfig,
};
use candle_batch_norm::{backward, batch_norm, Activation, BatchNormConfig, RenormSchedule};
use candle_core::{DType, Device, ModuleT, Result};
use candle_nn::rnn::RNN;
use candle_nn::{func_t, VarBuilder, VarMap};
use common::{devices, random, tensor, values};

/// Asserts it of a layer, for inputs of this shape.
fn check<L: ModuleT>(
    name: &str,
    shape: &[usize],
    device: &Device,
    build: impl Fn(VarBuilder) -> Result<L>,
) -> Result<()> {
    let vars = VarMap::new();
    let layer = build(VarBuilder::from_varmap(&vars, DType::F32, device))?;
    let x = tensor(
        &random(3, shape.iter().product(), 0.3),
        shape,
        DType::F32,
        device,
    )?;
    let y = layer.forward_t(&x, true)?;
    let dy = tensor(
        &random(4, y.elem_count(), 0.2),
        y.dims(),
        DType::F32,
        device,
    )?;
    let loss = (y * dy)?.sum_all()?;
    let vars = vars.data().lock().unwrap();
    let parameters: Vec<_> = vars
        .iter()
        .filter(|(key, _)| !key.contains("running_") && !key.contains("num_batches_tracked"))
        .collect();
    assert!(!parameters.is_empty(), "{name} has no parameters");
    // Both ways back, candle's and ours.
    for grads in [loss.backward()?, backward(&loss)?] {
        for (key, var) in &parameters {
            let grad = grads
                .get(var)
                .unwrap_or_else(|| panic!("{name}: no gradient of {key}"));
            assert_eq!(
                (grad.dims(), grad.dtype()),
                (var.dims(), var.dtype()),
                "{name} {key}"
            );
            let grad = values(grad)?;
            assert!(grad.iter().all(|g| g.is_finite()), "{name} {key}: {grad:?}");
            // A ReLU may have cut off all that one of them leads to, but not many of them.
            let zeros = grad.iter().filter(|&&g| g == 0.0).count();
            assert!(
                zeros * 10 < grad.len(),
                "{name} {key}: {zeros} zeros of {}",
                grad.len()
            );
        }
    }
    Ok(())
}

#[test]
fn every_parameter_of_every_layer_gets_a_gradient() -> Result<()> {
    let images = &[5, 6, 8, 9];
    let relu = Activation::Relu;
    for device in &devices() {
        check("batch norm", images, device, |vb| batch_norm(6, 1e-5, vb))?;
        check("batch norm of features", &[5, 7], device, |vb| {
            batch_norm(7, 1e-5, vb)
        })?;
        let renorm = Some(RenormSchedule::default());
        let config = BatchNormConfig {
            renorm,
            ..Default::default()
        };
        check("batch renorm", images, device, |vb| {
            batch_norm(6, config, vb)
        })?;
        let max_pool = Some(2);
        let config = BatchNormConfig {
            activation: relu,
            max_pool,
            ..Default::default()
        };
        check("batch norm, relu, pool", images, device, |vb| {
            batch_norm(6, config, vb)
        })?;
        let config = BatchNormConfig {
            axis: -1,
            ..BatchNormConfig::keras()
        };
        check("batch norm of the last axis", images, device, |vb| {
            batch_norm(9, config, vb)
        })?;
        check("layer norm", images, device, |vb| layer_norm(9, 1e-5, vb))?;
        let config = LayerNormConfig {
            activation: relu,
            ..Default::default()
        };
        check("layer norm of images", images, device, |vb| {
            layer_norm((6, 8, 9), config, vb)
        })?;
        check("rms norm", images, device, |vb| rms_norm(9, 1e-5, vb))?;
        check("group norm", images, device, |vb| {
            group_norm(3, 6, 1e-5, vb)
        })?;
        let config = GroupNormConfig {
            activation: relu,
            ..Default::default()
        };
        check("group norm, relu", images, device, |vb| {
            group_norm(2, 6, config, vb)
        })?;
        check("group norm of features", &[5, 8], device, |vb| {
            group_norm(2, 8, 1e-5, vb)
        })?;
        let config = InstanceNormConfig {
            affine: true,
            track_running_stats: true,
            ..Default::default()
        };
        check("instance norm", images, device, |vb| {
            instance_norm(6, config, vb)
        })?;
        check("batch norm of steps", &[5, 7], device, |vb| {
            Ok(batch_norm_steps(7, 3, 1e-5, vb)?.at(2).clone())
        })?;
        check("lstm", &[5, 4, 6], device, |vb| {
            let lstm = batch_norm_lstm(6, 7, BatchNormLstmConfig::new(3), vb)?;
            Ok(func_t(move |x, train| {
                let states = lstm.seq_t(x, &lstm.zero_state(5)?, train)?;
                lstm.states_to_tensor(&states)
            }))
        })?;
        check("convolution", images, device, |vb| {
            conv2d(6, 4, 3, Default::default(), vb)
        })?;
        check("linear", images, device, |vb| linear(9, 4, vb))?;
    }
    Ok(())
}
