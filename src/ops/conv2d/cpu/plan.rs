//! Where the values of a convolution lie: the lists of offsets that the kernel walks along.

use candle_core::WithDType;

use super::super::Spec;

/// Planes of `h·w` values and the border of zeros that they get.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame {
    h: usize,
    w: usize,
    top: usize,
    left: usize,
    height: usize,
    width: usize,
}

impl Frame {
    /// The number of values per plane, with the border.
    pub fn plane(&self) -> usize {
        self.height * self.width
    }

    /// How much memory `apply` needs for this many planes.
    pub fn scratch(&self, planes: usize) -> usize {
        match self.is_bare() {
            true => 0,
            false => planes * self.plane(),
        }
    }

    fn is_bare(&self) -> bool {
        self.plane() == self.h * self.w
    }

    /// The planes with their border, in `scratch` if there is any.
    pub fn apply<'a, T: WithDType>(&self, planes: &'a [T], scratch: &'a mut [T]) -> &'a [T] {
        if self.is_bare() {
            return planes;
        }
        scratch.fill(T::zero());
        let framed = scratch.chunks_exact_mut(self.plane());
        for (from, to) in planes.chunks_exact(self.h * self.w).zip(framed) {
            let to = to[self.top * self.width..].chunks_exact_mut(self.width);
            for (from, to) in from.chunks_exact(self.w).zip(to) {
                to[self.left..][..self.w].copy_from_slice(from);
            }
        }
        scratch
    }
}

/// The windows of the forward pass: output `j` is the sum over `k` of `x[rows[j] + taps[k]]`, times
/// a weight. `taps` are those of one group, in the order of the weights.
pub(super) struct Windows {
    pub frame: Frame,
    pub rows: Vec<usize>,
    pub taps: Vec<usize>,
}

impl Windows {
    pub fn new(spec: &Spec) -> Self {
        let frame = Frame {
            h: spec.h,
            w: spec.w,
            top: spec.padding,
            left: spec.padding,
            height: spec.h + 2 * spec.padding,
            width: spec.w + 2 * spec.padding,
        };
        let at = |y: usize, x: usize| y * frame.width + x;
        let rows = pairs(spec.oh, spec.ow).map(|(y, x)| at(y, x) * spec.stride);
        let taps = (0..spec.c_in).flat_map(|c| {
            let taps = pairs(spec.kh, spec.kw).map(|(y, x)| at(y, x) * spec.dilation);
            taps.map(move |tap| c * frame.plane() + tap)
        });
        Self {
            frame,
            rows: rows.collect(),
            taps: taps.collect(),
        }
    }
}

/// The pixels of the input that see the same taps: with a stride, every `stride`-th in each
/// direction. `dx` of pixel `pixels[j]` is the sum over `k` of `dy[rows[j] + depth[k]]`, times a
/// weight.
pub(super) struct Phase {
    pub pixels: Vec<usize>,
    pub rows: Vec<usize>,
    pub depth: Vec<usize>,
    /// For each entry of `depth`: the output channel and the place in the kernel.
    pub weights: Vec<(usize, usize)>,
}

/// The backward pass to the input, as sums over `dy` with a border.
pub(super) struct Phases {
    pub frame: Frame,
    pub phases: Vec<Phase>,
}

/// One direction of a [`Phase`].
struct Axis {
    first: usize,
    count: usize,
    /// A place in the kernel, and the output that the first pixel has there.
    taps: Vec<(usize, isize)>,
}

impl Phases {
    pub fn new(spec: &Spec) -> Self {
        let ys = axes(spec, spec.h, spec.kh);
        let xs = axes(spec, spec.w, spec.kw);
        let ((top, height), (left, width)) = (border(&ys, spec.oh), border(&xs, spec.ow));
        let frame = Frame {
            h: spec.oh,
            w: spec.ow,
            top,
            left,
            height,
            width,
        };
        let mut phases = vec![];
        for y in &ys {
            for x in &xs {
                let pixel =
                    |(j, i)| (y.first + j * spec.stride) * spec.w + x.first + i * spec.stride;
                let mut phase = Phase {
                    pixels: pairs(y.count, x.count).map(pixel).collect(),
                    rows: pairs(y.count, x.count)
                        .map(|(j, i)| j * width + i)
                        .collect(),
                    depth: vec![],
                    weights: vec![],
                };
                for o in 0..spec.c_out {
                    for &(ky, oy) in &y.taps {
                        for &(kx, ox) in &x.taps {
                            // The border is as wide as the smallest of `oy` and `ox` asks for.
                            let y = (top as isize + oy) as usize;
                            let x = (left as isize + ox) as usize;
                            phase.depth.push(o * frame.plane() + y * width + x);
                            phase.weights.push((o, ky * spec.kw + kx));
                        }
                    }
                }
                phases.push(phase);
            }
        }
        Self { frame, phases }
    }
}

/// The phases of an axis of `len` pixels and a kernel of `k`.
fn axes(spec: &Spec, len: usize, k: usize) -> Vec<Axis> {
    let (stride, padding) = (spec.stride as isize, spec.padding as isize);
    let axis = |first: usize| Axis {
        first,
        count: (len - first).div_ceil(spec.stride),
        taps: (0..k)
            .map(|tap| {
                (
                    tap,
                    first as isize + padding - (tap * spec.dilation) as isize,
                )
            })
            .filter(|(_, start)| start % stride == 0)
            .map(|(tap, start)| (tap, start / stride))
            .collect(),
    };
    (0..spec.stride.min(len)).map(axis).collect()
}

/// How far the phases reach beyond `len` outputs: the border in front, and the length with borders.
fn border(axes: &[Axis], len: usize) -> (usize, usize) {
    let reach = axes.iter().flat_map(|axis| {
        let last = axis.count as isize - 1;
        axis.taps.iter().map(move |&(_, tap)| (tap, tap + last))
    });
    let (first, last) = reach.fold((0, len as isize - 1), |(first, last), (from, to)| {
        (first.min(from), last.max(to))
    });
    (first.unsigned_abs(), (last - first + 1) as usize)
}

fn pairs(outer: usize, inner: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..outer).flat_map(move |y| (0..inner).map(move |x| (y, x)))
}
