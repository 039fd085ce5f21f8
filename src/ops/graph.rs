//! How ops stand in candle's graph on the CPU: so that gradients go from one to the next as they are.
//!
//! candle's `backward` makes zeros for every tensor that gets a gradient, and adds the gradient to them, with
//! one thread. Whatever an op returns, this is more work than most ops are. So candle has a *token*, a tensor of
//! one value, where a tensor goes from one op of this crate to another:
//!
//! ```text
//! what is computed:   x ────► y ────► y' ────► …
//! what candle sees:   x ──► token ──► token' ──► …
//!                             └─► y     └─► y'       (for candle's own ops)
//! ```
//!
//! An op makes two nodes. Its token hangs on the tokens of its arguments, or on an argument itself that is a
//! variable or comes from elsewhere; its output hangs on its token. On the way back, who has a gradient of `y`
//! leaves it with the op, and gives candle a one for the token. candle comes to the token after all of them; the
//! token's gradient is then how many they were.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread::ThreadId;

use candle_core::shape::ShapeWithOneHole;
use candle_core::{
    bail, CpuStorage, CustomOp1, CustomOp3, DType, Device, Layout, Result, Shape, Storage, Tensor,
    TensorId,
};

use super::keeps_graph::keeps_graph;

/// Applies an op to tensors on one device. Its gradients reach other ops that were applied so directly, on
/// the CPU; elsewhere, and where gradients have gradients, they go candle's way.
pub(super) fn apply<C>(args: [&Tensor; 3], op: C) -> Result<Tensor>
where
    C: CustomOp3 + Send + Sync + 'static,
{
    let [x, second, third] = args;
    let is_tracked = args.iter().any(|t| t.track_op());
    if !is_tracked || !x.device().is_cpu() || keeps_graph() {
        return x.apply_op3(second, third, op);
    }
    let node = Arc::new(Node {
        op: Box::new(op),
        args: args.map(Tensor::clone),
        sources: args.map(source_of),
        y: OnceLock::new(),
        known_as: Mutex::default(),
        gradients: Mutex::default(),
    });
    let stand_in = |i: usize| node.sources[i].as_ref().map_or(args[i], |s| &s.token);
    let token = stand_in(0).apply_op3(stand_in(1), stand_in(2), Token(node.clone()))?;
    let y = token.apply_op1(Output(node.clone()))?;
    node.y.get_or_init(|| y.detach());
    let source = Source {
        token,
        node: node.clone(),
        back: None,
    };
    register(y.id(), &node, source);
    Ok(y)
}

/// [`apply`] for an op of one argument.
pub(super) fn apply1<C>(x: &Tensor, op: C) -> Result<Tensor>
where
    C: CustomOp1 + Send + Sync + 'static,
{
    match x.device().is_cpu() {
        true => apply([x, x, x], Unary(op)),
        false => x.apply_op1(op),
    }
}

