//! Where outputs are written: to the caches, or past them.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::convert::{chunks, Element};
use super::prefetch::Ahead;
use crate::ops::cache;

/// How the values of a run are written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stores {
    streamed: Option<Ahead>,
}

const LINE: usize = 64;

/// So many bytes are computed in wide registers before they are streamed.
const STAGED: usize = 512;

/// The values of [`STAGED`] bytes in any dtype.
#[repr(align(64))]
struct Stage<T>([MaybeUninit<T>; STAGED / 2]);

/// In runs of fewer bytes too many lines are not whole.
const RUN: usize = 2048;

impl Stores {
    /// To the caches, which read each line from memory first.
    pub const CACHED: Self = Self { streamed: None };

    /// Whole lines to memory, which are not read for that: where the caches could not hold an output of `values` until
    /// it is read, and where it is written in runs of `run` that lie far from each other, for which the hardware asks
    /// too late.
    ///
    /// Each run is followed in memory by the one that has its turn after all of these.
    ///
    /// # Safety
    /// The values are written in a loop of [`parallel`](crate::ops::parallel), which [waits](wait) before anybody
    /// reads them.
    #[inline(always)]
    pub unsafe fn of<T>(values: usize, run: usize) -> Self {
        let [bytes, run_bytes] = [values, run].map(|values| values * size_of::<T>());
        let is_streamed =
            cfg!(target_arch = "x86_64") && run_bytes >= RUN && !cache::holds(2 * bytes);
        Self {
            streamed: is_streamed.then(|| Ahead::in_next_slice::<T>(run)),
        }
    }

    /// Where the inputs lie that are to be asked for while values are written: those of the next runs, since memory
    /// has nothing to be read for these.
    #[inline(always)]
    pub fn ahead(self) -> Option<Ahead> {
        self.streamed
    }

    /// Calls `write` for the parts of a run, with the range of each and the place for its values.
    ///
    /// # Safety
    /// `write` writes all that it is given.
    #[inline(always)]
    pub unsafe fn write<T: Element>(
        self,
        run: &mut [MaybeUninit<T>],
        mut write: impl FnMut(Range<usize>, &mut [MaybeUninit<T>]),
    ) {
        let lines = match self.streamed {
            None => 0..0,
            Some(_) => whole_lines(run),
        };
        for edge in [0..lines.start, lines.end..run.len()] {
            for part in chunks::<T>(edge) {
                write(part.clone(), &mut run[part]);
            }
        }
        let mut stage = Stage([MaybeUninit::uninit(); STAGED / 2]);
        let step = const { STAGED / size_of::<T>() };
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
        use std::arch::x86_64::{__m128i, _mm_stream_si128};
        let count = size_of_val(from) / size_of::<__m128i>();
        let from = from.as_ptr().cast::<__m128i>();
        let to = to.as_mut_ptr().cast::<__m128i>();
        for i in 0..count {
            // SAFETY: every x86-64 has the instruction, and both have so many registers' worth, which begin at
            // multiples of their size, as the caller promises.
            unsafe { _mm_stream_si128(to.add(i), *from.add(i)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    to.copy_from_slice(from);
}

/// Waits until everybody would read what this thread has streamed.
#[inline(always)]
pub(crate) fn wait() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction.
    unsafe {
        std::arch::x86_64::_mm_sfence()
    };
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn check<T: Element + std::fmt::Debug>(of: impl Fn(f64) -> T) {
        let value = |i: usize| of((i % 251) as f64);
        let mut buffer = [MaybeUninit::new(of(-1.0)); 3 * STAGED];
        for start in [0, 1, 3, 7, 8, 31] {
            for len in [0, 1, 7, 31, 64, 300, STAGED - 1, STAGED, 2 * STAGED + 77] {
                for streamed in [None, Some(Ahead::IN_LINE)] {
                    let stores = Stores { streamed };
                    buffer.fill(MaybeUninit::new(of(-1.0)));
                    // SAFETY: every value is written, and waited for before it is read.
                    unsafe {
                        stores.write(&mut buffer[start..start + len], |range, part| {
                            assert_eq!(range.len(), part.len());
                            for (i, to) in range.zip(part) {
                                to.write(value(i));
                            }
                        });
                    }
                    wait();
                    for (i, written) in buffer.iter().enumerate() {
                        // SAFETY: they all are initialised.
                        let written = unsafe { written.assume_init() };
                        let expected = match i.checked_sub(start) {
                            Some(i) if i < len => value(i),
                            _ => of(-1.0),
                        };
                        assert_eq!(written, expected, "{stores:?}: {i} of {start}, {len}");
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
        let large = (16 << 20) / size_of::<f32>() + 1;
        // SAFETY: nothing is written.
        let streams = |values, run| unsafe { Stores::of::<f32>(values, run) } != Stores::CACHED;
        assert_eq!(streams(large, RUN / 4), cfg!(target_arch = "x86_64"));
        assert!(!streams(large, RUN / 4 - 1));
        assert!(!streams(large - 1, RUN / 4));
    }
}
