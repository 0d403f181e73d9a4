//! Head and cross-entropy: products with chunks of the head and the kernels of `cuda/loss.cu` in turn.

use std::ffi::c_void;
use std::ops::Range;

use super::gemm::{Layout, multiply, ordinal, product};
use super::sys::{self, Gemm, LossSum, SoftmaxGradient, SoftmaxStatistics};
use super::{Grid, blocks, device, launch_named, size};
use crate::error::{Error, Result};
use crate::quant::QuantTensor;
use crate::tensor::{DType, Tensor};

/// Chunks of the vocabulary begin at multiples of this many classes, so that their rows begin at multiples of
/// 16 bytes.
const CHUNK_UNIT: usize = 64;

/// The matrix of a head, `[V, K]`.
#[derive(Clone, Copy)]
pub(crate) enum Head<'a> {
    /// Of the type of the activations, or of f32 when it trains.
    Dense(&'a Tensor),
    /// In 4 bits.
    Quant(&'a QuantTensor),
}

impl Head<'_> {
    fn extents(&self) -> (usize, usize) {
        match self {
            Head::Dense(w) => w.shape().rows_and_columns(),
            Head::Quant(w) => w.shape.rows_and_columns(),
        }
    }

    /// `logits [R, part] = x W[part]ᵀ`.
    fn logits(
        &self,
        operation: &'static str,
        x: &Tensor,
        part: Range<usize>,
        logits: *mut c_void,
    ) -> Result<()> {
        let (rows, k) = x.shape().rows_and_columns();
        match self {
            Head::Dense(w) => {
                let weight = element(w.device_ptr().cast_mut(), w.dtype(), part.start * k);
                let gemm = product(operation, [rows, part.len(), k], x.device_ptr(), weight, logits)?;
                let types = [x.dtype(), w.dtype(), DType::F32];
                // SAFETY: ops has checked that x is [R, K] and the weight [V, K] on one device; `part` lies
                // in 0..V, and chunk() lets [R, part] fit into the logits.
                unsafe { multiply(ordinal(operation, x)?, operation, Layout::Nt, types, gemm) }
            }
            Head::Quant(_) => Err(no_quantized(operation)),
        }
    }

    /// `dx [R, K] = alpha * dlogits [R, part] W[part] + beta * dx`.
    fn backward_input(
        &self,
        operation: &'static str,
        dlogits: *const c_void,
        part: Range<usize>,
        alpha: f32,
        beta: f32,
        dx: &mut Tensor,
    ) -> Result<()> {
        let (rows, k) = dx.shape().rows_and_columns();
        match self {
            Head::Dense(w) => {
                let weight = element(w.device_ptr().cast_mut(), w.dtype(), part.start * k);
                let gemm = Gemm {
                    alpha,
                    beta,
                    ..product(
                        operation,
                        [rows, k, part.len()],
                        dlogits,
                        weight,
                        dx.device_ptr_mut(),
                    )?
                };
                let types = [DType::F32, w.dtype(), DType::F32];
                // SAFETY: as for the logits; dx is [R, K] of f32.
                unsafe { multiply(ordinal(operation, dx)?, operation, Layout::Nn, types, gemm) }
            }
            Head::Quant(_) => Err(no_quantized(operation)),
        }
    }
}

fn no_quantized(operation: &'static str) -> Error {
    Error::Shape {
        operation,
        found: "a 4-bit head on a CUDA device".into(),
        expected: "a dense one".into(),
    }
}

/// The address of element `at`.
fn element(base: *mut c_void, dtype: DType, at: usize) -> *mut c_void {
    base.wrapping_byte_add(at * dtype.size())
}

/// How many classes' logits fit into `capacity` numbers.
fn chunk(capacity: usize, rows: usize, vocabulary: usize) -> usize {
    let fit = (capacity / rows.max(1)).clamp(1, vocabulary.max(1));
    if fit < vocabulary && fit >= CHUNK_UNIT {
        fit / CHUNK_UNIT * CHUNK_UNIT
    } else {
        fit
    }
}

