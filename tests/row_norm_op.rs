//! The row norms against their closed forms in `f64`: layer, RMS, group and instance norm.

mod common;

use candle_batch_norm::ops::{
    batch_norm_train, group_norm, group_norm_vjp, instance_norm, layer_norm, layer_norm_vjp,
    rms_norm, rms_norm_vjp, BatchNormArgs, RowNormArgs,
};
use candle_batch_norm::Activation;
use candle_core::{DType, Device, Result, Tensor, Var};
use common::rows::{RowCase, RowTruth};
use common::{assert_close, assert_error, devices, random, rounding, tensor, values, var};

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];

#[derive(Debug, Clone, Copy, PartialEq)]
enum Memory {
    Contiguous,
    ChannelsLast,
    /// Neither: every second value of a larger tensor.
    Strided,
}

/// A case with values as `dtype` holds them.
fn case([n, groups, c, s]: [usize; 4], dtype: DType, seed: u64) -> Result<RowCase> {
    let rounded = |values: Vec<f64>| -> Result<Vec<f64>> {
        let len = values.len();
        common::values(&tensor(&values, &[len], dtype, &Device::Cpu)?)
    };
    let count = n * c * s;
    Ok(RowCase {
        n,
        groups,
        c,
        s,
        x: rounded(random(seed, count, 0.5))?,
        dy: rounded(random(seed + 1, count, 0.1))?,
        weight: Some(rounded(random(seed + 2, c, 0.8))?),
        bias: Some(rounded(random(seed + 3, c, 0.1))?),
        relu: false,
        rms: false,
        eps: 1e-5,
    })
}

/// That of the input, and that of the parameters.
struct Dtypes(DType, DType);

impl From<DType> for Dtypes {
    fn from(dtype: DType) -> Self {
        Self(dtype, dtype)
    }
}

/// What an op gives, with the gradients of its arguments.
struct Outcome {
    y: Tensor,
    dx: Tensor,
    dweight: Option<Tensor>,
    dbias: Option<Tensor>,
}

/// Runs a case, whose `x` has this shape, through the op.
fn run(
    case: &RowCase,
    shape: &[usize],
    dtypes: impl Into<Dtypes>,
    memory: Memory,
    device: &Device,
    op: impl Fn(&Tensor, &RowNormArgs) -> Result<Tensor>,
) -> Result<Outcome> {
    let Dtypes(dtype, parameters) = dtypes.into();
    let x = var(&case.x, shape, dtype, device)?;
    let x_given = match memory {
        Memory::Contiguous => x.as_tensor().clone(),
        Memory::ChannelsLast => x
            .transpose(1, shape.len() - 1)?
            .contiguous()?
            .transpose(1, shape.len() - 1)?,
        Memory::Strided => Tensor::stack(&[x.as_tensor(), x.as_tensor()], shape.len())?
            .narrow(shape.len(), 1, 1)?
            .squeeze(shape.len())?,
    };
    let parameter = |values: &Option<Vec<f64>>| -> Result<Option<Var>> {
        let shape = [case.c];
        values
            .as_ref()
            .map(|values| var(values, &shape, parameters, device))
            .transpose()
    };
    let (weight, bias) = (parameter(&case.weight)?, parameter(&case.bias)?);
    let args = RowNormArgs {
        weight: weight.as_deref(),
        bias: bias.as_deref(),
        activation: if case.relu {
            Activation::Relu
        } else {
            Activation::Identity
        },
        eps: case.eps,
    };
    let y = op(&x_given, &args)?;
    assert_eq!((y.dims(), y.dtype()), (x.dims(), dtype));
    let dy = tensor(&case.dy, shape, dtype, device)?;
    let grads = (&y * dy)?.sum_all()?.backward()?;
    let of = |v: &Option<Var>| {
        v.as_ref()
            .map(|v| grads.get(v).expect("a gradient").clone())
    };
    Ok(Outcome {
        dx: grads.get(&x).expect("a gradient of x").clone(),
        dweight: of(&weight),
        dbias: of(&bias),
        y,
    })
}

