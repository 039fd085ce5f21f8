//! What the normalisations' loops over slices share on the CPU, without candle's types: the dtypes
//! ([`convert`]), what is computed per value ([`element`]), sums ([`lanes`]), and how a tensor is divided
//! among threads ([`sweep`]).

// With an index below a length, the compiler leaves out the checks of bounds behind closures; with
// an enumerated iterator it keeps them, and a scalar rest of each loop.
#![allow(clippy::needless_range_loop)]

pub(super) mod convert;
pub(super) mod element;
mod f16;
pub(super) mod lanes;
pub(super) mod prefetch;
pub(super) mod stores;
pub(super) mod sweep;

/// Smaller planes are gone through as columns, or value by value with a parameter for each: loops over so
/// few values have no time to get fast.
pub(super) const PLANE: usize = 64;

/// The learned parameters, `[c]` each; an absent weight is 1, an absent bias 0.
pub(crate) struct Params {
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
}
