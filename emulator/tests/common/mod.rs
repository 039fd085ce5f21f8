//! Batch norm on the emulator: the launches of src/ops/batch_norm/cuda/mod.rs for plain slices.

use kernel_emulator::{launch, Arg, Options, Schedule};

pub mod reference;
pub mod values;

use crate::dims::Dims;
use crate::plan::{self, Blocks, DTypeCode, Direction, Plan, Problem};
use values::Value;

/// How blocks share a tile, how many do, and their threads.
pub const KINDS: [(Blocks, usize, usize); 9] = [
    (Blocks::TwoPasses, 1, 256),
    (Blocks::TwoPasses, 3, 512),
    (Blocks::TwoPasses, 7, 256),
    (Blocks::Group, 1, 256),
    (Blocks::Group, 2, 512),
    (Blocks::Group, 5, 256),
    (Blocks::Cluster, 2, 512),
    (Blocks::Cluster, 4, 256),
    (Blocks::Cluster, 8, 256),
];

/// One batch norm: what its tensors look like and which of them there are.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub dims: (usize, usize, usize),
    /// How blocks share a tile, how many do, and their threads.
    pub kind: (Blocks, usize, usize),
    pub weight: bool,
    pub bias: bool,
    pub residual: bool,
    pub relu: bool,
    /// Mean and variance are given, as in evaluation.
    pub given: bool,
    /// Though given, they are the input's: gradients go through them, as in batch renormalisation.
    pub known: bool,
    pub remove_mean: bool,
    /// Added to all values of x.
    pub offset: f64,
    /// Every channel of x consists of one value.
    pub constant: bool,
    /// The gradients of x, residual and parameters that are asked for.
    pub wants: [bool; 3],
}

impl Case {
    pub fn new(dims: (usize, usize, usize), kind: (Blocks, usize, usize)) -> Self {
        Self {
            dims,
            kind,
            weight: true,
            bias: true,
            residual: false,
            relu: false,
            given: false,
            known: false,
            remove_mean: true,
            offset: 0.5,
            constant: false,
            wants: [true; 3],
        }
    }

    /// The same, with one bit of `bits` for each thing that may be there or not.
    pub fn with_bits(self, bits: usize) -> Self {
        let bit = |i: usize| bits >> i & 1 == 1;
        Self {
            weight: bit(0),
            bias: bit(1),
            residual: bit(2),
            relu: bit(3),
            given: bit(4),
            known: bit(6),
            remove_mean: !bit(5),
            ..self
        }
    }

    pub fn m(&self) -> usize {
        self.dims.0 * self.dims.2
    }

    /// Whether gradients go through the statistics.
    pub fn training(&self) -> bool {
        !self.given || self.known
    }

    /// The launches in one direction; with given statistics there is nothing to find out forward.
    fn plan<T>(&self, direction: Direction) -> Plan {
        let (n, c, s) = self.dims;
        let kind = match self.given && direction == Direction::Forward {
            true => (Blocks::TwoPasses, self.kind.1, self.kind.2),
            false => self.kind,
        };
        let mut plan = Plan::of_kind(Dims { n, c, s }, size_of::<T>(), direction, kind);
        if plan.is_cooperative() {
            // Fewer groups than tiles, so that they take several, one after the other.
            let groups = plan.grid / plan.splits;
            plan.grid = groups.div_ceil(2) * plan.splits;
        }
        plan
    }

    fn problem<P: Value>(&self, plan: &Plan) -> Problem {
        let (n, c, s) = self.dims;
        let options = plan::Options {
            eps: reference::EPS,
            params_dtype: Some(P::CODE),
            given_dtype: Some(DTypeCode::F64),
            relu: self.relu,
            remove_mean: self.remove_mean,
            training: self.training(),
        };
        Problem::new(Dims { n, c, s }, plan, &options)
    }
}

/// The tensors that go in; those that a case lacks are there, but are not passed on.
pub struct Inputs<T, P> {
    pub x: Vec<T>,
    pub dy: Vec<T>,
    pub residual: Vec<T>,
    pub weight: Vec<P>,
    pub bias: Vec<P>,
    pub mean: Vec<f64>,
    pub var: Vec<f64>,
}

