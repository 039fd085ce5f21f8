//! The planner's answers, against what a kernel can do and what was wanted.

use super::*;

/// `[n, c, s]` and groups.
const SIZES: [(usize, usize, usize, usize); 22] = [
    (1, 1, 1, 1),
    (5, 2, 1, 1),
    (1, 7, 1, 1),
    (4096, 1024, 1, 1),
    (8, 1024, 1, 1),
    (8, 1000, 1, 1),
    (16 * 512, 768, 1, 1),
    (64, 4099, 1, 1),
    (2, 1 << 26, 1, 1),
    (1, (1 << 32) + 1, 1, 1),
    (1 << 31, 4, 1, 1),
    (100_000, 3, 1, 1),
    (32, 64, 3136, 1),
    (32, 64, 3136, 8),
    (32, 64, 3136, 64),
    (256, 512, 49, 32),
    (256, 512, 49, 512),
    (3, 24, 5, 3),
    (2, 9, 225, 9),
    (1, 6, 1 << 24, 2),
    (7, 12, 1, 4),
    (4, 1280, 64 * 64, 32),
];

fn plans() -> impl Iterator<Item = (Limits, usize, RowPlan)> {
    let sizes_and_bytes = SIZES
        .into_iter()
        .flat_map(|size| [2, 4, 8].map(|bytes| (size, bytes)));
    sizes_and_bytes.flat_map(|((n, c, s, groups), bytes)| {
        let rows = Rows { n, groups, c, s };
        let limits = [Limits::H100, Limits::A100];
        limits.into_iter().flat_map(move |limits| {
            let ways = [Direction::Forward, Direction::Backward];
            ways.into_iter().flat_map(move |way| {
                [false, true].into_iter().flat_map(move |last| {
                    let chosen = RowPlan::new(rows, last, bytes, way, &limits);
                    let any = RowPlan::two_passes(rows, last, bytes, way, &limits);
                    [chosen, any].map(|plan| (limits, bytes, plan))
                })
            })
        })
    })
}

/// The parts that the kernels make of a row (Tile and Walk of kernels/tiles.cuh) cover it.
#[test]
fn every_value_has_a_thread() {
    for (_, bytes, plan) in plans() {
        let (rows, v) = (plan.rows, 16 / bytes);
        let width = match plan.channels_last {
            false => rows.len(),
            true => rows.channels(),
        };
        let vectors = match plan.plan.layout {
            plan::Layout::Planes => {
                assert_eq!(width % v, 0, "{plan:?}");
                rows.len() / v
            }
            // One more where a line begins with the last value of a vector.
            plan::Layout::Ragged => rows.len() / width * (1 + (width + v - 2) / v),
            layout => panic!("{layout:?}"),
        };
        assert!(plan.plan.part * plan.plan.splits >= vectors, "{plan:?}");
        match plan.lanes {
            Some(lanes) => {
                assert!(lanes.is_power_of_two() && lanes <= WARP, "{plan:?}");
                let at_once = plan.plan.threads / lanes;
                assert_eq!(plan.plan.grid, rows.rows().div_ceil(at_once), "{plan:?}");
                assert_eq!(plan.plan.splits, 1);
            }
            None if plan.plan.is_cooperative() => {
                assert_eq!(plan.plan.grid % plan.plan.splits, 0, "{plan:?}");
                assert!(plan.plan.grid / plan.plan.splits <= rows.rows(), "{plan:?}");
            }
            None => assert_eq!(plan.plan.grid, rows.rows() * plan.plan.splits, "{plan:?}"),
        }
    }
}

/// Each thread keeps the vectors that it takes, and a block has the room for them.
#[test]
fn what_is_kept_fits() {
    for (limits, _, plan) in plans() {
        assert!(plan.plan.fits(&limits), "{plan:?}");
        let kept = match (plan.plan.blocks, plan.plan.direction) {
            (Blocks::TwoPasses, _) => 0,
            (_, Direction::Forward) => 16,
            (_, Direction::Backward) => 32,
        };
        let width = plan.lanes.unwrap_or(plan.plan.threads);
        let vectors_of_a_thread = plan.plan.part.div_ceil(width);
        let bytes = vectors_of_a_thread * plan.plan.threads * kept;
        assert_eq!(plan.plan.shared_bytes, bytes, "{plan:?}");
    }
}

fn chosen((n, c, s, groups): (usize, usize, usize, usize), bytes: usize) -> RowPlan {
    let rows = Rows { n, groups, c, s };
    RowPlan::new(rows, false, bytes, Direction::Forward, &Limits::H100)
}

#[test]
fn short_rows_are_shared_by_lanes_and_long_ones_by_blocks() {
    for (size, bytes, lanes) in [
        ((1 << 20, 4, 1, 1), 4, 1),
        ((1 << 20, 32, 1, 1), 4, 8),
        ((1 << 20, 64, 1, 1), 4, 8),
        ((4096, 256, 1, 1), 4, 16),
        ((4096, 1024, 1, 1), 4, 32),
        ((4096, 2048, 1, 1), 2, 32),
        ((256, 512, 49, 512), 4, 8),
    ] {
        assert_eq!(chosen(size, bytes).lanes, Some(lanes), "{size:?}");
    }
    for (size, blocks, splits) in [
        ((8, 1024, 1, 1), Blocks::Group, 1), // few: a block for each
        ((4096, 2048, 1, 1), Blocks::Group, 1),
        ((32, 64, 3136, 8), Blocks::Group, 1),
        ((32, 64, 3136, 2), Blocks::Cluster, 4),
        ((1, 6, 1 << 24, 2), Blocks::TwoPasses, 256),
    ] {
        let plan = chosen(size, 4);
        let found = (plan.lanes, plan.plan.blocks, plan.plan.splits);
        assert_eq!(found, (None, blocks, splits), "{size:?}");
    }
}

/// No order of memory costs a copy: a row's values are found where they are.
#[test]
fn lines_are_what_lies_together() {
    let rows = Rows {
        n: 2,
        groups: 4,
        c: 24,
        s: 9,
    };
    assert_eq!(tile_dims(rows, false), Dims { n: 1, c: 8, s: 54 });
    assert_eq!(tile_dims(rows, true), Dims { n: 9, c: 4, s: 6 });
    let options = options(1e-5, None, false, true);
    for (last, s) in [(false, 9), (true, 1)] {
        let plan = RowPlan::new(rows, last, 4, Direction::Forward, &Limits::H100);
        let problem = plan.problem(&options);
        assert_eq!((problem.rows, problem.channels, problem.s), (8, 6, s));
        assert_eq!(problem.tile.n * problem.tile.s, 54);
        let plan = ParamsPlan::new(rows, last, 4, &Limits::H100);
        let problem = plan.problem(&options);
        assert_eq!(problem.n, (2 * plan.lines()) as i64);
        assert_eq!(problem.n * problem.c * problem.s, rows.numel() as i64);
    }
}
