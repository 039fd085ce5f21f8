//! Max pooling and its gradient against plain loops in `f64`.

mod common;

use candle_batch_norm::ops::{max_pool2d, relu};
use candle_core::{DType, Device, Result, Tensor, Var};
use common::{assert_close, assert_error, devices, random, tensor, values, var};

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// `y` and `dx` by the definition, for windows that are looked through row by row.
fn truth(x: &[f64], shape: [usize; 4], kernel: usize, dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let [n, c, h, w] = shape;
    let (oh, ow) = (h / kernel, w / kernel);
    let (mut y, mut dx) = (vec![], vec![0.0; x.len()]);
    for plane in 0..n * c {
        for window in 0..oh * ow {
            let (i, j) = (window / ow, window % ow);
            let pixels = (0..kernel * kernel).map(|at| {
                let (row, column) = (i * kernel + at / kernel, j * kernel + at % kernel);
                (plane * h + row) * w + column
            });
            let largest = pixels.reduce(|best, at| {
                let wins = x[at] > x[best] || x[at].is_nan();
                if wins {
                    at
                } else {
                    best
                }
            });
            let largest = largest.unwrap();
            dx[largest] = dy[y.len()];
            y.push(x[largest]);
        }
    }
    (y, dx)
}

fn pooled(x: &Var, kernel: usize, dy: &[f64]) -> Result<(Vec<f64>, Vec<f64>)> {
    let y = max_pool2d(x, kernel)?;
    let [_, _, h, w] = x.dims() else {
        panic!("rank")
    };
    assert_eq!(y.dims()[..2], x.dims()[..2]);
    assert_eq!(y.dims()[2..], [h / kernel, w / kernel]);
    assert_eq!(y.dtype(), x.dtype());
    let dy = tensor(dy, y.dims(), x.dtype(), x.device())?;
    let grads = (&y * &dy)?.sum_all()?.backward()?;
    Ok((values(&y)?, values(grads.get(x).unwrap())?))
}

/// Every width from one window to several registers, with and without a rest.
#[test]
fn all_sizes() -> Result<()> {
    let mut sizes: Vec<_> = (1..50).map(|w| (2 + w % 7, w)).collect();
    sizes.extend([
        (1, 9),
        (28, 28),
        (29, 31),
        (70, 9),
        (5, 64),
        (4, 65),
        (3, 97),
    ]);
    for (h, w) in sizes {
        for kernel in [1, 2, 3, 5] {
            if kernel > h.min(w) {
                continue;
            }
            for dtype in DTYPES {
                let shape = [2, 3, h, w];
                let x = var(&random(1, 6 * h * w, 0.0), &shape, dtype, &Device::Cpu)?;
                let dy = random(2, 6 * (h / kernel) * (w / kernel), 0.0);
                let dy = values(&tensor(&dy, &[dy.len()], dtype, &Device::Cpu)?)?;
                let expected = truth(&values(&x)?, shape, kernel, &dy);
                let what = format!("{shape:?} {kernel} {dtype:?}");
                assert_eq!(pooled(&x, kernel, &dy)?, expected, "{what}");
            }
        }
    }
    Ok(())
}

/// Enough values for several threads.
#[test]
fn large_batches() -> Result<()> {
    let shape = [8, 16, 28, 28];
    let count = shape.iter().product();
    let x = var(&random(1, count, 0.0), &shape, DType::F64, &Device::Cpu)?;
    let dy = random(2, count / 4, 0.0);
    let expected = truth(&values(&x)?, shape, 2, &dy);
    assert_eq!(pooled(&x, 2, &dy)?, expected);
    Ok(())
}

/// Small whole numbers: nearly every window has its maximum several times.
#[test]
fn the_first_of_several_maxima_gets_the_gradient() -> Result<()> {
    for kernel in [2, 3] {
        for w in [2 * kernel, 7 * kernel + 1, 40] {
            let shape = [1, 4, 3 * kernel, w];
            let count = shape.iter().product();
            let x: Vec<f64> = random(5, count, 0.0).iter().map(|v| v.round()).collect();
            let dy = random(6, 4 * 3 * (w / kernel), 0.0);
            for dtype in [DType::F32, DType::F64] {
                let x = var(&x, &shape, dtype, &Device::Cpu)?;
                let dy = values(&tensor(&dy, &[dy.len()], dtype, &Device::Cpu)?)?;
                assert_eq!(
                    pooled(&x, kernel, &dy)?,
                    truth(&values(&x)?, shape, kernel, &dy)
                );
            }
        }
    }
    Ok(())
}

/// Each place in a window, and pairs of places, in each window in turn, beside pixels in no window.
#[test]
fn a_nan_is_the_maximum() -> Result<()> {
    for kernel in [2, 3] {
        for (columns, rest) in [(1, 0), (5, 1), (8, 0), (17, 1)] {
            let (h, w) = (2 * kernel + 1, kernel * columns + rest);
            for places in 1..1usize << (kernel * kernel) {
                let mut x = random(3, h * w, 0.0);
                let window = places % (2 * columns);
                let first = (window / columns * w + window % columns) * kernel;
                for at in (0..kernel * kernel).filter(|at| places & (1 << at) != 0) {
                    x[first + at / kernel * w + at % kernel] = f64::NAN;
                }
                let dy: Vec<f64> = (0..2 * columns).map(|j| 1.0 + j as f64).collect();
                for dtype in [DType::F32, DType::BF16] {
                    let x = var(&x, &[1, 1, h, w], dtype, &Device::Cpu)?;
                    let (y, dx) = truth(&values(&x)?, [1, 1, h, w], kernel, &dy);
                    assert!(y[window].is_nan());
                    let (got_y, got_dx) = pooled(&x, kernel, &dy)?;
                    assert_eq!(got_dx, dx, "{kernel} {columns} {places:b} {dtype:?}");
                    for (got, y) in got_y.iter().zip(y) {
                        assert!(*got == y || got.is_nan() && y.is_nan());
                    }
                }
            }
        }
    }
    Ok(())
}

