//! Dropout with random numbers of its own, so that a run can be repeated.

use std::sync::Mutex;

use candle_core::{bail, ModuleT, Result, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What one draw of a [`Dropout`] decides about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropoutKind {
    /// Each value by itself: `torch.nn.Dropout`.
    Values,
    /// Whole channels of `[n, c, …]`: `torch.nn.Dropout2d`.
    Channels,
}

/// Sets values (or channels) to zero with probability `p` in training, and scales the others by
/// `1 / (1 - p)` so that the expected value stays; in evaluation it is the identity.
///
/// `candle_nn::Dropout` draws from the device's generator, which cannot be seeded on a CPU. This one
/// draws on the host from ChaCha8: the same seed drops the same values on every device. Source:
/// Srivastava et al. 2014, <https://jmlr.org/papers/v15/srivastava14a.html>; whole channels:
/// Tompson et al. 2015, <https://arxiv.org/abs/1411.4280>.
///
/// ```
/// use candle_batch_norm::models::{Dropout, DropoutKind};
/// use candle_core::{DType, Device, ModuleT, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let dropout = Dropout::new(0.5, DropoutKind::Values)?;
/// let x = Tensor::ones((2, 8), DType::F32, &Device::Cpu)?;
/// let kept = dropout.forward_t(&x, true)?.flatten_all()?.to_vec1::<f32>()?;
/// assert!(kept.iter().all(|&v| v == 0.0 || v == 2.0));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Dropout {
    p: f32,
    kind: DropoutKind,
    rng: Mutex<ChaCha8Rng>,
}

impl Dropout {
    /// `p` is the probability of being dropped, `0 <= p < 1`.
    pub fn new(p: f32, kind: DropoutKind) -> Result<Self> {
        if !(0.0..1.0).contains(&p) {
            bail!("dropout probability must be at least 0 and below 1, got {p}")
        }
        let rng = Mutex::new(ChaCha8Rng::seed_from_u64(0));
        Ok(Self { p, kind, rng })
    }

    /// Starts the random numbers anew; layers that share a seed differ by `stream`.
    pub fn reseed(&self, seed: u64, stream: u64) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        *self.rng.lock().unwrap_or_else(|e| e.into_inner()) = rng;
    }
}

impl ModuleT for Dropout {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        if !train || self.p == 0.0 {
            return Ok(x.clone());
        }
        let mut shape = x.dims().to_vec();
        if self.kind == DropoutKind::Channels {
            if shape.len() < 3 {
                bail!(
                    "dropout of channels takes [n, c, …] with at least 3 dimensions, got {shape:?}"
                )
            }
            shape[2..].fill(1);
        }
        let count = shape.iter().product();
        let scale = 1.0 / (1.0 - self.p);
        let mask: Vec<f32> = {
            let mut rng = self.rng.lock().unwrap_or_else(|e| e.into_inner());
            (0..count)
                .map(|_| {
                    if rng.random::<f32>() < self.p {
                        0.0
                    } else {
                        scale
                    }
                })
                .collect()
        };
        let mask = Tensor::from_vec(mask, shape, x.device())?.to_dtype(x.dtype())?;
        x.broadcast_mul(&mask)
    }
}
