//! Batch norm with statistics for each step, and the LSTM with it.

mod common;

use std::collections::HashMap;

use candle_batch_norm::layers::{
    batch_norm_lstm, batch_norm_steps, BatchNormLstm, BatchNormLstmConfig, BatchNormLstmState,
    BatchNormSteps,
};
use candle_batch_norm::{Activation, BatchNormConfig, Freeze};
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::rnn::RNN;
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, assert_error, devices, differences, random, tensor, values, var, Case};

const N: usize = 5;
const C: usize = 3;
const STEPS: usize = 3;

fn steps(config: BatchNormConfig, device: &Device) -> Result<(BatchNormSteps, VarMap)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, device);
    Ok((batch_norm_steps(C, STEPS, config, vb)?, vars))
}

/// Values whose mean and scale are another at each step.
fn at_step(step: usize, seed: u64) -> Vec<f64> {
    let values = random(seed * 100 + step as u64, N * C, 0.0);
    let scaled = values
        .iter()
        .map(|v| v * (step + 1) as f64 + 3.0 * step as f64);
    scaled.collect()
}

/// Two sequences of five steps: the last two steps are the third one's.
#[test]
fn each_step_has_its_statistics() -> Result<()> {
    for device in devices() {
        for momentum in [Some(0.1), None] {
            let config = BatchNormConfig {
                momentum,
                ..Default::default()
            };
            let (bn, vars) = steps(config, &device)?;
            let mut mean = [[0.0; C]; STEPS];
            let mut variance = [[1.0; C]; STEPS];
            let mut counts = [0i64; STEPS];
            let mut dweight = [0.0; C];
            let mut loss = Tensor::zeros((), DType::F64, &device)?;
            for sequence in 0..2 {
                for step in 0..5 {
                    let case = Case {
                        shape: vec![N, C],
                        x: at_step(step, sequence),
                        dy: random(step as u64, N * C, 0.0),
                        eps: 1e-5,
                        ..Case::default()
                    };
                    let truth = case.truth();
                    let x = tensor(&case.x, &[N, C], DType::F64, &device)?;
                    let y = bn.at(step).forward_t(&x, true)?;
                    assert_close("y", &values(&y)?, &truth.y, 1e-12, 0.0);
                    let dy = tensor(&case.dy, &[N, C], DType::F64, &device)?;
                    loss = (loss + (y * dy)?.sum_all()?)?;
                    let row = step.min(STEPS - 1);
                    counts[row] += 1;
                    let share = momentum.unwrap_or(1.0 / counts[row] as f64);
                    let unbiased = N as f64 / (N - 1) as f64;
                    for c in 0..C {
                        mean[row][c] += share * (truth.mean[c] - mean[row][c]);
                        variance[row][c] += share * (truth.var[c] * unbiased - variance[row][c]);
                        dweight[c] += truth.dweight[c];
                    }
                }
            }
            let running = [bn.running_mean(), bn.running_var()].map(values);
            let [running_mean, running_var] = running;
            assert_close("mean", &running_mean?, &mean.concat(), 1e-12, 0.0);
            assert_close("var", &running_var?, &variance.concat(), 1e-12, 0.0);
            match (momentum, bn.num_batches_tracked()) {
                (None, Some(got)) => assert_eq!(got.to_vec1::<i64>()?, counts),
                (_, got) => assert!(momentum.is_some() && got.is_none()),
            }
            let grads = loss.backward()?;
            let weight = vars.data().lock().unwrap()["weight"].clone();
            let got = values(grads.get(&weight).expect("a gradient"))?;
            assert_close("dweight", &got, &dweight, 1e-11, 0.0);
            // Evaluation, of the last step and of one behind it.
            for step in [0, 2, 7] {
                let row = step.min(STEPS - 1);
                let case = Case {
                    shape: vec![N, C],
                    x: at_step(1, 9),
                    dy: vec![0.0; N * C],
                    eps: 1e-5,
                    given: Some((mean[row].to_vec(), variance[row].to_vec())),
                    ..Case::default()
                };
                let x = tensor(&case.x, &[N, C], DType::F64, &device)?;
                let y = bn.at(step).forward_t(&x, false)?;
                assert_close("evaluation", &values(&y)?, &case.truth().y, 1e-11, 0.0);
            }
        }
    }
    Ok(())
}

