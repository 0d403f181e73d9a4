//! Head and cross-entropy in one operation.

use super::{WeightRef, check, check_elements, check_indices, mismatch, on_device, weight};
use crate::cpu;
use crate::cpu::real::Real;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

pub use crate::cpu::loss::STATISTICS;

/// `Σ_r -ln softmax(x_r Wᵀ)[target_r]` over labelled rows `x [R, K]`, `w [V, K]`.
///
/// `logits` is scratch of any size of at least R: the vocabulary is taken in chunks that fit. `statistics [R, 3]` is kept
/// for [`head_loss_backward`].
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
    check(
        "head_loss",
        &[("x", x, rows, k), ("statistics", statistics, rows, STATISTICS)],
    )?;
    check_indices("head_loss", "target", targets.as_slice(), v)?;
    check_scratch("head_loss", logits, rows)?;
    let loss = on_device!("head_loss", x, T => cpu::loss::forward(
        x.as_slice::<T>(),
        weight("head_loss", w)?,
        targets.as_slice(),
        logits.as_mut_slice(),
        statistics.as_mut_slice(),
    ));
    Ok(loss)
}

fn check_scratch(operation: &'static str, logits: &Tensor, rows: usize) -> Result<()> {
    if logits.elements() >= rows {
        return Ok(());
    }
    Err(mismatch(
        operation,
        format!("logits {}", logits.shape()),
        format!("at least {rows} elements"),
    ))
}

/// The gradient of `scale *` [`head_loss`]: `dx [R, K]` is written, `dw [V, K]` (when the head trains) added to.
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
    check("head_loss_backward", &[("x", x, rows, k), ("dx", dx, rows, k)])?;
    check_elements(
        "head_loss_backward",
        "statistics",
        statistics,
        x.dtype(),
        rows * STATISTICS,
    )?;
    check_scratch("head_loss_backward", logits, rows)?;
    if let Some(dw) = dw.as_deref() {
        check("head_loss_backward", &[("x", x, rows, k), ("dw", dw, v, k)])?;
    }
    on_device!("head_loss_backward", x, T => cpu::loss::backward(
        x.as_slice::<T>(),
        weight("head_loss_backward", w)?,
        targets.as_slice(),
        T::of(scale),
        logits.as_mut_slice(),
        statistics.as_slice(),
        cpu::loss::Gradients { dx: dx.as_mut_slice(), dweight: dw.map(Tensor::as_mut_slice) },
    ));
    Ok(())
}
