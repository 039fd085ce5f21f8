pub mod layers;
pub mod models;
pub mod ops;
mod shape;

pub use layers::{batch_norm, BatchNorm, BatchNormConfig, Freeze};
pub use ops::Activation;
