//! The dtypes: how their values become numbers to compute with, and back.

use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;

use crate::ops::output::written;

/// A value of a tensor. Half precision is computed in `f32`, and sums are always in `f64`.
pub(crate) trait Element: Copy + PartialOrd + Default + Send + Sync + 'static {
    type Real: Real;
    /// The largest value that is 0 after rounding to the dtype.
    const ROUNDS_TO_ZERO: Self::Real;
    /// The square of a difference of two values keeps its digits in `f64`, and sums of such squares lose
    /// none that count.
    const SQUARES_FIT: bool;
    /// At most so many values are converted at once.
    const CHUNK: usize;
    /// Where a chunk stands after its conversion, for a dtype that is not converted value by value.
    type Room: Copy;
    const ROOM: Self::Room;
    fn to_f64(self) -> f64;
    /// A chunk as numbers to compute with, by index.
    fn load<'a>(chunk: &'a [Self], room: &'a mut Self::Room) -> impl Fn(usize) -> Self::Real + 'a;
    /// Writes all of a chunk, the values of which `real` gives by index: others rely on that.
    fn store(
        chunk: &mut [MaybeUninit<Self>],
        room: &mut Self::Room,
        real: impl Fn(usize) -> Self::Real,
    );
    /// A number rounded to the dtype.
    fn round(real: Self::Real) -> Self::Real;

    /// At least the first `len` values as numbers to compute with; if they are something else, in `room`.
    #[inline(always)]
    fn reals<'a>(
        values: &'a [Self],
        len: usize,
        room: &'a mut Vec<Self::Real>,
    ) -> &'a [Self::Real] {
        room.resize(len, Self::Real::ZERO);
        let mut chunk_room = Self::ROOM;
        for range in chunks::<Self>(0..len) {
            let value = Self::load(&values[range.clone()], &mut chunk_room);
            let to = &mut room[range];
            for i in 0..to.len() {
                to[i] = value(i);
            }
        }
        room
    }

    /// Calls `write` once, with room for as many numbers as `to` has values, and writes those, rounded, to all of
    /// `to`: others rely on that.
    ///
    /// # Safety
    /// `write` writes every number that it has room for.
    #[inline(always)]
    unsafe fn write_reals(
        to: &mut [MaybeUninit<Self>],
        room: &mut Vec<MaybeUninit<Self::Real>>,
        write: impl FnOnce(&mut [MaybeUninit<Self::Real>]),
    ) {
        room.resize(to.len(), MaybeUninit::uninit());
        write(room);
        // SAFETY: the caller promises it.
        let reals = unsafe { written(room) };
        let mut chunk_room = Self::ROOM;
        for range in chunks::<Self>(0..to.len()) {
            let reals = &reals[range.clone()];
            Self::store(&mut to[range], &mut chunk_room, |i| reals[i]);
        }
    }
}

/// A range of values in parts that are converted at once.
#[inline(always)]
pub(crate) fn chunks<T: Element>(values: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = values.end;
    values.step_by(T::CHUNK).map(
        #[inline(always)]
        move |start| start..start + T::CHUNK.min(end - start),
    )
}

/// `f32` and `f64`, in which values are computed.
pub(crate) trait Real:
    Copy
    + Default
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

/// A dtype that is converted value by value, or not at all.
macro_rules! element {
    ($t:ty, $real:ty, $rounds_to_zero:expr, $to:expr, $from:expr $(, $as_it_is:item)*) => {
        impl Element for $t {
            type Real = $real;
            const ROUNDS_TO_ZERO: $real = $rounds_to_zero;
            const SQUARES_FIT: bool = size_of::<$t>() < size_of::<f64>();
            const CHUNK: usize = usize::MAX;
            type Room = ();
            const ROOM: () = ();
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from($to(self))
            }
            #[inline(always)]
            fn load<'a>(chunk: &'a [Self], (): &'a mut ()) -> impl Fn(usize) -> $real + 'a {
                #[inline(always)]
                |i| $to(chunk[i])
            }
            #[inline(always)]
            fn store(chunk: &mut [MaybeUninit<Self>], (): &mut (), real: impl Fn(usize) -> $real) {
                for i in 0..chunk.len() {
                    chunk[i].write($from(real(i)));
                }
            }
            #[inline(always)]
            fn round(real: $real) -> $real {
                $to($from(real))
            }
            $($as_it_is)*
        }
    };
}

