//! What kernels may use of CUDA C++, and what a launch refuses.

use kernel_emulator::{launch, Arg, Options, Schedule};

const SCHEDULES: [Schedule; 4] = [
    Schedule::Forward,
    Schedule::Reverse,
    Schedule::Random(5),
    Schedule::Starve(5),
];

fn threads(block: u32, schedule: Schedule) -> Options {
    Options {
        block: [block, 1, 1],
        schedule,
        ..Options::default()
    }
}

#[test]
fn lanes_of_a_warp_exchange_values() {
    // What row `row` of thread `i` should be; `base` is the first thread of its warp.
    let expected = |row: usize, i: i32| {
        let (lane, base) = (i % 32, i / 32 * 32);
        match row {
            0 => base + 5,
            1 => i / 8 * 8 + 5,
            2 if lane >= 3 => i - 3,
            3 if lane % 16 < 13 => i + 3,
            2 | 3 => i,
            4 => i ^ 7,
            5 => 11,
            6 => (base == 32).into(),
            7 => (base == 0).into(),
            8 if lane < 8 => i ^ 1,
            8 => -1,
            9 => (0..8).map(|j| i / 8 * 8 + j).sum(),
            10 => 0b100,
            _ => (base + 1) * 1000,
        }
    };
    for schedule in SCHEDULES {
        let mut y = vec![i32::MIN; 12 * 64];
        // SAFETY: the kernel writes twelve rows of 64 values.
        unsafe {
            launch(
                "warp_exchanges",
                &threads(64, schedule),
                &[Arg::slice_mut(&mut y)],
            )
        }
        .unwrap();
        for (at, &got) in y.iter().enumerate() {
            let (row, i) = (at / 64, at % 64);
            assert_eq!(
                got,
                expected(row, i as i32),
                "row {row} thread {i} {schedule:?}"
            );
        }
    }
}

#[test]
fn threads_of_a_block_vote() {
    for schedule in SCHEDULES {
        let mut y = vec![0i32; 300];
        // SAFETY: the kernel writes three rows of 100 values.
        unsafe {
            launch(
                "block_votes",
                &threads(100, schedule),
                &[Arg::slice_mut(&mut y)],
            )
        }
        .unwrap();
        assert_eq!(y[..100], [34; 100]);
        assert_eq!(y[100..200], [1; 100]);
        assert_eq!(y[200..], [1; 100]);
    }
}

#[test]
fn atomics_add_up() {
    for schedule in SCHEDULES {
        let (mut ints, mut floats, mut longs) = (vec![0i32; 6], vec![0f32; 2], vec![0u64]);
        let options = Options {
            grid: [3, 1, 1],
            ..threads(50, schedule)
        };
        let args = [
            Arg::slice_mut(&mut ints),
            Arg::slice_mut(&mut floats),
            Arg::slice_mut(&mut longs),
        ];
        // SAFETY: the kernel uses six ints, two floats and one long.
        unsafe { launch("atomics", &options, &args) }.unwrap();
        assert_eq!(ints, [150, 149, -149, i32::MAX, 7, -300]);
        assert_eq!((floats, longs), (vec![75.0, 3.0], vec![150 << 33]));
    }
}

/// Even if the thread that the others wait for is the one that is starved.
#[test]
fn waiting_for_memory_to_change_ends() {
    for schedule in SCHEDULES.into_iter().chain((0..12).map(Schedule::Starve)) {
        let x = vec![3f32; 64];
        let (mut y, mut counter) = (vec![0f32; 64], vec![0u32]);
        let args = [
            Arg::slice(&x),
            Arg::slice_mut(&mut y),
            Arg::slice_mut(&mut counter),
        ];
        // SAFETY: the arguments are those of the kernel, which uses 64 values of x and y.
        unsafe { launch("endless_wait_ok", &threads(64, schedule), &args) }.unwrap();
        assert_eq!(y, x);
    }
}

#[test]
fn grids_and_blocks_have_three_dimensions() {
    for schedule in SCHEDULES {
        let (grid, block) = ([2, 3, 2], [3, 2, 4]);
        let mut y = vec![0i32; 12 * 24];
        let options = Options {
            grid,
            block,
            shared_bytes: 24 * 4,
            schedule,
            ..Options::default()
        };
        // SAFETY: the kernel writes 24 values for each of 12 blocks.
        unsafe { launch("indices", &options, &[Arg::slice_mut(&mut y)]) }.unwrap();
        for (at, &got) in y.iter().enumerate() {
            let from = 23 - at % 24;
            let expected = from % 3 + 10 * (from / 3 % 2) + 100 * (from / 6);
            assert_eq!(got, expected as i32, "{at} {schedule:?}");
        }
    }
}

#[test]
fn lanes_that_do_not_exist_give_nan() {
    let mut y = vec![0f32; 12];
    let options = threads(12, Schedule::Forward);
    // SAFETY: the kernel writes a value for each of 12 threads.
    unsafe { launch("partial_warp", &options, &[Arg::slice_mut(&mut y)]) }.unwrap();
    assert_eq!(y[..4], [1.0; 4]);
    assert!(y[4..].iter().all(|v| v.is_nan()));
}

#[track_caller]
fn assert_refused(name: &str, options: Options, args: &[Arg], message: &str) {
    // SAFETY: the launch is refused before the kernel starts.
    let error = unsafe { launch(name, &options, args) }.unwrap_err();
    assert!(error.to_string().contains(message), "{error}");
}

#[test]
fn launches_that_cuda_refuses_are_errors() {
    let mut y = vec![0i32; 64];
    let good = threads(64, Schedule::Forward);
    let votes = |options, message| {
        assert_refused("block_votes", options, &[Arg::null()], message);
    };
    assert_refused("no_such", good, &[], "no_such: unknown kernel; there are");
    let two = [Arg::slice_mut(&mut y), Arg::null()];
    assert_refused("block_votes", good, &two, "takes 1 arguments, got 2");
    let small = [Arg::value(&1i32)];
    assert_refused("block_votes", good, &small, "argument 0 has 8 bytes, got 4");
    votes(threads(1025, Schedule::Forward), "at most 1024 threads");
    votes(threads(0, Schedule::Forward), "at least one");
    let grid = [1, 65536, 1];
    votes(Options { grid, ..good }, "a grid has at most");
    let (grid, cluster) = ([6, 1, 1], [4, 1, 1]);
    let uneven = Options {
        grid,
        cluster,
        ..good
    };
    votes(uneven, "not a multiple of the cluster");
    let cluster = [16, 1, 1];
    votes(Options { cluster, ..good }, "a cluster has at most 8");
    let shared_bytes = 228 << 10;
    let large = Options {
        shared_bytes,
        ..good
    };
    votes(large, "227 KiB of shared memory");
}

#[test]
fn the_barrier_of_a_grid_needs_a_cooperative_launch() {
    let x = vec![0f32; 64];
    let (mut y, mut counter) = (vec![0f32; 1024], vec![0u32]);
    let args = [
        Arg::slice(&x),
        Arg::slice_mut(&mut y),
        Arg::slice_mut(&mut counter),
    ];
    let options = threads(64, Schedule::Forward);
    // SAFETY: the arguments are those of the kernel, which uses 64 values of x and 576 of y.
    let error = unsafe { launch("missing_grid_sync_ok", &options, &args) }.unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("grid_group::sync (groups.cu:"),
        "{message}"
    );
    assert!(message.contains("not cooperative"), "{message}");
}
