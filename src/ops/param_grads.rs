//! The gradients of a norm's weight and bias.

use candle_core::{DType, Result, Tensor, WithDType};

use super::slices::{self, dispatch};

/// Both, in the dtype of the parameters.
pub(super) enum ParamGrads {
    /// As one tensor, `[2, c]`.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code))]
    Stacked(Tensor),
    /// `[c]` each, with memory of its own.
    Apart([Tensor; 2]),
}

/// Which of the two.
#[derive(Clone, Copy)]
pub(super) enum Param {
    Weight,
    Bias,
}

impl ParamGrads {
    /// From the sums of the CPU, `[2, c]`.
    pub fn from_sums(op: &str, sums: &[f64], dtype: DType) -> Result<Self> {
        fn rounded<T: WithDType>(sums: &[f64]) -> Result<Tensor> {
            let values: Vec<_> = sums.iter().map(|&sum| T::from_f64(sum)).collect();
            Ok(slices::tensor(values, &sums.len().into()))
        }
        let (weight, bias) = sums.split_at(sums.len() / 2);
        let rounded = |sums: &[f64]| dispatch!(op, dtype, rounded(sums));
        Ok(Self::Apart([rounded(weight)?, rounded(bias)?]))
    }

    /// One of them, `[c]`, which may be a view.
    pub fn get(&self, param: Param) -> Result<Tensor> {
        match self {
            Self::Stacked(both) => both.get(param as usize),
            Self::Apart(both) => Ok(both[param as usize].clone()),
        }
    }

    /// One of them with memory of its own, as gradients have that candle sums up.
    pub fn alone(&self, param: Param) -> Result<Tensor> {
        match self {
            Self::Stacked(_) => self.get(param)?.copy(),
            Self::Apart(_) => self.get(param),
        }
    }

    /// Both as `[2, c]`.
    pub fn stacked(self) -> Result<Tensor> {
        match self {
            Self::Stacked(both) => Ok(both),
            Self::Apart(both) => Tensor::stack(&both, 0),
        }
    }
}
