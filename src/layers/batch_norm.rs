//! The batch-norm layer.

use candle_core::{bail, DType, Result, Tensor, Var};
use candle_nn::{Init, VarBuilder};

use super::parameters::check_dtype;
use super::running::Running;
use super::{BatchNormConfig, Freeze};

/// Batch normalisation of `[n, c, …]` over everything but the channels, with running statistics.
///
/// In training the input is normalised with the mean and the biased variance of the batch, and the
/// running statistics move towards the batch's mean and unbiased variance; in evaluation it is
/// normalised with the running statistics. [`batch_norm_train`](crate::ops::batch_norm_train) and [`batch_norm_inference`](crate::ops::batch_norm_inference) have
/// the formulas, gradients, dtypes and layouts. [`BatchNormConfig`] has what may be otherwise: where the
/// channels are, which variance is kept, renormalisation, and more.
///
/// Built by [`batch_norm`] from a `VarBuilder`, or from tensors by [`BatchNorm::new`] and its
/// relatives, whose signatures are candle-nn's. PyTorch: `torch.nn.BatchNorm1d`, `2d` and `3d`.
#[derive(Debug, Clone)]
pub struct BatchNorm {
    pub(super) num_features: usize,
    pub(super) running: Option<Running>,
    pub(super) weight: Option<Tensor>,
    pub(super) bias: Option<Tensor>,
    pub(super) config: BatchNormConfig,
}

/// Builds a layer for `num_features` channels, with its variables from `vb`.
///
/// The names are PyTorch's and candle-nn's: `running_mean`, `running_var`, `weight`, `bias`, each
/// `[num_features]`, and `num_batches_tracked` if the momentum is `None`, for `renorm` or if `vb` has it. Weight and
/// bias have the dtype of `vb`; the running statistics are F32, or F64 if that is the dtype.
///
/// # Errors
/// A configuration out of range, and whatever `vb` says of missing or differing variables.
///
/// ```
/// use candle_batch_norm::batch_norm;
/// use candle_core::{DType, Device, ModuleT, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let bn = batch_norm(3, 1e-5, vb.pp("bn1"))?;
/// let x = Tensor::randn(2f32, 3.0, (8, 3, 4, 4), &Device::Cpu)?;
/// let y = bn.forward_t(&x, true)?;
/// let mean = y.mean((0, 2, 3))?.to_vec1::<f32>()?;
/// assert!(mean.iter().all(|mean| mean.abs() < 1e-5));
/// # Ok(())
/// # }
/// ```
pub fn batch_norm<C: Into<BatchNormConfig>>(
    num_features: usize,
    config: C,
    vb: VarBuilder,
) -> Result<BatchNorm> {
    let config = config.into();
    let running = running(&[], num_features, &config, &vb)?;
    build(num_features, running, config, &vb)
}

/// The running statistics of layers with this configuration, which is checked, if they have any.
pub(super) fn running(
    repeated: &[usize],
    num_features: usize,
    config: &BatchNormConfig,
    vb: &VarBuilder,
) -> Result<Option<Running>> {
    config.check()?;
    check_dtype("batch norm", vb)?;
    let tracked = config.track_running_stats;
    tracked
        .then(|| Running::build(repeated, num_features, config, vb))
        .transpose()
}

/// A layer with running statistics that are there, and weight and bias from `vb`.
pub(super) fn build(
    num_features: usize,
    running: Option<Running>,
    config: BatchNormConfig,
    vb: &VarBuilder,
) -> Result<BatchNorm> {
    let parameter = |present: bool, name, init| match present && config.affine {
        true => vb
            .get_with_hints(num_features, name, Init::Const(init))
            .map(Some),
        false => Ok(None),
    };
    Ok(BatchNorm {
        num_features,
        running,
        weight: parameter(config.weight, "weight", config.init.weight)?,
        bias: parameter(config.bias, "bias", config.init.bias)?,
        config,
    })
}

impl BatchNorm {
    /// A layer with all of its tensors given, each `[num_features]`, and candle-nn's momentum of 0.1.
    ///
    /// # Errors
    /// Tensors of another shape, running statistics that are no floats, `eps < 0` or NaN. Statistics
    /// in half precision are converted to F32.
    pub fn new(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
    ) -> Result<Self> {
        let parameters = Some((weight, bias));
        Self::from_tensors(
            num_features,
            running_mean,
            running_var,
            parameters,
            eps.into(),
        )
    }

