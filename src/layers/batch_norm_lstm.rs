//! An LSTM with batch norm.

use candle_core::{bail, DType, Device, ModuleT, Result, Tensor};
use candle_nn::ops::sigmoid;
use candle_nn::rnn::RNN;
use candle_nn::{Init, VarBuilder};

use super::{batch_norm_steps, BatchNormConfig, BatchNormSteps, Freeze, InitialValues};
use crate::ops::{linear, Activation};

/// An LSTM whose products and cell are normalised over the batch at each step.
///
/// For `x[t]: [n, in]`, with `h[-1]` and `c[-1]` of the initial state, and each norm a [`BatchNormSteps`]:
///
/// ```text
/// i, f, g, o = bn_ih(W_ih·x[t]) + bn_hh(W_hh·h[t-1]) + b_ih + b_hh
/// c[t] = σ(f)·c[t-1] + σ(i)·tanh(g)
/// h[t] = σ(o)·tanh(bn_c(c[t]))
/// ```
///
/// `bn_ih` and `bn_hh` have no bias, for there is one. All weights of the norms begin as 0.1: with 1, the gates
/// would be where tanh and σ are flat, and gradients would vanish. Without norms this is `torch.nn.LSTM` and
/// `candle_nn::LSTM` of one layer, whose variables have the same names and shapes.
///
/// Where nearly all sequences of a batch begin alike, with black rows or padding, the first statistics are those
/// of a few: they differ from batch to batch, evaluation from training, and `1 / √(var + eps)` is large in the
/// gradient of each step. A first hidden state of small random numbers instead of zeros helps, as in the example
/// `mnist_rows`.
///
/// As an [`RNN`] of candle-nn's it evaluates, with the running statistics; [`seq_t`](Self::seq_t) and
/// [`step_t`](Self::step_t) train too. Dtypes are those of [`linear`].
///
/// Built by [`batch_norm_lstm`]. Source: Cooijmans et al. 2016, <https://arxiv.org/abs/1603.09025>.
#[derive(Debug, Clone)]
pub struct BatchNormLstm {
    hidden: usize,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    norms: Option<Norms>,
    dtype: DType,
    device: Device,
}

#[derive(Debug, Clone)]
struct Norms {
    ih: BatchNormSteps,
    hh: BatchNormSteps,
    c: BatchNormSteps,
}

/// The options of [`batch_norm_lstm`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchNormLstmConfig {
    /// How many steps have running statistics of their own; those behind use the last one's.
    pub steps: usize,
    /// The options of the three norms. Without it there are none.
    pub norm: Option<BatchNormConfig>,
}

impl BatchNormLstmConfig {
    /// With norms whose weights begin as 0.1, and otherwise the defaults of [`BatchNormConfig`].
    pub fn new(steps: usize) -> Self {
        let init = InitialValues {
            weight: 0.1,
            ..Default::default()
        };
        Self {
            steps,
            norm: Some(BatchNormConfig {
                init,
                ..Default::default()
            }),
        }
    }

    /// The usual LSTM.
    pub fn without_norm() -> Self {
        Self {
            steps: 0,
            norm: None,
        }
    }
}

/// What an LSTM hands on from step to step.
#[derive(Debug, Clone)]
pub struct BatchNormLstmState {
    /// The hidden state, which is the output: `[n, hidden]`.
    pub h: Tensor,
    /// The cell, `[n, hidden]`.
    pub c: Tensor,
    /// Steps so far.
    pub step: usize,
}

/// Builds an LSTM with its variables from `vb`.
///
/// They are PyTorch's: `weight_ih_l0` `[4·hidden, inputs]`, `weight_hh_l0` `[4·hidden, hidden]`, `bias_ih_l0` and
/// `bias_hh_l0` `[4·hidden]`, for the gates i, f, g, o, new ones uniform in ±1/√hidden; and those of
/// [`batch_norm_steps`] under `bn_ih`, `bn_hh` and `bn_c`.
///
/// # Errors
/// Those of `batch_norm_steps`; norms with an activation or a `max_pool`; no hidden values.
///
/// ```
/// use candle_batch_norm::layers::{batch_norm_lstm, BatchNormLstmConfig};
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::rnn::RNN;
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
/// let lstm = batch_norm_lstm(28, 64, BatchNormLstmConfig::new(28), vb.pp("lstm"))?;
/// let x = Tensor::randn(0f32, 1.0, (16, 28, 28), &Device::Cpu)?; // [n, steps, inputs]
/// let states = lstm.seq_t(&x, &lstm.zero_state(16)?, true)?;
/// assert_eq!(states[27].h.dims(), &[16, 64]);
/// assert_eq!(lstm.states_to_tensor(&lstm.seq(&x)?)?.dims(), &[16, 28, 64]);
/// # Ok(())
/// # }
/// ```
pub fn batch_norm_lstm(
    inputs: usize,
    hidden: usize,
    config: BatchNormLstmConfig,
    vb: VarBuilder,
) -> Result<BatchNormLstm> {
    if hidden == 0 {
        bail!("batch norm LSTM expects at least one hidden value, got 0")
    }
    let bound = 1.0 / (hidden as f64).sqrt();
    let init = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    let norms = match config.norm {
        None => None,
        Some(norm) => {
            if norm.activation != Activation::Identity || norm.max_pool.is_some() {
                bail!("batch norm LSTM expects norms without activation and max_pool, got {norm:?}")
            }
            let without_bias = BatchNormConfig {
                bias: false,
                ..norm
            };
            Some(Norms {
                ih: batch_norm_steps(4 * hidden, config.steps, without_bias, vb.pp("bn_ih"))?,
                hh: batch_norm_steps(4 * hidden, config.steps, without_bias, vb.pp("bn_hh"))?,
                c: batch_norm_steps(hidden, config.steps, norm, vb.pp("bn_c"))?,
            })
        }
    };
    Ok(BatchNormLstm {
        hidden,
        weight_ih: vb.get_with_hints((4 * hidden, inputs), "weight_ih_l0", init)?,
        weight_hh: vb.get_with_hints((4 * hidden, hidden), "weight_hh_l0", init)?,
        bias_ih: vb.get_with_hints(4 * hidden, "bias_ih_l0", init)?,
        bias_hh: vb.get_with_hints(4 * hidden, "bias_hh_l0", init)?,
        norms,
        dtype: vb.dtype(),
        device: vb.device().clone(),
    })
}

