//! The linear layer.

use candle_core::{Module, Result, Tensor};
use candle_nn::{init, Init, VarBuilder};

use crate::ops;

/// An affine map of the last dimension, with fast gradients on the CPU.
///
/// [`ops::linear`] has the formula, dtypes and errors. Variables, shapes and getters are those of
/// `candle_nn::Linear`, into which it can be turned. PyTorch: `torch.nn.Linear`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// Builds a layer, with its variables from `vb`.
///
/// Names, shapes and initial values are those of `candle_nn::linear`: `weight`, `[out, in]`, and
/// `bias`, `[out]`.
///
/// # Errors
/// Whatever `vb` says of missing or differing variables.
///
/// ```
/// use candle_batch_norm::layers::linear;
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let fc = linear(784, 10, vb.pp("fc1"))?;
/// let x = Tensor::zeros((4, 784), DType::F32, &Device::Cpu)?;
/// assert_eq!(fc.forward(&x)?.dims(), &[4, 10]);
/// # Ok(())
/// # }
/// ```
pub fn linear(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    let weight = weight(inputs, outputs, &vb)?;
    let bound = 1.0 / (inputs as f64).sqrt();
    let init = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    let bias = vb.get_with_hints(outputs, "bias", init)?;
    Ok(Linear::new(weight, Some(bias)))
}

/// [`linear`] without a bias, for a layer that a normalisation follows.
///
/// # Errors
/// Those of [`linear`].
pub fn linear_no_bias(inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Linear> {
    Ok(Linear::new(weight(inputs, outputs, &vb)?, None))
}

fn weight(inputs: usize, outputs: usize, vb: &VarBuilder) -> Result<Tensor> {
    vb.get_with_hints((outputs, inputs), "weight", init::DEFAULT_KAIMING_NORMAL)
}

impl Linear {
    /// A layer with its tensors given; what they have to be is checked when it is used.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// The weight, `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[out]`, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::linear(x, &self.weight, self.bias.as_ref())
    }
}

/// Takes over a layer of candle-nn, which shares its tensors.
impl From<candle_nn::Linear> for Linear {
    fn from(linear: candle_nn::Linear) -> Self {
        Self::new(linear.weight().clone(), linear.bias().cloned())
    }
}

/// Gives the layer to code that takes candle-nn's.
impl From<Linear> for candle_nn::Linear {
    fn from(linear: Linear) -> Self {
        Self::new(linear.weight, linear.bias)
    }
}
