//! Between planes `[channel][position]`, as tensors have them, and columns `[position][lane]`, as
//! the kernel does.

use std::mem::MaybeUninit;

use super::kernel::{kernel_for, Element, Kernel, Sweep};
use crate::ops::output::Output;
use crate::ops::parallel::for_each;

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
        value: impl Fn(usize, usize, usize) -> T + Sync,
    ) -> Self {
        let (panels, width) = (lanes.panels(), lanes.kernel.width);
        let mut values = Output::new(groups * panels * depth * width);
        let parts = values.parts();
        for_each(groups * panels, groups * panels * depth * width, |task| {
            let (group, panel) = (task / panels, task % panels);
            // SAFETY: each panel is one task's.
            let rows = unsafe { parts.part(task * depth * width..(task + 1) * depth * width) };
            for (k, row) in rows.chunks_exact_mut(width).enumerate() {
                let (used, spare) = row.split_at_mut(lanes.of(panel).len());
                for (to, channel) in used.iter_mut().zip(lanes.of(panel)) {
                    to.write(value(group, k, channel));
                }
                spare.fill(MaybeUninit::new(T::zero()));
            }
        });
        Self {
            lanes,
            depth,
            // SAFETY: every panel has been written, used and spare lanes of all rows.
            values: unsafe { values.finish() },
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
    let bias = |lane: usize| bias.map_or(T::zero(), |bias| bias[lane]);
    let (first, last) = (targets[0], targets[targets.len() - 1]);
    // They ascend.
    if last - first + 1 == targets.len() {
        let lanes = out.len() / plane;
        transpose(
            block,
            width,
            &mut out[first..],
            plane,
            [targets.len(), lanes],
            bias,
        );
        return;
    }
    for (lane, out) in out.chunks_exact_mut(plane).enumerate() {
        for (row, &target) in block.chunks_exact(width).zip(targets) {
            out[target].write(row[lane] + bias(lane));
        }
    }
}

/// The columns of `planes`, from position `start` on, as many as fit in `panel`. Lanes to spare
/// become zeros: nobody reads what comes of them, but left-over bits can be slow numbers.
pub(super) fn to_panel<T: Element>(
    planes: &[T],
    plane: usize,
    start: usize,
    panel: &mut [T],
    width: usize,
) {
    let (lanes, positions) = (planes.len() / plane, panel.len() / width);
    // SAFETY: `MaybeUninit<T>` has the layout of `T`, and `transpose` only writes values.
    let to = unsafe { &mut *(std::ptr::from_mut(panel) as *mut [MaybeUninit<T>]) };
    transpose(
        &planes[start..],
        plane,
        to,
        width,
        [lanes, positions],
        |_| T::zero(),
    );
    if lanes < width {
        for row in panel.chunks_exact_mut(width) {
            row[lanes..].fill(T::zero());
        }
    }
}

/// `to[j·to_stride + i] = from[i·from_stride + j] + add(j)` for `i` and `j` below the two `sizes`.
fn transpose<T: Element>(
    from: &[T],
    from_stride: usize,
    to: &mut [MaybeUninit<T>],
    to_stride: usize,
    [rows, columns]: [usize; 2],
    add: impl Fn(usize) -> T,
) {
    /// The compiler makes a few shuffles of a block of this size.
    const SIDE: usize = 4;
    if rows == 0 || columns == 0 {
        return;
    }
    assert!((rows - 1) * from_stride + columns <= from.len());
    assert!((columns - 1) * to_stride + rows <= to.len());
    let (whole_rows, whole_columns) = (rows - rows % SIDE, columns - columns % SIDE);
    for j in (0..whole_columns).step_by(SIDE) {
        let add: [T; SIDE] = std::array::from_fn(|b| add(j + b));
        for i in (0..whole_rows).step_by(SIDE) {
            // SAFETY: the block's rows and columns are below the sizes, for which both slices are
            // long enough.
            unsafe {
                let block: [[T; SIDE]; SIDE] = std::array::from_fn(|a| {
                    from.as_ptr()
                        .add((i + a) * from_stride + j)
                        .cast::<[T; SIDE]>()
                        .read_unaligned()
                });
                for b in 0..SIDE {
                    let column: [T; SIDE] = std::array::from_fn(|a| block[a][b] + add[b]);
                    let to = to.as_mut_ptr().add((j + b) * to_stride + i);
                    to.cast::<[T; SIDE]>().write_unaligned(column);
                }
            }
        }
    }
    for j in 0..columns {
        let left = if j < whole_columns { whole_rows } else { 0 };
        for i in left..rows {
            to[j * to_stride + i].write(from[i * from_stride + j] + add(j));
        }
    }
}
