//! Which kernels run for a shape, and how they are launched: the planner's answers, on any machine.
//!
//! ```bash
//! cargo run --example launch_plans                              # a table for an H100
//! cargo run --example launch_plans -- --shapes 8,64,56,56 --dtypes bf16 --device a100
//! cargo run --example launch_plans -- --json                    # for scripts/gpu_bench.py
//! ```

use candle_batch_norm::ops::plan::{
    Blocks, DTypeCode, Dims, Direction, Limits, Options, Plan, Problem,
};
use clap::{Parser, ValueEnum};
use serde_json::{json, Value};

/// Shows which CUDA kernels run for a shape.
#[derive(Parser)]
struct Args {
    /// Shapes such as 64,256 or 32,64,56,56: channels second. Without, those of docs/kernels.md.
    #[arg(long, num_args = 1.., value_parser = shape)]
    shapes: Vec<Vec<usize>>,
    #[arg(long, num_args = 1.., value_enum, default_values = ["f32", "bf16"])]
    dtypes: Vec<DType>,
    #[arg(long, value_enum, default_value = "h100")]
    device: Device,
    /// Everything that a launch needs, and other ways to launch as well.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum DType {
    F32,
    F64,
    F16,
    Bf16,
}

impl DType {
    /// Its name in those of kernels, its bytes, and its code.
    fn all(self) -> (&'static str, usize, DTypeCode) {
        match self {
            Self::F32 => ("f32", 4, DTypeCode::F32),
            Self::F64 => ("f64", 8, DTypeCode::F64),
            Self::F16 => ("f16", 2, DTypeCode::F16),
            Self::Bf16 => ("bf16", 2, DTypeCode::BF16),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum Device {
    H100,
    A100,
}

impl Device {
    fn limits(self) -> Limits {
        match self {
            Self::H100 => Limits::H100,
            Self::A100 => Limits::A100,
        }
    }
}

const SHAPES: [&[usize]; 13] = [
    &[64, 256],
    &[4096, 1024],
    &[64, 64, 56, 56],
    &[256, 64, 56, 56],
    &[256, 256, 14, 14],
    &[256, 512, 7, 7],
    &[32, 64, 112, 112],
    &[256, 64, 112, 112],
    &[16, 128, 128, 128],
    &[20, 6, 65536],
    &[32, 65, 100, 100],
    &[4, 128, 1024, 1024],
    &[3, 65537, 105, 105],
];

fn shape(text: &str) -> Result<Vec<usize>, String> {
    let sizes: Result<Vec<usize>, _> = text.split(',').map(str::parse).collect();
    match sizes {
        Ok(sizes) if sizes.len() >= 2 && !sizes.contains(&0) => Ok(sizes),
        _ => Err(format!(
            "expected two sizes above 0 or more, such as 64,256, got {text:?}"
        )),
    }
}

fn dims_of(shape: &[usize]) -> Dims {
    Dims {
        n: shape[0],
        c: shape[1],
        s: shape[2..].iter().product(),
    }
}

fn main() {
    let args = Args::parse();
    let shapes = match args.shapes.is_empty() {
        true => SHAPES.map(<[usize]>::to_vec).to_vec(),
        false => args.shapes.clone(),
    };
    let limits = args.device.limits();
    let cases = shapes.iter().flat_map(|shape| {
        let dtypes = args.dtypes.iter();
        dtypes.map(move |dtype| (shape, *dtype))
    });
    if args.json {
        let cases: Vec<Value> = cases
            .map(|(shape, dtype)| case(shape, dtype, &limits))
            .collect();
        println!("{:#}", Value::from(cases));
        return;
    }
    println!("| shape | dtype | forward | of the floor | backward | of the floor |");
    println!("|---|---|---|---:|---|---:|");
    for (shape, dtype) in cases {
        let (name, bytes, _) = dtype.all();
        let cells = [Direction::Forward, Direction::Backward].map(|direction| {
            let plan = Plan::new(dims_of(shape), bytes, direction, &limits);
            format!("{} | {}", describe(&plan), share(&plan, shape, bytes))
        });
        println!("| {shape:?} | {name} | {} |", cells.join(" | "));
    }
}

fn describe(plan: &Plan) -> String {
    let layout = plan.layout.name();
    match plan.blocks {
        Blocks::TwoPasses => format!("{layout}, two passes, {} blocks", plan.grid),
        Blocks::Group if plan.splits == 1 => format!(
            "{layout}, one block a tile, {} blocks of {} KiB",
            plan.grid,
            plan.shared_bytes >> 10
        ),
        Blocks::Group => format!(
            "{layout}, groups of {}, {} blocks of {} KiB",
            plan.splits,
            plan.grid,
            plan.shared_bytes >> 10
        ),
        Blocks::Cluster => format!(
            "{layout}, clusters of {}, {} blocks of {} KiB",
            plan.splits,
            plan.grid,
            plan.shared_bytes >> 10
        ),
    }
}

/// The bytes that have to be moved at least, to those that the plan moves.
fn share(plan: &Plan, shape: &[usize], bytes: usize) -> String {
    let passes = match plan.direction {
        Direction::Forward => 2,
        Direction::Backward => 3,
    };
    let floor = passes * dims_of(shape).numel() * bytes;
    format!("{} %", 100 * floor / plan.dram_bytes)
}

/// The plan of each direction, and the other ways that would fit.
fn case(shape: &[usize], dtype: DType, limits: &Limits) -> Value {
    let (name, bytes, code) = dtype.all();
    let dims = dims_of(shape);
    let of = |direction| {
        let chosen = Plan::new(dims, bytes, direction, limits);
        let mut plans = vec![chosen];
        plans.push(Plan::two_passes(dims, bytes, direction, limits));
        let portable = Limits {
            clusters: false,
            ..*limits
        };
        plans.push(Plan::new(dims, bytes, direction, &portable));
        for splits in [1, 2, 4, 8] {
            for threads in [256, 512] {
                let kind = match splits {
                    1 => Blocks::Group,
                    _ => Blocks::Cluster,
                };
                let plan = Plan::of_kind(dims, bytes, direction, (kind, splits, threads));
                if plan.fits(limits) && limits.clusters {
                    plans.push(plan);
                }
            }
        }
        let mut different: Vec<Plan> = vec![];
        for plan in plans {
            if !different.contains(&plan) {
                different.push(plan);
            }
        }
        let plans = different.iter().map(|plan| launch(plan, dims, name, code));
        Value::from(plans.collect::<Vec<_>>())
    };
    json!({
        "shape": shape,
        "dtype": name,
        "forward": of(Direction::Forward),
        "backward": of(Direction::Backward),
    })
}

fn launch(plan: &Plan, dims: Dims, dtype: &str, code: DTypeCode) -> Value {
    let params = match code {
        DTypeCode::F64 => DTypeCode::F64,
        _ => DTypeCode::F32,
    };
    let options = Options {
        eps: 1e-5,
        params_dtype: Some(params),
        given_dtype: Some(DTypeCode::F64),
        relu: false,
        remove_mean: true,
        training: true,
    };
    let problem = Problem::new(dims, plan, &options);
    let kernels: &[&str] = match (plan.blocks, plan.direction) {
        (Blocks::TwoPasses, Direction::Forward) => &["stats", "forward"],
        (Blocks::TwoPasses, Direction::Backward) => &["backward_sums", "backward"],
        (_, Direction::Forward) => &["forward"],
        (_, Direction::Backward) => &["backward"],
    };
    let names: Vec<String> = kernels
        .iter()
        .map(|what| plan.kernel(what, dtype))
        .collect();
    json!({
        "what": describe(plan),
        "module": match plan.blocks {
            Blocks::Cluster => format!("cluster_{dtype}"),
            _ => format!("batch_norm_{dtype}"),
        },
        "kernels": names,
        "grid": plan.grid,
        "threads": plan.threads,
        "cluster": plan.cluster(),
        "cooperative": plan.is_cooperative(),
        "shared_bytes": plan.shared_bytes,
        "partials": plan.partials(),
        "counters": plan.counters(),
        "dram_bytes": plan.dram_bytes,
        "problem": {
            "n": problem.n, "c": problem.c, "s": problem.s, "part": problem.part, "eps": problem.eps,
            "channels": problem.channels, "splits": problem.splits,
            "params_dtype": problem.params_dtype, "given_dtype": problem.given_dtype,
            "relu": problem.relu, "remove_mean": problem.remove_mean, "training": problem.training,
            "unused": problem.unused,
        },
    })
}
