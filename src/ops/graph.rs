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
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::thread::ThreadId;

use candle_core::op::BackpropOp;
use candle_core::shape::ShapeWithOneHole;
use candle_core::{
    bail, CpuStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor, TensorId,
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
    for (arg, source) in args.iter().zip(&node.sources) {
        if let Some(Source {
            is_for_one: true,
            node: of_arg,
            ..
        }) = source
        {
            forget(of_arg, arg.id());
        }
    }
    let stand_in = |i: usize| node.sources[i].as_ref().map_or(args[i], |s| &s.token);
    let token = match args.iter().all(|t| t.id() == x.id()) {
        true => stand_in(0).apply_op1(Token(node.clone()))?,
        false => stand_in(0).apply_op3(stand_in(1), stand_in(2), Token(node.clone()))?,
    };
    let y = token.apply_op1(Output(node.clone()))?;
    node.y.get_or_init(|| y.detach());
    let source = Source {
        token,
        node: node.clone(),
        back: None,
        is_for_one: false,
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
pub(crate) fn view(y: &Tensor, view: Tensor, back: impl Backwards) -> Tensor {
    registered(y, view, back, false)
}

/// A [`view`] of the argument of an op, for one that is about to be applied.
pub(crate) fn view_for_one(y: &Tensor, view: Tensor, back: impl Backwards) -> Tensor {
    registered(y, view, back, true)
}

fn registered(y: &Tensor, view: Tensor, back: impl Backwards, is_for_one: bool) -> Tensor {
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
        is_for_one,
    };
    register(view.id(), &node, source);
    view
}

/// `x.contiguous()`, for an op.
pub(crate) fn contiguous(x: &Tensor) -> Result<Tensor> {
    Ok(view_for_one(x, x.contiguous()?, |gradient| {
        Ok(gradient.clone())
    }))
}

/// `x.to_dtype(dtype)`, for an op.
pub(super) fn to_dtype(x: &Tensor, dtype: DType) -> Result<Tensor> {
    let own = x.dtype();
    let back = move |gradient: &Tensor| gradient.to_dtype(own);
    Ok(view_for_one(x, x.to_dtype(dtype)?, back))
}

/// `y.to_dtype(dtype)`, of the output of an op.
pub(super) fn output_as(y: &Tensor, dtype: DType) -> Result<Tensor> {
    let own = y.dtype();
    let back = move |gradient: &Tensor| gradient.to_dtype(own);
    Ok(view(y, y.to_dtype(dtype)?, back))
}

/// `x.reshape(shape)`, through which gradients between ops of this crate go as they are.
///
/// On the way back candle's own has a tensor of zeros and a sum for the gradient. Here, as between any two
/// ops of this crate on the CPU, there is neither; elsewhere it is the same as candle's. (What is kept for
/// this, a few words, goes when `x` goes.)
///
/// PyTorch: `x.reshape(shape)`.
///
/// # Errors
/// A shape with another number of values, or with a hole beside a 0.
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

fn forget(node: &Node, id: TensorId) {
    lock(&node.known_as).retain(|&known| known != id);
    let mut sources = SOURCES.write().unwrap_or_else(PoisonError::into_inner);
    let source = sources.remove(&id);
    // With it may end an output, which comes here too.
    drop(sources);
    drop(source);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a gradient of a tensor of one of its view.
pub(crate) trait Backwards: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static {}
impl<F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static> Backwards for F {}

/// Where an output, or a view of one, comes from.
#[derive(Clone)]
struct Source {
    token: Tensor,
    node: Arc<Node>,
    /// Of a view: makes its gradients those of the output.
    back: Option<Arc<dyn Backwards>>,
    /// The next op is the only one to see it.
    is_for_one: bool,
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
    /// Those of the output that were left here, by the thread that goes back; candle has what they live by.
    gradients: Mutex<HashMap<ThreadId, Vec<Weak<Tensor>>>>,
}

impl Node {
    /// Takes a gradient of the output; gives what is added to the token's gradient for it.
    ///
    /// The gradient lives as long as that: if the way back ends with an error, or never comes here, it goes with
    /// all others.
    fn leave(&self, gradient: Tensor) -> Result<Tensor> {
        let gradient = Arc::new(gradient);
        let mut gradients = lock(&self.gradients);
        let here = gradients.entry(std::thread::current().id()).or_default();
        here.retain(|gradient| gradient.strong_count() > 0);
        here.push(Arc::downgrade(&gradient));
        TRACKED.apply_op1(One(gradient))
    }

    /// The sum of the last `count` gradients. Those before them are of a way back that this one is a part of.
    fn collect(&self, count: usize) -> Result<Tensor> {
        let thread = std::thread::current().id();
        let mut gradients = lock(&self.gradients);
        let here = gradients.entry(thread).or_default();
        let mut alive: Vec<_> = here.iter().filter_map(Weak::upgrade).collect();
        let last = alive.split_off(alive.len().saturating_sub(count));
        *here = alive.iter().map(Arc::downgrade).collect();
        if here.is_empty() {
            gradients.remove(&thread);
        }
        drop(gradients);
        let found = last.len();
        let mut last = last.into_iter();
        match last.next() {
            Some(first) if found == count => {
                last.try_fold((*first).clone(), |sum, gradient| sum + gradient.as_ref())
            }
            _ => bail!(
                "{}: expected {count} gradients of the output, found {found}",
                self.op.name()
            ),
        }
    }
}

/// What candle keeps the graph of, so that the op of [`One`] stays.
static TRACKED: LazyLock<Tensor> = LazyLock::new(|| {
    let (storage, shape) = value_of_a_token();
    Tensor::from_storage(Storage::Cpu(storage), shape, BackpropOp::none(), true)
});

/// A one that a gradient lives by.
struct One(#[expect(dead_code)] Arc<Tensor>);

impl CustomOp1 for One {
    fn name(&self) -> &'static str {
        "one"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![1.0]), ().into()))
    }
}

