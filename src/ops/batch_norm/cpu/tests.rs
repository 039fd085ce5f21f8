//! The two orders in which planes are gone through, of which the size of a tensor chooses one: nothing but the time may
//! depend on it.

use half::{bf16, f16};

use super::*;
use crate::ops::batch_norm::cpu::passes::Tiling;
use crate::ops::parallel::threads;
use crate::shape::Dims;

/// Planes in parts, several of them in a part, on one thread and on all; few channels, and so many that each stays with one thread where
/// two passes over it follow each other.
fn sizes() -> [Dims; 3] {
    [(3, 2, 9000), (5, 3, 100), (20, 4 * threads() + 1, 448)].map(|(n, c, s)| Dims { n, c, s })
}

/// Something else for each index, between -2 and 2.
fn values<T>(dims: Dims, step: usize, of: fn(f64) -> T) -> Vec<T> {
    let value = |i: usize| of((i * step % 8191) as f64 / 2048.0 - 2.0);
    (0..dims.numel()).map(value).collect()
}

struct Case {
    dims: Dims,
    training: bool,
    remove_mean: bool,
    activation: Activation,
    has_residual: bool,
    wants: Wants,
}

fn cases() -> Vec<Case> {
    let both = [true, false];
    let wants = |bits: usize| Wants {
        dx: bits & 1 == 0,
        dparams: bits & 2 == 0,
        dresidual: bits & 4 == 0,
    };
    let mut cases = vec![];
    for dims in sizes() {
        for training in both {
            for remove_mean in both {
                for activation in [Activation::Identity, Activation::Relu] {
                    for has_residual in both {
                        cases.extend((0..8).map(|bits| Case {
                            dims,
                            training,
                            remove_mean,
                            activation,
                            has_residual,
                            wants: Wants {
                                dresidual: has_residual && wants(bits).dresidual,
                                ..wants(bits)
                            },
                        }));
                    }
                }
            }
        }
    }
    cases
}

fn check<T: Element + std::fmt::Debug>(of: fn(f64) -> T) {
    cases().iter().for_each(|case| check_case(case, of));
}

fn check_case<T: Element + std::fmt::Debug>(case: &Case, of: fn(f64) -> T) {
    let Dims { c, .. } = case.dims;
    let spec = &Spec {
        dims: case.dims,
        eps: 1e-5,
        activation: case.activation,
        windows: None,
        training: case.training,
        remove_mean: case.remove_mean,
    };
    let params = &Params {
        weight: (0..c).map(|c| 0.5 + c as f64).collect(),
        bias: (0..c).map(|c| 0.1 * c as f64 - 0.2).collect(),
    };
    let [x, dy, residual] = &[37, 53, 29].map(|step| values(case.dims, step, of));
    let residual = case.has_residual.then_some(&residual[..]);
    let job = &Forward {
        spec,
        x,
        params,
        residual,
        given: None,
        keeps_maxima: false,
    };
    let planes = &Planes::new(case.dims);
    let by_channel = passes::forward_training(planes, job);
    let in_order = in_order::forward(job, statistics(spec, x));
    assert!(by_channel.y == in_order.y);
    assert_eq!(by_channel.stats, in_order.stats);
    let job = &Backward {
        spec,
        x,
        dy,
        y: residual.map(|_| &in_order.y[..]),
        maxima: None,
        params,
        saved: &in_order.stats,
        wants: case.wants,
    };
    match (case.activation, residual) {
        (Activation::Identity, _) => check_backward::<T, NoMask>(job),
        (Activation::Relu, None) => check_backward::<T, FromInput>(job),
        (Activation::Relu, Some(_)) => check_backward::<T, FromOutput>(job),
    }
}

fn check_backward<T: Element, M: Mask<T>>(job: &Backward<T>) {
    let by_channel = passes::backward::<_, T, M>(&Planes::new(job.spec.dims), job);
    let dparams = job.wants.sums(job.spec);
    let dparams = dparams.then(|| param_grads_masked::<T, M>(job));
    let in_order = in_order::backward::<T, M>(job, dparams);
    assert_eq!(by_channel.dx.is_some(), job.wants.dx);
    assert!(by_channel.dx == in_order.dx);
    assert_eq!(by_channel.dparams.is_some(), job.wants.dparams);
    assert_eq!(by_channel.dparams, in_order.dparams);
    assert_eq!(by_channel.dresidual.is_some(), job.wants.dresidual);
    assert!(by_channel.dresidual == in_order.dresidual);
}

#[test]
fn f64_is_the_same_in_both_orders() {
    check(|value| value);
}

#[test]
fn f32_is_the_same_in_both_orders() {
    check(|value| value as f32);
}

#[test]
fn half_precision_is_the_same_in_both_orders() {
    check(bf16::from_f64);
    check(f16::from_f64);
}

/// Channel by channel such outputs are written past the caches, here in planes that begin and end within a line: by
/// channels that are few, whose parts are shared by all threads, and by more of them.
#[test]
fn large_tensors_are_the_same_in_both_orders() {
    for (c, s) in [(3, 500_001), (65, 22_003)] {
        let dims = Dims { n: 3, c, s };
        assert!(!cache::holds(2 * dims.numel() * size_of::<f32>()));
        for (training, has_residual) in [(true, true), (true, false), (false, true)] {
            let case = Case {
                dims,
                training,
                remove_mean: true,
                activation: Activation::Relu,
                has_residual,
                wants: Wants {
                    dx: true,
                    dparams: true,
                    dresidual: has_residual,
                },
            };
            check_case(&case, |value| value as f32);
        }
    }
}

/// What is written without a second look: each value is in one run of one tile.
fn check_runs(tiling: &impl Tiling, dims: Dims) {
    let Dims { c, s, .. } = dims;
    let division = tiling.division();
    let mut times = vec![0u8; dims.numel()];
    for index in 0..division.groups * division.parts {
        let tile = division.tile(index);
        let channels = tiling.channels(tile.group);
        let mut values = 0;
        for run in tiling.runs(tile) {
            for i in run {
                times[i] += 1;
                assert!(channels.contains(&(i / s % c)), "{dims:?}: value {i}");
                values += 1;
            }
        }
        let of_channel = tiling.values(tile.part) * tiling.repeats();
        assert_eq!(values, channels.len() * of_channel, "{dims:?}");
    }
    assert!(times.iter().all(|&times| times == 1), "{dims:?}");
}

#[test]
fn each_value_is_in_one_run() {
    let planes = [
        (1, 1, 8191),
        (1, 1, 8192),
        (1, 1, 81_919),
        (1, 1, 81_920),
        (63, 2, 784),
        (64, 2, 784),
        (65, 2, 784),
        (127, 2, 700),
        (128, 33, 64),
        (9, 1, 12_544),
        (15, 5, 3000),
        (16, 70, 1024),
    ];
    for (n, c, s) in planes {
        let dims = Dims { n, c, s };
        check_runs(&Planes::new(dims), dims);
    }
    for (n, c, s) in [(1, 1, 1), (63, 257, 1), (65, 1025, 1), (200, 70, 49)] {
        let dims = Dims { n, c, s };
        check_runs(&Columns::new(dims), dims);
    }
}
