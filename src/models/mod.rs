//! The networks of the comparison with, without and among normalisations, each from one definition.
//!
//! Every model is a [`Model`]: a list of blocks that [`Architecture`] writes down once, in which
//! [`Norm`] decides what stands in the place of the normalisation. Two models that differ only in
//! [`Norm`] share every other variable by name and shape, so that a comparison can start them from
//! the same weights.
//!
//! | architecture | input | layers |
//! |---|---|---|
//! | [`Mlp`](Architecture::Mlp) | 1×28×28 | 784-256-128-10 |
//! | [`Cnn`](Architecture::Cnn) | 1×28×28 | conv 32, pool, conv 64, pool, 128, 10 |
//! | [`ConvNet`](Architecture::ConvNet) | 3×32×32 | conv 64, pool, conv 128, pool, 512, 10 |
//! | [`ThreeBlock`](Architecture::ThreeBlock) | 3×32×32 | conv 32, pool, conv 64, pool, conv 128, pool, 256, 10 |
//! | [`Regularised`](Architecture::Regularised) | 3×32×32 | `ConvNet` with `Dropout2d` 0.2 and 0.3 after the pools and dropout 0.5 before the last layer |
//!
//! Convolutions are 3×3 with padding 1, pools are 2×2 maxima, and every hidden layer is followed by
//! a normalisation (if there is one) and a ReLU, in the order that [`Placement`] says. The names of
//! the variables are `conv1.weight`, `bn1.running_mean`, `fc2.bias` and so on, as a PyTorch module
//! with these attributes would have them; norms that are no batch norms are called `norm1`, `norm2`, ….
//!
//! ```
//! use candle_batch_norm::models::{Architecture, Model, ModelConfig, Norm};
//! use candle_core::{DType, Device, ModuleT, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//!
//! # fn main() -> candle_core::Result<()> {
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let config = ModelConfig { norm: Norm::batch(), ..Default::default() };
//! let model = Model::new(Architecture::Mlp, &config, vb)?;
//! let x = Tensor::zeros((4, 1, 28, 28), DType::F32, &Device::Cpu)?;
//! assert_eq!(model.forward_t(&x, true)?.dims(), &[4, 10]);
//! # Ok(())
//! # }
//! ```
mod build;
mod dropout;

use candle_core::{bail, Module, ModuleT, Result, Tensor};
use candle_nn::VarBuilder;

use crate::layers::{
    self, BatchNormConfig, Conv2d, GroupNormConfig, InstanceNormConfig, RenormSchedule,
};
use crate::ops::{max_pool2d, relu, reshape};
use build::Builder;
pub use dropout::{Dropout, DropoutKind};

/// What stands in the place of the normalisation. A ReLU that follows one of this crate's is fused into it.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Norm {
    /// Nothing: the plain network.
    #[default]
    None,
    /// This crate's [`BatchNorm`](layers::BatchNorm), or batch renormalisation if there is a `renorm`. Its
    /// `axis` is the model's.
    Batch(BatchNormConfig),
    /// [`GroupNorm`](layers::GroupNorm): each image in groups of channels, after a dense layer in groups of
    /// features.
    Group {
        /// Has to divide the channels and features of every hidden layer.
        num_groups: usize,
        /// Of all layers.
        config: GroupNormConfig,
    },
    /// All of a sample's values together: on images [`GroupNorm`](layers::GroupNorm) with one group, so that
    /// weight and bias are `[c]`, as Wu and He 2018 compare it (<https://arxiv.org/abs/1803.08494>, section
    /// 3.1); after a dense layer [`LayerNorm`](layers::LayerNorm).
    Layer(GroupNormConfig),
    /// On images [`InstanceNorm`](layers::InstanceNorm): each channel of each image by itself. After a dense
    /// layer, where a channel has one value, a sample's features together and without weight and bias, which
    /// is what PyTorch's `InstanceNorm1d` does with two dimensions. There are no running statistics.
    Instance(InstanceNormConfig),
    /// candle-nn's own layer, to compare against. It takes `eps`, `affine` and `momentum` from here.
    CandleNn(candle_nn::BatchNormConfig),
}

