//! The layer and the ops against PyTorch's own numbers, written by scripts/pytorch_reference.py.

mod common;

use std::collections::HashMap;

use candle_batch_norm::ops::{batch_norm_inference, batch_norm_train, BatchNormArgs};
use candle_batch_norm::{batch_norm, Activation, BatchNorm, BatchNormConfig, Freeze};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, ModuleT, Result, Tensor, Var};
use candle_nn::{Init, VarBuilder, VarMap};
use common::{devices, pytorch_tolerance, values};

const DATA: &str = "tests/data/pytorch_batch_norm.safetensors";
const PTH: &str = "tests/data/state_dict.pth";
const SAFETENSORS: &str = "tests/data/state_dict.safetensors";

/// Asserts equal shapes, and values within `tolerance`.
#[track_caller]
fn assert_within(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(got.dims(), expected.dims(), "{what}: shape");
    for (i, (got, expected)) in values(got)?.iter().zip(values(expected)?).enumerate() {
        let bound = tolerance * expected.abs().max(1.0);
        assert!(
            (got - expected).abs() <= bound,
            "{what}[{i}]: got {got}, expected {expected} ± {bound:e}"
        );
    }
    Ok(())
}

/// The tensors of one case.
struct Case {
    name: String,
    tensors: HashMap<String, Tensor>,
}

impl Case {
    fn load(name: &str, device: &Device) -> Result<Self> {
        let prefix = format!("{name}/");
        let tensors = candle_core::safetensors::load(DATA, device)?
            .into_iter()
            .filter_map(|(name, tensor)| Some((name.strip_prefix(&prefix)?.to_string(), tensor)))
            .collect();
        let name = name.to_string();
        Ok(Self { name, tensors })
    }

