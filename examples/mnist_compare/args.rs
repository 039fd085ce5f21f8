//! The command line.

use std::path::PathBuf;

use anyhow::{bail, Result};
use candle_batch_norm::models::{Architecture, ModelConfig, Placement};
use candle_core::Device;
use clap::{Parser, ValueEnum};

use crate::data::Wanted;
use crate::norms::{Contender, NormArg};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ModelArg {
    Mlp,
    Cnn,
    ConvNet,
    ThreeBlock,
    Regularised,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum PlacementArg {
    Before,
    After,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DeviceArg {
    Auto,
    Cpu,
    Cuda,
}

/// Trains the same network with several normalisations on MNIST, by default without any and with batch
/// norm, and compares them.
#[derive(Clone, Debug, Parser)]
#[command(version)]
pub struct Args {
    /// The network to train with each norm
    #[arg(long, value_enum, default_value = "mlp")]
    pub model: ModelArg,
    /// Normalisation before or after the activation
    #[arg(long, value_enum, default_value = "before")]
    pub placement: PlacementArg,
    /// What to compare, in this order, with commas between
    #[arg(
        long = "norm",
        value_enum,
        value_name = "NORM,…",
        value_delimiter = ',',
        default_value = "none,batch"
    )]
    pub norms: Vec<NormArg>,
    /// Added to the variance in every norm
    #[arg(long, default_value_t = 1e-5)]
    pub bn_eps: f64,
    /// The weight of a new batch in the running statistics
    #[arg(long, default_value_t = 0.1)]
    pub bn_momentum: f64,
    /// How often each model sees the training images
    #[arg(long, default_value_t = 10)]
    pub epochs: usize,
    /// Images in each step of the training; an epoch's last ones, if fewer, are left out
    #[arg(long, default_value_t = 64)]
    pub batch_size: usize,
    /// Compare at each of these batch sizes instead, to see what becomes of each norm as the batch
    /// shrinks. The learning rate grows with the batch, linearly: --lr is for --batch-size images. Without
    /// --limit, 10000 training images are used
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    pub batch_sizes: Option<Vec<usize>>,
    /// Learning rate of the stochastic gradient descent
    #[arg(long, default_value_t = 0.01)]
    pub lr: f64,
    /// Momentum of the stochastic gradient descent
    #[arg(long, default_value_t = 0.9)]
    pub momentum: f64,
    /// Decides about initial weights, batches, dropout and drawn digits
    #[arg(long, default_value_t = 42)]
    pub seed: u64,
    /// Where to compute; auto takes CUDA if it is built in and there is a GPU
    #[arg(long, value_enum, default_value = "auto")]
    pub device: DeviceArg,
    /// Folder with MNIST's four IDX files, plain or .gz; `drawn` draws digits instead
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Use only the first N training images, and a sixth as many test images
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Folder for chart, metrics and models
    #[arg(long, value_name = "DIR", default_value = "runs/mnist_compare")]
    pub out: PathBuf,
    /// Go on after the last whole epoch in the folder of --out
    #[arg(long)]
    pub resume: bool,
    /// Exit with code 1 if a model's last test accuracy is below this many percent
    #[arg(long, value_name = "PERCENT")]
    pub target_acc: Option<f64>,
    /// No progress bar
    #[arg(long)]
    pub quiet: bool,
}

impl Args {
    /// Says what is out of range before any work is done.
    pub fn check(&self) -> Result<()> {
        if self.epochs == 0 {
            bail!("--epochs should be at least 1, is 0")
        }
        check_once("--norm", &self.norms, name_of)?;
        let (flag, sizes) = match &self.batch_sizes {
            None => ("--batch-size", vec![self.batch_size]),
            Some(sizes) => ("--batch-sizes", sizes.clone()),
        };
        check_once(flag, &sizes, usize::to_string)?;
        let smallest = sizes.into_iter().min().unwrap_or(0);
        match self.norms.iter().find(|norm| norm.needs_a_batch()) {
            Some(norm) if smallest < 2 => bail!(
                "{flag} should be at least 2 for the norm {}, which compares the images of a batch, is {smallest}",
                name_of(norm)
            ),
            _ if smallest == 0 => bail!("{flag} should be at least 1, is 0"),
            _ if self.batch_size == 0 => {
                bail!("--batch-size should be at least 1, is 0: --lr is for so many images")
            }
            _ => {}
        }
        if !(self.lr > 0.0 && self.lr.is_finite()) {
            bail!("--lr should be a number above 0, is {}", self.lr)
        }
        if !(0.0..1.0).contains(&self.momentum) {
            bail!(
                "--momentum should be at least 0 and below 1, is {}",
                self.momentum
            )
        }
        if !(0.0..=1.0).contains(&self.bn_momentum) {
            bail!(
                "--bn-momentum should be from 0 to 1, is {}",
                self.bn_momentum
            )
        }
        if !(self.bn_eps > 0.0 && self.bn_eps.is_finite()) {
            bail!("--bn-eps should be a number above 0, is {}", self.bn_eps)
        }
        let largest = self.largest_batch();
        if let Some(limit) = self.limit.filter(|&limit| limit < largest) {
            bail!("--limit should leave at least a batch of {largest} images, is {limit}")
        }
        if let Some(target) = self.target_acc.filter(|t| !(0.0..=100.0).contains(t)) {
            bail!("--target-acc should be a percentage from 0 to 100, is {target}")
        }
        Ok(())
    }

