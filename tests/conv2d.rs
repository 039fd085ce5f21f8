//! The convolution and its gradients against plain loops in `f64`, and against candle's own.

mod common;

use candle_batch_norm::layers;
use candle_batch_norm::ops::conv2d;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use common::{assert_close, assert_error, devices, random, rounding, tensor, values, var};

/// One convolution, in `f64`.
#[derive(Debug, Clone)]
struct Conv {
    x: [usize; 4],
    weight: [usize; 4],
    bias: bool,
    config: Conv2dConfig,
}

/// What it should give, with the sum of the absolute values behind each number: the scale of its
/// rounding.
#[derive(Default)]
struct Truth {
    out: [usize; 4],
    y: Vec<f64>,
    dx: Vec<f64>,
    dweight: Vec<f64>,
    dbias: Vec<f64>,
    scales: [Vec<f64>; 4],
}

impl Conv {
    fn new(x: [usize; 4], weight: [usize; 4]) -> Self {
        Self {
            x,
            weight,
            bias: true,
            config: Conv2dConfig::default(),
        }
    }

    fn out(&self) -> [usize; 4] {
        let config = &self.config;
        let out = |len: usize, k: usize| {
            (len + 2 * config.padding - config.dilation * (k - 1) - 1) / config.stride + 1
        };
        let [n, _, h, w] = self.x;
        let [c, _, kh, kw] = self.weight;
        [n, c, out(h, kh), out(w, kw)]
    }

    /// `x`, `weight`, `bias` and `dy`.
    fn data(&self) -> [Vec<f64>; 4] {
        let count = |shape: [usize; 4]| shape.iter().product();
        [
            random(1, count(self.x), 0.3),
            random(2, count(self.weight), -0.1),
            random(3, self.weight[0], 0.5),
            random(4, count(self.out()), 0.2),
        ]
    }

    fn truth(&self, [x, weight, bias, dy]: &[Vec<f64>; 4]) -> Truth {
        let out @ [n, c_out, oh, ow] = self.out();
        let [_, c_in, h, w] = self.x;
        let [_, c_kernel, kh, kw] = self.weight;
        let config = &self.config;
        let mut t = Truth {
            out,
            y: vec![0.0; dy.len()],
            dx: vec![0.0; x.len()],
            dweight: vec![0.0; weight.len()],
            dbias: vec![0.0; bias.len()],
            scales: [dy, x, weight, bias].map(|values| vec![0.0; values.len()]),
        };
        for (at_y, &dy) in dy.iter().enumerate() {
            let (j, i) = (at_y % ow, at_y / ow % oh);
            let (o, image) = (at_y / ow / oh % c_out, at_y / ow / oh / c_out);
            assert!(image < n);
            if self.bias {
                t.y[at_y] += bias[o];
                t.scales[0][at_y] += bias[o].abs();
            }
            t.dbias[o] += dy;
            t.scales[3][o] += dy.abs();
            let group = o / (c_out / config.groups);
            for at_k in 0..c_kernel * kh * kw {
                let (l, k, c) = (at_k % kw, at_k / kw % kh, at_k / kw / kh);
                let row = (i * config.stride + k * config.dilation).checked_sub(config.padding);
                let col = (j * config.stride + l * config.dilation).checked_sub(config.padding);
                let (Some(row), Some(col)) = (row, col) else {
                    continue;
                };
                if row >= h || col >= w {
                    continue;
                }
                let at_x = ((image * c_in + group * c_kernel + c) * h + row) * w + col;
                let at_w = o * c_kernel * kh * kw + at_k;
                t.y[at_y] += weight[at_w] * x[at_x];
                t.dx[at_x] += weight[at_w] * dy;
                t.dweight[at_w] += x[at_x] * dy;
                t.scales[0][at_y] += (weight[at_w] * x[at_x]).abs();
                t.scales[1][at_x] += (weight[at_w] * dy).abs();
                t.scales[2][at_w] += (x[at_x] * dy).abs();
            }
        }
        t
    }

