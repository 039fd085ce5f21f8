//! Group norm, in candle-nn's look.

use candle_core::{bail, Module, Result, Tensor};
use candle_nn::VarBuilder;

use super::parameters::{check_channels, parameters};
use crate::ops::{self, Activation, RowNormArgs};
use crate::shape::check_eps;

/// For errors.
const NAME: &str = "group norm";

/// The options of a [`GroupNorm`]. The default is PyTorch's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupNormConfig {
    /// Added to the variance under the root: at least 0.
    pub eps: f64,
    /// Whether there are a weight and a bias.
    pub affine: bool,
    /// Applied to the output, in the same pass.
    pub activation: Activation,
}

impl Default for GroupNormConfig {
    fn default() -> Self {
        Self {
            eps: 1e-5,
            affine: true,
            activation: Activation::Identity,
        }
    }
}

impl From<f64> for GroupNormConfig {
    fn from(eps: f64) -> Self {
        Self {
            eps,
            ..Default::default()
        }
    }
}

/// Group normalisation of `[n, c, …]`; see [`group_norm`](ops::group_norm()) for formula, gradients, dtypes and
/// layouts. Training and evaluation are the same.
///
/// PyTorch: `torch.nn.GroupNorm`.
#[derive(Debug, Clone)]
pub struct GroupNorm {
    num_groups: usize,
    num_channels: usize,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    config: GroupNormConfig,
}

/// Builds a layer for `num_channels` channels in `num_groups` groups, with the variables `weight` and `bias`,
/// `[num_channels]` each, from `vb`.
///
/// # Errors
/// `eps < 0` or NaN, a number of groups that does not divide the channels, a `VarBuilder` of another dtype than F32, F64, F16 or
/// BF16, and whatever `vb` says of missing or differing variables.
///
/// ```
/// use candle_batch_norm::layers::group_norm; // was: use candle_nn::group_norm;
/// use candle_core::{DType, Device, Module, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let gn = group_norm(4, 16, 1e-5, vb.pp("gn1"))?;
/// let x = Tensor::randn(1f32, 2.0, (2, 16, 5, 5), &Device::Cpu)?;
/// assert_eq!(gn.forward(&x)?.dims(), x.dims());
/// # Ok(())
/// # }
/// ```
pub fn group_norm<C: Into<GroupNormConfig>>(
    num_groups: usize,
    num_channels: usize,
    config: C,
    vb: VarBuilder,
) -> Result<GroupNorm> {
    let config = config.into();
    check_eps(NAME, config.eps)?;
    check_groups(num_groups, num_channels)?;
    let wanted = [config.affine; 2];
    let (weight, bias) = parameters(NAME, &num_channels.into(), wanted, &vb)?;
    Ok(GroupNorm {
        num_groups,
        num_channels,
        weight,
        bias,
        config,
    })
}

impl GroupNorm {
    /// A layer with weight and bias given, `[num_channels]` each.
    ///
    /// # Errors
    /// A number of groups that does not divide the channels.
    pub fn new(
        weight: Tensor,
        bias: Tensor,
        num_channels: usize,
        num_groups: usize,
        eps: f64,
    ) -> Result<Self> {
        check_groups(num_groups, num_channels)?;
        Ok(Self {
            num_groups,
            num_channels,
            weight: Some(weight),
            bias: Some(bias),
            config: eps.into(),
        })
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
    pub fn config(&self) -> &GroupNormConfig {
        &self.config
    }
}

impl Module for GroupNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        check_channels(NAME, self.num_channels, x)?;
        let args = RowNormArgs {
            weight: self.weight.as_ref(),
            bias: self.bias.as_ref(),
            activation: self.config.activation,
            eps: self.config.eps,
        };
        ops::group_norm(x, self.num_groups, &args)
    }
}

fn check_groups(num_groups: usize, num_channels: usize) -> Result<()> {
    if num_groups == 0 || !num_channels.is_multiple_of(num_groups) {
        bail!("group norm expects a number of groups that divides {num_channels} channels, got {num_groups}")
    }
    Ok(())
}
