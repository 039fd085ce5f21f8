//! A new tensor that several tasks write, each its own part.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

/// An uninitialised buffer of a known length whose parts are handed out to tasks.
pub(crate) struct Output<T> {
    buffer: Vec<MaybeUninit<T>>,
}

/// Leave to write to the parts of an [`Output`] from several threads.
pub(crate) struct Parts<'a, T> {
    start: *mut MaybeUninit<T>,
    len: usize,
    buffer: PhantomData<&'a mut [MaybeUninit<T>]>,
}

// Not derived: that would ask for the same of `T`.
impl<T> Clone for Parts<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Parts<'_, T> {}

// SAFETY: a `Parts` only gives out parts that its callers promise not to overlap (see `part`), so
// that moving it or sharing it between threads is moving or sharing disjoint `&mut [T]`.
unsafe impl<T: Send> Send for Parts<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<T> Output<T> {
    pub fn new(len: usize) -> Self {
        let mut buffer = Vec::with_capacity(len);
        // SAFETY: `MaybeUninit` needs no initialisation, and the capacity is `len`.
        unsafe { buffer.set_len(len) };
        Self { buffer }
    }

    pub fn parts(&mut self) -> Parts<'_, T> {
        Parts {
            start: self.buffer.as_mut_ptr(),
            len: self.buffer.len(),
            buffer: PhantomData,
        }
    }

    /// The finished tensor.
    ///
    /// # Safety
    /// Every value has been written.
    pub unsafe fn finish(self) -> Vec<T> {
        let mut buffer = std::mem::ManuallyDrop::new(self.buffer);
        // SAFETY: pointer, length and capacity are those of a `Vec` that is not dropped any more;
        // `MaybeUninit<T>` has the layout of `T`, and the caller has written every value.
        unsafe { Vec::from_raw_parts(buffer.as_mut_ptr().cast(), buffer.len(), buffer.capacity()) }
    }
}

impl<'a, T> Parts<'a, T> {
    /// The values in `range`, to be written.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    pub unsafe fn part(self, range: Range<usize>) -> &'a mut [MaybeUninit<T>] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the range lies in the buffer, which is borrowed for 'a, and the caller promises
        // that nobody else holds any of it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Where the buffer begins, for those who write parts that are no slices.
    pub fn as_ptr(self) -> *mut T {
        self.start.cast()
    }

    /// Writes one value.
    ///
    /// # Safety
    /// It lies in no part that is alive at the same time.
    pub unsafe fn write(self, index: usize, value: T) {
        // SAFETY: what the caller promises is what `part` asks for.
        let part = unsafe { self.part(index..index + 1) };
        part[0].write(value);
    }
}

/// Values that have been written, to be read.
///
/// # Safety
/// Every value has been written.
#[inline(always)]
pub(crate) unsafe fn written<T>(values: &[MaybeUninit<T>]) -> &[T] {
    // SAFETY: `MaybeUninit<T>` has the layout of `T`, and the values are written.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}
