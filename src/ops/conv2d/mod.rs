//! 2D convolution for training.

mod composed;
mod cpu;

use candle_core::{bail, Result, Tensor};
use candle_nn::Conv2dConfig;

use super::graph::contiguous;
use super::slices::check_float;
use super::weighted::{apply, check_like};

const NAME: &str = "conv2d";

/// The sizes of a convolution; channels are those of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spec {
    pub n: usize,
    pub groups: usize,
    pub c_in: usize,
    pub c_out: usize,
    pub h: usize,
    pub w: usize,
    pub kh: usize,
    pub kw: usize,
    pub oh: usize,
    pub ow: usize,
    pub padding: usize,
    pub stride: usize,
    pub dilation: usize,
}

impl Spec {
    /// The number of values of an input image.
    pub fn inputs(&self) -> usize {
        self.groups * self.c_in * self.h * self.w
    }

    /// The number of values of an output image.
    pub fn outputs(&self) -> usize {
        self.groups * self.c_out * self.oh * self.ow
    }

    /// The number of multiplications in a pass.
    pub fn work(&self) -> usize {
        self.n * self.outputs() * self.c_in * self.kh * self.kw
    }
}

/// Convolution of images with a kernel, with gradients that cost about as much as the forward pass.
///
/// For `x: [n, c_in, h, w]` and `weight: [c_out, c_in / groups, kh, kw]`, with `p` the padding by
/// zeros, `s` the stride and `d` the dilation of `config`, and one group:
///
/// ```text
/// y[n, o, i, j] = bias[o] + Σ weight[o, c, k, l]·x[n, c, i·s + k·d - p, j·s + l·d - p]
/// ```
///
/// `y` is `[n, c_out, oh, ow]` with `oh = (h + 2·p - d·(kh - 1) - 1) / s + 1` rounded down, and `ow`
/// likewise. With more groups, the channels of input and output are cut into as many parts, and each
/// part of the output sees its part of the input. The gradients are
///
/// ```text
/// dbias[o]           = Σ dy[n, o, i, j]
/// dweight[o, c, k, l] = Σ dy[n, o, i, j]·x[n, c, i·s + k·d - p, j·s + l·d - p]
/// dx[n, c, a, b]      = Σ dy[n, o, i, j]·weight[o, c, k, l]  over  i·s + k·d - p = a, j·s + l·d - p = b
/// ```
///
/// On the CPU this is an op of its own, on all of candle's threads, with the same bits on every run;
/// only those gradients are computed that somebody asks for. (candle's own gradient of the weights is
/// a convolution with a kernel as large as the output.) A thread takes whole images, so that a batch
/// smaller than the number of threads leaves some of them idle, and the backward pass keeps at most 16
/// of them busy. The gradient of the bias is summed in F64, that of the
/// weight in the dtype over the images of a task. F16 and BF16 are computed in F32 and rounded
/// once. On other devices it is candle's `conv2d`, for which `config.cudnn_fwd_algo` is.
///
/// `x`, `weight` and `bias: [c_out]` have one dtype, F32, F64, F16 or BF16; layouts that are not
/// contiguous are copied first.
///
/// PyTorch: `torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)`.
///
/// # Errors
/// Tensors of another rank, dtype or device, without channels or pixels, channels that do not go
/// with the groups, a stride, a dilation or groups of 0, a kernel that is larger than the padded
/// input.
///
/// ```
/// use candle_batch_norm::ops::conv2d;
/// use candle_core::{Device, Tensor};
/// use candle_nn::Conv2dConfig;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::arange(0f32, 9.0, &Device::Cpu)?.reshape((1, 1, 3, 3))?;
/// let weight = Tensor::new(&[[[[1f32, 0.0], [0.0, -1.0]]]], &Device::Cpu)?;
/// let bias = Tensor::new(&[10f32], &Device::Cpu)?;
/// let y = conv2d(&x, &weight, Some(&bias), &Conv2dConfig::default())?;
/// assert_eq!(y.squeeze(0)?.squeeze(0)?.to_vec2::<f32>()?, [[6.0, 6.0], [6.0, 6.0]]);
/// # Ok(())
/// # }
/// ```
pub fn conv2d(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: &Conv2dConfig,
) -> Result<Tensor> {
    let spec = check(x, weight, bias, config)?;
    // In the op, a copy that is made so would be a constant.
    let (x, weight) = (&contiguous(x)?, &contiguous(weight)?);
    if !x.device().is_cpu() {
        let y = x.conv2d_with_algo(
            weight,
            config.padding,
            config.stride,
            config.dilation,
            config.groups,
            config.cudnn_fwd_algo,
        )?;
        return match bias {
            None => Ok(y),
            Some(bias) => y.broadcast_add(&bias.reshape((1, (), 1, 1))?),
        };
    }
    let shape = (spec.n, spec.groups * spec.c_out, spec.oh, spec.ow);
    apply(NAME, spec, shape, x, weight, bias)
}

fn check(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    config: &Conv2dConfig,
) -> Result<Spec> {
    let (&[n, c_in, h, w], &[c_out, c_kernel, kh, kw]) = (x.dims(), weight.dims()) else {
        bail!(
            "conv2d expects an input [n, c_in, h, w] and a weight [c_out, c_in / groups, kh, kw], got {:?} and {:?}",
            x.dims(),
            weight.dims()
        )
    };
    check_float(NAME, x)?;
    let Conv2dConfig {
        padding,
        stride,
        dilation,
        groups,
        ..
    } = *config;
    if stride == 0 || dilation == 0 || groups == 0 {
        bail!("conv2d expects stride, dilation and groups of at least 1, got {stride}, {dilation} and {groups}")
    }
    if x.dims()[1..].contains(&0) || weight.dims().contains(&0) {
        bail!(
            "conv2d expects channels, pixels and a kernel of at least 1, got an input {:?} and a weight {:?}",
            x.dims(),
            weight.dims()
        )
    }
    if c_in != c_kernel * groups {
        bail!(
            "conv2d expects an input of {} channels for a weight {:?} and {groups} groups, got an input {:?}",
            c_kernel * groups,
            weight.dims(),
            x.dims()
        )
    }
    if c_out % groups != 0 {
        bail!(
            "conv2d expects output channels that are a multiple of {groups} groups, got a weight {:?}",
            weight.dims()
        )
    }
    check_like(NAME, "a weight", weight, x)?;
    if let Some(bias) = bias {
        if bias.dims() != [c_out] {
            bail!(
                "conv2d expects a bias of shape [{c_out}] for a weight {:?}, got {:?}",
                weight.dims(),
                bias.dims()
            )
        }
        check_like(NAME, "a bias", bias, x)?;
    }
    let out = |len: usize, k: usize| {
        // Too large to count is too large to fit.
        let len = padding.checked_mul(2)?.checked_add(len)?;
        let k = dilation.checked_mul(k - 1)?.checked_add(1)?;
        Some(len.checked_sub(k)? / stride + 1)
    };
    let (Some(oh), Some(ow)) = (out(h, kh), out(w, kw)) else {
        bail!(
            "conv2d expects a kernel that fits into the padded input, got {kh}×{kw} with dilation {dilation} for {h}×{w} with padding {padding}"
        )
    };
    Ok(Spec {
        n,
        groups,
        c_in: c_kernel,
        c_out: c_out / groups,
        h,
        w,
        kh,
        kw,
        oh,
        ow,
        padding,
        stride,
        dilation,
    })
}
