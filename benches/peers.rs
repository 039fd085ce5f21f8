//! One half of `scripts/compare_peers.py`, which runs PyTorch as the other: measures what it is asked
//! for, a line at a time.
//!
//! Each line of standard input is `layer shape dtype pass seconds`, such as
//! `ours 32,64,56,56 f32 all 0.5`; the answer is the median and the shortest time of a run in
//! microseconds, or a line that begins with `error`. The layers are `ours` and `candle-nn`. A shape is for
//! batch norm, unless another norm stands before it, as in `group32:32,64,56,56`: also `layer:`, `rms:` and
//! `instance:`. The passes:
//!
//! - `fwd`: the forward pass in training, with its graph and the running statistics;
//! - `all`: forward, for batch norm with a ReLU, and backward through candle's autograd, ours by `backward_from`
//!   for a given `dy`, candle-nn's by `backward`, for which candle brings ones;
//! - `vjp`: the same without autograd, for a given `dy`;
//! - `eval`: the forward pass with the running statistics;
//! - `floor2` and `floor5`: moving the tensors' bytes on all threads, two passes as for a forward pass (`x` copied to `y`),
//!   five as with gradients (also the sum of `x` and `dy` to `dx`).

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::time::{Duration, Instant};

use candle_batch_norm::ops::{
    batch_norm_vjp, group_norm_vjp, layer_norm_vjp, rms_norm_vjp, Activation, BatchNormArgs,
    RowNormArgs,
};
use candle_batch_norm::{backward_from, BatchNormConfig};
use candle_core::{DType, Device, ModuleT, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() {
    for line in std::io::stdin().lock().lines() {
        let answer = line
            .map_err(candle_core::Error::wrap)
            .and_then(|line| answer(&line));
        match answer {
            Ok(times) => {
                let [median, fastest] = times.map(|time| time.as_secs_f64() * 1e6);
                println!("{median:.3} {fastest:.3}")
            }
            Err(error) => println!("error: {error}"),
        }
        std::io::stdout().flush().expect("standard output");
    }
}

fn answer(line: &str) -> Result<[Duration; 2]> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [layer, shape, dtype, pass, seconds] = words[..] else {
        candle_core::bail!("expected `layer shape dtype pass seconds`, got {line:?}")
    };
    let (norm, shape) = shape.split_once(':').unwrap_or(("batch", shape));
    let shape = shape
        .split(',')
        .map(str::parse)
        .collect::<std::result::Result<Vec<usize>, _>>()
        .map_err(candle_core::Error::wrap)?;
    let dtype = match dtype {
        "f32" => DType::F32,
        "f64" => DType::F64,
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        dtype => candle_core::bail!("unknown dtype {dtype}"),
    };
    let seconds = seconds.parse().map_err(candle_core::Error::wrap)?;
    let limit = Duration::from_secs_f64(seconds);

    let device = Device::Cpu;
    let x = Tensor::randn(1f32, 2.0, shape.as_slice(), &device)?.to_dtype(dtype)?;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, dtype, &device);
    let (ours, relu) = (layer == "ours", pass == "all");
    let layer = build(layer, norm, &shape, relu, vb)?;
    let layer = |x: &Tensor, train: bool| match &layer {
        (layer, true) if relu => layer.forward_t(x, train)?.relu(),
        (layer, _) => layer.forward_t(x, train),
    };
    match pass {
        "fwd" => time(limit, || layer(&x, true)),
        "eval" => time(limit, || layer(&x, false)),
        "all" => {
            let x = Var::from_tensor(&x)?;
            let dy = x.ones_like()?;
            let all = || {
                let y = layer(&x, true)?;
                match ours {
                    true => backward_from(&y, &dy),
                    false => y.backward(),
                }
            };
            if all()?.get(&x).is_none() {
                candle_core::bail!("no gradient: this layer is not differentiable")
            }
            time(limit, all)
        }
        "vjp" => {
            let parameters = match norm {
                "layer" | "rms" => shape[shape.len() - 1],
                _ => shape[1],
            };
            let weight = Tensor::ones(parameters, dtype, &device)?;
            let bias = Tensor::zeros(parameters, dtype, &device)?;
            let (weight, bias) = (Some(&weight), Some(&bias).filter(|_| norm != "rms"));
            let dy = x.ones_like()?;
            if norm == "batch" {
                let args = BatchNormArgs {
                    weight,
                    bias,
                    activation: Activation::Relu,
                    ..BatchNormArgs::new()
                };
                return time(limit, || {
                    let (y, stats, pullback) = batch_norm_vjp(&x, &args)?;
                    Ok((y, stats, pullback.gradients(&dy)?))
                });
            }
            let args = RowNormArgs {
                weight,
                bias,
                ..RowNormArgs::new()
            };
            time(limit, || {
                let (y, pullback) = match norm {
                    "layer" => layer_norm_vjp(&x, parameters, &args)?,
                    "rms" => rms_norm_vjp(&x, parameters, &args)?,
                    "instance" => group_norm_vjp(&x, parameters, &args)?,
                    norm => group_norm_vjp(&x, groups_of(norm)?, &args)?,
                };
                Ok((y, pullback.gradients(&dy)?))
            })
        }
        "floor2" | "floor5" => {
            let x = vec![1f32; x.elem_count() * dtype.size_in_bytes() / size_of::<f32>()];
            let copied = || written(x.len(), |range| x[range].iter().copied());
            if pass == "floor2" {
                return time(limit, || Ok(copied()));
            }
            let dy = vec![1f32; x.len()];
            let added = |range: Range<usize>| {
                let pairs = x[range.clone()].iter().zip(&dy[range]);
                pairs.map(|(x, dy)| x + dy)
            };
            time(limit, || Ok((copied(), written(x.len(), added))))
        }
        pass => candle_core::bail!("unknown pass {pass}"),
    }
}

