//! Every kernel of row norms, at sizes that divide nothing, against double precision.

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
mod values;

/// As the planner of rows knows the planner of tiles.
mod ops {
    pub(crate) use crate::plan;
}

use half::{bf16, f16};
use kernel_emulator::{Schedule, SANITIZER};
use plan::Blocks;
use row_plan::Kind;
use rows::{check, run, Case, Inputs, Outputs};
use values::Value;

const SCHEDULES: [Schedule; 5] = [
    Schedule::Forward,
    Schedule::Reverse,
    Schedule::Random(1),
    Schedule::Random(2),
    Schedule::Starve(1),
];

const KINDS: [Kind; 9] = [
    Kind::Lanes(1, 32),
    Kind::Lanes(8, 64),
    Kind::Lanes(32, 64),
    Kind::Blocks(Blocks::Group, 1, 128),
    Kind::Blocks(Blocks::Group, 3, 64),
    Kind::Blocks(Blocks::Cluster, 2, 64),
    Kind::Blocks(Blocks::Cluster, 8, 32),
    Kind::Blocks(Blocks::TwoPasses, 1, 128),
    Kind::Blocks(Blocks::TwoPasses, 4, 64),
];

/// `[n, c, s]` and groups.
const SIZES: [(usize, usize, usize, usize); 19] = [
    (5, 1, 1, 1),
    (35, 2, 1, 1),
    (33, 7, 1, 1),
    (9, 31, 1, 1),
    (9, 32, 1, 1),
    (9, 33, 1, 1),
    (3, 1000, 1, 1),
    (3, 1024, 1, 1),
    (2, 4099, 1, 1),
    (3, 12, 1, 3),
    (3, 24, 5, 3),
    (2, 6, 49, 3),
    (2, 6, 49, 6),
    (2, 12, 49, 1),
    (2, 16, 64, 2),
    (2, 3, 64, 3),
    (2, 9, 5, 9),
    (3, 8, 2, 1),
    (1, 2, 1030, 2),
];

fn is_same<T: Value, P: Value>(a: &Outputs<T, P>, b: &Outputs<T, P>) -> bool {
    fn is<V: Value>(a: &[V], b: &[V]) -> bool {
        a.iter().zip(b).all(|(a, b)| a.bits() == b.bits())
    }
    is(&a.y, &b.y) && is(&a.saved, &b.saved) && is(&a.dx, &b.dx) && is(&a.dparams, &b.dparams)
}

/// Right in one schedule, and every other time the same to the last bit in another.
fn check_in_schedules<T: Value, P: Value>(case: Case, which: usize) {
    let inputs = Inputs::<T, P>::new(&case);
    let schedule = SCHEDULES[which % SCHEDULES.len()];
    let outputs = run(&case, &inputs, schedule);
    check(&case, &inputs, &outputs);
    if which % 2 == 1 {
        return;
    }
    let other = SCHEDULES[(which + 1) % SCHEDULES.len()];
    let again = run(&case, &inputs, other);
    assert!(is_same(&outputs, &again), "{case:?} {schedule:?} {other:?}");
}

/// All combinations of options in the course of the sizes, kinds and orders of memory. Of these each of the
/// four dtypes has a quarter; `dtype` says which.
fn check_all<T: Value, P: Value>(dtype: usize) {
    if SANITIZER == Some("thread") {
        return; // a second for a thousand threads: only `no_kernel_has_a_race` is for it
    }
    // Sanitizers look at how, not at which numbers.
    let share = if SANITIZER.is_some() { 12 } else { 4 };
    let mut which = dtype;
    for (i, dims) in SIZES.into_iter().enumerate() {
        for (j, kind) in KINDS.into_iter().enumerate() {
            for channels_last in [false, true] {
                let case = Case {
                    channels_last,
                    ..Case::new(dims, kind)
                };
                let at = i + 2 * j + usize::from(channels_last) + dtype;
                let is_mine = at % share == share - 1;
                if is_mine && case.fits::<T>() {
                    check_in_schedules::<T, P>(case.with_bits(which * 5), which);
                    which += 1;
                }
            }
        }
    }
}

#[test]
fn f32_is_right() {
    check_all::<f32, f32>(0);
}

#[test]
fn f64_is_right() {
    check_all::<f64, f64>(1);
}

#[test]
fn f16_is_right() {
    check_all::<f16, f32>(2);
}

#[test]
fn bf16_is_right() {
    check_all::<bf16, f32>(3);
}

#[test]
fn half_parameters_are_right() {
    if SANITIZER == Some("thread") {
        return;
    }
    for (which, dims) in [(9, 32, 1, 1), (9, 31, 1, 1), (2, 6, 49, 3)]
        .into_iter()
        .enumerate()
    {
        check_in_schedules::<f16, f16>(Case::new(dims, KINDS[1]).with_bits(0b0111), which);
        check_in_schedules::<bf16, bf16>(Case::new(dims, KINDS[3]).with_bits(0b0111), which);
    }
}
