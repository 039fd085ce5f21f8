//! Gradients through graphs in which this crate's ops and candle's own stand side by side, against graphs of
//! candle's ops alone.

mod common;

use candle_batch_norm::ops::{
    self, batch_norm_train, batch_norm_vjp, group_norm, max_pool2d, Activation, BatchNormArgs,
    RowNormArgs,
};
use candle_batch_norm::{backward, backward_from};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, D};
use common::{
    assert_close, assert_error, devices, identity_with, random, refuses, rounding, values, var,
};

/// The ops of a graph.
#[derive(Clone, Copy)]
struct Ops {
    linear: fn(&Tensor, &Tensor) -> Result<Tensor>,
    relu: fn(&Tensor) -> Result<Tensor>,
    layer_norm: fn(&Tensor) -> Result<Tensor>,
}

const OURS: Ops = Ops {
    linear: |x, weight| ops::linear(x, weight, None),
    relu: ops::relu,
    layer_norm: |x| ops::layer_norm(x, x.dim(D::Minus1)?, &RowNormArgs::new()),
};

const CANDLES: Ops = Ops {
    linear: |x, weight| x.matmul(&weight.t()?),
    relu: Tensor::relu,
    layer_norm: |x| {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
        centred.broadcast_div(&(var + 1e-5)?.sqrt()?)
    },
};

/// An input `[6, 8]` and three weights `[8, 8]`.
fn variables(dtype: DType, device: &Device) -> Result<[Var; 4]> {
    let get = |seed: u64, rows: usize| {
        let values = random(seed, rows * 8, 0.0);
        var(&values, &[rows, 8], dtype, device)
    };
    Ok([get(1, 6)?, get(2, 8)?, get(3, 8)?, get(4, 8)?])
}

#[track_caller]
fn assert_gradients(got: &GradStore, expected: &GradStore, vars: &[Var]) -> Result<()> {
    for (i, var) in vars.iter().enumerate() {
        let of = |grads: &GradStore| values(grads.get(var).expect("a gradient"));
        let (got, expected) = (of(got)?, of(expected)?);
        let scale = expected.iter().fold(0f64, |max, v| max.max(v.abs()));
        let bound = 20.0 * rounding(var.dtype()) * scale;
        assert_close(&format!("variable {i}"), &got, &expected, bound, 0.0);
    }
    Ok(())
}

/// A tensor that goes to several ops, of this crate and of candle, more than once to the same, and to
/// none that leads to the loss.
#[test]
fn a_tensor_with_many_uses() -> Result<()> {
    let network = |ops: Ops, [x, w1, w2, w3]: &[Var; 4]| -> Result<Tensor> {
        let h = (ops.linear)(x, w1)?;
        let a = (ops.relu)(&h)?;
        let unused = (ops.relu)(&a)?;
        let b = (ops.linear)(&a, w2)?;
        let residual = (&b + &h)?; // candle's
        let c = (ops.layer_norm)(&residual)?;
        let square = (ops.linear)(&c, &c)?; // c·cᵀ: both arguments are one tensor
        let d = (ops.linear)(&(ops.relu)(&c)?, w3)?;
        let parts = [
            d.narrow(1, 2, 3)?.sqr()?.sum_all()?,
            (ops.layer_norm)(&h.tanh()?)?.mul(&a)?.sum_all()?,
            square.sum_all()?,
            (ops.relu)(&b)?.sum_all()?,
        ];
        drop(unused);
        parts
            .iter()
            .skip(1)
            .try_fold(parts[0].clone(), |sum, part| sum + part)
    };
    for device in &devices() {
        for dtype in [DType::F64, DType::F32] {
            let vars = variables(dtype, device)?;
            let expected = network(CANDLES, &vars)?.backward()?;
            let loss = network(OURS, &vars)?;
            assert_gradients(&loss.backward()?, &expected, &vars)?;
            assert_gradients(&backward(&loss)?, &expected, &vars)?;
            // Once more through the same graph, which is still there.
            assert_gradients(&backward(&loss)?, &expected, &vars)?;
        }
    }
    Ok(())
}

/// `batch_norm` takes the residual from the tensor that it normalises.
#[test]
fn one_tensor_for_two_arguments() -> Result<()> {
    for device in &devices() {
        let shape = [5, 3, 4, 4];
        let x = var(&random(1, 240, 0.0), &shape, DType::F64, device)?;
        let w = var(&random(2, 3, 1.0), &[3], DType::F64, device)?;
        let network = |h: &Tensor, two: &Tensor| {
            let args = BatchNormArgs {
                weight: Some(&w),
                bias: Some(&w),
                residual: Some(two),
                activation: Activation::Relu,
                ..BatchNormArgs::new()
            };
            max_pool2d(&batch_norm_train(h, &args)?.0, 2)?
                .sqr()?
                .sum_all()
        };
        let h = group_norm(&x, 3, &RowNormArgs::new())?;
        let direct = network(&h, &h)?;
        // By candle's addition, nothing goes from op to op.
        let apart = network(&(&h + 0.0)?, &(&h + 0.0)?)?;
        assert_gradients(
            &backward(&direct)?,
            &apart.backward()?,
            &[x.clone(), w.clone()],
        )?;
    }
    Ok(())
}

