//! Values that are wanted soon.

/// Asks for a slice that is read next, while another is worked on.
///
/// The small planes of a channel lie far from each other, and the hardware only foresees the next lines of a
/// page. Larger slices it reads well enough by itself; for those, and on machines but x86-64, this does nothing.
#[inline(always)]
pub(crate) fn prefetch<T>(values: Option<&[T]>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(values) = values {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        const PAGE: usize = 4096;
        const LINE: usize = 64;
        /// With so much at hand, the hardware has time to see what comes.
        const FIRST: usize = 1024;
        let bytes = size_of_val(values);
        if bytes >= PAGE {
            return;
        }
        for at in (0..bytes.min(FIRST)).step_by(LINE) {
            // SAFETY: every x86-64 has the instruction; it gives no value and does not fault.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().cast::<i8>().wrapping_add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = values;
}
