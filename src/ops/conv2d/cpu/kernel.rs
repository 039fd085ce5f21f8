//! The inner loop of the convolution and of its gradients: a matrix product that gathers one side.
//!
//! All three are sums `out[row][lane] = Σ x[rows[row] + depth[k]]·panel[k][lane]`, where the windows
//! of an image are read in place, through two lists of offsets, and never copied out.

use candle_core::WithDType;

use super::vector::{Portable, Vector};

/// One matrix product. `out` is `[rows.len(), width]`, `panel` is `[depth.len(), width]`.
pub(crate) struct Sweep<'a, T> {
    pub x: &'a [T],
    pub rows: &'a [usize],
    pub depth: &'a [usize],
    pub panel: &'a [T],
    pub out: &'a mut [T],
    /// Adds to what `out` holds; otherwise overwrites it.
    pub accumulate: bool,
}

/// The loop for one set of instructions and one `width`.
pub(crate) struct Kernel<T> {
    pub width: usize,
    run: unsafe fn(&mut Sweep<T>),
}

impl<T> Kernel<T> {
    pub fn run(&self, mut sweep: Sweep<T>) {
        let max = |offsets: &[usize]| offsets.iter().copied().max();
        let (Some(row), depth) = (max(sweep.rows), max(sweep.depth)) else {
            return;
        };
        let end = row.checked_add(depth.unwrap_or(0));
        assert!(
            end.is_some_and(|end| end < sweep.x.len()),
            "offsets beyond the image"
        );
        assert_eq!(sweep.panel.len(), sweep.depth.len() * self.width);
        assert_eq!(sweep.out.len(), sweep.rows.len() * self.width);
        // SAFETY: `Element::sets` gives only what the CPU can run, and every offset and length
        // has just been checked.
        unsafe { (self.run)(&mut sweep) }
    }
}

/// A dtype that has such loops.
pub(crate) trait Element: WithDType + Default {
    /// What the CPU can run, the fastest set first, in each the widest first. There is always one.
    fn sets() -> impl Iterator<Item = &'static [Kernel<Self>]>;

    /// The fastest set.
    fn kernels() -> &'static [Kernel<Self>] {
        Self::sets().next().unwrap_or(&[])
    }
}

/// The kernel that covers `lanes` with the least waste; the widest of several.
pub(super) fn kernel_for<T: Element>(lanes: usize) -> &'static Kernel<T> {
    let kernels = T::kernels();
    let waste = |kernel: &&Kernel<T>| lanes.next_multiple_of(kernel.width);
    // `min_by_key` gives the first of equals.
    kernels.iter().min_by_key(waste).unwrap_or(&kernels[0])
}

/// Holds a tile of `ROWS` rows and `VECTORS` vectors in registers while it goes down `depth`.
///
/// # Safety
/// The CPU has the instructions of `V`; `x` reaches as far as any row and any depth together, and
/// `panel` and `out` are as long as [`Sweep`] says.
#[inline(always)]
unsafe fn sweep<V: Vector, const VECTORS: usize, const ROWS: usize>(job: &mut Sweep<V::Value>) {
    let width = VECTORS * V::LANES;
    let x = job.x.as_ptr();
    for (tile, rows) in job.rows.chunks(ROWS).enumerate() {
        // SAFETY: the caller's promises. The last tile repeats its last row, and stores it once.
        unsafe {
            let starts: [_; ROWS] = std::array::from_fn(|i| x.add(rows[i.min(rows.len() - 1)]));
            let out = job.out.as_mut_ptr().add(tile * ROWS * width);
            let mut panel = job.panel.as_ptr();
            let mut sums = [[V::zero(); VECTORS]; ROWS];
            if job.accumulate {
                for (i, sums) in sums.iter_mut().enumerate() {
                    if i < rows.len() {
                        for (v, sum) in sums.iter_mut().enumerate() {
                            *sum = V::load(out.add(i * width + v * V::LANES));
                        }
                    }
                }
            }
            for &depth in job.depth {
                let factors: [V; VECTORS] =
                    std::array::from_fn(|v| V::load(panel.add(v * V::LANES)));
                for (start, sums) in starts.iter().zip(&mut sums) {
                    let value = V::splat(*start.add(depth));
                    for (sum, factor) in sums.iter_mut().zip(factors) {
                        *sum = value.mul_add(factor, *sum);
                    }
                }
                panel = panel.add(width);
            }
            for (i, sums) in sums.iter().enumerate() {
                if i < rows.len() {
                    for (v, sum) in sums.iter().enumerate() {
                        sum.store(out.add(i * width + v * V::LANES));
                    }
                }
            }
        }
    }
}

