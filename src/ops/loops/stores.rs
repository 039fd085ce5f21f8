//! Non-temporal stores: outputs that are written past the caches.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::convert::{chunks, Element};
use super::prefetch::Ahead;
use crate::ops::cache::{self, LINE};

/// How the values of an output are written.
pub(crate) struct Stores {
    is_streamed: bool,
    ahead: Option<Ahead>,
    /// The thread that streams is the one that waits.
    of_thread: PhantomData<*const ()>,
}

/// So many bytes are computed, in wide registers, before they are streamed.
const STAGED: usize = 512;

/// The values of [`STAGED`] bytes in any dtype.
#[repr(align(64))]
struct Stage<T>([MaybeUninit<T>; STAGED / 2]);

/// In runs of fewer bytes too many lines are not written as a whole.
const RUN: usize = 2048;

/// Makes what was streamed visible to other threads, also where a loop panics.
struct Fence(bool);

impl Drop for Fence {
    #[inline(always)]
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.0 {
            // SAFETY: every x86-64 has the instruction.
            unsafe { std::arch::x86_64::_mm_sfence() };
        }
    }
}

impl Stores {
    /// To the caches. They read each line from memory before anything is written to it.
    pub const CACHED: Self = Self {
        is_streamed: false,
        ahead: None,
        of_thread: PhantomData,
    };

    /// Calls `f` with the way in which to write an output of `values` in runs of `run` values that lie far from each
    /// other, for whose lines the hardware asks too late.
    ///
    /// They are streamed, lines written as a whole and never read for that, where the output takes more than half of
    /// the cache: whoever reads it needs room for another tensor. `ahead` says which inputs are to be asked for
    /// meanwhile.
    #[inline(always)]
    pub fn far_apart<T, R>(
        values: usize,
        run: usize,
        ahead: Option<Ahead>,
        f: impl FnOnce(&Self) -> R,
    ) -> R {
        let [bytes, run] = [values, run].map(|values| values * size_of::<T>());
        let is_streamed = cfg!(target_arch = "x86_64") && run >= RUN && !cache::holds(2 * bytes);
        let stores = Self {
            is_streamed,
            ahead: ahead.filter(|_| is_streamed),
            of_thread: PhantomData,
        };
        let _fence = Fence(is_streamed);
        f(&stores)
    }

    /// Where inputs lie that are to be asked for while values are written.
    #[inline(always)]
    pub fn ahead(&self) -> Option<Ahead> {
        self.ahead
    }

    /// Calls `write` for the parts of a run, with the range of each and the place for its values.
    ///
    /// # Safety
    /// `write` writes all that it is given.
    #[inline(always)]
    pub unsafe fn write<T: Element>(
        &self,
        run: &mut [MaybeUninit<T>],
        mut write: impl FnMut(Range<usize>, &mut [MaybeUninit<T>]),
    ) {
        let step = const {
            assert!(LINE.is_multiple_of(size_of::<T>()) && size_of::<T>() >= 2);
            assert!(STAGED / size_of::<T>() <= T::CHUNK && align_of::<Stage<T>>() >= LINE);
            STAGED / size_of::<T>()
        };
        let lines = match self.is_streamed {
            false => 0..0,
            true => whole_lines(run),
        };
        for edge in [0..lines.start, lines.end..run.len()] {
            for part in chunks::<T>(edge) {
                write(part.clone(), &mut run[part]);
            }
        }
        let mut stage = Stage([MaybeUninit::uninit(); STAGED / 2]);
        for start in lines.clone().step_by(step) {
            let end = lines.end.min(start + step);
            // Not by `Range::len`, of which the compiler does not see that it is the length of the slices that `write`
            // reads.
            let staged = &mut stage.0[..end - start];
            write(start..end, staged);
            // SAFETY: `write` has written them. Both slices are the same number of whole lines.
            unsafe { stream(staged, &mut run[start..end]) };
        }
    }
}

/// The values of the lines that a run has as a whole.
#[inline(always)]
fn whole_lines<T>(run: &[MaybeUninit<T>]) -> Range<usize> {
    let of_line = const { LINE / size_of::<T>() };
    let start = run.as_ptr().align_offset(LINE).min(run.len());
    start..start + (run.len() - start) / of_line * of_line
}

