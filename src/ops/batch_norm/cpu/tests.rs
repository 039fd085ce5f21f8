//! The orders in which a tensor may be gone through, of which its size chooses one.

use super::*;
use crate::shape::Dims;

/// Something else for each index, between -2 and 2.
fn values(len: usize, step: usize) -> Vec<f32> {
    let value = |i: usize| (i * step % 8191) as f32 / 2048.0 - 2.0;
    (0..len).map(value).collect()
}

fn assert_close(ours: &[f32], truth: &[f32]) {
    assert_eq!(ours.len(), truth.len());
    for (i, (ours, truth)) in ours.iter().zip(truth).enumerate() {
        assert!((ours - truth).abs() <= 1e-6, "{i}: {ours}, not {truth}");
    }
}

/// Planes in parts, several of them in a part, on one thread and on all.
const SIZES: [Dims; 3] = [
    Dims {
        n: 3,
        c: 2,
        s: 9000,
    },
    Dims { n: 5, c: 3, s: 100 },
    Dims {
        n: 20,
        c: 7,
        s: 784,
    },
];

fn spec(dims: Dims, training: bool) -> Spec {
    Spec {
        dims,
        eps: 1e-5,
        activation: Activation::Relu,
        windows: None,
        training,
        remove_mean: true,
    }
}

fn params(c: usize) -> Params {
    Params {
        weight: (0..c).map(|c| 0.5 + c as f64).collect(),
        bias: (0..c).map(|c| 0.1 * c as f64 - 0.2).collect(),
    }
}

#[test]
fn channel_by_channel_is_as_in_order() {
    for dims in SIZES {
        let (spec, params) = (&spec(dims, true), &params(dims.c));
        let (x, dy) = (&values(dims.numel(), 37), &values(dims.numel(), 53));
        let residual = values(dims.numel(), 29);
        for residual in [None, Some(&residual[..])] {
            let job = &Forward {
                spec,
                x,
                params,
                residual,
                given: None,
                keeps_maxima: false,
            };
            let by_channel = passes::forward_training(&Planes(dims), job);
            let in_order = in_order::forward(job, statistics(spec, x));
            assert_eq!(by_channel.y, in_order.y);
            assert_eq!(by_channel.stats, in_order.stats);
            let job = &Backward {
                spec,
                x,
                dy,
                y: residual.map(|_| &in_order.y[..]),
                maxima: None,
                params,
                saved: &in_order.stats,
                wants: Wants {
                    dx: true,
                    dparams: true,
                    dresidual: residual.is_some(),
                },
            };
            match residual {
                None => backward_in_both_orders::<FromInput>(job),
                Some(_) => backward_in_both_orders::<FromOutput>(job),
            }
        }
    }
}

fn backward_in_both_orders<M: Mask<f32>>(job: &Backward<f32>) {
    let planes = Planes(job.spec.dims);
    let by_channel = passes::backward::<_, _, M>(&planes, job);
    let in_order = in_order::backward::<_, M>(job, sums::<_, _, M>(&planes, job));
    let dx = |grads: &Grads<f32>| grads.dx.clone().expect("dx");
    assert_close(&dx(&by_channel), &dx(&in_order));
    assert_eq!(by_channel.dparams, in_order.dparams);
    assert_eq!(by_channel.dresidual, in_order.dresidual);
}

#[test]
fn with_given_statistics_too() {
    let dims = SIZES[0];
    let (spec, params) = (&spec(dims, false), &params(dims.c));
    let (x, dy) = (&values(dims.numel(), 37), &values(dims.numel(), 53));
    for (dparams, saved) in [(false, [0.1, -0.3, 1.5, 0.7]), (true, [0.0, 2.0, 0.2, 3.0])] {
        backward_in_both_orders::<FromInput>(&Backward {
            spec,
            x,
            dy,
            y: None,
            maxima: None,
            params,
            saved: &saved,
            wants: Wants {
                dx: true,
                dparams,
                dresidual: false,
            },
        });
    }
}
