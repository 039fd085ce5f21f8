//! Stochastic gradient descent with momentum, PyTorch's rule; candle-nn's has no momentum.

use std::sync::Mutex;

use candle_core::backend::BackendStorage;
use candle_core::backprop::GradStore;
use candle_core::{bail, CpuStorage, DType, InplaceOp2, Layout, Result, Tensor, Var, WithDType};
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
            if grad.device().is_cpu() && matches!(grad.dtype(), DType::F32 | DType::F64) {
                let grad = grad.contiguous()?;
                match velocity {
                    None => *velocity = Some(grad.copy()?),
                    Some(velocity) => {
                        velocity.inplace_op2(&grad, &Move::Velocity(self.momentum))?
                    }
                }
                let velocity = velocity.as_ref().unwrap_or(&grad);
                var.inplace_op2(velocity, &Move::Variable(self.lr))?;
                continue;
            }
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

/// Half of a step on the CPU, in place.
enum Move {
    /// `velocity = momentum·velocity + gradient`, with the momentum.
    Velocity(f64),
    /// `variable = variable - lr·velocity`, with the rate.
    Variable(f64),
}

impl InplaceOp2 for Move {
    fn name(&self) -> &'static str {
        "sgd"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<()> {
        let (Some(to), Some(from)) = (l1.contiguous_offsets(), l2.contiguous_offsets()) else {
            bail!("sgd expects contiguous tensors, got {l1:?} and {l2:?}")
        };
        if l1.shape() != l2.shape() {
            bail!(
                "sgd expects two tensors of one shape, got {:?} and {:?}",
                l1.shape(),
                l2.shape()
            )
        }
        match (s1, s2) {
            (CpuStorage::F32(a), CpuStorage::F32(b)) => {
                self.run(&mut a[to.0..to.1], &b[from.0..from.1])
            }
            (CpuStorage::F64(a), CpuStorage::F64(b)) => {
                self.run(&mut a[to.0..to.1], &b[from.0..from.1])
            }
            (a, b) => bail!(
                "sgd expects two tensors of F32 or of F64, got {:?} and {:?}",
                a.dtype(),
                b.dtype()
            ),
        }
        Ok(())
    }
}

/// Values of a task.
const PART: usize = 1 << 14;

/// Below this many values it costs more to wait for the other threads than they bring.
const PARALLEL_FROM: usize = 1 << 17;

impl Move {
    fn run<T: WithDType>(&self, a: &mut [T], b: &[T]) {
        if a.len() < PARALLEL_FROM {
            return self.run_part(a, b);
        }
        let parts = a.chunks_mut(PART).zip(b.chunks(PART));
        // Each task takes parts of its own, so that nobody waits for a lock.
        let parts: Vec<_> = parts.map(Mutex::new).collect();
        candle_core::utils::barrier_pool().execute_chunked(parts.len(), |range| {
            for part in &parts[range] {
                let mut part = part.lock().unwrap_or_else(|error| error.into_inner());
                let (a, b) = &mut *part;
                self.run_part(a, b);
            }
        });
    }

    fn run_part<T: WithDType>(&self, a: &mut [T], b: &[T]) {
        let values = a.iter_mut().zip(b);
        match self {
            Self::Velocity(momentum) => {
                let momentum = T::from_f64(*momentum);
                values.for_each(|(velocity, &grad)| *velocity = *velocity * momentum + grad);
            }
            Self::Variable(lr) => {
                let lr = T::from_f64(*lr);
                values.for_each(|(var, &velocity)| *var -= velocity * lr);
            }
        }
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

    /// The formulas in candle's own ops, for variables of one task and of several.
    #[test]
    fn in_place_as_composed() -> Result<()> {
        for (len, dtype) in [
            (1, DType::F32),
            (5, DType::F64),
            (PARALLEL_FROM + 7, DType::F32),
        ] {
            let vars = VarMap::new();
            let vb = VarBuilder::from_varmap(&vars, dtype, &Device::Cpu);
            let start = Init::Randn {
                mean: 0.0,
                stdev: 1.0,
            };
            let w = vb.get_with_hints((1, len), "w", start)?;
            let mut sgd = Sgd::new(&vars, 0.1, 0.9);
            let (mut expected, mut velocity) = (w.copy()?, w.zeros_like()?);
            for _ in 0..3 {
                let grad = (&expected * 2.0)?;
                velocity = ((velocity * 0.9)? + grad)?;
                expected = (expected - (&velocity * 0.1)?)?;
                sgd.step(&w.sqr()?.backward()?)?;
            }
            let distance = (w - expected)?.abs()?.max_all()?.to_dtype(DType::F64)?;
            assert!(distance.to_scalar::<f64>()? < 1e-5, "{len} {dtype:?}");
        }
        Ok(())
    }

    /// The gradient stays what it was: the first velocity is a copy.
    #[test]
    fn gradients_are_left_alone() -> Result<()> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let w = vb.get_with_hints(1, "w", Init::Const(1.0))?;
        let mut sgd = Sgd::new(&vars, 0.1, 0.9);
        let grads = w.sqr()?.backward()?;
        sgd.step(&grads)?;
        sgd.step(&grads)?;
        assert_eq!(
            grads
                .get(&w)
                .map(|grad| grad.to_vec1::<f32>())
                .transpose()?,
            Some(vec![2.0])
        );
        Ok(())
    }

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