/// The table of kernels for a vector type: `(vectors, rows)` of the tile, as the registers allow.
macro_rules! table {
    ($attribute:tt $t:ty, $v:ty, $(($vectors:literal, $rows:literal)),+) => {
        &[$({
            #$attribute
            unsafe fn run(job: &mut Sweep<$t>) {
                // SAFETY: the caller's promises are those of `sweep`.
                unsafe { sweep::<$v, $vectors, $rows>(job) }
            }
            Kernel { width: $vectors * <$v as Vector>::LANES, run }
        }),+]
    };
}

macro_rules! element {
    ($t:ty, $avx512:ident, $avx2:ident, $lanes:literal) => {
        impl Element for $t {
            fn sets() -> impl Iterator<Item = &'static [Kernel<Self>]> {
                static PORTABLE: &[Kernel<$t>] =
                    table!([inline(never)] $t, Portable<$t, $lanes>, (2, 6), (1, 6));
                #[cfg(target_arch = "x86_64")]
                let x86 = {
                    use std::arch::x86_64::{$avx2, $avx512};
                    static AVX512: &[Kernel<$t>] = table!(
                        [target_feature(enable = "avx512f")] $t, $avx512, (4, 6), (3, 8), (2, 10), (1, 10)
                    );
                    static AVX2: &[Kernel<$t>] = table!(
                        [target_feature(enable = "avx2,fma")] $t, $avx2, (2, 6), (1, 10)
                    );
                    let avx512 = is_x86_feature_detected!("avx512f");
                    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                    [(avx512, AVX512), (avx2, AVX2)]
                };
                #[cfg(not(target_arch = "x86_64"))]
                let x86 = [];
                let runs = x86.into_iter().filter_map(|(runs, set)| runs.then_some(set));
                runs.chain([PORTABLE])
            }
        }
    };
}
element!(f32, __m512, __m256, 4);
element!(f64, __m512d, __m256d, 2);

#[cfg(test)]
mod tests {
    use super::*;

    /// Every kernel that this CPU can run, not only those that it would choose.
    fn against_plain_loops<T: Element>(tolerance: f64) {
        let value = |i: usize| ((i * 37 % 101) as f64 - 50.0) / 16.0;
        let values = |len: usize| (0..len).map(|i| T::from_f64(value(i))).collect::<Vec<T>>();
        for kernel in T::sets().flatten() {
            for (rows, depth) in [(1, 1), (5, 3), (24, 0), (31, 40)] {
                let rows: Vec<usize> = (0..rows).map(|row| row * 7 % 31).collect();
                let depth: Vec<usize> = (0..depth).map(|k| k * 11 % 53).collect();
                let (x, panel) = (values(31 + 53), values(depth.len() * kernel.width));
                for accumulate in [false, true] {
                    let mut out = values(rows.len() * kernel.width);
                    let before = out.clone();
                    kernel.run(Sweep {
                        x: &x,
                        rows: &rows,
                        depth: &depth,
                        panel: &panel,
                        out: &mut out,
                        accumulate,
                    });
                    for (i, (got, before)) in out.iter().zip(before).enumerate() {
                        let (row, lane): (usize, usize) =
                            (rows[i / kernel.width], i % kernel.width);
                        let terms = depth.iter().enumerate().map(|(k, depth)| {
                            x[row + depth].to_f64() * panel[k * kernel.width + lane].to_f64()
                        });
                        let start: f64 = if accumulate { before.to_f64() } else { 0.0 };
                        let expected = terms.fold(start, |sum, term| sum + term);
                        let error: f64 = (got.to_f64() - expected).abs();
                        assert!(
                            error <= tolerance,
                            "{} lanes, {rows:?}, {i}: {got}, expected {expected}",
                            kernel.width
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_kernel() {
        against_plain_loops::<f32>(1e-3);
        against_plain_loops::<f64>(1e-11);
    }

    #[test]
    fn the_kernel_with_the_least_waste() {
        for lanes in 1..200usize {
            let chosen = lanes.next_multiple_of(kernel_for::<f32>(lanes).width);
            for kernel in f32::kernels() {
                assert!(chosen <= lanes.next_multiple_of(kernel.width));
            }
        }
    }

    #[test]
    #[should_panic(expected = "offsets beyond the image")]
    fn no_reading_beyond_the_end() {
        let kernel = kernel_for::<f32>(1);
        kernel.run(Sweep {
            x: &[1.0; 8],
            rows: &[0, 4],
            depth: &[0, 4],
            panel: &vec![1.0; 2 * kernel.width],
            out: &mut vec![0.0; 2 * kernel.width],
            accumulate: false,
        });
    }
}