/// `view` is `y` in another shape or order, and `back` makes a gradient of `y` of one of `view`. Where `y` is the
/// output of an op, those of `view` reach it directly too.
pub(crate) fn view(
    y: &Tensor,
    view: Tensor,
    back: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Tensor {
    let Some(of_y) = source_of(y).filter(|_| view.id() != y.id()) else {
        return view;
    };
    let node = of_y.node.clone();
    let source = Source {
        token: of_y.token.clone(),
        node: node.clone(),
        back: Some(Arc::new(move |gradient: &Tensor| {
            of_y.gradient_of_output(back(gradient)?)
        })),
    };
    register(view.id(), &node, source);
    view
}

/// `x.contiguous()`
pub(crate) fn contiguous(x: &Tensor) -> Result<Tensor> {
    Ok(view(x, x.contiguous()?, |gradient| Ok(gradient.clone())))
}

/// `x.to_dtype(dtype)`
pub(super) fn to_dtype(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let own = x.dtype();
    let back = move |gradient: &Tensor| gradient.to_dtype(own);
    Ok(view(x, x.to_dtype(dtype)?, back))
}

/// `x.reshape(shape)`, through which gradients between ops of this crate go as they are.
///
/// On the way back candle's own has a tensor of zeros and a sum for the gradient. Here, as between any two
/// ops of this crate on the CPU, there is neither; elsewhere it is the same as candle's.
///
/// PyTorch: `x.reshape(shape)`.
///
/// # Errors
/// A shape with another number of values.
///
/// ```
/// use candle_batch_norm::ops::{linear, max_pool2d, reshape};
/// use candle_core::{DType, Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let images = Tensor::ones((5, 2, 6, 6), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((10, 18), DType::F32, &Device::Cpu)?;
/// let features = reshape(&max_pool2d(&images, 2)?, (5, ()))?;
/// assert_eq!(linear(&features, &weight, None)?.dims(), &[5, 10]);
/// # Ok(())
/// # }
/// ```
pub fn reshape(x: &Tensor, shape: impl ShapeWithOneHole) -> Result<Tensor> {
    let own = x.shape().clone();
    let back = move |gradient: &Tensor| gradient.reshape(&own);
    Ok(view(x, x.reshape(shape)?, back))
}

/// A scalar in whose graph the gradient of `y` is `dy`.
pub(super) fn seed(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    match source_of(y) {
        Some(source) => {
            let token = source.token.clone();
            token.apply_op1(Seed(source, dy.detach()))
        }
        None => (y * dy)?.sum_all(),
    }
}

/// The outputs that somebody still holds and their views, and where each comes from.
static SOURCES: LazyLock<RwLock<HashMap<TensorId, Source>>> = LazyLock::new(RwLock::default);

fn source_of(t: &Tensor) -> Option<Source> {
    let sources = SOURCES.read().unwrap_or_else(PoisonError::into_inner);
    sources.get(&t.id()).cloned()
}

fn register(id: TensorId, node: &Node, source: Source) {
    lock(&node.known_as).push(id);
    let mut sources = SOURCES.write().unwrap_or_else(PoisonError::into_inner);
    sources.insert(id, source);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Back = dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync;

/// Where an output, or a view of one, comes from.
#[derive(Clone)]
struct Source {
    token: Tensor,
    node: Arc<Node>,
    /// Of a view: makes its gradients those of the output.
    back: Option<Arc<Back>>,
}

impl Source {
    fn gradient_of_output(&self, gradient: Tensor) -> Result<Tensor> {
        match &self.back {
            Some(back) => back(&gradient),
            None => Ok(gradient),
        }
    }

    fn leave(&self, gradient: Tensor) -> Result<Tensor> {
        self.node.leave(self.gradient_of_output(gradient)?)
    }
}

/// An op that was applied.
struct Node {
    op: Box<dyn CustomOp3 + Send + Sync>,
    args: [Tensor; 3],
    /// Of those arguments that come from such an op.
    sources: [Option<Source>; 3],
    /// The output, as a constant.
    y: OnceLock<Tensor>,
    /// The output and its views.
    known_as: Mutex<Vec<TensorId>>,
    /// Those of the output that were left here, by the thread that goes back.
    gradients: Mutex<HashMap<ThreadId, Vec<Tensor>>>,
}

impl Node {
    /// Takes a gradient of the output; gives what is added to the token's gradient for it.
    fn leave(&self, gradient: Tensor) -> Result<Tensor> {
        let mut gradients = lock(&self.gradients);
        let here = gradients.entry(std::thread::current().id()).or_default();
        here.push(gradient);
        Tensor::new(1f32, &Device::Cpu)
    }

    /// The sum of the last `count` gradients. Any before them are of another way back: of one that this one
    /// is a part of, or that ended with an error.
    fn collect(&self, count: usize) -> Result<Option<Tensor>> {
        let mut gradients = lock(&self.gradients);
        let here = gradients.entry(std::thread::current().id()).or_default();
        let mut last = here.split_off(here.len().saturating_sub(count)).into_iter();
        drop(gradients);
        let Some(first) = last.next() else {
            return Ok(None);
        };
        last.try_fold(first, |sum, gradient| sum + gradient)
            .map(Some)
    }
}

/// The op as candle sees it from its arguments.
struct Token(Arc<Node>);

impl CustomOp3 for Token {
    fn name(&self) -> &'static str {
        self.0.op.name()
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Ok(value_of_a_token())
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        count: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let node = &self.0;
        let dy = node.collect(count.to_scalar::<f32>()? as usize)?;
        let (Some(y), Some(dy)) = (node.y.get(), dy) else {
            bail!("{}: nobody left a gradient of the output", node.op.name())
        };
        let [x, second, third] = &node.args;
        let (dx, dsecond, dthird) = node.op.bwd(x, second, third, y, &dy)?;
        let pass_on = |i: usize, gradient: Option<Tensor>| match (&node.sources[i], gradient) {
            (Some(source), Some(gradient)) => source.leave(gradient).map(Some),
            (_, gradient) => Ok(gradient),
        };
        Ok((pass_on(0, dx)?, pass_on(1, dsecond)?, pass_on(2, dthird)?))
    }
}

/// The op as candle's own ops see it.
struct Output(Arc<Node>);

impl CustomOp1 for Output {
    fn name(&self) -> &'static str {
        self.0.op.name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let Node { op, args, .. } = &*self.0;
        let guards = args.each_ref().map(Tensor::storage_and_layout);
        let [(s1, l1), (s2, l2), (s3, l3)] = &guards;
        match (&**s1, &**s2, &**s3) {
            (Storage::Cpu(s1), Storage::Cpu(s2), Storage::Cpu(s3)) => {
                op.cpu_fwd(s1, l1, s2, l2, s3, l3)
            }
            _ => bail!("{} expects all of its tensors on the CPU", op.name()),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        self.0.leave(dy.clone()).map(Some)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let ids = std::mem::take(&mut *lock(&self.0.known_as));
        let mut sources = SOURCES.write().unwrap_or_else(PoisonError::into_inner);
        let ended: Vec<_> = ids.iter().map(|id| sources.remove(id)).collect();
        // With them may end other outputs, which come here too.
        drop(sources);
        drop(ended);
    }
}

/// Where a way back begins with a given gradient.
struct Seed(Source, Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(value_of_a_token())
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        self.0.leave(self.1.clone()).map(Some)
    }
}

