//! An LSTM reads MNIST's images row by row, 28 steps of 28 pixels, and names the digit after the last one:
//! with and without batch norm (Cooijmans et al. 2016, <https://arxiv.org/abs/1603.09025>).
//!
//! `cargo run --release --example mnist_rows -- --data DIR`; without `--data` it looks for MNIST as the example
//! `mnist_compare` does, whose data, optimiser and initial weights it shares.

#[allow(dead_code)]
#[path = "mnist_compare/data.rs"]
mod data;
#[allow(dead_code)]
#[path = "mnist_compare/digits.rs"]
mod digits;
#[path = "mnist_compare/idx.rs"]
mod idx;
#[path = "mnist_compare/initial.rs"]
mod initial;
#[allow(dead_code)]
#[path = "mnist_compare/sgd.rs"]
mod sgd;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{ensure, Result};
use candle_batch_norm::backward;
use candle_batch_norm::layers::{
    batch_norm_lstm, linear, BatchNormLstm, BatchNormLstmConfig, Linear,
};
use candle_batch_norm::ops::cross_entropy;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::rnn::RNN;
use candle_nn::{VarBuilder, VarMap};
use clap::Parser;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use data::{shuffled, Dataset, Split, Wanted, SIDE};
use sgd::Sgd;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// An LSTM on the rows of MNIST's images, with and without batch norm.
#[derive(Debug, Parser)]
struct Args {
    /// Folder with MNIST's four IDX files, plain or .gz; `drawn` draws digits instead
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Use only the first N training images, and a sixth as many test images
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// How often each model sees the training images
    #[arg(long, default_value_t = 2)]
    epochs: usize,
    /// Images in each step of the training
    #[arg(long, default_value_t = 64)]
    batch_size: usize,
    /// Values of the hidden state
    #[arg(long, default_value_t = 100)]
    hidden: usize,
    /// Learning rate of the stochastic gradient descent
    #[arg(long, default_value_t = 0.05)]
    lr: f64,
    /// Momentum of the stochastic gradient descent
    #[arg(long, default_value_t = 0.9)]
    momentum: f64,
    /// Added to the variance in batch norm
    #[arg(long, default_value_t = 1e-5)]
    eps: f64,
    /// Standard deviation of the first hidden states, in both models: the first rows are black in nearly all
    /// images, and without it there would be next to nothing to normalise
    #[arg(long, default_value_t = 0.1)]
    noise: f64,
    /// Decides about initial weights, batches, noise and drawn digits
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

/// What came of an epoch. Accuracies are fractions.
struct Epoch {
    train_loss: f64,
    train_accuracy: f64,
    test_loss: f64,
    test_accuracy: f64,
    /// Of the training.
    seconds: f64,
}

struct Reader {
    lstm: BatchNormLstm,
    fc: Linear,
    vars: VarMap,
    noise: f64,
    rng: ChaCha8Rng,
}

impl Reader {
    fn new(args: &Args, with_bn: bool) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let mut config = BatchNormLstmConfig::new(SIDE);
        config.norm = config.norm.filter(|_| with_bn);
        if let Some(norm) = &mut config.norm {
            norm.eps = args.eps;
        }
        let lstm = batch_norm_lstm(SIDE, args.hidden, config, vb.pp("lstm"))?;
        let fc = linear(args.hidden, 10, vb.pp("fc"))?;
        let bound = 1.0 / (args.hidden as f32).sqrt();
        initial::uniform(&vars, args.seed, |name| {
            let is_weight = name.starts_with("fc") || name.ends_with("_l0");
            is_weight.then_some(bound)
        })?;
        Ok(Self {
            lstm,
            fc,
            vars,
            noise: args.noise,
            rng: ChaCha8Rng::seed_from_u64(args.seed),
        })
    }

