//! Which tensors come from ops of this crate.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, RwLock};

use candle_core::{Result, Tensor, TensorId};

use super::node::Node;

/// The outputs that somebody still holds and their views, and where each comes from.
pub(super) static SOURCES: LazyLock<RwLock<HashMap<TensorId, Source>>> =
    LazyLock::new(RwLock::default);

pub(super) fn source_of(t: &Tensor) -> Option<Source> {
    let sources = SOURCES.read().unwrap_or_else(PoisonError::into_inner);
    sources.get(&t.id()).cloned()
}

pub(super) fn register(id: TensorId, node: &Node, source: Source) {
    lock(&node.known_as).push(id);
    let mut sources = SOURCES.write().unwrap_or_else(PoisonError::into_inner);
    sources.insert(id, source);
}

/// Of a node's output and views: that one.
pub(super) fn forget(node: &Node, id: TensorId) {
    lock(&node.known_as).retain(|&known| known != id);
    remove(&[id]);
}

/// Of a node: its output and all views.
pub(super) fn forget_all(node: &Node) {
    let ids = std::mem::take(&mut *lock(&node.known_as));
    remove(&ids);
}

fn remove(ids: &[TensorId]) {
    let mut sources = SOURCES.write().unwrap_or_else(PoisonError::into_inner);
    let ended: Vec<_> = ids.iter().map(|id| sources.remove(id)).collect();
    // With them may end other outputs, which come here too.
    drop(sources);
    drop(ended);
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a gradient of a tensor of one of its view.
pub(crate) trait Backwards: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static {}
impl<F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static> Backwards for F {}

/// Where an output, or a view of one, comes from.
#[derive(Clone)]
pub(super) struct Source {
    pub token: Tensor,
    pub node: Arc<Node>,
    /// Of a view: makes its gradients those of the output.
    pub back: Option<Arc<dyn Backwards>>,
    /// The next op is the only one to see it.
    pub is_for_one: bool,
}

impl Source {
    pub fn gradient_of_output(&self, gradient: Tensor) -> Result<Tensor> {
        match &self.back {
            Some(back) => back(&gradient),
            None => Ok(gradient),
        }
    }

    pub fn leave(&self, gradient: Tensor) -> Result<Tensor> {
        self.node.leave(self.gradient_of_output(gradient)?)
    }
}
