//! What can be chosen about a batch-norm layer.

use candle_core::{bail, Result};

use crate::ops::{Activation, RenormLimits};
use crate::shape::check_eps;

/// What a layer keeps as it is during training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Freeze {
    /// Nothing: the usual training.
    #[default]
    Nothing,
    /// The running statistics, which are then used in training too. Weight and bias still train.
    Statistics,
    /// The running statistics, and weight and bias, which get no gradient. The input still does.
    /// The counterpart of torchvision's `FrozenBatchNorm2d`.
    StatisticsAndParameters,
}

/// What the variables of a new layer begin as; what a `VarMap` or a checkpoint holds is left alone.
/// Keras: `gamma_initializer`, `beta_initializer`, `moving_mean_initializer` and
/// `moving_variance_initializer`, as far as they are constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InitialValues {
    /// 1 by default. With 0 in the last norm of each residual branch, a network begins as its shortcuts.
    pub weight: f64,
    /// 0 by default.
    pub bias: f64,
    /// 0 by default.
    pub running_mean: f64,
    /// 1 by default.
    pub running_var: f64,
}

impl Default for InitialValues {
    fn default() -> Self {
        Self {
            weight: 1.0,
            bias: 0.0,
            running_mean: 0.0,
            running_var: 1.0,
        }
    }
}

/// When batch renormalisation comes in: from batch norm to wide [limits](RenormLimits), in steps of
/// training.
///
/// ```text
/// r_max(step) = 1 before `begin`, then linearly to `limits.r_max` at `r_end`
/// d_max(step) = 0 before `begin`, then linearly to `limits.d_max` at `d_end`
/// ```
///
/// The defaults are those of the paper's experiments (Ioffe 2017, section 4): 3 and 5, from step 5000 to
/// 40,000 and 25,000.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RenormSchedule {
    /// In the end.
    pub limits: RenormLimits,
    /// Batches that are trained as with batch norm.
    pub begin: u64,
    /// From this batch on `r_max` is as in `limits`.
    pub r_end: u64,
    /// From this batch on `d_max` is as in `limits`.
    pub d_end: u64,
}

impl Default for RenormSchedule {
    fn default() -> Self {
        Self {
            limits: RenormLimits {
                r_max: 3.0,
                d_max: 5.0,
            },
            begin: 5_000,
            r_end: 40_000,
            d_end: 25_000,
        }
    }
}

impl RenormSchedule {
    /// The same limits from the first batch on.
    pub fn constant(limits: RenormLimits) -> Self {
        Self {
            limits,
            begin: 0,
            r_end: 0,
            d_end: 0,
        }
    }

    /// The limits for a batch, after so many others.
    pub fn limits_at(&self, step: u64) -> RenormLimits {
        if step < self.begin {
            return RenormLimits::NONE;
        }
        let between = |from: f64, to: f64, end: u64| match step {
            step if step >= end => to,
            step if step == self.begin => from, // also where `to` is infinite
            step => from + (to - from) * (step - self.begin) as f64 / (end - self.begin) as f64,
        };
        let RenormLimits { r_max, d_max } = self.limits;
        RenormLimits {
            r_max: between(1.0, r_max, self.r_end),
            d_max: between(0.0, d_max, self.d_end),
        }
    }
}

