//! Head and cross-entropy in one operation, and the head alone.

use super::{
    WeightRef, check, check_device, check_index_tensor, check_indices, check_sums, linear, mismatch,
};
use super::{on_device, weight};
use crate::cpu;
use crate::cpu::real::Real;
use crate::cuda;
use crate::cuda::gemm::Matrix;
use crate::error::Result;
use crate::tensor::{Compute, DType, Device, Tensor};

pub use crate::cpu::loss::STATISTICS;
pub use crate::cuda::loss::HEAD_CHUNK;

/// The matrix `[V, K]` of a head.
#[derive(Debug, Clone, Copy)]
pub enum HeadRef<'a> {
    /// Where the operation computes.
    Here(WeightRef<'a>),
    /// In host memory, for a device: pieces of [`HEAD_CHUNK`] rows (the last one may be shorter), in the compute type.
    Streamed(&'a [Tensor]),
}

impl<'a> From<WeightRef<'a>> for HeadRef<'a> {
    fn from(weight: WeightRef<'a>) -> Self {
        HeadRef::Here(weight)
    }
}

impl<'a> HeadRef<'a> {
    /// `(V, K)`.
    pub fn extents(&self) -> (usize, usize) {
        match self {
            HeadRef::Here(w) => w.extents(),
            HeadRef::Streamed(pieces) => {
                let columns = pieces.first().map_or(0, |w| w.shape().rows_and_columns().1);
                let rows = pieces.iter().map(|w| w.shape().rows_and_columns().0);
                (rows.sum(), columns)
            }
        }
    }

    /// Refuses what does not fit x, or lies elsewhere.
    fn check(&self, operation: &'static str, x: &Tensor) -> Result<()> {
        match self {
            HeadRef::Here(w) => w.check_device(operation, x.device()),
            HeadRef::Streamed(pieces) => {
                if x.device() == Device::Cpu {
                    return Err(mismatch(
                        operation,
                        "a streamed head on the CPU",
                        "one that lies there",
                    ));
                }
                let (v, k) = self.extents();
                for (i, piece) in pieces.iter().enumerate() {
                    let rows = HEAD_CHUNK.min(v - (i * HEAD_CHUNK).min(v));
                    let fits = piece.shape().rows_and_columns() == (rows, k) && piece.dtype() == x.dtype();
                    if !fits {
                        let found = format!("piece {i} {} {}", piece.dtype(), piece.shape());
                        let expected = format!("piece {i} {} [{rows}, {k}]", x.dtype());
                        return Err(mismatch(operation, found, expected));
                    }
                    check_device(operation, "a piece of a streamed head", piece, Device::Cpu)?;
                }
                Ok(())
            }
        }
    }

    /// As the kernels take it.
    fn on_device(self) -> cuda::loss::Head<'a> {
        match self {
            HeadRef::Here(WeightRef::Dense(w)) => cuda::loss::Head::Matrix(Matrix::Dense(w)),
            HeadRef::Here(WeightRef::Int8(w)) => cuda::loss::Head::Matrix(Matrix::Int8(w)),
            HeadRef::Here(WeightRef::Quant(w)) => cuda::loss::Head::Quant(w),
            HeadRef::Streamed(pieces) => cuda::loss::Head::Streamed(pieces),
        }
    }
}

/// What the operations of a head need beside their operands.
#[derive(Debug)]
pub struct HeadScratch {
    /// Of any size of at least the number of rows, of the type of sums: the vocabulary is taken in chunks that fit, on a device
    /// of at most [`HEAD_CHUNK`] classes.
    pub logits: Tensor,
    /// On a device, `[HEAD_CHUNK, K]` in the compute type: one for a head in 4 bits, which is decoded there a chunk at a time;
    /// two for a streamed one, which arrives in one while the other is multiplied; else none.
    pub panels: Vec<Tensor>,
}

impl HeadScratch {
    /// For a head, and for `logits` logits at once.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(compute: Compute, head: HeadRef<'_>, logits: usize) -> Result<Self> {
        let (v, k) = head.extents();
        let panels = match (compute.device, head) {
            (Device::Cpu, _) => 0,
            (_, HeadRef::Here(WeightRef::Quant(_))) => 1,
            (_, HeadRef::Here(_)) => 0,
            (_, HeadRef::Streamed(_)) => 2,
        };
        Ok(Self {
            logits: compute.accumulators([logits])?,
            panels: (0..panels)
                .map(|_| compute.zeros([HEAD_CHUNK.min(v), k]))
                .collect::<Result<_>>()?,
        })
    }

    /// Only logits, for a head that needs no panels.
    pub fn of_logits(logits: Tensor) -> Self {
        Self {
            logits,
            panels: Vec::new(),
        }
    }

    fn check(&self, operation: &'static str, rows: usize, x: &Tensor) -> Result<()> {
        let logits = &self.logits;
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
}