/// Other shapes, other orders in memory, copies and dtypes between ops.
#[test]
fn views() -> Result<()> {
    /// `x·1`, through which gradients go candle's way.
    const APART: fn(&Tensor) -> Result<Tensor> = |x| x.affine(1.0, 0.0);
    const DIRECT: fn(&Tensor) -> Result<Tensor> = |x| Ok(x.clone());
    for device in &devices() {
        for dtype in [DType::F64, DType::F32, DType::BF16] {
            // Images with their channels last in memory.
            let last = var(&random(1, 240, 0.0), &[3, 4, 5, 4], dtype, device)?;
            let kernel = var(&random(2, 144, 0.0), &[4, 4, 3, 3], dtype, device)?;
            let weight = var(&random(3, 112, 0.0), &[7, 16], dtype, device)?;
            let dy = var(&random(4, 21, 0.0), &[3, 7], dtype, device)?;
            let config = candle_nn::Conv2dConfig {
                padding: 1,
                ..Default::default()
            };
            let network = |between: fn(&Tensor) -> Result<Tensor>| -> Result<GradStore> {
                let args = BatchNormArgs {
                    activation: Activation::Relu,
                    ..BatchNormArgs::new()
                };
                let h = last.permute((0, 3, 1, 2))?;
                let h = between(&batch_norm_train(&h, &args)?.0)?;
                let h = between(&group_norm(&h, 2, &RowNormArgs::new())?)?;
                let h = between(&ops::conv2d(&h, &kernel, None, &config)?)?;
                let h = between(&max_pool2d(&h, 2)?)?;
                let h = between(&ops::reshape(&h, (3, 16))?)?;
                backward_from(&between(&ops::linear(&h, &weight, None)?)?, &dy)
            };
            let vars = [last.clone(), kernel.clone(), weight.clone()];
            assert_gradients(&network(DIRECT)?, &network(APART)?, &vars)?;
        }
    }
    Ok(())
}

/// What a way back left before it ended is no part of the next one.
#[test]
fn after_an_error() -> Result<()> {
    let vars = variables(DType::F64, &Device::Cpu)?;
    let [x, w1, w2, _] = &vars;
    let h = ops::linear(x, w1, None)?;
    let (a, b) = (ops::relu(&h)?, ops::layer_norm(&h, 8, &RowNormArgs::new())?);
    let refused = refuses(&b)?.sum_all()?;
    // Whichever comes first, one order has left the gradient of `h` when the error comes.
    for failing in [(a.sum_all()? + &refused)?, (&refused + a.sum_all()?)?] {
        assert_error(backward(&failing), &["refused"]);
        assert_error(failing.backward(), &["refused"]);
    }
    let expected = CANDLES;
    let expected_h = (expected.linear)(x, w1)?;
    let expected_loss = (expected.linear)(&(expected.relu)(&expected_h)?, w2)?.sum_all()?;
    let loss = ops::linear(&a, w2, None)?.sum_all()?;
    let some = [x.clone(), w1.clone(), w2.clone()];
    assert_gradients(&backward(&loss)?, &expected_loss.backward()?, &some)
}

/// Two threads that go back through one graph have nothing to do with each other.
#[test]
fn from_several_threads() -> Result<()> {
    let vars = variables(DType::F64, &Device::Cpu)?;
    let network = |ops: Ops| -> Result<Tensor> {
        let mut h = (ops.linear)(&vars[0], &vars[1])?;
        for _ in 0..20 {
            h = (ops.layer_norm)(&((ops.relu)(&h)? + &h)?)?;
            h = (ops.linear)(&(ops.relu)(&h)?, &vars[2])?;
        }
        (ops.linear)(&h, &vars[3])?.sqr()?.sum_all()
    };
    let (loss, expected) = (network(OURS)?, network(CANDLES)?.backward()?);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    (0..25).try_for_each(|_| assert_gradients(&loss.backward()?, &expected, &vars))
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no panic"))
    })
}

/// A way back within another one, through ops where that one has left gradients.
#[test]
fn one_within_another() -> Result<()> {
    let vars = variables(DType::F64, &Device::Cpu)?;
    let [x, w1, ..] = &vars;
    let network = |ops: Ops, swapped: bool| -> Result<Tensor> {
        let h = (ops.linear)(x, w1)?;
        let inner = (ops.relu)(&h)?.sqr()?.sum_all()?;
        let a = (ops.relu)(&h)?.sum_all()?;
        let of = x.clone();
        let goes_back = identity_with(&h, move |_, dy| {
            let grads = inner.backward()?;
            let norm = grads.get(&of).expect("a gradient").sqr()?.sum_all()?;
            dy.broadcast_mul(&norm).map(Some)
        })?;
        let b = (ops.relu)(&goes_back)?.sum_all()?;
        match swapped {
            true => a + b,
            false => b + a,
        }
    };
    for swapped in [false, true] {
        let expected = network(CANDLES, swapped)?.backward()?;
        let got = network(OURS, swapped)?.backward()?;
        assert_gradients(&got, &expected, &[x.clone(), w1.clone()])?;
    }
    Ok(())
}

