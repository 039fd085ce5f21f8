//! The two nodes of an op, and what happens there on the way back.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, Weak};
use std::thread::ThreadId;

use candle_core::op::BackpropOp;
use candle_core::{
    bail, CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Storage, Tensor, TensorId,
};

use super::sources::{forget_all, lock, Source};

/// An op that was applied.
pub(super) struct Node {
    pub op: Box<dyn CustomOp3 + Send + Sync>,
    pub args: [Tensor; 3],
    /// Of those arguments that come from such an op.
    pub sources: [Option<Source>; 3],
    /// The output, as a constant.
    pub y: OnceLock<Tensor>,
    /// The output and its views.
    pub known_as: Mutex<Vec<TensorId>>,
    /// Those of the output that were left here, by the thread that goes back; candle has what they live by.
    pub gradients: Mutex<HashMap<ThreadId, Vec<Weak<Tensor>>>>,
}

impl Node {
    /// Takes a gradient of the output; gives what is added to the token's gradient for it.
    ///
    /// The gradient lives as long as that: if the way back ends with an error, or never comes here, it goes with
    /// all others.
    pub fn leave(&self, gradient: Tensor) -> Result<Tensor> {
        let gradient = Arc::new(gradient);
        let mut gradients = lock(&self.gradients);
        let here = gradients.entry(std::thread::current().id()).or_default();
        here.retain(|gradient| gradient.strong_count() > 0);
        here.push(Arc::downgrade(&gradient));
        TRACKED.apply_op1(One(gradient))
    }

    /// The sum of the last `count` gradients. Those before them are of a way back that this one is a part of.
    pub fn collect(&self, count: usize) -> Result<Tensor> {
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
pub(super) struct Token(pub Arc<Node>);

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
pub(super) struct Output(pub Arc<Node>);

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
        forget_all(&self.0);
    }
}

/// Nobody reads it.
pub(super) fn value_of_a_token() -> (CpuStorage, Shape) {
    (CpuStorage::F32(vec![0.0]), ().into())
}
