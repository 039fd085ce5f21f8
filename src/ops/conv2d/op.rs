//! The custom op: from candle's storages to slices, and the gradients back to autograd.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{bail, CpuStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor};

use super::cpu::{self, Backward, Element, Forward, Grads, Wants};
use super::Spec;
use crate::ops::slices::values;

const NAME: &str = "conv2d";

/// Convolution of its first argument with the second. The third is the bias, if there is one.
pub(super) struct ConvOp {
    pub spec: Spec,
    pub has_bias: bool,
}

/// Calls a function that is generic over the dtype of a tensor.
macro_rules! dispatch {
    ($dtype:expr, $f:ident($($arg:expr),*)) => {
        match $dtype {
            DType::F32 => $f::<f32>($($arg),*),
            DType::F64 => $f::<f64>($($arg),*),
            dtype => bail!("conv2d has no implementation for {dtype:?}"),
        }
    };
}

impl CustomOp3 for ConvOp {
    fn name(&self) -> &'static str {
        NAME
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
        let spec = &self.spec;
        let y = dispatch!(s1.dtype(), forward(self, [(s1, l1), (s2, l2), (s3, l3)]))?;
        let shape = (spec.n, spec.groups * spec.c_out, spec.oh, spec.ow);
        Ok((y, shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let wants = Wants {
            dx: x.track_op(),
            dweight: weight.track_op(),
            dbias: self.has_bias && bias.track_op(),
        };
        let dy = dy.detach().contiguous()?;
        dispatch!(dy.dtype(), backward(self, [x, weight, &dy], wants))
    }
}

fn forward<T: Element>(op: &ConvOp, args: [(&CpuStorage, &Layout); 3]) -> Result<CpuStorage> {
    let [x, weight, bias] = args;
    let y = cpu::forward(&Forward {
        spec: &op.spec,
        x: values::<T>(NAME, x.0, x.1)?,
        weight: values::<T>(NAME, weight.0, weight.1)?,
        bias: match op.has_bias {
            true => Some(values::<T>(NAME, bias.0, bias.1)?),
            false => None,
        },
    });
    Ok(T::to_cpu_storage_owned(y))
}

fn backward<T: Element>(
    op: &ConvOp,
    tensors: [&Tensor; 3],
    wants: Wants,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let slices = [&guards[0], &guards[1], &guards[2]].map(|(storage, layout)| match &**storage {
        Storage::Cpu(storage) => values::<T>(NAME, storage, layout),
        _ => bail!("{NAME} expects input, weight and gradient on the CPU, got one elsewhere"),
    });
    let [x, weight, dy] = slices;
    let Grads { dx, dweight, dbias } = cpu::backward(&Backward {
        spec: &op.spec,
        x: x?,
        weight: weight?,
        dy: dy?,
        wants,
    });
    let tensor = |values, shape: &Shape| {
        let storage = Storage::Cpu(T::to_cpu_storage_owned(values));
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    };
    let channels = Shape::from(op.spec.groups * op.spec.c_out);
    Ok((
        dx.map(|dx| tensor(dx, tensors[0].shape())),
        dweight.map(|dweight| tensor(dweight, tensors[1].shape())),
        dbias.map(|dbias| tensor(dbias, &channels)),
    ))
}
