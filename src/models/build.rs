//! From a network's definition to its layers.

use candle_core::{bail, Result};
use candle_nn::{Conv2dConfig, VarBuilder};

use super::{Block, Dropout, DropoutKind, Layer, ModelConfig, Norm, Placement, CLASSES};
use crate::layers;
use crate::ops::Activation;

/// Turns blocks into layers, and keeps what the next layer has to know.
pub(super) struct Builder<'a> {
    config: &'a ModelConfig,
    vb: VarBuilder<'a>,
    pub layers: Vec<Layer>,
    /// `[channels, height, width]` while there are images, `[features]` after the flattening.
    shape: Vec<usize>,
    convs: usize,
    norms: usize,
    linears: usize,
    dropouts: usize,
}

impl<'a> Builder<'a> {
    pub fn new(input: [usize; 3], config: &'a ModelConfig, vb: VarBuilder<'a>) -> Self {
        Self {
            config,
            vb,
            layers: vec![],
            shape: input.to_vec(),
            convs: 0,
            norms: 0,
            linears: 0,
            dropouts: 0,
        }
    }

    pub fn block(&mut self, block: Block) -> Result<()> {
        match block {
            Block::Conv(channels) => {
                self.convs += 1;
                let vb = self.vb.pp(format!("conv{}", self.convs));
                let config = Conv2dConfig {
                    padding: 1,
                    ..Default::default()
                };
                let conv = layers::conv2d(self.shape[0], channels, 3, config, vb)?;
                self.layers.push(Layer::Conv(conv));
                self.shape[0] = channels;
                self.norm_and_relu(channels)?;
            }
            Block::Dense(features) => {
                self.linear(features)?;
                self.norm_and_relu(features)?;
            }
            Block::Logits => self.linear(CLASSES)?,
            Block::Pool => {
                let last = self.layers.pop();
                self.layers.extend(match last {
                    Some(Layer::BatchNorm(bn)) if bn.config().max_pool.is_none() => {
                        vec![Layer::BatchNorm(bn.with_max_pool(2))]
                    }
                    // The maximum of a window, rectified, is that of its rectified values; of
                    // windows there are fewer.
                    Some(Layer::Relu) => vec![Layer::MaxPool, Layer::Relu],
                    last => last.into_iter().chain([Layer::MaxPool]).collect(),
                });
                self.shape[1] /= 2;
                self.shape[2] /= 2;
            }
            Block::Drop2d(p) => self.dropout(p, DropoutKind::Channels)?,
            Block::Drop(p) => self.dropout(p, DropoutKind::Values)?,
        }
        Ok(())
    }

    fn linear(&mut self, features: usize) -> Result<()> {
        if self.shape.len() > 1 {
            self.layers.push(Layer::Flatten);
        }
        self.linears += 1;
        let vb = self.vb.pp(format!("fc{}", self.linears));
        let linear = layers::linear(self.shape.iter().product(), features, vb)?;
        self.layers.push(Layer::Linear(linear));
        self.shape = vec![features];
        Ok(())
    }

    fn dropout(&mut self, p: f32, kind: DropoutKind) -> Result<()> {
        let dropout = Dropout::new(p, kind)?;
        dropout.reseed(0, self.dropouts as u64);
        self.dropouts += 1;
        self.layers.push(Layer::Dropout(Box::new(dropout)));
        Ok(())
    }

    fn norm_and_relu(&mut self, channels: usize) -> Result<()> {
        let before = self.config.placement == Placement::BeforeActivation;
        self.norms += 1;
        let vb = self.vb.pp(format!("bn{}", self.norms));
        let norm = match &self.config.norm {
            Norm::None => None,
            Norm::Batch(config) => {
                if config.max_pool.is_some() {
                    bail!(
                        "the pools of a model are its architecture's: expected a max_pool of None, got {:?}",
                        config.max_pool
                    )
                }
                let mut config = *config;
                config.axis = 1; // where the model has its channels
                if before {
                    config.activation = Activation::Relu;
                }
                Some(Layer::BatchNorm(layers::batch_norm(channels, config, vb)?))
            }
            Norm::CandleNn(config) => Some(Layer::CandleBatchNorm(candle_nn::batch_norm(
                channels, *config, vb,
            )?)),
        };
        let relu_is_fused = before && matches!(norm, Some(Layer::BatchNorm(_)));
        let relu = (!relu_is_fused).then_some(Layer::Relu);
        if before {
            self.layers.extend(norm);
            self.layers.extend(relu);
        } else {
            self.layers.extend(relu);
            self.layers.extend(norm);
        }
        Ok(())
    }
}
