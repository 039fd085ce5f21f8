//! The sizes of a tensor. Apart from all that knows of candle, since the tests of the kernels use it.

/// The sizes of `x: [n, c, …]` with everything after the channels folded into `s`.
///
/// The statistics of a channel are taken over `m = n·s` values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    /// Rows.
    pub n: usize,
    /// Channels.
    pub c: usize,
    /// Values of a channel in a row.
    pub s: usize,
}

impl Dims {
    /// The number of values per channel.
    pub fn m(&self) -> usize {
        self.n * self.s
    }

    /// The number of values.
    pub fn numel(&self) -> usize {
        self.m() * self.c
    }
}
