//! F16: converted by the instructions for it, where the processor has them.

use std::mem::MaybeUninit;

use half::f16;

use super::convert::Element;
use crate::ops::output::written;

/// Converted chunk by chunk: by an instruction that the compiler does not put into loops by itself.
impl Element for f16 {
    type Real = f32;
    const ROUNDS_TO_ZERO: f32 = f32::from_bits((127 - 25) << 23);
    const SQUARES_FIT: bool = true;
    const CHUNK: usize = CHUNK;
    type Room = [MaybeUninit<f32>; CHUNK];
    const ROOM: Self::Room = [MaybeUninit::uninit(); CHUNK];
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(f16_to_f32(self))
    }
    #[inline(always)]
    fn load<'a>(chunk: &'a [Self], room: &'a mut Self::Room) -> impl Fn(usize) -> f32 + 'a {
        let reals = &mut room[..chunk.len()];
        widen(chunk, reals);
        // SAFETY: `widen` writes every value.
        let reals = unsafe { written(reals) };
        #[inline(always)]
        |i| reals[i]
    }
    #[inline(always)]
    fn store(chunk: &mut [MaybeUninit<Self>], room: &mut Self::Room, real: impl Fn(usize) -> f32) {
        let reals = &mut room[..chunk.len()];
        for i in 0..chunk.len() {
            reals[i].write(real(i));
        }
        // SAFETY: the loop has written every value.
        narrow(unsafe { written(reals) }, chunk);
    }
    #[inline(always)]
    fn round(real: f32) -> f32 {
        f16_to_f32(f32_to_f16(real))
    }
}

/// Enough to make little of what a chunk costs, and few enough to stay in the nearest cache.
const CHUNK: usize = 256; // at least a strip of columns

/// Converts a chunk and writes all of `reals`. The detection is remembered, and costs no more than a
/// look at a flag.
#[inline(always)]
fn widen(chunk: &[f16], reals: &mut [MaybeUninit<f32>]) {
    assert_eq!(chunk.len(), reals.len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the CPU has the feature.
        return unsafe { avx512::widen(chunk, reals) };
    } else if is_x86_feature_detected!("f16c") {
        // SAFETY: as above.
        return unsafe { f16c::widen(chunk, reals) };
    }
    software::widen(chunk, reals);
}

/// Rounds a chunk and writes all of it.
#[inline(always)]
fn narrow(reals: &[f32], chunk: &mut [MaybeUninit<f16>]) {
    assert_eq!(chunk.len(), reals.len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the CPU has the feature.
        return unsafe { avx512::narrow(reals, chunk) };
    } else if is_x86_feature_detected!("f16c") {
        // SAFETY: as above.
        return unsafe { f16c::narrow(reals, chunk) };
    }
    software::narrow(reals, chunk);
}

/// Without such instructions.
mod software {
    use super::*;

    #[inline(always)]
    pub fn widen(values: &[f16], reals: &mut [MaybeUninit<f32>]) {
        for (real, value) in reals.iter_mut().zip(values) {
            real.write(f16_to_f32(*value));
        }
    }

    #[inline(always)]
    pub fn narrow(reals: &[f32], values: &mut [MaybeUninit<f16>]) {
        for (value, real) in values.iter_mut().zip(reals) {
            value.write(f32_to_f16(*real));
        }
    }
}

/// The conversions with instructions for so many values at a time.
macro_rules! f16_instructions {
    ($name:ident, $feature:literal, $lanes:literal, $widen:ident, $narrow:ident) => {
        #[cfg(target_arch = "x86_64")]
        mod $name {
            use std::arch::x86_64::*;
            use std::mem::MaybeUninit;
            use std::ptr::{read_unaligned, write_unaligned};

            use half::f16;

            const TO_EVEN: i32 = _MM_FROUND_TO_NEAREST_INT;

            #[inline]
            #[target_feature(enable = $feature)]
            pub fn widen(values: &[f16], reals: &mut [MaybeUninit<f32>]) {
                let (values, last_values) = values.as_chunks::<$lanes>();
                let (reals, last_reals) = reals.as_chunks_mut::<$lanes>();
                for (reals, values) in reals.iter_mut().zip(values) {
                    // SAFETY: the registers are as wide as the arrays, and all bits are valid in both.
                    unsafe {
                        let converted = $widen(read_unaligned(values.as_ptr().cast()));
                        write_unaligned(reals.as_mut_ptr().cast(), converted);
                    }
                }
                for (real, value) in last_reals.iter_mut().zip(last_values) {
                    let value = _mm_cvtsi32_si128(value.to_bits().into());
                    real.write(_mm_cvtss_f32(_mm_cvtph_ps(value)));
                }
            }

            #[inline]
            #[target_feature(enable = $feature)]
            pub fn narrow(reals: &[f32], values: &mut [MaybeUninit<f16>]) {
                let (reals, last_reals) = reals.as_chunks::<$lanes>();
                let (values, last_values) = values.as_chunks_mut::<$lanes>();
                for (values, reals) in values.iter_mut().zip(reals) {
                    // SAFETY: as above.
                    unsafe {
                        let rounded = $narrow::<TO_EVEN>(read_unaligned(reals.as_ptr().cast()));
                        write_unaligned(values.as_mut_ptr().cast(), rounded);
                    }
                }
                for (value, real) in last_values.iter_mut().zip(last_reals) {
                    let bits = _mm_cvtsi128_si32(_mm_cvtps_ph::<TO_EVEN>(_mm_set_ss(*real)));
                    value.write(f16::from_bits(bits as u16));
                }
            }
        }
    };
}