/// Nobody reads it.
fn value_of_a_token() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), ().into())
}

/// An op of one argument as one of three.
struct Unary<C>(C);

impl<C: CustomOp1> CustomOp3 for Unary<C> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.cpu_fwd(s1, l1)
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        _: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((self.0.bwd(x, y, dy)?, None, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{batch_norm_train, linear, relu, BatchNormArgs};
    use crate::shape::Order;
    use candle_core::Var;

    #[test]
    fn outputs_are_known_as_long_as_they_live() -> Result<()> {
        let x = Var::ones((2, 2), DType::F32, &Device::Cpu)?;
        let a = relu(&x)?;
        let b = linear(&a, &a, None)?;
        let (id, of_a) = (b.id(), a.id());
        let known = |id| {
            SOURCES
                .read()
                .is_ok_and(|sources| sources.contains_key(&id))
        };
        drop(a);
        assert!(known(id) && known(of_a)); // the graph of `b` has `a`
        let copy = b.clone();
        drop(b);
        assert!(known(id));
        drop(copy);
        assert!(!known(id) && !known(of_a));
        // Constants are not.
        assert!(!known(relu(&x.detach())?.id()));
        Ok(())
    }

    /// All that stands between two ops of a network here.
    #[test]
    fn views_are_known_too() -> Result<()> {
        let x = Var::ones((2, 3, 4, 4), DType::F32, &Device::Cpu)?;
        let is_known = |t: &Tensor| source_of(t).is_some();
        let y = relu(&x)?;
        assert!(is_known(&reshape(&reshape(&y, ((), 16))?, (2, ()))?));
        let last = x.permute((0, 2, 3, 1))?.contiguous()?;
        let y = batch_norm_train(&last.permute((0, 3, 1, 2))?, &BatchNormArgs::new())?.0;
        assert!(!y.is_contiguous() && is_known(&y));
        assert!(is_known(&Order::ChannelsLast.into_kernel(&y)?));
        let copy = contiguous(&y)?;
        assert!(copy.is_contiguous() && is_known(&copy));
        let half = Var::ones((2, 2), DType::BF16, &Device::Cpu)?;
        let y = linear(&half, &half, None)?;
        assert!(y.dtype() == DType::BF16 && is_known(&y));
        // What candle makes of them is not.
        assert!(!is_known(&y.t()?));
        Ok(())
    }

    #[test]
    fn what_an_error_leaves_goes_with_the_graph() -> Result<()> {
        let x = Var::ones((2, 2), DType::F32, &Device::Cpu)?;
        let y = relu(&x)?;
        let Some(source) = source_of(&y) else {
            bail!("not known")
        };
        let left = |value: f32| source.node.leave(Tensor::new(value, &Device::Cpu)?);
        left(1.0)?;
        left(2.0)?;
        left(4.0)?;
        let sum = |count| {
            source
                .node
                .collect(count)?
                .map(|t| t.to_scalar::<f32>())
                .transpose()
        };
        assert_eq!(sum(2)?, Some(6.0));
        assert_eq!(sum(1)?, Some(1.0));
        assert_eq!(sum(1)?, None);
        Ok(())
    }
}
