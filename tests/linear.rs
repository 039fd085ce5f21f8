//! The linear op against plain loops in `f64`, over shapes, layouts, dtypes and what is tracked.

mod common;

use candle_batch_norm::layers;
use candle_batch_norm::ops::linear;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use common::{assert_close, assert_error, devices, random, rounding, tensor, values, var};

/// The closed forms, by plain loops: `y`, `dx`, `dweight`, `dbias`.
fn truth(sizes: [usize; 3], x: &[f64], weight: &[f64], bias: &[f64], dy: &[f64]) -> [Vec<f64>; 4] {
    let [n, inputs, outputs] = sizes;
    let mut y = vec![0.0; n * outputs];
    let (mut dx, mut dweight) = (vec![0.0; n * inputs], vec![0.0; outputs * inputs]);
    let mut dbias = vec![0.0; outputs];
    for n in 0..n {
        for o in 0..outputs {
            let g = dy[n * outputs + o];
            y[n * outputs + o] = bias[o];
            dbias[o] += g;
            for i in 0..inputs {
                y[n * outputs + o] += weight[o * inputs + i] * x[n * inputs + i];
                dx[n * inputs + i] += g * weight[o * inputs + i];
                dweight[o * inputs + i] += g * x[n * inputs + i];
            }
        }
    }
    [y, dx, dweight, dbias]
}

#[test]
fn sizes_and_dtypes_match_plain_loops() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            for sizes in [
                [1, 1, 1],
                [3, 5, 2],
                [64, 31, 33],
                [7, 130, 65],
                [257, 17, 10],
                [300, 64, 129],
            ] {
                let [n, inputs, outputs] = sizes;
                let held = |seed, count| -> Result<Vec<f64>> {
                    values(&tensor(
                        &random(seed, count, 0.0),
                        &[count],
                        dtype,
                        &device,
                    )?)
                };
                let (x, weight) = (held(1, n * inputs)?, held(2, outputs * inputs)?);
                let (bias, dy) = (held(3, outputs)?, held(4, n * outputs)?);
                let [y, dx, dweight, dbias] = truth(sizes, &x, &weight, &bias, &dy);

                let vars = [
                    var(&x, &[n, inputs], dtype, &device)?,
                    var(&weight, &[outputs, inputs], dtype, &device)?,
                    var(&bias, &[outputs], dtype, &device)?,
                ];
                let got = linear(&vars[0], &vars[1], Some(&vars[2]))?;
                let dy = tensor(&dy, &[n, outputs], dtype, &device)?;
                // The product with `dy` is rounded to the dtype in its own backward pass.
                let grads = (&got * &dy)?.sum_all()?.backward()?;
                let what = format!("{dtype:?} {sizes:?}");
                let close = |name: &str, got: &Tensor, expected: &[f64], depth: usize| {
                    let absolute = rounding(dtype) * 4.0 * (depth as f64).sqrt();
                    let (got, what) = (values(got)?, format!("{what} {name}"));
                    assert_close(&what, &got, expected, absolute, rounding(dtype) * 4.0);
                    Ok::<_, candle_core::Error>(())
                };
                close("y", &got, &y, inputs)?;
                close("dx", grads.get(&vars[0]).unwrap(), &dx, outputs)?;
                close("dweight", grads.get(&vars[1]).unwrap(), &dweight, n)?;
                close("dbias", grads.get(&vars[2]).unwrap(), &dbias, n)?;
            }
        }
    }
    Ok(())
}

#[test]
fn leading_dimensions_and_layouts_do_not_matter() -> Result<()> {
    for device in devices() {
        let x = tensor(&random(5, 2 * 3 * 4, 0.0), &[2, 4, 3], DType::F64, &device)?;
        let x = x.transpose(1, 2)?;
        let weight = tensor(&random(6, 4 * 5, 0.0), &[4, 5], DType::F64, &device)?.t()?;
        let y = linear(&x, &weight, None)?;
        assert_eq!(y.dims(), [2, 3, 5]);
        let expected = x
            .contiguous()?
            .reshape((6, 4))?
            .matmul(&weight.t()?.contiguous()?)?;
        assert_close("y", &values(&y)?, &values(&expected)?, 1e-12, 1e-12);
    }
    Ok(())
}