    /// Compares the op in `dtype` with the loops. The parameters that the loops get are rounded to
    /// the dtype first, so that only the op's own rounding is left.
    #[track_caller]
    fn check(&self, dtype: DType) -> Result<()> {
        let device = Device::Cpu;
        let [x, weight, bias, dy] = self.data();
        let x = var(&x, &self.x, dtype, &device)?;
        let weight = var(&weight, &self.weight, dtype, &device)?;
        let bias = var(&bias, &self.weight[..1], dtype, &device)?;
        let dy = tensor(&dy, &self.out(), dtype, &device)?;
        let given_bias = self.bias.then_some(bias.as_tensor());
        let y = conv2d(&x, &weight, given_bias, &self.config)?;
        assert_eq!((y.dims(), y.dtype()), (&self.out()[..], dtype), "{self:?}");
        let grads = (&y * &dy)?.sum_all()?.backward()?;

        let rounded = [values(&x)?, values(&weight)?, values(&bias)?, values(&dy)?];
        let truth = self.truth(&rounded);
        assert_eq!(truth.out, self.out());
        let mut results = vec![
            ("y", y, &truth.y, 0),
            ("dx", grad(&grads, &x), &truth.dx, 1),
            ("dweight", grad(&grads, &weight), &truth.dweight, 2),
        ];
        match self.bias {
            true => results.push(("dbias", grad(&grads, &bias), &truth.dbias, 3)),
            false => assert!(grads.get(&bias).is_none()),
        }
        for (what, got, expected, scale) in results {
            let got = values(&got)?;
            assert_eq!(got.len(), expected.len(), "{what} of {self:?}");
            for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
                // Sums are F32 at least; the last rounding is the dtype's.
                let sum = rounding(if dtype == DType::F64 {
                    dtype
                } else {
                    DType::F32
                });
                let bound = sum * truth.scales[scale][i] + rounding(dtype) * expected.abs();
                assert!(
                    (got - expected).abs() <= bound,
                    "{what}[{i}] of {self:?} {dtype:?}: got {got}, expected {expected} ± {bound:e}"
                );
            }
        }
        Ok(())
    }
}

#[track_caller]
fn grad(grads: &candle_core::backprop::GradStore, var: &Var) -> Tensor {
    match grads.get(var) {
        Some(grad) => grad.clone(),
        None => panic!("no gradient"),
    }
}

/// Every combination of the grid with `kernel`, on images of a few odd sizes.
fn grid(kernel: [usize; 2]) -> Result<()> {
    let mut count = 0;
    for stride in 1..=3 {
        for padding in 0..=2 {
            for dilation in 1..=2 {
                for groups in [1, 2, 4] {
                    for [n, h, w] in [[1, 9, 11], [2, 12, 9], [5, 10, 10]] {
                        let config = Conv2dConfig {
                            padding,
                            stride,
                            dilation,
                            groups,
                            cudnn_fwd_algo: None,
                        };
                        let conv = Conv {
                            x: [n, 4, h, w],
                            weight: [8, 4 / groups, kernel[0], kernel[1]],
                            bias: count % 2 == 0,
                            config,
                        };
                        conv.check(DType::F32)?;
                        conv.check(DType::F64)?;
                        count += 1;
                    }
                }
            }
        }
    }
    assert_eq!(count, 162);
    Ok(())
}

#[test]
fn all_configurations_1x1() -> Result<()> {
    grid([1, 1])
}

#[test]
fn all_configurations_3x3() -> Result<()> {
    grid([3, 3])
}

#[test]
fn all_configurations_5x5() -> Result<()> {
    grid([5, 5])
}

#[test]
fn all_configurations_2x3() -> Result<()> {
    grid([2, 3])
}

