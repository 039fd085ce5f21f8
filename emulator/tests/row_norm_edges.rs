//! Row norms where numbers are large, constant or not numbers, and where threads may race.

#[path = "../../src/dims.rs"]
#[allow(dead_code)] // the tests do not use all of it
mod dims;
#[path = "../../src/ops/batch_norm/plan/mod.rs"]
#[allow(dead_code)]
mod plan;
#[path = "../../src/ops/row_norm/plan/mod.rs"]
#[allow(dead_code)]
mod row_plan;
mod rows;
#[path = "common/values.rs"]
#[allow(dead_code)]
mod values;

/// As the planner of rows knows the planner of tiles.
mod ops {
    pub(crate) use crate::plan;
}

use half::{bf16, f16};
use kernel_emulator::{Schedule, SANITIZER};
use plan::Blocks;
use row_plan::Kind;
use rows::{check, run, Case, Inputs, EPS};
use values::Value;

const KINDS: [Kind; 5] = [
    Kind::Lanes(8, 64),
    Kind::Blocks(Blocks::Group, 1, 128),
    Kind::Blocks(Blocks::Group, 3, 64),
    Kind::Blocks(Blocks::Cluster, 2, 64),
    Kind::Blocks(Blocks::TwoPasses, 3, 64),
];

/// `[n, c, s]` and groups: of one channel for each value, whole vectors and not, and of several.
const SIZES: [(usize, usize, usize, usize); 5] = [
    (5, 32, 1, 1),
    (5, 33, 1, 1),
    (2, 6, 49, 3),
    (2, 16, 64, 2),
    (2, 9, 5, 9),
];

/// All sizes and kinds in both orders of memory.
fn cases() -> impl Iterator<Item = Case> {
    let sizes_and_kinds = SIZES
        .into_iter()
        .flat_map(|dims| KINDS.map(|kind| (dims, kind)));
    // A second for a thousand threads: only `no_kernel_has_a_race` is for the thread sanitizer.
    let skips = SANITIZER == Some("thread");
    // The others look at how, not at which numbers.
    let step = if SANITIZER.is_some() { 3 } else { 1 };
    sizes_and_kinds
        .filter(move |_| !skips)
        .flat_map(|(dims, kind)| {
            [false, true].map(|channels_last| Case {
                channels_last,
                ..Case::new(dims, kind)
            })
        })
        .step_by(step)
}

#[test]
fn a_constant_row_gives_exactly_the_bias() {
    fn check_bias<T: Value>(offset: f64) {
        for case in cases() {
            let case = Case {
                offset,
                constant: true,
                ..case
            };
            let inputs = Inputs::<T, T>::new(&case);
            let outputs = run(&case, &inputs, Schedule::Random(3));
            for row in 0..case.rows.rows() {
                assert_eq!(outputs.saved[case.rows.rows() + row], 0.0, "{case:?}");
                for (i, channel) in case.row(row) {
                    assert_eq!(
                        outputs.y[i],
                        inputs.bias[channel],
                        "{} {i} {case:?}",
                        T::NAME
                    );
                }
            }
        }
    }
    check_bias::<f32>(1e6 + 0.3);
    check_bias::<f64>(1e6 + 0.3);
    check_bias::<f16>(3.3);
    check_bias::<bf16>(3.3);
}

#[test]
fn a_large_offset_costs_no_accuracy() {
    for (i, case) in cases().enumerate() {
        let offset = if i % 2 == 0 { 1e6 } else { -1e6 };
        let case = Case { offset, ..case };
        let inputs = Inputs::<f32, f32>::new(&case);
        check(&case, &inputs, &run(&case, &inputs, Schedule::Forward));
    }
}

/// A pivot as far from the others as there can be: the squares around it would lose their digits.
#[test]
fn a_first_value_far_away_costs_no_accuracy() {
    if SANITIZER == Some("thread") {
        return;
    }
    for kind in KINDS {
        let case = Case::new((2, 12, 430, 2), kind);
        let mut inputs = Inputs::<f32, f32>::new(&case);
        for row in 0..case.rows.rows() {
            inputs.x[row * case.rows.len()] = 70.0;
        }
        if case.fits::<f32>() {
            check(&case, &inputs, &run(&case, &inputs, Schedule::Forward));
        }
    }
}

