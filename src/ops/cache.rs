//! The cache that the cores share.

use gemm_common::cache::CACHE_INFO;

/// More than this is shared by cores that are busy with something else.
const MOST: usize = 32 << 20;

/// Whether tensors of so many bytes in all stay there from one pass over them to the next.
pub(crate) fn holds(bytes: usize) -> bool {
    bytes <= CACHE_INFO[2].cache_bytes.min(MOST)
}