/// What a checkpoint holds: one tensor of each kind, which a loaded layer goes on with.
#[test]
fn checkpoints() -> Result<()> {
    for device in devices() {
        let config = BatchNormConfig {
            momentum: None,
            ..Default::default()
        };
        let (bn, vars) = steps(config, &device)?;
        let train = |bn: &BatchNormSteps, seed| -> Result<()> {
            for step in 0..STEPS {
                let x = tensor(&at_step(step, seed), &[N, C], DType::F64, &device)?;
                bn.at(step).forward_t(&x, true)?;
            }
            Ok(())
        };
        train(&bn, 1)?;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("steps.safetensors");
        vars.save(&file)?;
        let held = candle_core::safetensors::load(&file, &device)?;
        assert_eq!(held["running_var"].dims(), &[STEPS, C]);
        assert_eq!(held["num_batches_tracked"].to_vec1::<i64>()?, [1; STEPS]);
        let (loaded, mut vars) = steps(config, &device)?;
        vars.load(&file)?;
        train(&bn, 2)?;
        train(&loaded, 2)?;
        assert_eq!(values(bn.running_var())?, values(loaded.running_var())?);
        assert_eq!(
            values(bn.at(1).running_mean())?,
            values(&loaded.running_mean().get(1)?)?
        );
    }
    Ok(())
}

/// The tensors of a case of tests/data.
fn load(name: &str, device: &Device) -> Result<HashMap<String, Tensor>> {
    let file = "tests/data/pytorch_batch_norm.safetensors";
    let prefix = format!("{name}/");
    let tensors = candle_core::safetensors::load(file, device)?.into_iter();
    let of_case = tensors.filter_map(|(name, t)| Some((name.strip_prefix(&prefix)?.into(), t)));
    Ok(of_case.collect())
}

/// An LSTM of 3 inputs and 4 hidden values, with the case's parameters, and its variables.
fn lstm(
    config: BatchNormLstmConfig,
    case: &HashMap<String, Tensor>,
    device: &Device,
) -> Result<(BatchNormLstm, HashMap<String, Var>)> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F64, device);
    let lstm = batch_norm_lstm(3, 4, config, vb)?;
    let vars = vars.data().lock().unwrap().clone();
    for (name, var) in &vars {
        if let Some(t) = case.get(name) {
            var.set(t)?;
        }
    }
    Ok((lstm, vars))
}

/// Without norms it is `nn.LSTM`, with them the formulas of the paper in PyTorch's ops.
#[test]
fn lstm_as_in_pytorch() -> Result<()> {
    for device in devices() {
        for (name, config, variables) in [
            ("lstm", BatchNormLstmConfig::without_norm(), 4),
            ("lstm_bn", BatchNormLstmConfig::new(5), 8),
        ] {
            let case = load(name, &device)?;
            let (lstm, vars) = lstm(config, &case, &device)?;
            let x = Var::from_tensor(&case["x"])?;
            let states = lstm.seq_t(&x, &lstm.zero_state(6)?, true)?;
            let y = lstm.states_to_tensor(&states)?;
            let close = |what: &str, got: &Tensor| -> Result<()> {
                let expected = values(&case[what])?;
                assert_close(
                    &format!("{name} {what}"),
                    &values(got)?,
                    &expected,
                    1e-12,
                    1e-11,
                );
                Ok(())
            };
            close("y", &y)?;
            close("c", &states[4].c)?;
            let grads = (y * &case["dy"])?.sum_all()?.backward()?;
            close("dx", grads.get(&x).expect("a gradient"))?;
            let mut seen = 0;
            for (name, var) in &vars {
                if case.contains_key(name) {
                    close(&format!("d{name}"), grads.get(var).expect("a gradient"))?;
                    seen += 1;
                }
            }
            assert_eq!(seen, variables);
        }
    }
    Ok(())
}

/// In training and in evaluation, for all variables at once: the gradient along a direction.
#[test]
fn gradients_of_the_lstm_by_finite_differences() -> Result<()> {
    for device in devices() {
        for train in [true, false] {
            let case = load("lstm_bn", &device)?;
            // Fewer steps than the sequence has.
            let (mut lstm, vars) = lstm(BatchNormLstmConfig::new(2), &case, &device)?;
            lstm.seq_t(&case["x"], &lstm.zero_state(6)?, true)?;
            if !train {
                lstm.set_freeze(Freeze::Statistics)?; // as evaluation
            }
            let loss = || -> Result<Tensor> {
                let states = lstm.seq_t(&case["x"], &lstm.zero_state(6)?, true)?;
                (lstm.states_to_tensor(&states)? * &case["dy"])?.sum_all()
            };
            let grads = loss()?.backward()?;
            for (name, var) in &vars {
                if !case.contains_key(name) {
                    continue;
                }
                let at = values(var)?;
                let expected = differences(&at, 1e-5, |moved| {
                    var.set(&tensor(moved, var.dims(), DType::F64, &device).unwrap())
                        .unwrap();
                    loss().unwrap().to_scalar().unwrap()
                });
                var.set(&tensor(&at, var.dims(), DType::F64, &device)?)?;
                let got = values(grads.get(var).expect("a gradient"))?;
                assert_close(name, &got, &expected, 1e-7, 1e-6);
            }
        }
    }
    Ok(())
}

