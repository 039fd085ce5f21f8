//! What a norm costs in a step of training: the networks of `mnist_compare` without one, with batch norm and
//! with candle-nn's, step by step in turns, so that whatever else the machine does meets all of them alike.
//!
//! `cargo bench --bench training` runs all; `cargo bench --bench training -- mlp` one network.
//! Each line has the median of the steps, and of the ratios to the plain network's step in the same turn.

use std::time::Instant;

use candle_batch_norm::backward;
use candle_batch_norm::models::{Architecture, Model, ModelConfig, Norm};
use candle_batch_norm::ops::cross_entropy;
use candle_core::{DType, Device, ModuleT, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};

#[allow(dead_code, unused_imports)] // the example also saves it, and tests it
#[path = "../examples/mnist_compare/sgd.rs"]
mod sgd;
use sgd::Sgd;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 64;
/// Steps of a network before the next one has its turn.
const TURN: usize = 10;

fn main() -> Result<()> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let chosen = |name: &str| {
        let mut names = words
            .iter()
            .filter(|word| !word.starts_with("--"))
            .peekable();
        names.peek().is_none() || names.any(|word| word == name)
    };
    // `cargo test --benches` only wants to see that it runs.
    let is_test = !words.iter().any(|word| word == "--bench");
    for (name, architecture, turns) in [
        ("mlp", Architecture::Mlp, 200),
        ("cnn", Architecture::Cnn, 60),
    ] {
        if chosen(name) {
            compare(name, architecture, if is_test { 1 } else { turns })?;
        }
    }
    Ok(())
}

fn compare(name: &str, architecture: Architecture, turns: usize) -> Result<()> {
    let device = &Device::Cpu;
    let [c, h, w] = architecture.input_shape();
    let x = Tensor::randn(0f32, 1.0, (BATCH, c, h, w), device)?;
    let labels = Tensor::from_iter((0..BATCH as u32).map(|i| i % 10), device)?;
    let norms = [
        ("without", Norm::None),
        ("batch norm", Norm::batch()),
        ("candle-nn's", Norm::candle_nn()),
    ];
    let mut trained = vec![];
    for (title, norm) in norms {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let config = ModelConfig {
            norm,
            ..Default::default()
        };
        let model = Model::new(architecture, &config, vb)?;
        // A rate of 0 takes as long, and keeps the weights from growing without end.
        let sgd = Sgd::new(&vars, 0.0, 0.9);
        trained.push((title, model, sgd, vec![]));
    }
    for turn in 0..=turns {
        for (_, model, sgd, times) in &mut trained {
            let started = Instant::now();
            for _ in 0..TURN {
                let loss = cross_entropy(&model.forward_t(&x, true)?, &labels)?;
                sgd.step(&backward(&loss)?)?;
            }
            // The first turn warms up.
            if turn > 0 {
                times.push(started.elapsed().as_secs_f64() / TURN as f64);
            }
        }
    }
    let plain = trained[0].3.clone();
    for (title, _, _, times) in trained {
        let ratio = median(times.iter().zip(&plain).map(|(time, plain)| time / plain));
        let time = median(times.iter().copied()) * 1e6;
        println!(
            "{name} {title:<12} {time:8.0} µs a step  {:+6.1} %",
            (ratio - 1.0) * 100.0
        );
    }
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
