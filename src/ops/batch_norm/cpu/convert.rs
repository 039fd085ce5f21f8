//! The dtypes: how their values become numbers to compute with, and back.

use half::{bf16, f16};

/// A value of a tensor. Half precision is computed in `f32`, and sums are always in `f64`.
pub(crate) trait Element: Copy + PartialOrd + Default + Send + Sync + 'static {
    type Real: Real;
    /// The largest value that is 0 after rounding to the dtype.
    const ROUNDS_TO_ZERO: Self::Real;
    fn to_real(self) -> Self::Real;
    fn from_real(real: Self::Real) -> Self;
    fn to_f64(self) -> f64;
}

/// `f32` and `f64`, in which values are computed.
pub(crate) trait Real:
    Copy
    + PartialOrd
    + Send
    + Sync
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
{
    const ZERO: Self;
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
}

macro_rules! real {
    ($t:ty) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
        }
    };
}

macro_rules! element {
    ($t:ty, $real:ty, $rounds_to_zero:expr, $to:expr, $from:expr) => {
        impl Element for $t {
            type Real = $real;
            const ROUNDS_TO_ZERO: $real = $rounds_to_zero;
            #[inline(always)]
            fn to_real(self) -> $real {
                $to(self)
            }
            #[inline(always)]
            fn from_real(real: $real) -> Self {
                $from(real)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self.to_real())
            }
        }
    };
}

real!(f32);
real!(f64);
element!(f32, f32, 0.0, |value| value, |real| real);
element!(f64, f64, 0.0, |value| value, |real| real);
// Half of the smallest number above 0, 2⁻²⁴ and 2⁻¹³³: a tie, which goes to even.
element!(
    f16,
    f32,
    f32::from_bits((127 - 25) << 23),
    f16_to_f32,
    f32_to_f16
);
element!(bf16, f32, f32::from_bits(1 << 15), bf16_to_f32, f32_to_bf16);

// `half` converts value by value, with branches or an instruction behind a function. These have
// neither, so that a loop around them works on whole registers.

/// The bits of 2⁻¹⁴, the smallest normal number of `f16`.
const F16_NORMAL: u32 = 113 << 23;

#[inline(always)]
fn f16_to_f32(value: f16) -> f32 {
    let bits = u32::from(value.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    let normal = magnitude + ((127 - 15) << 23);
    // Below the normal numbers: on the scale of 2⁻¹⁴, whose fraction it is.
    let subnormal = (f32::from_bits(magnitude + F16_NORMAL) - f32::from_bits(F16_NORMAL)).to_bits();
    let infinite = normal + ((127 - 15) << 23);
    let finite = if magnitude < 1 << 23 {
        subnormal
    } else {
        normal
    };
    let magnitude = if magnitude >= 31 << 23 {
        infinite
    } else {
        finite
    };
    f32::from_bits(magnitude | (bits & 0x8000) << 16)
}

/// Rounds to the nearest, ties to even.
#[inline(always)]
fn f32_to_f16(value: f32) -> f16 {
    /// The power of two whose last bit has the value of the last bit of a subnormal `f16`.
    const TO_SUBNORMAL: u32 = (127 - 15 + 23 - 10 + 1) << 23;
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let is_odd = (magnitude >> 13) & 1;
    let rounded = magnitude.wrapping_add(0x0fff + is_odd);
    let normal = rounded.wrapping_sub((127 - 15) << 23) >> 13;
    // The addition shifts the bits to their place and rounds them.
    let shifted = f32::from_bits(magnitude) + f32::from_bits(TO_SUBNORMAL);
    let subnormal = shifted.to_bits().wrapping_sub(TO_SUBNORMAL);
    let beyond = if magnitude > 0x7f80_0000 {
        0x7e00
    } else {
        0x7c00
    };
    let finite = if magnitude < F16_NORMAL {
        subnormal
    } else {
        normal
    };
    let magnitude = if magnitude >= (127 + 16) << 23 {
        beyond
    } else {
        finite
    };
    f16::from_bits((magnitude | (bits >> 16) & 0x8000) as u16)
}

#[inline(always)]
fn bf16_to_f32(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// Rounds to the nearest, ties to even.
#[inline(always)]
fn f32_to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    // Rounding could carry a NaN over to infinity.
    let nan = bits | 0x0040_0000;
    let bits = if bits & 0x7fff_ffff > 0x7f80_0000 {
        nan
    } else {
        rounded
    };
    bf16::from_bits((bits >> 16) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_becomes_what_the_crate_half_makes_of_it() {
        for bits in 0..=u16::MAX {
            let (ours, truth) = (
                f16_to_f32(f16::from_bits(bits)),
                f16::from_bits(bits).to_f32(),
            );
            assert!(
                ours == truth || ours.is_nan() && truth.is_nan(),
                "f16 {bits:#06x}"
            );
            assert_eq!(ours.is_sign_negative(), truth.is_sign_negative());
            let (ours, truth) = (
                bf16_to_f32(bf16::from_bits(bits)),
                bf16::from_bits(bits).to_f32(),
            );
            assert!(
                ours == truth || ours.is_nan() && truth.is_nan(),
                "bf16 {bits:#06x}"
            );
        }
    }

    /// All 2¹⁶ upper halves of an `f32`, each with lower halves around the ties of both formats.
    #[test]
    fn rounding_is_that_of_the_crate_half() {
        for upper in 0..=u32::from(u16::MAX) {
            for lower in [
                0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff,
            ] {
                let value = f32::from_bits(upper << 16 | lower);
                let (ours, truth) = (f32_to_f16(value), f16::from_f32(value));
                assert!(
                    ours.to_bits() == truth.to_bits() || ours.is_nan() && truth.is_nan(),
                    "{value:e}: f16 {ours:?}, expected {truth:?}"
                );
                let (ours, truth) = (f32_to_bf16(value), bf16::from_f32(value));
                assert!(
                    ours.to_bits() == truth.to_bits() || ours.is_nan() && truth.is_nan(),
                    "{value:e}: bf16 {ours:?}, expected {truth:?}"
                );
            }
        }
    }

    #[test]
    fn no_larger_value_rounds_to_zero() {
        let next = |value: f32| f32::from_bits(value.to_bits() + 1);
        assert!(f32_to_f16(f16::ROUNDS_TO_ZERO) == f16::ZERO);
        assert!(f32_to_f16(next(f16::ROUNDS_TO_ZERO)) > f16::ZERO);
        assert!(f32_to_bf16(bf16::ROUNDS_TO_ZERO) == bf16::ZERO);
        assert!(f32_to_bf16(next(bf16::ROUNDS_TO_ZERO)) > bf16::ZERO);
    }
}
