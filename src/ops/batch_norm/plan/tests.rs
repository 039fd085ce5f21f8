//! The planner's answers, against what a kernel can do and what was wanted.

use super::tile::{MOST_CHANNELS, MOST_COLUMNS};
use super::*;

const SIZES: [(usize, usize, usize); 24] = [
    (1, 1, 2),
    (2, 1, 1),
    (64, 256, 1),
    (4096, 1024, 1),
    (4096, 1025, 1),
    (100_000, 3, 1),
    (64, 64, 3136),
    (256, 64, 3136),
    (256, 256, 196),
    (256, 512, 49),
    (256, 511, 49),
    (7, 2, 511),
    (32, 64, 12544),
    (256, 64, 12544),
    (16, 128, 16384),
    (20, 6, 65536),
    (32, 65, 10000),
    (4, 128, 1 << 20),
    (3, 65537, 11025),
    (1, 1, (1 << 32) + 1),
    (1 << 33, 1, 1),
    (2, 5, 225),
    (3, 7, 2),
    (5, 1000, 255),
];

fn plans() -> impl Iterator<Item = (Dims, usize, Limits, Plan)> {
    SIZES.into_iter().flat_map(|(n, c, s)| {
        [2, 4, 8].into_iter().flat_map(move |bytes| {
            [Limits::H100, Limits::A100]
                .into_iter()
                .flat_map(move |limits| {
                    let directions = [Direction::Forward, Direction::Backward];
                    directions.into_iter().flat_map(move |direction| {
                        let dims = Dims { n, c, s };
                        [
                            Plan::new(dims, bytes, direction, &limits),
                            Plan::two_passes(dims, bytes, direction, &limits),
                        ]
                        .map(|plan| (dims, bytes, limits, plan))
                    })
                })
        })
    })
}

/// The parts that the kernels make of a tensor (Tile and Walk of kernels/tiles.cuh) cover it.
#[test]
fn every_value_has_a_block() {
    for (dims, bytes, _, plan) in plans() {
        let tiles = dims.c.div_ceil(plan.channels);
        let v = plan.layout.vector(bytes);
        let has_one_channel = matches!(plan.layout, Layout::Planes | Layout::Ragged);
        let all = match plan.layout {
            Layout::Planes => dims.n * dims.s / v,
            Layout::Ragged => dims.n * (dims.s + 2 * v - 2).div_euclid(v),
            _ => dims.n,
        };
        assert!(plan.part * plan.splits >= all, "{dims:?} {plan:?}");
        assert_eq!(plan.grid % plan.splits, 0, "{dims:?} {plan:?}");
        match plan.is_cooperative() {
            true => assert!(
                (1..=tiles).contains(&(plan.grid / plan.splits)),
                "{dims:?} {plan:?}"
            ),
            false => assert_eq!(plan.grid, tiles * plan.splits, "{dims:?} {plan:?}"),
        }
        if has_one_channel {
            assert_eq!(plan.channels, 1);
            continue;
        }
        assert!(plan.channels <= MOST_CHANNELS && plan.channels <= plan.threads);
        assert!(plan.channels * dims.s <= MOST_COLUMNS, "{dims:?} {plan:?}");
        // Every tile begins and ends with a whole vector, in every row.
        assert!(
            (plan.channels * dims.s).is_multiple_of(v),
            "{dims:?} {plan:?}"
        );
        assert!((dims.c * dims.s).is_multiple_of(v), "{dims:?} {plan:?}");
        assert!(
            plan.channels * dims.s / v <= plan.threads,
            "{dims:?} {plan:?}"
        );
    }
}

#[test]
fn what_is_kept_fits_and_waits_for_blocks_that_run() {
    for (dims, _, limits, plan) in plans() {
        let block = plan.shared_bytes + plan.layout.static_shared_bytes();
        assert!(block <= limits.shared_per_block, "{dims:?} {plan:?}");
        assert!(plan.fits(&limits), "{dims:?} {plan:?}");
        if plan.is_cooperative() {
            let of_a_multiprocessor = limits.shared_per_multiprocessor / (block + RESERVED);
            // Kernels of up to 128 registers: 512 threads on a multiprocessor.
            let at_once = of_a_multiprocessor.min(512 / plan.threads) * limits.multiprocessors;
            assert!(plan.grid <= at_once, "{dims:?} {plan:?}");
        }
        assert!(plan.blocks != Blocks::Cluster || limits.clusters);
        assert!(plan.splits <= 8 || plan.blocks != Blocks::Cluster);
    }
}

/// The shapes that are to be read once: docs/kernels.md has them all.
#[test]
fn slices_that_fit_are_read_once() {
    for (n, c, s, bytes) in [
        (64, 256, 1, 4),
        (4096, 1024, 1, 4),
        (4096, 1024, 1, 2),
        (64, 64, 3136, 4),
        (256, 64, 3136, 4),
        (256, 64, 3136, 2),
        (256, 256, 196, 4),
        (256, 256, 196, 2),
        (256, 512, 49, 4),
        (256, 512, 49, 2),
        (32, 64, 12544, 4),
        (256, 64, 12544, 4),
        (16, 128, 16384, 4),
        (20, 6, 65536, 4),
    ] {
        let dims = Dims { n, c, s };
        let size = dims.numel() * bytes;
        let moved = |direction| Plan::new(dims, bytes, direction, &Limits::H100).dram_bytes;
        assert_eq!(moved(Direction::Forward), 2 * size, "{dims:?}");
        assert_eq!(moved(Direction::Backward), 3 * size, "{dims:?}");
    }
}

#[test]
fn what_fits_nowhere_is_read_twice() {
    let dims = Dims {
        n: 4096,
        c: 64,
        s: 12544,
    };
    let plan = |direction| Plan::new(dims, 4, direction, &Limits::H100);
    assert_eq!(plan(Direction::Forward).blocks, Blocks::TwoPasses);
    assert_eq!(plan(Direction::Backward).dram_bytes, 5 * dims.numel() * 4);
}

#[test]
fn layouts() {
    let layout = |n, c, s, bytes| {
        let plan = Plan::new(Dims { n, c, s }, bytes, Direction::Forward, &Limits::H100);
        (plan.layout, plan.channels)
    };
    assert_eq!(layout(64, 256, 1, 4), (Layout::Columns, 32));
    assert_eq!(layout(64, 256, 1, 2), (Layout::Columns, 64));
    assert_eq!(layout(64, 255, 1, 4), (Layout::Odd, 32));
    assert_eq!(layout(256, 512, 49, 4), (Layout::Columns, 4)); // 784 bytes in a row
    assert_eq!(layout(256, 512, 49, 2), (Layout::Columns, 8));
    assert_eq!(layout(256, 511, 49, 4), (Layout::Odd, 5));
    assert_eq!(layout(256, 256, 196, 4), (Layout::Planes, 1));
    assert_eq!(layout(256, 256, 196, 2), (Layout::Columns, 2));
    assert_eq!(layout(32, 65, 10000, 4), (Layout::Planes, 1));
    assert_eq!(layout(2, 2, 1025, 4), (Layout::Ragged, 1));
}

#[test]
fn few_channels_are_shared_by_many_blocks_and_many_by_none() {
    let splits = |n, c, s| {
        let dims = Dims { n, c, s };
        Plan::two_passes(dims, 4, Direction::Forward, &Limits::H100).splits
    };
    assert_eq!(splits(20, 6, 65536), 176);
    assert_eq!(splits(8, 2048, 64), 1);
    assert_eq!(splits(2, 1, 2), 1);
}