/// `y [R, V] = x [R, K] Wᵀ`, in the type of sums. Of the scratch only the panels are used.
///
/// # Errors
/// Shapes or types do not fit.
pub fn head_logits<'a>(
    x: &Tensor,
    head: impl Into<HeadRef<'a>>,
    scratch: &mut HeadScratch,
    y: &mut Tensor,
) -> Result<()> {
    let head = head.into();
    let (rows, _) = x.shape().rows_and_columns();
    let (v, k) = head.extents();
    check("head_logits", &[("x", x, rows, k)])?;
    check_sums("head_logits", "y", y, rows * v, x)?;
    head.check("head_logits", x)?;
    match (x.device(), head) {
        // Decoded inside the product.
        (Device::Cpu, _) | (_, HeadRef::Here(WeightRef::Quant(_))) => {
            linear(x, here("head_logits", head)?, None, None, y)
        }
        _ => cuda::loss::logits(x, head.on_device(), &mut scratch.panels, y),
    }
}

/// `Σ_r -ln softmax(x_r Wᵀ)[target_r]` over labelled rows `x [R, K]`, `w [V, K]`.
///
/// `statistics [R, 3]`, of the type of sums, is kept for [`head_loss_backward`].
///
/// # Errors
/// Shapes or types do not fit, or a target lies outside the vocabulary.
pub fn head_loss<'a>(
    x: &Tensor,
    head: impl Into<HeadRef<'a>>,
    targets: &Tensor,
    scratch: &mut HeadScratch,
    statistics: &mut Tensor,
) -> Result<f64> {
    let head = head.into();
    let rows = targets.elements();
    let (v, k) = head.extents();
    check("head_loss", &[("x", x, rows, k)])?;
    check_sums("head_loss", "statistics", statistics, rows * STATISTICS, x)?;
    check_index_tensor("head_loss", "targets", targets, rows, x)?;
    check_indices("head_loss", "target", targets, v)?;
    head.check("head_loss", x)?;
    scratch.check("head_loss", rows, x)?;
    let loss = on_device!("head_loss", x, T => cpu::loss::forward(
        x.as_slice::<T>(),
        weight("head_loss", here("head_loss", head)?)?,
        targets.as_slice(),
        scratch.logits.as_mut_slice(),
        statistics.as_mut_slice(),
    ), cuda => {
        let HeadScratch { logits, panels } = scratch;
        cuda::loss::head_loss(x, head.on_device(), targets, (logits, panels), statistics)
    });
    Ok(loss)
}

/// The gradient of `scale *` [`head_loss`]: `dx [R, K]` is written, `dw [V, K]` (when the head trains) added to; both of
/// the type of sums.
///
/// The scratch must be as [`head_loss`] left it.
///
/// # Errors
/// Shapes or types do not fit.
pub fn head_loss_backward<'a>(
    x: &Tensor,
    head: impl Into<HeadRef<'a>>,
    targets: &Tensor,
    scale: f64,
    (scratch, statistics): (&mut HeadScratch, &Tensor),
    dx: &mut Tensor,
    dw: Option<&mut Tensor>,
) -> Result<()> {
    let head = head.into();
    let rows = targets.elements();
    let (v, k) = head.extents();
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
    head.check("head_loss_backward", x)?;
    scratch.check("head_loss_backward", rows, x)?;
    if let Some(dw) = dw.as_deref() {
        check_sums("head_loss_backward", "dw", dw, v * k, x)?;
    }
    on_device!("head_loss_backward", x, T => cpu::loss::backward(
        x.as_slice::<T>(),
        weight("head_loss_backward", here("head_loss_backward", head)?)?,
        targets.as_slice(),
        T::of(scale),
        scratch.logits.as_mut_slice(),
        statistics.as_slice(),
        cpu::loss::Gradients { dx: dx.as_mut_slice(), dweight: dw.map(Tensor::as_mut_slice) },
    ), cuda => {
        let HeadScratch { logits, panels } = scratch;
        cuda::loss::head_loss_backward(x, head.on_device(), targets, scale, (logits, panels, statistics), dx, dw)
    });
    Ok(())
}

/// The matrix of a head on the CPU.
fn here<'a>(operation: &'static str, head: HeadRef<'a>) -> Result<WeightRef<'a>> {
    match head {
        HeadRef::Here(w) => Ok(w),
        HeadRef::Streamed(_) => Err(mismatch(operation, "a streamed head", "one on the CPU")),
    }
}
