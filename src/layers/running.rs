//! Running statistics.

use candle_core::{bail, DType, Result, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder};

use super::parameters::statistics;
use super::BatchNormConfig;
use crate::ops::BatchStats;

/// The variables that training moves without a gradient.
#[derive(Debug, Clone)]
pub(super) struct Running {
    pub mean: Tensor,
    pub var: Tensor,
    /// I64, a scalar. Present if it is needed or if the checkpoint has it.
    pub num_batches_tracked: Option<Var>,
}

impl Running {
    /// From `vb`, with the shape of the statistics.
    pub fn build(
        shape: impl Into<Shape>,
        config: &BatchNormConfig,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let shape = shape.into();
        let get = |name, init| -> Result<Tensor> {
            let t = statistics("batch norm", shape.clone(), name, init, vb)?;
            Ok(Var::from_tensor(&t)?.into_inner())
        };
        let counts = config.momentum.is_none()
            || config.renorm.is_some()
            || vb.contains_tensor("num_batches_tracked");
        let count =
            || vb.get_with_hints_dtype((), "num_batches_tracked", Init::Const(0.0), DType::I64);
        Ok(Self {
            mean: get("running_mean", config.init.running_mean)?,
            var: get("running_var", config.init.running_var)?,
            num_batches_tracked: match counts {
                true => Some(Var::from_tensor(&count()?)?),
                false => None,
            },
        })
    }

    /// Batches of training so far.
    pub fn batches(&self) -> Result<u64> {
        match &self.num_batches_tracked {
            Some(count) => Ok(count.to_scalar::<i64>()?.max(0) as u64),
            None => bail!("batch norm without a momentum, and renorm, expect num_batches_tracked"),
        }
    }

    /// Moves the running statistics, after the batch has been normalised without an error.
    pub fn update(&self, stats: &BatchStats, config: &BatchNormConfig) -> Result<()> {
        if stats.count() == 0 {
            return Ok(());
        }
        let momentum = match config.momentum {
            Some(momentum) => momentum,
            None => 1.0 / (self.batches()? + 1) as f64,
        };
        let mean = config.remove_mean.then_some(&self.mean);
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
