//! From candle-nn's layer and to it.

use candle_core::{bail, Result};

use super::{BatchNorm, BatchNormConfig, Freeze};
use crate::ops::Activation;

/// Takes the tensors over: running statistics and parameters are shared with the original, save
/// statistics in half precision, which are converted.
///
/// candle-nn does not tell whether its layer removes the mean; the usual `true` is assumed.
impl TryFrom<&candle_nn::BatchNorm> for BatchNorm {
    type Error = candle_core::Error;

    fn try_from(bn: &candle_nn::BatchNorm) -> Result<Self> {
        let running_mean = bn.running_mean().clone();
        let config = BatchNormConfig::with_momentum(bn.eps(), bn.momentum());
        let parameters = bn.weight_and_bias().map(|(w, b)| (w.clone(), b.clone()));
        Self::from_tensors(
            running_mean.elem_count(),
            running_mean,
            bn.running_var().clone(),
            parameters,
            config,
        )
    }
}

/// Gives a layer to code that takes candle-nn's, such as `Conv2d::absorb_bn`. The tensors are
/// shared; an absent weight or bias becomes ones or zeros where the other is present.
///
/// # Errors
/// What candle-nn's layer cannot express: no running statistics, a momentum of `None`, a fused
/// activation or pooling, an input whose mean is not removed, freezing, channels in another
/// dimension than 1, a running variance that is biased, renormalisation.
impl TryFrom<&BatchNorm> for candle_nn::BatchNorm {
    type Error = candle_core::Error;

    fn try_from(bn: &BatchNorm) -> Result<Self> {
        let config = &bn.config;
        let Some(running) = &bn.running else {
            bail!("candle_nn::BatchNorm needs running statistics, and this layer tracks none")
        };
        let Some(momentum) = config.momentum else {
            bail!("candle_nn::BatchNorm needs a momentum, and this layer averages cumulatively")
        };
        if config.activation != Activation::Identity
            || config.max_pool.is_some()
            || !config.remove_mean
            || config.freeze != Freeze::Nothing
            || config.axis != 1
            || !config.unbiased_running_var
            || config.renorm.is_some()
        {
            bail!(
                "candle_nn::BatchNorm cannot carry {:?}, max_pool {:?}, remove_mean = {}, freeze {:?}, \
                 axis {}, unbiased_running_var = {}, renorm {:?}",
                config.activation,
                config.max_pool,
                config.remove_mean,
                config.freeze,
                config.axis,
                config.unbiased_running_var,
                config.renorm
            )
        }
        let (mean, var) = (running.mean.clone(), running.var.clone());
        let (weight, bias) = match (&bn.weight, &bn.bias) {
            (None, None) => {
                return Self::new_no_bias_with_momentum(
                    bn.num_features,
                    mean,
                    var,
                    config.eps,
                    momentum,
                )
            }
            (Some(weight), Some(bias)) => (weight.clone(), bias.clone()),
            (Some(weight), None) => (weight.clone(), weight.zeros_like()?),
            (None, Some(bias)) => (bias.ones_like()?, bias.clone()),
        };
        Self::new_with_momentum(
            bn.num_features,
            mean,
            var,
            weight,
            bias,
            config.eps,
            momentum,
        )
    }
}
