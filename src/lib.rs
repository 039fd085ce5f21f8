//! Fused batch normalisation for [candle](https://github.com/huggingface/candle): a drop-in for
//! `candle_nn::batch_norm` with one op forward and one backward, on the CPU and on CUDA.
//!
//! ```
//! use candle_batch_norm::{batch_norm, BatchNorm}; // was: use candle_nn::{batch_norm, BatchNorm};
//! use candle_core::{DType, Device, ModuleT, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! # fn main() -> candle_core::Result<()> {
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let bn: BatchNorm = batch_norm(16, 1e-5, vb.pp("bn1"))?;
//!
//! let x = Tensor::randn(1f32, 2.0, (8, 16, 5, 5), &Device::Cpu)?;
//! let y = bn.forward_t(&x, true)?; // training: the batch's statistics, which are also tracked
//! let grads = y.sqr()?.sum_all()?.backward()?;
//! assert!(grads.get(bn.weight().unwrap()).is_some());
//! let y = bn.forward_t(&x, false)?; // evaluation: the running statistics
//! assert_eq!(y.dims(), x.dims());
//! # Ok(())
//! # }
//! ```
//!
//! # What is here
//!
//! | module | what |
//! |---|---|
//! | [`layers`] | [`BatchNorm`], built by [`batch_norm`], with running statistics, freezing, masks, renormalisation and conversions; its relatives [`layers::LayerNorm`], [`layers::RmsNorm`], [`layers::GroupNorm`] and [`layers::InstanceNorm`]; [`layers::BatchNormSteps`] and [`layers::BatchNormLstm`] for sequences; [`layers::Penalty`], [`layers::Constraint`]; [`layers::Conv2d`], [`layers::Linear`] |
//! | [`backward`], [`backward_from`] | `loss.backward()` in less time, and from a given gradient |
//! | [`ops`] | [`ops::batch_norm_train`], [`ops::batch_norm_inference`], [`ops::batch_norm_vjp`], [`ops::batch_renorm_train`], [`ops::batch_stats`], [`ops::layer_norm`](ops::layer_norm()), [`ops::rms_norm`](ops::rms_norm()), [`ops::group_norm`](ops::group_norm()), [`ops::instance_norm`](ops::instance_norm()), [`ops::conv2d`], [`ops::linear`], [`ops::max_pool2d`], [`ops::relu`], [`ops::reshape`] and [`ops::cross_entropy`], the formulas and their gradients |
//! | [`models`] | the networks of the with/without comparison that the example `mnist_compare` trains |
//!
//! # Training and evaluation
//!
//! Over the `m` values of each channel of `x: [n, c, …]`:
//!
//! - training: `y = (x - mean)·rstd·weight + bias` with `mean` and the biased variance `var` of the
//!   batch, `rstd = 1 / √(var + eps)`; then `running = (1 - momentum)·running + momentum·new`, where
//!   the new variance is the unbiased `var·m / (m - 1)` by default;
//! - evaluation: the same formula with `running_mean` and `running_var`.
//!
//! # Features
//!
//! Without features there is the CPU, and no CUDA is needed to build. `cuda` compiles the kernels
//! with nvcc; `cudnn`, `mkl` and `accelerate` are candle's own. The API is the same with all of them.
#![warn(missing_docs)]

mod dims;
pub mod layers;
pub mod models;
pub mod ops;
mod shape;

pub use layers::{batch_norm, BatchNorm, BatchNormConfig, Freeze, InitialValues, RenormSchedule};
pub use ops::{backward, backward_from, Activation, RenormLimits};

/// The README's example runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
