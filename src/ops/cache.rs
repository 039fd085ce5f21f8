//! The cache that the cores share.

/// What of it there is on many machines, and is not taken by somebody else's cores on larger ones. It is not asked for:
/// the way that a tensor of some size takes is to be the same everywhere.
const SHARED: usize = 32 << 20;

/// Whether tensors of so many bytes in all stay there from one pass over them to the next.
pub(crate) fn holds(bytes: usize) -> bool {
    bytes <= SHARED
}