    /// The loss of some images, and how many of them are recognised.
    fn read(&mut self, split: &Split, indices: &[usize], train: bool) -> Result<(Tensor, f64)> {
        let (x, labels) = split.batch(indices, [1, SIDE, SIDE], &Device::Cpu)?;
        let mut start = self.lstm.zero_state(indices.len())?;
        // As good as normal: a sum of twelve uniform ones, whose variance is 1.
        let mut normal = || (0..12).map(|_| self.rng.random::<f32>()).sum::<f32>() - 6.0;
        let noise: Vec<f32> = (0..start.h.elem_count()).map(|_| normal()).collect();
        start.h = (Tensor::from_vec(noise, start.h.shape(), &Device::Cpu)? * self.noise)?;
        let states = self.lstm.seq_t(&x.squeeze(1)?, &start, train)?;
        let logits = self.fc.forward(&states[SIDE - 1].h)?;
        let right = logits.argmax(1)?.eq(&labels)?.to_dtype(DType::F32)?;
        let right = f64::from(right.sum_all()?.to_scalar::<f32>()?);
        Ok((cross_entropy(&logits, &labels)?, right))
    }
}

fn train(args: &Args, data: &Dataset, with_bn: bool) -> Result<Vec<Epoch>> {
    let mut reader = Reader::new(args, with_bn)?;
    let mut sgd = Sgd::new(&reader.vars, args.lr, args.momentum);
    let mut epochs = vec![];
    for epoch in 0..args.epochs {
        let started = Instant::now();
        let order = shuffled(data.train.len(), args.seed, epoch);
        let mut sums = Sums::default();
        // The last batch, if it is not whole, is left out: it would have statistics of its own.
        for indices in order.chunks_exact(args.batch_size) {
            let (loss, right) = reader.read(&data.train, indices, true)?;
            sgd.step(&backward(&loss)?)?;
            sums.add(&loss, right, indices.len())?;
        }
        let seconds = started.elapsed().as_secs_f64();
        let (train_loss, train_accuracy) = sums.mean();
        let mut sums = Sums::default();
        let all: Vec<usize> = (0..data.test.len()).collect();
        for indices in all.chunks(1000) {
            let (loss, right) = reader.read(&data.test, indices, false)?;
            sums.add(&loss, right, indices.len())?;
        }
        let (test_loss, test_accuracy) = sums.mean();
        epochs.push(Epoch {
            train_loss,
            train_accuracy,
            test_loss,
            test_accuracy,
            seconds,
        });
    }
    Ok(epochs)
}

#[derive(Default)]
struct Sums {
    loss: f64,
    right: f64,
    count: f64,
}

impl Sums {
    fn add(&mut self, loss: &Tensor, right: f64, count: usize) -> Result<()> {
        self.loss += f64::from(loss.to_scalar::<f32>()?) * count as f64;
        self.right += right;
        self.count += count as f64;
        Ok(())
    }

    fn mean(&self) -> (f64, f64) {
        (self.loss / self.count, self.right / self.count)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let smallest = args.epochs.min(args.hidden).min(args.batch_size - 1);
    ensure!(
        smallest > 0,
        "--epochs and --hidden should be at least 1, --batch-size 2"
    );
    let data = data::load(&Wanted {
        folder: args.data.as_deref(),
        seed: args.seed,
        limit: args.limit,
        test: args.batch_size,
    })?;
    data.check(args.batch_size)?;
    println!("{}", data.describe());
    if data.drawn {
        println!("*** This is not MNIST. Name its folder with --data DIR.");
    }
    let without = train(&args, &data, false)?;
    let with = train(&args, &data, true)?;
    println!("\n{:<26} {:>20} {:>20}", "", "LSTM", "with batch norm");
    type Row = (&'static str, fn(&Epoch) -> String);
    let rows: [Row; 5] = [
        ("train loss", |epoch| format!("{:.4}", epoch.train_loss)),
        ("train accuracy", |epoch| {
            format!("{:.2} %", 100.0 * epoch.train_accuracy)
        }),
        ("test loss", |epoch| format!("{:.4}", epoch.test_loss)),
        ("test accuracy", |epoch| {
            format!("{:.2} %", 100.0 * epoch.test_accuracy)
        }),
        ("time", |epoch| format!("{:.1} s", epoch.seconds)),
    ];
    for (i, (without, with)) in without.iter().zip(&with).enumerate() {
        for (name, of) in &rows {
            let name = format!("epoch {}: {name}", i + 1);
            println!("{name:<26} {:>20} {:>20}", of(without), of(with));
        }
    }
    Ok(())
}
