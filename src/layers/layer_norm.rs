//! Layer norm and RMS norm, in candle-nn's look.

use candle_core::{bail, Module, Result, Shape, Tensor};
use candle_nn::VarBuilder;

use super::parameters::parameters;
use crate::ops::{self, Activation, RowNormArgs};
use crate::shape::check_eps;

/// For errors.
const NAME: &str = "layer norm";

/// The options of a [`LayerNorm`]. The default is PyTorch's.
///
/// candle-nn's field `affine` says whether there is a bias: that is `bias` here.
///
/// ```
/// use candle_batch_norm::layers::LayerNormConfig;
/// assert_eq!(LayerNormConfig::from(1e-6), LayerNormConfig { eps: 1e-6, ..Default::default() });
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerNormConfig {
    /// Added to the variance under the root: at least 0.
    pub eps: f64,
    /// Without it this is an RMS norm.
    pub remove_mean: bool,
    /// Whether there are a weight and a bias.
    pub elementwise_affine: bool,
    /// Whether there is a bias, if `elementwise_affine`.
    pub bias: bool,
    /// Applied to the output, in the same pass.
    pub activation: Activation,
}

impl Default for LayerNormConfig {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            remove_mean: true,
            elementwise_affine: true,
            bias: true,
            activation: Activation::Identity,
        }
    }
}

impl From<f64> for LayerNormConfig {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Default::default()
        }
    }
}

/// Layer normalisation over the last dimensions; see [`layer_norm`](ops::layer_norm()) for formula, gradients,
/// dtypes and layouts. Training and evaluation are the same.
///
/// PyTorch: `torch.nn.LayerNorm`.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    normalized_shape: Shape,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    config: LayerNormConfig,
}

/// Builds a layer for inputs whose last dimensions are `normalized_shape` (a number, or a tuple of them), with
/// the variables `weight` and `bias` of that shape from `vb`; or `gamma` and `beta`, if it has those, as candle-nn.
///
/// # Errors
/// `eps < 0` or NaN, an empty `normalized_shape`, a `VarBuilder` of another dtype than F32, F64, F16 or BF16, and whatever `vb` says of missing or differing
/// variables.
///
/// ```
/// use candle_batch_norm::layers::layer_norm; // was: use candle_nn::layer_norm;
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let ln = layer_norm(16, 1e-5, vb.pp("ln1"))?;
/// let x = Tensor::randn(1f32, 2.0, (8, 10, 16), &Device::Cpu)?;
/// let grads = ln.forward(&x)?.sqr()?.sum_all()?.backward()?;
/// assert_eq!(grads.get(ln.weight().unwrap()).unwrap().dims(), &[16]);
/// # Ok(())
/// # }
/// ```
pub fn layer_norm<S: Into<Shape>, C: Into<LayerNormConfig>>(
    normalized_shape: S,
    config: C,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    let (normalized_shape, config) = (normalized_shape.into(), config.into());
    check_eps(NAME, config.eps)?;
    if normalized_shape.rank() == 0 {
        bail!("{NAME} expects a normalized_shape of at least one dimension, got none")
    }
    let wanted = [true, config.bias].map(|wanted| wanted && config.elementwise_affine);
    let (weight, bias) = parameters(NAME, &normalized_shape, wanted, &vb)?;
    Ok(LayerNorm {
        normalized_shape,
        weight,
        bias,
        config,
    })
}

/// [`layer_norm`] without a bias.
///
/// # Errors
/// Those of [`layer_norm`].
pub fn layer_norm_no_bias<S: Into<Shape>>(
    normalized_shape: S,
    eps: f64,
    vb: VarBuilder,
) -> Result<LayerNorm> {
    let config = LayerNormConfig {
        bias: false,
        ..eps.into()
    };
    layer_norm(normalized_shape, config, vb)
}

impl LayerNorm {
    /// A layer with weight and bias given, which have the shape of the dimensions to normalise over.
    pub fn new(weight: Tensor, bias: Tensor, eps: f64) -> Self {
        Self {
            bias: Some(bias),
            ..Self::new_no_bias(weight, eps)
        }
    }

    /// [`LayerNorm::new`] without a bias.
    pub fn new_no_bias(weight: Tensor, eps: f64) -> Self {
        Self {
            normalized_shape: weight.shape().clone(),
            weight: Some(weight),
            bias: None,
            config: eps.into(),
        }
    }

    /// An RMS norm with the weight given.
    pub fn rms_norm(weight: Tensor, eps: f64) -> Self {
        let mut layer = Self::new_no_bias(weight, eps);
        layer.config.remove_mean = false;
        layer
    }

    /// The weight, if there is one.
    pub fn weight(&self) -> Option<&Tensor> {
        self.weight.as_ref()
    }

    /// The bias, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The options that the layer was built with.
    pub fn config(&self) -> &LayerNormConfig {
        &self.config
    }
}

impl Module for LayerNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let args = RowNormArgs {
            weight: self.weight.as_ref(),
            bias: self.bias.as_ref(),
            activation: self.config.activation,
            eps: self.config.eps,
        };
        match self.config.remove_mean {
            true => ops::layer_norm(x, self.normalized_shape.clone(), &args),
            false => ops::rms_norm(x, self.normalized_shape.clone(), &args),
        }
    }
}

/// RMS normalisation over the last dimension; see [`rms_norm`](ops::rms_norm()). It is a [`LayerNorm`] without
/// `remove_mean` and without a bias.
///
/// PyTorch: `torch.nn.RMSNorm`.
#[derive(Debug, Clone)]
pub struct RmsNorm(LayerNorm);

/// Builds an RMS norm for inputs whose last dimension is `size`, with the variable `weight` from `vb`.
///
/// # Errors
/// Those of [`layer_norm`].
///
/// ```
/// use candle_batch_norm::layers::rms_norm; // was: use candle_nn::rms_norm;
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let norm = rms_norm(4, 0.0, VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu))?;
/// let y = norm.forward(&Tensor::new(&[[0f64, 8.0, 0.0, 0.0]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f64>()?, [[0.0, 2.0, 0.0, 0.0]]);
/// # Ok(())
/// # }
/// ```
pub fn rms_norm(size: usize, eps: f64, vb: VarBuilder) -> Result<RmsNorm> {
    let mut layer = layer_norm_no_bias(size, eps, vb)?;
    layer.config.remove_mean = false;
    Ok(RmsNorm(layer))
}

impl RmsNorm {
    /// A layer with its weight given.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self(LayerNorm::rms_norm(weight, eps))
    }

    /// The same as a layer norm.
    pub fn into_inner(self) -> LayerNorm {
        self.0
    }

    /// The weight.
    pub fn weight(&self) -> Option<&Tensor> {
        self.0.weight()
    }
}

impl Module for RmsNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.forward(x)
    }
}
