//! Every kernel of batch norm, at sizes that divide nothing, against double precision.

mod common;
#[path = "../../src/dims.rs"]
mod dims;
#[path = "../../src/ops/batch_norm/plan/mod.rs"]
#[allow(dead_code)] // the tests do not use all of it
mod plan;

use common::values::Value;
use common::{reference, run, Case, Inputs, Outputs};
use half::{bf16, f16};
use kernel_emulator::{launch, Arg, Options, Schedule, SANITIZER};
use plan::Blocks;

const SCHEDULES: [Schedule; 6] = [
    Schedule::Forward,
    Schedule::Reverse,
    Schedule::Random(1),
    Schedule::Random(2),
    Schedule::Starve(1),
    Schedule::Starve(2),
];

fn is_same<T: Value, P: Value>(a: &Outputs<T, P>, b: &Outputs<T, P>) -> bool {
    let of_t = |a: &[T], b: &[T]| a.iter().zip(b).all(|(a, b)| a.bits() == b.bits());
    of_t(&a.y, &b.y)
        && of_t(&a.dx, &b.dx)
        && of_t(&a.dresidual, &b.dresidual)
        && a.dparams
            .iter()
            .zip(&b.dparams)
            .all(|(a, b)| a.bits() == b.bits())
        && a.saved
            .iter()
            .zip(&b.saved)
            .all(|(a, b)| a.bits() == b.bits())
}

/// Right in one schedule, and the same to the last bit in another.
fn check<T: Value, P: Value>(case: Case, which: usize) {
    if SANITIZER == Some("thread") {
        return; // a second for a thousand threads: only `no_kernel_has_a_race` is for it
    }
    let inputs = Inputs::<T, P>::new(&case);
    let schedule = SCHEDULES[which % SCHEDULES.len()];
    let outputs = run(&case, &inputs, schedule);
    reference::check(&case, &inputs, &outputs);
    let other = SCHEDULES[(which + 1) % SCHEDULES.len()];
    let again = run(&case, &inputs, other);
    assert!(is_same(&outputs, &again), "{case:?} {schedule:?} {other:?}");
}

/// Some for each layout, in one dtype or another.
const DIMS: [(usize, usize, usize); 17] = [
    (2, 1, 1),
    (33, 31, 1),
    (37, 36, 1),
    (5, 65, 1),
    (140, 132, 1),
    (1025, 3, 1),
    (3, 5, 31),
    (9, 2, 1025), // several chunks for each thread
    (3, 9, 49),   // planes of 7x7
    (4, 8, 49),
    (5, 12, 49),
    (2, 3, 196), // planes of 14x14
    (1, 1, 9000),
    (3, 2, 256),
    (4, 3, 7),
    (300, 2, 2),
    (2, 5, 259),
];

const KINDS: [(Blocks, usize, usize); 9] = [
    (Blocks::TwoPasses, 1, 256),
    (Blocks::TwoPasses, 3, 512),
    (Blocks::TwoPasses, 7, 256),
    (Blocks::Group, 1, 256),
    (Blocks::Group, 2, 512),
    (Blocks::Group, 5, 256),
    (Blocks::Cluster, 2, 512),
    (Blocks::Cluster, 4, 256),
    (Blocks::Cluster, 8, 256),
];

/// All sizes and kinds, and all of the 64 combinations of options in the course of them.
fn check_all<T: Value, P: Value>() {
    // Sanitizers look at how, not at which numbers.
    let variants = if SANITIZER.is_some() { 1 } else { 3 };
    let mut which = 0;
    for dims in DIMS {
        for kind in KINDS {
            for _ in 0..variants {
                check::<T, P>(Case::new(dims, kind).with_bits(which * 5), which);
                which += 1;
            }
        }
    }
}

#[test]
fn f32_is_right() {
    check_all::<f32, f32>();
}

#[test]
fn f64_is_right() {
    check_all::<f64, f64>();
}

#[test]
fn f16_is_right() {
    check_all::<f16, f32>();
}

#[test]
fn bf16_is_right() {
    check_all::<bf16, f32>();
}

#[test]
fn half_parameters_are_right() {
    check::<f16, f16>(Case::new((3, 5, 31), KINDS[1]), 2);
    check::<bf16, bf16>(Case::new((33, 31, 1), KINDS[4]), 4);
}

#[test]
fn a_large_offset_costs_no_accuracy() {
    for (which, dims) in [(129, 3, 1), (65, 8, 1), (3, 2, 289), (3, 4, 49)]
        .into_iter()
        .enumerate()
    {
        for (kind, offset) in [(KINDS[1], 1e6), (KINDS[4], -1e6), (KINDS[7], 1e6)] {
            let case = Case {
                offset,
                ..Case::new(dims, kind)
            };
            check::<f32, f32>(case, which);
            check::<f64, f64>(case, which);
        }
    }
}

