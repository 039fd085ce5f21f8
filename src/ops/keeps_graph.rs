//! Whether gradients are tensors with a graph of their own, which can be differentiated again.

use candle_core::Tensor;

thread_local! {
    /// As candle reads it: once for each thread.
    static KEEPS_GRAPH: bool = std::env::var("CANDLE_GRAD_DO_NOT_DETACH")
        .is_ok_and(|value| !value.is_empty() && value != "0");
}

/// Whether candle's `backward` keeps the graph of gradients on this thread. The ops then compose theirs of
/// candle's differentiable ones, in the place of fused passes whose results are constants.
pub(crate) fn keeps_graph() -> bool {
    KEEPS_GRAPH.with(|&keeps| keeps)
}

/// A tensor as gradients are computed from it: a constant, unless they are differentiated again.
pub(crate) fn for_gradients(t: &Tensor) -> Tensor {
    match keeps_graph() {
        true => t.clone(),
        false => t.detach(),
    }
}
