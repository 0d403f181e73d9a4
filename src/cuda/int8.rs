//! Weights in 8 bits with a scale for each row: decoding. Products are in [`super::gemm`].

use std::ops::Range;

use super::sys::Int8Dequantize;
use super::{Grid, blocks, launch, ordinal, size};
use crate::error::Result;
use crate::quant::RowInt8;
use crate::tensor::Tensor;

/// Threads of a block; each has four elements.
const THREADS: usize = 256;

/// `out [rows, K]`: these rows of w, rounded once to out's type.
///
/// # Errors
/// There are more rows than a grid has, or the driver refuses.
pub(crate) fn dequantize(w: &RowInt8, rows: Range<usize>, out: &mut Tensor) -> Result<()> {
    const OPERATION: &str = "int8_dequantize";
    let (_, k) = w.shape().rows_and_columns();
    let grid = Grid {
        blocks: [
            blocks(OPERATION, rows.len(), 1)?,
            blocks(OPERATION, k, 4 * THREADS)?,
            1,
        ],
        threads: THREADS as u32,
        shared_bytes: 0,
    };
    let params = Int8Dequantize {
        out: out.device_ptr_mut(),
        codes: w.codes.device_ptr().wrapping_byte_add(rows.start * k).cast(),
        scales: w.scales.device_ptr().cast::<f32>().wrapping_add(rows.start),
        rows: size(OPERATION, rows.len())?.cast_unsigned(),
        columns: size(OPERATION, k)?.cast_unsigned(),
    };
    // SAFETY: ops::dequantize has checked that w has the rows, and that out has room for them and lies where w does.
    unsafe { launch(ordinal(out), OPERATION, out.dtype(), grid, &params) }
}
