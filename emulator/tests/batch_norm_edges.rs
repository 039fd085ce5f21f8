//! Batch norm where numbers are large, few, not numbers, or not wanted.

mod common;
#[path = "../../src/dims.rs"]
#[allow(dead_code)] // the tests do not use all of it
mod dims;
#[path = "../../src/ops/batch_norm/plan/mod.rs"]
#[allow(dead_code)] // the tests do not use all of it
mod plan;

use common::values::Value;
use common::{reference, run, Case, Inputs, KINDS};
use half::{bf16, f16};
use kernel_emulator::{Schedule, SANITIZER};

#[test]
fn a_constant_channel_gives_exactly_the_bias() {
    if SANITIZER == Some("thread") {
        return; // see no_kernel_has_a_race
    }
    fn check_bias<T: Value>(offset: f64) {
        let dims = [(65, 3, 1), (3, 2, 49), (5, 8, 1), (2, 3, 256)];
        for (dims, kind) in dims
            .into_iter()
            .flat_map(|dims| KINDS.map(|kind| (dims, kind)))
        {
            let case = Case {
                offset,
                constant: true,
                ..Case::new(dims, kind)
            };
            let inputs = Inputs::<T, T>::new(&case);
            let outputs = run(&case, &inputs, Schedule::Random(3));
            for (i, y) in outputs.y.iter().enumerate() {
                let channel = i / case.dims.2 % case.dims.1;
                assert_eq!(*y, inputs.bias[channel], "{} {i}", T::NAME);
            }
        }
    }
    check_bias::<f32>(1e6 + 0.3);
    check_bias::<f64>(1e6 + 0.3);
    check_bias::<f16>(3.3);
    check_bias::<bf16>(3.3);
}

/// A pivot as far from the others as there can be: the squares around it would lose their digits.
#[test]
fn a_first_value_far_away_costs_no_accuracy() {
    if SANITIZER == Some("thread") {
        return; // see no_kernel_has_a_race
    }
    for (dims, kind) in [
        ((1, 1, 5000), KINDS[1]),
        ((100, 4, 49), KINDS[3]),
        ((5000, 4, 1), KINDS[6]),
    ] {
        let case = Case::new(dims, kind);
        let mut inputs = Inputs::<f32, f32>::new(&case);
        for channel in 0..dims.1 {
            inputs.x[channel * dims.2] = 70.0;
        }
        let outputs = run(&case, &inputs, Schedule::Forward);
        reference::check(&case, &inputs, &outputs);
    }
}

/// Every block of a tile has the same sums to the last bit, and rounds as the mask of a ReLU will.
#[test]
fn the_output_follows_from_what_is_saved() {
    if SANITIZER == Some("thread") {
        return; // see no_kernel_has_a_race
    }
    for (i, kind) in KINDS.into_iter().enumerate() {
        // Enough for every block to have a part.
        let dims = [(2100, 4, 1), (1, 2, 9001), (1, 1, 9000)][i % 3];
        let case = Case {
            offset: 100.3,
            ..Case::new(dims, kind)
        };
        let inputs = Inputs::<f32, f32>::new(&case);
        let outputs = run(&case, &inputs, Schedule::Forward);
        let in_double = Inputs::<f64, f32>::new(&case);
        let double_outputs = run(&case, &in_double, Schedule::Forward);
        for i in 0..inputs.x.len() {
            let channel = i / dims.2 % dims.1;
            let scale = |weight: f32, saved: &[f64]| {
                let rstd = 1.0 / (saved[dims.1 + channel] + reference::EPS).sqrt();
                f64::from(weight) * rstd
            };
            let (mean, bias) = (outputs.saved[channel], inputs.bias[channel]);
            let scale_32 = scale(inputs.weight[channel], &outputs.saved) as f32;
            let hi = mean as f32;
            let centred = (inputs.x[i] - hi) - (mean - f64::from(hi)) as f32;
            let expected = centred.mul_add(scale_32, bias);
            assert_eq!(outputs.y[i].to_bits(), expected.to_bits(), "{i} {case:?}");

            let (mean, bias) = (double_outputs.saved[channel], in_double.bias[channel]);
            let scale_64 = scale(in_double.weight[channel], &double_outputs.saved);
            let expected = (in_double.x[i] - mean).mul_add(scale_64, bias.into());
            let y = double_outputs.y[i];
            assert_eq!(y.to_bits(), expected.to_bits(), "{i} {case:?}");
        }
    }
}