/// A way back within another one that is given up on an error leaves nothing in that, whatever has left its
/// gradients before.
#[test]
fn an_error_in_one_within_another() -> Result<()> {
    let vars = variables(DType::F64, &Device::Cpu)?;
    let [x, w1, ..] = &vars;
    let network = |ops: Ops, order: usize| -> Result<Tensor> {
        let h = (ops.linear)(x, w1)?;
        let first = (ops.relu)(&h)?.sqr()?.sum_all()?;
        let refused = refuses(&(ops.relu)(&h)?)?.sum_all()?;
        let inner = match order % 2 {
            0 => (&first + &refused)?,
            _ => (&refused + &first)?,
        };
        let a = (ops.relu)(&h)?.sum_all()?;
        let tries = identity_with(&h, move |_, dy| {
            assert_error(inner.backward(), &["refused"]);
            Ok(Some(dy.clone()))
        })?;
        let b = (ops.layer_norm)(&tries)?.sqr()?.sum_all()?;
        let c = (ops.relu)(&(ops.layer_norm)(&h)?)?.sum_all()?;
        match order / 2 {
            0 => (a + b)? + c,
            1 => (b + c)? + a,
            _ => (c + b)? + a,
        }
    };
    for order in 0..6 {
        let expected = network(CANDLES, order)?.backward()?;
        let got = network(OURS, order)?.backward()?;
        assert_gradients(&got, &expected, &[x.clone(), w1.clone()])?;
    }
    Ok(())
}

/// An op's output as weight; outputs that nobody holds any more; a network deeper than most.
#[test]
fn shapes_of_graphs() -> Result<()> {
    let vars = variables(DType::F64, &Device::Cpu)?;
    let [x, w1, w2, _] = &vars;
    let network = |ops: Ops| -> Result<Tensor> {
        let weight = (ops.relu)(&(ops.linear)(w1, w2)?)?;
        let mut h = (ops.linear)(x, &weight)?;
        for _ in 0..100 {
            h = ((ops.relu)(&h)? + &h)?; // candle's, so that no gradient vanishes
            h = (ops.layer_norm)(&h)?;
        }
        h.sqr()?.narrow(1, 0, 3)?.sum_all()
    };
    let expected = network(CANDLES)?.backward()?;
    let some = [x.clone(), w1.clone(), w2.clone()];
    assert_gradients(&network(OURS)?.backward()?, &expected, &some)
}

/// As deep as candle's own graphs can be on the small stack of a test.
#[test]
fn a_deep_graph() -> Result<()> {
    let x = Var::new(&[-1f64, 2.0], &Device::Cpu)?;
    let mut y = ops::relu(&x)?;
    for _ in 0..5000 {
        y = ops::relu(&y)?;
    }
    let grads = y.sum_all()?.backward()?;
    assert_eq!(values(grads.get(&x).expect("a gradient"))?, [0.0, 1.0]);
    Ok(())
}

/// From an op's output, from candle's, from a variable, in all dtypes.
#[test]
fn a_given_gradient() -> Result<()> {
    for device in &devices() {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let x = var(&random(1, 120, 0.0), &[5, 3, 8], dtype, device)?;
            let dy = var(&random(2, 120, 0.0), &[5, 3, 8], dtype, device)?;
            let args = BatchNormArgs::new();
            let y = batch_norm_train(&x, &args)?.0;
            let grads = backward_from(&y, &dy)?;
            let expected = batch_norm_vjp(&x, &args)?.2.gradients(&dy)?.dx;
            let dx = grads.get(&x).expect("a gradient");
            assert_eq!(values(dx)?, values(&expected)?, "{dtype:?}");
            assert!(grads.get(&dy).is_none());

            let grads = backward_from(&(y * 2.0)?, &dy)?;
            let (got, doubled) = (grads.get(&x).expect("a gradient"), (expected * 2.0)?);
            let bound = 4.0 * rounding(dtype);
            assert_close("doubled", &values(got)?, &values(&doubled)?, bound, bound);

            let grads = backward_from(&x, &dy)?;
            assert_eq!(values(grads.get(&x).expect("a gradient"))?, values(&dy)?);
        }
    }
    Ok(())
}

#[test]
fn a_given_gradient_that_does_not_fit() -> Result<()> {
    let x = Var::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let y = ops::relu(&x)?;
    let wrong = Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?;
    assert_error(backward_from(&y, &wrong), &["[2, 3]", "[3, 2]"]);
    let wrong = Tensor::zeros((2, 3), DType::F64, &Device::Cpu)?;
    assert_error(backward_from(&y, &wrong), &["F32", "F64"]);
    Ok(())
}
