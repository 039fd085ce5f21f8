//! Values that are wanted soon.

use crate::ops::cache;

/// How far behind the values in hand lie others that are asked for at the same time.
///
/// The hardware asks for the next lines by itself, but not for enough of them to keep memory busy while sums in
/// `f64` are computed, and not beyond a page.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    bytes: usize,
}

/// Enough that memory answers in time, and not so much that it is gone again before it is read.
const DISTANCE: usize = 6144;

/// Enough where the cache holds the tensor and its like. More is work for nothing there.
const NEAR: usize = 2048;

impl Ahead {
    /// In slices that follow each other.
    pub const IN_LINE: Self = Self { bytes: DISTANCE };

    /// At the same place of the slice that follows one of `len` values.
    #[inline(always)]
    pub fn in_next_slice<T>(len: usize) -> Self {
        Self {
            bytes: len * size_of::<T>(),
        }
    }

    /// In `count` slices of `len` values, each `stride` values behind the one before.
    pub fn in_slices<T>(count: usize, len: usize, stride: usize) -> Self {
        let [slice, stride] = [len, stride].map(|values| values * size_of::<T>());
        let distance = match cache::holds(2 * count * stride) {
            true => NEAR,
            false => DISTANCE,
        };
        if slice >= 2 * distance {
            return Self { bytes: distance };
        }
        // Behind the last slice there is nothing to ask for.
        let slices = distance.div_ceil(slice.max(1)).min(count / 2);
        Self {
            bytes: slices * stride,
        }
    }

    /// Asks for what lies as far behind `values`.
    #[inline(always)]
    pub fn of<T>(self, values: &[T]) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
            let start = values.as_ptr().cast::<i8>().wrapping_add(self.bytes);
            let mut at = 0;
            while at < size_of_val(values) {
                // SAFETY: every x86-64 has the instruction; it gives no value and faults nowhere.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at)) };
                at += cache::LINE;
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = values;
    }
}
