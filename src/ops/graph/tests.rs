use super::sources::{lock, SOURCES};
use super::*;
use crate::ops::{batch_norm_train, linear, relu, BatchNormArgs};
use crate::shape::Order;
use candle_core::{bail, DType, Device, Var};

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