/// The op as candle sees it from its arguments.
struct Token(Arc<Node>);

impl Token {
    fn gradients(&self, count: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let node = &self.0;
        let dy = node.collect(count.to_scalar::<f32>()? as usize)?;
        let Some(y) = node.y.get() else {
            bail!("{}: there is no output yet", node.op.name())
        };
        let [x, second, third] = &node.args;
        let (dx, dsecond, dthird) = node.op.bwd(x, second, third, y, &dy)?;
        let pass_on = |i: usize, gradient: Option<Tensor>| match (&node.sources[i], gradient) {
            (Some(source), Some(gradient)) => source.leave(gradient).map(Some),
            (_, gradient) => Ok(gradient),
        };
        Ok([pass_on(0, dx)?, pass_on(1, dsecond)?, pass_on(2, dthird)?])
    }
}

/// Of an op of one tensor.
impl CustomOp1 for Token {
    fn name(&self) -> &'static str {
        self.0.op.name()
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok(value_of_a_token())
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, count: &Tensor) -> Result<Option<Tensor>> {
        let mut gradients = self.gradients(count)?.into_iter().flatten();
        let first = gradients.next();
        gradients.try_fold(first, |sum, gradient| {
            sum.map(|sum| sum + gradient).transpose()
        })
    }
}

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
        let [dx, dsecond, dthird] = self.gradients(count)?;
        Ok((dx, dsecond, dthird))
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
        // A tensor that stands for several arguments is locked once: if another thread waits to write to
        // it, a second lock of this one would wait for that.
        let guards = [0, 1, 2].map(|i| {
            let is_new = args[..i].iter().all(|arg| arg.id() != args[i].id());
            is_new.then(|| args[i].storage_and_layout())
        });
        let arg = |i: usize| -> Result<(&CpuStorage, &Layout)> {
            let same = args.iter().position(|arg| arg.id() == args[i].id());
            match guards[same.unwrap_or(i)].as_ref().map(|(s, l)| (&**s, *l)) {
                Some((Storage::Cpu(storage), layout)) => Ok((storage, layout)),
                _ => bail!("{} expects all of its tensors on the CPU", op.name()),
            }
        };
        let [(s1, l1), (s2, l2), (s3, l3)] = [arg(0)?, arg(1)?, arg(2)?];
        op.cpu_fwd(s1, l1, s2, l2, s3, l3)
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
    use candle_core::{Device, Var};

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
    fn gradients_end_with_what_candle_has_of_them() -> Result<()> {
        let x = Var::ones((2, 2), DType::F32, &Device::Cpu)?;
        let y = relu(&x)?;
        let Some(Source { node, .. }) = source_of(&y) else {
            bail!("not known")
        };
        let left = |value: f32| node.leave(Tensor::new(value, &Device::Cpu)?);
        let sum = |count| node.collect(count)?.to_scalar::<f32>();
        let (outer, ended, a, b) = (left(1.0)?, left(2.0)?, left(4.0)?, left(8.0)?);
        // As candle adds it up; an error in between ends all of it.
        let ended = (ended.zeros_like()? + ended)?;
        drop(ended);
        assert_eq!(sum(2)?, 12.0);
        drop((a, b));
        assert_eq!(sum(1)?, 1.0);
        assert!(lock(&node.gradients).is_empty());
        drop(outer);
        assert!(sum(1).is_err());
        Ok(())
    }

    /// Not even as long as the tensor that they are views of.
    #[test]
    fn what_an_op_made_of_its_argument_is_forgotten() -> Result<()> {
        let x = Var::ones((2, 3, 4, 4), DType::F32, &Device::Cpu)?;
        let last = x.permute((0, 2, 3, 1))?.contiguous()?;
        let y = batch_norm_train(&last.permute((0, 3, 1, 2))?, &BatchNormArgs::new())?.0;
        let Some(Source { node, .. }) = source_of(&y) else {
            bail!("not known")
        };
        let known = || lock(&node.known_as).len();
        let before = known();
        batch_norm_train(&y, &BatchNormArgs::new())?;
        relu(&y)?;
        assert_eq!(known(), before);
        Ok(())
    }
}