    /// [`BatchNorm::new`] without weight and bias.
    pub fn new_no_bias(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
    ) -> Result<Self> {
        Self::from_tensors(num_features, running_mean, running_var, None, eps.into())
    }

    /// [`BatchNorm::new`] with a momentum.
    pub fn new_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let parameters = Some((weight, bias));
        let config = BatchNormConfig::with_momentum(eps, momentum);
        Self::from_tensors(num_features, running_mean, running_var, parameters, config)
    }

    /// [`BatchNorm::new_no_bias`] with a momentum.
    pub fn new_no_bias_with_momentum(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        eps: f64,
        momentum: f64,
    ) -> Result<Self> {
        let config = BatchNormConfig::with_momentum(eps, momentum);
        Self::from_tensors(num_features, running_mean, running_var, None, config)
    }

    pub(super) fn from_tensors(
        num_features: usize,
        running_mean: Tensor,
        running_var: Tensor,
        parameters: Option<(Tensor, Tensor)>,
        config: BatchNormConfig,
    ) -> Result<Self> {
        let config = BatchNormConfig {
            affine: parameters.is_some(),
            ..config
        };
        config.check()?;
        let statistics = |what: &str, tensor: Tensor| -> Result<Var> {
            check_shape(what, &tensor, num_features)?;
            match tensor.dtype() {
                DType::F32 | DType::F64 => Var::from_tensor(&tensor),
                DType::F16 | DType::BF16 => Var::from_tensor(&tensor.to_dtype(DType::F32)?),
                dtype => bail!("batch norm expects a floating-point {what}, got {dtype:?}"),
            }
        };
        let running = Running {
            mean: statistics("running_mean", running_mean)?.into_inner(),
            var: statistics("running_var", running_var)?.into_inner(),
            num_batches_tracked: None,
        };
        let (weight, bias) = parameters.unzip();
        for (what, tensor) in [("weight", &weight), ("bias", &bias)] {
            if let Some(tensor) = tensor {
                check_shape(what, tensor, num_features)?;
            }
        }
        Ok(Self {
            num_features,
            running: Some(running),
            weight,
            bias,
            config,
        })
    }

    /// The running mean, `[c]`.
    ///
    /// # Panics
    /// If the layer was built without `track_running_stats`, which candle-nn does not have.
    pub fn running_mean(&self) -> &Tensor {
        &Running::expect(&self.running).mean
    }

    /// The running variance `[c]`: the unbiased estimate, unless the configuration says otherwise.
    ///
    /// # Panics
    /// If the layer was built without `track_running_stats`, which candle-nn does not have.
    pub fn running_var(&self) -> &Tensor {
        &Running::expect(&self.running).var
    }

    /// The number of training batches so far, an I64 scalar, if the layer keeps it.
    pub fn num_batches_tracked(&self) -> Option<&Tensor> {
        let count = self.running.as_ref()?.num_batches_tracked.as_ref()?;
        Some(count)
    }

    /// What is added to the variance under the root.
    pub fn eps(&self) -> f64 {
        self.config.eps
    }

    /// PyTorch's momentum; `None` is the cumulative average.
    pub fn momentum(&self) -> Option<f64> {
        self.config.momentum
    }

    /// Weight and bias `[c]`, if the layer has both.
    pub fn weight_and_bias(&self) -> Option<(&Tensor, &Tensor)> {
        self.weight.as_ref().zip(self.bias.as_ref())
    }

    /// The weight `[c]` (γ), if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    /// The bias `[c]` (β), if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The options that the layer was built with.
    pub fn config(&self) -> &BatchNormConfig {
        &self.config
    }

    /// Keeps parts of the layer as they are from now on, or ([`Freeze::Nothing`]) trains all of it.
    ///
    /// # Errors
    /// A layer without running statistics has nothing to keep.
    pub fn set_freeze(&mut self, freeze: Freeze) -> Result<()> {
        let config = BatchNormConfig {
            freeze,
            ..self.config
        };
        config.check()?;
        self.config = config;
        Ok(())
    }

    /// The layer with [`BatchNormConfig::max_pool`].
    pub(crate) fn with_max_pool(mut self, kernel: usize) -> Self {
        self.config.max_pool = Some(kernel);
        self
    }
}

fn check_shape(what: &str, tensor: &Tensor, num_features: usize) -> Result<()> {
    if tensor.dims() != [num_features] {
        bail!(
            "batch norm expects a {what} of shape [{num_features}], got {:?}",
            tensor.dims()
        )
    }
    Ok(())
}