    fn get(&self, name: &str) -> &Tensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("{} has no {name}", self.name))
    }

    fn var(&self, name: &str) -> Result<Option<Var>> {
        self.tensors.get(name).map(Var::from_tensor).transpose()
    }

    fn batches(&self) -> usize {
        (0..)
            .take_while(|i| self.tensors.contains_key(&format!("x{i}")))
            .count()
    }

    /// Asserts that a tensor is PyTorch's, and what PyTorch gives in F64 where that is recorded.
    #[track_caller]
    fn check(&self, name: &str, got: &Tensor) -> Result<()> {
        let (what, expected) = (format!("{} {name}", self.name), self.get(name));
        assert_eq!(got.dtype(), expected.dtype(), "{what}: dtype");
        let tolerance = pytorch_tolerance(got.dtype());
        // PyTorch sums F32 in F32: its dweight is up to 2.2e-6 off its own result in F64.
        let sums_in_f32 = got.dtype() == DType::F32 && matches!(name, "dweight" | "dbias");
        let slack = if sums_in_f32 { 2.0 } else { 1.0 };
        assert_within(&what, got, expected, slack * tolerance)?;
        match self.tensors.get(&format!("truth/{name}")) {
            Some(truth) => assert_within(&format!("{what} in F64"), got, truth, tolerance),
            None => Ok(()),
        }
    }

    #[track_caller]
    fn check_gradients(&self, y: &Tensor, vars: &[(&str, Option<&Var>)]) -> Result<GradStore> {
        let grads = (y * self.get("dy"))?.sum_all()?.backward()?;
        for (name, var) in vars {
            if let Some(var) = var {
                self.check(name, grads.get(var).expect(name))?;
            }
        }
        Ok(grads)
    }

    /// The layer as the case starts, with its variables.
    fn layer(&self, config: BatchNormConfig) -> Result<(BatchNorm, HashMap<String, Var>)> {
        let x = self.get("x0");
        // Parameters in F32 beside inputs in half precision, as in PyTorch's mixed precision.
        let dtype = match x.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, dtype, x.device());
        // PyTorch always counts; ours does with a momentum too if the variable is there.
        if self.tensors.contains_key("num_batches_tracked_start") {
            vb.get_with_hints_dtype((), "num_batches_tracked", Init::Const(0.0), DType::I64)?;
        }
        let bn = batch_norm(x.dims()[1], config, vb)?;
        let vars = vars.data().lock().unwrap().clone();
        for (name, var) in &vars {
            let start = format!("{name}_start");
            let start = self.tensors.get(&start).unwrap_or_else(|| self.get(name));
            var.set(start)?;
        }
        Ok((bn, vars))
    }

    /// Runs the layer on the batches of the case: the running statistics after each of them, and
    /// the last output and its gradients are PyTorch's.
    fn run(
        &self,
        config: BatchNormConfig,
        train: bool,
        layout: fn(&Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let parameters_frozen = config.freeze == Freeze::StatisticsAndParameters;
        let (bn, vars) = self.layer(config)?;
        let residual = self.var("residual")?;
        let batches = self.batches();
        assert!(batches > 0, "{} has no batch", self.name);
        for batch in 0..batches {
            let x = self.var(&format!("x{batch}"))?.unwrap();
            let y = match &residual {
                Some(residual) => bn.forward_residual_t(&layout(&x)?, &layout(residual)?, train)?,
                None => bn.forward_t(&layout(&x)?, train)?,
            };
            if bn.config().track_running_stats {
                self.check(&format!("running_mean{batch}"), bn.running_mean())?;
                self.check(&format!("running_var{batch}"), bn.running_var())?;
            }
            let count = format!("num_batches_tracked{batch}");
            if let Some(expected) = self.tensors.get(&count) {
                let got = bn.num_batches_tracked().expect(&count);
                assert_eq!(got.to_scalar::<i64>()?, expected.to_scalar::<i64>()?);
            }
            if batch + 1 < batches {
                continue;
            }
            self.check("y", &y)?;
            let inputs = [("dx", Some(&x)), ("dresidual", residual.as_ref())];
            let parameters = [("dweight", vars.get("weight")), ("dbias", vars.get("bias"))];
            if parameters_frozen {
                let grads = self.check_gradients(&y, &inputs)?;
                for (name, var) in parameters {
                    assert!(
                        grads.get(var.expect(name)).is_none(),
                        "{name} of a frozen layer"
                    );
                }
            } else {
                self.check_gradients(&y, &[inputs, parameters].concat())?;
            }
        }
        Ok(())
    }

    /// Runs the ops on a case of `torch.nn.functional.batch_norm`.
    fn run_ops(&self, train: bool) -> Result<()> {
        let x = self.var("x0")?.expect("x0");
        let (weight, bias) = (self.var("weight")?, self.var("bias")?);
        let args = BatchNormArgs {
            weight: weight.as_deref(),
            bias: bias.as_deref(),
            eps: 1e-3,
            ..BatchNormArgs::new()
        };
        let mean = self.var("running_mean_start")?.expect("running_mean_start");
        let var = self.var("running_var_start")?.expect("running_var_start");
        let y = if train {
            let (y, stats) = batch_norm_train(&x, &args)?;
            let batch = Case::load("functional_statistics", x.device())?;
            batch.check("mean", &stats.mean()?)?;
            batch.check("var", &stats.var()?)?;
            stats.update_running(Some(&mean), &var, 0.25)?;
            y
        } else {
            batch_norm_inference(&x, &mean, &var, &args)?
        };
        self.check("y", &y)?;
        self.check("running_mean0", &mean)?;
        self.check("running_var0", &var)?;
        let vars = [
            ("dx", Some(&x)),
            ("dweight", weight.as_ref()),
            ("dbias", bias.as_ref()),
        ];
        self.check_gradients(&y, &vars)?;
        Ok(())
    }
}

fn contiguous(x: &Tensor) -> Result<Tensor> {
    Ok(x.clone())
}

fn channels_last(x: &Tensor) -> Result<Tensor> {
    let x = x
        .permute((0, 2, 3, 1))?
        .contiguous()?
        .permute((0, 3, 1, 2))?;
    assert!(!x.is_contiguous());
    Ok(x)
}

fn train(name: &str, config: BatchNormConfig) -> Result<()> {
    for device in devices() {
        Case::load(name, &device)?.run(config, true, contiguous)?;
    }
    Ok(())
}

fn eval(name: &str, config: BatchNormConfig) -> Result<()> {
    for device in devices() {
        Case::load(name, &device)?.run(config, false, contiguous)?;
    }
    Ok(())
}

fn default() -> BatchNormConfig {
    BatchNormConfig::default()
}