    pub fn architecture(&self) -> Architecture {
        match self.model {
            ModelArg::Mlp => Architecture::Mlp,
            ModelArg::Cnn => Architecture::Cnn,
            ModelArg::ConvNet => Architecture::ConvNet,
            ModelArg::ThreeBlock => Architecture::ThreeBlock,
            ModelArg::Regularised => Architecture::Regularised,
        }
    }

    pub fn contenders(&self) -> Vec<Contender> {
        Contender::list(&self.norms)
    }

    pub fn model_config(&self, norm: NormArg) -> ModelConfig {
        let norm = norm.of_model(self);
        let placement = match self.placement {
            PlacementArg::Before => Placement::BeforeActivation,
            PlacementArg::After => Placement::AfterActivation,
        };
        ModelConfig { norm, placement }
    }

    pub fn open_device(&self) -> Result<Device> {
        match self.device {
            DeviceArg::Cpu => Ok(Device::Cpu),
            DeviceArg::Auto if !cfg!(feature = "cuda") => Ok(Device::Cpu),
            DeviceArg::Auto => Ok(Device::new_cuda(0).unwrap_or_else(|error| {
                println!("no CUDA device, so the CPU is used: {error}");
                Device::Cpu
            })),
            DeviceArg::Cuda if !cfg!(feature = "cuda") => {
                bail!("--device cuda needs a build with --features cuda")
            }
            DeviceArg::Cuda => Ok(Device::new_cuda(0)?),
        }
    }

    pub fn wanted(&self) -> Wanted<'_> {
        Wanted {
            folder: self.data.as_deref(),
            seed: self.seed,
            limit: self.most_images(),
            test: self.largest_batch(),
        }
    }
}

/// That nothing is named twice.
fn check_once<T: PartialEq>(flag: &str, given: &[T], name: fn(&T) -> String) -> Result<()> {
    let twice = given
        .iter()
        .enumerate()
        .find(|(i, value)| given[..*i].contains(value));
    if let Some((_, value)) = twice {
        let all: Vec<_> = given.iter().map(name).collect();
        bail!(
            "{flag} should name each once, names {} twice: {}",
            name(value),
            all.join(",")
        )
    }
    Ok(())
}

/// As on the command line.
pub fn name_of(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_values_are_named_with_what_was_expected() {
        for (flag, expected) in [
            ("--batch-size=0", "at least 2"),
            ("--batch-size=1", "at least 2 for the norm batch"),
            (
                "--norm=none,batch,none",
                "names none twice: none,batch,none",
            ),
            ("--batch-sizes=4,1", "at least 2 for the norm batch"),
            ("--batch-sizes=2,4,2", "names 2 twice: 2,4,2"),
            ("--epochs=0", "at least 1"),
            ("--lr=0", "a number above 0, is 0"),
            ("--lr=-0.5", "a number above 0, is -0.5"),
            ("--lr=nan", "a number above 0, is NaN"),
            ("--lr=inf", "a number above 0, is inf"),
            ("--momentum=1", "below 1, is 1"),
            ("--bn-momentum=1.5", "from 0 to 1, is 1.5"),
            ("--bn-eps=0", "a number above 0, is 0"),
            ("--limit=63", "at least a batch of 64 images, is 63"),
            ("--target-acc=101", "from 0 to 100, is 101"),
        ] {
            let error = Args::parse_from(["mnist_compare", flag]).check();
            let error = error.expect_err(flag).to_string();
            let name = flag.split('=').next().unwrap_or_default();
            assert!(
                error.starts_with(name) && error.contains(expected),
                "{flag}: {error}"
            );
        }
        for good in [
            &["--batch-size=64"][..],
            &["--batch-size=1", "--norm=none"],
            &["--batch-sizes=1,2", "--norm=none"],
        ] {
            let args = ["mnist_compare"].iter().chain(good);
            Args::parse_from(args).check().unwrap();
        }
        let error = Args::try_parse_from(["mnist_compare", "--norm=none,best"]).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("'best'") && error.contains("renorm"),
            "{error}"
        );
    }
}