#[test]
fn a_constant_channel_gives_exactly_the_bias() {
    fn check_bias<T: Value>(offset: f64) {
        if SANITIZER == Some("thread") {
            return;
        }
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

/// More blocks than a warp has lanes, and than there are threads to merge the sums of one channel.
#[test]
fn many_blocks_share_a_tile() {
    for (which, dims) in [(1, 1, 10_240), (3, 1, 3401), (1280, 8, 1), (2560, 1, 1)]
        .into_iter()
        .enumerate()
    {
        for blocks in [Blocks::TwoPasses, Blocks::Group] {
            let case = Case::new(dims, (blocks, 40, 64));
            check::<f32, f32>(case.with_bits(0b1011), which);
        }
    }
}

/// A pivot as far from the others as there can be: the squares around it would lose their digits.
#[test]
fn a_first_value_far_away_costs_no_accuracy() {
    if SANITIZER == Some("thread") {
        return;
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
        return;
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
        return;
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
        return;
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
                    true => got.iter().zip(all).all(|(a, b)| a.to_bits() == b.to_bits()),
                };
                assert!(is(wants[0], &some.dx, &all.dx), "{case:?}");
                assert!(is(wants[1], &some.dresidual, &all.dresidual), "{case:?}");
                // Without dx they are made in two passes, in another order.
                let is_close = (some.dparams.iter().zip(&all.dparams))
                    .all(|(a, b)| (a - b).abs() <= 1e-5 * (1.0 + b.abs()));
                assert!(is_close || !wants[2], "{case:?}");
                assert!(wants[2] || is(false, &some.dparams, &[]), "{case:?}");
            }
        }
    }
}

#[test]
fn nan_and_infinity_stay_in_their_channel() {
    if SANITIZER == Some("thread") {
        return;
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

/// For the thread sanitizer, which finds a race in any schedule.
#[test]
fn no_kernel_has_a_race() {
    fn run_small<T: Value>(bits: usize) {
        // Blocks of few threads: the thread sanitizer remembers only some of those that read a value.
        for (i, dims) in [(33, 33, 1), (5, 8, 1), (3, 1, 259), (3, 4, 7)]
            .into_iter()
            .enumerate()
        {
            let blocks = [Blocks::TwoPasses, Blocks::Group, Blocks::Cluster][(i + bits) % 3];
            let case = Case::new(dims, (blocks, 2, 64)).with_bits(bits);
            let inputs = Inputs::<T, f32>::new(&case);
            reference::check(&case, &inputs, &run(&case, &inputs, Schedule::Forward));
        }
    }
    for bits in [0b001111, 0b001010, 0b000011] {
        run_small::<f32>(bits);
        run_small::<f16>(bits);
    }
}

/// Under as many schedules as there is time for.
#[test]
fn no_schedule_changes_a_bit() {
    let seeds = if SANITIZER.is_some() { 1 } else { 20 };
    if SANITIZER == Some("thread") {
        return;
    }
    for (dims, kind) in [
        ((33, 31, 1), KINDS[1]),
        ((3, 2, 49), KINDS[5]),
        ((3, 2, 259), KINDS[6]),
    ] {
        let case = Case::new(dims, kind).with_bits(0b1111);
        let inputs = Inputs::<f32, f32>::new(&case);
        let first = run(&case, &inputs, Schedule::Forward);
        let random = (0..seeds).map(Schedule::Random);
        for schedule in random.chain((0..seeds).map(Schedule::Starve)) {
            let again = run(&case, &inputs, schedule);
            assert!(is_same(&first, &again), "{case:?} {schedule:?}");
        }
    }
}

fn check_running<T: Value>(schedule: Schedule) {
    let c = 300;
    let mut running: Vec<T> = (0..c).map(|i| T::from_f64(i as f64 * 0.5)).collect();
    let new: Vec<f64> = (0..c).map(|i| 7.0 - i as f64).collect();
    let expected: Vec<f64> = (running.iter().zip(&new))
        .map(|(running, new)| 0.75 * running.to_f64() + 0.25 * new)
        .collect();
    let (keep, take, count) = (0.75f64, 0.25f64, c as i64);
    let args = [
        Arg::slice_mut(&mut running),
        Arg::slice(&new),
        Arg::value(&keep),
        Arg::value(&take),
        Arg::value(&count),
    ];
    let options = Options {
        grid: [2, 1, 1],
        block: [256, 1, 1],
        schedule,
        ..Options::default()
    };
    // SAFETY: the arguments are those of bn_running, and both tensors have `count` values.
    unsafe { launch(&format!("bn_running_{}", T::NAME), &options, &args) }.unwrap();
    let got: Vec<f64> = running.iter().map(|v| v.to_f64()).collect();
    assert_eq!(got, expected);
}

#[test]
fn running_statistics_move() {
    for schedule in SCHEDULES {
        check_running::<f32>(schedule);
        check_running::<f64>(schedule);
    }
}
