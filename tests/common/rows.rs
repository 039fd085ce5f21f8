//! Row norms in `f64` by their closed forms.

/// The arguments of one case, in `f64`. `x` is `[n, c, s]`; a row is a group of `c / groups` channels of a sample.
#[derive(Clone, Default)]
pub struct RowCase {
    pub n: usize,
    pub groups: usize,
    pub c: usize,
    pub s: usize,
    pub x: Vec<f64>,
    pub dy: Vec<f64>,
    pub weight: Option<Vec<f64>>,
    pub bias: Option<Vec<f64>>,
    pub relu: bool,
    pub rms: bool,
    pub eps: f64,
}

/// A row norm and its gradients.
#[derive(Debug, Default)]
pub struct RowTruth {
    pub y: Vec<f64>,
    pub mean: Vec<f64>,
    pub var: Vec<f64>,
    pub dx: Vec<f64>,
    pub dweight: Vec<f64>,
    pub dbias: Vec<f64>,
    /// `Σ|g·x̂|` and `Σ|g|`, the scales of the rounding in the two before.
    pub dweight_scale: Vec<f64>,
    pub dbias_scale: Vec<f64>,
    /// The scale of the rounding in `dx`.
    pub dx_scale: Vec<f64>,
}

impl RowCase {
    pub fn truth(&self) -> RowTruth {
        let len = self.c / self.groups * self.s;
        let zeros = || vec![0.0; self.c];
        let mut truth = RowTruth {
            dweight: zeros(),
            dbias: zeros(),
            dweight_scale: zeros(),
            dbias_scale: zeros(),
            ..RowTruth::default()
        };
        for row in 0..self.n * self.groups {
            let indices = row * len..(row + 1) * len;
            let m = len as f64;
            let pivot = self.x[indices.start];
            let distances: f64 = indices.clone().map(|i| self.x[i] - pivot).sum();
            let mean = if self.rms { 0.0 } else { pivot + distances / m };
            let squares = indices.clone().map(|i| (self.x[i] - mean).powi(2));
            let var = squares.sum::<f64>() / m;
            let rstd = 1.0 / (var + self.eps).sqrt();
            let (mut h_sum, mut hx_sum) = (0.0, 0.0);
            let mut values = vec![];
            for i in indices {
                let channel = i / self.s % self.c;
                let weight = self.weight.as_ref().map_or(1.0, |weight| weight[channel]);
                let bias = self.bias.as_ref().map_or(0.0, |bias| bias[channel]);
                let normalised = (self.x[i] - mean) * rstd;
                let y = normalised * weight + bias;
                let cut = self.relu && y <= 0.0;
                let g = if cut { 0.0 } else { self.dy[i] };
                truth.y.push(if cut { 0.0 } else { y });
                truth.dweight[channel] += g * normalised;
                truth.dbias[channel] += g;
                truth.dweight_scale[channel] += (g * normalised).abs();
                truth.dbias_scale[channel] += g.abs();
                h_sum += weight * g;
                hx_sum += weight * g * normalised;
                values.push((normalised, weight * g));
            }
            let h_mean = if self.rms { 0.0 } else { h_sum / m };
            for (normalised, h) in values {
                truth.dx.push(rstd * (h - h_mean - normalised * hx_sum / m));
                truth
                    .dx_scale
                    .push(rstd * (h.abs() + h_mean.abs() + (normalised * hx_sum / m).abs()));
            }
            truth.mean.push(mean);
            truth.var.push(var);
        }
        truth
    }
}