/// `truth` is that of the values as the dtype holds them: what is left is the rounding of the results.
fn check(what: &str, outcome: &Outcome, truth: &RowTruth, dtype: DType) -> Result<()> {
    let bound = rounding(dtype);
    // Half of the distance between two values of F16 around 0.
    let smallest = if dtype == DType::F16 { 3e-8 } else { 1e-12 };
    assert_close(
        &format!("{what} y"),
        &values(&outcome.y)?,
        &truth.y,
        bound,
        bound,
    );
    let dx = values(&outcome.dx)?;
    for (i, ((got, expected), scale)) in dx.iter().zip(&truth.dx).zip(&truth.dx_scale).enumerate() {
        assert!(
            (got - expected).abs() <= bound * scale.max(1e-3),
            "{what} dx[{i}]: got {got}, expected {expected}"
        );
    }
    for (name, got, expected, scale) in [
        (
            "dweight",
            &outcome.dweight,
            &truth.dweight,
            &truth.dweight_scale,
        ),
        ("dbias", &outcome.dbias, &truth.dbias, &truth.dbias_scale),
    ] {
        let Some(got) = got else { continue };
        for (i, got) in values(got)?.into_iter().enumerate() {
            // Values in between are F32 in half precision too; only the result is rounded to it.
            let bound = 1e-6_f64.min(bound) * scale[i] + bound * expected[i].abs();
            assert!(
                (got - expected[i]).abs() <= bound.max(smallest),
                "{what} {name}[{i}]: got {got}, expected {} ± {bound:e}",
                expected[i]
            );
        }
    }
    Ok(())
}

