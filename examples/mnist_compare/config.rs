//! What of the command line decides about the numbers, for files and for people.

use candle_core::Device;
use serde::Serialize;

use crate::args::{name_of, Args};
use crate::data::Dataset;
use crate::norms::{is_pair, Contender, NormArg};

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
        format!(
            "{} {compared}; SGD lr {} momentum {}, batch {}, epochs {}, seed {}",
            name_of(&self.model),
            self.lr,
            self.momentum,
            self.batch_size,
            self.epochs,
            self.seed
        )
    }

    /// Of the chart.
    pub fn title(&self, data: &Dataset) -> String {
        let compared = match is_pair(&self.norms) {
            true => "with and without batch norm",
            false => "one network, several norms",
        };
        let model = name_of(&self.model).to_uppercase();
        format!("{model} on {}: {compared}", data.source)
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
