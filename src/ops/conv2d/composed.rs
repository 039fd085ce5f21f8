//! The gradients of the convolution by candle's ops, which can be differentiated again.

use candle_core::{Result, Tensor};

use super::Spec;
use crate::ops::weighted::{Composed, Grads, Wants};

impl Composed for Spec {
    fn composed(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
        wants: Wants,
    ) -> Result<Grads<Tensor>> {
        let groups = |t: &Tensor, dim| t.contiguous()?.chunk(self.groups, dim);
        let dy_groups = groups(dy, 1)?;
        let dx = || -> Result<Tensor> {
            let part = |(dy, weight): (&Tensor, &Tensor)| {
                dy.conv_transpose2d(weight, 0, 0, self.stride, self.dilation)
            };
            let weights = groups(weight, 0)?;
            let parts: Result<Vec<_>> = dy_groups.iter().zip(&weights).map(part).collect();
            self.out_of_seen(&Tensor::cat(&parts?, 1)?)
        };
        let dweight = || -> Result<Tensor> {
            let part = |(x, dy): (&Tensor, &Tensor)| {
                let (x, dy) = (x.transpose(0, 1)?, dy.transpose(0, 1)?);
                // Stride and dilation change their places.
                x.conv2d(&dy, 0, self.dilation, self.stride, 1)?
                    .transpose(0, 1)
            };
            let x = groups(&self.seen(x)?, 1)?;
            let parts: Result<Vec<_>> = x.iter().zip(&dy_groups).map(part).collect();
            Tensor::cat(&parts?, 0)
        };
        Ok(Grads {
            dx: wants.dx.then(dx).transpose()?,
            dweight: wants.dweight.then(dweight).transpose()?,
            dbias: wants.dbias.then(|| dy.sum((0, 2, 3))).transpose()?,
        })
    }
}

impl Spec {
    /// Height and width of what the kernel sees of the padded input. With these, candle's convolutions
    /// need no padding, whose gradient they get wrong for images that are not square.
    fn seen_sizes(&self) -> [usize; 2] {
        let size = |o, k| self.stride * (o - 1) + self.dilation * (k - 1) + 1;
        [size(self.oh, self.kh), size(self.ow, self.kw)]
    }

    fn seen(&self, x: &Tensor) -> Result<Tensor> {
        let (p, [h, w]) = (self.padding, self.seen_sizes());
        let padded = x.pad_with_zeros(2, p, p)?.pad_with_zeros(3, p, p)?;
        padded.narrow(2, 0, h)?.narrow(3, 0, w)
    }

    /// From a gradient of [`Spec::seen`] to that of the input.
    fn out_of_seen(&self, d: &Tensor) -> Result<Tensor> {
        let (p, [h, w]) = (self.padding, self.seen_sizes());
        let padded =
            d.pad_with_zeros(2, 0, self.h + 2 * p - h)?
                .pad_with_zeros(3, 0, self.w + 2 * p - w)?;
        padded.narrow(2, p, self.h)?.narrow(3, p, self.w)
    }
}
