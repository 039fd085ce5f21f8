//! Row norms on the emulator: the launches of src/ops/row_norm/cuda for plain slices, and the same in
//! double precision, as simple as the formulas.

use kernel_emulator::{launch, Arg, Options, Schedule};

use crate::dims::Rows;
use crate::plan::{self, Blocks, Direction};
use crate::row_plan::{self, Kind, ParamsPlan, RowPlan, ROW_OF};
use crate::values::{Random, Value};

pub const EPS: f64 = 1e-5;

/// One norm: what its tensors look like and which of them there are.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub rows: Rows,
    pub channels_last: bool,
    pub kind: Kind,
    pub weight: bool,
    pub bias: bool,
    pub relu: bool,
    pub remove_mean: bool,
    /// Added to all values of x.
    pub offset: f64,
    /// Every row of x consists of one value.
    pub constant: bool,
}

impl Case {
    pub fn new((n, c, s, groups): (usize, usize, usize, usize), kind: Kind) -> Self {
        Self {
            rows: Rows { n, groups, c, s },
            channels_last: false,
            kind,
            weight: true,
            bias: true,
            relu: false,
            remove_mean: true,
            offset: 0.5,
            constant: false,
        }
    }

    /// The same, with one bit of `bits` for each thing that may be there or not.
    pub fn with_bits(self, bits: usize) -> Self {
        let bit = |i: usize| bits >> i & 1 == 1;
        Self {
            weight: bit(0),
            bias: bit(1),
            relu: bit(2),
            remove_mean: !bit(3),
            ..self
        }
    }

    /// Of value `j` of a channel in a sample.
    pub fn offset_of(&self, n: usize, channel: usize, j: usize) -> usize {
        let Rows { c, s, .. } = self.rows;
        match self.channels_last {
            false => (n * c + channel) * s + j,
            true => (n * s + j) * c + channel,
        }
    }

    /// The values of a row, each with its channel.
    pub fn row(&self, row: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
        let (case, groups, channels) = (*self, self.rows.groups, self.rows.channels());
        (0..self.rows.len()).map(move |i| {
            let channel = row % groups * channels + i / case.rows.s;
            (
                case.offset_of(row / groups, channel, i % case.rows.s),
                channel,
            )
        })
    }

    fn options<P: Value>(&self) -> plan::Options {
        row_plan::options(EPS, Some(P::CODE), self.relu, self.remove_mean)
    }

    /// Whether a block has the shared memory that it needs: not if few lanes share a long row.
    pub fn fits<T>(&self) -> bool {
        let plan = self.plan::<T>(Direction::Backward).plan;
        plan.fits(&plan::Limits::H100)
    }

    fn plan<T>(&self, direction: Direction) -> RowPlan {
        let kind = self.kind;
        let mut plan = RowPlan::of_kind(
            self.rows,
            self.channels_last,
            size_of::<T>(),
            direction,
            kind,
        );
        if plan.plan.is_cooperative() {
            // Fewer groups than rows, so that they take several, one after the other.
            let groups = plan.plan.grid / plan.plan.splits;
            plan.plan.grid = groups.div_ceil(2) * plan.plan.splits;
        }
        plan
    }
}

/// The tensors that go in; those that a case lacks are there, but are not passed on.
pub struct Inputs<T, P> {
    pub x: Vec<T>,
    pub dy: Vec<T>,
    pub weight: Vec<P>,
    pub bias: Vec<P>,
    /// Values in front of the parameters, so that these do not begin with a vector.
    pub skipped: usize,
}

