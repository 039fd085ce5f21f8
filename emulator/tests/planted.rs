//! Mistakes that the emulator has to find, and the same kernels without them.
//!
//! Each kernel runs in a process of its own, since a sanitizer ends the process. What finds a
//! mistake is fixed here: the plain build, or one of the sanitizers.

use std::env;
use std::process::{Command, Output};

use kernel_emulator::{launch, Arg, Options, Schedule, SANITIZER};

/// How a mistake shows.
enum Found {
    /// An error of the launch.
    Error(&'static str),
    /// A result that differs from that of the right kernel.
    WrongResult,
    /// A report of a sanitizer.
    Report(&'static str),
}
use Found::{Error, Report, WrongResult};

const RACE: Found = Report("WARNING: ThreadSanitizer: data race");

/// A kernel of tests/kernels, and what finds its mistake in which build.
type Planted = (&'static str, &'static [(Option<&'static str>, Found)]);

const PLAIN: Option<&str> = None;
const ADDRESS: Option<&str> = Some("address");
const UNDEFINED: Option<&str> = Some("undefined");
const THREAD: Option<&str> = Some("thread");

const PLANTED: &[Planted] = &[
    (
        "missing_barrier_raw",
        &[(PLAIN, WrongResult), (THREAD, RACE)],
    ),
    ("missing_barrier_war", &[(THREAD, RACE)]),
    ("missing_syncwarp", &[(PLAIN, WrongResult), (THREAD, RACE)]),
    (
        "barrier_in_branch",
        &[(PLAIN, Error("__syncthreads (barriers.cu:"))],
    ),
    (
        "two_barriers",
        &[(PLAIN, Error("two different barriers in one block"))],
    ),
    (
        "shuffle_in_branch",
        &[(PLAIN, Error("divergence in a warp"))],
    ),
    (
        "deadlock",
        &[(
            PLAIN,
            Error("lanes 0000ffff: waits in __syncwarp (barriers.cu:"),
        )],
    ),
    (
        "endless_wait",
        &[(
            PLAIN,
            Error("no progress: waits for memory to change in atomicAdd"),
        )],
    ),
    (
        "global_out_of_range",
        &[(ADDRESS, Report("heap-buffer-overflow"))],
    ),
    (
        "shared_out_of_range",
        &[
            (PLAIN, Error("shared memory out of range, behind values")),
            (ADDRESS, Report("use-after-poison")),
            (UNDEFINED, Report("index 64 out of bounds for type")),
        ],
    ),
    (
        "dynamic_out_of_range",
        &[(PLAIN, WrongResult), (ADDRESS, Report("use-after-poison"))],
    ),
    ("unwritten_shared", &[(PLAIN, WrongResult)]),
    (
        "too_much_shared",
        &[(PLAIN, Error("no room for values in shared memory"))],
    ),
    ("sum_without_atomic", &[(THREAD, RACE)]),
    (
        "index_overflow",
        &[(UNDEFINED, Report("signed integer overflow"))],
    ),
    ("missing_fence", &[(THREAD, RACE)]),
    (
        "missing_cluster_sync",
        &[(PLAIN, WrongResult), (THREAD, RACE)],
    ),
    ("missing_last_cluster_sync", &[(THREAD, RACE)]),
    ("missing_grid_sync", &[(PLAIN, WrongResult), (THREAD, RACE)]),
];

/// Runs `name` in another process; what it prints ends with a line about the result or an error.
fn run(name: &str, schedule: &str) -> Output {
    Command::new(env::current_exe().unwrap())
        .args(["one_kernel", "--exact", "--ignored", "--nocapture"])
        .env("PLANTED_KERNEL", name)
        .env("PLANTED_SCHEDULE", schedule)
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    let of = String::from_utf8_lossy;
    format!("{}{}", of(&output.stdout), of(&output.stderr))
}

/// The line that begins with `result` or `error`.
fn outcome(text: &str) -> &str {
    let outcome = |line: &&str| line.starts_with("result") || line.starts_with("error");
    text.lines().find(outcome).unwrap_or("")
}

#[test]
#[ignore = "the other process of the tests below"]
fn one_kernel() {
    let Ok(name) = env::var("PLANTED_KERNEL") else {
        return;
    };
    let schedule = match env::var("PLANTED_SCHEDULE").as_deref() {
        Ok("reverse") => Schedule::Reverse,
        Ok("random") => Schedule::Random(7),
        Ok("starve") => Schedule::Starve(7),
        _ => Schedule::Forward,
    };
    let x: Vec<f32> = (0..1024).map(|i| i as f32 + 1.0).collect();
    let (mut y, mut counter) = (vec![0f32; 1024], vec![0u32]);
    let many_blocks = ["cluster", "grid", "fence"]
        .iter()
        .any(|part| name.contains(part));
    let options = Options {
        grid: [if many_blocks { 4 } else { 1 }, 1, 1],
        block: [64, 1, 1],
        cluster: [if name.contains("cluster") { 2 } else { 1 }, 1, 1],
        shared_bytes: 64 * 4,
        cooperative: name.contains("grid"),
        schedule,
    };
    let args = [
        Arg::slice(&x),
        Arg::slice_mut(&mut y),
        Arg::slice_mut(&mut counter),
    ];
    println!();
    // SAFETY: the arguments are those of PLANTED in tests/kernels/planted.cuh. One kernel reads
    // four bytes more than there are, on purpose; those belong to the allocator and are not used.
    match unsafe { launch(&name, &options, &args) } {
        Ok(()) => println!("result {y:?}"),
        Err(error) => println!("error {}", error.to_string().replace('\n', " ")),
    }
}

#[test]
fn mistakes_are_found() {
    for (name, finds) in PLANTED {
        for (_, found) in finds.iter().filter(|(build, _)| *build == SANITIZER) {
            let output = run(&format!("{name}_bug"), "forward");
            let text = text(&output);
            match found {
                Error(message) => {
                    let outcome = outcome(&text);
                    assert!(outcome.starts_with("error"), "{name}: {text}");
                    assert!(outcome.contains(message), "{name}: {text}");
                }
                Report(message) => {
                    assert!(!output.status.success(), "{name}: {text}");
                    assert!(text.contains(message), "{name}: {text}");
                    // With the line of the kernel.
                    assert!(text.contains(".cu:"), "{name}: {text}");
                }
                WrongResult => {
                    let right = self::text(&run(&format!("{name}_ok"), "forward"));
                    let (got, right) = (outcome(&text), outcome(&right));
                    assert!(got.starts_with("result"), "{name}: {text}");
                    assert_ne!(got, right, "{name}");
                }
            }
        }
    }
}

#[test]
fn right_kernels_pass() {
    for (name, _) in PLANTED {
        let mut first = None;
        for schedule in ["forward", "reverse", "random", "starve"] {
            let output = run(&format!("{name}_ok"), schedule);
            let text = text(&output);
            assert!(output.status.success(), "{name} {schedule}: {text}");
            let result = outcome(&text).to_string();
            assert!(result.starts_with("result"), "{name} {schedule}: {text}");
            assert_eq!(
                *first.get_or_insert(result.clone()),
                result,
                "{name} {schedule}"
            );
        }
    }
}
