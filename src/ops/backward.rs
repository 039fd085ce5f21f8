//! The way back through a graph, past the sums that candle makes of single gradients.

use std::cell::RefCell;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

thread_local! {
    /// The gradients of variables that this crate's ops have found, while [`backward`] runs.
    static FOUND: RefCell<Option<Vec<Found>>> = const { RefCell::new(None) };
}

struct Found {
    variable: Tensor,
    gradient: Tensor,
}

/// `loss.backward()` in less time: the same gradients of the same tensors.
///
/// candle's own makes zeros for every tensor that gets a gradient and adds the gradient to them. Here
/// what an op of this crate finds for a variable (a weight, a bias, an input that is a `Var`) is taken
/// as it is, and only summed up if there is more than one. All other gradients go candle's way, and so
/// do variables through other ops: any graph will do.
///
/// PyTorch: `loss.backward()`, which keeps the first gradient as well.
///
/// # Errors
/// Those of candle's `backward`.
///
/// ```
/// use candle_batch_norm::{backward, batch_norm};
/// use candle_core::{DType, Device, ModuleT, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
///
/// # fn main() -> candle_core::Result<()> {
/// let vars = VarMap::new();
/// let bn = batch_norm(3, 1e-5, VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu))?;
/// let x = Tensor::randn(0f32, 1.0, (8, 3, 4, 4), &Device::Cpu)?;
/// let loss = bn.forward_t(&x, true)?.sqr()?.mean_all()?;
/// let grads = backward(&loss)?; // was: loss.backward()?
/// assert_eq!(grads.get(bn.weight().unwrap()).unwrap().dims(), &[3]);
/// # Ok(())
/// # }
/// ```
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let search = Search::begin();
    let mut grads = loss.backward()?;
    for Found { variable, gradient } in search.end() {
        let sum = match grads.remove(&variable) {
            Some(other) => (other + gradient)?,
            None => gradient,
        };
        grads.insert(&variable, sum);
    }
    Ok(grads)
}

/// What an op gives to candle as the gradient of its argument: nothing, if [`backward`] takes it.
pub(super) fn gradient_of(argument: &Tensor, gradient: Option<Tensor>) -> Option<Tensor> {
    let gradient = gradient?;
    if !argument.is_variable() {
        return Some(gradient);
    }
    FOUND.with_borrow_mut(|found| match found {
        None => Some(gradient),
        Some(found) => {
            found.push(Found {
                variable: argument.clone(),
                gradient,
            });
            None
        }
    })
}

/// While it lives, gradients are collected. It ends with an error or a panic in between, too.
struct Search {
    /// That of a `backward` which this one runs in.
    outer: Option<Vec<Found>>,
}

impl Search {
    fn begin() -> Self {
        Self {
            outer: FOUND.replace(Some(Vec::new())),
        }
    }

    fn end(self) -> Vec<Found> {
        FOUND.take().unwrap_or_default()
    }
}

impl Drop for Search {
    fn drop(&mut self) {
        FOUND.set(self.outer.take());
    }
}
