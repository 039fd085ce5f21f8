//! The few vector operations that the convolution's inner loop is made of.

/// Some neighbouring values of one type.
pub(super) trait Vector: Copy {
    type Value: Copy;
    const LANES: usize;

    /// # Safety
    /// The CPU has the instructions of this vector: so for all of the functions here.
    unsafe fn splat(value: Self::Value) -> Self;

    /// # Safety
    /// As for `splat`.
    unsafe fn zero() -> Self;

    /// # Safety
    /// `LANES` values can be read at `from`.
    unsafe fn load(from: *const Self::Value) -> Self;

    /// # Safety
    /// `LANES` values can be written at `to`.
    unsafe fn store(self, to: *mut Self::Value);

    /// `self·b + c`
    ///
    /// # Safety
    /// As for `splat`.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
}

/// Vectors for any CPU: loops short enough for the compiler to find its own instructions.
#[derive(Clone, Copy)]
pub(super) struct Portable<T, const N: usize>([T; N]);

macro_rules! portable {
    ($t:ty, $lanes:literal) => {
        impl Vector for Portable<$t, $lanes> {
            type Value = $t;
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn splat(value: $t) -> Self {
                Self([value; $lanes])
            }

            #[inline(always)]
            unsafe fn zero() -> Self {
                Self([0.0; $lanes])
            }

            #[inline(always)]
            unsafe fn load(from: *const $t) -> Self {
                // SAFETY: the caller's promise.
                Self(unsafe { from.cast::<[$t; $lanes]>().read_unaligned() })
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut $t) {
                // SAFETY: the caller's promise.
                unsafe { to.cast::<[$t; $lanes]>().write_unaligned(self.0) }
            }

            #[inline(always)]
            unsafe fn mul_add(self, b: Self, c: Self) -> Self {
                // Where the CPU is not known to have the fused instruction, it is a library call.
                let fused = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
                Self(std::array::from_fn(|i| match fused {
                    true => self.0[i].mul_add(b.0[i], c.0[i]),
                    false => self.0[i] * b.0[i] + c.0[i],
                }))
            }
        }
    };
}
portable!(f32, 4);
portable!(f64, 2);

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    macro_rules! vector {
        ($v:ty, $t:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $mul_add:ident) => {
            impl super::Vector for $v {
                type Value = $t;
                const LANES: usize = $lanes;

                #[inline(always)]
                unsafe fn splat(value: $t) -> Self {
                    // SAFETY: the caller's promise, here as below.
                    unsafe { $splat(value) }
                }

                #[inline(always)]
                unsafe fn zero() -> Self {
                    // SAFETY: as above.
                    unsafe { $splat(0.0) }
                }

                #[inline(always)]
                unsafe fn load(from: *const $t) -> Self {
                    // SAFETY: as above.
                    unsafe { $load(from) }
                }

                #[inline(always)]
                unsafe fn store(self, to: *mut $t) {
                    // SAFETY: as above.
                    unsafe { $store(to, self) }
                }

                #[inline(always)]
                unsafe fn mul_add(self, b: Self, c: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $mul_add(self, b, c) }
                }
            }
        };
    }
    #[rustfmt::skip]
    vector!(__m512, f32, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps);
    #[rustfmt::skip]
    vector!(__m512d, f64, 8, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_fmadd_pd);
    #[rustfmt::skip]
    vector!(__m256, f32, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps);
    #[rustfmt::skip]
    vector!(__m256d, f64, 4, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_fmadd_pd);
}