fn relu() -> BatchNormConfig {
    BatchNormConfig {
        activation: Activation::Relu,
        ..default()
    }
}

fn with_momentum(momentum: Option<f64>) -> BatchNormConfig {
    BatchNormConfig {
        momentum,
        ..default()
    }
}

#[test]
fn training_matches_batch_norm_1d_2d_and_3d() -> Result<()> {
    for name in ["1d", "1d_sequence", "2d", "3d"] {
        train(name, default())?;
    }
    Ok(())
}

#[test]
fn two_values_per_channel_give_the_unbiased_running_variance() -> Result<()> {
    train("two_values", default())
}

#[test]
fn without_affine_it_matches() -> Result<()> {
    let config = BatchNormConfig {
        affine: false,
        ..default()
    };
    train("no_affine", config)
}

#[test]
fn without_running_statistics_evaluation_uses_the_batch_too() -> Result<()> {
    let config = BatchNormConfig {
        track_running_stats: false,
        ..default()
    };
    train("no_tracking", config)?;
    eval("no_tracking_eval", config)
}

#[test]
fn running_statistics_match_after_each_batch_with_another_momentum() -> Result<()> {
    train("momentum", with_momentum(Some(0.3)))
}

#[test]
fn running_statistics_and_count_match_after_each_batch_without_momentum() -> Result<()> {
    train("cumulative", with_momentum(None))
}

#[test]
fn another_eps_matches() -> Result<()> {
    train("eps", BatchNormConfig::from(0.1))
}

#[test]
fn evaluation_and_its_gradients_match() -> Result<()> {
    eval("eval", default())?;
    eval("eval_residual_relu", relu())
}

#[test]
fn a_frozen_layer_in_training_matches_evaluation() -> Result<()> {
    for freeze in [Freeze::Statistics, Freeze::StatisticsAndParameters] {
        let frozen = |config| BatchNormConfig { freeze, ..config };
        train("eval", frozen(default()))?;
        train("eval_residual_relu", frozen(relu()))?;
    }
    Ok(())
}

#[test]
fn fused_relu_and_residual_match_with_the_residuals_gradient() -> Result<()> {
    train("relu", relu())?;
    train("residual", default())?;
    train("residual_relu", relu())
}

#[test]
fn channels_last_matches() -> Result<()> {
    let cases = [
        ("channels_last", default()),
        ("channels_last_residual_relu", relu()),
    ];
    for device in devices() {
        for (name, config) in &cases {
            Case::load(name, &device)?.run(*config, true, channels_last)?;
        }
    }
    Ok(())
}

#[test]
fn f64_matches_to_1e_12() -> Result<()> {
    train("f64", default())?;
    eval("f64_eval", default())
}

#[test]
fn half_precision_with_f32_parameters_matches() -> Result<()> {
    for name in ["bf16", "f16"] {
        train(name, default())?;
        eval(&format!("{name}_eval"), default())?;
    }
    Ok(())
}

#[test]
fn the_ops_match_functional_batch_norm_with_either_parameter_or_none() -> Result<()> {
    for device in devices() {
        for parameters in ["", "_weight", "_bias", "_weight_bias"] {
            let case = |mode| Case::load(&format!("functional_{mode}{parameters}"), &device);
            case("train")?.run_ops(true)?;
            case("inference")?.run_ops(false)?;
        }
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
        Ok(Self {
            conv1: candle_nn::conv2d(1, 4, 3, padding, vb.pp("conv1"))?,
            bn1: batch_norm(4, with_momentum(momentum), vb.pp("bn1"))?,
            fc1: candle_nn::linear(4 * 36, 3, vb.pp("fc1"))?,
        })
    }

    /// The network that PyTorch trained, in a `VarMap` that was there before the file was read.
    fn in_var_map(momentum: Option<f64>) -> Result<(Self, Vec<String>)> {
        let mut vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let net = Self::new(momentum, vb)?;
        vars.load(SAFETENSORS)?;
        let names = vars.data().lock().unwrap().keys().cloned().collect();
        Ok((net, names))
    }

    /// Asserts PyTorch's output in evaluation, after the batch norm and at the end.
    fn check(&self) -> Result<()> {
        let case = Case::load("net", &Device::Cpu)?;
        let before = self.conv1.forward(case.get("x"))?;
        let after_bn = self.bn1.forward_t(&before, false)?;
        case.check("after_bn", &after_bn)?;
        let logits = self.fc1.forward(&after_bn.relu()?.flatten_from(1)?)?;
        case.check("logits", &logits)
    }

    fn count(&self) -> Result<Option<i64>> {
        let count = self.bn1.num_batches_tracked();
        count.map(|count| count.to_scalar()).transpose()
    }
}

