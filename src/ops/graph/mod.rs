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

mod node;
mod sources;
#[cfg(test)]
mod tests;
mod views;

use std::sync::{Arc, Mutex, OnceLock};

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};

use super::keeps_graph::keeps_graph;
use node::{value_of_a_token, Node, Output, Token};
use sources::{forget, register, source_of, Source};
pub use views::reshape;
pub(crate) use views::{contiguous, view, view_for_one};
pub(super) use views::{output_as, to_dtype};

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

/// A scalar in whose graph the gradient of `y` is `dy`, a constant unless gradients have gradients.
pub(super) fn seed(y: &Tensor, dy: &Tensor) -> Result<Tensor> {
    match source_of(y) {
        Some(source) => {
            let token = source.token.clone();
            token.apply_op1(Seed(source, dy.clone()))
        }
        None => (y * dy)?.sum_all(),
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
