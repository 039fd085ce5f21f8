//! Channels in any dimension of the input.

use candle_core::{bail, Result, Tensor};

/// An input as the ops take it, with the channels in dimension 1, and the way back.
pub(super) struct ChannelsSecond {
    /// `None` if dimension 1 has them already.
    dims: Option<Vec<usize>>,
}

impl ChannelsSecond {
    /// For inputs of the rank of `x`, whose channels are in dimension `axis`, from the end if below 0.
    pub fn new(x: &Tensor, axis: isize) -> Result<Self> {
        let rank = x.rank();
        if rank < 2 {
            return Ok(Self { dims: None }); // which is the op's to refuse
        }
        let from_start = match axis < 0 {
            true => rank.checked_add_signed(axis),
            false => Some(axis.unsigned_abs()),
        };
        let Some(axis) = from_start.filter(|&axis| axis < rank) else {
            bail!(
                "batch norm expects the channels in dimension {axis}, got an input of shape {:?}",
                x.dims()
            )
        };
        if axis == 1 {
            return Ok(Self { dims: None });
        }
        let mut dims: Vec<usize> = (0..rank).filter(|&dim| dim != axis).collect();
        dims.insert(1, axis);
        Ok(Self { dims: Some(dims) })
    }

    pub fn there(&self, x: &Tensor) -> Result<Tensor> {
        match &self.dims {
            None => Ok(x.clone()),
            Some(dims) => x.permute(&dims[..]),
        }
    }

    pub fn back(&self, y: Tensor) -> Result<Tensor> {
        let Some(dims) = &self.dims else {
            return Ok(y);
        };
        let mut inverse = vec![0; dims.len()];
        for (to, &from) in dims.iter().enumerate() {
            inverse[from] = to;
        }
        y.permute(inverse)
    }
}
