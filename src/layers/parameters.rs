//! The learned parameters of a norm, from a `VarBuilder`.

use candle_core::{bail, DType, Result, Shape, Tensor};
use candle_nn::{Init, VarBuilder};

/// Weight (ones) and bias (zeros) as far as they are wanted, by these names or by `gamma` and `beta` if `vb` has
/// those.
pub(super) fn parameters(
    layer: &str,
    shape: &Shape,
    [weight, bias]: [bool; 2],
    vb: &VarBuilder,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    check_dtype(layer, vb)?;
    let get = |wanted: bool, name, other, init| {
        let name = match vb.contains_tensor(other) {
            true => other, // as older checkpoints of such layers have it
            false => name,
        };
        match wanted {
            true => vb
                .get_with_hints(shape.clone(), name, Init::Const(init))
                .map(Some),
            false => Ok(None),
        }
    };
    Ok((
        get(weight, "weight", "gamma", 1.0)?,
        get(bias, "bias", "beta", 0.0)?,
    ))
}

/// Checks that the variables of `vb` are something to compute with.
pub(super) fn check_dtype(layer: &str, vb: &VarBuilder) -> Result<()> {
    match vb.dtype() {
        DType::F32 | DType::F64 | DType::F16 | DType::BF16 => Ok(()),
        dtype => {
            bail!("{layer} expects a VarBuilder of dtype F32, F64, F16 or BF16, got {dtype:?}")
        }
    }
}

/// Checks that there are the layer's channels in dimension 1, if there is one.
pub(super) fn check_channels(layer: &str, channels: usize, x: &Tensor) -> Result<()> {
    if x.rank() >= 2 && x.dims()[1] != channels {
        bail!(
            "{layer} expects {channels} channels in dimension 1, got an input of shape {:?}",
            x.dims()
        )
    }
    Ok(())
}

/// A variable of running statistics: in half precision it would neither move by small steps nor hold a
/// variance above 65504.
pub(super) fn statistics(
    layer: &str,
    shape: impl Into<Shape>,
    name: &str,
    init: f64,
    vb: &VarBuilder,
) -> Result<Tensor> {
    let dtype = match vb.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let t = vb.get_with_hints_dtype(shape.into(), name, Init::Const(init), dtype)?;
    // A `VarMap` gives what it holds, whatever the dtype.
    match t.dtype() {
        DType::F32 | DType::F64 => Ok(t),
        held => bail!("{layer} expects a {name} of dtype F32 or F64, got {held:?}"),
    }
}