/// Every thread of a row has the same numbers to the last bit, and rounds as the mask of a ReLU will.
#[test]
fn the_output_follows_from_what_is_saved() {
    for case in cases() {
        let case = Case {
            offset: 100.3,
            ..case
        };
        let inputs = Inputs::<f32, f32>::new(&case);
        let outputs = run(&case, &inputs, Schedule::Forward);
        for row in 0..case.rows.rows() {
            let (mean, var) = (outputs.saved[row], outputs.saved[case.rows.rows() + row]);
            let rstd = (1.0 / (var + EPS).sqrt()) as f32;
            let hi = mean as f32;
            for (i, channel) in case.row(row) {
                let centred = (inputs.x[i] - hi) - (mean - f64::from(hi)) as f32;
                let expected =
                    (centred * rstd).mul_add(inputs.weight[channel], inputs.bias[channel]);
                assert_eq!(outputs.y[i].to_bits(), expected.to_bits(), "{i} {case:?}");
            }
        }
    }
}

/// Also where the output is positive only before it is rounded: a bias that alone comes through tells
/// which values the gradient has been let through for.
#[test]
fn a_relu_lets_the_gradient_through_where_the_output_is_positive() {
    for case in cases() {
        let case = Case { relu: true, ..case };
        let mut inputs = Inputs::<f16, f32>::new(&case);
        inputs.weight.fill(1e-8);
        inputs.bias.fill(0.0);
        let outputs = run(&case, &inputs, Schedule::Forward);
        let mut dbias = vec![0.0; case.rows.c];
        for (i, channel) in (0..case.rows.rows()).flat_map(|row| case.row(row)) {
            let y = f32::from(outputs.y[i]);
            assert!((0.0..1e-7).contains(&y), "{y} {case:?}");
            dbias[channel] += if y > 0.0 {
                f64::from(inputs.dy[i])
            } else {
                0.0
            };
        }
        assert!(outputs.y.contains(&f16::ZERO), "{case:?}");
        for (channel, expected) in dbias.into_iter().enumerate() {
            let got = f64::from(outputs.dparams[case.rows.c + channel]);
            assert!(
                (got - expected).abs() < 1e-4,
                "{got} {expected} {channel} {case:?}"
            );
        }
    }
}

#[test]
fn nan_and_infinity_stay_in_their_row() {
    for (which, case) in cases().enumerate() {
        let case = case.with_bits([0b0011, 0b0111, 0b1011][which % 3]);
        let value = [f32::NAN, f32::INFINITY][which % 2];
        let mut inputs = Inputs::<f32, f32>::new(&case);
        let clean = run(&case, &inputs, Schedule::Forward);
        let row = case.rows.rows() / 2;
        let values: Vec<(usize, usize)> = case.row(row).collect();
        inputs.x[values[values.len() / 2].0] = value;
        let dirty = run(&case, &inputs, Schedule::Forward);
        for other in 0..case.rows.rows() {
            for (i, _) in case.row(other) {
                let is = |got: f32, clean: f32| match other == row {
                    true => got.is_nan(),
                    false => got.to_bits() == clean.to_bits(),
                };
                let (y, dx) = (dirty.y[i], dirty.dx[i]);
                // Without a mean, what is finite is divided by infinity.
                let zeroed = other == row && !case.remove_mean && value == f32::INFINITY;
                assert!(zeroed || is(y, clean.y[i]), "{i} {y} {case:?}");
                assert!(zeroed || is(dx, clean.dx[i]), "{i} {dx} {case:?}");
            }
        }
    }
}

/// Parameters that no vector can be read from.
#[test]
fn parameters_may_begin_anywhere() {
    for case in cases() {
        let inputs = Inputs::<bf16, bf16>::new(&case);
        let aligned = run(&case, &inputs, Schedule::Forward);
        let shifted = Inputs {
            skipped: 1,
            ..Inputs::<bf16, bf16>::new(&case)
        };
        let again = run(&case, &shifted, Schedule::Forward);
        assert_eq!(aligned.y, again.y, "{case:?}");
        assert_eq!(aligned.dx, again.dx, "{case:?}");
    }
}

/// For the thread sanitizer, which finds a race in any schedule.
#[test]
fn no_kernel_has_a_race() {
    // Blocks of few threads: the thread sanitizer remembers only some of those that read a value.
    let blocks = [Blocks::Group, Blocks::TwoPasses, Blocks::Cluster];
    for (i, dims) in [(3, 33, 1, 1), (2, 6, 9, 2), (1, 8, 16, 1)]
        .into_iter()
        .enumerate()
    {
        for (kind, channels_last) in [
            (Kind::Lanes(4, 64), false),
            (Kind::Blocks(Blocks::Group, 1, 64), true),
            (Kind::Blocks(blocks[i], 2, 64), false),
        ] {
            let case = Case {
                channels_last,
                ..Case::new(dims, kind).with_bits(0b0111)
            };
            let inputs = Inputs::<f32, f32>::new(&case);
            check(&case, &inputs, &run(&case, &inputs, Schedule::Forward));
        }
    }
}
