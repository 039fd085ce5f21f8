//! Batch norm in double precision, as simple as the formulas.

use super::values::Value;
use super::{Case, Inputs, Outputs};

pub const EPS: f64 = 1e-5;

/// Compares what the kernels made with what they should have made.
pub fn check<T: Value, P: Value>(case: &Case, inputs: &Inputs<T, P>, outputs: &Outputs<T, P>) {
    for channel in 0..case.dims.1 {
        Channel::new(case, inputs, channel).check(inputs, outputs);
    }
}

struct Channel<'a> {
    case: &'a Case,
    index: usize,
    /// Where its values are.
    offsets: Vec<usize>,
    mean: f64,
    var: f64,
    weight: f64,
    bias: f64,
}

impl<'a> Channel<'a> {
    fn new<T: Value, P: Value>(case: &'a Case, inputs: &Inputs<T, P>, index: usize) -> Self {
        let (n, c, s) = case.dims;
        let offsets: Vec<usize> = (0..n * s)
            .map(|j| (j / s * c + index) * s + j % s)
            .collect();
        let m = offsets.len() as f64;
        let x = |&i: &usize| inputs.x[i].to_f64();
        let (mean, var) = if case.given {
            (inputs.mean[index], inputs.var[index])
        } else {
            // Centred first, so that a large offset costs nothing here either.
            let first = x(&offsets[0]);
            let shifted = offsets.iter().map(|i| x(i) - first).sum::<f64>() / m;
            let mean = match case.remove_mean {
                true => first + shifted,
                false => 0.0,
            };
            let var = offsets.iter().map(|i| (x(i) - mean).powi(2)).sum::<f64>() / m;
            (mean, var)
        };
        Self {
            case,
            index,
            offsets,
            mean,
            var,
            weight: match case.weight {
                true => inputs.weight[index].to_f64(),
                false => 1.0,
            },
            bias: match case.bias {
                true => inputs.bias[index].to_f64(),
                false => 0.0,
            },
        }
    }

    #[track_caller]
    fn assert_close(&self, what: &str, got: f64, expected: f64, tolerance: f64) {
        // Also false for NaN.
        let is_close = (got - expected).abs() <= tolerance;
        assert!(
            is_close,
            "{what} of channel {}: got {got:e}, expected {expected:e} ± {tolerance:e}\n{:?}",
            self.index, self.case
        );
    }

    fn check<T: Value, P: Value>(&self, inputs: &Inputs<T, P>, outputs: &Outputs<T, P>) {
        let (case, c) = (self.case, self.case.dims.1);
        let m = case.m() as f64;
        let rstd = 1.0 / (self.var + EPS).sqrt();
        let x_hat = |i: usize| (inputs.x[i].to_f64() - self.mean) * rstd;

        // The kernels' sums start in single precision for all dtypes but double.
        let sum_tolerance = T::TOLERANCE.min(2e-6);
        let deviation = self.var.sqrt();
        let (mean, var) = (outputs.saved[self.index], outputs.saved[c + self.index]);
        self.assert_close("mean", mean, self.mean, sum_tolerance * deviation + 1e-15);
        self.assert_close("var", var, self.var, sum_tolerance * self.var * 2.0);

        let mut gs = Vec::new();
        for &i in &self.offsets {
            let residual = match case.residual {
                true => inputs.residual[i].to_f64(),
                false => 0.0,
            };
            let linear = x_hat(i) * self.weight + self.bias + residual;
            let tolerance = T::TOLERANCE * (1.0 + linear.abs());
            // So near to zero that either side is right, the gradient follows the output.
            let near_zero = linear.abs() <= tolerance;
            let y = outputs.y[i].to_f64();
            let is_cut = case.relu && if near_zero { y <= 0.0 } else { linear < 0.0 };
            let expected = if is_cut { 0.0 } else { linear };
            self.assert_close("y", y, expected, tolerance);
            let g = if is_cut { 0.0 } else { inputs.dy[i].to_f64() };
            assert_eq!(outputs.dresidual[i].to_f64(), g, "dresidual {i}\n{case:?}");
            gs.push(g);
        }

        let with_x_hat = || {
            gs.iter()
                .zip(&self.offsets)
                .map(|(&g, &i)| (g, x_hat(i), i))
        };
        let (dbias, dweight) = (
            gs.iter().sum::<f64>(),
            with_x_hat().map(|(g, x_hat, _)| g * x_hat).sum::<f64>(),
        );
        let sizes = with_x_hat().map(|(g, x_hat, _)| (g * x_hat).abs().max(g.abs()));
        let tolerance = sum_tolerance * (1.0 + sizes.sum::<f64>());
        let rounded = |v: f64| tolerance + P::TOLERANCE * v.abs();
        let dparams = &outputs.dparams;
        let (got_dweight, got_dbias) = (dparams[self.index], dparams[c + self.index]);
        self.assert_close("dweight", got_dweight.to_f64(), dweight, rounded(dweight));
        self.assert_close("dbias", got_dbias.to_f64(), dbias, rounded(dbias));

        for (g, x_hat, i) in with_x_hat() {
            let through_mean = match case.remove_mean {
                true => dbias / m,
                false => 0.0,
            };
            let through_stats = match case.training() {
                true => through_mean + x_hat * dweight / m,
                false => 0.0,
            };
            let scale = self.weight * rstd;
            let expected = scale * (g - through_stats);
            let tolerance = T::TOLERANCE * (1.0 + g.abs() + x_hat.abs()) * scale.abs().max(1.0);
            self.assert_close("dx", outputs.dx[i].to_f64(), expected, tolerance);
        }
    }
}
