//! The loss of a classifier.

use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType};

use super::backward::gradient_of;
use super::keeps_graph::keeps_graph;
use super::output::Output;
use super::parallel::{for_each, map};
use super::slices::{dispatch, tensor, values, with_values};

const NAME: &str = "cross_entropy";

/// The mean cross entropy of a batch of logits with the labels that are right.
///
/// For `logits: [n, classes]` and `labels: [n]`, a scalar:
///
/// ```text
/// loss = -1/n · Σ log(softmax(logits[i])[labels[i]])
/// dlogits[i, j] = (softmax(logits[i])[j] - (1 if j = labels[i], 0 otherwise)) / n · dloss
/// ```
///
/// The largest logit of a row is subtracted before the exponential, so that no size of logits
/// overflows. Of no rows at all the loss is NaN, as in PyTorch.
///
/// On the CPU this is one op forward and one backward, both computed in F64 and rounded once. On
/// other devices it is candle-nn's `loss::cross_entropy`.
///
/// `logits` are F32, F64, F16 or BF16, which is the loss's dtype too, and `labels` U32; layouts that
/// are not contiguous are copied first. Labels have no gradient.
///
/// PyTorch: `torch.nn.functional.cross_entropy(logits, labels)`.
///
/// # Errors
/// Tensors of another rank, dtype or device, logits without classes, another number of labels than
/// of rows, and on the CPU labels that are not below the number of classes.
///
/// ```
/// use candle_batch_norm::ops::cross_entropy;
/// use candle_core::{Device, Tensor};
///
/// # fn main() -> candle_core::Result<()> {
/// let logits = Tensor::new(&[[1f32, 1.0], [1000.0, 0.0]], &Device::Cpu)?;
/// let labels = Tensor::new(&[0u32, 0], &Device::Cpu)?;
/// let loss = cross_entropy(&logits, &labels)?.to_scalar::<f32>()?;
/// assert!((loss - 2f32.ln() / 2.0).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let (&[n, classes], &[count]) = (logits.dims(), labels.dims()) else {
        bail!(
            "{NAME} expects logits [n, classes] and labels [n], got {:?} and {:?}",
            logits.dims(),
            labels.dims()
        )
    };
    if n != count || classes == 0 {
        bail!("{NAME} expects logits of 1 class at least and as many labels as rows, got {:?} and {:?}", logits.dims(), labels.dims())
    }
    if !matches!(
        logits.dtype(),
        DType::F32 | DType::F64 | DType::F16 | DType::BF16
    ) || labels.dtype() != DType::U32
    {
        bail!(
            "{NAME} expects logits of dtype F32, F64, F16 or BF16 and labels of dtype U32, got {:?} and {:?}",
            logits.dtype(),
            labels.dtype()
        )
    }
    if !labels.device().same_device(logits.device()) {
        bail!(
            "{NAME} expects labels on the logits' device, {:?}, got {:?}",
            logits.device().location(),
            labels.device().location()
        )
    }
    if !logits.device().is_cpu() {
        return candle_nn::loss::cross_entropy(logits, labels);
    }
    // In the op, a copy that is made so would be a constant.
    let logits = logits.contiguous()?;
    logits.apply_op2(&labels.contiguous()?, CrossEntropy { classes })
}

struct CrossEntropy {
    classes: usize,
}

impl CustomOp2 for CrossEntropy {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let labels = values(NAME, s2, l2)?;
        let loss = dispatch!(NAME, s1.dtype(), forward(s1, l1, labels, self.classes))?;
        Ok((loss, ().into()))
    }

    fn bwd(
        &self,
        logits: &Tensor,
        labels: &Tensor,
        _loss: &Tensor,
        dloss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dlogits = match keeps_graph() {
            true => composed(logits, labels, dloss)?,
            false => {
                let dloss = dloss.detach();
                dispatch!(
                    NAME,
                    logits.dtype(),
                    backward(logits, labels, &dloss, self.classes)
                )?
            }
        };
        Ok((gradient_of(logits, Some(dlogits))?, None))
    }
}

/// An exponential takes as long as so many values in a plain loop.
const PER_VALUE: usize = 8;

/// The largest logit of a row, and the sum of all exponentials in relation to it.
fn softmax<T: WithDType>(row: &[T]) -> (f64, f64) {
    let values = || row.iter().map(|v| v.to_f64());
    let max = values().fold(f64::NEG_INFINITY, f64::max);
    (max, values().map(|v| (v - max).exp()).sum())
}

fn forward<T: WithDType>(
    logits: &CpuStorage,
    layout: &Layout,
    labels: &[u32],
    classes: usize,
) -> Result<CpuStorage> {
    let logits = values::<T>(NAME, logits, layout)?;
    let wrong = labels.iter().position(|&label| label as usize >= classes);
    if let Some(row) = wrong {
        bail!(
            "{NAME} expects labels below the number of classes, {classes}, got {} in row {row}",
            labels[row]
        )
    }
    let losses = map(labels.len(), logits.len() * PER_VALUE, |row| {
        let label = labels[row] as usize;
        let row = &logits[row * classes..][..classes];
        let (max, sum) = softmax(row);
        sum.ln() - (row[label].to_f64() - max)
    });
    // In the order of the rows, whatever thread a row was on.
    let loss = losses.iter().sum::<f64>() / labels.len() as f64;
    Ok(T::to_cpu_storage_owned(vec![T::from_f64(loss)]))
}

fn backward<T: WithDType>(
    logits: &Tensor,
    labels: &Tensor,
    dloss: &Tensor,
    classes: usize,
) -> Result<Tensor> {
    let dloss = dloss.to_scalar::<T>()?.to_f64();
    let dlogits = with_values(NAME, logits, |logits: &[T]| {
        with_values(NAME, labels, |labels: &[u32]| {
            let mut dlogits = Output::new(logits.len());
            let parts = dlogits.parts();
            let scale = dloss / labels.len() as f64;
            for_each(labels.len(), logits.len() * PER_VALUE, |row| {
                let range = row * classes..(row + 1) * classes;
                let label = labels[row] as usize;
                let logits = &logits[range.clone()];
                // SAFETY: each row is one task's.
                let dlogits = unsafe { parts.part(range) };
                let (max, sum) = softmax(logits);
                for (j, (logit, dlogit)) in logits.iter().zip(dlogits).enumerate() {
                    let share = (logit.to_f64() - max).exp() / sum;
                    let right = if j == label { 1.0 } else { 0.0 };
                    dlogit.write(T::from_f64((share - right) * scale));
                }
            });
            // SAFETY: all rows have been written.
            Ok(unsafe { dlogits.finish() })
        })
    })?;
    Ok(tensor(dlogits, logits.shape()))
}

/// The gradient by candle's ops, so that it has gradients to `logits` and `dloss`.
fn composed(logits: &Tensor, labels: &Tensor, dloss: &Tensor) -> Result<Tensor> {
    let (n, classes) = logits.dims2()?;
    let wide = logits.to_dtype(DType::F64)?;
    let max = wide.detach().max_keepdim(1)?;
    let exponentials = wide.broadcast_sub(&max)?.exp()?;
    let shares = exponentials.broadcast_div(&exponentials.sum_keepdim(1)?)?;
    let all = Tensor::arange(0, classes as u32, logits.device())?;
    let right = labels.unsqueeze(1)?.broadcast_eq(&all.unsqueeze(0)?)?;
    let scale = (dloss.to_dtype(DType::F64)? / n as f64)?;
    let dlogits = (shares - right.to_dtype(DType::F64)?)?.broadcast_mul(&scale)?;
    dlogits.to_dtype(logits.dtype())
}