impl<T: Value, P: Value> Inputs<T, P> {
    pub fn new(case: &Case) -> Self {
        let (n, c, s) = case.dims;
        let numel = n * c * s;
        let mut random = values::Random::new(numel as u64 + 17);
        let mut x: Vec<T> = random.tensor(numel, case.offset);
        if case.constant {
            for (i, v) in x.iter_mut().enumerate() {
                *v = T::from_f64(case.offset + (i / s % c) as f64 * 0.25);
            }
        }
        Self {
            x,
            dy: random.tensor(numel, 0.0),
            residual: random.tensor(numel, 0.0),
            weight: random.tensor(c, 1.0),
            bias: random.tensor(c, 0.0),
            mean: random.tensor(c, case.offset),
            var: (0..c).map(|_| 0.5 + random.normal().abs()).collect(),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Outputs<T, P> {
    pub y: Vec<T>,
    /// Mean and variance: `[2, c]`.
    pub saved: Vec<f64>,
    pub dx: Vec<T>,
    pub dresidual: Vec<T>,
    /// Of weight and bias: `[2, c]`.
    pub dparams: Vec<P>,
}

/// Forward and backward, one after the other.
pub fn run<T: Value, P: Value>(
    case: &Case,
    inputs: &Inputs<T, P>,
    schedule: Schedule,
) -> Outputs<T, P> {
    let c = case.dims.1;
    let numel = inputs.x.len();
    let start = |kernel: &str, plan: &Plan, args: &[Arg]| {
        let name = plan.kernel(kernel, T::NAME);
        let options = Options {
            grid: [plan.grid as u32, 1, 1],
            block: [plan.threads as u32, 1, 1],
            cluster: [plan.cluster() as u32, 1, 1],
            shared_bytes: plan.shared_bytes,
            cooperative: plan.is_cooperative(),
            schedule,
        };
        // SAFETY: the calls below pass the arguments of the kernels' declarations, with n·c·s
        // values for a tensor like x, c or 2·c per channel, and the plan's partials and counters.
        let result = unsafe { launch(&name, &options, args) };
        result.unwrap_or_else(|error| panic!("{error}\n{case:?} {plan:?} {schedule:?}"));
    };
    // NaN wherever a kernel leaves something out.
    let partials_of = |plan: &Plan| vec![f64::NAN; plan.partials()];
    let like_x = || vec![T::from_f64(f64::NAN); numel];
    let mut outputs = Outputs {
        y: like_x(),
        saved: vec![f64::NAN; 2 * c],
        dx: like_x(),
        dresidual: like_x(),
        dparams: vec![P::from_f64(f64::NAN); 2 * c],
    };
    let x = Arg::slice(&inputs.x);
    let weight = Arg::optional(case.weight.then_some(&inputs.weight[..]));
    let bias = Arg::optional(case.bias.then_some(&inputs.bias[..]));
    let residual = Arg::optional(case.residual.then_some(&inputs.residual[..]));

    let plan = case.plan::<T>(Direction::Forward);
    let problem = case.problem::<P>(&plan);
    let mut partials = partials_of(&plan);
    let mut counters = vec![0u32; plan.counters()];
    if plan.blocks == Blocks::TwoPasses {
        if !case.given {
            let args = [x, Arg::slice_mut(&mut partials), Arg::value(&problem)];
            start("stats", &plan, &args);
        }
        let given = |values| Arg::optional(case.given.then_some(values));
        let args = [
            x,
            residual,
            weight,
            bias,
            given(&inputs.mean[..]),
            given(&inputs.var[..]),
            Arg::slice(&partials),
            Arg::slice_mut(&mut outputs.y),
            Arg::slice_mut(&mut outputs.saved),
            Arg::value(&problem),
        ];
        start("forward", &plan, &args);
    } else {
        let args = [
            x,
            residual,
            weight,
            bias,
            Arg::slice_mut(&mut partials),
            Arg::slice_mut(&mut counters),
            Arg::slice_mut(&mut outputs.y),
            Arg::slice_mut(&mut outputs.saved),
            Arg::value(&problem),
        ];
        start("forward", &plan, &args);
    }
    assert!(counters.iter().all(|&counter| counter == 0), "{case:?}");

    let plan = case.plan::<T>(Direction::Backward);
    let problem = case.problem::<P>(&plan);
    let mut partials = partials_of(&plan);
    let mut counters = vec![0u32; plan.counters()];
    let dy = Arg::slice(&inputs.dy);
    let y = Arg::optional((case.relu && case.residual).then_some(&outputs.y[..]));
    let saved = Arg::slice(&outputs.saved);
    let mut first = vec![x, dy, y, weight, bias, saved];
    let [wants_dx, wants_dresidual, wants_dparams] = case.wants;
    let needs_sums = wants_dparams || (wants_dx && case.training());
    if plan.blocks == Blocks::TwoPasses && needs_sums {
        let args = [Arg::slice_mut(&mut partials), Arg::value(&problem)];
        start("backward_sums", &plan, &[&first[..], &args].concat());
        first.push(Arg::slice(&partials));
    } else if plan.blocks == Blocks::TwoPasses {
        first.push(Arg::null());
    } else {
        first.push(Arg::slice_mut(&mut partials));
        first.push(Arg::slice_mut(&mut counters));
    }
    let wanted = |wants, gradient| if wants { gradient } else { Arg::null() };
    let args = [
        wanted(wants_dx, Arg::slice_mut(&mut outputs.dx)),
        wanted(wants_dresidual, Arg::slice_mut(&mut outputs.dresidual)),
        wanted(wants_dparams, Arg::slice_mut(&mut outputs.dparams)),
        Arg::value(&problem),
    ];
    start("backward", &plan, &[&first[..], &args].concat());
    assert!(counters.iter().all(|&counter| counter == 0), "{case:?}");
    outputs
}
