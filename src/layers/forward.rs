//! What a batch-norm layer does to its input.

use candle_core::{bail, ModuleT, Result, Tensor};

use super::axis::ChannelsSecond;
use super::mask::Positions;
use super::{BatchNorm, Freeze};
use crate::ops::{batch_norm_inference, batch_norm_train, batch_renorm_train, BatchNormArgs};
use crate::shape::check_like;

impl BatchNorm {
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

    /// `forward_t` of the positions for which there is a value, all others being padding.
    ///
    /// `mask` is U8, not 0 where the values of `x` are real ones, in the shape of `x` without its channels:
    /// `[n, …]`, or with a 1 in the place of dimensions along which it is the same. With `m'` such positions,
    /// the result at them is that of `forward_t` for an input `[m', c]`: statistics, running statistics (with
    /// the unbiased variance over `m'` values) and gradients are those of the real values alone. At all other
    /// positions the output is 0, and so is the gradient of `x`: whatever stands there, NaN too, reaches
    /// nothing. Without any real value the output is 0 without a gradient, and nothing changes.
    ///
    /// The positions are counted on the host, which on CUDA waits for the mask, and rows of channels are copied
    /// together and back. A mask without a 0 is `forward_t`.
    ///
    /// Keras: `BatchNormalization()(x, mask=mask)`, Flax: `BatchNorm()(x, mask=mask)`; there the masked
    /// positions are normalised like the others and pass on gradients, and theirs is on the user to drop.
    ///
    /// # Errors
    /// Those of `forward_t`, those for a single value per channel among them; a mask of another shape, dtype or
    /// device; a layer with a `max_pool`.
    ///
    /// ```
    /// use candle_batch_norm::batch_norm;
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = VarMap::new();
    /// let bn = batch_norm(1, 1e-12, VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu))?;
    /// let x = Tensor::new(&[[[1f64, 3.0, f64::NAN]], [[3.0, 1.0, 100.0]]], &Device::Cpu)?; // [n, c, length]
    /// let mask = Tensor::new(&[[1u8, 1, 0]], &Device::Cpu)?; // as long for all
    /// let y = bn.forward_masked_t(&x, &mask, true)?.flatten_all()?.to_vec1::<f64>()?;
    /// for (y, expected) in y.iter().zip([-1.0, 1.0, 0.0, 1.0, -1.0, 0.0]) {
    ///     assert!((y - expected).abs() < 1e-9);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn forward_masked_t(&self, x: &Tensor, mask: &Tensor, train: bool) -> Result<Tensor> {
        if self.config.max_pool.is_some() {
            bail!("batch norm expects no max_pool for an input with a mask")
        }
        let (axis, channels_second) = self.channels_second(x)?;
        let Some(positions) = Positions::of(mask, &channels_second)? else {
            return self.forward_with(x, None, train);
        };
        let rows = positions.rows(&channels_second)?;
        let y = match rows {
            Some(rows) => positions.back(&self.normalise(&rows, None, train)?, &channels_second)?,
            None => channels_second.zeros_like()?,
        };
        axis.back(y)
    }

    fn forward_with(&self, x: &Tensor, residual: Option<&Tensor>, train: bool) -> Result<Tensor> {
        if let Some(residual) = residual {
            check_like("batch norm", "a residual", residual, "the input", x)?; // in the shape that was given
        }
        let (axis, x) = self.channels_second(x)?;
        let residual = residual.map(|residual| axis.there(residual)).transpose()?;
        axis.back(self.normalise(&x, residual.as_ref(), train)?)
    }

    /// The input with its channels, of which there are enough, in dimension 1.
    fn channels_second(&self, given: &Tensor) -> Result<(ChannelsSecond, Tensor)> {
        let axis = ChannelsSecond::new(given, self.config.axis)?;
        let x = axis.there(given)?;
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
        Ok((axis, x))
    }

    fn normalise(&self, x: &Tensor, residual: Option<&Tensor>, train: bool) -> Result<Tensor> {
        let frozen = self.config.freeze == Freeze::StatisticsAndParameters;
        let parameter = |t: &Option<Tensor>| match t {
            Some(t) if frozen => Some(t.detach()),
            t => t.clone(),
        };
        let (weight, bias) = (parameter(&self.weight), parameter(&self.bias));
        let args = BatchNormArgs {
            weight: weight.as_ref(),
            bias: bias.as_ref(),
            residual,
            activation: self.config.activation,
            max_pool: self.config.max_pool,
            eps: self.config.eps,
            remove_mean: self.config.remove_mean,
        };
        let train = train && self.config.freeze == Freeze::Nothing;
        match &self.running {
            Some(running) if !train => batch_norm_inference(x, &running.mean, &running.var, &args),
            None => Ok(batch_norm_train(x, &args)?.0),
            Some(running) => {
                let (y, stats) = match &self.config.renorm {
                    None => batch_norm_train(x, &args)?,
                    Some(schedule) => {
                        let limits = schedule.limits_at(running.batches()?);
                        batch_renorm_train(x, &running.mean, &running.var, limits, &args)?
                    }
                };
                running.update(&stats, &self.config)?;
                Ok(y)
            }
        }
    }
}

impl ModuleT for BatchNorm {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.forward_with(x, None, train)
    }
}
