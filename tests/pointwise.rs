//! The rectifier and the cross entropy against their formulas in `f64`.

mod common;

use candle_batch_norm::ops::{cross_entropy, relu};
use candle_core::{DType, Device, Result, Tensor, Var};
use common::{assert_close, assert_error, devices, random, rounding, tensor, values, var};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

fn grad(y: &Tensor, dy: &Tensor, x: &Var) -> Result<Vec<f64>> {
    let grads = (y * dy)?.sum_all()?.backward()?;
    values(grads.get(x).unwrap())
}

#[test]
fn relu_of_any_size() -> Result<()> {
    for device in devices() {
        // One task and several, with and without a rest.
        for count in [0, 1, 7, 64, 8191, 8193, 100_000] {
            for dtype in DTYPES {
                let x = var(&random(1, count, 0.0), &[count], dtype, &device)?;
                let dy = tensor(&random(2, count, 0.0), &[count], dtype, &device)?;
                let y = relu(&x)?;
                assert_eq!((y.dtype(), y.dims()), (dtype, x.dims()));
                let (x_values, dy_values) = (values(&x)?, values(&dy)?);
                let expected: Vec<_> = x_values.iter().map(|v| v.max(0.0)).collect();
                assert_eq!(values(&y)?, expected, "{count} {dtype:?}");
                let pairs = x_values.iter().zip(dy_values);
                let expected: Vec<_> = pairs
                    .map(|(&x, dy)| if x > 0.0 { dy } else { 0.0 })
                    .collect();
                assert_eq!(grad(&y, &dy, &x)?, expected, "{count} {dtype:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn relu_at_zero_nan_and_infinity() -> Result<()> {
    let x = [0.0, -0.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    for dtype in DTYPES {
        let x = var(&x, &[5], dtype, &Device::Cpu)?;
        let y = relu(&x)?;
        let dy = tensor(&[1.0, 2.0, 3.0, 4.0, 5.0], &[5], dtype, &Device::Cpu)?;
        assert_eq!(grad(&y, &dy, &x)?, [0.0, 0.0, 3.0, 4.0, 0.0]);
        let y = values(&y)?;
        assert!(y[2].is_nan());
        assert_eq!([y[0], y[1], y[3], y[4]], [0.0, 0.0, f64::INFINITY, 0.0]);
    }
    Ok(())
}

#[test]
fn relu_of_any_layout() -> Result<()> {
    let x = var(&random(4, 60, 0.0), &[3, 4, 5], DType::F64, &Device::Cpu)?;
    let view = x.transpose(0, 2)?.narrow(1, 1, 2)?;
    let y = relu(&view)?;
    assert_eq!(values(&y)?, values(&view.relu()?)?);
    // A gradient that is not contiguous either.
    let ours = y.t()?.sqr()?.sum_all()?.backward()?;
    let theirs = view.relu()?.sqr()?.sum_all()?.backward()?;
    let [ours, theirs] = [ours, theirs].map(|grads| values(grads.get(&x).unwrap()));
    assert_eq!(ours?, theirs?);
    Ok(())
}

#[test]
fn relu_wants_floats() -> Result<()> {
    let x = Tensor::zeros(3, DType::U8, &Device::Cpu)?;
    assert_error(relu(&x), &["relu", "F32, F64", "got U8"]);
    Ok(())
}

fn labels(n: usize, classes: usize, device: &Device) -> Result<Tensor> {
    let labels: Vec<u32> = (0..n).map(|i| (i * 7 % classes) as u32).collect();
    Tensor::from_vec(labels, n, device)
}

/// Loss and gradient by the definition.
fn truth(logits: &[f64], labels: &Tensor, classes: usize) -> Result<(f64, Vec<f64>)> {
    let labels = labels.to_vec1::<u32>()?;
    let (mut loss, mut dlogits) = (0.0, vec![]);
    for (row, label) in logits.chunks(classes).zip(&labels) {
        let sum: f64 = row.iter().map(|v| v.exp()).sum();
        for (j, v) in row.iter().enumerate() {
            let right = j == *label as usize;
            dlogits.push((v.exp() / sum - f64::from(u8::from(right))) / labels.len() as f64);
            if right {
                loss -= (v.exp() / sum).ln() / labels.len() as f64;
            }
        }
    }
    Ok((loss, dlogits))
}

#[test]
fn cross_entropy_of_any_size() -> Result<()> {
    for device in devices() {
        for (n, classes) in [(1, 1), (1, 2), (3, 10), (64, 10), (1000, 10), (65, 777)] {
            for dtype in DTYPES {
                let logits = random(1, n * classes, 0.5);
                let logits = var(&logits, &[n, classes], dtype, &device)?;
                let labels = labels(n, classes, &device)?;
                let loss = cross_entropy(&logits, &labels)?;
                assert_eq!((loss.dtype(), loss.rank()), (dtype, 0));
                let (expected, dlogits) = truth(&values(&logits)?, &labels, classes)?;
                // Composed of candle's ops, each of which rounds.
                let rounding = rounding(dtype) * if device.is_cpu() { 1.0 } else { 10.0 };
                let what = format!("{n} {classes} {dtype:?}");
                assert_close(&what, &values(&loss)?, &[expected], rounding, rounding);
                // Scaled, so that the gradient of the loss is not 1.
                let grads = (loss * 4.0)?.backward()?;
                let got = values(grads.get(&logits).unwrap())?;
                let expected: Vec<_> = dlogits.iter().map(|v| v * 4.0).collect();
                // F16 has no relative precision left for the smallest.
                assert_close(&what, &got, &expected, 1e-7 * 4.0, rounding);
            }
        }
    }
    Ok(())
}

#[test]
fn cross_entropy_by_finite_differences() -> Result<()> {
    let (n, classes, step) = (4, 5, 1e-5);
    let start = random(3, n * classes, 0.0);
    let labels = labels(n, classes, &Device::Cpu)?;
    let loss = |logits: &[f64]| -> Result<f64> {
        let logits = tensor(logits, &[n, classes], DType::F64, &Device::Cpu)?;
        cross_entropy(&logits, &labels)?.to_scalar()
    };
    let logits = var(&start, &[n, classes], DType::F64, &Device::Cpu)?;
    let grads = cross_entropy(&logits, &labels)?.backward()?;
    let got = values(grads.get(&logits).unwrap())?;
    for (i, got) in got.iter().enumerate() {
        let (mut less, mut more) = (start.clone(), start.clone());
        less[i] -= step;
        more[i] += step;
        let expected = (loss(&more)? - loss(&less)?) / (2.0 * step);
        assert!((got - expected).abs() < 1e-8, "{i}: {got}, {expected}");
    }
    Ok(())
}

#[test]
fn cross_entropy_of_extreme_logits() -> Result<()> {
    let infinity = f64::INFINITY;
    for (row, label, loss, dlogits) in [
        ([1e30, 0.0, -1e30], 0, 0.0, [0.0, 0.0, 0.0]),
        (
            [1000.0, 0.0, 1000.0],
            1,
            1000.0 + 2f64.ln(),
            [0.5, -1.0, 0.5],
        ),
        ([0.0, -infinity, 0.0], 2, 2f64.ln(), [0.5, 0.0, -0.5]),
        ([0.0, -infinity, 0.0], 1, infinity, [0.5, -1.0, 0.5]),
    ] {
        let logits = var(&row, &[1, 3], DType::F32, &Device::Cpu)?;
        let label = Tensor::new(&[label as u32], &Device::Cpu)?;
        let got = cross_entropy(&logits, &label)?;
        let grads = got.backward()?;
        let got = values(&got)?[0];
        assert!(got == loss || (got - loss).abs() < 1e-4, "{row:?}: {got}");
        let got = values(grads.get(&logits).unwrap())?;
        assert_close(&format!("{row:?}"), &got, &dlogits, 1e-7, 0.0);
    }
    let logits = tensor(&[0.0, f64::NAN], &[1, 2], DType::F32, &Device::Cpu)?;
    let label = Tensor::new(&[0u32], &Device::Cpu)?;
    assert!(values(&cross_entropy(&logits, &label)?)?[0].is_nan());
    Ok(())
}

#[test]
fn cross_entropy_of_any_layout_and_of_nothing() -> Result<()> {
    let x = var(&random(6, 80, 0.0), &[10, 8], DType::F64, &Device::Cpu)?;
    let view = x.t()?.narrow(0, 1, 6)?;
    let all = labels(12, 10, &Device::Cpu)?;
    let every_second = all.reshape((6, 2))?.narrow(1, 1, 1)?.squeeze(1)?;
    let ours = cross_entropy(&view, &every_second)?;
    let theirs = candle_nn::loss::cross_entropy(&view, &every_second.contiguous()?)?;
    assert_close("loss", &values(&ours)?, &values(&theirs)?, 1e-12, 1e-12);
    let [ours, theirs] =
        [ours, theirs].map(|loss| -> Result<_> { values(loss.backward()?.get(&x).unwrap()) });
    assert_close("dx", &ours?, &theirs?, 1e-12, 1e-12);

    let nothing = Var::zeros((0, 3), DType::F32, &Device::Cpu)?;
    let loss = cross_entropy(&nothing, &labels(0, 3, &Device::Cpu)?)?;
    assert!(values(&loss)?[0].is_nan());
    assert_eq!(loss.backward()?.get(&nothing).unwrap().dims(), [0, 3]);
    Ok(())
}

#[test]
fn cross_entropy_says_what_is_wrong() -> Result<()> {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let logits = zeros(&[2, 3], DType::F32)?;
    let of = |labels: &[u32]| cross_entropy(&logits, &Tensor::new(labels, &Device::Cpu)?);
    assert_error(of(&[2, 3]), &["below", "classes, 3, got 3 in row 1"]);
    assert_error(of(&[0]), &["as many labels as rows", "[2, 3] and [1]"]);
    let labels = zeros(&[2], DType::U32)?;
    for (logits, labels, parts) in [
        (
            zeros(&[2], DType::F32)?,
            &labels,
            ["[n, classes]", "[2] and [2]"],
        ),
        (
            zeros(&[2, 0], DType::F32)?,
            &labels,
            ["1 class", "[2, 0] and [2]"],
        ),
        (
            zeros(&[2, 3], DType::I64)?,
            &labels,
            ["F32, F64", "I64 and U32"],
        ),
        (
            logits.clone(),
            &zeros(&[2], DType::I64)?,
            ["U32", "F32 and I64"],
        ),
    ] {
        assert_error(cross_entropy(&logits, labels), &parts);
    }
    Ok(())
}