impl Norm {
    /// This crate's batch normalisation with PyTorch's defaults.
    pub fn batch() -> Self {
        Self::Batch(BatchNormConfig::default())
    }

    /// This crate's batch renormalisation with the schedule of the paper.
    pub fn renorm() -> Self {
        Self::Batch(BatchNormConfig {
            renorm: Some(RenormSchedule::default()),
            ..Default::default()
        })
    }

    /// The groups of [`Norm::group`]: they divide the channels and features of every [`Architecture`].
    pub const GROUPS: usize = 8;

    /// Group norm with [`Norm::GROUPS`] and PyTorch's defaults.
    pub fn group() -> Self {
        Self::Group {
            num_groups: Self::GROUPS,
            config: GroupNormConfig::default(),
        }
    }

    /// Layer norm with PyTorch's defaults.
    pub fn layer() -> Self {
        Self::Layer(GroupNormConfig::default())
    }

    /// Instance norm with weight and bias, which are not PyTorch's default, and the rest of its defaults.
    pub fn instance() -> Self {
        Self::Instance(InstanceNormConfig {
            affine: true,
            ..Default::default()
        })
    }

    /// candle-nn's batch normalisation with its defaults, which are PyTorch's too.
    pub fn candle_nn() -> Self {
        Self::CandleNn(candle_nn::BatchNormConfig::default())
    }
}

/// Whether the normalisation comes before or after the activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// Linear → norm → ReLU, as in the paper by Ioffe and Szegedy (<https://arxiv.org/abs/1502.03167>).
    #[default]
    BeforeActivation,
    /// Linear → ReLU → norm.
    AfterActivation,
}

/// What can be chosen about a model beside its architecture.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ModelConfig {
    /// The normalisation after every hidden layer.
    pub norm: Norm,
    /// Its place.
    pub placement: Placement,
}

/// The networks that this module defines. All of them give 10 logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// 784-256-128-10 on 28×28 pixels.
    Mlp,
    /// Two convolutions (32, 64) and a dense layer (128), on 28×28 pixels.
    Cnn,
    /// Two convolutions (64, 128) and a dense layer (512), on 3×32×32.
    ConvNet,
    /// Three convolutions (32, 64, 128) and a dense layer (256), on 3×32×32.
    ThreeBlock,
    /// [`ConvNet`](Self::ConvNet) with dropout.
    Regularised,
}

/// The number of classes that every model tells apart.
pub const CLASSES: usize = 10;

impl Architecture {
    /// Every architecture.
    pub const ALL: [Self; 5] = [
        Self::Mlp,
        Self::Cnn,
        Self::ConvNet,
        Self::ThreeBlock,
        Self::Regularised,
    ];

    /// `[channels, height, width]` of the images that the network takes.
    pub fn input_shape(self) -> [usize; 3] {
        match self {
            Self::Mlp | Self::Cnn => [1, 28, 28],
            Self::ConvNet | Self::ThreeBlock | Self::Regularised => [3, 32, 32],
        }
    }

    /// The one definition of each network: normalised or not, it is built from these blocks.
    fn blocks(self) -> Vec<Block> {
        use Block::{Conv, Dense, Drop, Drop2d, Logits, Pool};
        match self {
            Self::Mlp => vec![Dense(256), Dense(128), Logits],
            Self::Cnn => vec![Conv(32), Pool, Conv(64), Pool, Dense(128), Logits],
            Self::ConvNet => vec![Conv(64), Pool, Conv(128), Pool, Dense(512), Logits],
            Self::ThreeBlock => vec![
                Conv(32),
                Pool,
                Conv(64),
                Pool,
                Conv(128),
                Pool,
                Dense(256),
                Logits,
            ],
            Self::Regularised => vec![
                Conv(64),
                Pool,
                Drop2d(0.2),
                Conv(128),
                Pool,
                Drop2d(0.3),
                Dense(512),
                Drop(0.5),
                Logits,
            ],
        }
    }
}

