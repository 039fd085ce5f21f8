//! A launch: its arguments, its shared memory, and how its blocks stand to each other.

use std::ffi::c_void;
use std::ptr;

use candle_core::cuda_backend::WrapErr;
use candle_core::{bail, Result};
use cudarc::driver::sys::{
    self, CUfunction_attribute as FunctionAttribute, CUlaunchAttribute, CUlaunchAttributeID as Id,
    CUlaunchAttributeValue, CUlaunchAttributeValue_union__bindgen_ty_1 as ClusterDim,
    CUlaunchConfig,
};
use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut, SyncOnDrop,
};

use crate::ops::plan::{Limits, Plan};

/// How many blocks, and of which size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub blocks: usize,
    pub threads: usize,
    pub shared_bytes: usize,
    /// Blocks of a cluster.
    pub cluster: usize,
    /// Whether all blocks have to run at the same time.
    pub is_cooperative: bool,
}

impl From<&Plan> for Grid {
    fn from(plan: &Plan) -> Self {
        Self {
            blocks: plan.grid,
            threads: plan.threads,
            shared_bytes: plan.shared_bytes,
            cluster: plan.cluster(),
            is_cooperative: plan.is_cooperative(),
        }
    }
}

impl Grid {
    /// Calls `f` with what the driver wants to know of it.
    fn configure<R>(&self, stream: &CudaStream, f: impl FnOnce(&CUlaunchConfig) -> R) -> Result<R> {
        let Ok(blocks) = i32::try_from(self.blocks) else {
            bail!(
                "a norm would need {} blocks, more than a CUDA grid has",
                self.blocks
            )
        };
        let mut attributes = vec![];
        if self.cluster > 1 {
            let (x, y, z) = (self.cluster as u32, 1, 1);
            let value = CUlaunchAttributeValue {
                clusterDim: ClusterDim { x, y, z },
            };
            attributes.push(attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, value));
        }
        if self.is_cooperative {
            let value = CUlaunchAttributeValue { cooperative: 1 };
            attributes.push(attribute(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, value));
        }
        Ok(f(&CUlaunchConfig {
            gridDimX: blocks as u32,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: self.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared_bytes as u32,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }))
    }
}

/// Lets `function` have the shared memory of `grid`, and says whether the device can run it: parts
/// of a GPU may have fewer multiprocessors together than a cluster or a group needs.
pub(crate) fn prepare(
    function: &CudaFunction,
    grid: Grid,
    limits: &Limits,
    stream: &CudaStream,
) -> Result<bool> {
    let own = function
        .get_attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
        .w()?;
    // The same values always, so that launches from other threads agree: all that a block can have,
    // and no more of the cache than that leaves.
    for (attribute, value) in [
        (
            FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            limits.shared_per_block as i32 - own,
        ),
        (
            FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
            100,
        ),
    ] {
        function.set_attribute(attribute, value).w()?;
    }
    if grid.cluster > 1 {
        let mut clusters = 0;
        let result = grid.configure(stream, |config| {
            // SAFETY: `config` lives until the call returns.
            unsafe {
                sys::cuOccupancyMaxActiveClusters(&mut clusters, function.cu_function(), config)
            }
        })?;
        return Ok(result.result().is_ok() && clusters > 0);
    }
    if grid.is_cooperative {
        let of_one = function
            .occupancy_max_active_blocks_per_multiprocessor(
                grid.threads as u32,
                grid.shared_bytes,
                None,
            )
            .w()?;
        return Ok(grid.blocks <= of_one as usize * limits.multiprocessors);
    }
    Ok(true)
}

/// The arguments of a launch, in the order of the kernel's parameters.
pub(crate) struct Args<'a> {
    stream: &'a CudaStream,
    /// Device pointers; null where a tensor is absent.
    pointers: Vec<u64>,
    /// Tell the other streams, when they are dropped behind the launch, what it read and wrote.
    guards: Vec<SyncOnDrop<'a>>,
}

impl<'a> Args<'a> {
    pub fn new(stream: &'a CudaStream) -> Self {
        Self {
            stream,
            pointers: vec![],
            guards: vec![],
        }
    }

    pub fn read<T>(&mut self, view: &'a CudaView<'a, T>) -> &mut Self {
        let (pointer, guard) = view.device_ptr(self.stream);
        self.push(pointer, Some(guard))
    }

    pub fn read_optional<T>(&mut self, view: &'a Option<CudaView<'a, T>>) -> &mut Self {
        match view {
            None => self.push(0, None),
            Some(view) => self.read(view),
        }
    }

    pub fn write<T>(&mut self, slice: &'a mut impl DevicePtrMut<T>) -> &mut Self {
        let (pointer, guard) = slice.device_ptr_mut(self.stream);
        self.push(pointer, Some(guard))
    }

    pub fn write_optional<T>(&mut self, slice: &'a mut Option<CudaSlice<T>>) -> &mut Self {
        match slice {
            None => self.push(0, None),
            Some(slice) => self.write(slice),
        }
    }

    fn push(&mut self, pointer: u64, guard: Option<SyncOnDrop<'a>>) -> &mut Self {
        self.pointers.push(pointer);
        self.guards.extend(guard);
        self
    }

    pub fn null(&mut self) -> &mut Self {
        self.push(0, None)
    }

    /// Launches `function` with the tensors pushed so far and `values` behind them.
    ///
    /// # Safety
    /// The tensors and the types behind `values` have to be those of the kernel's parameters, and
    /// the kernel must stay within the tensors, of which it writes only those pushed by `write`.
    pub unsafe fn launch(
        mut self,
        function: &CudaFunction,
        grid: Grid,
        values: &[*const c_void],
    ) -> Result<()> {
        let pointers = self.pointers.iter_mut();
        let mut params: Vec<*mut c_void> = pointers
            .map(|pointer| ptr::from_mut(pointer).cast())
            .chain(values.iter().map(|value| value.cast_mut()))
            .collect();
        self.stream.context().bind_to_thread().w()?;
        let result = grid.configure(self.stream, |config| {
            // SAFETY: `config` and `params` live until the call returns, which copies the
            // arguments; these are the kernel's, as the caller promises.
            unsafe {
                sys::cuLaunchKernelEx(
                    config,
                    function.cu_function(),
                    params.as_mut_ptr(),
                    ptr::null_mut(),
                )
            }
        })?;
        result.result().w()
    }
}

fn attribute(id: Id, value: CUlaunchAttributeValue) -> CUlaunchAttribute {
    CUlaunchAttribute {
        id,
        pad: [0; 4],
        value,
    }
}
