//! The fused operations, below the layers: one candle custom op per operation, with its gradient; and
//! [`backward`], the way back through a graph of them.

mod backward;
mod batch_norm;
mod conv2d;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod linear;
mod loops;
mod max_pool2d;
mod output;
mod parallel;
mod relu;
mod row_norm;
pub(crate) mod slices;
mod weighted;

pub use backward::backward;
pub use batch_norm::{
    batch_norm_inference, batch_norm_train, batch_norm_vjp, batch_renorm_train, batch_stats,
    Activation, BatchNormArgs, BatchNormGrads, BatchNormPullback, BatchStats, RenormLimits,
};
// For benches and tests of the kernels; no part of the API.
#[doc(hidden)]
pub use batch_norm::plan;
pub use conv2d::conv2d;
pub use cross_entropy::cross_entropy;
pub use linear::linear;
pub use max_pool2d::max_pool2d;
pub use relu::relu;
pub(crate) use row_norm::instance_norm_alone;
#[doc(hidden)]
pub use row_norm::plan as row_plan;
pub use row_norm::{group_norm, instance_norm, layer_norm, rms_norm, RowNormArgs};
