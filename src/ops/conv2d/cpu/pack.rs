//! Between planes `[channel][position]`, as tensors have them, and columns `[position][lane]`, as
//! the kernel does.

use std::mem::MaybeUninit;

use super::kernel::{kernel_for, Element, Kernel, Sweep};

/// The channels of a group, cut into panels as wide as the kernel. The last may have lanes to spare.
#[derive(Clone, Copy)]
pub(super) struct Lanes<T: 'static> {
    pub kernel: &'static Kernel<T>,
    pub channels: usize,
}

impl<T: Element> Lanes<T> {
    pub fn new(channels: usize) -> Self {
        Self {
            kernel: kernel_for(channels),
            channels,
        }
    }

    pub fn panels(&self) -> usize {
        self.channels.div_ceil(self.kernel.width)
    }

    /// The channels of a panel.
    pub fn of(&self, panel: usize) -> std::ops::Range<usize> {
        let start = panel * self.kernel.width;
        start..self.channels.min(start + self.kernel.width)
    }
}

/// A matrix `[depth][channel]` for each group, in panels.
pub(super) struct Panels<T: 'static> {
    pub lanes: Lanes<T>,
    depth: usize,
    values: Vec<T>,
}

impl<T: Element> Panels<T> {
    /// `value(group, depth, channel)` is what stands there.
    pub fn new(
        groups: usize,
        depth: usize,
        lanes: Lanes<T>,
        value: impl Fn(usize, usize, usize) -> T,
    ) -> Self {
        let width = lanes.kernel.width;
        let mut values = vec![T::zero(); groups * lanes.panels() * depth * width];
        let mut rows = values.chunks_exact_mut(width);
        for group in 0..groups {
            for panel in 0..lanes.panels() {
                for (k, row) in rows.by_ref().take(depth).enumerate() {
                    for (to, channel) in row.iter_mut().zip(lanes.of(panel)) {
                        *to = value(group, k, channel);
                    }
                }
            }
        }
        Self {
            lanes,
            depth,
            values,
        }
    }

    fn panel(&self, group: usize, panel: usize) -> &[T] {
        let len = self.depth * self.lanes.kernel.width;
        &self.values[(group * self.lanes.panels() + panel) * len..][..len]
    }
}

/// So many rows are computed at a time: a multiple of every kernel's tile, and small enough for the
/// result to stay in the cache.
pub(super) const ROWS: usize = 120;

/// So much of a panel is read at a time, for it to stay in the innermost cache.
pub(super) const DEPTH: usize = 128;

/// A pass over planes with a border, which writes the planes of a group.
pub(super) struct Pass<'a, T: 'static> {
    pub panels: &'a Panels<T>,
    pub rows: &'a [usize],
    pub depth: &'a [usize],
    /// Where the result of each row goes, in a plane of `plane` values.
    pub targets: &'a [usize],
    pub plane: usize,
}

impl<T: Element> Pass<'_, T> {
    /// Reads `x` and writes `out`, both of one `group`; adds `bias`, a value per plane.
    pub fn run(
        &self,
        group: usize,
        x: &[T],
        block: &mut [T],
        out: &mut [MaybeUninit<T>],
        bias: Option<&[T]>,
    ) {
        let lanes = &self.panels.lanes;
        let width = lanes.kernel.width;
        let targets = self.targets.chunks(ROWS);
        for (rows, targets) in self.rows.chunks(ROWS).zip(targets) {
            let block = &mut block[..rows.len() * width];
            for panel in 0..lanes.panels() {
                let values = self.panels.panel(group, panel).chunks(DEPTH * width);
                if self.depth.is_empty() {
                    block.fill(T::zero());
                }
                for (i, (depth, panel)) in self.depth.chunks(DEPTH).zip(values).enumerate() {
                    lanes.kernel.run(Sweep {
                        x,
                        rows,
                        depth,
                        panel,
                        out: block,
                        accumulate: i > 0,
                    });
                }
                let channels = lanes.of(panel);
                let out = &mut out[channels.start * self.plane..channels.end * self.plane];
                let bias = bias.map(|bias| &bias[channels]);
                to_planes(block, width, targets, out, self.plane, bias);
            }
        }
    }
}

/// Writes the columns of `block` to where `targets` says, in each of the planes of `out`.
fn to_planes<T: Element>(
    block: &[T],
    width: usize,
    targets: &[usize],
    out: &mut [MaybeUninit<T>],
    plane: usize,
    bias: Option<&[T]>,
) {
    for (lane, out) in out.chunks_exact_mut(plane).enumerate() {
        let bias = bias.map_or(T::zero(), |bias| bias[lane]);
        for (row, &target) in block.chunks_exact(width).zip(targets) {
            out[target].write(row[lane] + bias);
        }
    }
}

/// The columns of `planes`, from position `start` on, as many as fit in `panel`. Lanes to spare
/// become zeros.
pub(super) fn to_panel<T: Element>(
    planes: &[T],
    plane: usize,
    start: usize,
    panel: &mut [T],
    width: usize,
) {
    let planes_len = planes.len() / plane;
    for (i, row) in panel.chunks_exact_mut(width).enumerate() {
        for (lane, to) in row[..planes_len].iter_mut().enumerate() {
            *to = planes[lane * plane + start + i];
        }
        row[planes_len..].fill(T::zero());
    }
}