/// The models rely on it, in windows without a positive value too.
#[test]
fn before_or_behind_a_relu() -> Result<()> {
    let x: Vec<f64> = random(7, 480, -0.5).iter().map(|v| v.round()).collect();
    let x = var(&x, &[2, 3, 8, 10], DType::F32, &Device::Cpu)?;
    let [before, behind] = [max_pool2d(&relu(&x)?, 2)?, relu(&max_pool2d(&x, 2)?)?];
    assert_eq!(values(&before)?, values(&behind)?);
    let dx = |y: Tensor| values((y.sqr()? + &y)?.sum_all()?.backward()?.get(&x).unwrap());
    assert_eq!(dx(before)?, dx(behind)?);
    Ok(())
}

#[test]
fn infinities_are_values() -> Result<()> {
    let x = [f64::NEG_INFINITY, f64::NEG_INFINITY, 1.0, f64::INFINITY];
    let x = var(&x.repeat(2), &[1, 1, 2, 4], DType::F32, &Device::Cpu)?;
    let (y, dx) = pooled(&x, 2, &[3.0, 4.0])?;
    assert_eq!(y, [f64::NEG_INFINITY, f64::INFINITY]);
    assert_eq!(dx, [3.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0, 0.0]);
    Ok(())
}

#[test]
fn any_layout() -> Result<()> {
    let base = random(1, 2 * 3 * 6 * 8, 0.0);
    let x = var(&base, &[3, 2, 6, 8], DType::F64, &Device::Cpu)?;
    let view = x.transpose(0, 1)?.transpose(2, 3)?.narrow(2, 1, 6)?;
    let copy = Var::from_tensor(&view.contiguous()?)?;
    let y = max_pool2d(&view, 2)?;
    // A gradient that is not contiguous either.
    let grads = y.t()?.sqr()?.sum_all()?.backward()?;
    let copied = max_pool2d(&copy, 2)?;
    assert_eq!(values(&y)?, values(&copied)?);
    let expected = copied.sqr()?.sum_all()?.backward()?;
    let of_view = grads.get(&x).unwrap();
    let of_view = of_view.transpose(0, 1)?.transpose(2, 3)?.narrow(2, 1, 6)?;
    assert_eq!(values(&of_view)?, values(expected.get(&copy).unwrap())?);
    Ok(())
}

#[test]
fn an_empty_batch_stays_empty() -> Result<()> {
    for shape in [[0, 3, 4, 4], [2, 0, 4, 4]] {
        let x = Var::zeros(&shape, DType::F32, &Device::Cpu)?;
        let y = max_pool2d(&x, 2)?;
        assert_eq!(y.dims(), [shape[0], shape[1], 2, 2]);
        let grads = y.sum_all()?.backward()?;
        assert_eq!(grads.get(&x).unwrap().dims(), shape);
    }
    Ok(())
}

/// Where no window has its maximum twice, all devices agree.
#[test]
fn on_every_device() -> Result<()> {
    for device in devices() {
        for shape in [[2, 3, 8, 8], [2, 3, 7, 9]] {
            let count = shape.iter().product();
            let x = var(&random(8, count, 0.0), &shape, DType::F32, &device)?;
            let dy = random(9, 6 * (shape[2] / 2) * (shape[3] / 2), 0.0);
            let (y, dx) = truth(&values(&x)?, shape, 2, &dy);
            let (got_y, got_dx) = pooled(&x, 2, &dy)?;
            assert_eq!(got_y, y);
            assert_close("dx", &got_dx, &dx, 0.0, 1e-6);
        }
    }
    Ok(())
}

/// Why the models do not use candle's op: should this fail one day, they could.
#[test]
fn candle_s_gradient_is_too_small() -> Result<()> {
    let x = var(
        &[1.0, 2.0, 3.0, 4.0],
        &[1, 1, 2, 2],
        DType::F32,
        &Device::Cpu,
    )?;
    let dx = |y: Tensor| values(y.sum_all()?.backward()?.get(&x).unwrap());
    assert_eq!(dx(max_pool2d(&x, 2)?)?, [0.0, 0.0, 0.0, 1.0]);
    assert_eq!(dx(x.max_pool2d(2)?)?, [0.0, 0.0, 0.0, 0.25]);
    Ok(())
}

#[test]
fn wrong_arguments_get_an_error() -> Result<()> {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let x = zeros(&[2, 3, 4, 5], DType::F32)?;
    for kernel in [0, 5] {
        let got = format!("got {kernel}");
        assert_error(
            max_pool2d(&x, kernel),
            &["max_pool2d", "[2, 3, 4, 5]", &got],
        );
    }
    let flat = zeros(&[2, 3], DType::F32)?;
    assert_error(max_pool2d(&flat, 2), &["[n, c, h, w]", "got [2, 3]"]);
    let whole = zeros(&[2, 3, 4, 5], DType::U32)?;
    assert_error(max_pool2d(&whole, 2), &["F32, F64", "got U32"]);
    Ok(())
}
