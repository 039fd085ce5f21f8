//! Sums over slices, side by side in lanes.

use super::convert::{Element, Real};
use super::element::{Channel, Mask, Slice};

/// As many sums as make loops over them worth while: these stay in memory, and the loops, whose
/// length the compiler does not know, in the widest registers.
const LANES: usize = 128;

/// A sum in `f64`, added up in a fixed order.
pub(super) struct Sum([f64; LANES]);

impl Sum {
    #[inline(always)]
    pub fn new() -> Self {
        Self([0.0; LANES])
    }

    #[inline(always)]
    pub fn total(mut self) -> f64 {
        let mut len = LANES;
        while len > 1 {
            len /= 2;
            let (left, right) = self.0.split_at_mut(len);
            for (left, right) in left.iter_mut().zip(right) {
                *left += *right;
            }
        }
        self.0[0]
    }

    /// Adds `f` of every value.
    #[inline(always)]
    pub fn add<T: Element>(&mut self, values: &[T], f: impl Fn(f64) -> f64) {
        for chunk in values.chunks(LANES) {
            for (lane, value) in self.0.iter_mut().zip(chunk) {
                *lane += f(value.to_f64());
            }
        }
    }
}

/// `Σg` and `Σ(g·(x - mean))`.
pub(super) struct GradSums {
    pub g: Sum,
    pub gx: Sum,
}

impl GradSums {
    #[inline(always)]
    pub fn new() -> Self {
        Self {
            g: Sum::new(),
            gx: Sum::new(),
        }
    }

    /// Adds the values of a slice of one channel.
    #[inline(always)]
    pub fn add<T: Element, M: Mask<T>>(
        &mut self,
        slice: &Slice<T>,
        channel: &Channel<T::Real>,
        mean: f64,
    ) {
        let chunks = slice.x.chunks(LANES).zip(slice.dy.chunks(LANES));
        for ((x, dy), y) in chunks.zip(slice.y.chunks(LANES)) {
            let lanes = self.g.0.iter_mut().zip(&mut self.gx.0);
            for ((lanes, (&x, &dy)), &y) in lanes.zip(x.iter().zip(dy)).zip(y) {
                let g = M::g(x, dy, y, channel).to_f64();
                *lanes.0 += g;
                *lanes.1 += g * (x.to_f64() - mean);
            }
        }
    }
}
