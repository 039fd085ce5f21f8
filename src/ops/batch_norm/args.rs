//! The optional arguments of batch norm, and what they have to be.

use candle_core::{bail, Result, Tensor};

use super::NAME;
use crate::ops::loops::PLANE;
use crate::ops::max_pool2d::check_windows;
use crate::ops::max_pool2d::windows::Windows;
use crate::shape::{check_input, check_like, check_parameters, Dims};

/// What is applied to the normalised values, in the same pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// Nothing.
    #[default]
    Identity,
    /// `max(v, 0)`; a NaN stays a NaN, as in PyTorch.
    Relu,
}

/// The optional arguments of [`batch_norm_train`](super::batch_norm_train) and [`batch_norm_inference`](super::batch_norm_inference).
///
/// [`BatchNormArgs::new`] has PyTorch's `eps`, no parameters and no epilogue; the fields are set
/// one by one:
///
/// ```
/// use candle_batch_norm::ops::{Activation, BatchNormArgs};
/// let args = BatchNormArgs { activation: Activation::Relu, ..BatchNormArgs::new() };
/// assert_eq!(args.eps, 1e-5);
/// ```
#[derive(Debug, Clone, Copy)]
pub struct BatchNormArgs<'a> {
    /// `[c]`, in the input's dtype, or in F32 if that is F16 or BF16. Absent, it counts as 1.
    pub weight: Option<&'a Tensor>,
    /// `[c]`, as `weight` and in its dtype. Absent, it counts as 0.
    pub bias: Option<&'a Tensor>,
    /// Added to the normalised values before the activation: shape and dtype of the input.
    pub residual: Option<&'a Tensor>,
    /// Applied to their sum.
    pub activation: Activation,
    /// Takes the maximum over windows of so many pixels in each direction, last: what
    /// [`max_pool2d`](crate::ops::max_pool2d) would give, and with its errors, for an input
    /// `[n, c, h, w]`.
    ///
    /// On the CPU this happens plane by plane, and what is in between is never stored (for the gradients, the
    /// pixels of the maxima are kept, which are as many as the output has); but with a residual, on planes of
    /// fewer than 64 or more than 65536 pixels and on CUDA it is an op of its own. The output is contiguous, and an
    /// input with the channels last is copied first.
    pub max_pool: Option<usize>,
    /// Added to the variance under the root. Above 0 in training, at least 0 in inference.
    pub eps: f64,
    /// Without it, the mean counts as 0 in training, and the variance is the mean square. As in
    /// `candle_nn::BatchNormConfig`.
    pub remove_mean: bool,
}

impl BatchNormArgs<'_> {
    /// `eps` of 1e-5 and nothing else.
    pub const fn new() -> Self {
        Self {
            weight: None,
            bias: None,
            residual: None,
            activation: Activation::Identity,
            max_pool: None,
            eps: 1e-5,
            remove_mean: true,
        }
    }
}

impl Default for BatchNormArgs<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl BatchNormArgs<'_> {
    /// How the maximum comes about that is asked for.
    pub(super) fn pooling(&self, x: &Tensor) -> Result<Pooling> {
        let Some(kernel) = self.max_pool else {
            return Ok(Pooling::None);
        };
        let windows = check_windows("batch norm with a max_pool", x, kernel)?;
        let is_fused = x.device().is_cpu()
            && self.residual.is_none()
            && (PLANE..=LARGEST_PLANE).contains(&windows.inputs());
        Ok(match is_fused {
            _ if kernel == 1 => Pooling::None,
            true => Pooling::Fused(windows),
            false => Pooling::After(windows),
        })
    }
}

/// Larger planes leave the caches of a core, and too few of them may be there for all threads.
const LARGEST_PLANE: usize = 1 << 16;

/// Where the maximum over windows is taken.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pooling {
    /// Nowhere.
    None,
    /// In the op itself.
    Fused(Windows),
    /// By an op of its own, on the output.
    After(Windows),
}

/// What training asks of its arguments.
pub(super) fn check_training(x: &Tensor, args: &BatchNormArgs) -> Result<Dims> {
    let dims = check(x, args)?;
    if args.eps.is_nan() || args.eps <= 0.0 {
        bail!("batch norm expects eps > 0 in training, got {}", args.eps)
    }
    if dims.numel() > 0 && dims.m() == 1 {
        bail!(
            "batch norm expects more than one value per channel in training, got an input of shape {:?} \
             (in evaluation, `forward_t(x, false)`, one is enough)",
            x.dims()
        )
    }
    Ok(dims)
}

/// What training and inference ask of their arguments alike.
pub(super) fn check(x: &Tensor, args: &BatchNormArgs) -> Result<Dims> {
    let dims = check_input(NAME, x)?;
    check_parameters(NAME, args.weight, args.bias, &[dims.c], x)?;
    if let Some(residual) = args.residual {
        check_like(NAME, "a residual", residual, "the input", x)?;
    }
    Ok(dims)
}
