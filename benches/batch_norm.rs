//! Forward, forward + backward and evaluation, this crate's layer beside candle-nn's.
//!
//! `cargo bench` runs all of it; `cargo bench -- '32,64,56,56'` one shape.

use candle_core::{DType, Device, ModuleT, Result, Var};
use candle_nn::{VarBuilder, VarMap};
use criterion::measurement::WallTime;
use criterion::{criterion_group, criterion_main, BenchmarkGroup, Criterion, SamplingMode};
use std::hint::black_box;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SHAPES: [&[usize]; 6] = [
    &[64, 256],
    &[1024, 1024],
    &[64, 32, 28, 28],
    &[32, 64, 56, 56],
    &[32, 256, 14, 14],
    &[128, 64, 32, 32],
];

fn bench(criterion: &mut Criterion) {
    for shape in SHAPES {
        let sizes: Vec<_> = shape.iter().map(ToString::to_string).collect();
        let mut group = criterion.benchmark_group(sizes.join(","));
        group.sampling_mode(SamplingMode::Flat).sample_size(10);
        run(&mut group, shape).unwrap_or_else(|error| panic!("{shape:?}: {error}"));
        group.finish();
    }
}

fn run(group: &mut BenchmarkGroup<WallTime>, shape: &[usize]) -> Result<()> {
    let device = Device::Cpu;
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let ours = candle_batch_norm::batch_norm(shape[1], 1e-5, vb.pp("ours"))?;
    let theirs = candle_nn::batch_norm(shape[1], 1e-5, vb.pp("theirs"))?;
    let x = Var::randn(1f32, 2.0, shape, &device)?;
    let layers: [(&str, &dyn ModuleT); 2] = [("candle-batch-norm", &ours), ("candle-nn", &theirs)];
    for (name, layer) in layers {
        group.bench_function(format!("{name}/forward"), |b| {
            let x = x.as_detached_tensor();
            b.iter(|| black_box(layer.forward_t(&x, true)))
        });
        group.bench_function(format!("{name}/forward+backward"), |b| {
            // Without a loss on top, the gradient of y is ones, and only the layer is measured.
            b.iter(|| -> Result<_> { black_box(layer.forward_t(&x, true)?.backward()) })
        });
        group.bench_function(format!("{name}/eval"), |b| {
            let x = x.as_detached_tensor();
            b.iter(|| black_box(layer.forward_t(&x, false)))
        });
    }
    Ok(())
}

criterion_group!(benches, bench);
criterion_main!(benches);
