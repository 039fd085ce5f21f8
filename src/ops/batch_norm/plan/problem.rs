//! What a kernel is told of its launch.

use super::Plan;
use crate::dims::Dims;

/// `enum DType` of kernels/common.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
#[allow(missing_docs)]
pub enum DTypeCode {
    F32 = 0,
    F64 = 1,
    F16 = 2,
    BF16 = 3,
}

/// `struct Problem` of kernels/tiles.cuh, which says what the fields mean.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub struct Problem {
    pub n: i64,
    pub c: i64,
    pub s: i64,
    pub part: i64,
    pub eps: f64,
    pub channels: i32,
    pub splits: i32,
    pub params_dtype: i32,
    pub given_dtype: i32,
    pub relu: i32,
    pub remove_mean: i32,
    pub training: i32,
    pub unused: i32,
}

const _: () = assert!(size_of::<Problem>() == 72);

/// What is not in the plan.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub struct Options {
    pub eps: f64,
    pub params_dtype: Option<DTypeCode>,
    pub given_dtype: Option<DTypeCode>,
    pub relu: bool,
    pub remove_mean: bool,
    pub training: bool,
}

impl Problem {
    /// For a launch of `plan`.
    pub fn new(dims: Dims, plan: &Plan, options: &Options) -> Self {
        let code = |dtype: Option<DTypeCode>| dtype.map_or(0, |dtype| dtype as i32);
        Self {
            n: dims.n as i64,
            c: dims.c as i64,
            s: dims.s as i64,
            part: plan.part as i64,
            eps: options.eps,
            channels: plan.channels as i32,
            splits: plan.splits as i32,
            params_dtype: code(options.params_dtype),
            given_dtype: code(options.given_dtype),
            relu: options.relu.into(),
            remove_mean: options.remove_mean.into(),
            training: options.training.into(),
            unused: 0,
        }
    }
}
