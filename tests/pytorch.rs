//! The layer against PyTorch's own numbers, written by scripts/pytorch_reference.py.

mod common;

use std::collections::HashMap;

use candle_batch_norm::{batch_norm, Activation, BatchNorm, BatchNormConfig};
use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, devices, values};

const DATA: &str = "tests/data/pytorch_batch_norm.safetensors";
const PTH: &str = "tests/data/state_dict.pth";
const SAFETENSORS: &str = "tests/data/state_dict.safetensors";

/// The tensors of one case.
struct Case {
    name: &'static str,
    tensors: HashMap<String, Tensor>,
}

impl Case {
    fn load(name: &'static str, device: &Device) -> Result<Self> {
        let prefix = format!("{name}/");
        let tensors = candle_core::safetensors::load(DATA, device)?
            .into_iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_string(), tensor)))
            .collect();
        Ok(Self { name, tensors })
    }

    fn get(&self, name: &str) -> &Tensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("{} has no {name}", self.name))
    }

    /// Asserts that a tensor is PyTorch's, within what the dtype of the case rounds.
    #[track_caller]
    fn check(&self, name: &str, got: &Tensor, scale: f64) -> Result<()> {
        let expected = self.get(name);
        assert_eq!(
            (got.dims(), got.dtype()),
            (expected.dims(), expected.dtype()),
            "{name}"
        );
        let bound = scale * common::rounding(expected.dtype());
        let what = format!("{} {name}", self.name);
        assert_close(&what, &values(got)?, &values(expected)?, bound, bound);
        Ok(())
    }

    /// Runs the layer on the batches of the case and compares everything that PyTorch left.
    fn run(
        &self,
        config: BatchNormConfig,
        train: bool,
        x_layout: fn(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let x0 = self.get("x0");
        let (c, device) = (x0.dims()[1], x0.device());
        let vars = VarMap::new();
        // Parameters in F32 beside inputs in half precision, as in PyTorch's mixed precision.
        let dtype = if x0.dtype() == DType::F64 {
            DType::F64
        } else {
            DType::F32
        };
        let bn = batch_norm(c, config, VarBuilder::from_varmap(&vars, dtype, device))?;
        let vars = vars.data().lock().unwrap().clone();
        for name in ["weight", "bias"] {
            if let Some(value) = self.tensors.get(name) {
                vars[name].set(value)?;
            }
        }
        if !train {
            for name in ["running_mean", "running_var"] {
                vars[name].set(self.get(name))?;
            }
        }
        let batches = (0..)
            .take_while(|i| self.tensors.contains_key(&format!("x{i}")))
            .count();
        let residual = self
            .tensors
            .get("residual")
            .map(Var::from_tensor)
            .transpose()?;
        for batch in 0..batches {
            let x = Var::from_tensor(self.get(&format!("x{batch}")))?;
            let laid_out = x_layout(&x)?;
            let y = match &residual {
                Some(residual) => bn.forward_residual_t(&laid_out, residual, train)?,
                None => bn.forward_t(&laid_out, train)?,
            };
            if batch + 1 < batches {
                continue;
            }
            self.check("y", &y, 2.0)?;
            let grads = (y * self.get("dy"))?.sum_all()?.backward()?;
            let gradients = [
                ("dx", Some(&x)),
                ("dresidual", residual.as_ref()),
                ("dweight", vars.get("weight")),
                ("dbias", vars.get("bias")),
            ];
            for (name, var) in gradients {
                if let Some(var) = var {
                    self.check(name, grads.get(var).expect("a gradient"), 10.0)?;
                }
            }
        }
        if self.tensors.contains_key("running_mean") {
            self.check("running_mean", bn.running_mean(), 1.0)?;
            self.check("running_var", bn.running_var(), 1.0)?;
        }
        if let Some(count) = bn.num_batches_tracked() {
            let expected = self.get("num_batches_tracked").to_scalar::<i64>()?;
            assert_eq!(count.to_scalar::<i64>()?, expected);
        }
        Ok(())
    }
}

fn as_it_is(x: &Tensor) -> Result<Tensor> {
    Ok(x.clone())
}

fn run(name: &'static str, config: BatchNormConfig) -> Result<()> {
    for device in devices() {
        Case::load(name, &device)?.run(config.clone(), true, as_it_is)?;
    }
    Ok(())
}

#[test]
fn every_rank_matches() -> Result<()> {
    for name in ["1d", "1d_sequence", "2d", "3d"] {
        run(name, BatchNormConfig::default())?;
    }
    Ok(())
}

#[test]
fn two_values_per_channel_match() -> Result<()> {
    run("two_values", BatchNormConfig::default())
}

