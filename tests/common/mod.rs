//! What the tests share: devices, data, and batch norm in `f64` by its closed forms.
#![allow(dead_code)] // each test binary uses its own part

pub mod rows;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Every device that the tests can run on: the CPU, and a CUDA device where there is one.
pub fn devices() -> Vec<Device> {
    let mut devices = vec![Device::Cpu];
    if cfg!(feature = "cuda") {
        match Device::new_cuda(0) {
            Ok(device) => devices.push(device),
            Err(error) => println!("not run on CUDA: {error}"),
        }
    } else {
        println!("not run on CUDA: built without the feature `cuda`");
    }
    devices
}

/// `count` values around `offset`, roughly normal with unit variance, the same for each seed.
pub fn random(seed: u64, count: usize, offset: f64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut normal = || (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
    (0..count).map(|_| offset + normal()).collect()
}

/// The values as the dtype holds them, on the device.
pub fn tensor(values: &[f64], shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)
}

pub fn var(values: &[f64], shape: &[usize], dtype: DType, device: &Device) -> Result<Var> {
    Var::from_tensor(&tensor(values, shape, dtype, device)?)
}

/// The values of a tensor of any shape and dtype, in `f64`.
pub fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_device(&Device::Cpu)?
        .to_dtype(DType::F64)?
        .flatten_all()?
        .to_vec1()
}

/// Asserts that every value is within `absolute + relative·|expected|`.
#[track_caller]
pub fn assert_close(what: &str, got: &[f64], expected: &[f64], absolute: f64, relative: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: number of values");
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let bound = absolute + relative * expected.abs();
        assert!(
            (got - expected).abs() <= bound,
            "{what}[{i}]: got {got}, expected {expected} ± {bound:e}"
        );
    }
}

/// Asserts that an error says all of `parts`.
#[track_caller]
pub fn assert_error<T>(result: Result<T>, parts: &[&str]) {
    let error = match result {
        Ok(_) => panic!("expected an error with {parts:?}"),
        Err(error) => error.to_string(),
    };
    for part in parts {
        assert!(error.contains(part), "{error:?} should say {part:?}");
    }
}

/// `x`, by an op whose gradient is what `bwd` makes of `x` and `dy`.
pub fn identity_with(
    x: &Tensor,
    bwd: impl Fn(&Tensor, &Tensor) -> Result<Option<Tensor>> + Send + Sync + 'static,
) -> Result<Tensor> {
    struct Identity<F>(F);

    impl<F: Fn(&Tensor, &Tensor) -> Result<Option<Tensor>>> CustomOp1 for Identity<F> {
        fn name(&self) -> &'static str {
            "identity"
        }

        fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
            Ok((x.clone(), layout.shape().clone()))
        }

        fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
            (self.0)(x, dy)
        }
    }
    x.apply_op1(Identity(bwd))
}

/// `x`, by an op whose gradient is an error.
pub fn refuses(x: &Tensor) -> Result<Tensor> {
    identity_with(x, |_, _| candle_core::bail!("refused"))
}

/// The gradient of `f` by central differences.
pub fn differences(at: &[f64], step: f64, mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    let mut moved = at.to_vec();
    let mut difference = |i: usize| {
        moved[i] = at[i] + step;
        let above = f(&moved);
        moved[i] = at[i] - step;
        let below = f(&moved);
        moved[i] = at[i];
        (above - below) / (2.0 * step)
    };
    (0..at.len()).map(&mut difference).collect()
}

/// What may differ from PyTorch's numbers, relative to the larger of 1 and the expected value.
pub fn pytorch_tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 2e-6,
        DType::F16 => 2e-3,
        DType::BF16 => 1.6e-2,
        dtype => panic!("no tolerance for {dtype:?}"),
    }
}

/// The relative error that the dtype brings by itself when it rounds a result.
pub fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-6,
        DType::F16 => 6e-4,
        DType::BF16 => 5e-3,
        dtype => panic!("no tolerance for {dtype:?}"),
    }
}