impl<T: Value, P: Value> Inputs<T, P> {
    pub fn new(case: &Case) -> Self {
        let (numel, c) = (case.rows.numel(), case.rows.c);
        let mut random = Random::new(numel as u64 + 17);
        let mut x: Vec<T> = random.tensor(numel, case.offset);
        for row in (0..case.rows.rows()).filter(|_| case.constant) {
            for (i, _) in case.row(row) {
                x[i] = T::from_f64(case.offset + row as f64 * 0.25);
            }
        }
        Self {
            x,
            dy: random.tensor(numel, 0.0),
            weight: random.tensor(c, 1.0),
            bias: random.tensor(c, 0.0),
            skipped: 0,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Outputs<T, P> {
    pub y: Vec<T>,
    /// Mean and variance: `[2, rows]`.
    pub saved: Vec<f64>,
    pub dx: Vec<T>,
    /// Of weight and bias: `[2, c]`.
    pub dparams: Vec<P>,
}

struct Launches<'a> {
    case: &'a Case,
    schedule: Schedule,
}

impl Launches<'_> {
    fn start(&self, name: &str, options: Options, args: &[Arg]) {
        let options = Options {
            schedule: self.schedule,
            ..options
        };
        // SAFETY: the calls below pass the arguments of the kernels' declarations, with n·c·s values for
        // a tensor like x, c or 2·c per channel, 2·rows statistics, and the plan's partials and counters.
        let result = unsafe { launch(name, &options, args) };
        result.unwrap_or_else(|error| panic!("{error}\n{:?} {options:?}", self.case));
    }

    fn start_plan(&self, name: &str, plan: &plan::Plan, args: &[Arg]) {
        let options = Options {
            grid: [plan.grid as u32, 1, 1],
            block: [plan.threads as u32, 1, 1],
            cluster: [plan.cluster() as u32, 1, 1],
            shared_bytes: plan.shared_bytes,
            cooperative: plan.is_cooperative(),
            ..Options::default()
        };
        self.start(name, options, args);
    }
}

/// Forward and backward, one after the other.
pub fn run<T: Value, P: Value>(
    case: &Case,
    inputs: &Inputs<T, P>,
    schedule: Schedule,
) -> Outputs<T, P> {
    let rows = case.rows;
    let (numel, c) = (rows.numel(), rows.c);
    let launches = Launches { case, schedule };
    let start = |what: &str, plan: &RowPlan, args: &[Arg]| {
        launches.start_plan(&plan.kernel(what, T::NAME), &plan.plan, args);
    };
    // NaN wherever a kernel leaves something out.
    let partials_of = |plan: &plan::Plan| vec![f64::NAN; plan.partials()];
    let mut outputs = Outputs {
        y: vec![T::from_f64(f64::NAN); numel],
        saved: vec![f64::NAN; 2 * rows.rows()],
        dx: vec![T::from_f64(f64::NAN); numel],
        dparams: vec![P::from_f64(f64::NAN); 2 * c],
    };
    let (x, dy) = (Arg::slice(&inputs.x), Arg::slice(&inputs.dy));
    let moved = [&inputs.weight, &inputs.bias].map(|values| {
        let mut moved = vec![P::from_f64(f64::NAN); inputs.skipped];
        moved.extend(values);
        moved
    });
    let [weight, bias] = [0, 1].map(|i| &moved[i][inputs.skipped..]);
    let weight = Arg::optional(case.weight.then_some(weight));
    let bias = Arg::optional(case.bias.then_some(bias));
    let options = case.options::<P>();

    let plan = case.plan::<T>(Direction::Forward);
    let problem = plan.problem(&options);
    let mut partials = partials_of(&plan.plan);
    let mut counters = vec![0u32; plan.plan.counters()];
    let mut args = vec![x, weight, bias];
    if plan.plan.blocks == Blocks::TwoPasses {
        let args_of_stats = [x, Arg::slice_mut(&mut partials), Arg::value(&problem)];
        start("stats", &plan, &args_of_stats);
        args.push(Arg::slice(&partials));
    } else {
        args.push(Arg::slice_mut(&mut partials));
        args.push(Arg::slice_mut(&mut counters));
    }
    args.push(Arg::slice_mut(&mut outputs.y));
    args.push(Arg::slice_mut(&mut outputs.saved));
    args.push(Arg::value(&problem));
    start("forward", &plan, &args);
    assert!(counters.iter().all(|&counter| counter == 0), "{case:?}");

    let plan = case.plan::<T>(Direction::Backward);
    let problem = plan.problem(&options);
    let mut partials = partials_of(&plan.plan);
    let mut counters = vec![0u32; plan.plan.counters()];
    let mut args = vec![x, dy, weight, bias, Arg::slice(&outputs.saved)];
    if plan.plan.blocks == Blocks::TwoPasses {
        let args_of_sums = [Arg::slice_mut(&mut partials), Arg::value(&problem)];
        start("backward_sums", &plan, &[&args[..], &args_of_sums].concat());
        args.push(Arg::slice(&partials));
    } else {
        args.push(Arg::slice_mut(&mut partials));
        args.push(Arg::slice_mut(&mut counters));
    }
    args.push(Arg::slice_mut(&mut outputs.dx));
    args.push(Arg::value(&problem));
    start("backward", &plan, &args);
    assert!(counters.iter().all(|&counter| counter == 0), "{case:?}");

    params(&launches, inputs, &mut outputs);
    outputs
}

/// The gradients of weight and bias.
fn params<T: Value, P: Value>(
    launches: &Launches,
    inputs: &Inputs<T, P>,
    outputs: &mut Outputs<T, P>,
) {
    let (case, rows) = (launches.case, launches.case.rows);
    // As many threads as a tile may have columns, and more blocks than some have parts.
    let threads = if rows.s == 1 { 64 } else { 256 };
    let kind = (1 + rows.n % 4, threads);
    let plan = ParamsPlan::of_kind(rows, case.channels_last, size_of::<T>(), kind);
    let problem = plan.problem(&case.options::<P>());
    let real = if T::NAME == "f64" { "f64" } else { "f32" };
    // Room for either type.
    let mut table = vec![f64::NAN; ROW_OF * rows.rows()];
    let simple = |blocks: usize| Options {
        grid: [blocks as u32, 1, 1],
        block: [plan.plan.threads as u32, 1, 1],
        ..Options::default()
    };
    let count = rows.rows() as i64;
    let args = [
        Arg::slice(&outputs.saved),
        Arg::slice_mut(&mut table),
        Arg::value(&EPS),
        Arg::value(&count),
    ];
    let name = format!("rn_rows_{real}");
    launches.start(&name, simple(plan.blocks_of_rows(&rows)), &args);

    let mut partials = vec![f64::NAN; plan.plan.partials()];
    let (groups, channels) = (rows.groups as i64, rows.channels() as i64);
    let lines = plan.lines() as i64;
    let args = [
        Arg::slice(&inputs.x),
        Arg::slice(&inputs.dy),
        Arg::optional(case.weight.then_some(&inputs.weight[..])),
        Arg::optional(case.bias.then_some(&inputs.bias[..])),
        Arg::slice(&table),
        Arg::slice_mut(&mut partials),
        Arg::value(&problem),
        Arg::value(&groups),
        Arg::value(&channels),
        Arg::value(&lines),
    ];
    let name = plan.plan.kernel_of("rn", "param_sums", T::NAME);
    launches.start_plan(&name, &plan.plan, &args);

    let args = [
        Arg::slice(&partials),
        Arg::slice_mut(&mut outputs.dparams),
        Arg::value(&problem),
    ];
    launches.start("rn_params", simple(plan.blocks_of_params(&rows)), &args);
}

#[track_caller]
fn assert_close(case: &Case, what: &str, got: f64, expected: f64, tolerance: f64) {
    // Also false for NaN.
    let is_close = (got - expected).abs() <= tolerance;
    assert!(
        is_close,
        "{what}: got {got:e}, expected {expected:e} ± {tolerance:e}\n{case:?}"
    );
}

/// Compares what the kernels made with what they should have made.
pub fn check<T: Value, P: Value>(case: &Case, inputs: &Inputs<T, P>, outputs: &Outputs<T, P>) {
    let (rows, len) = (case.rows, case.rows.len() as f64);
    // The kernels' sums start in single precision for all dtypes but double.
    let sum_tolerance = T::TOLERANCE.min(2e-6);
    let x = |i: usize| inputs.x[i].to_f64();
    let weight_of = |channel: usize| match case.weight {
        true => inputs.weight[channel].to_f64(),
        false => 1.0,
    };
    let bias_of = |channel: usize| match case.bias {
        true => inputs.bias[channel].to_f64(),
        false => 0.0,
    };
    // Of each channel: Σg·x̂, Σg, and how large what is added up there is.
    let mut dparams = vec![[0.0; 3]; rows.c];
    for row in 0..rows.rows() {
        let values = case.row(row);
        // Centred first, so that a large offset costs nothing here either.
        let first = values.clone().next().map_or(0.0, |(i, _)| x(i));
        let shifted = values.clone().map(|(i, _)| x(i) - first).sum::<f64>() / len;
        let mean = if case.remove_mean {
            first + shifted
        } else {
            0.0
        };
        let var = (values.clone().map(|(i, _)| (x(i) - mean).powi(2))).sum::<f64>() / len;
        let rstd = 1.0 / (var + EPS).sqrt();
        let tolerance = sum_tolerance * var.sqrt() + 1e-15;
        assert_close(case, "mean", outputs.saved[row], mean, tolerance);
        let got = outputs.saved[rows.rows() + row];
        assert_close(case, "var", got, var, sum_tolerance * var * 2.0);

        let mut gs = Vec::new();
        for (i, channel) in values {
            let x_hat = (x(i) - mean) * rstd;
            let linear = x_hat * weight_of(channel) + bias_of(channel);
            let tolerance =
                T::TOLERANCE * (1.0 + x_hat.abs() * weight_of(channel).abs() + linear.abs());
            // So near to zero that either side is right, the gradient follows the output.
            let y = outputs.y[i].to_f64();
            let near_zero = linear.abs() <= tolerance;
            let is_cut = case.relu && if near_zero { y <= 0.0 } else { linear < 0.0 };
            let expected = if is_cut { 0.0 } else { linear };
            assert_close(case, "y", y, expected, tolerance);
            let g = if is_cut { 0.0 } else { inputs.dy[i].to_f64() };
            let [dweight, dbias, size] = &mut dparams[channel];
            *dweight += g * x_hat;
            *dbias += g;
            *size += g.abs().max((g * x_hat).abs());
            gs.push((i, weight_of(channel) * g, x_hat));
        }

        let mean_of = |f: fn(&(usize, f64, f64)) -> f64| gs.iter().map(f).sum::<f64>() / len;
        let through_var = mean_of(|(_, h, x_hat)| h * x_hat);
        let through_mean = match case.remove_mean {
            true => mean_of(|(_, h, _)| *h),
            false => 0.0,
        };
        let sizes = mean_of(|(_, h, x_hat)| h.abs() * (1.0 + x_hat.abs()));
        for (i, h, x_hat) in gs {
            let expected = rstd * (h - through_mean - x_hat * through_var);
            let size = 1.0 + h.abs() + sizes * (1.0 + x_hat.abs());
            let tolerance = T::TOLERANCE * size * rstd.max(1.0);
            assert_close(case, "dx", outputs.dx[i].to_f64(), expected, tolerance);
        }
    }
    for (channel, [dweight, dbias, size]) in dparams.into_iter().enumerate() {
        let tolerance = sum_tolerance * (1.0 + size);
        let rounded = |v: f64| tolerance + P::TOLERANCE * v.abs();
        let got = |i: usize| outputs.dparams[i].to_f64();
        assert_close(case, "dweight", got(channel), dweight, rounded(dweight));
        assert_close(case, "dbias", got(rows.c + channel), dbias, rounded(dbias));
    }
}
