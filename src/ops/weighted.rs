//! What an op of an input, a weight and perhaps a bias is to candle: storages to slices, and the
//! gradients back to autograd.

use candle_core::backend::BackendStorage;
use candle_core::{
    bail, CpuStorage, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, WithDType,
};

use super::backward::gradient_of;
use super::graph::{self, contiguous, output_as, to_dtype};
use super::keeps_graph::keeps_graph;
use super::slices::{computed_in, tensor, values};

/// Which gradients somebody asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wants {
    pub dx: bool,
    pub dweight: bool,
    pub dbias: bool,
}

/// The gradients that were asked for.
pub(crate) struct Grads<V> {
    pub dx: Option<V>,
    pub dweight: Option<V>,
    pub dbias: Option<V>,
}

/// The computation of such an op for a dtype, over contiguous tensors on the CPU.
pub(crate) trait Weighted<T> {
    fn forward(&self, x: &[T], weight: &[T], bias: Option<&[T]>) -> Vec<T>;
    fn backward(&self, x: &[T], weight: &[T], dy: &[T], wants: Wants) -> Grads<Vec<T>>;
}

/// The gradients by candle's ops, so that they have gradients themselves.
pub(crate) trait Composed {
    fn composed(
        &self,
        x: &Tensor,
        weight: &Tensor,
        dy: &Tensor,
        wants: Wants,
    ) -> Result<Grads<Tensor>>;
}

/// Applies an op to tensors on the CPU, of which `x` and `weight` are contiguous. F16 and BF16 are
/// computed in F32 and rounded once.
pub(crate) fn apply<W>(
    name: &'static str,
    work: W,
    shape: impl Into<Shape>,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor>
where
    W: Weighted<f32> + Weighted<f64> + Composed + Send + Sync + 'static,
{
    let op = WeightedOp {
        name,
        work,
        shape: shape.into(),
        has_bias: bias.is_some(),
    };
    let dtype = computed_in(x.dtype());
    let (x_wide, weight) = (to_dtype(x, dtype)?, to_dtype(weight, dtype)?);
    // In the place of a bias stands the input again, which is not read as one.
    let bias = match bias {
        Some(bias) => contiguous(&to_dtype(bias, dtype)?)?,
        None => x_wide.clone(),
    };
    output_as(&graph::apply([&x_wide, &weight, &bias], op)?, x.dtype())
}

/// Checks dtype and device of a parameter (`what` names it in errors) against the input.
pub(crate) fn check_like(name: &str, what: &str, t: &Tensor, x: &Tensor) -> Result<()> {
    if t.dtype() != x.dtype() {
        bail!(
            "{name} expects {what} of the input's dtype, {:?}, got {:?}",
            x.dtype(),
            t.dtype()
        )
    }
    if !t.device().same_device(x.device()) {
        bail!(
            "{name} expects {what} on the input's device, {:?}, got {:?}",
            x.device().location(),
            t.device().location()
        )
    }
    Ok(())
}

struct WeightedOp<W> {
    name: &'static str,
    work: W,
    /// Of the output.
    shape: Shape,
    has_bias: bool,
}

/// Calls a method that is generic over the dtype of a tensor.
macro_rules! dispatch {
    ($dtype:expr, $self:ident.$f:ident($($arg:expr),*)) => {
        match $dtype {
            DType::F32 => $self.$f::<f32>($($arg),*),
            DType::F64 => $self.$f::<f64>($($arg),*),
            dtype => bail!("{} has no implementation for {dtype:?}", $self.name),
        }
    };
}

impl<W: Weighted<f32> + Weighted<f64> + Composed> CustomOp3 for WeightedOp<W> {
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
        let y = dispatch!(s1.dtype(), self.forward([(s1, l1), (s2, l2), (s3, l3)]))?;
        Ok((y, self.shape.clone()))
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
        let Grads { dx, dweight, dbias } = match keeps_graph() {
            true => self.work.composed(x, weight, dy, wants)?,
            false => {
                let dy = dy.detach().contiguous()?;
                dispatch!(
                    dy.dtype(),
                    self.backward([x, weight, &dy], bias.shape(), wants)
                )?
            }
        };
        Ok((
            gradient_of(x, dx)?,
            gradient_of(weight, dweight)?,
            gradient_of(bias, dbias)?,
        ))
    }
}

impl<W> WeightedOp<W> {
    fn forward<T: WithDType>(&self, args: [(&CpuStorage, &Layout); 3]) -> Result<CpuStorage>
    where
        W: Weighted<T>,
    {
        let [x, weight, bias] = args.map(|(storage, layout)| values(self.name, storage, layout));
        let bias = self.has_bias.then_some(bias).transpose()?;
        Ok(T::to_cpu_storage_owned(
            self.work.forward(x?, weight?, bias),
        ))
    }

    fn backward<T: WithDType>(
        &self,
        tensors: [&Tensor; 3],
        bias: &Shape,
        wants: Wants,
    ) -> Result<Grads<Tensor>>
    where
        W: Weighted<T>,
    {
        let guards = tensors.map(Tensor::storage_and_layout);
        let slices =
            [&guards[0], &guards[1], &guards[2]].map(|(storage, layout)| match &**storage {
                Storage::Cpu(storage) => values(self.name, storage, layout),
                _ => bail!(
                    "{} expects input, weight and gradient on the CPU, got one elsewhere",
                    self.name
                ),
            });
        let [x, weight, dy] = slices;
        let Grads { dx, dweight, dbias } = self.work.backward(x?, weight?, dy?, wants);
        Ok(Grads {
            dx: dx.map(|dx| tensor(dx, tensors[0].shape())),
            dweight: dweight.map(|dweight| tensor(dweight, tensors[1].shape())),
            dbias: dbias.map(|dbias| tensor(dbias, bias)),
        })
    }
}
