//! The output of an op in other shapes, orders and dtypes.

use std::sync::Arc;

use candle_core::shape::ShapeWithOneHole;
use candle_core::{DType, Result, Tensor};

use super::sources::{register, source_of, Backwards, Source};

/// `view` is `y` in another shape or order, and `back` makes a gradient of `y` of one of `view`. Where `y` is the
/// output of an op, those of `view` reach it directly too.
pub(crate) fn view(y: &Tensor, view: Tensor, back: impl Backwards) -> Tensor {
    registered(y, view, back, false)
}

/// A [`view`] of the argument of an op, for one that is about to be applied.
pub(crate) fn view_for_one(y: &Tensor, view: Tensor, back: impl Backwards) -> Tensor {
    registered(y, view, back, true)
}

fn registered(y: &Tensor, view: Tensor, back: impl Backwards, is_for_one: bool) -> Tensor {
    if view.id() == y.id() {
        return view;
    }
    let Some(of_y) = source_of(y) else {
        return view;
    };
    let node = of_y.node.clone();
    let source = Source {
        token: of_y.token.clone(),
        node: node.clone(),
        back: Some(Arc::new(move |gradient: &Tensor| {
            of_y.gradient_of_output(back(gradient)?)
        })),
        is_for_one,
    };
    register(view.id(), &node, source);
    view
}

/// `x.contiguous()`, for an op.
pub(crate) fn contiguous(x: &Tensor) -> Result<Tensor> {
    Ok(view_for_one(x, x.contiguous()?, |gradient| {
        Ok(gradient.clone())
    }))
}

/// `x.to_dtype(dtype)`, for an op.
pub(crate) fn to_dtype(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let own = x.dtype();
    let back = move |gradient: &Tensor| gradient.to_dtype(own);
    Ok(view_for_one(x, x.to_dtype(dtype)?, back))
}

/// `y.to_dtype(dtype)`, of the output of an op.
pub(crate) fn output_as(y: &Tensor, dtype: DType) -> Result<Tensor> {
    let own = y.dtype();
    let back = move |gradient: &Tensor| gradient.to_dtype(own);
    Ok(view(y, y.to_dtype(dtype)?, back))
}

/// `x.reshape(shape)`, through which gradients between ops of this crate go as they are.
///
/// On the way back candle's own has a tensor of zeros and a sum for the gradient. Here, as between any two
/// ops of this crate on the CPU, there is neither; elsewhere it is the same as candle's. (What is kept for
/// this, a few words, goes when `x` goes.)
///
/// PyTorch: `x.reshape(shape)`.
///
/// # Errors
/// A shape with another number of values, or with a hole beside a 0.
///
/// ```
/// use candle_batch_norm::ops::{linear, max_pool2d, reshape};
/// use candle_core::{DType, Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let images = Tensor::ones((5, 2, 6, 6), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((10, 18), DType::F32, &Device::Cpu)?;
/// let features = reshape(&max_pool2d(&images, 2)?, (5, ()))?;
/// assert_eq!(linear(&features, &weight, None)?.dims(), &[5, 10]);
/// # Ok(())
/// # }
/// ```
pub fn reshape(x: &Tensor, shape: impl ShapeWithOneHole) -> Result<Tensor> {
    let own = x.shape().clone();
    let back = move |gradient: &Tensor| gradient.reshape(&own);
    Ok(view(x, x.reshape(shape)?, back))
}
