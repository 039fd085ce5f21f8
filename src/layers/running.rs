//! Running statistics.

use candle_core::{bail, DType, Error, Result, Tensor, Var};
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
    pub num_batches_tracked: Option<Tensor>,
}

impl Running {
    /// From `vb`, for `num_features` channels: as many times as `repeated` says, all in the same variables, of
    /// which each layer gets its [row](Running::row).
    pub fn build(
        repeated: &[usize],
        num_features: usize,
        config: &BatchNormConfig,
        vb: &VarBuilder,
    ) -> Result<Self> {
        let shape = [repeated, &[num_features]].concat();
        let variable = |t: Tensor| Ok::<_, Error>(Var::from_tensor(&t)?.into_inner());
        let get = |name, init| -> Result<Tensor> {
            variable(statistics("batch norm", &shape[..], name, init, vb)?)
        };
        let counts = config.momentum.is_none()
            || config.renorm.is_some()
            || vb.contains_tensor("num_batches_tracked");
        let count = || {
            let name = "num_batches_tracked";
            vb.get_with_hints_dtype(repeated, name, Init::Const(0.0), DType::I64)
        };
        Ok(Self {
            mean: get("running_mean", config.init.running_mean)?,
            var: get("running_var", config.init.running_var)?,
            num_batches_tracked: match counts {
                true => Some(variable(count()?)?),
                false => None,
            },
        })
    }

    /// Those that a layer was asked for.
    ///
    /// # Panics
    /// If it has none.
    pub fn expect(running: &Option<Self>) -> &Self {
        match running {
            Some(running) => running,
            None => panic!("this batch norm was built with track_running_stats = false"),
        }
    }

    /// Those of one layer among several, in the same memory.
    pub fn row(&self, index: usize) -> Result<Self> {
        let row = |t: &Tensor| Ok::<_, Error>(t.get(index)?.detach());
        Ok(Self {
            mean: row(&self.mean)?,
            var: row(&self.var)?,
            num_batches_tracked: self.num_batches_tracked.as_ref().map(row).transpose()?,
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
            let next = (count + 1.0)?.reshape(1)?;
            count.reshape(1)?.slice_set(&next, 0, 0)?;
        }
        Ok(())
    }
}
