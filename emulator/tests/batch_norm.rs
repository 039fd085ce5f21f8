//! Every kernel of batch norm, at sizes that divide nothing, against double precision.

mod common;
#[path = "../../src/dims.rs"]
#[allow(dead_code)] // the tests do not use all of it
mod dims;
#[path = "../../src/ops/batch_norm/plan/mod.rs"]
#[allow(dead_code)] // the tests do not use all of it
mod plan;

use common::values::Value;
use common::{reference, run, Case, Inputs, Outputs, KINDS};
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

/// All sizes and kinds, and all of the 128 combinations of options in the course of them.
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
