//! Batch norm on the emulator: the launches of src/ops/batch_norm/cuda/mod.rs for plain slices.

use kernel_emulator::{launch, Arg, Options, Schedule};

pub mod reference;
pub mod values;

use values::Value;

/// `THREADS` of kernels/common.cuh.
const THREADS: u32 = 256;

/// `struct Problem` of kernels/common.cuh.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Problem {
    c: i64,
    s: i64,
    m: i64,
    eps: f64,
    splits: i32,
    width: i32,
    params_dtype: i32,
    given_dtype: i32,
    relu: i32,
    remove_mean: i32,
    training: i32,
}

const _: () = assert!(size_of::<Problem>() == 64);

/// One batch norm: what its tensors look like and which of them there are.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub dims: (usize, usize, usize),
    /// Parts of a channel, a block each.
    pub splits: usize,
    pub weight: bool,
    pub bias: bool,
    pub residual: bool,
    pub relu: bool,
    /// Mean and variance are given, as in evaluation.
    pub given: bool,
    pub remove_mean: bool,
    /// Added to all values of x.
    pub offset: f64,
    /// Every channel of x consists of one value.
    pub constant: bool,
}

impl Case {
    pub fn new(dims: (usize, usize, usize), splits: usize) -> Self {
        Self {
            dims,
            splits,
            weight: true,
            bias: true,
            residual: false,
            relu: false,
            given: false,
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
            residual: bit(2),
            relu: bit(3),
            given: bit(4),
            remove_mean: !bit(5),
            ..self
        }
    }

    pub fn m(&self) -> usize {
        self.dims.0 * self.dims.2
    }

    fn width(&self) -> usize {
        if self.dims.2 == 1 {
            32
        } else {
            1
        }
    }

    fn blocks(&self) -> usize {
        self.dims.1.div_ceil(self.width()) * self.splits
    }

    fn problem<P: Value>(&self) -> Problem {
        Problem {
            c: self.dims.1 as i64,
            s: self.dims.2 as i64,
            m: self.m() as i64,
            eps: reference::EPS,
            splits: self.splits as i32,
            width: self.width() as i32,
            params_dtype: P::CODE,
            given_dtype: f64::CODE,
            relu: self.relu.into(),
            remove_mean: self.remove_mean.into(),
            training: (!self.given).into(),
        }
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

/// All four kernels, one after the other.
pub fn run<T: Value, P: Value>(
    case: &Case,
    inputs: &Inputs<T, P>,
    schedule: Schedule,
) -> Outputs<T, P> {
    let c = case.dims.1;
    let numel = inputs.x.len();
    let problem = case.problem::<P>();
    let start = |kernel: &str, args: &[Arg]| {
        let name = format!("bn_{kernel}_{}", T::NAME);
        let options = Options {
            grid: [case.blocks() as u32, 1, 1],
            block: [THREADS, 1, 1],
            schedule,
            ..Options::default()
        };
        // SAFETY: the calls below pass the arguments of the kernels' declarations, with n·c·s
        // values for a tensor like x, c or 2·c per channel, and two for each part of each channel.
        let result = unsafe { launch(&name, &options, args) };
        result.unwrap_or_else(|error| panic!("{error}\n{case:?} {schedule:?}"));
    };
    let some = |there: bool, values| there.then_some(values);
    let x = Arg::slice(&inputs.x);
    let weight = Arg::optional(case.weight.then_some(&inputs.weight[..]));
    let bias = Arg::optional(case.bias.then_some(&inputs.bias[..]));
    let residual = Arg::optional(some(case.residual, &inputs.residual[..]));
    // NaN wherever a kernel leaves something out.
    let mut partials = vec![f64::NAN; 2 * c * case.splits];
    let like_x = || vec![T::from_f64(f64::NAN); numel];
    let mut outputs = Outputs {
        y: like_x(),
        saved: vec![f64::NAN; 2 * c],
        dx: like_x(),
        dresidual: like_x(),
        dparams: vec![P::from_f64(f64::NAN); 2 * c],
    };

    if !case.given {
        let args = [x, Arg::slice_mut(&mut partials), Arg::value(&problem)];
        start("stats", &args);
    }
    start(
        "forward",
        &[
            x,
            residual,
            weight,
            bias,
            Arg::optional(case.given.then_some(&inputs.mean[..])),
            Arg::optional(case.given.then_some(&inputs.var[..])),
            Arg::optional((!case.given).then_some(&partials[..])),
            Arg::slice_mut(&mut outputs.y),
            Arg::slice_mut(&mut outputs.saved),
            Arg::value(&problem),
        ],
    );
    partials.fill(f64::NAN);
    let dy = Arg::slice(&inputs.dy);
    let y = Arg::optional(some(case.relu && case.residual, &outputs.y[..]));
    let saved = Arg::slice(&outputs.saved);
    start(
        "backward_sums",
        &[
            x,
            dy,
            y,
            weight,
            bias,
            saved,
            Arg::slice_mut(&mut partials),
            Arg::value(&problem),
        ],
    );
    start(
        "backward",
        &[
            x,
            dy,
            y,
            weight,
            bias,
            saved,
            Arg::slice(&partials),
            Arg::slice_mut(&mut outputs.dx),
            Arg::slice_mut(&mut outputs.dresidual),
            Arg::slice_mut(&mut outputs.dparams),
            Arg::value(&problem),
        ],
    );
    outputs
}