f16_instructions!(f16c, "f16c", 8, _mm256_cvtph_ps, _mm256_cvtps_ph);
f16_instructions!(avx512, "avx512f", 16, _mm512_cvtph_ps, _mm512_cvtps_ph);

// Without the instructions. `half` has branches or a function for them; these have neither, so that a
// loop around them works on whole registers.

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

#[cfg(test)]
mod tests {
    use super::super::convert::tests::Conversion;
    use super::*;

    const F16: Conversion<f16> = Conversion {
        from_bits: f16::from_bits,
        to_bits: f16::to_bits,
        widen: f16_to_f32,
        true_widen: f16::to_f32,
        narrow: f32_to_f16,
        true_narrow: f16::from_f32,
    };

    #[test]
    fn every_value_becomes_what_the_crate_half_makes_of_it() {
        F16.check_every_value();
    }

    /// Around the ties.
    #[test]
    fn rounding_is_that_of_the_crate_half() {
        F16.check_rounding(&[
            0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff,
        ]);
    }

    #[test]
    fn no_larger_value_rounds_to_zero() {
        F16.check_that_no_larger_value_rounds_to_zero();
    }

    struct Way {
        name: &'static str,
        widen: fn(&[f16], &mut [MaybeUninit<f32>]),
        narrow: fn(&[f32], &mut [MaybeUninit<f16>]),
    }

    /// What is taken on this machine, and what it could take besides.
    fn ways() -> Vec<Way> {
        let mut ways = vec![
            Way {
                name: "taken",
                widen,
                narrow,
            },
            Way {
                name: "software",
                widen: software::widen,
                narrow: software::narrow,
            },
        ];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("f16c") {
                ways.push(Way {
                    name: "f16c",
                    // SAFETY: the CPU has the feature; so it does below.
                    widen: |values, reals| unsafe { f16c::widen(values, reals) },
                    // SAFETY: as above.
                    narrow: |reals, values| unsafe { f16c::narrow(reals, values) },
                });
            }
            if is_x86_feature_detected!("avx512f") {
                ways.push(Way {
                    name: "avx512",
                    // SAFETY: as above.
                    widen: |values, reals| unsafe { avx512::widen(values, reals) },
                    // SAFETY: as above.
                    narrow: |reals, values| unsafe { avx512::narrow(reals, values) },
                });
            }
        }
        ways
    }

    /// So that all values are converted one by one, side by side, and both.
    const LENS: [usize; 3] = [1, 23, CHUNK];

    #[test]
    fn slices_of_every_f16_become_what_its_values_become() {
        let values: Vec<_> = (0..=u16::MAX).map(f16::from_bits).collect();
        for (way, len) in ways().iter().flat_map(|way| LENS.map(|len| (way, len))) {
            for values in values.chunks(len) {
                let mut reals = vec![MaybeUninit::new(0.5); values.len()];
                (way.widen)(values, &mut reals);
                // SAFETY: they have values since they are there.
                for (real, value) in unsafe { written(&reals) }.iter().zip(values) {
                    let truth = f16_to_f32(*value);
                    assert!(
                        real.to_bits() == truth.to_bits() || real.is_nan() && truth.is_nan(),
                        "{}, {len} at once, {:#06x}: {real:e}",
                        way.name,
                        value.to_bits()
                    );
                }
            }
        }
    }

    #[test]
    fn slices_are_rounded_as_their_values_are() {
        let lowers = [0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x3001, 0xffff];
        let reals: Vec<_> = (0..=u32::from(u16::MAX))
            .flat_map(|upper| lowers.map(|lower| f32::from_bits(upper << 16 | lower)))
            .collect();
        for (way, len) in ways().iter().flat_map(|way| LENS.map(|len| (way, len))) {
            for reals in reals.chunks(len) {
                let mut values = vec![MaybeUninit::new(f16::PI); reals.len()];
                (way.narrow)(reals, &mut values);
                for (value, real) in values.iter().zip(reals) {
                    // SAFETY: it was initialised above.
                    let (value, truth) = (unsafe { value.assume_init() }, f32_to_f16(*real));
                    assert!(
                        value.to_bits() == truth.to_bits() || value.is_nan() && truth.is_nan(),
                        "{}, {len} at once, {real:e}: {value:?}, expected {truth:?}",
                        way.name
                    );
                }
            }
        }
    }
}
