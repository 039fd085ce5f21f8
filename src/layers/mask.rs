//! Inputs of which only some positions are real values.

use candle_core::{bail, DType, Result, Tensor};

use crate::shape::{check_device, check_input, Order};

/// The positions of an input `[n, c, …]` that are not masked, as rows of the matrix `[m, c]`.
pub(super) struct Positions {
    /// U32, ascending.
    rows: Tensor,
}

impl Positions {
    /// Those of a mask, or `None` if all positions of `x` are.
    pub fn of(mask: &Tensor, x: &Tensor) -> Result<Option<Self>> {
        let m = check_input("batch norm", x)?.m();
        let mut dims = x.dims().to_vec();
        dims.remove(1);
        let fits = |(mask, dim): (&usize, &usize)| mask == dim || *mask == 1;
        let is_like = mask.rank() == dims.len() && mask.dims().iter().zip(&dims).all(fits);
        if !is_like || mask.dtype() != DType::U8 {
            bail!(
                "batch norm expects a mask U8 {dims:?}, or with a 1 in the place of dimensions, got {:?} {:?}",
                mask.dtype(),
                mask.dims()
            )
        }
        check_device("batch norm", "a mask", mask, x)?;
        let mask = mask.broadcast_as(dims)?.flatten_all()?.to_vec1::<u8>()?;
        let real = |(row, &real): (usize, &u8)| (real != 0).then_some(row as u32);
        let rows: Vec<u32> = mask.iter().enumerate().filter_map(real).collect();
        if rows.len() == m || x.elem_count() == 0 {
            return Ok(None);
        }
        let rows = Tensor::new(rows, x.device())?;
        Ok(Some(Self { rows }))
    }

    /// The values at them, `[m', c]`, if there are any.
    pub fn rows(&self, x: &Tensor) -> Result<Option<Tensor>> {
        if self.rows.elem_count() == 0 {
            return Ok(None);
        }
        let matrix = Order::ChannelsLast.into_kernel(x)?;
        matrix.index_select(&self.rows, 0).map(Some)
    }

    /// Rows in the shape and order of `x`, and 0 at all other positions.
    pub fn back(&self, rows: &Tensor, x: &Tensor) -> Result<Tensor> {
        let shape = (x.elem_count() / rows.dims()[1], rows.dims()[1]);
        let zeros = Tensor::zeros(shape, rows.dtype(), rows.device())?;
        let matrix = zeros.index_add(&self.rows, rows, 0)?;
        let y = Order::ChannelsLast.out_of_kernel(&matrix, x)?;
        match Order::of(x)? {
            Order::ChannelsFirst => y.contiguous(),
            Order::ChannelsLast => Ok(y),
        }
    }
}
