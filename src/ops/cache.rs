//! The caches: how long their lines are, and what of the one that the cores share there is.

/// Bytes of a line.
pub(crate) const LINE: usize = 64;

/// What there is of the shared one on many machines, and is not taken by somebody else's cores on larger ones. It is not asked for:
/// the way that a tensor of some size takes is to be the same everywhere.
const SHARED: usize = 32 << 20;

/// Whether tensors of so many bytes in all stay there from one pass over them to the next.
pub(crate) fn holds(bytes: usize) -> bool {
    bytes <= SHARED
}
