//! The fused operations, below the layers: one candle custom op per operation, with its gradient; and
//! [`backward`], the way back through a graph of them.
//!
//! # Gradients of gradients
//!
//! With `CANDLE_GRAD_DO_NOT_DETACH=1` in the environment, candle's `backward` gives gradients that are tensors
//! with a graph, for a penalty on them (WGAN-GP) and a second `backward`. candle reads the variable once for
//! each thread, and so do these ops: set it before anything else. The gradients of all ops here, those of
//! [`batch_norm_vjp`] too, are then composed of candle's ops and can be differentiated with respect to every
//! argument and to `dy`, as often as candle's own can; those of the norms are computed in F64, with
//! statistics that are found anew as functions of `x`. That is many passes over memory in the place of one or
//! two, each of whose results the graph keeps. The forward pass stays fused. Where the gradient of an op is a
//! step (at 0 of a ReLU, at equal maxima) the step counts as constant, as in PyTorch; so do the corrections
//! of batch renormalisation and all given statistics.
//!
//! PyTorch: `torch.autograd.grad(…, create_graph=True)`.

mod backward;
mod batch_norm;
mod cache;
mod conv2d;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
pub(crate) mod graph;
mod keeps_graph;
mod linear;
mod loops;
mod max_pool2d;
mod output;
mod parallel;
mod param_grads;
mod relu;
mod row_norm;
pub(crate) mod slices;
mod weighted;

pub use backward::{backward, backward_from};
pub use batch_norm::{
    batch_norm_inference, batch_norm_train, batch_norm_vjp, batch_renorm_train, batch_stats,
    Activation, BatchNormArgs, BatchNormGrads, BatchNormPullback, BatchStats, RenormLimits,
};
// For benches and tests of the kernels; no part of the API.
#[doc(hidden)]
pub use batch_norm::plan;
pub use conv2d::conv2d;
pub use cross_entropy::cross_entropy;
pub use graph::reshape;
pub use linear::linear;
pub use max_pool2d::max_pool2d;
pub use relu::relu;
pub(crate) use row_norm::instance_norm_alone;
#[doc(hidden)]
pub use row_norm::plan as row_plan;
pub use row_norm::{
    group_norm, group_norm_vjp, instance_norm, layer_norm, layer_norm_vjp, rms_norm, rms_norm_vjp,
    RowNormArgs, RowNormGrads, RowNormPullback,
};
