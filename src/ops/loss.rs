//! Head and cross-entropy in one operation.

use super::{WeightRef, check, check_index_tensor, check_indices, check_sums, mismatch, on_device, weight};
use crate::cpu;
use crate::cpu::real::Real;
use crate::cuda;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

pub use crate::cpu::loss::STATISTICS;

/// `Σ_r -ln softmax(x_r Wᵀ)[target_r]` over labelled rows `x [R, K]`, `w [V, K]`.
///
/// `logits` is scratch of any size of at least R: the vocabulary is taken in chunks that fit. `statistics [R, 3]` is kept
/// for [`head_loss_backward`]. Both are of the type of sums.
///
/// # Errors
/// Shapes or types do not fit, or a target lies outside the vocabulary.
pub fn head_loss(
    x: &Tensor,
    w: WeightRef<'_>,
    targets: &Tensor,
    logits: &mut Tensor,
    statistics: &mut Tensor,
) -> Result<f64> {
    let rows = targets.elements();
    let (v, k) = w.extents();
    check("head_loss", &[("x", x, rows, k)])?;
    check_sums("head_loss", "statistics", statistics, rows * STATISTICS, x)?;
    check_index_tensor("head_loss", "targets", targets, rows, x)?;
    check_indices("head_loss", "target", targets, v)?;
    w.check_device("head_loss", x.device())?;
    check_scratch("head_loss", logits, rows, x)?;
    let loss = on_device!("head_loss", x, T => cpu::loss::forward(
        x.as_slice::<T>(),
        weight("head_loss", w)?,
        targets.as_slice(),
        logits.as_mut_slice(),
        statistics.as_mut_slice(),
    ), cuda => cuda::loss::head_loss(x, head(w), targets, logits, statistics));
    Ok(loss)
}

fn head(w: WeightRef<'_>) -> cuda::loss::Head<'_> {
    match w {
        WeightRef::Dense(w) => cuda::loss::Head::Dense(w),
        WeightRef::Quant(w) => cuda::loss::Head::Quant(w),
    }
}

fn check_scratch(operation: &'static str, logits: &Tensor, rows: usize, x: &Tensor) -> Result<()> {
    check_sums(operation, "logits", logits, logits.elements(), x)?;
    if logits.elements() >= rows {
        return Ok(());
    }
    Err(mismatch(
        operation,
        format!("logits {}", logits.shape()),
        format!("at least {rows} elements"),
    ))
}

/// The gradient of `scale *` [`head_loss`]: `dx [R, K]` is written, `dw [V, K]` (when the head trains) added to; both of
/// the type of sums.
///
/// `logits` must be as [`head_loss`] left it.
///
/// # Errors
/// Shapes or types do not fit.
pub fn head_loss_backward(
    x: &Tensor,
    w: WeightRef<'_>,
    targets: &Tensor,
    scale: f64,
    (logits, statistics): (&mut Tensor, &Tensor),
    dx: &mut Tensor,
    dw: Option<&mut Tensor>,
) -> Result<()> {
    let rows = targets.elements();
    let (v, k) = w.extents();
    check("head_loss_backward", &[("x", x, rows, k)])?;
    check_sums("head_loss_backward", "dx", dx, rows * k, x)?;
    check_sums(
        "head_loss_backward",
        "statistics",
        statistics,
        rows * STATISTICS,
        x,
    )?;
    check_index_tensor("head_loss_backward", "targets", targets, rows, x)?;
    w.check_device("head_loss_backward", x.device())?;
    check_scratch("head_loss_backward", logits, rows, x)?;
    if let Some(dw) = dw.as_deref() {
        check_sums("head_loss_backward", "dw", dw, v * k, x)?;
    }
    on_device!("head_loss_backward", x, T => cpu::loss::backward(
        x.as_slice::<T>(),
        weight("head_loss_backward", w)?,
        targets.as_slice(),
        T::of(scale),
        logits.as_mut_slice(),
        statistics.as_slice(),
        cpu::loss::Gradients { dx: dx.as_mut_slice(), dweight: dw.map(Tensor::as_mut_slice) },
    ), cuda => cuda::loss::head_loss_backward(x, head(w), targets, scale, (logits, statistics), dx, dw));
    Ok(())
}
