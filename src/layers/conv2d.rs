//! The convolution layer.

use candle_core::{bail, Module, Result, Tensor};
use candle_nn::{init::DEFAULT_KAIMING_NORMAL, Conv2dConfig, Init, VarBuilder};

use crate::ops;

/// Convolution of images `[n, in_channels, h, w]`, with fast gradients on the CPU.
///
/// [`ops::conv2d`] has the formula, dtypes and errors. Variables, shapes and getters
/// are those of `candle_nn::Conv2d`, whose configuration it takes and into which it can be turned. PyTorch:
/// `torch.nn.Conv2d`.
#[derive(Debug, Clone)]
pub struct Conv2d {
    weight: Tensor,
    bias: Option<Tensor>,
    config: Conv2dConfig,
}

/// Builds a layer with a square kernel, with its variables from `vb`.
///
/// Names, shapes and initial values are those of `candle_nn::conv2d`: `weight`,
/// `[out_channels, in_channels / groups, kernel_size, kernel_size]`, and `bias`, `[out_channels]`.
///
/// # Errors
/// Channels that are no multiple of the groups, and whatever `vb` says of missing or differing
/// variables.
///
/// ```
/// use candle_batch_norm::layers::conv2d;
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let config = Conv2dConfig { padding: 1, ..Default::default() };
/// let conv = conv2d(1, 8, 3, config, vb.pp("conv1"))?;
/// let x = Tensor::zeros((4, 1, 28, 28), DType::F32, &Device::Cpu)?;
/// assert_eq!(conv.forward(&x)?.dims(), &[4, 8, 28, 28]);
/// # Ok(())
/// # }
/// ```
pub fn conv2d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv2dConfig,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let weight = weight(in_channels, out_channels, kernel_size, &config, &vb)?;
    let bound = 1.0 / (in_channels as f64).sqrt();
    let init = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    let bias = vb.get_with_hints(out_channels, "bias", init)?;
    Ok(Conv2d::new(weight, Some(bias), config))
}

/// [`conv2d`] without a bias, for a layer that a normalisation follows.
///
/// # Errors
/// Those of [`conv2d`].
pub fn conv2d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv2dConfig,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let weight = weight(in_channels, out_channels, kernel_size, &config, &vb)?;
    Ok(Conv2d::new(weight, None, config))
}

fn weight(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: &Conv2dConfig,
    vb: &VarBuilder,
) -> Result<Tensor> {
    let groups = config.groups;
    let divided = in_channels.is_multiple_of(groups) && out_channels.is_multiple_of(groups);
    if groups == 0 || !divided {
        bail!("conv2d expects channels that are a multiple of the groups, got {in_channels} and {out_channels} for {groups}")
    }
    let shape = (out_channels, in_channels / groups, kernel_size, kernel_size);
    vb.get_with_hints(shape, "weight", DEFAULT_KAIMING_NORMAL)
}

impl Conv2d {
    /// A layer with its tensors given; what they have to be is checked when it is used.
    pub fn new(weight: Tensor, bias: Option<Tensor>, config: Conv2dConfig) -> Self {
        Self {
            weight,
            bias,
            config,
        }
    }

    /// Padding, stride, dilation and groups.
    pub fn config(&self) -> &Conv2dConfig {
        &self.config
    }

    /// The weight, `[c_out, c_in / groups, kh, kw]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[c_out]`, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl Module for Conv2d {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        ops::conv2d(x, &self.weight, self.bias.as_ref(), &self.config)
    }
}

/// Takes over a layer of candle-nn, which shares its tensors.
impl From<candle_nn::Conv2d> for Conv2d {
    fn from(conv: candle_nn::Conv2d) -> Self {
        let (weight, bias) = (conv.weight().clone(), conv.bias().cloned());
        Self::new(weight, bias, *conv.config())
    }
}

/// Gives the layer to code that takes candle-nn's, such as its `absorb_bn`.
impl From<Conv2d> for candle_nn::Conv2d {
    fn from(conv: Conv2d) -> Self {
        Self::new(conv.weight, conv.bias, conv.config)
    }
}
