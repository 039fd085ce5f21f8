//! The networks that are compared: which normalisation each has, and what it is called.

use candle_batch_norm::layers::{InstanceNormConfig, RenormSchedule};
use candle_batch_norm::models::Norm;
use candle_batch_norm::BatchNormConfig;
use clap::ValueEnum;

use crate::args::{name_of, Args};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NormArg {
    /// Nothing: the plain network
    None,
    /// This crate's batch norm
    Batch,
    /// This crate's batch renormalisation (Ioffe 2017), its limits widened by step 400
    Renorm,
    /// This crate's group norm, in 8 groups of channels
    Group,
    /// This crate's layer norm: all of an image together
    Layer,
    /// This crate's instance norm: each channel of an image by itself
    Instance,
    /// candle-nn's batch norm
    Candle,
}

impl NormArg {
    /// Every norm gets the same `eps`, and all that keep running statistics the same momentum.
    pub fn of_model(self, args: &Args) -> Norm {
        let batch = BatchNormConfig {
            eps: args.bn_eps,
            momentum: Some(args.bn_momentum),
            ..Default::default()
        };
        match self {
            Self::None => Norm::None,
            Self::Batch => Norm::Batch(batch),
            Self::Renorm => Norm::Batch(BatchNormConfig {
                renorm: Some(renorm_schedule()),
                ..batch
            }),
            Self::Group => Norm::Group {
                num_groups: Norm::GROUPS,
                config: args.bn_eps.into(),
            },
            Self::Layer => Norm::Layer(args.bn_eps.into()),
            Self::Instance => Norm::Instance(InstanceNormConfig {
                affine: true,
                ..args.bn_eps.into()
            }),
            Self::Candle => Norm::CandleNn(candle_nn::BatchNormConfig {
                eps: args.bn_eps,
                momentum: args.bn_momentum,
                ..Default::default()
            }),
        }
    }

    /// Whether it compares the images of a batch, so that one alone tells it nothing.
    pub fn needs_a_batch(self) -> bool {
        matches!(self, Self::Batch | Self::Renorm | Self::Candle)
    }
}

/// The paper's schedule, which begins at step 5000, a hundred times as fast: these runs are short.
fn renorm_schedule() -> RenormSchedule {
    let paper = RenormSchedule::default();
    RenormSchedule {
        begin: paper.begin / 100,
        d_end: paper.d_end / 100,
        r_end: paper.r_end / 100,
        ..paper
    }
}

/// One of the networks that are compared.
#[derive(Clone, Debug)]
pub struct Contender {
    pub norm: NormArg,
    /// For people.
    pub title: String,
    /// For names of files and columns.
    pub key: String,
}

impl Contender {
    /// What is compared, in the order in which it is trained. A network and the same with batch norm are
    /// called by that difference, others by their norms.
    pub fn list(norms: &[NormArg]) -> Vec<Self> {
        let name = |norm: NormArg| {
            let (title, key) = match norm {
                _ if !is_pair(norms) => (name_of(&norm), name_of(&norm)),
                NormArg::None => ("without batch norm".into(), "without_bn".into()),
                _ => ("with batch norm".into(), "with_bn".into()),
            };
            Self { norm, title, key }
        };
        norms.iter().copied().map(name).collect()
    }
}

/// Whether it is all about one batch norm: the network without it, then with it.
pub fn is_pair(norms: &[NormArg]) -> bool {
    matches!(norms, [NormArg::None, NormArg::Batch | NormArg::Candle])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_pair_and_of_other_lists() {
        use NormArg::{Batch, Candle, None, Renorm};
        let keys = |norms: &[NormArg]| -> Vec<String> {
            let list = Contender::list(norms).into_iter();
            list.map(|contender| contender.key).collect()
        };
        assert_eq!(keys(&[None, Batch]), ["without_bn", "with_bn"]);
        assert_eq!(keys(&[None, Candle]), ["without_bn", "with_bn"]);
        assert_eq!(keys(&[Batch, None]), ["batch", "none"]);
        assert_eq!(keys(&[None, Renorm]), ["none", "renorm"]);
        assert_eq!(keys(&[None, Batch, Candle]), ["none", "batch", "candle"]);
    }
}