/// Lengths around the sizes of registers, lanes, blocks and chunks.
#[test]
fn layer_norm_is_its_closed_form() -> Result<()> {
    for device in devices() {
        for dtype in DTYPES {
            for (n, len) in [
                (3, 1),
                (5, 2),
                (6, 15),
                (6, 16),
                (6, 17),
                (1, 31),
                (300, 64),
                (7, 127),
                (9, 129),
                (33, 1024),
                (3, 8191),
                (2, 8193),
                (40, 1000),
                (1, 40_000),
                (4200, 520),
            ] {
                for (relu, affine, rms) in [
                    (false, true, false),
                    (true, true, false),
                    (true, false, true),
                    (false, true, true),
                ] {
                    let mut case = case([n, 1, len, 1], dtype, (n * len) as u64)?;
                    (case.relu, case.rms) = (relu, rms);
                    if !affine {
                        (case.weight, case.bias) = (None, None);
                    }
                    let what = format!("{dtype:?} {n} rows of {len}, {relu} {affine} {rms}");
                    let outcome = run(
                        &case,
                        &[n, len],
                        dtype,
                        Memory::Contiguous,
                        &device,
                        |x, args| match rms {
                            true => rms_norm(x, len, args),
                            false => layer_norm(x, len, args),
                        },
                    )?;
                    // A value just at the edge of the ReLU may fall to either side of it.
                    if !relu || dtype == DType::F64 || dtype == DType::F32 {
                        check(&what, &outcome, &case.truth(), dtype)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn group_norm_is_its_closed_form_in_every_order_in_memory() -> Result<()> {
    for device in devices() {
        for dtype in DTYPES {
            for (sizes, shape) in [
                ([2, 1, 6, 1], vec![2, 6]),
                ([3, 3, 6, 5], vec![3, 6, 5]),
                ([2, 2, 4, 63], vec![2, 4, 7, 9]),
                ([2, 2, 4, 64], vec![2, 4, 8, 8]),
                ([20, 4, 8, 100], vec![20, 8, 10, 10]),
                ([2, 3, 48, 70], vec![2, 48, 7, 10]),
                ([1, 1, 3, 12_000], vec![1, 3, 30, 20, 20]),
                ([2, 1, 40, 300], vec![2, 40, 20, 15]),
                ([9, 8, 40, 36], vec![9, 40, 6, 6]),
            ] {
                for relu in [false, true] {
                    for memory in [Memory::Contiguous, Memory::ChannelsLast, Memory::Strided] {
                        let mut case = case(sizes, dtype, sizes.iter().sum::<usize>() as u64)?;
                        case.relu = relu;
                        let what = format!("{dtype:?} {shape:?} {relu} {memory:?}");
                        let groups = case.groups;
                        let op = |x: &Tensor, args: &RowNormArgs| group_norm(x, groups, args);
                        let outcome = run(&case, &shape, dtype, memory, &device, op)?;
                        if !relu || dtype == DType::F64 || dtype == DType::F32 {
                            check(&what, &outcome, &case.truth(), dtype)?;
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// In half precision too, where `check` has to leave it out: the gradient is cut exactly where the output is 0.
#[test]
fn the_relu_lets_through_what_it_let_through() -> Result<()> {
    for device in devices() {
        for dtype in DTYPES {
            for (sizes, shape) in [
                ([64, 1, 200, 1], vec![64, 200]),
                ([4, 2, 4, 100], vec![4, 4, 100]),
            ] {
                let mut case = case(sizes, dtype, 77)?;
                case.relu = true;
                case.dy = vec![1.0; case.x.len()];
                // dbias counts the values that were let through.
                let groups = case.groups;
                let outcome = run(
                    &case,
                    &shape,
                    dtype,
                    Memory::Contiguous,
                    &device,
                    |x, args| group_norm(x, groups, args),
                )?;
                let y = values(&outcome.y)?;
                let mut counts = vec![0.0; case.c];
                for (i, y) in y.iter().enumerate() {
                    counts[i / case.s % case.c] += f64::from(u8::from(*y > 0.0));
                }
                assert_eq!(
                    values(outcome.dbias.as_ref().unwrap())?,
                    counts,
                    "{dtype:?} {shape:?}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn instance_norm_is_a_group_norm_with_a_group_for_each_channel() -> Result<()> {
    for device in devices() {
        for dtype in DTYPES {
            for (sizes, shape) in [
                ([3, 5, 5, 40], vec![3, 5, 8, 5]),
                ([2, 20, 20, 144], vec![2, 20, 12, 12]),
            ] {
                for memory in [Memory::Contiguous, Memory::ChannelsLast] {
                    let case = case(sizes, dtype, 5)?;
                    let outcome = run(&case, &shape, dtype, memory, &device, |x, args| {
                        Ok(instance_norm(x, args)?.0)
                    })?;
                    check(
                        &format!("{dtype:?} {shape:?} {memory:?}"),
                        &outcome,
                        &case.truth(),
                        dtype,
                    )?;
                    let x = tensor(&case.x, &shape, dtype, &device)?;
                    let (_, stats) = instance_norm(&x, &RowNormArgs::new())?;
                    let truth = case.truth();
                    let mean_of = |values: &[f64], channel: usize| {
                        (0..case.n)
                            .map(|n| values[n * case.c + channel])
                            .sum::<f64>()
                            / case.n as f64
                    };
                    for (got, truth) in [(stats.mean()?, &truth.mean), (stats.var()?, &truth.var)] {
                        let expected: Vec<_> =
                            (0..case.c).map(|channel| mean_of(truth, channel)).collect();
                        assert_close("statistics", &values(&got)?, &expected, 1e-12, 1e-12);
                    }
                    assert_eq!(stats.count(), case.s);
                }
            }
        }
    }
    Ok(())
}

/// The loss is a sum with weights, of which central differences in F64 are good to eight digits.
#[test]
fn gradients_are_those_of_finite_differences() -> Result<()> {
    let (device, dtype) = (Device::Cpu, DType::F64);
    for (sizes, shape, rms) in [
        ([3, 1, 5, 1], vec![3, 5], false),
        ([3, 1, 5, 1], vec![3, 5], true),
        ([2, 2, 4, 3], vec![2, 4, 3], false),
    ] {
        let case = case(sizes, dtype, 11)?;
        let (groups, c) = (case.groups, case.c);
        let op = |x: &Tensor, args: &RowNormArgs| match rms {
            true => rms_norm(x, c, args),
            false if shape.len() == 2 => layer_norm(x, c, args),
            false => group_norm(x, groups, args),
        };
        let outcome = run(&case, &shape, dtype, Memory::Contiguous, &device, op)?;
        let loss = |case: &RowCase| -> Result<f64> {
            let y = values(&run(case, &shape, dtype, Memory::Contiguous, &device, op)?.y)?;
            Ok(y.iter().zip(&case.dy).map(|(y, dy)| y * dy).sum())
        };
        let difference = |change: &dyn Fn(&mut RowCase, f64)| -> Result<f64> {
            let at = |step: f64| {
                let mut case = case.clone();
                change(&mut case, step);
                loss(&case)
            };
            Ok((at(1e-5)? - at(-1e-5)?) / 2e-5)
        };
        let got = values(&outcome.dx)?;
        for (i, got) in got.iter().enumerate() {
            let expected = difference(&|case, step| case.x[i] += step)?;
            assert!((got - expected).abs() < 1e-7, "dx[{i}]: {got}, {expected}");
        }
        let (dweight, dbias) = (outcome.dweight.unwrap(), outcome.dbias.unwrap());
        for (i, (dweight, dbias)) in values(&dweight)?.iter().zip(values(&dbias)?).enumerate() {
            let expected = difference(&|case, step| case.weight.as_mut().unwrap()[i] += step)?;
            assert!((dweight - expected).abs() < 1e-7, "dweight[{i}]");
            let expected = difference(&|case, step| case.bias.as_mut().unwrap()[i] += step)?;
            assert!((dbias - expected).abs() < 1e-7, "dbias[{i}]");
        }
    }
    Ok(())
}

#[test]
fn accuracy_does_not_depend_on_the_offset() -> Result<()> {
    for device in devices() {
        for offset in [1e3, 1e5, 1e6] {
            for (sizes, shape) in [
                ([64, 1, 1024, 1], vec![64, 1024]),
                ([2, 2, 8, 1024], vec![2, 8, 32, 32]),
                ([1, 1, 16, 4096], vec![1, 16, 64, 64]),
            ] {
                for memory in [Memory::Contiguous, Memory::ChannelsLast] {
                    let mut case = case(sizes, DType::F32, 3)?;
                    let count = case.x.len();
                    case.x = values(&tensor(
                        &random(9, count, offset),
                        &[count],
                        DType::F32,
                        &device,
                    )?)?;
                    let groups = case.groups;
                    let outcome = run(&case, &shape, DType::F32, memory, &device, |x, args| {
                        group_norm(x, groups, args)
                    })?;
                    let truth = case.truth();
                    // With a weight of about 1, in units of which the bounds are.
                    let weight = case
                        .weight
                        .iter()
                        .flatten()
                        .fold(1.0, |max: f64, w| max.max(w.abs()));
                    let bound = 2e-6 * weight;
                    assert_close("y", &values(&outcome.y)?, &truth.y, bound, 0.0);
                    assert_close("dx", &values(&outcome.dx)?, &truth.dx, bound, 0.0);
                    let dweight = values(outcome.dweight.as_ref().unwrap())?;
                    for (i, got) in dweight.iter().enumerate() {
                        let bound = 1e-7 * truth.dweight_scale[i] + 1e-7 * truth.dweight[i].abs();
                        let error = (got - truth.dweight[i]).abs();
                        assert!(error <= bound, "dweight[{i}]: {error:e}, at most {bound:e}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_of_constants_gives_exactly_the_bias() -> Result<()> {
    for device in devices() {
        for dtype in DTYPES {
            for (shape, groups) in [
                (vec![3, 6], 1),
                (vec![2, 6, 10, 10], 2),
                (vec![1, 6, 60, 60], 1),
            ] {
                let x = Tensor::full(1234.5f32, shape.as_slice(), &device)?.to_dtype(dtype)?;
                let bias = random(1, 6, 0.0);
                let bias = tensor(&bias, &[6], dtype, &device)?;
                let args = RowNormArgs {
                    bias: Some(&bias),
                    ..RowNormArgs::new()
                };
                let s: usize = shape[2..].iter().product();
                let y = values(&group_norm(&x, groups, &args)?)?;
                let bias = values(&bias)?;
                for (i, y) in y.iter().enumerate() {
                    assert_eq!(*y, bias[i / s % 6], "{dtype:?} {shape:?}");
                }
            }
        }
    }
    Ok(())
}

/// Values at the mean are at the kink of the ReLU: were the mean off by the last bit of an F64, they would let
/// gradients through.
#[test]
fn a_mean_that_is_a_number_of_the_dtype_is_exactly_that() -> Result<()> {
    for device in devices() {
        for dtype in DTYPES {
            // The quotient of these counts and themselves is 1, their product with the reciprocal is not.
            for m in [49, 98, 103, 196] {
                let mut x = vec![1.0; m];
                (x[0], x[m - 1]) = (0.0, 2.0);
                let x = tensor(&x, &[1, 1, m], dtype, &device)?;
                let (weight, bias) = (
                    var(&[1.0], &[1], dtype, &device)?,
                    var(&[0.0], &[1], dtype, &device)?,
                );
                let rows = RowNormArgs {
                    weight: Some(&weight),
                    bias: Some(&bias),
                    activation: Activation::Relu,
                    ..RowNormArgs::new()
                };
                let channels = BatchNormArgs {
                    weight: Some(&weight),
                    bias: Some(&bias),
                    activation: Activation::Relu,
                    ..BatchNormArgs::new()
                };
                for (what, y) in [
                    ("group norm", group_norm(&x, 1, &rows)?),
                    ("batch norm", batch_norm_train(&x, &channels)?.0),
                ] {
                    let above = values(&y)?.iter().filter(|&&y| y > 0.0).count();
                    let grads = y.sum_all()?.backward()?;
                    let dbias = values(grads.get(&bias).expect("a gradient"))?;
                    assert_eq!((above, dbias[0]), (1, 1.0), "{what} {dtype:?} {m}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_nan_stays_in_its_row() -> Result<()> {
    for device in devices() {
        for shape in [vec![4, 8, 100], vec![4, 8, 2]] {
            let count: usize = shape.iter().product();
            let mut x = random(4, count, 0.0);
            let row = count / 8; // two groups of four samples
            x[row + 3] = f64::NAN;
            x[3 * row] = f64::INFINITY;
            let x = var(&x, &shape, DType::F32, &device)?;
            let y = group_norm(&x, 2, &RowNormArgs::new())?;
            let grads = y.sqr()?.sum_all()?.backward()?;
            for t in [&y, grads.get(&x).unwrap()] {
                for (i, value) in values(t)?.iter().enumerate() {
                    let spoilt = i / row == 1 || i / row == 3;
                    assert_eq!(value.is_nan(), spoilt, "{shape:?} [{i}]: {value}");
                }
            }
        }
    }
    Ok(())
}

/// They are not rounded to it: a weight of 1 + 2⁻¹² is one of F32 alone.
#[test]
fn parameters_in_f32_serve_half_precision() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F16, DType::BF16] {
            for (sizes, shape) in [
                ([16, 2, 8, 1], vec![16, 8]),
                ([2, 2, 8, 81], vec![2, 8, 9, 9]),
            ] {
                let mut case = case(sizes, dtype, 2)?;
                case.weight = Some(vec![1.0 + f64::powi(2.0, -12); 8]);
                let dtypes = Dtypes(dtype, DType::F32);
                let op = |x: &Tensor, args: &RowNormArgs| group_norm(x, 2, args);
                let outcome = run(&case, &shape, dtypes, Memory::Contiguous, &device, op)?;
                let truth = case.truth();
                check(&format!("{dtype:?} {shape:?}"), &outcome, &truth, dtype)?;
                // These have the digits of F32.
                let dweight = outcome.dweight.as_ref().unwrap();
                assert_eq!(dweight.dtype(), DType::F32);
                for (i, got) in values(dweight)?.iter().enumerate() {
                    let error = (got - truth.dweight[i]).abs();
                    assert!(
                        error <= 1e-6 * truth.dweight_scale[i],
                        "dweight[{i}]: {error:e}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Absent parameters, and arguments that nobody wants a gradient of.
#[test]
fn each_argument_has_its_own_gradient_and_only_if_it_is_wanted() -> Result<()> {
    for device in devices() {
        for (sizes, shape, memory) in [
            ([3, 2, 6, 5], vec![3, 6, 5], Memory::Contiguous),
            ([3, 2, 6, 64], vec![3, 6, 8, 8], Memory::Contiguous),
            ([3, 2, 6, 64], vec![3, 6, 8, 8], Memory::ChannelsLast),
        ] {
            for present in 0..4 {
                let mut case = case(sizes, DType::F32, 21)?;
                case.relu = true;
                case.weight = case.weight.filter(|_| present & 1 != 0);
                case.bias = case.bias.filter(|_| present & 2 != 0);
                let op = |x: &Tensor, args: &RowNormArgs| group_norm(x, 2, args);
                let what = format!("{shape:?} {memory:?}, present {present}");
                let outcome = run(&case, &shape, DType::F32, memory, &device, op)?;
                assert_eq!(outcome.dweight.is_some(), present & 1 != 0, "{what}");
                assert_eq!(outcome.dbias.is_some(), present & 2 != 0, "{what}");
                check(&what, &outcome, &case.truth(), DType::F32)?;
            }
            let case = case(sizes, DType::F32, 21)?;
            let truth = case.truth();
            let dy = tensor(&case.dy, &shape, DType::F32, &device)?;
            let x = var(&case.x, &shape, DType::F32, &device)?;
            let weight = var(case.weight.as_ref().unwrap(), &[6], DType::F32, &device)?;
            let bias = var(case.bias.as_ref().unwrap(), &[6], DType::F32, &device)?;
            for tracked in 1..8 {
                let part = |var: &Var, bit: usize| match tracked & bit {
                    0 => var.detach(),
                    _ => var.as_tensor().clone(),
                };
                let (w, b) = (part(&weight, 2), part(&bias, 4));
                let args = RowNormArgs {
                    weight: Some(&w),
                    bias: Some(&b),
                    ..RowNormArgs::new()
                };
                let grads = (group_norm(&part(&x, 1), 2, &args)? * &dy)?
                    .sum_all()?
                    .backward()?;
                for (var, bit, expected) in [
                    (&x, 1, &truth.dx),
                    (&weight, 2, &truth.dweight),
                    (&bias, 4, &truth.dbias),
                ] {
                    let got = grads.get(var);
                    assert_eq!(
                        got.is_some(),
                        tracked & bit != 0,
                        "{shape:?}, tracked {tracked}"
                    );
                    if let Some(got) = got {
                        let what = format!("{shape:?}, tracked {tracked}, argument {bit}");
                        assert_close(&what, &values(got)?, expected, 2e-5, 2e-6);
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_gradients_without_autograd_are_those_with_it() -> Result<()> {
    for device in devices() {
        for (sizes, shape) in [
            ([20, 1, 33, 1], vec![20, 33]),
            ([3, 2, 6, 64], vec![3, 6, 8, 8]),
        ] {
            for memory in [Memory::Contiguous, Memory::ChannelsLast] {
                let mut case = case(sizes, DType::F32, 31)?;
                case.relu = true;
                let groups = case.groups;
                let with = run(&case, &shape, DType::F32, memory, &device, |x, args| {
                    group_norm(x, groups, args)
                })?;
                // In the place of the op: its own gradients of the same arguments.
                let without = std::cell::RefCell::new(None);
                let dy = tensor(&case.dy, &shape, DType::F32, &device)?;
                let y = run(&case, &shape, DType::F32, memory, &device, |x, args| {
                    let (y, pullback) = group_norm_vjp(x, groups, args)?;
                    assert!(!y.track_op());
                    without.replace(Some((y, pullback.gradients(&dy)?)));
                    group_norm(x, groups, args)
                })?
                .y;
                let (y_without, grads) = without.into_inner().unwrap();
                for (got, expected) in [
                    (&y_without, &y),
                    (&grads.dx, &with.dx),
                    (&grads.dweight.unwrap(), with.dweight.as_ref().unwrap()),
                    (&grads.dbias.unwrap(), with.dbias.as_ref().unwrap()),
                ] {
                    assert_eq!(values(got)?, values(expected)?, "{shape:?} {memory:?}");
                }
            }
        }
        let x = tensor(&random(1, 12, 0.0), &[2, 6], DType::F32, &device)?;
        let args = RowNormArgs::new();
        let (y, pullback) = layer_norm_vjp(&x, 6, &args)?;
        assert_eq!(values(&y)?, values(&layer_norm(&x, 6, &args)?)?);
        assert!(pullback.gradients(&y)?.dweight.is_none());
        let wrong = x.narrow(0, 0, 1)?;
        assert_error(
            pullback.gradients(&wrong),
            &["layer norm", "[2, 6]", "[1, 6]"],
        );
        let (y, _) = rms_norm_vjp(&x, 6, &args)?;
        assert_eq!(values(&y)?, values(&rms_norm(&x, 6, &args)?)?);
        let empty = x.narrow(0, 0, 0)?;
        assert_error(
            layer_norm_vjp(&empty, 6, &args).map(|_| ()),
            &["empty", "[0, 6]"],
        );
    }
    Ok(())
}

#[test]
fn the_number_of_threads_does_not_matter() -> Result<()> {
    let mut results = vec![];
    for (sizes, shape) in [
        ([300, 1, 200, 1], vec![300, 200]),
        ([5, 1, 20_000, 1], vec![5, 20_000]),
        ([3, 2, 8, 4900], vec![3, 8, 70, 70]),
        ([40, 4, 16, 100], vec![40, 16, 10, 10]),
    ] {
        for memory in [Memory::Contiguous, Memory::ChannelsLast] {
            let case = case(sizes, DType::F32, 8)?;
            let groups = case.groups;
            let op = |x: &Tensor, args: &RowNormArgs| group_norm(x, groups, args);
            let outcome = run(&case, &shape, DType::F32, memory, &Device::Cpu, op)?;
            let grads = [outcome.dweight, outcome.dbias].into_iter().flatten();
            for t in [outcome.y, outcome.dx].into_iter().chain(grads) {
                results.extend(values(&t)?);
            }
        }
    }
    common::assert_bits_for_any_number_of_threads("the_number_of_threads_does_not_matter", &results)
}

#[test]
fn nothing_in_nothing_out() -> Result<()> {
    let device = Device::Cpu;
    let args = RowNormArgs::new();
    let x = Tensor::zeros((0, 4), DType::F32, &device)?;
    assert_eq!(layer_norm(&x, 4, &args)?.dims(), [0, 4]);
    let x = Tensor::zeros((2, 4, 0), DType::F32, &device)?;
    assert_eq!(group_norm(&x, 2, &args)?.dims(), [2, 4, 0]);
    assert_eq!(instance_norm(&x, &args)?.1.count(), 0);
    Ok(())
}

#[test]
fn errors_say_what_was_given_and_what_was_expected() -> Result<()> {
    let device = Device::Cpu;
    let args = RowNormArgs::new();
    let x = Tensor::zeros((2, 6, 5), DType::F32, &device)?;
    assert_error(
        layer_norm(&x, 6, &args),
        &["layer norm", "[6]", "[2, 6, 5]"],
    );
    assert_error(layer_norm(&x, (), &args), &["at least one", "[2, 6, 5]"]);
    assert_error(
        rms_norm(&x, (2, 5), &args),
        &["rms norm", "[2, 5]", "[2, 6, 5]"],
    );
    assert_error(
        group_norm(&x, 4, &args),
        &["divides the 6 channels", "got 4"],
    );
    assert_error(group_norm(&x, 0, &args), &["got 0"]);
    assert_error(
        group_norm(
            &x.narrow(2, 0, 1)?.squeeze(2)?.narrow(0, 0, 1)?.squeeze(0)?,
            1,
            &args,
        ),
        &["2 dimensions", "[6]"],
    );
    assert_error(
        instance_norm(&x.narrow(2, 0, 1)?, &args),
        &["more than one value", "[2, 6, 1]"],
    );
    let eps = RowNormArgs { eps: -1.0, ..args };
    assert_error(layer_norm(&x, 5, &eps), &["eps >= 0", "-1"]);
    let weight = Tensor::zeros(5, DType::F32, &device)?;
    let with = RowNormArgs {
        weight: Some(&weight),
        ..args
    };
    assert_error(group_norm(&x, 2, &with), &["a weight of shape [6]", "[5]"]);
    let weight = Tensor::zeros(5, DType::F64, &device)?;
    let with = RowNormArgs {
        weight: Some(&weight),
        ..args
    };
    assert_error(layer_norm(&x, 5, &with), &["F32", "F64"]);
    assert_error(
        layer_norm(&x.to_dtype(DType::U8)?, 5, &args),
        &["layer norm", "U8"],
    );
    Ok(())
}