#[test]
fn options_match() -> Result<()> {
    let default = BatchNormConfig::default;
    run(
        "no_affine",
        BatchNormConfig {
            affine: false,
            ..default()
        },
    )?;
    run(
        "no_tracking",
        BatchNormConfig {
            track_running_stats: false,
            ..default()
        },
    )?;
    run(
        "momentum",
        BatchNormConfig {
            momentum: Some(0.3),
            ..default()
        },
    )?;
    run(
        "cumulative",
        BatchNormConfig {
            momentum: None,
            ..default()
        },
    )?;
    run("eps", BatchNormConfig::from(0.1))
}

#[test]
fn evaluation_and_its_gradients_match() -> Result<()> {
    for device in devices() {
        Case::load("eval", &device)?.run(BatchNormConfig::default(), false, as_it_is)?;
    }
    Ok(())
}

#[test]
fn fused_relu_and_residual_match() -> Result<()> {
    let relu = || BatchNormConfig {
        activation: Activation::Relu,
        ..Default::default()
    };
    run("relu", relu())?;
    run("residual_relu", relu())
}

#[test]
fn channels_last_matches() -> Result<()> {
    let channels_last = |x: &Tensor| x.permute((0, 2, 3, 1))?.contiguous()?.permute((0, 3, 1, 2));
    for device in devices() {
        Case::load("channels_last", &device)?.run(
            BatchNormConfig::default(),
            true,
            channels_last,
        )?;
    }
    Ok(())
}

#[test]
fn other_dtypes_match() -> Result<()> {
    for name in ["f64", "bf16", "f16"] {
        run(name, BatchNormConfig::default())?;
    }
    Ok(())
}

/// Convolution, batch norm and linear layer of the small network whose state_dict is in tests/data.
struct Net {
    conv1: candle_nn::Conv2d,
    bn1: BatchNorm,
    fc1: candle_nn::Linear,
}

impl Net {
    fn new(momentum: Option<f64>, vb: VarBuilder) -> Result<Self> {
        let padding = candle_nn::Conv2dConfig {
            padding: 1,
            ..Default::default()
        };
        let config = BatchNormConfig {
            momentum,
            ..Default::default()
        };
        Ok(Self {
            conv1: candle_nn::conv2d(1, 4, 3, padding, vb.pp("conv1"))?,
            bn1: batch_norm(4, config, vb.pp("bn1"))?,
            fc1: candle_nn::linear(4 * 36, 3, vb.pp("fc1"))?,
        })
    }

    fn check(&self) -> Result<()> {
        let case = Case::load("net", &Device::Cpu)?;
        let after_bn = self
            .bn1
            .forward_t(&self.conv1.forward(case.get("x"))?, false)?;
        case.check("after_bn", &after_bn, 4.0)?;
        let logits = self.fc1.forward(&after_bn.relu()?.flatten_from(1)?)?;
        case.check("logits", &logits, 4.0)?;
        let folded = self
            .conv1
            .absorb_bn(&candle_nn::BatchNorm::try_from(&self.bn1)?)?;
        case.check("after_bn", &folded.forward(case.get("x"))?, 4.0)
    }

    fn count(&self) -> Result<Option<i64>> {
        self.bn1
            .num_batches_tracked()
            .map(|count| count.to_scalar())
            .transpose()
    }
}

#[test]
fn a_state_dict_loads_by_name() -> Result<()> {
    let (dtype, device) = (DType::F32, Device::Cpu);
    let pth = VarBuilder::from_pth(PTH, dtype, &device)?;
    // SAFETY: nobody changes the file while it is mapped.
    let safetensors =
        unsafe { VarBuilder::from_mmaped_safetensors(&[SAFETENSORS], dtype, &device)? };
    for vb in [pth, safetensors] {
        let net = Net::new(Some(0.1), vb)?;
        net.check()?;
        assert_eq!(net.count()?, Some(4));
    }
    Ok(())
}

#[test]
fn a_state_dict_loads_into_a_var_map() -> Result<()> {
    for (momentum, count) in [(Some(0.1), None), (None, Some(4))] {
        let mut vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let config = BatchNormConfig {
            momentum,
            ..Default::default()
        };
        batch_norm(4, config, vb.pp("bn1"))?;
        let conv1 = candle_nn::Conv2dConfig {
            padding: 1,
            ..Default::default()
        };
        candle_nn::conv2d(1, 4, 3, conv1, vb.pp("conv1"))?;
        candle_nn::linear(4 * 36, 3, vb.pp("fc1"))?;
        vars.load(SAFETENSORS)?;
        let net = Net::new(momentum, vb)?;
        assert_eq!(net.count()?, count);
        if momentum.is_some() {
            net.check()?;
        }
    }
    Ok(())
}
