//! From candle's CPU storages to slices.

use candle_core::{bail, CpuStorage, Layout, Result, WithDType};

/// The values of a contiguous tensor, from its offset on.
pub(crate) fn values<'a, T: WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&T::cpu_storage_as_slice(storage)?[start..end]),
        None => bail!("expected a contiguous tensor here, got {layout:?}"),
    }
}
