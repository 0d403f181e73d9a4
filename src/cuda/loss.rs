//! Head and cross-entropy: products with chunks of the head and the kernels of `cuda/loss.cu` in turn.
//!
//! Panels of a head that is not where products can take it are brought one after the other into buffers of the caller.

use std::ffi::c_void;
use std::ops::Range;

use super::gemm::{Layout, Rows};
use super::gemm::{Matrix, multiply, ordinal, product};
use super::nf4;
use super::sys::{self, Gemm, LossSum, SoftmaxGradient, SoftmaxStatistics};
use super::{Grid, blocks, device, launch_named, size};
use crate::error::{Error, Result};
use crate::quant::QuantTensor;
use crate::tensor::{DType, Tensor};

/// A device takes the vocabulary in chunks of at most this many classes, whatever form the head has: so the form decides about
/// the numbers that are multiplied, never about the order in which they are added. At 4096 inputs of 16 bits it is 64 MiB, wide
/// enough to keep a large card busy with 128 rows, and what decoding or copying a head needs as a buffer.
pub const HEAD_CHUNK: usize = 8192;
/// Chunks of the vocabulary begin at multiples of this many classes, so that their rows begin at multiples of
/// 16 bytes.
const CHUNK_UNIT: usize = 64;

/// The matrix of a head, `[V, K]`.
#[derive(Clone, Copy)]
pub(crate) enum Head<'a> {
    /// What products take as it is.
    Matrix(Matrix<'a>),
    /// In 4 bits, decoded a panel at a time.
    Quant(&'a QuantTensor),
    /// On the host, in pieces of [`HEAD_CHUNK`] rows in the compute type, copied one at a time.
    Streamed(&'a [Tensor]),
}

impl Head<'_> {
    fn extents(&self) -> (usize, usize) {
        match self {
            Head::Matrix(w) => w.extents(),
            Head::Quant(w) => w.shape.rows_and_columns(),
            Head::Streamed(pieces) => {
                let columns = pieces.first().map_or(0, |w| w.shape().rows_and_columns().1);
                let rows = pieces.iter().map(|w| w.shape().rows_and_columns().0);
                (rows.sum(), columns)
            }
        }
    }

    /// Calls `f` for every chunk of [`HEAD_CHUNK`] classes, in order, with its classes and a matrix that holds their rows from
    /// the given row on.
    fn for_each_panel(
        &self,
        operation: &'static str,
        panels: &mut [Tensor],
        mut f: impl FnMut(Range<usize>, Matrix<'_>, usize) -> Result<()>,
    ) -> Result<()> {
        let (vocabulary, k) = self.extents();
        let mut chunks = (0..vocabulary)
            .step_by(HEAD_CHUNK)
            .map(|start| start..(start + HEAD_CHUNK).min(vocabulary));
        match (self, panels) {
            (Head::Matrix(w), _) => chunks.try_for_each(|classes| {
                let start = classes.start;
                f(classes, *w, start)
            }),
            (Head::Quant(w), [panel, ..]) => chunks.try_for_each(|classes| {
                panel.resize([classes.len(), k])?;
                nf4::dequantize(w, classes.clone(), panel)?;
                f(classes, Matrix::Dense(panel), 0)
            }),
            (Head::Streamed(pieces), [first, second, ..]) => {
                // A copy begins when everything asked for before it is done, so the next piece is asked for before the products
                // of this one: it runs beside them, and after those of the one before, whose place it takes.
                let (mut here, mut next) = (first, second);
                if let Some(piece) = pieces.first() {
                    here.resize(piece.shape())?;
                    here.fetch_from(0, piece, 0..piece.elements())?;
                }
                for (i, classes) in chunks.enumerate() {
                    if let Some(piece) = pieces.get(i + 1) {
                        next.resize(piece.shape())?;
                        next.fetch_from(0, piece, 0..piece.elements())?;
                    }
                    f(classes, Matrix::Dense(here), 0)?;
                    std::mem::swap(&mut here, &mut next);
                }
                Ok(())
            }
            (Head::Quant(_) | Head::Streamed(_), panels) => Err(Error::Shape {
                operation,
                found: format!("{} panels", panels.len()),
                expected: "1 for a head in 4 bits, 2 for a streamed one".into(),
            }),
        }
    }
}

/// `logits [R, classes] = x rowsᵀ`, whose rows begin `stride` numbers apart.
///
/// # Safety
/// x is [R, K], and there are as many rows of K on its device; the logits have room.
// SAFETY: as above.
unsafe fn logits_of(
    operation: &'static str,
    x: &Tensor,
    rows: &Rows,
    classes: usize,
    logits: *mut c_void,
    stride: usize,
) -> Result<()> {
    let (count, k) = x.shape().rows_and_columns();
    let gemm = Gemm {
        scales: rows.scales,
        stride: size(operation, stride)?,
        ..product(
            operation,
            [count, classes, k],
            x.device_ptr(),
            rows.address,
            logits,
        )?
    };
    let types = [x.dtype(), rows.dtype, DType::F32];
    // SAFETY: the caller's promise.
    unsafe {
        multiply(
            ordinal(operation, x)?,
            operation,
            Layout::Nt,
            x.dtype(),
            types,
            gemm,
        )
    }
}

/// The address of element `at`.
fn element(base: *mut c_void, dtype: DType, at: usize) -> *mut c_void {
    base.wrapping_byte_add(at * dtype.size())
}

/// The chunks of a panel of `classes` of which the logits of `rows` rows fit into `capacity` numbers: as few as can be, of about
/// one size.
fn chunks(capacity: usize, rows: usize, classes: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let fit = (capacity / rows.max(1)).clamp(1, HEAD_CHUNK);
    let width = if fit >= CHUNK_UNIT {
        let fit = fit / CHUNK_UNIT * CHUNK_UNIT;
        HEAD_CHUNK
            .div_ceil(HEAD_CHUNK.div_ceil(fit))
            .next_multiple_of(CHUNK_UNIT)
    } else {
        fit
    };
    let end = classes.end;
    classes
        .step_by(width)
        .map(move |start| start..(start + width).min(end))
}

/// Where the logits of the classes from `start` on lie: all chunks one behind the other when there is room, else each in the
/// same place.
fn place(capacity: usize, rows: usize, vocabulary: usize, start: usize) -> usize {
    if capacity >= rows * vocabulary {
        rows * start
    } else {
        0
    }
}

/// `y [R, V] = x Wᵀ` in f32; in the same chunks whatever the form.
///
/// # Errors
/// There is no kernel for these types, a copy fails, or the driver refuses.
pub(crate) fn logits(x: &Tensor, head: Head<'_>, panels: &mut [Tensor], y: &mut Tensor) -> Result<()> {
    const OPERATION: &str = "head_logits";
    let (vocabulary, _) = head.extents();
    head.for_each_panel(OPERATION, panels, |classes, w, first| {
        let to = element(y.device_ptr_mut(), DType::F32, classes.start);
        // SAFETY: ops::head_logits has checked x, the head and y, which is [R, V] of f32.
        unsafe { logits_of(OPERATION, x, &w.rows_from(first), classes.len(), to, vocabulary) }
    })
}

fn rows_grid(rows: u32, pieces: u32, shared_bytes: u32) -> Grid {
    Grid {
        blocks: [rows, pieces, 1],
        threads: sys::GLM_LOSS_THREADS,
        shared_bytes,
    }
}

/// `Σ_r -ln softmax(x_r Wᵀ)[target_r]`; waits for the device. A target outside the vocabulary makes it NaN.
///
/// # Errors
/// There is no kernel for these types, or the driver refuses.
pub(crate) fn head_loss(
    x: &Tensor,
    head: Head<'_>,
    targets: &Tensor,
    (logits, panels): (&mut Tensor, &mut [Tensor]),
    statistics: &mut Tensor,
) -> Result<f64> {
    const OPERATION: &str = "head_loss";
    let rows = targets.elements();
    let (vocabulary, _) = head.extents();
    let card = ordinal(OPERATION, x)?;
    let capacity = logits.elements();
    head.for_each_panel(OPERATION, panels, |classes, w, first| {
        let start = classes.start;
        for part in chunks(capacity, rows, classes) {
            let at = place(capacity, rows, vocabulary, part.start);
            let at = element(logits.device_ptr_mut(), DType::F32, at);
            let matrix = w.rows_from(first + part.start - start);
            // SAFETY: ops::head_loss has checked that x is [R, K] and the head [V, K], in which `part` lies; `chunks` and
            // `place` let [R, part] fit into the logits.
            unsafe { logits_of(OPERATION, x, &matrix, part.len(), at, part.len())? };
            let params = SoftmaxStatistics {
                statistics: statistics.device_ptr_mut().cast(),
                logits: at.cast(),
                targets: targets.device_ptr().cast(),
                vocabulary: size(OPERATION, vocabulary)?,
                start: size(OPERATION, part.start)?,
                width: size(OPERATION, part.len())?,
            };
            // REDUCE_SCRATCH floats of cuda/reduce.cuh.
            let grid = rows_grid(blocks(OPERATION, rows, 1)?, 1, 128);
            // SAFETY: ops::head_loss has checked that targets are R indices and statistics [R, 3] of f32; the logits
            // as above.
            unsafe { launch_named(card, OPERATION, "softmax_statistics", grid, &params)? };
        }
        Ok(())
    })?;
    let scratch = device(card)?.scratch()?;
    let params = LossSum {
        loss: scratch.pointer().cast(),
        statistics: statistics.device_ptr().cast(),
        rows: size(OPERATION, rows)?,
    };
    let shared_bytes = sys::GLM_LOSS_THREADS * size_of::<f64>() as u32;
    let mut loss = [0; size_of::<f64>()];
    // SAFETY: statistics are [R, 3] of f32, and the scratch memory has room for one number.
    unsafe {
        launch_named(
            card,
            OPERATION,
            "loss_sum",
            rows_grid(1, 1, shared_bytes),
            &params,
        )?
    };
    device(card)?.call(OPERATION, |driver| driver.download(scratch.address, &mut loss))?;
    Ok(f64::from_ne_bytes(loss))
}

/// The gradient of `scale *` [`head_loss`]: `dx` is written, `dw` added to.
///
/// Logits hold `gain * (softmax - onehot)` in between, and products make up for it: most of softmax lies
/// under what f16 can hold, the more so times a small `scale`.
///
/// # Errors
/// As [`head_loss`].
pub(crate) fn head_loss_backward(
    x: &Tensor,
    head: Head<'_>,
    targets: &Tensor,
    scale: f64,
    (logits, panels, statistics): (&mut Tensor, &mut [Tensor], &Tensor),
    dx: &mut Tensor,
    mut dw: Option<&mut Tensor>,
) -> Result<()> {
    const OPERATION: &str = "head_loss_backward";
    let rows = targets.elements();
    let (vocabulary, k) = head.extents();
    let card = ordinal(OPERATION, x)?;
    let gain = if x.dtype() == DType::F16 { 1024.0 } else { 1.0 };
    let alpha = (scale / gain) as f32;
    let capacity = logits.elements();
    let kept = capacity >= rows * vocabulary;
    head.for_each_panel(OPERATION, panels, |classes, w, first| {
        let start = classes.start;
        for part in chunks(capacity, rows, classes) {
            let at = place(capacity, rows, vocabulary, part.start);
            let at = element(logits.device_ptr_mut(), DType::F32, at);
            let matrix = w.rows_from(first + part.start - start);
            if !kept {
                // SAFETY: as in head_loss, whose chunks these are.
                unsafe { logits_of(OPERATION, x, &matrix, part.len(), at, part.len())? };
            }
            let params = SoftmaxGradient {
                logits: at.cast(),
                statistics: statistics.device_ptr().cast(),
                targets: targets.device_ptr().cast(),
                start: size(OPERATION, part.start)?,
                width: size(OPERATION, part.len())?,
                scale: gain as f32,
            };
            let pieces = blocks(OPERATION, part.len(), sys::GLM_SOFTMAX_GRADIENT_WIDTH as usize)?;
            let grid = rows_grid(blocks(OPERATION, rows, 1)?, pieces, 0);
            // SAFETY: as in head_loss.
            unsafe { launch_named(card, OPERATION, "softmax_gradient", grid, &params)? };

            let gemm = Gemm {
                alpha,
                beta: if part.start == 0 { 0.0 } else { 1.0 },
                scales: matrix.scales,
                ..product(
                    OPERATION,
                    [rows, k, part.len()],
                    at,
                    matrix.address,
                    dx.device_ptr_mut(),
                )?
            };
            let types = [DType::F32, matrix.dtype, DType::F32];
            // SAFETY: as for the logits; dx is [R, K] of f32.
            unsafe { multiply(card, OPERATION, Layout::Nn, x.dtype(), types, gemm)? };
            if let Some(dw) = dw.as_deref_mut() {
                let rows_of_part = element(dw.device_ptr_mut(), DType::F32, part.start * k);
                let gemm = Gemm {
                    alpha,
                    beta: 1.0,
                    ..product(OPERATION, [part.len(), k, rows], at, x.device_ptr(), rows_of_part)?
                };
                let types = [DType::F32, x.dtype(), DType::F32];
                // SAFETY: x is [R, K], and dw [V, K] of f32, of which `part` are some rows.
                unsafe { multiply(card, OPERATION, Layout::Tn, x.dtype(), types, gemm)? };
            }
        }
        Ok(())
    })
}
