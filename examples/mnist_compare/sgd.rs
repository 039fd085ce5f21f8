//! Stochastic gradient descent with momentum, PyTorch's rule; candle-nn's has no momentum.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};
use candle_nn::VarMap;

/// `velocity = momentum·velocity + gradient`, `variable = variable - lr·velocity`.
pub struct Sgd {
    /// Trained variables by name, in the order of their names.
    pub vars: Vec<(String, Var)>,
    /// One for each variable; none before its first gradient.
    pub velocities: Vec<Option<Tensor>>,
    lr: f64,
    momentum: f64,
}

impl Sgd {
    pub fn new(vars: &VarMap, lr: f64, momentum: f64) -> Self {
        let vars: Vec<_> = sorted(vars)
            .into_iter()
            .filter(|(name, _)| is_trained(name))
            .collect();
        Self {
            velocities: vec![None; vars.len()],
            vars,
            lr,
            momentum,
        }
    }

    pub fn step(&mut self, grads: &GradStore) -> Result<()> {
        for ((_, var), velocity) in self.vars.iter().zip(&mut self.velocities) {
            let Some(grad) = grads.get(var) else { continue };
            let moved = match velocity {
                None => grad.clone(),
                Some(velocity) => ((&*velocity * self.momentum)? + grad)?,
            };
            var.set(&(var.as_tensor() - (&moved * self.lr)?)?)?;
            *velocity = Some(moved);
        }
        Ok(())
    }
}

/// All variables in the order of their names; a `VarMap` has none.
pub fn sorted(vars: &VarMap) -> Vec<(String, Var)> {
    let data = vars
        .data()
        .lock()
        .unwrap_or_else(|error| error.into_inner());
    let mut vars: Vec<_> = data
        .iter()
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect();
    vars.sort_by(|a, b| a.0.cmp(&b.0));
    vars
}

/// Running statistics are variables too, but not of the optimiser's.
fn is_trained(name: &str) -> bool {
    !["running_mean", "running_var", "num_batches_tracked"]
        .iter()
        .any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use candle_nn::{Init, VarBuilder};

    #[test]
    fn two_steps_by_hand() -> Result<()> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F64, &Device::Cpu);
        let w = vb.get_with_hints(1, "w", Init::Const(1.0))?;
        vb.get_with_hints(1, "bn1.running_mean", Init::Const(0.0))?;
        let mut sgd = Sgd::new(&vars, 0.1, 0.9);
        assert_eq!(sgd.vars.len(), 1);
        // The gradient of w² is 2w: w = 1 - 0.1·2 = 0.8; then v = 0.9·2 + 1.6 = 3.4, w = 0.46.
        for expected in [0.8, 0.46] {
            sgd.step(&w.sqr()?.backward()?)?;
            assert!((w.to_vec1::<f64>()?[0] - expected).abs() < 1e-15);
        }
        Ok(())
    }
}
