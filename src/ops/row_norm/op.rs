//! The custom op: hands candle's storages to a backend, and its gradients back to autograd.

use std::sync::{Arc, OnceLock};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor};

use super::{host, Spec, Wants};
use crate::ops::backward::gradient_of;
use crate::ops::keeps_graph::keeps_graph;
use crate::ops::param_grads::{Param, ParamGrads};
use crate::ops::slices::Operand;

/// A row norm of its first argument; the second is the weight and the third the bias, as far as there are any.
pub(super) struct RowNormOp {
    pub name: &'static str,
    pub spec: Spec,
    pub has_weight: bool,
    pub has_bias: bool,
    /// The mean and the variance of each row, F64 `[2, rows]`: set once, by the forward pass.
    pub saved: Arc<OnceLock<Tensor>>,
}

/// The arguments by their role.
pub(super) struct Operands<'a, S> {
    pub x: Operand<'a, S>,
    pub weight: Option<Operand<'a, S>>,
    pub bias: Option<Operand<'a, S>>,
}

/// What the backward pass reads.
pub(super) struct BackwardTensors<'a> {
    pub args: [&'a Tensor; 3],
    pub dy: &'a Tensor,
    pub saved: &'a Tensor,
}

/// The gradients that were asked for.
pub(super) struct TensorGrads {
    pub dx: Option<Tensor>,
    pub dparams: Option<ParamGrads>,
}

impl RowNormOp {
    /// Sorts the arguments of the op into their roles.
    pub fn operands<'a, S>(&self, args: [(&'a S, &Layout); 3]) -> Operands<'a, S> {
        let [x, weight, bias] = args.map(|(storage, layout)| (storage, layout.clone()));
        Operands {
            x,
            weight: self.has_weight.then_some(weight),
            bias: self.has_bias.then_some(bias),
        }
    }

    /// The gradients that are wanted, from the op's arguments, its output and the output's gradient.
    pub fn gradients(
        &self,
        args: [&Tensor; 3],
        y: &Tensor,
        dy: &Tensor,
        wants: Wants,
    ) -> Result<TensorGrads> {
        if keeps_graph() {
            return self.differentiable_gradients(args, y, dy, wants);
        }
        let Some(saved) = self.saved.get() else {
            bail!(
                "{}: the backward pass came before the forward pass",
                self.name
            )
        };
        let dy = &dy.detach().contiguous()?;
        let tensors = BackwardTensors { args, dy, saved };
        match dy.device() {
            Device::Cpu => host::backward(self, &tensors, wants),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => super::cuda::backward(self, &tensors, wants),
            device => bail!("{} has no gradient on {:?}", self.name, device.location()),
        }
    }

    fn save(&self, stats: Tensor) -> Result<()> {
        if self.saved.set(stats).is_err() {
            bail!("{}: the forward pass ran twice", self.name)
        }
        Ok(())
    }
}

impl CustomOp3 for RowNormOp {
    fn name(&self) -> &'static str {
        self.name
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
        let operands = self.operands([(s1, l1), (s2, l2), (s3, l3)]);
        let (y, stats) = host::forward(self, &operands)?;
        self.save(stats)?;
        Ok((y, l1.shape().clone()))
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
        let operands = self.operands([(s1, l1), (s2, l2), (s3, l3)]);
        let (y, stats) = super::cuda::forward(self, &operands)?;
        self.save(stats)?;
        Ok((y, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wants_weight = self.has_weight && weight.track_op();
        let wants_bias = self.has_bias && bias.track_op();
        let wants = Wants {
            dx: x.track_op(),
            dparams: wants_weight || wants_bias,
        };
        let TensorGrads { dx, dparams } = self.gradients([x, weight, bias], y, dy, wants)?;
        let gradient = |wanted: bool, param, like: &Tensor| match &dparams {
            Some(dparams) if wanted => dparams.alone(param)?.reshape(like.shape()).map(Some),
            _ => Ok(None),
        };
        Ok((
            gradient_of(x, dx)?,
            gradient_of(weight, gradient(wants_weight, Param::Weight, weight)?)?,
            gradient_of(bias, gradient(wants_bias, Param::Bias, bias)?)?,
        ))
    }
}
