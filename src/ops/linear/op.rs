//! The custom op: from candle's storages to slices, and the gradients back to autograd.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{
    bail, CpuStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, WithDType,
};

use super::cpu::{self, Grads, Wants};
use super::Spec;
use crate::ops::slices::values;

const NAME: &str = "linear";

/// The product of its first argument with the second. The third is the bias, if there is one.
pub(super) struct LinearOp {
    pub spec: Spec,
    pub has_bias: bool,
}

/// Calls a function that is generic over the dtype of a tensor.
macro_rules! dispatch {
    ($dtype:expr, $f:ident($($arg:expr),*)) => {
        match $dtype {
            DType::F32 => $f::<f32>($($arg),*),
            DType::F64 => $f::<f64>($($arg),*),
            dtype => bail!("linear has no implementation for {dtype:?}"),
        }
    };
}

impl CustomOp3 for LinearOp {
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
        let y = dispatch!(s1.dtype(), forward(self, [(s1, l1), (s2, l2), (s3, l3)]))?;
        Ok((y, (self.spec.n, self.spec.outputs).into()))
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
        dispatch!(dy.dtype(), backward(&self.spec, [x, weight, &dy], wants))
    }
}

fn forward<T: WithDType>(op: &LinearOp, args: [(&CpuStorage, &Layout); 3]) -> Result<CpuStorage> {
    let [x, weight, bias] = args;
    let bias = match op.has_bias {
        true => Some(values::<T>(NAME, bias.0, bias.1)?),
        false => None,
    };
    let (x, weight) = (values(NAME, x.0, x.1)?, values(NAME, weight.0, weight.1)?);
    Ok(T::to_cpu_storage_owned(cpu::forward(
        &op.spec, x, weight, bias,
    )))
}

fn backward<T: WithDType>(
    spec: &Spec,
    tensors: [&Tensor; 3],
    wants: Wants,
) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
    let guards = tensors.map(Tensor::storage_and_layout);
    let slices = [&guards[0], &guards[1], &guards[2]].map(|(storage, layout)| match &**storage {
        Storage::Cpu(storage) => values::<T>(NAME, storage, layout),
        _ => bail!("{NAME} expects input, weight and gradient on the CPU, got one elsewhere"),
    });
    let [x, weight, dy] = slices;
    let Grads { dx, dweight, dbias } = cpu::backward(spec, x?, weight?, dy?, wants);
    let tensor = |values, shape: Shape| {
        let storage = Storage::Cpu(T::to_cpu_storage_owned(values));
        Tensor::from_storage(storage, shape, BackpropOp::none(), false)
    };
    let Spec { n, inputs, outputs } = *spec;
    Ok((
        dx.map(|dx| tensor(dx, (n, inputs).into())),
        dweight.map(|dweight| tensor(dweight, (outputs, inputs).into())),
        dbias.map(|dbias| tensor(dbias, outputs.into())),
    ))
}
