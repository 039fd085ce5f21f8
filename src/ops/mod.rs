//! The fused operations, below the layers: one candle custom op per operation, with its gradient.

mod batch_norm;

pub use batch_norm::{
    batch_norm_inference, batch_norm_train, batch_norm_vjp, Activation, BatchNormArgs,
    BatchNormGrads, BatchNormPullback, BatchStats,
};