/// Panels of every width and with lanes to spare, more depth than is read at a time, more rows than
/// a block, and enough images to be shared among all tasks.
#[test]
fn channels_and_sizes() -> Result<()> {
    let pad = Conv2dConfig {
        padding: 1,
        ..Default::default()
    };
    for (c_in, c_out) in [
        (1, 1),
        (3, 17),
        (16, 8),
        (17, 33),
        (40, 48),
        (33, 70),
        (65, 100),
        (96, 64),
    ] {
        let mut conv = Conv::new([2, c_in, 5, 7], [c_out, c_in, 3, 3]);
        conv.config = pad;
        conv.check(DType::F32)?;
        conv.check(DType::F64)?;
    }
    for n in [15, 16, 17, 40] {
        let mut conv = Conv::new([n, 3, 13, 14], [20, 3, 3, 3]);
        conv.config = pad;
        conv.check(DType::F32)?;
    }
    // A kernel as large as the input, and pixels that no window reaches.
    Conv::new([3, 5, 4, 6], [7, 5, 4, 6]).check(DType::F64)?;
    let mut skipping = Conv::new([2, 3, 11, 10], [4, 3, 1, 1]);
    skipping.config.stride = 4;
    skipping.check(DType::F64)?;
    // More padding than the kernel can see.
    let mut padded = Conv::new([2, 3, 4, 3], [4, 3, 2, 1]);
    padded.config.padding = 3;
    padded.check(DType::F64)?;
    padded.config.stride = 2;
    padded.check(DType::F64)
}

#[test]
fn half_precision_sums_in_f32() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        let mut conv = Conv::new([3, 6, 9, 8], [10, 3, 3, 3]);
        conv.config.padding = 1;
        conv.config.groups = 2;
        conv.check(dtype)?;
        conv.bias = false;
        conv.config.stride = 2;
        conv.check(dtype)?;
    }
    Ok(())
}

/// Where candle's own gradient works, it says the same.
#[test]
fn agrees_with_candle() -> Result<()> {
    let device = Device::Cpu;
    for (stride, padding, dilation) in [(1, 0, 1), (1, 1, 1), (1, 2, 2), (2, 1, 1)] {
        let mut conv = Conv::new([3, 4, 9, 9], [6, 4, 3, 3]);
        conv.config.stride = stride;
        conv.config.padding = padding;
        conv.config.dilation = dilation;
        let [x, weight, bias, dy] = conv.data();
        let x = var(&x, &conv.x, DType::F64, &device)?;
        let weight = var(&weight, &conv.weight, DType::F64, &device)?;
        let bias = var(&bias, &conv.weight[..1], DType::F64, &device)?;
        let dy = tensor(&dy, &conv.out(), DType::F64, &device)?;
        let ours = conv2d(&x, &weight, Some(&bias), &conv.config)?;
        let theirs = x
            .conv2d(&weight, padding, stride, dilation, 1)?
            .broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
        assert_close("y", &values(&ours)?, &values(&theirs)?, 1e-12, 1e-12);
        let ours = (ours * &dy)?.sum_all()?.backward()?;
        let theirs = (theirs * &dy)?.sum_all()?.backward()?;
        for (what, var) in [("dx", &x), ("dweight", &weight), ("dbias", &bias)] {
            let (ours, theirs) = (values(&grad(&ours, var))?, values(&grad(&theirs, var))?);
            assert_close(what, &ours, &theirs, 1e-11, 1e-11);
        }
    }
    Ok(())
}

/// A loss that is not linear in any of the arguments, and its slope by central differences.
#[test]
fn finite_differences() -> Result<()> {
    let mut conv = Conv::new([2, 4, 7, 6], [6, 2, 3, 2]);
    conv.config = Conv2dConfig {
        padding: 1,
        stride: 2,
        dilation: 2,
        groups: 2,
        cudnn_fwd_algo: None,
    };
    let device = Device::Cpu;
    let [x, weight, bias, _] = conv.data();
    let vars = [
        var(&x, &conv.x, DType::F64, &device)?,
        var(&weight, &conv.weight, DType::F64, &device)?,
        var(&bias, &conv.weight[..1], DType::F64, &device)?,
    ];
    let loss = || {
        conv2d(&vars[0], &vars[1], Some(&vars[2]), &conv.config)?
            .sqr()?
            .sum_all()
    };
    let grads = loss()?.backward()?;
    for (what, var) in ["dx", "dweight", "dbias"].iter().zip(&vars) {
        let exact = values(&grad(&grads, var))?;
        let at = values(var)?;
        let mut slopes = vec![];
        for i in 0..at.len() {
            let moved_loss = |by: f64| -> Result<f64> {
                let mut moved = at.clone();
                moved[i] += by;
                var.set(&tensor(&moved, var.dims(), DType::F64, &device)?)?;
                loss()?.to_scalar()
            };
            slopes.push((moved_loss(1e-4)? - moved_loss(-1e-4)?) / 2e-4);
        }
        var.set(&tensor(&at, var.dims(), DType::F64, &device)?)?;
        assert_close(what, &exact, &slopes, 1e-6, 1e-6);
    }
    Ok(())
}

