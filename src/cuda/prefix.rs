//! Launches of `cuda/prefix.cu`: the prefix of P-Tuning v2.

use super::sys::{GLM_PREFIX_SPAN, GLM_PREFIX_THREADS, PrefixHeads, PrefixHeadsBackward, Tanh, TanhBackward};
use super::{Grid, blocks, launch, ordinal, size};
use crate::error::Result;
use crate::rng::Stream;
use crate::tensor::Tensor;

/// What both kernels of a table count with.
struct Extents {
    size: u32,
    length: u32,
    heads: u32,
    head_dim: u32,
    columns: u32,
    first: u32,
}

impl Extents {
    /// Of `table [P, columns]` and `heads [B, heads, P, d]` or `[heads, P, d]`, number `index` of it.
    fn new(operation: &'static str, table: &Tensor, index: usize, heads: &Tensor) -> Result<Self> {
        let (length, columns) = table.shape().rows_and_columns();
        let shape = heads.shape();
        let [.., count, _, head_dim] = *shape.extents() else {
            unreachable!("ops has checked the rank")
        };
        let width = count * head_dim;
        let extent = |extent: usize| size(operation, extent).map(i32::cast_unsigned);
        Ok(Self {
            size: extent(heads.elements() / (width * length).max(1))?,
            length: extent(length)?,
            heads: extent(count)?,
            head_dim: extent(head_dim)?,
            columns: extent(columns)?,
            first: extent(index * width)?,
        })
    }

    /// A block for each of `rows` rows and each strip of their columns.
    fn grid(&self, operation: &'static str, rows: u32) -> Result<Grid> {
        let strip = (GLM_PREFIX_THREADS * GLM_PREFIX_SPAN) as usize;
        let width = self.heads as usize * self.head_dim as usize;
        Ok(Grid {
            blocks: [rows, blocks(operation, width, strip)?, 1],
            threads: GLM_PREFIX_THREADS,
            shared_bytes: 0,
        })
    }
}

/// Seed, stream, p and what a kept element is multiplied by.
fn dropout_of(dropout: Option<(f32, Stream)>) -> (u64, u64, f32, f32) {
    dropout.map_or((0, 0, 0.0, 1.0), |(p, stream)| {
        let scale = (1.0 / (1.0 - f64::from(p))) as f32;
        (stream.seed(), stream.stream(), p, scale)
    })
}

/// As [`crate::ops::prefix_heads`].
pub(crate) fn heads(
    table: &Tensor,
    index: usize,
    dropout: Option<(f32, Stream)>,
    y: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "prefix_heads";
    let e = Extents::new(OPERATION, table, index, y)?;
    let (seed, stream, p, scale) = dropout_of(dropout);
    size(OPERATION, y.elements())?;
    let grid = e.grid(OPERATION, e.size * e.length)?;
    let params = PrefixHeads {
        y: y.device_ptr_mut(),
        table: table.device_ptr().cast(),
        seed,
        stream,
        size: e.size,
        length: e.length,
        heads: e.heads,
        head_dim: e.head_dim,
        columns: e.columns,
        first: e.first,
        p,
        scale,
    };
    // SAFETY: ops has checked that table is [P, columns] of f32 and y [B, heads, P, d], and that its columns lie inside.
    unsafe { launch(ordinal(y), OPERATION, y.dtype(), grid, &params) }
}

/// As [`crate::ops::prefix_heads_backward`].
pub(crate) fn heads_backward(
    dy: &Tensor,
    index: usize,
    dropout: Option<(f32, Stream)>,
    d_table: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "prefix_heads_backward";
    let e = Extents::new(OPERATION, d_table, index, dy)?;
    let (seed, stream, p, scale) = dropout_of(dropout);
    size(OPERATION, dy.elements())?;
    let grid = e.grid(OPERATION, e.length)?;
    let params = PrefixHeadsBackward {
        d_table: d_table.device_ptr_mut().cast(),
        dy: dy.device_ptr().cast(),
        seed,
        stream,
        size: e.size,
        length: e.length,
        heads: e.heads,
        head_dim: e.head_dim,
        columns: e.columns,
        first: e.first,
        p,
        scale,
    };
    // SAFETY: as above, both of f32.
    unsafe { launch(ordinal(dy), OPERATION, dy.dtype(), grid, &params) }
}

/// A thread for every 16 bytes of f32.
fn a_thread_for_four(operation: &'static str, x: &Tensor) -> Result<Grid> {
    Ok(Grid {
        blocks: [
            blocks(operation, x.elements(), 4 * GLM_PREFIX_THREADS as usize)?,
            1,
            1,
        ],
        threads: GLM_PREFIX_THREADS,
        shared_bytes: 0,
    })
}

/// As [`crate::ops::tanh`].
pub(crate) fn tanh(x: &Tensor, y: &mut Tensor) -> Result<()> {
    let grid = a_thread_for_four("tanh_forward", x)?;
    let params = Tanh {
        y: y.device_ptr_mut().cast(),
        x: x.device_ptr().cast(),
        n: x.elements() as u64,
    };
    // SAFETY: ops has checked that both have n elements of f32 on one device.
    unsafe { launch(ordinal(x), "tanh_forward", x.dtype(), grid, &params) }
}

/// As [`crate::ops::tanh_backward`].
pub(crate) fn tanh_backward(y: &Tensor, d: &mut Tensor) -> Result<()> {
    let grid = a_thread_for_four("tanh_backward", y)?;
    let params = TanhBackward {
        d: d.device_ptr_mut().cast(),
        y: y.device_ptr().cast(),
        n: y.elements() as u64,
    };
    // SAFETY: ops has checked that both have n elements of f32 on one device.
    unsafe { launch(ordinal(y), "tanh_backward", y.dtype(), grid, &params) }
}
