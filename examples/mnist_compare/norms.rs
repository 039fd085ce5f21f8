//! The networks that are compared: which normalisation each has, and what it is called.

use candle_batch_norm::models::Norm;
use candle_batch_norm::BatchNormConfig;
use clap::ValueEnum;

use crate::args::Args;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NormArg {
    None,
    Fused,
    Candle,
}

impl NormArg {
    pub fn of_model(self, args: &Args) -> Norm {
        match self {
            Self::None => Norm::None,
            Self::Fused => Norm::Batch(BatchNormConfig {
                eps: args.bn_eps,
                momentum: Some(args.bn_momentum),
                ..Default::default()
            }),
            Self::Candle => Norm::CandleNn(candle_nn::BatchNormConfig {
                eps: args.bn_eps,
                momentum: args.bn_momentum,
                ..Default::default()
            }),
        }
    }
}

/// One of the networks that are compared.
#[derive(Clone, Copy, Debug)]
pub struct Contender {
    pub norm: NormArg,
    /// For people.
    pub title: &'static str,
    /// For names of files and columns.
    pub key: &'static str,
}

impl Contender {
    /// In the order in which they are trained.
    pub fn list(norm: NormArg) -> Vec<Self> {
        let without = Self {
            norm: NormArg::None,
            title: "without batch norm",
            key: "without_bn",
        };
        let with = Self {
            norm,
            title: "with batch norm",
            key: "with_bn",
        };
        vec![without, with]
    }
}