#[test]
fn same_bits_on_every_run() -> Result<()> {
    let device = Device::Cpu;
    let mut conv = Conv::new([37, 8, 12, 12], [24, 8, 3, 3]);
    conv.config.padding = 1;
    let [x, weight, bias, _] = conv.data();
    let x = var(&x, &conv.x, DType::F32, &device)?;
    let weight = var(&weight, &conv.weight, DType::F32, &device)?;
    let bias = var(&bias, &conv.weight[..1], DType::F32, &device)?;
    let run = || -> Result<Vec<Vec<u32>>> {
        let y = conv2d(&x, &weight, Some(&bias), &conv.config)?;
        let grads = y.sqr()?.sum_all()?.backward()?;
        let results = [
            y,
            grad(&grads, &x),
            grad(&grads, &weight),
            grad(&grads, &bias),
        ];
        let bits = |t: &Tensor| -> Result<Vec<u32>> {
            let values = t.flatten_all()?.to_vec1::<f32>()?;
            Ok(values.into_iter().map(f32::to_bits).collect())
        };
        results.iter().map(bits).collect()
    };
    let first = run()?;
    for _ in 0..5 {
        assert!(run()? == first);
    }
    Ok(())
}

/// Gradients go to what is tracked and to nothing else; the graph can be walked twice.
#[test]
fn tracked_arguments_only() -> Result<()> {
    let device = Device::Cpu;
    let conv = Conv::new([2, 3, 6, 6], [4, 3, 3, 3]);
    let [x, weight, bias, dy] = conv.data();
    let truth = conv.truth(&[x.clone(), weight.clone(), bias.clone(), vec![1.0; dy.len()]]);
    let x = var(&x, &conv.x, DType::F64, &device)?;
    let weight = var(&weight, &conv.weight, DType::F64, &device)?;
    let bias = var(&bias, &conv.weight[..1], DType::F64, &device)?;
    let expected = [&truth.dx, &truth.dweight, &truth.dbias];
    for mask in 1..8 {
        let arg = |i: usize, var: &Var| match mask >> i & 1 {
            1 => var.as_tensor().clone(),
            _ => var.as_detached_tensor(),
        };
        let (x_arg, weight_arg, bias_arg) = (arg(0, &x), arg(1, &weight), arg(2, &bias));
        let y = conv2d(&x_arg, &weight_arg, Some(&bias_arg), &conv.config)?;
        for _ in 0..2 {
            let grads = y.backward()?;
            let args = [&x_arg, &weight_arg, &bias_arg];
            for (i, (arg, var)) in args.iter().zip([&x, &weight, &bias]).enumerate() {
                assert!(
                    grads.get(arg).is_some() == (mask >> i & 1 == 1),
                    "{mask}: {i}"
                );
                if mask >> i & 1 == 1 {
                    let got = values(&grad(&grads, var))?;
                    assert_close("gradient", &got, expected[i], 1e-12, 1e-12);
                }
            }
        }
    }
    let y = conv2d(
        &x.as_detached_tensor(),
        &weight.as_detached_tensor(),
        None,
        &conv.config,
    )?;
    assert!(!y.track_op());
    Ok(())
}

