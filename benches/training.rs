//! What a norm costs in training: the networks of `mnist_compare` without one, with batch norm and with candle-nn's, a few
//! steps of each in turns, so that whatever else the machine does meets all of them alike. A step is the example's, from
//! the gathering of the batch to the sums of losses and right answers.
//!
//! `cargo bench --bench training` runs all; `cargo bench --bench training -- mlp` one network.
//! Each line has the median of the steps, an epoch of 60,000 images at that pace, and the median of the ratios to the plain
//! network's steps in the same turn.

use std::time::Instant;

use anyhow::Result;
use candle_batch_norm::backward;
use candle_batch_norm::models::{Architecture, Model, ModelConfig, Norm};
use candle_batch_norm::ops::cross_entropy;
use candle_core::{DType, Device, ModuleT};
use candle_nn::{VarBuilder, VarMap};

// Of its modules, the example uses more, and tests it.
#[allow(dead_code, unused_imports)]
#[path = "../examples/mnist_compare/data.rs"]
mod data;
#[allow(dead_code, unused_imports)]
#[path = "../examples/mnist_compare/digits.rs"]
mod digits;
#[allow(dead_code, unused_imports)]
#[path = "../examples/mnist_compare/idx.rs"]
mod idx;
#[allow(dead_code, unused_imports)]
#[path = "../examples/mnist_compare/sgd.rs"]
mod sgd;
#[allow(dead_code, unused_imports)]
#[path = "../examples/mnist_compare/sums.rs"]
mod sums;
use data::{shuffled, Split, PIXELS};
use sgd::Sgd;
use sums::{Sums, STEPS_BETWEEN_READS};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const BATCH: usize = 64;

/// Images of an epoch.
const IMAGES: usize = 60_000;

/// Images that a network trains on before the next one has its turn.
const TURN: usize = BATCH * STEPS_BETWEEN_READS;

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
        ("cnn", Architecture::Cnn, 40),
    ] {
        if chosen(name) {
            compare(name, architecture, if is_test { 1 } else { turns })?;
        }
    }
    Ok(())
}

fn compare(name: &str, architecture: Architecture, turns: usize) -> Result<()> {
    let device = &Device::Cpu;
    let data = Split {
        images: (0..IMAGES * PIXELS).map(|i| (i * 5 % 251) as u8).collect(),
        labels: (0..IMAGES).map(|i| (i % 10) as u8).collect(),
    };
    let order = shuffled(IMAGES, 1, 0);
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
        let images = &order[turn % (IMAGES / TURN) * TURN..][..TURN];
        for (_, model, sgd, times) in &mut trained {
            let started = Instant::now();
            let mut sums = Sums::default();
            for batch in images.chunks_exact(BATCH) {
                let (x, labels) = data.batch(batch, architecture.input_shape(), device)?;
                let logits = model.forward_t(&x, true)?;
                let loss = cross_entropy(&logits, &labels)?;
                sgd.step(&backward(&loss)?)?;
                sums.add(&logits, &labels, &loss)?;
            }
            sums.read()?;
            // The first turn warms up.
            if turn > 0 {
                times.push(started.elapsed().as_secs_f64() / STEPS_BETWEEN_READS as f64);
            }
        }
    }
    println!("{name}: median of the steps, an epoch at that pace, median of the ratios to `without` in the same turn");
    let plain = trained[0].3.clone();
    for (title, _, _, times) in trained {
        let ratio = median(times.iter().zip(&plain).map(|(time, plain)| time / plain));
        let time = median(times.iter().copied());
        println!(
            "{name} {title:<12} {:8.0} µs a step  {:6.2} s an epoch  {:+6.1} %",
            time * 1e6,
            time * (IMAGES / BATCH) as f64,
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
