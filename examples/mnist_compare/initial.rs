//! Initial weights.

use anyhow::Result;
use candle_core::Tensor;
use candle_nn::VarMap;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::data::fnv1a;
use crate::sgd::sorted;

/// Sets the variables for which there is a bound to values uniform in ±bound.
///
/// Each variable has random numbers of its own, by seed and name: what two models share, they start
/// with alike, on every device.
pub fn uniform(vars: &VarMap, seed: u64, bound: impl Fn(&str) -> Option<f32>) -> Result<()> {
    for (name, var) in sorted(vars) {
        let Some(bound) = bound(&name) else { continue };
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ fnv1a(name.bytes()));
        let values: Vec<f32> = (0..var.elem_count())
            .map(|_| bound * (2.0 * rng.random::<f32>() - 1.0))
            .collect();
        var.set(&Tensor::from_vec(values, var.dims(), var.device())?)?;
    }
    Ok(())
}
