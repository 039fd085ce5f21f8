//! The batch-norm layer.

use candle_core::{bail, DType, ModuleT, Result, Tensor, Var};
use candle_nn::{Init, VarBuilder};

use super::axis::ChannelsSecond;
use super::{BatchNormConfig, Freeze};
use crate::ops::{
    batch_norm_inference, batch_norm_train, batch_renorm_train, BatchNormArgs, BatchStats,
};
use crate::shape::check_like;

/// Batch normalisation of `[n, c, …]` over everything but the channels, with running statistics.
///
/// In training the input is normalised with the mean and the biased variance of the batch, and the
/// running statistics move towards the batch's mean and unbiased variance; in evaluation it is
/// normalised with the running statistics. [`batch_norm_train`] and [`batch_norm_inference`] have
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

/// The variables that training moves without a gradient.
#[derive(Debug, Clone)]
pub(super) struct Running {
    pub mean: Var,
    pub var: Var,
    /// I64, a scalar. Present if it is needed or if the checkpoint has it.
    pub num_batches_tracked: Option<Var>,
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
    config.check()?;
    if !matches!(
        vb.dtype(),
        DType::F32 | DType::F64 | DType::F16 | DType::BF16
    ) {
        bail!(
            "batch norm expects a VarBuilder of dtype F32, F64, F16 or BF16, got {:?}",
            vb.dtype()
        )
    }
    let running = if config.track_running_stats {
        // Running statistics in half precision would neither move by small steps nor hold a
        // variance above 65504.
        let dtype = match vb.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let get = |name, init| -> Result<Tensor> {
            let t = vb.get_with_hints_dtype(num_features, name, Init::Const(init), dtype)?;
            // A `VarMap` gives what it holds, whatever the dtype.
            match t.dtype() {
                DType::F32 | DType::F64 => Ok(t),
                held => bail!("batch norm expects a {name} of dtype F32 or F64, got {held:?}"),
            }
        };
        let counts = config.momentum.is_none()
            || config.renorm.is_some()
            || vb.contains_tensor("num_batches_tracked");
        let count =
            || vb.get_with_hints_dtype((), "num_batches_tracked", Init::Const(0.0), DType::I64);
        Some(Running {
            mean: Var::from_tensor(&get("running_mean", config.init.running_mean)?)?,
            var: Var::from_tensor(&get("running_var", config.init.running_var)?)?,
            num_batches_tracked: match counts {
                true => Some(Var::from_tensor(&count()?)?),
                false => None,
            },
        })
    } else {
        None
    };
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
            mean: statistics("running_mean", running_mean)?,
            var: statistics("running_var", running_var)?,
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
        &self.expect_running().mean
    }

    /// The running variance `[c]`: the unbiased estimate, unless the configuration says otherwise.
    ///
    /// # Panics
    /// If the layer was built without `track_running_stats`, which candle-nn does not have.
    pub fn running_var(&self) -> &Tensor {
        &self.expect_running().var
    }

    fn expect_running(&self) -> &Running {
        match &self.running {
            Some(running) => running,
            None => panic!("this batch norm was built with track_running_stats = false"),
        }
    }

    /// The number of training batches so far, an I64 scalar, if the layer keeps it.
    pub fn num_batches_tracked(&self) -> Option<&Tensor> {
        let count = self.running.as_ref()?.num_batches_tracked.as_ref()?;
        Some(count.as_tensor())
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

    /// Training: normalises with the statistics of the batch and moves the running ones.
    ///
    /// # Errors
    /// Those of [`batch_norm_train`] (with the channels in dimension 1 of the shapes that they name), and
    /// an input with another number of channels or without the dimension `axis`. After an error the
    /// running statistics are as before.
    pub fn forward_train(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_with(x, None, true)
    }

    /// `forward_t` with a tensor of the input's shape and dtype that is added before the activation:
    /// `activation(batch_norm(x) + residual)` in one pass, with a gradient for both. (A `max_pool` comes
    /// after that, in a pass of its own.)
    ///
    /// # Errors
    /// Those of `forward_t`, and a residual of another shape, dtype or device.
    pub fn forward_residual_t(&self, x: &Tensor, residual: &Tensor, train: bool) -> Result<Tensor> {
        self.forward_with(x, Some(residual), train)
    }

    fn forward_with(&self, x: &Tensor, residual: Option<&Tensor>, train: bool) -> Result<Tensor> {
        let axis = ChannelsSecond::new(x, self.config.axis)?;
        if let Some(residual) = residual {
            check_like("a residual", residual, "the input", x)?; // in the shape that was given
        }
        let given = x;
        let x = &axis.there(x)?;
        let residual = residual.map(|residual| axis.there(residual)).transpose()?;
        if x.rank() >= 2 && x.dims()[1] != self.num_features {
            bail!(
                "batch norm expects {} channels in dimension {}, got an input of shape {:?}{}",
                self.num_features,
                self.config.axis,
                given.dims(),
                match self.config.axis == 1
                    && x.rank() > 2
                    && x.dims().last() == Some(&self.num_features)
                {
                    true => "; if its channels are last, set axis to -1",
                    false => "",
                }
            )
        }
        let frozen = self.config.freeze == Freeze::StatisticsAndParameters;
        let parameter = |t: &Option<Tensor>| match t {
            Some(t) if frozen => Some(t.detach()),
            t => t.clone(),
        };
        let (weight, bias) = (parameter(&self.weight), parameter(&self.bias));
        let args = BatchNormArgs {
            weight: weight.as_ref(),
            bias: bias.as_ref(),
            residual: residual.as_ref(),
            activation: self.config.activation,
            max_pool: self.config.max_pool,
            eps: self.config.eps,
            remove_mean: self.config.remove_mean,
        };
        let train = train && self.config.freeze == Freeze::Nothing;
        let y = match &self.running {
            Some(running) if !train => batch_norm_inference(x, &running.mean, &running.var, &args)?,
            None => batch_norm_train(x, &args)?.0,
            Some(running) => {
                let (y, stats) = match &self.config.renorm {
                    None => batch_norm_train(x, &args)?,
                    Some(schedule) => {
                        let limits = schedule.limits_at(running.batches()?);
                        batch_renorm_train(x, &running.mean, &running.var, limits, &args)?
                    }
                };
                running.update(&stats, &self.config)?;
                y
            }
        };
        axis.back(y)
    }
}

impl ModuleT for BatchNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.forward_with(x, None, train)
    }
}

impl Running {
    /// Batches of training so far.
    fn batches(&self) -> Result<u64> {
        match &self.num_batches_tracked {
            Some(count) => Ok(count.to_scalar::<i64>()?.max(0) as u64),
            None => bail!("batch norm without a momentum, and renorm, expect num_batches_tracked"),
        }
    }

    /// Moves the running statistics, after the batch has been normalised without an error.
    fn update(&self, stats: &BatchStats, config: &BatchNormConfig) -> Result<()> {
        if stats.count() == 0 {
            return Ok(());
        }
        let momentum = match config.momentum {
            Some(momentum) => momentum,
            None => 1.0 / (self.batches()? + 1) as f64,
        };
        let mean = config.remove_mean.then_some(self.mean.as_tensor());
        match config.unbiased_running_var {
            true => stats.update_running(mean, &self.var, momentum)?,
            false => stats.update_running_biased(mean, &self.var, momentum)?,
        }
        if let Some(count) = &self.num_batches_tracked {
            count.set(&(count.as_tensor() + 1.0)?)?;
        }
        Ok(())
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
