//! The way back through a graph, past the sums that candle makes of single gradients.

use std::cell::RefCell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId};

use super::graph::seed;
use super::keeps_graph::for_gradients;
use crate::shape::check_like;

/// The variables of a graph, and the gradient of each as far as this crate's ops have found it.
type Search = HashMap<TensorId, (Tensor, Option<Tensor>)>;

thread_local! {
    /// What [`backward`] looks for while it runs.
    static SEARCH: RefCell<Option<Search>> = const { RefCell::new(None) };
}

/// `loss.backward()` in less time: the same gradients of the same tensors.
///
/// candle's own makes zeros for every tensor that gets a gradient and adds the gradient to them. Here
/// what an op of this crate finds for a variable (a weight, a bias, an input that is a `Var`) is taken
/// as it is, and only summed up if there is more than one. That is worth while for large weights and
/// inputs, and in half precision. Gradients of variables through candle's ops go candle's way. (Those of
/// tensors between two ops of this crate do not on the CPU, with candle's `backward` as little as with this one.)
/// A sum of three gradients or more may be rounded in another order.
///
/// A custom op whose `bwd` goes back through a graph of its own should call this there too: candle's
/// `backward` within this one has no gradients of variables that both graphs share.
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
    let (grads, found) = searching(loss, || loss.backward());
    let mut grads = grads?;
    for (variable, gradient) in found.into_values() {
        let Some(gradient) = gradient else { continue };
        let sum = match grads.remove(&variable) {
            Some(other) => (other + gradient)?,
            None => gradient,
        };
        grads.insert(&variable, sum);
    }
    Ok(grads)
}

/// [`backward`] of a tensor of any shape, with its gradient given.
///
/// The gradients are those of `Σ y·dy`. `dy` is a constant, unless
/// [gradients are to have gradients](crate::ops#gradients-of-gradients). (`y.backward()` is this with ones.)
///
/// PyTorch: `y.backward(dy)`.
///
/// # Errors
/// `dy` of another shape, dtype or device than `y`, and those of [`backward`].
///
/// ```
/// use candle_batch_norm::ops::{backward_from, relu};
/// use candle_core::{Device, Var};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Var::new(&[-1f32, 2.0], &Device::Cpu)?;
/// let dy = candle_core::Tensor::new(&[3f32, 4.0], &Device::Cpu)?;
/// let grads = backward_from(&relu(&x)?, &dy)?;
/// assert_eq!(grads.get(&x).unwrap().to_vec1::<f32>()?, [0.0, 4.0]);
/// # Ok(())
/// # }
/// ```
pub fn backward_from(y: &Tensor, dy: &Tensor) -> Result<GradStore> {
    check_like("backward_from", "a gradient", dy, "the output", y)?;
    backward(&seed(y, &for_gradients(dy))?)
}

/// Runs `f` while the ops look for the gradients of the variables that `loss` comes from.
fn searching<R>(loss: &Tensor, f: impl FnOnce() -> R) -> (R, Search) {
    /// Puts the search back that this one interrupts, after a panic too.
    struct Outer(Option<Search>);

    impl Drop for Outer {
        fn drop(&mut self) {
            SEARCH.set(self.0.take());
        }
    }

    let nodes = loss.sorted_nodes().into_iter();
    let variables = nodes.filter(|node| node.is_variable());
    let search = variables.map(|variable| (variable.id(), (variable.clone(), None)));
    let _outer = Outer(SEARCH.replace(Some(search.collect())));
    let result = f();
    (result, SEARCH.take().unwrap_or_default())
}

/// What an op gives to candle as the gradient of its argument: nothing, if [`backward`] takes it.
pub(super) fn gradient_of(argument: &Tensor, gradient: Option<Tensor>) -> Result<Option<Tensor>> {
    let Some(gradient) = gradient else {
        return Ok(None);
    };
    SEARCH.with_borrow_mut(|search| {
        let found = search
            .as_mut()
            .and_then(|search| search.get_mut(&argument.id()));
        let Some((_, found)) = found else {
            return Ok(Some(gradient));
        };
        *found = Some(match found.take() {
            None => gradient,
            Some(other) => (other + gradient)?,
        });
        Ok(None)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::*;
    use candle_core::{DType, Device, Var};

    /// How many variables' gradients the ops of a graph hand over.
    fn handed_over(loss: &Tensor) -> Result<usize> {
        let (grads, found) = searching(loss, || loss.backward());
        grads?;
        Ok(found.values().filter(|(_, found)| found.is_some()).count())
    }

    #[test]
    fn every_op_hands_over_all_of_its_variables() -> Result<()> {
        let device = &Device::Cpu;
        let var = |shape: &[usize]| Var::randn(0f32, 1.0, shape, device);
        let (images, matrix, c3, c5) = (var(&[2, 3, 8, 8])?, var(&[4, 3])?, var(&[3])?, var(&[5])?);
        assert_eq!(handed_over(&relu(&matrix)?)?, 1);
        assert_eq!(handed_over(&max_pool2d(&images, 2)?)?, 1);
        let labels = Tensor::new(&[0u32, 2, 1, 1], device)?;
        assert_eq!(handed_over(&cross_entropy(&matrix, &labels)?)?, 1);
        let weight = var(&[5, 3])?;
        assert_eq!(handed_over(&linear(&matrix, &weight, Some(&c5))?)?, 3);
        let weight = var(&[5, 3, 3, 3])?;
        let config = candle_nn::Conv2dConfig::default();
        assert_eq!(
            handed_over(&conv2d(&images, &weight, Some(&c5), &config)?)?,
            3
        );
        let (weight, residual) = (var(&[3])?, var(&[2, 3, 8, 8])?);
        let args = BatchNormArgs {
            weight: Some(&weight),
            bias: Some(&c3),
            activation: Activation::Relu,
            ..BatchNormArgs::new()
        };
        assert_eq!(handed_over(&batch_norm_train(&images, &args)?.0)?, 3);
        // With a residual, weight and bias reach the op as one tensor.
        let args = BatchNormArgs {
            residual: Some(&residual),
            ..args
        };
        assert_eq!(handed_over(&batch_norm_train(&images, &args)?.0)?, 2);
        let (weight, bias) = (var(&[3, 8, 8])?, var(&[3, 8, 8])?);
        let args = RowNormArgs {
            weight: Some(&weight),
            bias: Some(&bias),
            ..RowNormArgs::new()
        };
        assert_eq!(handed_over(&layer_norm(&images, (3, 8, 8), &args)?)?, 3);
        assert_eq!(handed_over(&images.to_dtype(DType::F64)?.sqr()?)?, 0);
        Ok(())
    }
}
