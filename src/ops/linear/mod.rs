//! The linear layer's product, for training.

mod cpu;

use candle_core::{bail, Result, Tensor};

use super::graph::contiguous;
use super::slices::check_float;
use super::weighted::{apply, check_like, Composed, Grads, Wants};

const NAME: &str = "linear";

/// The sizes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spec {
    pub n: usize,
    pub inputs: usize,
    pub outputs: usize,
}

/// An affine map of the last dimension, in one op with its gradients.
///
/// For `x: […, in]` and `weight: [out, in]`:
///
/// ```text
/// y[n, o]       = bias[o] + Σ weight[o, i]·x[n, i]
/// dx[n, i]      = Σ dy[n, o]·weight[o, i]
/// dweight[o, i] = Σ dy[n, o]·x[n, i]
/// dbias[o]      = Σ dy[n, o]
/// ```
///
/// `y` is `[…, out]`. On the CPU the products are those of the crate `gemm` that candle uses too, cut
/// into blocks for candle's threads, whatever its features `mkl` and `accelerate`; only those gradients
/// are computed that somebody asks for, and none is transposed and added to zeros a second time, as it
/// is for a product with `weight.t()`. F16 and BF16 are computed in F32 and rounded once. On other
/// devices it is candle's `matmul`.
///
/// `x`, `weight` and `bias: [out]` have one dtype, F32, F64, F16 or BF16; layouts that are not
/// contiguous are copied first.
///
/// PyTorch: `torch.nn.functional.linear(x, weight, bias)`.
///
/// # Errors
/// Tensors of another rank, dtype or device, and sizes that do not go together.
///
/// ```
/// use candle_batch_norm::ops::linear;
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
/// let weight = Tensor::new(&[[1f32, 0.0], [1.0, 1.0], [0.0, -1.0]], &Device::Cpu)?;
/// let bias = Tensor::new(&[0f32, 0.0, 10.0], &Device::Cpu)?;
/// let y = linear(&x, &weight, Some(&bias))?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1.0, 3.0, 8.0], [3.0, 7.0, 6.0]]);
/// # Ok(())
/// # }
/// ```
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let spec = check(x, weight, bias)?;
    let mut shape = x.dims().to_vec();
    shape.pop();
    shape.push(spec.outputs);
    if x.device().is_cpu() {
        // In the op, a copy that is made so would be a constant.
        return apply(
            NAME,
            spec,
            shape,
            &contiguous(x)?,
            &contiguous(weight)?,
            bias,
        );
    }
    let flat = x.reshape((spec.n, spec.inputs))?;
    let y = flat.matmul(&weight.t()?)?;
    let y = match bias {
        None => y,
        Some(bias) => y.broadcast_add(bias)?,
    };
    y.reshape(shape)
}

fn check(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Spec> {
    let (Some(&inputs), &[outputs, weight_inputs]) = (x.dims().last(), weight.dims()) else {
        bail!(
            "linear expects an input […, in] and a weight [out, in], got {:?} and {:?}",
            x.dims(),
            weight.dims()
        )
    };
    if inputs != weight_inputs {
        bail!(
            "linear expects an input with {weight_inputs} values in its last dimension for a weight {:?}, got {:?}",
            weight.dims(),
            x.dims()
        )
    }
    check_float(NAME, x)?;
    if let Some(bias) = bias {
        if bias.dims() != [outputs] {
            bail!(
                "linear expects a bias of shape [{outputs}] for a weight {:?}, got {:?}",
                weight.dims(),
                bias.dims()
            )
        }
    }
    check_like(NAME, "a weight", weight, x)?;
    if let Some(bias) = bias {
        check_like(NAME, "a bias", bias, x)?;
    }
    Ok(Spec {
        n: x.dims()[..x.rank() - 1].iter().product(),
        inputs,
        outputs,
    })
}

impl Composed for Spec {
    fn composed(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
        wants: Wants,
    ) -> Result<Grads<Tensor>> {
        let rows = dy.reshape((self.n, self.outputs))?;
        let dx = || rows.matmul(weight)?.reshape(x.shape());
        let dweight = || rows.t()?.matmul(&x.reshape((self.n, self.inputs))?);
        Ok(Grads {
            dx: wants.dx.then(dx).transpose()?,
            dweight: wants.dweight.then(dweight).transpose()?,
            dbias: wants.dbias.then(|| rows.sum(0)).transpose()?,
        })
    }
}