/// The parts of the vocabulary, each with its first class.
fn chunks(width: usize, vocabulary: usize) -> impl Iterator<Item = Range<usize>> {
    (0..vocabulary)
        .step_by(width)
        .map(move |start| start..(start + width).min(vocabulary))
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
    logits: &mut Tensor,
    statistics: &mut Tensor,
) -> Result<f64> {
    const OPERATION: &str = "head_loss";
    let rows = targets.elements();
    let (vocabulary, _) = head.extents();
    let card = ordinal(OPERATION, x)?;
    let width = chunk(logits.elements(), rows, vocabulary);
    for part in chunks(width, vocabulary) {
        head.logits(OPERATION, x, part.clone(), logits.device_ptr_mut())?;
        let params = SoftmaxStatistics {
            statistics: statistics.device_ptr_mut().cast(),
            logits: logits.device_ptr().cast(),
            targets: targets.device_ptr().cast(),
            vocabulary: size(OPERATION, vocabulary)?,
            start: size(OPERATION, part.start)?,
            width: size(OPERATION, part.len())?,
        };
        // REDUCE_SCRATCH floats of cuda/reduce.cuh.
        let grid = rows_grid(blocks(OPERATION, rows, 1)?, 1, 128);
        // SAFETY: ops::head_loss has checked that targets are R indices and statistics [R, 3] of f32; `chunk`
        // lets the logits fit.
        unsafe { launch_named(card, OPERATION, "softmax_statistics", grid, &params)? };
    }
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
    (logits, statistics): (&mut Tensor, &Tensor),
    dx: &mut Tensor,
    mut dw: Option<&mut Tensor>,
) -> Result<()> {
    const OPERATION: &str = "head_loss_backward";
    let rows = targets.elements();
    let (vocabulary, k) = head.extents();
    let card = ordinal(OPERATION, x)?;
    let gain = if x.dtype() == DType::F16 { 1024.0 } else { 1.0 };
    let alpha = (scale / gain) as f32;
    let width = chunk(logits.elements(), rows, vocabulary);
    for part in chunks(width, vocabulary) {
        if width < vocabulary {
            head.logits(OPERATION, x, part.clone(), logits.device_ptr_mut())?;
        }
        let params = SoftmaxGradient {
            logits: logits.device_ptr_mut().cast(),
            statistics: statistics.device_ptr().cast(),
            targets: targets.device_ptr().cast(),
            start: size(OPERATION, part.start)?,
            width: size(OPERATION, part.len())?,
            scale: gain as f32,
        };
        let pieces = blocks(OPERATION, part.len(), sys::GLM_SOFTMAX_GRADIENT_WIDTH as usize)?;
        let grid = rows_grid(blocks(OPERATION, rows, 1)?, pieces, 0);
        // SAFETY: as in head_loss, whose chunks these are.
        unsafe { launch_named(card, OPERATION, "softmax_gradient", grid, &params)? };

        let beta = if part.start == 0 { 0.0 } else { 1.0 };
        head.backward_input(OPERATION, logits.device_ptr(), part.clone(), alpha, beta, dx)?;
        if let Some(dw) = dw.as_deref_mut() {
            let rows_of_part = element(dw.device_ptr_mut(), DType::F32, part.start * k);
            let gemm = Gemm {
                alpha,
                beta: 1.0,
                ..product(
                    OPERATION,
                    [part.len(), k, rows],
                    logits.device_ptr(),
                    x.device_ptr(),
                    rows_of_part,
                )?
            };
            let types = [DType::F32, x.dtype(), DType::F32];
            // SAFETY: x is [R, K], and dw [V, K] of f32, of which `part` are some rows.
            unsafe { multiply(card, OPERATION, Layout::Tn, types, gemm)? };
        }
    }
    Ok(())
}
