//! The fused operations, below the layers: one candle custom op per operation, with its gradient.

mod batch_norm;
mod conv2d;
mod host;
mod linear;
mod output;
mod parallel;

pub use batch_norm::{
    batch_norm_inference, batch_norm_train, batch_norm_vjp, Activation, BatchNormArgs,
    BatchNormGrads, BatchNormPullback, BatchStats,
};
pub use conv2d::conv2d;
pub use linear::linear;
