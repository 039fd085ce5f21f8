//! The gradients by candle's ops, which can be differentiated again.

use std::sync::{Arc, OnceLock};

use candle_core::{DType, Result, Tensor};

use super::op::{BatchNormOp, Slots, TensorGrads};
use super::{Activation, Dims, Spec, Wants};
use crate::ops::max_pool2d::max_pool2d_gradient;
use crate::ops::param_grads::ParamGrads;
use crate::ops::relu::through_relu;

impl BatchNormOp {
    /// What [`BatchNormOp::gradients`] gives, with gradients to the arguments and to `dy`.
    ///
    /// In F64, and with statistics that are computed from `x` anew: those of the forward pass are
    /// constants.
    pub(super) fn differentiable_gradients(
        &self,
        args: [&Tensor; 3],
        y: &Tensor,
        dy: &Tensor,
        saved: &Tensor,
        wants: Wants,
    ) -> Result<TensorGrads> {
        let [x, second, _] = args;
        let Dims { n, c, s } = self.spec.dims;
        let m = self.spec.dims.m() as f64;
        let wide = |t: &Tensor| t.to_dtype(DType::F64)?.reshape((n, c, s));
        let per_channel = |t: &Tensor| t.to_dtype(DType::F64)?.reshape((1, c, 1));
        let sum = |t: &Tensor| t.sum_keepdim((0, 2));

        let g = self.through_activation(args, y, dy, saved)?;
        let wide_g = wide(&g)?;
        let (centred, var) = match self.spec.training {
            true => {
                let x = wide(x)?;
                let centred = match self.spec.remove_mean {
                    true => x.broadcast_sub(&(sum(&x)? / m)?)?,
                    false => x,
                };
                let var = (sum(&centred.sqr()?)? / m)?;
                (centred, var)
            }
            false => {
                let centred = wide(x)?.broadcast_sub(&per_channel(&saved.get(0)?)?)?;
                (centred, per_channel(&saved.get(1)?)?)
            }
        };
        let rstd = (var + self.spec.eps)?.sqrt()?.recip()?;
        let normalised = centred.broadcast_mul(&rstd)?;
        let (dweight, dbias) = (sum(&(&wide_g * &normalised)?)?, sum(&wide_g)?);
        let dx = || -> Result<Tensor> {
            let mut d = wide_g.clone();
            if self.spec.training {
                d = (d - normalised.broadcast_mul(&(&dweight / m)?)?)?;
                if self.spec.remove_mean {
                    d = d.broadcast_sub(&(&dbias / m)?)?;
                }
            }
            let weight = match self.params {
                Slots::None | Slots::Bias => None,
                Slots::Weight | Slots::Both => Some(second.clone()),
                Slots::Packed => Some(second.get(0)?),
            };
            let scale = match weight {
                Some(weight) => (per_channel(&weight)? * &rstd)?,
                None => rstd.clone(),
            };
            d.broadcast_mul(&scale)?
                .to_dtype(x.dtype())?
                .reshape(x.shape())
        };
        let dparam = |t: &Tensor| t.reshape(c)?.to_dtype(second.dtype())?.copy();
        Ok(TensorGrads {
            dx: wants.dx.then(dx).transpose()?,
            dparams: match wants.dparams {
                true => Some(ParamGrads::Apart([dparam(&dweight)?, dparam(&dbias)?])),
                false => None,
            },
            dresidual: wants.dresidual.then_some(g),
        })
    }

    /// `dy` where it passed through the windows and the activation, in the shape of the input.
    fn through_activation(
        &self,
        args: [&Tensor; 3],
        y: &Tensor,
        dy: &Tensor,
        saved: &Tensor,
    ) -> Result<Tensor> {
        let relu = |y: &Tensor, dy: &Tensor| match self.spec.activation {
            Activation::Identity => Ok(dy.clone()),
            Activation::Relu => through_relu(y, dy),
        };
        let Some(windows) = &self.spec.windows else {
            return relu(y, dy);
        };
        let [x, second, third] = args;
        let before_windows = BatchNormOp {
            spec: Spec {
                windows: None,
                ..self.spec
            },
            given: Some((saved.get(0)?, saved.get(1)?)),
            saved: Arc::new(OnceLock::new()),
            maxima: OnceLock::new(),
            ..*self
        };
        let values = x.apply_op3_no_bwd(second, third, &before_windows)?;
        relu(&values, &max_pool2d_gradient(windows, &values, y, dy)?)
    }
}