/// As an `RNN` it evaluates, and a state knows its step.
#[test]
fn evaluation_and_states() -> Result<()> {
    for device in devices() {
        let case = load("lstm_bn", &device)?;
        // The running statistics are those of the last batch.
        let norm = BatchNormConfig {
            momentum: Some(1.0),
            unbiased_running_var: false,
            ..Default::default()
        };
        let config = BatchNormLstmConfig {
            steps: 5,
            norm: Some(norm),
        };
        let (lstm, vars) = lstm(config, &case, &device)?;
        let x = &case["x"];
        let zero = lstm.zero_state(6)?;
        let trained = lstm.states_to_tensor(&lstm.seq_t(x, &zero, true)?)?;
        let running = values(&vars["bn_c.running_var"])?;
        let whole = lstm.states_to_tensor(&lstm.seq(x)?)?;
        assert_eq!(values(&vars["bn_c.running_var"])?, running);
        assert_close(
            "evaluation",
            &values(&whole)?,
            &values(&trained)?,
            1e-12,
            0.0,
        );
        // In two parts, and one sequence alone.
        let first = lstm.seq(&x.narrow(1, 0, 2)?)?;
        assert_eq!(first[1].step, 2);
        let second = lstm.seq_init(&x.narrow(1, 2, 3)?, &first[1])?;
        let parts = lstm.states_to_tensor(&[first, second].concat())?;
        assert_eq!(values(&parts)?, values(&whole)?);
        let alone = lstm.states_to_tensor(&lstm.seq(&x.narrow(0, 3, 1)?)?)?;
        let of_whole = values(&whole.narrow(0, 3, 1)?)?;
        assert_close("alone", &values(&alone)?, &of_whole, 1e-12, 0.0);
    }
    Ok(())
}

#[test]
fn new_variables_and_errors() -> Result<()> {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let lstm = batch_norm_lstm(3, 4, BatchNormLstmConfig::new(6), vb.clone())?;
    {
        let vars = vars.data().lock().unwrap();
        for (name, c) in [("bn_ih", 16), ("bn_hh", 16), ("bn_c", 4)] {
            let weight = vars[&format!("{name}.weight")].to_vec1::<f32>()?;
            assert_eq!(weight, vec![0.1; c]);
            assert_eq!(vars[&format!("{name}.running_mean")].dims(), &[6, c]);
            let has_bias = vars.contains_key(&format!("{name}.bias"));
            assert_eq!(has_bias, name == "bn_c");
        }
        let weight = values(&vars["weight_hh_l0"])?;
        assert!(weight.iter().all(|w| w.abs() <= 0.5) && weight.iter().any(|w| w.abs() > 0.2));
    }
    let x = Tensor::ones((2, 5), DType::F32, &device)?;
    assert_error(lstm.step(&x, &lstm.zero_state(2)?), &["linear", "[2, 5]"]);
    let x = Tensor::ones((1, 3), DType::F32, &device)?;
    let state: BatchNormLstmState = lstm.zero_state(1)?;
    assert_error(
        lstm.step_t(&x, &state, true),
        &["more than one value per channel"],
    );
    let none = batch_norm_steps(3, 0, BatchNormConfig::default(), vb.clone());
    assert_error(none, &["at least one", "0"]);
    assert_error(
        batch_norm_lstm(3, 0, BatchNormLstmConfig::new(6), vb.clone()),
        &["hidden", "0"],
    );
    let norm = BatchNormConfig {
        activation: Activation::Relu,
        ..Default::default()
    };
    let config = BatchNormLstmConfig {
        steps: 2,
        norm: Some(norm),
    };
    assert_error(batch_norm_lstm(3, 4, config, vb), &["activation", "Relu"]);
    let x = var(&[1.0; 6], &[2, 3], DType::F64, &device)?;
    let (bn, _) = steps(Default::default(), &device)?;
    assert_eq!(bn.at(9).forward_t(&x, true)?.dims(), &[2, 3]);
    assert_eq!(bn.steps(), STEPS);
    Ok(())
}