/// Gradients also flow through what comes before, if the input has to be copied for the op.
#[test]
fn any_layout() -> Result<()> {
    let device = Device::Cpu;
    let mut conv = Conv::new([2, 3, 6, 5], [4, 3, 3, 2]);
    conv.config.padding = 1;
    let data = conv.data();
    let truth = conv.truth(&data);
    let [x, weight, bias, dy] = &data;
    // Held with the dimensions in another order, each twice as long as what is used of it.
    let held = |values: &[f64], shape: &[usize]| -> Result<Var> {
        let t = tensor(values, shape, DType::F64, &device)?;
        let order: Vec<usize> = (0..shape.len()).rev().collect();
        let t = Tensor::cat(&[&t.zeros_like()?, &t], 0)?.permute(order)?;
        Var::from_tensor(&t.contiguous()?)
    };
    let used = |t: &Tensor| -> Result<Tensor> {
        let order: Vec<usize> = (0..t.rank()).rev().collect();
        let t = t.permute(order)?;
        t.narrow(0, t.dim(0)? / 2, t.dim(0)? / 2)
    };
    let x = held(x, &conv.x)?;
    let weight = held(weight, &conv.weight)?;
    let bias = held(bias, &conv.weight[..1])?;
    let y = conv2d(
        &used(&x)?,
        &used(&weight)?,
        Some(&used(&bias)?),
        &conv.config,
    )?;
    assert_close("y", &values(&y)?, &truth.y, 1e-12, 1e-12);
    // The gradient of `y` arrives with its dimensions in another order, too.
    let dy = tensor(dy, &conv.out(), DType::F64, &device)?.permute((3, 2, 1, 0))?;
    let grads = (y.permute((3, 2, 1, 0))? * dy)?.sum_all()?.backward()?;
    for (what, var, expected) in [
        ("dx", &x, &truth.dx),
        ("dweight", &weight, &truth.dweight),
        ("dbias", &bias, &truth.dbias),
    ] {
        let got = values(&used(&grad(&grads, var))?)?;
        assert_close(what, &got, expected, 1e-12, 1e-12);
    }
    Ok(())
}

/// Infinities and NaNs stay where they belong: the lanes and the borders do not spread them.
#[test]
fn not_finite_stays_local() -> Result<()> {
    let mut x = vec![1.0; 36];
    x[0] = f64::NAN;
    let x = tensor(&x, &[1, 1, 6, 6], DType::F32, &Device::Cpu)?;
    let weight = Tensor::ones((3, 1, 3, 3), DType::F32, &Device::Cpu)?;
    let config = Conv2dConfig {
        padding: 1,
        ..Default::default()
    };
    let y = values(&conv2d(&x, &weight, None, &config)?)?;
    for (i, y) in y.iter().enumerate() {
        let (row, col) = (i % 36 / 6, i % 6);
        assert_eq!(y.is_nan(), row < 2 && col < 2, "{i}");
    }
    Ok(())
}

#[test]
fn empty_batch() -> Result<()> {
    let conv = Conv::new([0, 3, 6, 6], [4, 3, 3, 3]);
    for dtype in [DType::F32, DType::BF16] {
        conv.check(dtype)?;
    }
    Ok(())
}

