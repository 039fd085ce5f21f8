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

/// The sizes of a tensor whose rows are normalised each by itself: `x: [n, c, s]`, whose samples fall into
/// `groups` of `c / groups` neighbouring channels. Each group of a sample is a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Samples.
    pub n: usize,
    /// Rows of a sample. They divide the channels.
    pub groups: usize,
    /// Channels, each with its own weight and bias.
    pub c: usize,
    /// Values of a channel in a sample.
    pub s: usize,
}

impl Rows {
    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.n * self.groups
    }

    /// Channels of a row.
    pub fn channels(&self) -> usize {
        self.c / self.groups
    }

    /// Values of a row.
    pub fn len(&self) -> usize {
        self.channels() * self.s
    }

    /// The number of values.
    pub fn numel(&self) -> usize {
        self.n * self.c * self.s
    }
}
