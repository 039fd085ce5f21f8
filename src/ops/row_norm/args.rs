//! The arguments of row norms, what they have to be, and how they reach the op.

use candle_core::{bail, Result, Shape, Tensor};

use super::op::RowNormOp;
use super::Spec;
use crate::dims::Rows;
use crate::ops::{graph, Activation};
use crate::shape::{check_eps, check_input, check_parameters, check_values, Order};

/// The optional arguments of [`layer_norm`](super::layer_norm()), [`rms_norm`](super::rms_norm()),
/// [`group_norm`](super::group_norm()) and [`instance_norm`](super::instance_norm()).
///
/// ```
/// use candle_batch_norm::ops::{Activation, RowNormArgs};
/// let args = RowNormArgs { activation: Activation::Relu, ..RowNormArgs::new() };
/// assert_eq!(args.eps, 1e-5);
/// ```
#[derive(Debug, Clone, Copy)]
pub struct RowNormArgs<'a> {
    /// In the input's dtype, or in F32 if that is F16 or BF16; each function says its shape. Absent, it counts
    /// as 1.
    pub weight: Option<&'a Tensor>,
    /// As `weight`, and in its dtype. Absent, it counts as 0.
    pub bias: Option<&'a Tensor>,
    /// Applied to the normalised values, in the same pass.
    pub activation: Activation,
    /// Added to the variance under the root: at least 0.
    pub eps: f64,
}

impl RowNormArgs<'_> {
    /// `eps` of 1e-5 and nothing else.
    pub const fn new() -> Self {
        Self {
            weight: None,
            bias: None,
            activation: Activation::Identity,
            eps: 1e-5,
        }
    }
}

impl Default for RowNormArgs<'_> {
    fn default() -> Self {
        Self::new()
    }
}

/// The op for arguments that have been checked, and the three tensors that it takes.
pub(super) struct Prepared {
    pub op: RowNormOp,
    pub order: Order,
    pub tensors: [Tensor; 3],
}

impl Prepared {
    fn new(
        name: &'static str,
        spec: Spec,
        order: Order,
        x: &Tensor,
        args: &RowNormArgs,
    ) -> Result<Self> {
        let contiguous = |t: Option<&Tensor>| t.map(Tensor::contiguous).transpose();
        let (weight, bias) = (contiguous(args.weight)?, contiguous(args.bias)?);
        let x = order.into_kernel(x)?;
        let op = RowNormOp {
            name,
            spec,
            has_weight: weight.is_some(),
            has_bias: bias.is_some(),
            saved: Default::default(),
        };
        // In the place of an absent argument stands the input again: it is there, and never read.
        let [weight, bias] = [weight, bias].map(|t| t.unwrap_or_else(|| x.clone()));
        let tensors = [x, weight, bias];
        Ok(Self { op, order, tensors })
    }

    /// `y`, and the statistics of the rows, F64 `[2, rows]`, unless there are no values.
    pub fn run(self, x: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        if x.elem_count() == 0 {
            return Ok((x.clone(), None));
        }
        let (saved, [x_kernel, weight, bias]) = (self.op.saved.clone(), &self.tensors);
        let y = graph::apply([x_kernel, weight, bias], self.op)?;
        Ok((self.order.out_of_kernel(&y, x)?, saved.get().cloned()))
    }
}

/// Norms over the last dimensions.
pub(super) fn last_dimensions(
    name: &'static str,
    x: &Tensor,
    normalized_shape: Shape,
    args: &RowNormArgs,
    remove_mean: bool,
) -> Result<Prepared> {
    let shape = normalized_shape.dims();
    check_values(name, x)?;
    if shape.is_empty() || !x.dims().ends_with(shape) {
        bail!(
            "{name} expects an input whose last dimensions are {shape:?}, at least one, got {:?}",
            x.dims()
        )
    }
    check_parameters(name, args.weight, args.bias, shape, x)?;
    check_eps(name, args.eps)?;
    let c = normalized_shape.elem_count();
    let spec = Spec {
        rows: Rows {
            n: x.elem_count().checked_div(c).unwrap_or(0),
            groups: 1,
            c,
            s: 1,
        },
        channels_last: false,
        eps: args.eps,
        activation: args.activation,
        remove_mean,
    };
    Prepared::new(name, spec, Order::ChannelsFirst, x, args)
}

/// Norms of groups of channels, or of each channel.
pub(super) fn groups(
    name: &'static str,
    x: &Tensor,
    num_groups: Option<usize>,
    args: &RowNormArgs,
) -> Result<Prepared> {
    let dims = check_input(name, x)?;
    let groups = num_groups.unwrap_or(dims.c);
    if dims.c > 0 && (groups == 0 || !dims.c.is_multiple_of(groups)) {
        bail!(
            "{name} expects a number of groups that divides the {} channels of an input of shape {:?}, got {groups}",
            dims.c,
            x.dims()
        )
    }
    check_parameters(name, args.weight, args.bias, &[dims.c], x)?;
    check_eps(name, args.eps)?;
    if num_groups.is_none() && dims.numel() > 0 && dims.s == 1 {
        bail!(
            "{name} expects more than one value per channel of a sample, got an input of shape {:?}",
            x.dims()
        )
    }
    let rows = Rows {
        n: dims.n,
        groups,
        c: dims.c,
        s: dims.s,
    };
    // A CUDA kernel reads at least a sector, 32 bytes, and would use little of it.
    let narrow = dims.c / groups.max(1) * x.dtype().size_in_bytes() < 32;
    let order = match x.device().is_cuda() && narrow {
        true => Order::ChannelsFirst,
        false => Order::of(x)?,
    };
    let spec = Spec {
        rows,
        channels_last: order == Order::ChannelsLast,
        eps: args.eps,
        activation: args.activation,
        remove_mean: true,
    };
    Prepared::new(name, spec, order, x, args)
}