/// Runs the test of this name again with other numbers of threads, and compares the bits of its results.
pub fn assert_bits_for_any_number_of_threads(test: &str, results: &[f64]) -> Result<()> {
    const CHILD: &str = "TEST_PRINTS_BITS";
    const MARK: &str = "bits of the results: ";
    // FNV-1a
    let hash = results
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, result| {
            (hash ^ result.to_bits()).wrapping_mul(0x0100_0000_01b3)
        });
    if std::env::var(CHILD).is_ok() {
        println!("{MARK}{hash:x}");
        return Ok(());
    }
    for threads in ["1", "3"] {
        let output = std::process::Command::new(std::env::current_exe()?)
            .args(["--exact", test, "--nocapture"])
            .env("RAYON_NUM_THREADS", threads)
            .env("CANDLE_NUM_THREADS", threads)
            .env(CHILD, "")
            .output()?;
        let output = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.contains(&format!("{MARK}{hash:x}")),
            "{threads} threads: {output}"
        );
    }
    Ok(())
}

/// The arguments of one case, in `f64`.
#[derive(Clone, Default)]
pub struct Case {
    pub shape: Vec<usize>,
    pub x: Vec<f64>,
    pub dy: Vec<f64>,
    pub weight: Option<Vec<f64>>,
    pub bias: Option<Vec<f64>>,
    pub residual: Option<Vec<f64>>,
    pub relu: bool,
    pub eps: f64,
    /// Mean and variance to normalise with, in the place of the batch's.
    pub given: Option<(Vec<f64>, Vec<f64>)>,
}

/// Batch norm and its gradients by the closed forms.
#[derive(Debug, Default)]
pub struct Truth {
    pub y: Vec<f64>,
    pub mean: Vec<f64>,
    pub var: Vec<f64>,
    pub dx: Vec<f64>,
    pub dweight: Vec<f64>,
    pub dbias: Vec<f64>,
    pub dresidual: Vec<f64>,
    /// `Σ|g·x̂|`, the scale of the rounding in `dweight`.
    pub dweight_scale: Vec<f64>,
}

impl Case {
    pub fn truth(&self) -> Truth {
        let c = self.shape[1];
        let s: usize = self.shape[2..].iter().product();
        let mut truth = Truth {
            y: vec![0.0; self.x.len()],
            dx: vec![0.0; self.x.len()],
            dresidual: vec![0.0; self.x.len()],
            ..Truth::default()
        };
        for channel in 0..c {
            let indices: Vec<usize> = (0..self.x.len()).filter(|i| i / s % c == channel).collect();
            let m = indices.len() as f64;
            let (mean, var) = match &self.given {
                Some((mean, var)) => (mean[channel], var[channel]),
                None => {
                    let pivot = self.x[indices[0]];
                    let shifted: f64 = indices.iter().map(|&i| self.x[i] - pivot).sum();
                    let mean = pivot + shifted / m;
                    let squares: f64 = indices.iter().map(|&i| (self.x[i] - mean).powi(2)).sum();
                    (mean, squares / m)
                }
            };
            let weight = self.weight.as_ref().map_or(1.0, |weight| weight[channel]);
            let bias = self.bias.as_ref().map_or(0.0, |bias| bias[channel]);
            let rstd = 1.0 / (var + self.eps).sqrt();
            let (mut dweight, mut dbias, mut scale) = (0.0, 0.0, 0.0);
            for &i in &indices {
                let normalised = (self.x[i] - mean) * rstd;
                let residual = self.residual.as_ref().map_or(0.0, |residual| residual[i]);
                let y = normalised * weight + bias + residual;
                let cut = self.relu && y <= 0.0;
                truth.y[i] = if cut { 0.0 } else { y };
                truth.dresidual[i] = if cut { 0.0 } else { self.dy[i] };
                dweight += truth.dresidual[i] * normalised;
                dbias += truth.dresidual[i];
                scale += (truth.dresidual[i] * normalised).abs();
            }
            for &i in &indices {
                let normalised = (self.x[i] - mean) * rstd;
                let through_stats = match self.given {
                    Some(_) => 0.0,
                    None => (dbias + normalised * dweight) / m,
                };
                truth.dx[i] = weight * rstd * (truth.dresidual[i] - through_stats);
            }
            truth.mean.push(mean);
            truth.var.push(var);
            truth.dweight.push(dweight);
            truth.dbias.push(dbias);
            truth.dweight_scale.push(scale);
        }
        truth
    }
}
