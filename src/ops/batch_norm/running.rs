//! The statistics of a batch, and their way into running statistics.

use candle_core::{bail, CpuStorage, DType, InplaceOp2, Layout, Result, Tensor};

/// Mean and variance of one batch, as [`batch_norm_train`](super::batch_norm_train) used them; or of
/// [`instance_norm`](crate::ops::instance_norm()) the means over the samples of theirs.
///
/// They are F64 whatever the dtype of the input, on its device, and constants to autograd.
#[derive(Debug, Clone)]
pub struct BatchStats {
    /// F64 `[2, c]`: mean, biased variance.
    stats: Tensor,
    /// Values per channel.
    count: usize,
}

impl BatchStats {
    pub(crate) fn new(stats: Tensor, count: usize) -> Self {
        Self { stats, count }
    }

    /// What there is to say of an empty batch: NaN, over 0 values.
    pub(crate) fn of_nothing(x: &Tensor) -> Result<Self> {
        let stats = Tensor::full(f64::NAN, (2, x.dims()[1]), x.device())?;
        Ok(Self::new(stats, 0))
    }

    /// The number of values per channel, `m` (of a sample, where each has its own statistics).
    pub fn count(&self) -> usize {
        self.count
    }

    /// The mean, F64 `[c]`.
    pub fn mean(&self) -> Result<Tensor> {
        // A copy: an in-place op on it must not reach what the backward pass reads.
        self.stats.get(0)?.copy()
    }

    /// The biased variance `Σ(x - mean)² / m`, F64 `[c]`.
    pub fn var(&self) -> Result<Tensor> {
        self.stats.get(1)?.copy()
    }

    /// Moves running statistics towards those of this batch, in place:
    ///
    /// ```text
    /// running_mean = (1 - momentum)·running_mean + momentum·mean
    /// running_var  = (1 - momentum)·running_var  + momentum·var·m / (m - 1)
    /// ```
    ///
    /// As in PyTorch, the running variance keeps the unbiased estimate. `None` in the place of
    /// `running_mean` leaves the mean alone. An empty batch changes nothing.
    ///
    /// # Errors
    /// A momentum outside of 0..=1, or running statistics that are not contiguous F32 or F64 `[c]`
    /// on the input's device; statistics over one value, whose unbiased variance is 0/0. Then neither
    /// of them changes.
    pub fn update_running(
        &self,
        running_mean: Option<&Tensor>,
        running_var: &Tensor,
        momentum: f64,
    ) -> Result<()> {
        if self.count == 1 {
            bail!("batch norm expects more than one value per channel for an unbiased variance, got 1")
        }
        let m = self.count as f64;
        self.move_running(running_mean, running_var, momentum, m / (m - 1.0))
    }

    /// [`update_running`](Self::update_running) with the biased variance, `var` as it is. Keras 3
    /// and Flax keep that.
    ///
    /// # Errors
    /// The same, but one value per channel is enough.
    pub fn update_running_biased(
        &self,
        running_mean: Option<&Tensor>,
        running_var: &Tensor,
        momentum: f64,
    ) -> Result<()> {
        self.move_running(running_mean, running_var, momentum, 1.0)
    }

    /// With the variance times `correction`.
    fn move_running(
        &self,
        running_mean: Option<&Tensor>,
        running_var: &Tensor,
        momentum: f64,
        correction: f64,
    ) -> Result<()> {
        if !(0.0..=1.0).contains(&momentum) {
            bail!("batch norm expects a momentum from 0 to 1, got {momentum}")
        }
        for running in running_mean.into_iter().chain([running_var]) {
            self.check(running)?;
        }
        if self.count == 0 {
            return Ok(());
        }
        if let Some(running_mean) = running_mean {
            let update = MoveTowards::new(momentum, 1.0);
            running_mean.inplace_op2(&self.stats.get(0)?, &update)?;
        }
        let update = MoveTowards::new(momentum, correction);
        running_var.inplace_op2(&self.stats.get(1)?, &update)
    }

    fn check(&self, running: &Tensor) -> Result<()> {
        let c = self.stats.dims()[1];
        let is_float = matches!(running.dtype(), DType::F32 | DType::F64);
        if running.dims() != [c] || !is_float || !running.is_contiguous() {
            bail!(
                "batch norm expects running statistics F32 or F64, contiguous, of shape [{c}], got {:?} {:?}",
                running.dtype(),
                running.layout()
            )
        }
        if !running.device().same_device(self.stats.device()) {
            bail!(
                "batch norm expects running statistics on the input's device, {:?}, got {:?}",
                self.stats.device().location(),
                running.device().location()
            )
        }
        Ok(())
    }
}

/// `running = keep·running + take·new`, in `f64`.
pub(super) struct MoveTowards {
    pub keep: f64,
    pub take: f64,
}

impl MoveTowards {
    fn new(momentum: f64, factor: f64) -> Self {
        Self {
            keep: 1.0 - momentum,
            take: momentum * factor,
        }
    }
}

impl InplaceOp2 for MoveTowards {
    fn name(&self) -> &'static str {
        "batch-norm-running"
    }

    fn cpu_fwd(
        &self,
        running: &mut CpuStorage,
        running_layout: &Layout,
        new: &CpuStorage,
        new_layout: &Layout,
    ) -> Result<()> {
        let (Some((start, end)), Some((new_start, new_end)), CpuStorage::F64(new)) = (
            running_layout.contiguous_offsets(),
            new_layout.contiguous_offsets(),
            new,
        ) else {
            bail!("batch norm expects contiguous F64 statistics")
        };
        let new = &new[new_start..new_end];
        match running {
            CpuStorage::F32(running) => {
                for (running, new) in running[start..end].iter_mut().zip(new) {
                    *running = (self.keep * f64::from(*running) + self.take * new) as f32;
                }
            }
            CpuStorage::F64(running) => {
                for (running, new) in running[start..end].iter_mut().zip(new) {
                    *running = self.keep * *running + self.take * new;
                }
            }
            _ => bail!("batch norm expects running statistics of dtype F32 or F64"),
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        running: &mut candle_core::CudaStorage,
        running_layout: &Layout,
        new: &candle_core::CudaStorage,
        new_layout: &Layout,
    ) -> Result<()> {
        super::cuda::move_towards(self, running, running_layout, new, new_layout)
    }
}
