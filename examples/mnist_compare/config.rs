//! What of the command line decides about the numbers, for files and for people.

use candle_core::Device;
use serde::Serialize;

use crate::args::{name_of, Args};
use crate::data::Dataset;
use crate::norms::{is_pair, Contender, NormArg};

/// The `--limit` of several batch sizes: small batches take long.
const SWEEP_LIMIT: usize = 10_000;

/// All that decides about the numbers of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    pub version: String,
    pub model: String,
    pub placement: String,
    pub norm: String,
    pub bn_eps: f64,
    pub bn_momentum: f64,
    pub epochs: usize,
    pub batch_size: usize,
    pub lr: f64,
    pub momentum: f64,
    pub seed: u64,
    pub device: String,
    pub data: String,
    pub data_hash: String,
    pub train_images: usize,
    pub test_images: usize,
}

impl Args {
    /// Each comparison that is asked for: one, or one for every batch size.
    ///
    /// There, the learning rate is proportional to the batch, as for the same curve in Wu and He 2018,
    /// section 4.1 (<https://arxiv.org/abs/1803.08494>), after Goyal et al. 2017
    /// (<https://arxiv.org/abs/1706.02677>).
    pub fn comparisons(&self) -> Vec<Self> {
        let Some(sizes) = &self.batch_sizes else {
            return vec![self.clone()];
        };
        let of_size = |&size: &usize| Self {
            batch_size: size,
            batch_sizes: None,
            lr: self.lr * size as f64 / self.batch_size as f64,
            out: self.out.join(format!("batch_{size}")),
            ..self.clone()
        };
        sizes.iter().map(of_size).collect()
    }

    pub fn largest_batch(&self) -> usize {
        let sizes = self.batch_sizes.iter().flatten();
        sizes.copied().max().unwrap_or(self.batch_size)
    }

    /// How many training images to use at most.
    pub fn most_images(&self) -> Option<usize> {
        let of_a_sweep = self.batch_sizes.as_ref().map(|_| SWEEP_LIMIT);
        self.limit.or(of_a_sweep)
    }

    pub fn config(&self, device: &Device, data: &Dataset) -> Config {
        Config {
            version: env!("CARGO_PKG_VERSION").into(),
            model: name_of(&self.model),
            placement: name_of(&self.placement),
            norm: self.norm_names(","),
            bn_eps: self.bn_eps,
            bn_momentum: self.bn_momentum,
            epochs: self.epochs,
            batch_size: self.batch_size,
            lr: self.lr,
            momentum: self.momentum,
            seed: self.seed,
            device: device_name(device).into(),
            data: data.source.clone(),
            data_hash: format!("{:016x}", data.hash()),
            train_images: data.train.len(),
            test_images: data.test.len(),
        }
    }

    pub fn describe(&self) -> String {
        let placement = name_of(&self.placement);
        let compared = match self.norms[..] {
            [NormArg::None, norm] if is_pair(&self.norms) => {
                let whose = if norm == NormArg::Candle {
                    "candle"
                } else {
                    "fused"
                };
                format!("with batch norm ({whose}, {placement} the activation) and without")
            }
            _ => format!(
                "by norm ({}; {placement} the activation)",
                self.norm_names(", ")
            ),
        };
        let batch = match &self.batch_sizes {
            None => format!("batch {}", self.batch_size),
            Some(sizes) => format!("for batches of {}; here {sizes:?}", self.batch_size),
        };
        format!(
            "{} {compared}; SGD lr {} momentum {}, {batch}, epochs {}, seed {}",
            name_of(&self.model),
            self.lr,
            self.momentum,
            self.epochs,
            self.seed
        )
    }

    /// Of the chart of one batch size.
    pub fn title(&self, data: &Dataset) -> String {
        let compared = match is_pair(&self.norms) {
            true => "with and without batch norm",
            false => "one network, several norms",
        };
        format!("{}: {compared}", self.title_start(data))
    }

    /// Of the chart of several batch sizes.
    pub fn sweep_title(&self, data: &Dataset) -> String {
        let epochs = match self.epochs {
            1 => "1 epoch".into(),
            epochs => format!("{epochs} epochs"),
        };
        format!("{}: test error after {epochs}", self.title_start(data))
    }

    fn title_start(&self, data: &Dataset) -> String {
        format!("{} on {}", name_of(&self.model).to_uppercase(), data.source)
    }

    fn norm_names(&self, between: &str) -> String {
        let names: Vec<_> = self.norms.iter().map(name_of).collect();
        names.join(between)
    }
}

impl Config {
    /// That of one contender: with its norm alone.
    pub fn of(&self, contender: &Contender) -> Self {
        Self {
            norm: name_of(&contender.norm),
            ..self.clone()
        }
    }
}

pub fn device_name(device: &Device) -> &'static str {
    match device {
        Device::Cpu => "cpu",
        Device::Cuda(_) => "cuda",
        Device::Metal(_) => "metal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::path::PathBuf;

    #[test]
    fn the_learning_rate_grows_with_the_batch() {
        let args = ["mnist_compare", "--batch-sizes=2,128", "--out=here"];
        let args = Args::parse_from(args);
        let all = args.comparisons();
        assert_eq!(
            all.iter().map(|a| a.lr).collect::<Vec<_>>(),
            [0.01 / 32.0, 0.02]
        );
        assert_eq!(all[1].out, PathBuf::from("here/batch_128"));
        assert_eq!(
            (args.largest_batch(), args.most_images()),
            (128, Some(10_000))
        );
        let one = Args::parse_from(["mnist_compare"]);
        assert_eq!((one.largest_batch(), one.most_images()), (64, None));
        assert_eq!(one.comparisons()[0].lr, 0.01);
    }
}