#[test]
fn only_tracked_arguments_get_gradients_and_twice_the_same() -> Result<()> {
    for device in devices() {
        let x = tensor(&random(7, 300 * 90, 0.0), &[300, 90], DType::F32, &device)?;
        let weight = var(&random(8, 80 * 90, 0.0), &[80, 90], DType::F32, &device)?;
        let y = linear(&x, &weight, None)?;
        let (first, second) = (y.backward()?, y.backward()?);
        assert!(first.get(&x).is_none());
        assert_eq!(
            values(first.get(&weight).unwrap())?,
            values(second.get(&weight).unwrap())?
        );
        let x = var(&random(7, 300 * 90, 0.0), &[300, 90], DType::F32, &device)?;
        let grads = linear(&x, &weight.detach(), None)?.backward()?;
        assert!(grads.get(&x).is_some() && grads.get(&weight).is_none());
    }
    Ok(())
}

#[test]
fn empty_inputs_are_fine() -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let bias = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
    let y = linear(&zeros(&[0, 3])?, &zeros(&[2, 3])?, Some(&bias))?;
    assert_eq!(y.dims(), [0, 2]);
    // A sum over nothing is 0.
    let y = linear(&zeros(&[2, 0])?, &zeros(&[2, 0])?, Some(&bias))?;
    assert_eq!(y.to_vec2::<f32>()?, [[1.0, 2.0], [1.0, 2.0]]);
    for [n, inputs, outputs] in [[0, 300, 300], [2, 0, 300], [2, 300, 0]] {
        let zeros = |shape: &[usize]| Var::zeros(shape, DType::F32, &Device::Cpu);
        let (x, weight) = (zeros(&[n, inputs])?, zeros(&[outputs, inputs])?);
        let bias = zeros(&[outputs])?;
        let grads = linear(&x, &weight, Some(&bias))?.backward()?;
        for var in [&x, &weight, &bias] {
            let grad = grads.get(var).expect("a gradient");
            assert_eq!(grad.dims(), var.dims());
        }
        let dbias = values(grads.get(&bias).expect("a gradient"))?;
        assert!(dbias.iter().all(|&dbias| dbias == n as f64));
    }
    Ok(())
}

#[test]
fn bad_arguments_get_errors_that_name_them() -> Result<()> {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let (x, weight) = (zeros(&[4, 3], DType::F32)?, zeros(&[2, 3], DType::F32)?);
    let wrong = zeros(&[2, 4], DType::F32)?;
    assert_error(linear(&x, &wrong, None), &["4 values", "[2, 4]", "[4, 3]"]);
    let wrong = zeros(&[3], DType::F32)?;
    assert_error(linear(&x, &wrong, None), &["[out, in]", "[3]"]);
    assert_error(linear(&x, &weight, Some(&wrong)), &["a bias", "[2]", "[3]"]);
    let wrong = zeros(&[2, 3], DType::F64)?;
    assert_error(linear(&x, &wrong, None), &["a weight", "F32", "F64"]);
    let wrong = zeros(&[4, 3], DType::U32)?;
    assert_error(linear(&wrong, &weight, None), &["dtype", "U32"]);
    Ok(())
}

#[test]
fn the_layer_has_the_variables_of_candle_nn() -> Result<()> {
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let ours = layers::linear(6, 4, vb.pp("fc"))?;
    let theirs = candle_nn::linear(6, 4, vb.pp("fc"))?;
    let x = tensor(&random(9, 5 * 6, 0.0), &[5, 6], DType::F32, &Device::Cpu)?;
    let expected = values(&theirs.forward(&x)?)?;
    assert_close("y", &values(&ours.forward(&x)?)?, &expected, 1e-6, 1e-6);
    let back = candle_nn::Linear::from(layers::Linear::from(theirs));
    assert_close(
        "converted",
        &values(&back.forward(&x)?)?,
        &expected,
        1e-6,
        1e-6,
    );
    assert!(layers::linear_no_bias(6, 4, vb.pp("other"))?
        .bias()
        .is_none());
    assert_eq!(vars.all_vars().len(), 3);
    Ok(())
}
