//! The training of one model: epochs of steps, and what came of them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Result;
use candle_batch_norm::backward;
use candle_batch_norm::models::{Architecture, Model};
use candle_batch_norm::ops::cross_entropy;
use candle_core::{DType, Device, ModuleT};
use candle_nn::{VarBuilder, VarMap};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::Args;
use crate::data::{shuffled, Dataset, Split};
use crate::initial::uniform;
use crate::norms::Contender;
use crate::sgd::{sorted, Sgd};
use crate::sums::{Sums, STEPS_BETWEEN_READS};

/// Test images that are evaluated at a time.
const EVAL_BATCH: usize = 1000;

/// What one epoch came to. Accuracies are fractions, over the whole epoch and the whole test set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Epoch {
    pub train_loss: f64,
    pub train_accuracy: f64,
    pub test_loss: f64,
    pub test_accuracy: f64,
    /// Of the training, without the test.
    pub seconds: f64,
}

/// What is left of a training, epoch by epoch.
pub struct Record {
    pub contender: Contender,
    pub history: Vec<Epoch>,
}

/// A model in training.
pub struct Run {
    pub record: Record,
    pub vars: VarMap,
    pub sgd: Sgd,
    pub device: Device,
    model: Model,
}

impl Run {
    pub fn new(args: &Args, contender: Contender, device: &Device) -> Result<Self> {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, device);
        let model = Model::new(args.architecture(), &args.model_config(contender.norm), vb)?;
        initialise(&vars, args.seed)?;
        Ok(Self {
            record: Record {
                contender,
                history: vec![],
            },
            sgd: Sgd::new(&vars, args.lr, args.momentum),
            vars,
            device: device.clone(),
            model,
        })
    }

    fn input_shape(&self) -> [usize; 3] {
        Architecture::input_shape(self.model.architecture())
    }
}

/// Trains up to the last epoch, and calls `after_epoch` after each. Stops soon after `stop` is set;
/// the epoch that was under way then counts for nothing.
pub fn train(
    run: &mut Run,
    args: &Args,
    data: &Dataset,
    stop: &AtomicBool,
    after_epoch: impl Fn(&Run) -> Result<()>,
) -> Result<()> {
    for (i, epoch) in run.record.history.iter().enumerate() {
        println!("{}  (from before)", line(i, args.epochs, epoch));
    }
    for index in run.record.history.len()..args.epochs {
        let started = Instant::now();
        let Some((train_loss, train_accuracy)) = train_epoch(run, args, data, index, stop)? else {
            return Ok(());
        };
        let seconds = started.elapsed().as_secs_f64();
        let (test_loss, test_accuracy) = evaluate(run, &data.test)?;
        run.record.history.push(Epoch {
            train_loss,
            train_accuracy,
            test_loss,
            test_accuracy,
            seconds,
        });
        after_epoch(run)?;
        println!("{}", line(index, args.epochs, &run.record.history[index]));
    }
    Ok(())
}

fn line(index: usize, epochs: usize, epoch: &Epoch) -> String {
    format!(
        "  epoch {:>2}/{epochs}  train loss {:.4} accuracy {:>5.2} %  {:>6.2} s   test loss {:.4} accuracy {:>5.2} %",
        index + 1,
        epoch.train_loss,
        epoch.train_accuracy * 100.0,
        epoch.seconds,
        epoch.test_loss,
        epoch.test_accuracy * 100.0
    )
}

/// Mean loss and accuracy over the epoch's batches, or nothing if it was stopped.
fn train_epoch(
    run: &mut Run,
    args: &Args,
    data: &Dataset,
    index: usize,
    stop: &AtomicBool,
) -> Result<Option<(f64, f64)>> {
    // Each epoch starts its random numbers anew, so that a resumed run has those of a whole one.
    run.model
        .reseed_dropout(args.seed ^ ((index as u64 + 1) << 32));
    let order = shuffled(data.train.len(), args.seed, index);
    // The last batch, if it is not whole, is left out: it would have statistics of its own.
    let batches: Vec<_> = order.chunks_exact(args.batch_size).collect();
    let bar = progress(args, index, batches.len());
    let mut sums = Sums::default();
    for (step, indices) in batches.iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            bar.finish_and_clear();
            return Ok(None);
        }
        let (x, labels) = data.train.batch(indices, run.input_shape(), &run.device)?;
        let logits = run.model.forward_t(&x, true)?;
        let loss = cross_entropy(&logits, &labels)?;
        run.sgd.step(&backward(&loss)?)?;
        sums.add(&logits, &labels, &loss)?;
        if (step + 1) % STEPS_BETWEEN_READS == 0 || step + 1 == batches.len() {
            sums.read()?;
            let rate = (step + 1) as f64 * args.batch_size as f64 / bar.elapsed().as_secs_f64();
            bar.set_position(step as u64 + 1);
            bar.set_message(format!("loss {:.4}  {rate:.0} images/s", sums.mean().0));
        }
    }
    bar.finish_and_clear();
    Ok(Some(sums.mean()))
}