/// 32 of `group32`.
fn groups_of(norm: &str) -> Result<usize> {
    match norm.strip_prefix("group").map(str::parse) {
        Some(Ok(groups)) => Ok(groups),
        _ => candle_core::bail!("unknown norm {norm}"),
    }
}

/// A layer for inputs of this shape, and whether its ReLU is still to come.
fn build(
    layer: &str,
    norm: &str,
    shape: &[usize],
    relu: bool,
    vb: VarBuilder,
) -> Result<(Box<dyn ModuleT>, bool)> {
    use candle_batch_norm::layers;
    let (last, c) = (shape[shape.len() - 1], shape[1]);
    Ok(match (layer, norm) {
        ("ours", "batch") => {
            let mut config = BatchNormConfig::default();
            if relu {
                config.activation = Activation::Relu;
            }
            (
                Box::new(candle_batch_norm::batch_norm(c, config, vb)?),
                false,
            )
        }
        ("ours", "layer") => (Box::new(layers::layer_norm(last, 1e-5, vb)?), false),
        ("ours", "rms") => (Box::new(layers::rms_norm(last, 1e-5, vb)?), false),
        ("ours", "instance") => {
            let config = layers::InstanceNormConfig {
                affine: true,
                ..Default::default()
            };
            (Box::new(layers::instance_norm(c, config, vb)?), false)
        }
        ("ours", _) => (
            Box::new(layers::group_norm(groups_of(norm)?, c, 1e-5, vb)?),
            false,
        ),
        ("candle-nn", "batch") => (Box::new(candle_nn::batch_norm(c, 1e-5, vb)?), true),
        ("candle-nn", "layer") => (Box::new(candle_nn::layer_norm(last, 1e-5, vb)?), false),
        ("candle-nn", "rms") => (Box::new(candle_nn::rms_norm(last, 1e-5, vb)?), false),
        ("candle-nn", "instance") => (Box::new(candle_nn::group_norm(c, c, 1e-5, vb)?), false),
        ("candle-nn", _) => (
            Box::new(candle_nn::group_norm(groups_of(norm)?, c, 1e-5, vb)?),
            false,
        ),
        (layer, _) => candle_core::bail!("unknown layer {layer}"),
    })
}

/// The median and the shortest time of a run, of as many as fit into `limit`, after a warm-up.
fn time<T>(limit: Duration, mut run: impl FnMut() -> Result<T>) -> Result<[Duration; 2]> {
    let warm_up = Instant::now();
    while warm_up.elapsed() < limit / 4 {
        black_box(run()?);
    }
    let (started, mut times) = (Instant::now(), vec![]);
    while started.elapsed() < limit || times.len() < 5 {
        let one = Instant::now();
        let result = black_box(run()?);
        // PyTorch's figures contain the release of the results too.
        drop(result);
        times.push(one.elapsed());
    }
    times.sort();
    Ok([times[times.len() / 2], times[0]])
}

/// `len` values that `part` gives, on candle's threads, in the parts in which they would share any tensor.
fn written<I: Iterator<Item = f32>>(
    len: usize,
    part: impl Fn(Range<usize>) -> I + Sync,
) -> Vec<f32> {
    const PART: usize = 1 << 14;
    let mut out: Vec<f32> = Vec::with_capacity(len);
    let start = out.as_mut_ptr() as usize;
    candle_core::utils::barrier_pool().execute_chunked(len.div_ceil(PART), |parts| {
        let range = parts.start * PART..len.min(parts.end * PART);
        // SAFETY: the ranges of different parts do not overlap and lie within the capacity.
        let to = unsafe {
            let to = (start as *mut MaybeUninit<f32>).add(range.start);
            std::slice::from_raw_parts_mut(to, range.len())
        };
        let values = to.iter_mut().zip(part(range));
        let count = values.map(|(to, value)| to.write(value)).count();
        assert_eq!(count, to.len(), "a value for each of a range");
    });
    // SAFETY: the parts make up the whole, and each has been written, as asserted.
    unsafe { out.set_len(len) };
    out
}
