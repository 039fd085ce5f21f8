//! Forward and forward + backward, this crate's convolution beside candle's.
//!
//! `cargo bench --bench conv2d` runs all of it; `cargo bench --bench conv2d -- '64,32,14,14'` one size.

use candle_batch_norm::ops::conv2d;
use candle_core::{Device, Result, Tensor, Var};
use candle_nn::Conv2dConfig;
use criterion::measurement::WallTime;
use criterion::{criterion_group, criterion_main, BenchmarkGroup, Criterion, SamplingMode};
use std::hint::black_box;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Input, output channels, kernel, and whether the input has a gradient: a network's first does not.
const SIZES: [([usize; 4], usize, usize, bool); 4] = [
    ([64, 1, 28, 28], 32, 3, false),
    ([64, 32, 14, 14], 64, 3, true),
    ([64, 64, 16, 16], 128, 3, true),
    ([64, 64, 16, 16], 128, 1, true),
];

fn bench(criterion: &mut Criterion) {
    for (shape, channels, kernel, tracked) in SIZES {
        let sizes: Vec<_> = shape.iter().map(ToString::to_string).collect();
        let name = format!("{} to {channels}, {kernel}x{kernel}", sizes.join(","));
        let mut group = criterion.benchmark_group(&name);
        group.sampling_mode(SamplingMode::Flat).sample_size(10);
        run(&mut group, shape, channels, kernel, tracked)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        group.finish();
    }
}

fn run(
    group: &mut BenchmarkGroup<WallTime>,
    shape: [usize; 4],
    channels: usize,
    kernel: usize,
    tracked: bool,
) -> Result<()> {
    let device = Device::Cpu;
    let x = Var::randn(0f32, 1.0, &shape, &device)?;
    let weight = Var::randn(0f32, 1.0, (channels, shape[1], kernel, kernel), &device)?;
    let bias = Var::randn(0f32, 1.0, channels, &device)?;
    let config = Conv2dConfig {
        padding: kernel / 2,
        ..Default::default()
    };
    let ours = |x: &Tensor, weight: &Tensor, bias: &Tensor| conv2d(x, weight, Some(bias), &config);
    let theirs = |x: &Tensor, weight: &Tensor, bias: &Tensor| {
        x.conv2d(weight, config.padding, 1, 1, 1)?
            .broadcast_add(&bias.reshape((1, (), 1, 1))?)
    };
    type Conv<'a> = &'a dyn Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;
    let convs: [(&str, Conv); 2] = [("candle-batch-norm", &ours), ("candle", &theirs)];
    for (name, conv) in convs {
        group.bench_function(format!("{name}/forward"), |b| {
            let [x, weight, bias] = [&x, &weight, &bias].map(|var| var.as_detached_tensor());
            b.iter(|| black_box(conv(&x, &weight, &bias)))
        });
        group.bench_function(format!("{name}/forward+backward"), |b| {
            let x = match tracked {
                true => x.as_tensor().clone(),
                false => x.as_detached_tensor(),
            };
            // Without a loss on top, the gradient of y is ones, and only the layer is measured.
            b.iter(|| -> Result<_> { black_box(conv(&x, &weight, &bias)?.backward()) })
        });
    }
    Ok(())
}

criterion_group!(benches, bench);
criterion_main!(benches);