/// Also where it is positive only before it is rounded, and where it is NaN.
#[test]
fn a_relu_lets_the_gradient_through_where_the_output_is_positive() {
    if SANITIZER == Some("thread") {
        return; // see no_kernel_has_a_race
    }
    for (i, kind) in KINDS.into_iter().enumerate() {
        let dims = [(37, 36, 1), (3, 2, 259), (5, 8, 49)][i % 3];
        // With and without a residual, whose y is read; in training and in evaluation.
        for bits in [0b001001, 0b001111, 0b011001, 0b011111] {
            let case = Case::new(dims, kind).with_bits(bits);
            let mut inputs = Inputs::<f16, f32>::new(&case);
            inputs.weight[0] = 1e-8;
            inputs.x[dims.2 + 1] = f16::NAN;
            let outputs = run(&case, &inputs, Schedule::Forward);
            let mut nans = 0;
            for (i, y) in outputs.y.iter().enumerate() {
                let is_cut = f32::from(*y) <= 0.0;
                let expected = if is_cut { f16::ZERO } else { inputs.dy[i] };
                assert_eq!(outputs.dresidual[i], expected, "{i} {y} {case:?}");
                nans += usize::from(y.is_nan());
            }
            assert_eq!(nans, if case.given { 1 } else { case.m() }, "{case:?}");
        }
    }
}

/// What is asked for does not depend on what else is, and nothing else is written.
#[test]
fn gradients_that_nobody_wants_are_left_out() {
    if SANITIZER == Some("thread") {
        return; // see no_kernel_has_a_race
    }
    for (i, kind) in KINDS.into_iter().enumerate() {
        let dims = [(37, 36, 1), (3, 2, 259), (5, 8, 49)][i % 3];
        for bits in [0b001011, 0b011111] {
            let case = Case::new(dims, kind).with_bits(bits);
            let inputs = Inputs::<f32, f32>::new(&case);
            let all = run(&case, &inputs, Schedule::Forward);
            for wants in 0..7usize {
                let wants = [0, 1, 2].map(|i| wants >> i & 1 == 1);
                let case = Case { wants, ..case };
                let some = run(&case, &inputs, Schedule::Forward);
                let is = |wanted, got: &[f32], all: &[f32]| match wanted {
                    false => got.iter().all(|v| v.is_nan()),
                    true => got.iter().zip(all).all(|(a, b)| a.bits() == b.bits()),
                };
                assert!(is(wants[0], &some.dx, &all.dx), "{case:?}");
                assert!(is(wants[1], &some.dresidual, &all.dresidual), "{case:?}");
                assert!(is(wants[2], &some.dparams, &all.dparams), "{case:?}");
            }
        }
    }
}

#[test]
fn nan_and_infinity_stay_in_their_channel() {
    if SANITIZER == Some("thread") {
        return; // see no_kernel_has_a_race
    }
    for (i, kind) in KINDS.into_iter().enumerate() {
        let dims = [(37, 36, 1), (3, 3, 259), (5, 8, 49), (33, 31, 1)][i % 4];
        for (bits, value) in [
            (0b0011, f32::NAN),
            (0b1111, f32::INFINITY),
            (0b10011, f32::INFINITY),
        ] {
            let case = Case::new(dims, kind).with_bits(bits);
            let mut inputs = Inputs::<f32, f32>::new(&case);
            let clean = run(&case, &inputs, Schedule::Forward);
            let at = dims.2 + dims.2 / 2; // in channel 1
            inputs.x[at] = value;
            let dirty = run(&case, &inputs, Schedule::Forward);
            for i in 0..inputs.x.len() {
                // With given statistics a value meets no other, and the gradient of x does not meet x.
                let (y, dx) = match (i / dims.2 % dims.1 == 1, case.given) {
                    (false, _) => (clean.y[i], clean.dx[i]),
                    (true, true) if i == at => (value * inputs.weight[1].signum(), clean.dx[i]),
                    (true, true) => (clean.y[i], clean.dx[i]),
                    (true, false) => (f32::NAN, f32::NAN),
                };
                let is = |got: f32, expected: f32| {
                    got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan()
                };
                assert!(is(dirty.y[i], y), "{i} {} {y} {case:?}", dirty.y[i]);
                assert!(is(dirty.dx[i], dx), "{i} {} {dx} {case:?}", dirty.dx[i]);
            }
            for i in 0..2 * dims.1 {
                match i % dims.1 == 1 {
                    true => assert!(case.given || dirty.saved[i].is_nan() || i == 1, "{case:?}"),
                    false => {
                        assert_eq!(dirty.saved[i].to_bits(), clean.saved[i].to_bits());
                        assert_eq!(dirty.dparams[i].to_bits(), clean.dparams[i].to_bits());
                    }
                }
            }
        }
    }
}