impl BatchNormLstm {
    /// One step of the sequences whose state is given, on `x: [n, inputs]`.
    ///
    /// # Errors
    /// Tensors of another shape, dtype or device; in training a batch of one sequence, or those of
    /// [`BatchNorm`](super::BatchNorm).
    pub fn step_t(
        &self,
        x: &Tensor,
        state: &BatchNormLstmState,
        train: bool,
    ) -> Result<BatchNormLstmState> {
        let BatchNormLstmState { h, c, step } = state;
        let bias = (&self.bias_ih + &self.bias_hh)?;
        let gates = match &self.norms {
            None => (linear(x, &self.weight_ih, Some(&bias))? + linear(h, &self.weight_hh, None)?)?,
            Some(norms) => {
                let (x, h) = (
                    linear(x, &self.weight_ih, None)?,
                    linear(h, &self.weight_hh, None)?,
                );
                let x = norms
                    .ih
                    .at(*step)
                    .forward_t(&x, train)?
                    .broadcast_add(&bias)?;
                norms.hh.at(*step).forward_residual_t(&h, &x, train)?
            }
        };
        let gate = |index| gates.narrow(1, index * self.hidden, self.hidden);
        let (i, f, g, o) = (gate(0)?, gate(1)?, gate(2)?, gate(3)?);
        let c = ((sigmoid(&f)? * c)? + (sigmoid(&i)? * g.tanh()?)?)?;
        let cell = match &self.norms {
            None => c.clone(),
            Some(norms) => norms.c.at(*step).forward_t(&c, train)?,
        };
        Ok(BatchNormLstmState {
            h: (sigmoid(&o)? * cell.tanh()?)?,
            c,
            step: step + 1,
        })
    }

    /// The states after each step of `x: [n, steps, inputs]`, from the state that is given.
    ///
    /// # Errors
    /// Those of [`step_t`](Self::step_t).
    pub fn seq_t(
        &self,
        x: &Tensor,
        state: &BatchNormLstmState,
        train: bool,
    ) -> Result<Vec<BatchNormLstmState>> {
        let steps = x.dims3()?.1;
        let mut states: Vec<BatchNormLstmState> = Vec::with_capacity(steps);
        for step in 0..steps {
            let x = x.narrow(1, step, 1)?.squeeze(1)?;
            let next = self.step_t(&x, states.last().unwrap_or(state), train)?;
            states.push(next);
        }
        Ok(states)
    }

    /// [`BatchNorm::set_freeze`](super::BatchNorm::set_freeze) for all norms.
    ///
    /// # Errors
    /// Norms without running statistics have nothing to keep.
    pub fn set_freeze(&mut self, freeze: Freeze) -> Result<()> {
        let norms = self.norms.iter_mut();
        norms
            .flat_map(|norms| [&mut norms.ih, &mut norms.hh, &mut norms.c])
            .try_for_each(|norm| norm.set_freeze(freeze))
    }
}

/// Evaluation.
impl RNN for BatchNormLstm {
    type State = BatchNormLstmState;

    fn zero_state(&self, batch_dim: usize) -> Result<Self::State> {
        let zeros = Tensor::zeros((batch_dim, self.hidden), self.dtype, &self.device)?;
        Ok(BatchNormLstmState {
            h: zeros.clone(),
            c: zeros,
            step: 0,
        })
    }

    fn step(&self, input: &Tensor, state: &Self::State) -> Result<Self::State> {
        self.step_t(input, state, false)
    }

    fn states_to_tensor(&self, states: &[Self::State]) -> Result<Tensor> {
        let outputs: Vec<&Tensor> = states.iter().map(|state| &state.h).collect();
        Tensor::stack(&outputs, 1)
    }
}
