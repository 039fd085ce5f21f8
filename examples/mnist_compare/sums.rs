//! Loss and right answers of an epoch.

use candle_core::{DType, Result, Tensor};

/// After so many steps the sums come from the device; each time costs it a pause.
pub const STEPS_BETWEEN_READS: usize = 20;

/// Summed on the device and read from time to time.
#[derive(Default)]
pub struct Sums {
    on_device: Option<(Tensor, Tensor)>,
    loss: f64,
    right: f64,
    count: usize,
}

impl Sums {
    pub fn add(&mut self, logits: &Tensor, labels: &Tensor, loss: &Tensor) -> Result<()> {
        let count = labels.elem_count();
        let loss = (loss.detach() * count as f64)?;
        let right = logits
            .detach()
            .argmax(1)?
            .eq(labels)?
            .to_dtype(DType::F32)?
            .sum_all()?;
        self.count += count;
        self.on_device = Some(match &self.on_device {
            None => (loss, right),
            Some((loss_sum, right_sum)) => ((loss_sum + loss)?, (right_sum + right)?),
        });
        Ok(())
    }

    pub fn read(&mut self) -> Result<()> {
        if let Some((loss, right)) = self.on_device.take() {
            self.loss += f64::from(loss.to_scalar::<f32>()?);
            self.right += f64::from(right.to_scalar::<f32>()?);
        }
        Ok(())
    }

    /// Mean loss and accuracy, once all that was added has been read.
    pub fn mean(&self) -> (f64, f64) {
        let count = self.count.max(1) as f64;
        (self.loss / count, self.right / count)
    }
}
