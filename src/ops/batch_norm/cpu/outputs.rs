//! Where the results of a pass go.

use super::{Forward, Normalised};
use crate::ops::output::{Output, Parts};

/// Where the output goes, and what is kept of its pixels.
#[derive(Clone, Copy)]
pub(super) struct YParts<'a, T> {
    pub y: Parts<'a, T>,
    pub maxima: Option<Parts<'a, T>>,
}

/// An output to be.
pub(super) struct Unfinished<T> {
    y: Output<T>,
    maxima: Option<Output<T>>,
}

impl<T> Unfinished<T> {
    pub fn new(job: &Forward<T>) -> Self {
        let len = job.spec.outputs();
        let keeps_maxima = job.keeps_maxima && job.spec.windows.is_some();
        Self {
            y: Output::new(len),
            maxima: keeps_maxima.then(|| Output::new(len)),
        }
    }

    pub fn parts(&mut self) -> YParts<'_, T> {
        YParts {
            y: self.y.parts(),
            maxima: self.maxima.as_mut().map(Output::parts),
        }
    }

    /// # Safety
    /// Every value has been written.
    pub unsafe fn finish(self, stats: Vec<f64>) -> Normalised<T> {
        // SAFETY: the caller promises it.
        unsafe {
            Normalised {
                y: self.y.finish(),
                stats,
                maxima: self.maxima.map(|maxima| maxima.finish()),
            }
        }
    }
}

/// Where the gradients that are wanted go, as large as `x`.
#[derive(Clone, Copy)]
pub(super) struct GradParts<'a, T> {
    pub dx: Option<Parts<'a, T>>,
    pub dresidual: Option<Parts<'a, T>>,
}