/// The options of [`batch_norm`](crate::batch_norm); the defaults are PyTorch's and candle-nn's.
///
/// A bare `f64` converts into a configuration with that `eps`, and so does
/// `candle_nn::BatchNormConfig`.
///
/// ```
/// use candle_batch_norm::BatchNormConfig;
/// let config = BatchNormConfig { momentum: None, ..BatchNormConfig::default() };
/// assert_eq!(BatchNormConfig::from(1e-3).eps, 1e-3);
/// assert_eq!(config.affine, true);
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchNormConfig {
    /// Added to the variance under the root. PyTorch: `eps`.
    pub eps: f64,
    /// Without it, the mean counts as 0: the input is only scaled. As in candle-nn.
    pub remove_mean: bool,
    /// Whether there are learned parameters at all: `weight` and `bias`, as the next two fields
    /// say. PyTorch: `affine`.
    pub affine: bool,
    /// Whether there is a `weight` (γ), given `affine`. Keras: `scale`.
    pub weight: bool,
    /// Whether there is a `bias` (β), given `affine`. Keras: `center`.
    pub bias: bool,
    /// How much of the new value goes into the running statistics:
    /// `running = (1 - momentum)·running + momentum·new`. `None` is the average over all batches
    /// so far, counted in the variable `num_batches_tracked`. PyTorch: `momentum`; Keras' momentum
    /// is `1 - momentum`.
    pub momentum: Option<f64>,
    /// Without it there are no running statistics, and those of the batch are used in evaluation
    /// too. PyTorch: `track_running_stats`.
    pub track_running_stats: bool,
    /// Applied to the output in the same pass.
    pub activation: Activation,
    /// Takes the maximum over windows of so many pixels in each direction, after the activation, in the
    /// same pass where that can be: [`BatchNormArgs::max_pool`](crate::ops::BatchNormArgs::max_pool).
    /// Its gradient is PyTorch's; that of candle 0.11's own `max_pool2d` is a quarter of it for 2×2.
    pub max_pool: Option<usize>,
    /// What stays as it is in training.
    pub freeze: Freeze,
    /// The dimension of the input that holds the channels; −1 is the last, −2 the one before. A
    /// contiguous input with its channels last is not copied, unless there is a `max_pool`; with channels
    /// in other dimensions than 1 it is. Keras: `axis`.
    pub axis: isize,
    /// Whether `running_var` moves towards the unbiased variance of a batch, as in PyTorch, or towards
    /// the biased one, as in Keras 3 and Flax. The output of training is the same.
    pub unbiased_running_var: bool,
    /// What new variables begin as.
    pub init: InitialValues,
    /// Batch renormalisation in training, for small batches and such as are not drawn at random:
    /// [`batch_renorm_train`](crate::ops::batch_renorm_train). Batches are counted in
    /// `num_batches_tracked`, which a checkpoint then has to have and which is read at every step: on
    /// CUDA a pause. Evaluation is that of batch norm.
    pub renorm: Option<RenormSchedule>,
}

impl Default for BatchNormConfig {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            remove_mean: true,
            affine: true,
            weight: true,
            bias: true,
            momentum: Some(0.1),
            track_running_stats: true,
            activation: Activation::Identity,
            max_pool: None,
            freeze: Freeze::Nothing,
            axis: 1,
            unbiased_running_var: true,
            init: InitialValues::default(),
            renorm: None,
        }
    }
}

impl From<f64> for BatchNormConfig {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Self::default()
        }
    }
}

impl From<candle_nn::BatchNormConfig> for BatchNormConfig {
    fn from(config: candle_nn::BatchNormConfig) -> Self {
        Self {
            eps: config.eps,
            remove_mean: config.remove_mean,
            affine: config.affine,
            momentum: Some(config.momentum),
            ..Self::default()
        }
    }
}

impl BatchNormConfig {
    /// The defaults of Keras 3's `BatchNormalization`: `eps` of 1e-3, Keras' momentum of 0.99 (here
    /// 0.01), the channels last, and a running variance that keeps the biased estimate.
    ///
    /// ```
    /// use candle_batch_norm::{batch_norm, BatchNormConfig};
    /// use candle_core::{DType, Device, ModuleT, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = VarMap::new();
    /// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    /// let bn = batch_norm(3, BatchNormConfig::keras(), vb)?;
    /// let images = Tensor::randn(0f32, 1.0, (8, 4, 4, 3), &Device::Cpu)?;
    /// assert_eq!(bn.forward_t(&images, true)?.dims(), &[8, 4, 4, 3]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn keras() -> Self {
        Self {
            eps: 1e-3,
            momentum: Some(1.0 - 0.99),
            axis: -1,
            unbiased_running_var: false,
            ..Self::default()
        }
    }

    pub(super) fn with_momentum(eps: f64, momentum: f64) -> Self {
        Self {
            eps,
            momentum: Some(momentum),
            ..Self::default()
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        check_eps("batch norm", self.eps)?;
        if let Some(momentum) = self.momentum {
            if !(0.0..=1.0).contains(&momentum) {
                bail!("batch norm expects a momentum from 0 to 1, got {momentum}")
            }
        }
        if let Some(schedule) = &self.renorm {
            schedule.limits.check()?;
            if schedule.begin > schedule.r_end.min(schedule.d_end) {
                bail!("batch renorm expects a schedule that ends after it begins, got {schedule:?}")
            }
            if !self.track_running_stats || !self.remove_mean {
                bail!("batch renorm expects track_running_stats and remove_mean")
            }
        }
        let InitialValues {
            weight,
            bias,
            running_mean,
            running_var,
        } = self.init;
        if running_var < 0.0 || !(weight + bias + running_mean + running_var).is_finite() {
            bail!(
                "batch norm expects finite initial values and a running_var >= 0, got {:?}",
                self.init
            )
        }
        if self.max_pool == Some(0) {
            bail!("batch norm expects a max_pool of at least 1, got 0")
        }
        if self.freeze != Freeze::Nothing && !self.track_running_stats {
            bail!(
                "batch norm expects track_running_stats for {:?}: there are no statistics to keep",
                self.freeze
            )
        }
        Ok(())
    }
}
