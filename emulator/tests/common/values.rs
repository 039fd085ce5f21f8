//! Numbers of the four dtypes, and random ones.

use half::{bf16, f16};

use crate::plan::DTypeCode;

pub trait Value: Copy + PartialEq + std::fmt::Debug {
    /// In the names of the kernels.
    const NAME: &'static str;
    const CODE: DTypeCode;
    /// How far a value may be off, relative to its size or to 1.
    const TOLERANCE: f64;

    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
    fn bits(self) -> u64;
}

macro_rules! value {
    ($type:ty, $name:literal, $code:ident, $tolerance:literal, $from:expr, $to:expr) => {
        impl Value for $type {
            const NAME: &'static str = $name;
            const CODE: DTypeCode = DTypeCode::$code;
            const TOLERANCE: f64 = $tolerance;

            fn from_f64(value: f64) -> Self {
                $from(value)
            }
            fn to_f64(self) -> f64 {
                $to(self)
            }
            fn bits(self) -> u64 {
                self.to_bits().into()
            }
        }
    };
}

value!(f32, "f32", F32, 2e-6, |v| v as f32, f64::from);
value!(f64, "f64", F64, 1e-12, |v| v, |v| v);
value!(f16, "f16", F16, 1e-3, f16::from_f64, f16::to_f64);
value!(bf16, "bf16", BF16, 8e-3, bf16::from_f64, bf16::to_f64);

/// xorshift64*, so that the tests need no crate for it.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Nearly normal, with variance one.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    pub fn tensor<T: Value>(&mut self, len: usize, offset: f64) -> Vec<T> {
        (0..len)
            .map(|_| T::from_f64(self.normal() + offset))
            .collect()
    }
}