/// Copies whole lines to memory.
///
/// # Safety
/// All of `from` is written. Both begin with a line, and are the same number of whole ones.
#[inline(always)]
unsafe fn stream<T: Copy>(from: &[MaybeUninit<T>], to: &mut [MaybeUninit<T>]) {
    #[cfg(target_arch = "x86_64")]
    {
        let (bytes, from, to) = (size_of_val(from), from.as_ptr(), to.as_mut_ptr());
        if is_x86_feature_detected!("avx") {
            // SAFETY: the CPU has the feature, and the caller promises the rest.
            unsafe { stream_avx(from.cast(), to.cast(), bytes) };
        } else {
            // SAFETY: as above.
            unsafe { stream_sse2(from.cast(), to.cast(), bytes) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
}

/// A loop over the registers that lines consist of.
macro_rules! stream {
    ($name:ident, $feature:literal, $register:ident, $store:ident) => {
        /// # Safety
        /// So many bytes of `from` are written. Both begin with a line, and are whole ones.
        #[cfg(target_arch = "x86_64")]
        #[inline]
        #[target_feature(enable = $feature)]
        unsafe fn $name(
            from: *const std::arch::x86_64::$register,
            to: *mut std::arch::x86_64::$register,
            bytes: usize,
        ) {
            for i in 0..bytes / size_of::<std::arch::x86_64::$register>() {
                // SAFETY: lines consist of whole registers, each at a multiple of its size.
                unsafe { std::arch::x86_64::$store(to.add(i), *from.add(i)) };
            }
        }
    };
}

// With an encoding of its own, for some processors take long from the old instructions to the new ones.
stream!(stream_avx, "avx", __m256i, _mm256_stream_si256);
stream!(stream_sse2, "sse2", __m128i, _mm_stream_si128);

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    const LARGE: usize = (16 << 20) + LINE;

    #[repr(align(64))]
    struct Lines<T>([MaybeUninit<T>; 3 * STAGED]);

    fn check<T: Element + std::fmt::Debug>(of: impl Fn(f64) -> T) {
        let value = |i: usize| of((i % 251) as f64);
        let mut buffer = Lines([MaybeUninit::new(of(-1.0)); 3 * STAGED]);
        for start in [0, 1, 3, 7, 8, 31, 64] {
            for len in [0, 1, 7, 31, 64, 300, STAGED - 1, STAGED, 2 * STAGED + 77] {
                for values in [0, LARGE] {
                    buffer.0.fill(MaybeUninit::new(of(-1.0)));
                    let run = &mut buffer.0[start..start + len];
                    Stores::far_apart::<T, _>(values, RUN, None, |stores| {
                        // SAFETY: every value is written.
                        unsafe {
                            stores.write(run, |range, part| {
                                assert_eq!(range.len(), part.len());
                                for (i, to) in range.zip(part) {
                                    to.write(value(i));
                                }
                            });
                        }
                    });
                    for (i, written) in buffer.0.iter().enumerate() {
                        // SAFETY: they all are initialised.
                        let written = unsafe { written.assume_init() };
                        let expected = match i.checked_sub(start) {
                            Some(i) if i < len => value(i),
                            _ => of(-1.0),
                        };
                        assert_eq!(written, expected, "{i} of {start}, {len}, {values}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_value_of_a_run_is_written_and_no_other() {
        check(|x| x as f32);
        check(|x| x);
        check(bf16::from_f64);
        check(f16::from_f64);
    }

    #[test]
    fn large_outputs_in_long_runs_are_streamed() {
        let streams = |bytes: usize, run: usize| {
            let [values, run] = [bytes, run].map(|bytes| bytes / size_of::<f32>());
            Stores::far_apart::<f32, _>(values, run, None, |stores| stores.is_streamed)
        };
        assert_eq!(streams(LARGE, RUN), cfg!(target_arch = "x86_64"));
        assert!(!streams(LARGE, RUN - 4));
        assert!(!streams(16 << 20, RUN));
    }
}