/// A line of a network's definition. `Conv` and `Dense` bring their norm and their ReLU along.
enum Block {
    /// A 3×3 convolution with padding 1 to this many channels.
    Conv(usize),
    /// A linear layer to this many features; images are flattened first.
    Dense(usize),
    /// The last linear layer, with neither norm nor activation.
    Logits,
    /// A 2×2 maximum.
    Pool,
    /// Dropout of whole channels.
    Drop2d(f32),
    /// Dropout of single values.
    Drop(f32),
}

#[derive(Debug)]
enum Layer {
    Conv(Conv2d),
    Linear(layers::Linear),
    BatchNorm(layers::BatchNorm),
    GroupNorm(layers::GroupNorm),
    LayerNorm(layers::LayerNorm),
    InstanceNorm(layers::InstanceNorm),
    CandleBatchNorm(candle_nn::BatchNorm),
    Relu,
    MaxPool,
    Flatten,
    Dropout(Box<Dropout>),
}

impl ModuleT for Layer {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        match self {
            Self::Conv(conv) => conv.forward(x),
            Self::Linear(linear) => linear.forward(x),
            Self::BatchNorm(bn) => bn.forward_t(x, train),
            Self::GroupNorm(norm) => norm.forward(x),
            Self::LayerNorm(norm) => norm.forward(x),
            Self::InstanceNorm(norm) => norm.forward_t(x, train),
            Self::CandleBatchNorm(bn) => bn.forward_t(x, train),
            Self::Relu => relu(x),
            Self::MaxPool => max_pool2d(x, 2),
            Self::Flatten => {
                let features: usize = x.dims()[1..].iter().product();
                reshape(x, (x.dim(0)?, features))
            }
            Self::Dropout(dropout) => dropout.forward_t(x, train),
        }
    }
}

/// A network of the comparison: images `[n, channels, height, width]` in, logits `[n, 10]` out.
///
/// `forward_t(x, true)` trains: batch norm uses and tracks the statistics of the batch, and dropout
/// drops. `forward_t(x, false)` evaluates.
#[derive(Debug)]
pub struct Model {
    architecture: Architecture,
    layers: Vec<Layer>,
}

impl Model {
    /// Builds `architecture`, with its variables asked for by name from `vb`.
    pub fn new(architecture: Architecture, config: &ModelConfig, vb: VarBuilder) -> Result<Self> {
        let mut build = Builder::new(architecture.input_shape(), config, vb);
        for block in architecture.blocks() {
            build.block(block)?;
        }
        Ok(Self {
            architecture,
            layers: build.layers,
        })
    }

    /// What the model was built as.
    pub fn architecture(&self) -> Architecture {
        self.architecture
    }

    /// Starts the random numbers of every dropout layer anew from `seed`.
    ///
    /// Two runs that reseed at the same places drop the same values, on every device.
    pub fn reseed_dropout(&self, seed: u64) {
        let dropouts = self.layers.iter().filter_map(|layer| match layer {
            Layer::Dropout(dropout) => Some(dropout),
            _ => None,
        });
        for (stream, dropout) in dropouts.enumerate() {
            dropout.reseed(seed, stream as u64);
        }
    }
}

impl ModuleT for Model {
    fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        let expected = self.architecture.input_shape();
        if x.rank() != 4 || x.dims()[1..] != expected {
            bail!(
                "{:?} takes images of shape [n, {}, {}, {}], got {:?}",
                self.architecture,
                expected[0],
                expected[1],
                expected[2],
                x.dims()
            )
        }
        self.layers
            .iter()
            .try_fold(x.clone(), |x, layer| layer.forward_t(&x, train))
    }
}
