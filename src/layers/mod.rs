//! Layers in candle-nn's look, over the fused [`ops`](crate::ops).

mod axis;
mod batch_norm;
mod batch_norm_lstm;
mod batch_norm_steps;
mod config;
mod conv2d;
mod convert;
mod forward;
mod group_norm;
mod instance_norm;
mod layer_norm;
mod linear;
mod mask;
mod parameters;
mod regularise;
mod running;

pub use batch_norm::{batch_norm, BatchNorm};
pub use batch_norm_lstm::{
    batch_norm_lstm, BatchNormLstm, BatchNormLstmConfig, BatchNormLstmState,
};
pub use batch_norm_steps::{batch_norm_steps, BatchNormSteps};
pub use config::{BatchNormConfig, Freeze, InitialValues, RenormSchedule};
pub use conv2d::{conv2d, conv2d_no_bias, Conv2d};
pub use group_norm::{group_norm, GroupNorm, GroupNormConfig};
pub use instance_norm::{instance_norm, InstanceNorm, InstanceNormConfig};
pub use layer_norm::{
    layer_norm, layer_norm_no_bias, rms_norm, LayerNorm, LayerNormConfig, RmsNorm,
};
pub use linear::{linear, linear_no_bias, Linear};
pub use regularise::{Constraint, Penalty};
