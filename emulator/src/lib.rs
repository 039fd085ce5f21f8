//! Runs the CUDA kernels of this repository on the CPU. A tool for tests: slow, but exact about
//! barriers, races and memory out of range, and it needs no GPU. See the README beside it.
//!
//! ```
//! use kernel_emulator::{launch, Arg, Options, Schedule};
//!
//! let mut running = vec![1f32; 300];
//! let new = vec![3f64; 300];
//! let args = [
//!     Arg::slice_mut(&mut running),
//!     Arg::slice(&new),
//!     Arg::value(&0.75f64), // keep
//!     Arg::value(&0.25f64), // take
//!     Arg::value(&300i64),
//! ];
//! let options = Options {
//!     grid: [2, 1, 1],
//!     block: [256, 1, 1],
//!     schedule: Schedule::Random(1),
//!     ..Options::default()
//! };
//! // SAFETY: the arguments are those of the kernel, and both slices have 300 values.
//! unsafe { launch("bn_running_f32", &options, &args) }.unwrap();
//! assert_eq!(running, vec![1.5; 300]);
//! ```

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::fmt;
use std::marker::PhantomData;
use std::ptr;

/// The sanitizer that the kernels are built with: `address`, `undefined`, `thread` or none.
pub const SANITIZER: Option<&str> = if env!("KERNEL_SANITIZER").is_empty() {
    None
} else {
    Some(env!("KERNEL_SANITIZER"))
};

/// In which order threads run whenever more than one can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Schedule {
    /// The first thread of the first block first.
    #[default]
    Forward,
    /// The last one first.
    Reverse,
    /// By chance, with several blocks at a time.
    Random(u64),
    /// By chance, but one thread, warp or block runs only when no other can.
    Starve(u64),
}

/// How a kernel is launched.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks of a cluster.
    pub cluster: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared_bytes: usize,
    /// Whether all blocks run at the same time, which a barrier of the grid needs.
    pub cooperative: bool,
    pub schedule: Schedule,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            grid: [1; 3],
            block: [1; 3],
            cluster: [1; 3],
            shared_bytes: 0,
            cooperative: false,
            schedule: Schedule::Forward,
        }
    }
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub struct Arg<'a> {
    kind: ArgKind,
    borrows: PhantomData<&'a mut ()>,
}

#[derive(Debug, Clone, Copy)]
enum ArgKind {
    Pointer(*const c_void),
    Value(*const c_void, usize),
}

impl<'a> Arg<'a> {
    /// A pointer to values that the kernel reads.
    pub fn slice<T>(values: &'a [T]) -> Self {
        Self::of(ArgKind::Pointer(values.as_ptr().cast()))
    }

    /// A pointer to values that the kernel may write.
    pub fn slice_mut<T>(values: &'a mut [T]) -> Self {
        Self::of(ArgKind::Pointer(values.as_mut_ptr().cast_const().cast()))
    }

    /// A null pointer.
    pub fn null() -> Self {
        Self::of(ArgKind::Pointer(ptr::null()))
    }

    /// A pointer to values, or null.
    pub fn optional<T>(values: Option<&'a [T]>) -> Self {
        values.map_or(Self::null(), Self::slice)
    }

    /// A number or a `repr(C)` struct, passed by value.
    pub fn value<T: Copy>(value: &'a T) -> Self {
        Self::of(ArgKind::Value(
            ptr::from_ref(value).cast(),
            size_of_val(value),
        ))
    }

    fn of(kind: ArgKind) -> Self {
        Self {
            kind,
            borrows: PhantomData,
        }
    }
}

/// What was wrong with a launch or is wrong in a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// `EmulatorLaunch` of runtime/launch.cpp.
#[repr(C)]
struct Launch {
    grid: [u32; 3],
    block: [u32; 3],
    cluster: [u32; 3],
    cooperative: c_int,
    schedule: c_int,
    seed: u64,
    shared_bytes: usize,
}

// SAFETY: the declaration in runtime/launch.cpp.
unsafe extern "C" {
    fn emulator_launch(
        name: *const c_char,
        launch: *const Launch,
        args: *const *const c_void,
        sizes: *const usize,
        count: usize,
        message: *mut c_char,
        message_size: usize,
    ) -> c_int;
}

/// Runs a kernel from beginning to end.
///
/// Errors are launches that CUDA would refuse too (an unknown kernel, arguments of another number
/// or size, sizes beyond its limits) and what the emulator finds: deadlocks, barriers and warps
/// that diverge, shared memory written out of range. A kernel stops at its first error and leaves
/// its output as it is by then.
///
/// # Safety
///
/// The types behind the pointers in `args` have to be those of the kernel's parameters, and the
/// kernel must touch no memory beyond them. That is checked by the address sanitizer only.
pub unsafe fn launch(name: &str, options: &Options, args: &[Arg]) -> Result<(), Error> {
    let c_name = CString::new(name).map_err(|error| Error(error.to_string()))?;
    let (schedule, seed) = match options.schedule {
        Schedule::Forward => (0, 0),
        Schedule::Reverse => (1, 0),
        Schedule::Random(seed) => (2, seed),
        Schedule::Starve(seed) => (3, seed),
    };
    let launch = Launch {
        grid: options.grid,
        block: options.block,
        cluster: options.cluster,
        cooperative: options.cooperative.into(),
        schedule,
        seed,
        shared_bytes: options.shared_bytes,
    };
    // As for cuLaunchKernel: the addresses of the arguments, which for a slice is that of a pointer.
    let (addresses, sizes): (Vec<_>, Vec<_>) = args
        .iter()
        .map(|arg| match &arg.kind {
            ArgKind::Pointer(pointer) => (ptr::from_ref(pointer).cast(), size_of_val(pointer)),
            ArgKind::Value(address, size) => (*address, *size),
        })
        .unzip();
    let mut message: [c_char; 4096] = [0; 4096];
    // SAFETY: `launch`, `addresses`, `sizes` and `message` live until the end of the call and have
    // the lengths given; what the kernel does with its arguments is up to the caller.
    let status = unsafe {
        emulator_launch(
            c_name.as_ptr(),
            &launch,
            addresses.as_ptr(),
            sizes.as_ptr(),
            args.len(),
            message.as_mut_ptr(),
            message.len(),
        )
    };
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the runtime ends the message with a zero.
    let text = unsafe { CStr::from_ptr(message.as_ptr()) };
    Err(Error(format!("{name}: {}", text.to_string_lossy())))
}