real!(f32);
real!(f64);
/// A dtype that values are computed in.
macro_rules! own_element {
    ($t:ty) => {
        element!(
            $t,
            $t,
            0.0,
            |value| value,
            |real| real,
            #[inline(always)]
            fn reals<'a>(values: &'a [$t], _: usize, _: &'a mut Vec<$t>) -> &'a [$t] {
                values
            },
            #[inline(always)]
            unsafe fn write_reals(
                to: &mut [MaybeUninit<$t>],
                _: &mut Vec<MaybeUninit<$t>>,
                write: impl FnOnce(&mut [MaybeUninit<$t>]),
            ) {
                write(to);
            }
        );
    };
}

own_element!(f32);
own_element!(f64);
// Half of the smallest number above 0, here 2⁻¹³³ and below 2⁻²⁴: a tie, which goes to even.
element!(bf16, f32, f32::from_bits(1 << 15), bf16_to_f32, f32_to_bf16);

// `half` converts value by value, with branches. These have none, so that a loop around them works on
// whole registers.

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
pub(super) mod tests {
    use std::fmt::Debug;

    use super::*;

    /// The way of a half precision to `f32` and back, ours and that of the crate `half`.
    pub struct Conversion<T> {
        pub from_bits: fn(u16) -> T,
        pub to_bits: fn(T) -> u16,
        pub widen: fn(T) -> f32,
        pub true_widen: fn(T) -> f32,
        pub narrow: fn(f32) -> T,
        pub true_narrow: fn(f32) -> T,
    }

    impl<T: Element<Real = f32> + Debug + PartialOrd> Conversion<T> {
        pub fn check_every_value(&self) {
            for bits in 0..=u16::MAX {
                let value = || (self.from_bits)(bits);
                let (ours, truth) = ((self.widen)(value()), (self.true_widen)(value()));
                assert!(
                    ours == truth || ours.is_nan() && truth.is_nan(),
                    "{bits:#06x}"
                );
                assert_eq!(ours.is_sign_negative(), truth.is_sign_negative());
            }
        }

        /// All 2¹⁶ upper halves of an `f32`, each with these lower halves.
        pub fn check_rounding(&self, lowers: &[u32]) {
            for upper in 0..=u32::from(u16::MAX) {
                for lower in lowers {
                    let value = f32::from_bits(upper << 16 | lower);
                    let (ours, truth) = ((self.narrow)(value), (self.true_narrow)(value));
                    let are_nan =
                        (self.true_widen)(ours).is_nan() && (self.true_widen)(truth).is_nan();
                    assert!(
                        (self.to_bits)(ours) == (self.to_bits)(truth) || are_nan,
                        "{value:e}: {ours:?}, expected {truth:?}"
                    );
                }
            }
        }

        pub fn check_that_no_larger_value_rounds_to_zero(&self) {
            let (zero, limit) = ((self.from_bits)(0), T::ROUNDS_TO_ZERO);
            assert!((self.narrow)(limit) == zero);
            assert!((self.narrow)(f32::from_bits(limit.to_bits() + 1)) > zero);
        }
    }

    const BF16: Conversion<bf16> = Conversion {
        from_bits: bf16::from_bits,
        to_bits: bf16::to_bits,
        widen: bf16_to_f32,
        true_widen: bf16::to_f32,
        narrow: f32_to_bf16,
        true_narrow: bf16::from_f32,
    };

    #[test]
    fn every_bf16_becomes_what_the_crate_half_makes_of_it() {
        BF16.check_every_value();
    }

    /// Around the tie.
    #[test]
    fn rounding_is_that_of_the_crate_half() {
        BF16.check_rounding(&[0, 1, 0x7fff, 0x8000, 0x8001, 0xffff]);
    }

    #[test]
    fn no_larger_value_rounds_to_zero() {
        BF16.check_that_no_larger_value_rounds_to_zero();
    }
}
