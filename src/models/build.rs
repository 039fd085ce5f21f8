//! From a network's definition to its layers.

use candle_core::{bail, Result};
use candle_nn::{Conv2dConfig, VarBuilder};

use super::{Block, Dropout, DropoutKind, Layer, ModelConfig, Norm, Placement, CLASSES};
use crate::layers::{self, BatchNormConfig, GroupNormConfig, InstanceNormConfig, LayerNormConfig};
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
        let norm = self.norm(channels)?;
        let relu_is_fused = before && !matches!(norm, None | Some(Layer::CandleBatchNorm(_)));
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

    /// The norm of a hidden layer, with the ReLU in it if it comes next and if the norm is this crate's.
    fn norm(&mut self, channels: usize) -> Result<Option<Layer>> {
        self.norms += 1;
        let name = match self.config.norm {
            Norm::Batch(_) | Norm::CandleNn(_) => "bn",
            _ => "norm",
        };
        let vb = self.vb.pp(format!("{name}{}", self.norms));
        let activation = |own| match self.config.placement {
            Placement::BeforeActivation => Activation::Relu,
            Placement::AfterActivation => own,
        };
        let of_images = self.shape.len() > 1;
        Ok(Some(match &self.config.norm {
            Norm::None => return Ok(None),
            Norm::Batch(config) => {
                if config.max_pool.is_some() {
                    bail!(
                        "the pools of a model are its architecture's: expected a max_pool of None, got {:?}",
                        config.max_pool
                    )
                }
                let config = BatchNormConfig {
                    axis: 1, // where the model has its channels
                    activation: activation(config.activation),
                    ..*config
                };
                Layer::BatchNorm(layers::batch_norm(channels, config, vb)?)
            }
            Norm::Group { num_groups, config } => {
                let config = GroupNormConfig {
                    activation: activation(config.activation),
                    ..*config
                };
                Layer::GroupNorm(layers::group_norm(*num_groups, channels, config, vb)?)
            }
            Norm::Layer(config) => {
                let config = GroupNormConfig {
                    activation: activation(config.activation),
                    ..*config
                };
                match of_images {
                    true => Layer::GroupNorm(layers::group_norm(1, channels, config, vb)?),
                    false => Layer::LayerNorm(layers::layer_norm(channels, dense(config), vb)?),
                }
            }
            Norm::Instance(config) => {
                if config.track_running_stats {
                    bail!("a model's instance norm keeps no statistics: expected track_running_stats of false, got true")
                }
                let config = InstanceNormConfig {
                    activation: activation(config.activation),
                    ..*config
                };
                let alone = LayerNormConfig {
                    eps: config.eps,
                    elementwise_affine: false,
                    activation: config.activation,
                    ..Default::default()
                };
                match of_images {
                    true => Layer::InstanceNorm(layers::instance_norm(channels, config, vb)?),
                    false => Layer::LayerNorm(layers::layer_norm(channels, alone, vb)?),
                }
            }
            Norm::CandleNn(config) => {
                Layer::CandleBatchNorm(candle_nn::batch_norm(channels, *config, vb)?)
            }
        }))
    }
}

/// Of the features of a dense layer, as one group.
fn dense(config: GroupNormConfig) -> LayerNormConfig {
    LayerNormConfig {
        eps: config.eps,
        elementwise_affine: config.affine,
        activation: config.activation,
        ..Default::default()
    }
}