/// The state_dict behind a `VarBuilder`, from both of its files.
fn state_dict(dtype: DType) -> Result<[VarBuilder<'static>; 2]> {
    let device = Device::Cpu;
    // SAFETY: nobody changes the file while it is mapped.
    let safetensors =
        unsafe { VarBuilder::from_mmaped_safetensors(&[SAFETENSORS], dtype, &device)? };
    Ok([VarBuilder::from_pth(PTH, dtype, &device)?, safetensors])
}

#[test]
fn a_state_dict_loads_by_name_from_pth_and_safetensors() -> Result<()> {
    for momentum in [Some(0.1), None] {
        for vb in state_dict(DType::F32)? {
            let net = Net::new(momentum, vb)?;
            net.check()?;
            assert_eq!(net.count()?, Some(4));
        }
    }
    Ok(())
}

#[test]
fn a_state_dict_loaded_in_half_precision_keeps_its_statistics_in_f32() -> Result<()> {
    let file = candle_core::safetensors::load(SAFETENSORS, &Device::Cpu)?;
    for vb in state_dict(DType::F16)? {
        let bn = batch_norm(4, default(), vb.pp("bn1"))?;
        assert_eq!(bn.weight().unwrap().dtype(), DType::F16);
        for (name, got) in [
            ("bn1.running_mean", bn.running_mean()),
            ("bn1.running_var", bn.running_var()),
        ] {
            assert_eq!(got.to_vec1::<f32>()?, file[name].to_vec1::<f32>()?);
        }
        assert_eq!(bn.num_batches_tracked().unwrap().to_scalar::<i64>()?, 4);
    }
    Ok(())
}

#[test]
fn var_map_load_with_a_momentum_needs_no_count() -> Result<()> {
    let (net, names) = Net::in_var_map(Some(0.1))?;
    assert!(!names.iter().any(|name| name == "bn1.num_batches_tracked"));
    assert_eq!(net.count()?, None);
    net.check()
}

#[test]
fn var_map_load_without_a_momentum_reads_the_count() -> Result<()> {
    let (net, names) = Net::in_var_map(None)?;
    assert!(names.iter().any(|name| name == "bn1.num_batches_tracked"));
    assert_eq!(net.count()?, Some(4));
    net.check()
}

#[test]
fn the_cumulative_average_goes_on_from_a_loaded_count() -> Result<()> {
    let [pth, safetensors] = state_dict(DType::F32)?;
    let nets = [
        Net::new(None, pth)?,
        Net::new(None, safetensors)?,
        Net::in_var_map(None)?.0,
    ];
    let case = Case::load("net", &Device::Cpu)?;
    for net in nets {
        net.bn1.forward_train(&net.conv1.forward(case.get("x"))?)?;
        case.check("running_mean_cumulative", net.bn1.running_mean())?;
        case.check("running_var_cumulative", net.bn1.running_var())?;
        let count = case.get("num_batches_tracked_cumulative");
        assert_eq!(net.count()?, Some(count.to_scalar()?));
    }
    Ok(())
}

#[test]
fn as_candle_nns_layer_and_absorbed_into_the_convolution_it_matches_evaluation() -> Result<()> {
    let case = Case::load("net", &Device::Cpu)?;
    for vb in state_dict(DType::F32)? {
        let net = Net::new(Some(0.1), vb)?;
        let bn = candle_nn::BatchNorm::try_from(&net.bn1)?;
        let before = net.conv1.forward(case.get("x"))?;
        case.check("after_bn", &bn.forward_t(&before, false)?)?;
        let folded = net.conv1.absorb_bn(&bn)?;
        case.check("after_bn", &folded.forward(case.get("x"))?)?;
    }
    Ok(())
}