fn evaluate(run: &Run, split: &Split) -> Result<(f64, f64)> {
    let mut sums = Sums::default();
    let indices: Vec<usize> = (0..split.len()).collect();
    for indices in indices.chunks(EVAL_BATCH) {
        let (x, labels) = split.batch(indices, run.input_shape(), &run.device)?;
        let logits = run.model.forward_t(&x, false)?;
        let loss = cross_entropy(&logits, &labels)?;
        sums.add(&logits, &labels, &loss)?;
        sums.read()?;
    }
    Ok(sums.mean())
}

fn progress(args: &Args, index: usize, steps: usize) -> ProgressBar {
    if args.quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("  {prefix} {bar:30} {pos}/{len}  {msg}");
    ProgressBar::new(steps as u64)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_prefix(format!("epoch {:>2}/{}", index + 1, args.epochs))
}

/// PyTorch's initial weights for linear and convolution layers, uniform in ±1/√fan_in. What belongs to
/// batch norm stays as it was built.
fn initialise(vars: &VarMap, seed: u64) -> Result<()> {
    let named = sorted(vars);
    uniform(vars, seed, |name| {
        let (layer, _) = name.rsplit_once('.')?;
        if !(layer.starts_with("conv") || layer.starts_with("fc")) {
            return None;
        }
        let weight = named
            .iter()
            .find(|(other, _)| *other == format!("{layer}.weight"));
        let fan_in: usize = weight.map_or(1, |(_, weight)| weight.dims()[1..].iter().product());
        Some(1.0 / (fan_in as f32).sqrt())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    /// fc2 of the MLP has 256 inputs, so ±1/16; the variance of a uniform distribution is bound²/3.
    #[test]
    fn weights_start_as_in_pytorch() -> Result<()> {
        let args = Args::parse_from(["mnist_compare"]);
        let run = Run::new(&args, args.contenders().remove(1), &Device::Cpu)?;
        let vars = run.vars.data().lock().unwrap();
        let values = |name: &str| vars[name].flatten_all()?.to_vec1::<f32>();
        let weight = values("fc2.weight")?;
        let count = weight.len() as f32;
        let mean = weight.iter().sum::<f32>() / count;
        let var = weight.iter().map(|w| w * w).sum::<f32>() / count;
        assert!(weight.iter().all(|w| w.abs() <= 1.0 / 16.0));
        assert!(mean.abs() < 1e-3, "{mean}");
        assert!((var * 3.0 * 256.0 - 1.0).abs() < 0.02, "{var}");
        assert!(values("fc2.bias")?.iter().all(|b| b.abs() <= 1.0 / 16.0));
        assert!(values("bn1.weight")?.iter().all(|&w| w == 1.0));
        assert!(values("bn1.bias")?.iter().all(|&b| b == 0.0));
        Ok(())
    }

    #[test]
    fn all_models_start_alike() -> Result<()> {
        for model in ["mlp", "cnn", "regularised"] {
            let all = "none,batch,renorm,group,layer,instance,candle";
            let args = Args::parse_from(["mnist_compare", "--model", model, "--norm", all]);
            let runs = args.contenders().into_iter();
            let runs = runs.map(|contender| Run::new(&args, contender, &Device::Cpu));
            let runs = runs.collect::<Result<Vec<_>>>()?;
            let shared = sorted(&runs[0].vars);
            assert!(shared.len() >= 6);
            for (name, var) in shared {
                let values = var.flatten_all()?.to_vec1::<f32>()?;
                let what = format!("{model} {name}");
                assert!(values.iter().any(|&v| v != values[0]), "{what} is constant");
                for run in &runs[1..] {
                    let other = run.vars.data().lock().unwrap()[&name].clone();
                    let other = other.flatten_all()?.to_vec1::<f32>()?;
                    assert_eq!(values, other, "{what} of {}", run.record.contender.title);
                }
            }
        }
        Ok(())
    }
}
