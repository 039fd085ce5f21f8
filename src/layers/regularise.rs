//! Penalties and constraints for parameters, Keras' `regularizers` and `constraints`.

use candle_core::{bail, DType, Result, Tensor, Var};

use super::{BatchNorm, Freeze};
use crate::ops::relu;
use crate::ops::slices::{check_float, computed_in};

/// A term for the loss that grows with the size of a parameter: `l1·Σ|w| + l2·Σw²`.
///
/// Keras: `L1(l1)`, `L2(l2)`, `L1L2(l1, l2)`. PyTorch: a `weight_decay` of SGD is `2·l2`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Penalty {
    /// The weight of the absolute values.
    pub l1: f64,
    /// The weight of the squares.
    pub l2: f64,
}

impl Penalty {
    /// The penalty of `parameter`, of any shape: a scalar of its dtype, or F32 if that is F16 or BF16,
    /// with a gradient `l1·sign(w) + 2·l2·w`, which is 0 for a value of 0.
    ///
    /// # Errors
    /// `l1` or `l2` below 0 or NaN, and a tensor that is not F32, F64, F16 or BF16.
    ///
    /// ```
    /// use candle_batch_norm::layers::Penalty;
    /// use candle_core::{Device, Tensor};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let w = Tensor::new(&[1f64, -2.0], &Device::Cpu)?;
    /// let penalty = Penalty { l1: 0.1, l2: 0.01 };
    /// assert!((penalty.of(&w)?.to_scalar::<f64>()? - 0.35).abs() < 1e-12);
    /// # Ok(())
    /// # }
    /// ```
    pub fn of(&self, parameter: &Tensor) -> Result<Tensor> {
        for (name, weight) in [("l1", self.l1), ("l2", self.l2)] {
            if weight.is_nan() || weight < 0.0 {
                bail!("a penalty expects {name} >= 0, got {weight}")
            }
        }
        check_float("a penalty", parameter)?;
        // candle sums half precision in itself.
        let w = parameter.to_dtype(computed_in(parameter.dtype()))?;
        // Nothing that is not asked for, be it infinite.
        let mut penalty = Tensor::zeros((), w.dtype(), w.device())?;
        if self.l1 > 0.0 {
            // Not `abs`, whose gradient is 1 at 0 in candle.
            let absolute = (relu(&w)? + relu(&w.neg()?)?)?;
            penalty = (penalty + (absolute.sum_all()? * self.l1)?)?;
        }
        if self.l2 > 0.0 {
            penalty = (penalty + (w.sqr()?.sum_all()? * self.l2)?)?;
        }
        Ok(penalty)
    }
}

impl BatchNorm {
    /// The penalties of weight and bias, to be added to the loss: a scalar, or `None` if the layer has
    /// neither. Those of a layer that keeps them ([`Freeze::StatisticsAndParameters`]) are constants.
    /// Keras: `gamma_regularizer` and `beta_regularizer`.
    ///
    /// # Errors
    /// Those of [`Penalty::of`].
    ///
    /// ```
    /// use candle_batch_norm::{batch_norm, layers::Penalty};
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = VarMap::new();
    /// let bn = batch_norm(3, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    /// let l2 = Penalty { l1: 0.0, l2: 0.5 };
    /// let penalty = bn.penalty(l2, Penalty::default())?.unwrap(); // of weights of 1
    /// assert_eq!(penalty.to_scalar::<f32>()?, 1.5);
    /// # Ok(())
    /// # }
    /// ```
    pub fn penalty(&self, weight: Penalty, bias: Penalty) -> Result<Option<Tensor>> {
        let frozen = self.config().freeze == Freeze::StatisticsAndParameters;
        let of = |penalty: Penalty, t: Option<&Tensor>| match t {
            Some(t) if frozen => penalty.of(&t.detach()).map(Some),
            t => t.map(|t| penalty.of(t)).transpose(),
        };
        Ok(match (of(weight, self.weight())?, of(bias, self.bias())?) {
            (Some(weight), Some(bias)) => Some((weight + bias)?),
            (weight, bias) => weight.or(bias),
        })
    }
}

/// What a parameter has to fulfil after every step of an optimiser. A norm is that of all of its values
/// together, whatever its shape.
///
/// Keras: `NonNeg`, `UnitNorm` and `MaxNorm`, whose norms go along an axis; for `[c]` they are the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Constraint {
    /// `max(w, 0)`; a NaN stays one.
    NonNegative,
    /// `w / |w|`; zeros stay zeros.
    UnitNorm,
    /// `w·min(1, r / |w|)` for the radius `r`.
    MaxNorm(f64),
}

impl Constraint {
    /// Changes `parameter` in place: a variable, such as [`BatchNorm::weight`] of a layer that was
    /// built from a `VarMap`. It is computed in F64.
    ///
    /// # Errors
    /// A tensor that is no variable or no floats, and a radius that is not at least 0. Then nothing has
    /// changed.
    ///
    /// ```
    /// use candle_batch_norm::{batch_norm, layers::Constraint};
    /// use candle_core::{DType, Device};
    /// use candle_nn::{VarBuilder, VarMap};
    ///
    /// # fn main() -> candle_core::Result<()> {
    /// let vars = VarMap::new();
    /// let bn = batch_norm(4, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
    /// // optimiser.backward_step(&loss)?;
    /// Constraint::MaxNorm(1.0).apply(bn.weight().unwrap())?;
    /// assert_eq!(bn.weight().unwrap().to_vec1::<f32>()?, [0.5; 4]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn apply(&self, parameter: &Tensor) -> Result<()> {
        if !parameter.is_variable() {
            bail!(
                "a constraint expects a variable, got a tensor of shape {:?} that is none",
                parameter.dims()
            )
        }
        check_float("a constraint", parameter)?;
        let value = parameter.detach().to_dtype(DType::F64)?;
        let norm = || value.sqr()?.sum_all()?.sqrt()?.to_scalar::<f64>();
        let value = match *self {
            Self::NonNegative => value.lt(0.0)?.where_cond(&value.zeros_like()?, &value)?,
            Self::UnitNorm => match norm()? {
                0.0 => value,
                norm => (value / norm)?,
            },
            Self::MaxNorm(radius) if radius >= 0.0 => match norm()? {
                norm if norm > radius => (value * (radius / norm))?,
                _ => return Ok(()),
            },
            Self::MaxNorm(radius) => bail!("a constraint expects a radius >= 0, got {radius}"),
        };
        // A copy in any case: a variable cannot be set to its own memory.
        let value = value.to_dtype(parameter.dtype())?.copy()?;
        Var::from_tensor(parameter)?.set(&value)
    }
}
