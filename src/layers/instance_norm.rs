//! Instance norm, with running statistics if they are asked for.

use candle_core::{bail, ModuleT, Result, Tensor, Var};
use candle_nn::VarBuilder;

use super::parameters::{check_channels, parameters, statistics};
use crate::ops::{self, batch_norm_inference, Activation, BatchNormArgs, RowNormArgs};
use crate::shape::check_eps;

/// For errors.
const NAME: &str = "instance norm";

/// The options of an [`InstanceNorm`]. The default is PyTorch's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InstanceNormConfig {
    /// Added to the variance under the root: at least 0.
    pub eps: f64,
    /// Whether there are a weight and a bias. PyTorch's default is that there are none.
    pub affine: bool,
    /// Whether the statistics of the training are kept, and used in evaluation.
    pub track_running_stats: bool,
    /// The weight of a batch in the running statistics, 0 to 1.
    pub momentum: f64,
    /// Applied to the output, in the same pass.
    pub activation: Activation,
}

impl Default for InstanceNormConfig {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            affine: false,
            track_running_stats: false,
            momentum: 0.1,
            activation: Activation::Identity,
        }
    }
}

impl From<f64> for InstanceNormConfig {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Default::default()
        }
    }
}

/// Instance normalisation of `[n, c, …]`: each channel of each sample by itself; see
/// [`instance_norm`](ops::instance_norm()) for formula, gradients, dtypes and layouts.
///
/// With `track_running_stats`, training moves the running statistics by the means over the samples of their
/// means and of their unbiased variances, and evaluation uses them as a batch norm does. Without, training and
/// evaluation are the same.
///
/// PyTorch: `torch.nn.InstanceNorm1d`, `2d` and `3d`.
#[derive(Debug, Clone)]
pub struct InstanceNorm {
    num_features: usize,
    running: Option<[Var; 2]>,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    config: InstanceNormConfig,
}

/// Builds a layer for `num_features` channels, with its variables from `vb`: `weight` and `bias` if it is
/// `affine`, `running_mean` and `running_var` (F32, or F64 if that is the dtype) if it tracks them, each
/// `[num_features]`.
///
/// # Errors
/// `eps < 0` or NaN, a momentum outside of 0..=1, a `VarBuilder` of another dtype than F32, F64, F16 or BF16, and whatever `vb`
/// says of missing or differing variables.
///
/// ```
/// use candle_batch_norm::layers::{instance_norm, InstanceNormConfig};
/// use candle_core::{DType, Device, ModuleT, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = InstanceNormConfig { affine: true, ..Default::default() };
/// let norm = instance_norm(3, config, vb.pp("in1"))?;
/// let x = Tensor::randn(2f32, 3.0, (8, 3, 4, 4), &Device::Cpu)?;
/// let mean = norm.forward_t(&x, true)?.mean((2, 3))?.abs()?.max_all()?;
/// assert!(mean.to_scalar::<f32>()? < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn instance_norm<C: Into<InstanceNormConfig>>(
    num_features: usize,
    config: C,
    vb: VarBuilder,
) -> Result<InstanceNorm> {
    let config = config.into();
    check_eps(NAME, config.eps)?;
    if !(0.0..=1.0).contains(&config.momentum) {
        bail!(
            "{NAME} expects a momentum from 0 to 1, got {}",
            config.momentum
        )
    }
    let (weight, bias) = parameters(NAME, &num_features.into(), [config.affine; 2], &vb)?;
    let running = |name, init| -> Result<Var> {
        Var::from_tensor(&statistics(NAME, num_features, name, init, &vb)?)
    };
    Ok(InstanceNorm {
        num_features,
        running: match config.track_running_stats {
            true => Some([running("running_mean", 0.0)?, running("running_var", 1.0)?]),
            false => None,
        },
        weight,
        bias,
        config,
    })
}

impl InstanceNorm {
    /// The weight, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    /// The bias, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The running mean `[c]`, if the layer tracks it.
    pub fn running_mean(&self) -> Option<&Tensor> {
        self.running.as_ref().map(|[mean, _]| mean.as_tensor())
    }

    /// The running variance `[c]`, the unbiased estimate, if the layer tracks it.
    pub fn running_var(&self) -> Option<&Tensor> {
        self.running.as_ref().map(|[_, var]| var.as_tensor())
    }

    /// The options that the layer was built with.
    pub fn config(&self) -> &InstanceNormConfig {
        &self.config
    }
}

impl ModuleT for InstanceNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        check_channels(NAME, self.num_features, x)?;
        let InstanceNormConfig {
            eps,
            activation,
            momentum,
            ..
        } = self.config;
        let (weight, bias) = (self.weight.as_ref(), self.bias.as_ref());
        if let (Some([mean, var]), false) = (&self.running, train) {
            let args = BatchNormArgs {
                weight,
                bias,
                activation,
                eps,
                ..BatchNormArgs::new()
            };
            return batch_norm_inference(x, mean, var, &args);
        }
        let args = RowNormArgs {
            weight,
            bias,
            activation,
            eps,
        };
        let Some([mean, var]) = &self.running else {
            return ops::instance_norm_alone(x, &args);
        };
        let (y, stats) = ops::instance_norm(x, &args)?;
        stats.update_running(Some(mean), var, momentum)?;
        Ok(y)
    }
}
