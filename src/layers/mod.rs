//! Layers in candle-nn's look, over the fused [`ops`](crate::ops).

mod axis;
mod batch_norm;
mod config;
mod conv2d;
mod convert;
mod linear;
mod regularise;

pub use batch_norm::{batch_norm, BatchNorm};
pub use config::{BatchNormConfig, Freeze, InitialValues, RenormSchedule};
pub use conv2d::{conv2d, conv2d_no_bias, Conv2d};
pub use linear::{linear, linear_no_bias, Linear};
pub use regularise::{Constraint, Penalty};