#[test]
fn errors_name_what_was_given() -> Result<()> {
    let device = Device::Cpu;
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &device);
    let x = zeros(&[2, 4, 5, 5])?;
    let weight = zeros(&[6, 4, 3, 3])?;
    let config = Conv2dConfig::default();
    let call = |x: &Tensor, weight: &Tensor| conv2d(x, weight, None, &config);
    assert_error(
        call(&zeros(&[4, 5, 5])?, &weight),
        &["[n, c_in, h, w]", "[4, 5, 5]"],
    );
    assert_error(call(&x, &zeros(&[6, 4, 3])?), &["[6, 4, 3]"]);
    assert_error(
        call(&x, &zeros(&[6, 3, 3, 3])?),
        &["3 channels", "[2, 4, 5, 5]"],
    );
    assert_error(call(&x, &zeros(&[6, 4, 6, 3])?), &["6×3", "5×5"]);
    assert_error(
        call(&x, &zeros(&[6, 4, 0, 3])?),
        &["at least 1", "[6, 4, 0, 3]"],
    );
    assert_error(
        call(&zeros(&[2, 4, 0, 5])?, &weight),
        &["at least 1", "[2, 4, 0, 5]"],
    );
    let ints = x.to_dtype(DType::U32)?;
    assert_error(call(&ints, &weight), &["F32, F64, F16 or BF16", "U32"]);
    assert_error(
        call(&x, &weight.to_dtype(DType::F64)?),
        &["weight", "F32", "F64"],
    );
    let bias = |bias: Tensor| conv2d(&x, &weight, Some(&bias), &config);
    assert_error(bias(zeros(&[4])?), &["[6]", "[4]"]);
    assert_error(
        bias(zeros(&[6])?.to_dtype(DType::F16)?),
        &["bias", "F32", "F16"],
    );
    let with = |set: fn(&mut Conv2dConfig)| {
        let mut config = config;
        set(&mut config);
        conv2d(&x, &weight, None, &config)
    };
    assert_error(with(|config| config.stride = 0), &["stride", "0"]);
    assert_error(with(|config| config.dilation = 0), &["dilation", "0"]);
    assert_error(with(|config| config.groups = 0), &["groups", "0"]);
    assert_error(
        with(|config| config.groups = 2),
        &["8 channels", "2 groups"],
    );
    assert_error(with(|config| config.dilation = 3), &["3×3", "dilation 3"]);
    let groups = Conv2dConfig {
        groups: 4,
        ..config
    };
    let result = conv2d(&x, &zeros(&[6, 1, 3, 3])?, None, &groups);
    assert_error(result, &["multiple of 4 groups", "[6, 1, 3, 3]"]);
    Ok(())
}

/// The layer finds candle-nn's variables by name, and computes the same with them.
#[test]
fn layer_is_candle_nns() -> Result<()> {
    for device in devices() {
        layer_is_candle_nns_on(&device)?;
    }
    Ok(())
}

fn layer_is_candle_nns_on(device: &Device) -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
    let config = Conv2dConfig {
        stride: 2,
        groups: 2,
        ..Default::default()
    };
    let theirs = candle_nn::conv2d(4, 6, 3, config, vb.pp("conv1"))?;
    let ours = layers::conv2d(4, 6, 3, config, vb.pp("conv1"))?;
    let bare = layers::conv2d_no_bias(4, 6, 3, config, vb.pp("conv1"))?;
    assert_eq!(vars.all_vars().len(), 2);
    assert_eq!(ours.config(), theirs.config());
    assert_eq!(values(ours.weight())?, values(theirs.weight())?);
    assert!(bare.bias().is_none());
    let x = tensor(
        &random(5, 2 * 4 * 81, 0.0),
        &[2, 4, 9, 9],
        DType::F32,
        device,
    )?;
    let expected = values(&theirs.forward(&x)?)?;
    let back: candle_nn::Conv2d = layers::Conv2d::from(theirs).into();
    for layer in [&ours as &dyn Module, &back] {
        assert_close("y", &values(&layer.forward(&x)?)?, &expected, 1e-5, 1e-5);
    }
    let no_groups = Conv2dConfig {
        groups: 0,
        ..config
    };
    for (config, parts) in [(no_groups, ["4 and 6", "0"]), (config, ["5 and 6", "2"])] {
        let in_channels = if config.groups == 0 { 4 } else { 5 };
        let layer = layers::conv2d(in_channels, 6, 3, config, vb.pp("conv2"));
        assert_error(layer, &parts);
    }
    Ok(())
}

/// Sizes beyond what can be counted are kernels that do not fit, not numbers that wrap around.
#[test]
fn huge_configurations_get_errors() -> Result<()> {
    let x = Tensor::zeros((1, 1, 1, 4), DType::F32, &Device::Cpu)?;
    let weight = Tensor::zeros((1, 1, 1, 2), DType::F32, &Device::Cpu)?;
    for (padding, dilation) in [(0, usize::MAX), (1 << 63, 1), (0, 4)] {
        let config = Conv2dConfig {
            padding,
            dilation,
            ..Default::default()
        };
        assert_error(
            conv2d(&x, &weight, None, &config),
            &["kernel that fits", "1×2"],
        );
    }
    Ok(())
}
