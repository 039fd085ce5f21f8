//! The gradients by candle's ops, which can be differentiated again.

use candle_core::{DType, Result, Tensor};

use super::op::{RowNormOp, TensorGrads};
use super::{Activation, Wants};
use crate::dims::Rows;
use crate::ops::param_grads::ParamGrads;
use crate::ops::relu::through_relu;

impl RowNormOp {
    /// The gradients, with gradients to the arguments and to `dy`: in F64, with statistics that are
    /// computed from `x` anew.
    pub(super) fn differentiable_gradients(
        &self,
        [x, weight, bias]: [&Tensor; 3],
        y: &Tensor,
        dy: &Tensor,
        wants: Wants,
    ) -> Result<TensorGrads> {
        let Rows { n, groups, c, s } = self.spec.rows;
        let m = self.spec.rows.len() as f64;
        let wide = |t: &Tensor| -> Result<Tensor> {
            let t = t.to_dtype(DType::F64)?;
            match self.spec.channels_last {
                true => t.reshape((n, s, groups, c / groups))?.permute((0, 2, 3, 1)),
                false => t.reshape((n, groups, c / groups, s)),
            }
        };
        let row_mean = |t: &Tensor| t.sum_keepdim((2, 3))? / m;
        let g = match self.spec.activation {
            Activation::Identity => wide(dy)?,
            Activation::Relu => wide(&through_relu(y, dy)?)?,
        };
        let x_wide = wide(x)?;
        let centred = match self.spec.remove_mean {
            true => x_wide.broadcast_sub(&row_mean(&x_wide)?)?,
            false => x_wide,
        };
        let var = row_mean(&centred.sqr()?)?;
        let rstd = (var + self.spec.eps)?.sqrt()?.recip()?;
        let normalised = centred.broadcast_mul(&rstd)?;
        let dx = || -> Result<Tensor> {
            let h = match self.has_weight {
                true => {
                    let weight = weight.to_dtype(DType::F64)?;
                    g.broadcast_mul(&weight.reshape((1, groups, c / groups, 1))?)?
                }
                false => g.clone(),
            };
            let along = row_mean(&(&h * &normalised)?)?;
            let mut d = (&h - normalised.broadcast_mul(&along)?)?;
            if self.spec.remove_mean {
                d = d.broadcast_sub(&row_mean(&h)?)?;
            }
            let d = d.broadcast_mul(&rstd)?;
            let d = match self.spec.channels_last {
                true => d.permute((0, 3, 1, 2))?,
                false => d,
            };
            d.to_dtype(x.dtype())?.reshape(x.shape())
        };
        let dparams = || -> Result<ParamGrads> {
            let by_channel = |t: Tensor| t.sum((0, 3))?.reshape(c);
            let (dweight, dbias) = (by_channel((&g * &normalised)?)?, by_channel(g.clone())?);
            let dtype = if self.has_weight { weight } else { bias }.dtype();
            Ok(ParamGrads::Apart([
                dweight.to_dtype(dtype)?.copy()?,
                dbias.to_dtype(dtype)?.copy()?,
            ]))
        };
        Ok(TensorGrads {
            dx: wants.dx.then(dx).transpose()?,
            dparams: wants.dparams.then(dparams).transpose()?,
        })
    }
}
