//! Batch norm with statistics for each step of a sequence.

use candle_core::{bail, Result, Tensor};
use candle_nn::VarBuilder;

use super::batch_norm::{build, running};
use super::running::Running;
use super::{BatchNorm, BatchNormConfig, Freeze};

/// Batch norm in a recurrent network: a [`BatchNorm`] for each step of a sequence, which share weight and bias
/// and have running statistics of their own.
///
/// The first steps of a sequence have other statistics than later ones, so that one pair for all would serve
/// none. Steps from the last one on share the last one's: in training each of them is normalised with its own
/// batch and moves those running statistics.
///
/// Built by [`batch_norm_steps`]. Source: Cooijmans et al. 2016, <https://arxiv.org/abs/1603.09025>, section 3.
#[derive(Debug, Clone)]
pub struct BatchNormSteps {
    steps: Vec<BatchNorm>,
    /// Of all steps.
    running: Option<Running>,
}

/// Builds a layer for `num_features` channels and so many steps, with its variables from `vb`.
///
/// `weight` and `bias` are `[num_features]` as those of [`batch_norm`](super::batch_norm()); `running_mean` and
/// `running_var` are `[steps, num_features]`, and `num_batches_tracked`, where it is needed, `[steps]`.
///
/// # Errors
/// Those of `batch_norm`, and no steps at all.
///
/// ```
/// use candle_batch_norm::layers::batch_norm_steps;
/// use candle_core::{DType, Device, ModuleT, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let bn = batch_norm_steps(8, 10, 1e-5, vb)?;
/// for step in 0..12 {
///     let x = Tensor::randn(step as f32, 1.0, (32, 8), &Device::Cpu)?;
///     let y = bn.at(step).forward_t(&x, true)?;
///     assert_eq!(y.dims(), x.dims());
/// }
/// assert_eq!(bn.running_mean().dims(), &[10, 8]);
/// # Ok(())
/// # }
/// ```
pub fn batch_norm_steps<C: Into<BatchNormConfig>>(
    num_features: usize,
    steps: usize,
    config: C,
    vb: VarBuilder,
) -> Result<BatchNormSteps> {
    if steps == 0 {
        bail!("batch norm of steps expects at least one, got 0")
    }
    let config = config.into();
    let running = running(&[steps], num_features, &config, &vb)?;
    let layer = build(num_features, None, config, &vb)?;
    let step = |index| -> Result<BatchNorm> {
        Ok(BatchNorm {
            running: running.as_ref().map(|all| all.row(index)).transpose()?,
            ..layer.clone()
        })
    };
    Ok(BatchNormSteps {
        steps: (0..steps).map(step).collect::<Result<_>>()?,
        running,
    })
}

impl BatchNormSteps {
    /// The layer of a step, counted from 0; the last one for all steps behind it.
    pub fn at(&self, step: usize) -> &BatchNorm {
        &self.steps[step.min(self.steps.len() - 1)]
    }

    /// The number of steps with statistics of their own.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }

    /// The running means, `[steps, c]`.
    ///
    /// # Panics
    /// If the layer was built without `track_running_stats`.
    pub fn running_mean(&self) -> &Tensor {
        &Running::expect(&self.running).mean
    }

    /// The running variances, `[steps, c]`.
    ///
    /// # Panics
    /// If the layer was built without `track_running_stats`.
    pub fn running_var(&self) -> &Tensor {
        &Running::expect(&self.running).var
    }

    /// The numbers of training batches so far, I64 `[steps]`, if the layer keeps them.
    pub fn num_batches_tracked(&self) -> Option<&Tensor> {
        self.running.as_ref()?.num_batches_tracked.as_ref()
    }

    /// [`BatchNorm::set_freeze`] for all steps.
    ///
    /// # Errors
    /// A layer without running statistics has nothing to keep.
    pub fn set_freeze(&mut self, freeze: Freeze) -> Result<()> {
        self.steps
            .iter_mut()
            .try_for_each(|step| step.set_freeze(freeze))
    }
}
