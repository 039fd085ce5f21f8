//! The custom op: hands candle's storages to a backend, and its gradients back to autograd.

use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor};

use super::{host, Activation, Spec, Wants};
use crate::ops::backward::gradient_of;
use crate::ops::keeps_graph::keeps_graph;
use crate::ops::param_grads::{Param, ParamGrads};
use crate::ops::slices::Operand;

/// Where weight and bias stand among the op's arguments, as far as there are any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slots {
    None,
    /// The second argument is the weight.
    Weight,
    /// The second argument is the bias.
    Bias,
    /// The second argument is the weight, the third the bias.
    Both,
    /// The second argument is `[2, c]`: weight and bias.
    Packed,
}

/// Batch norm of its first argument. `params` and `has_residual` say what the other two are.
pub(super) struct BatchNormOp {
    pub spec: Spec,
    pub params: Slots,
    /// The third argument is the residual.
    pub has_residual: bool,
    /// The mean and variance to normalise with, if they are not the batch's.
    pub given: Option<(Tensor, Tensor)>,
    /// The mean and variance of the forward pass, F64 `[2, c]`: set once, by it.
    pub saved: Arc<OnceLock<Tensor>>,
    /// Whether the gradients will take sums over a channel.
    pub keeps_maxima: bool,
    /// For those, the pixels that became the output, if it is pooled here: set once, by the forward pass.
    pub maxima: OnceLock<Tensor>,
}

/// The arguments by their role.
pub(super) struct Operands<'a, S> {
    pub x: Operand<'a, S>,
    pub weight: Option<Operand<'a, S>>,
    pub bias: Option<Operand<'a, S>>,
    pub residual: Option<Operand<'a, S>>,
}

/// The gradients by the role of the argument.
pub(super) struct TensorGrads {
    pub dx: Option<Tensor>,
    pub dparams: Option<ParamGrads>,
    pub dresidual: Option<Tensor>,
}

impl BatchNormOp {
    /// Sorts the arguments of the op into their roles.
    pub fn operands<'a, S>(&self, args: [(&'a S, &Layout); 3]) -> Result<Operands<'a, S>> {
        let [x, second, third] = args.map(|(storage, layout)| (storage, layout.clone()));
        let row = |index| -> Result<Operand<'a, S>> {
            let layout = args[1].1.narrow(0, index, 1)?;
            Ok((args[1].0, layout))
        };
        let residual = self.has_residual.then(|| third.clone());
        let (weight, bias) = match self.params {
            Slots::None => (None, None),
            Slots::Weight => (Some(second), None),
            Slots::Bias => (None, Some(second)),
            Slots::Both => (Some(second), Some(third)),
            Slots::Packed => (Some(row(0)?), Some(row(1)?)),
        };
        Ok(Operands {
            x,
            weight,
            bias,
            residual,
        })
    }

    /// The gradients that are wanted, from the op's arguments, its output and the output's gradient.
    pub fn gradients(
        &self,
        args: [&Tensor; 3],
        y: &Tensor,
        dy: &Tensor,
        saved: &Tensor,
        wants: Wants,
    ) -> Result<TensorGrads> {
        if keeps_graph() {
            return self.differentiable_gradients(args, y, dy, saved, wants);
        }
        let relu = self.spec.activation == Activation::Relu;
        let dy = dy.detach().contiguous()?;
        let mut grads = TensorGrads {
            dx: None,
            dparams: None,
            dresidual: None,
        };
        // Without a mask, the residual's gradient is the output's.
        let computed = Wants {
            dresidual: wants.dresidual && relu,
            ..wants
        };
        if computed.dx || computed.dparams || computed.dresidual {
            let needs_maxima = self.spec.windows.is_some() && computed.sums(&self.spec);
            if needs_maxima && self.maxima.get().is_none() {
                bail!("batch norm: the forward pass kept nothing for the gradients")
            }
            let tensors = BackwardTensors {
                args,
                y: (relu && self.has_residual).then_some(y),
                dy: &dy,
                saved,
            };
            grads = match dy.device() {
                Device::Cpu => host::backward(self, &tensors, computed)?,
                #[cfg(feature = "cuda")]
                Device::Cuda(_) => super::cuda::backward(self, &tensors, computed)?,
                device => bail!("batch norm has no gradient on {:?}", device.location()),
            };
        }
        if wants.dresidual && !relu {
            grads.dresidual = Some(dy);
        }
        Ok(grads)
    }

    fn output_shape(&self, x: &Layout) -> Result<Shape> {
        match &self.spec.windows {
            None => Ok(x.shape().clone()),
            Some(windows) => {
                let (n, c, _, _) = x.shape().dims4()?;
                Ok((n, c, windows.oh(), windows.ow()).into())
            }
        }
    }

    fn save(&self, stats: Tensor) -> Result<()> {
        if self.saved.set(stats).is_err() {
            bail!("batch norm: the forward pass ran twice")
        }
        Ok(())
    }

    /// Gives every argument its gradient: `dparams` is split as the parameters came in.
    fn assign(
        &self,
        grads: TensorGrads,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let TensorGrads {
            dx,
            dparams,
            dresidual,
        } = grads;
        let Some(dparams) = dparams else {
            return Ok((dx, None, dresidual));
        };
        Ok(match self.params {
            Slots::None => (dx, None, dresidual),
            Slots::Weight => (dx, Some(dparams.alone(Param::Weight)?), dresidual),
            Slots::Bias => (dx, Some(dparams.alone(Param::Bias)?), dresidual),
            Slots::Both => (
                dx,
                Some(dparams.alone(Param::Weight)?),
                Some(dparams.alone(Param::Bias)?),
            ),
            Slots::Packed => (dx, Some(dparams.stacked()?), dresidual),
        })
    }
}

impl CustomOp3 for BatchNormOp {
    fn name(&self) -> &'static str {
        "batch-norm"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let operands = self.operands([(s1, l1), (s2, l2), (s3, l3)])?;
        let shape = self.output_shape(l1)?;
        let (y, stats) = host::forward(self, &operands, &shape)?;
        self.save(stats)?;
        Ok((y, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let operands = self.operands([(s1, l1), (s2, l2), (s3, l3)])?;
        let (y, stats) = super::cuda::forward(&self.spec, &operands, self.given.as_ref())?;
        self.save(stats)?;
        Ok((y, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        second: &Tensor,
        third: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(saved) = self.saved.get() else {
            bail!("batch norm: the backward pass came before the forward pass")
        };
        let params_are_tracked = match self.params {
            Slots::None => false,
            Slots::Both => second.track_op() || third.track_op(),
            _ => second.track_op(),
        };
        let wants = Wants {
            dx: x.track_op(),
            dparams: params_are_tracked,
            dresidual: self.has_residual && third.track_op(),
        };
        let grads = self.gradients([x, second, third], y, dy, saved, wants)?;
        let (dx, dsecond, mut dthird) = self.assign(grads)?;
        if self.has_residual && third.is_variable() {
            // It may be `dy` itself, of which others have a part.
            dthird = dthird.map(|t| t.copy()).transpose()?;
        }
        Ok((
            gradient_of(x, dx)?,
            gradient_of(second, dsecond)?,
            gradient_of(third, dthird)?,
        ))
    }
}

/// What the backward pass reads: the op's arguments and what became of them.
pub(super) struct BackwardTensors<'a> {
    pub args: [&'a Tensor; 3],
    /// The output, where the mask of the ReLU has to be read from it.
    pub y: Option<&'a Tensor>,
    pub dy: &'a Tensor,
    pub saved: &'a Tensor,
}
