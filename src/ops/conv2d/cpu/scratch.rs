//! Working memory that each thread keeps.

use std::cell::RefCell;

use super::Element;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code)] [u8; 64]);

thread_local! {
    static LINES: RefCell<Vec<Line>> = const { RefCell::new(vec![]) };
}

/// Calls `f` with slices of these lengths, whose values are left from earlier calls.
///
/// Allocating them for each image would have the system map them in and out again.
pub(super) fn with_scratch<T: Element, const N: usize, R>(
    lens: [usize; N],
    f: impl FnOnce([&mut [T]; N]) -> R,
) -> R {
    let lines = lens.map(|len| (len * size_of::<T>()).div_ceil(size_of::<Line>()));
    // Taken out, not borrowed: a panic in `f` leaves none borrowed.
    let mut buffer = LINES.take();
    buffer.resize(buffer.len().max(lines.iter().sum()), Line([0; 64]));
    let mut rest = &mut buffer[..];
    let parts = std::array::from_fn(|i| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(lines[i]);
        rest = after;
        // SAFETY: the lines are initialised, aligned to more than a `T`, and `lens[i]` of it fit in;
        // an `Element` is f32 or f64, for which all bits are valid.
        unsafe { std::slice::from_raw_parts_mut(part.as_mut_ptr().cast(), lens[i]) }
    });
    let result = f(parts);
    LINES.set(buffer);
    result
}
