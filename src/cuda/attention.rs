//! Launches of `cuda/attention*.cu`: attention and its gradient, and attention over a cache.
//!
//! f16 and bf16 take the tensor cores, with a kernel for each size of a head; f32 has plain kernels for all up to 128.

use std::ffi::c_void;
use std::ptr;

use super::sys::{
    self, AttentionBackward, AttentionCombine, AttentionDecode, AttentionDelta, AttentionForward, KvAppend,
};
use super::{Grid, SCRATCH, blocks, describe, device, launch, ordinal, size};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Keys and values of a prefix, `[heads, P, d]` each, or `[B, heads, P, d]`.
pub(crate) type Prefix<'a> = Option<(&'a Tensor, &'a Tensor)>;

/// From as many blocks of the tall kernel on, two on every multiprocessor of a large card, it is worth its size.
const ENOUGH_TALL_BLOCKS: u32 = 256;

/// The extents of one call, checked to be what kernels count with.
#[derive(Debug, Clone, Copy)]
struct Extents {
    size: u32,
    queries: u32,
    heads: u32,
    head_dim: u32,
    prefix: u32,
    /// From the prefix of one sequence to that of the next; 0 when all share one.
    prefix_batch_stride: u64,
    /// `log2 e / sqrt(d)`.
    scale: f32,
}

impl Extents {
    fn new(
        operation: &'static str,
        qkv: &Tensor,
        spans: &Tensor,
        prefix: Prefix<'_>,
        heads: usize,
    ) -> Result<Self> {
        let (rows, width) = qkv.shape().rows_and_columns();
        let sequences = spans.shape().rows_and_columns().0;
        let head_dim = width / (3 * heads);
        let largest = sys::GLM_ATTENTION_F32_HEAD_DIM as usize;
        let fits = match qkv.dtype() {
            DType::F32 => (1..=largest).contains(&head_dim),
            _ => matches!(head_dim, 16 | 32 | 64 | 128),
        };
        // Sequences and heads are the grid's y and z.
        if !fits || sequences.max(heads) > 65_535 {
            return Err(Error::Shape {
                operation,
                found: format!(
                    "{sequences} sequences, {heads} heads of {head_dim} in {}",
                    qkv.dtype()
                ),
                expected: format!(
                    "at most 65535 of each, heads of 16, 32, 64 or 128 (in float32: at most {largest})"
                ),
            });
        }
        size(operation, rows)?;
        let (length, each) = prefix.map_or((0, 0), |(keys, _)| prefix_extents(keys, heads));
        let count = |extent: usize| size(operation, extent).map(|extent| extent as u32);
        Ok(Self {
            size: count(sequences)?,
            queries: count(rows / sequences)?,
            heads: count(heads)?,
            head_dim: count(head_dim)?,
            prefix: count(length)?,
            prefix_batch_stride: if each > 1 {
                (heads * length * head_dim) as u64
            } else {
                0
            },
            scale: (std::f64::consts::LOG2_E / (head_dim as f64).sqrt()) as f32,
        })
    }

    /// Blocks of `rows` each, for every head of every sequence.
    fn grid(&self, operation: &'static str, extent: u32, rows: u32, shared_bytes: u32) -> Result<Grid> {
        Ok(Grid {
            blocks: [
                blocks(operation, extent as usize, rows as usize)?,
                self.heads,
                self.size,
            ],
            threads: sys::GLM_ATTENTION_THREADS,
            shared_bytes,
        })
    }

    /// Of `names`, which are for heads of 16, 32, 64 and 128, the one for this.
    fn named(&self, names: [&'static str; 4]) -> &'static str {
        names[(self.head_dim.max(16).ilog2() - 4) as usize]
    }

    /// Shared memory of a block of a plain kernel: `tiles` tiles in rows of an odd number of floats, `rows` rows, and
    /// `weights` numbers for each element of a tile.
    fn plain_bytes(&self, tiles: u32, rows: u32, weights: u32) -> u32 {
        let tile = sys::GLM_ATTENTION_F32_TILE;
        4 * (tiles * tile * (self.head_dim | 1) + rows * self.head_dim + weights * tile)
    }
}

/// The length of a prefix `[heads, P, d]` or `[B, heads, P, d]`, and of how many sequences it is.
fn prefix_extents(keys: &Tensor, heads: usize) -> (usize, usize) {
    let (rows, _) = keys.shape().rows_and_columns();
    let extents = keys.shape();
    let length = extents.extents()[extents.extents().len() - 2];
    (length, rows / (heads * length).max(1))
}

fn pointers(prefix: Prefix<'_>) -> (*const c_void, *const c_void) {
    prefix.map_or((ptr::null(), ptr::null()), |(keys, values)| {
        (keys.device_ptr(), values.device_ptr())
    })
}

/// Where keys and values stand, and how many there are of each sequence; strides count elements.
struct Keys {
    keys: *const c_void,
    values: *const c_void,
    batch_stride: u64,
    row_stride: u32,
    head_stride: u32,
    count: u32,
}

/// # Safety
/// Tensors are those of [`crate::ops::attention`] or [`crate::ops::attention_cached`], checked, and `keys` lie inside them.
// SAFETY: as above.
unsafe fn forward(
    operation: &'static str,
    e: Extents,
    qkv: &Tensor,
    keys: &Keys,
    spans: &Tensor,
    prefix: Prefix<'_>,
    context: &mut Tensor,
    log_sum_exp: &mut Tensor,
) -> Result<()> {
    let card = ordinal(qkv);
    let (prefix_keys, prefix_values) = pointers(prefix);
    let params = AttentionForward {
        context: context.device_ptr_mut(),
        log_sum_exp: log_sum_exp.device_ptr_mut().cast(),
        qkv: qkv.device_ptr(),
        keys: keys.keys,
        values: keys.values,
        prefix_keys,
        prefix_values,
        spans: spans.device_ptr().cast(),
        key_batch_stride: keys.batch_stride,
        prefix_batch_stride: e.prefix_batch_stride,
        key_row_stride: keys.row_stride,
        key_head_stride: keys.head_stride,
        queries: e.queries,
        key_count: keys.count,
        heads: e.heads,
        head_dim: e.head_dim,
        prefix: e.prefix,
        scale: e.scale,
    };
    let tall_blocks = e
        .queries
        .div_ceil(sys::GLM_ATTENTION_TALL_QUERIES)
        .saturating_mul(e.heads)
        .saturating_mul(e.size);
    let (kernel, rows, shared) = if qkv.dtype() == DType::F32 {
        let rows = sys::GLM_ATTENTION_F32_QUERIES;
        // Keys and values: at most one of them has rows of an odd number of floats.
        ("attention_forward", rows, e.plain_bytes(2, rows, rows))
    } else if e.head_dim == 128
        && e.queries > sys::GLM_ATTENTION_QUERIES
        && tall_blocks >= ENOUGH_TALL_BLOCKS
        && holds_two_tall_blocks(describe(card)?.capability)
    {
        (
            "attention_forward_tall_d128",
            sys::GLM_ATTENTION_TALL_QUERIES,
            sys::GLM_ATTENTION_TALL_SHARED_BYTES * e.head_dim,
        )
    } else {
        let kernel = e.named([
            "attention_forward_d16",
            "attention_forward_d32",
            "attention_forward_d64",
            "attention_forward_d128",
        ]);
        let shared = sys::GLM_ATTENTION_SHARED_BYTES * e.head_dim;
        (kernel, sys::GLM_ATTENTION_QUERIES, shared)
    };
    let grid = e.grid(operation, e.queries, rows, shared)?;
    // SAFETY: the caller's promise; heads and prefix have the extents given.
    unsafe { launch(card, kernel, qkv.dtype(), grid, &params) }
}

/// Cards with 163 KB of shared memory for each multiprocessor and more, whose tensor cores outrun a block's shared memory.
fn holds_two_tall_blocks(capability: (u32, u32)) -> bool {
    matches!(capability, (8, 0) | (9 | 10, _))
}

/// As [`crate::ops::attention`].
pub(crate) fn attention(
    qkv: &Tensor,
    spans: &Tensor,
    prefix: Prefix<'_>,
    heads: usize,
    context: &mut Tensor,
    log_sum_exp: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "attention";
    let e = Extents::new(OPERATION, qkv, spans, prefix, heads)?;
    let part = e.head_dim as usize * qkv.dtype().size();
    let wide = 3 * e.heads * e.head_dim;
    let keys = Keys {
        keys: qkv.device_ptr().wrapping_byte_add(part),
        values: qkv.device_ptr().wrapping_byte_add(2 * part),
        batch_stride: u64::from(e.queries) * u64::from(wide),
        row_stride: wide,
        head_stride: 3 * e.head_dim,
        count: e.queries,
    };
    // SAFETY: ops has checked qkv [B S, heads 3 d], spans [B, 2], context [B S, heads d], log_sum_exp of heads B S elements and
    // the prefix [heads, P, d] or [B, heads, P, d], all on one device.
    unsafe { forward(OPERATION, e, qkv, &keys, spans, prefix, context, log_sum_exp) }
}

/// As [`crate::ops::attention_backward`]; `d_prefix` are the gradients of keys and values of the prefix.
pub(crate) fn attention_backward(
    d_context: &Tensor,
    qkv: &Tensor,
    context: &Tensor,
    log_sum_exp: &Tensor,
    spans: &Tensor,
    prefix: Prefix<'_>,
    heads: usize,
    dqkv: &mut Tensor,
    d_prefix: Option<(&mut Tensor, &mut Tensor)>,
) -> Result<()> {
    const OPERATION: &str = "attention_backward";
    let e = Extents::new(OPERATION, qkv, spans, prefix, heads)?;
    let (card, dtype) = (ordinal(qkv), qkv.dtype());
    let rows = e.size * e.queries;
    let items = rows as usize * heads;
    if items * 4 > SCRATCH {
        return Err(Error::Shape {
            operation: OPERATION,
            found: format!("{rows} rows of {heads} heads"),
            expected: format!("at most {} in all", SCRATCH / 4),
        });
    }
    let scratch = device(card)?.scratch()?;
    let delta: *mut f32 = scratch.pointer().cast();
    let params = AttentionDelta {
        delta,
        d_context: d_context.device_ptr(),
        context: context.device_ptr(),
        rows,
        queries: e.queries,
        heads: e.heads,
        head_dim: e.head_dim,
    };
    let grid = Grid {
        blocks: [
            blocks(OPERATION, items, sys::GLM_ATTENTION_DELTA_HEADS as usize)?,
            1,
            1,
        ],
        threads: 32 * sys::GLM_ATTENTION_DELTA_HEADS,
        shared_bytes: 0,
    };
    // SAFETY: ops has checked both to be [B S, heads d] on one device; the scratch has room for the sums.
    unsafe { launch(card, "attention_delta", dtype, grid, &params)? };

    let (prefix_keys, prefix_values) = pointers(prefix);
    let (d_prefix_keys, d_prefix_values) = d_prefix.map_or((ptr::null_mut(), ptr::null_mut()), |(k, v)| {
        (k.device_ptr_mut().cast(), v.device_ptr_mut().cast())
    });
    let params = AttentionBackward {
        dqkv: dqkv.device_ptr_mut(),
        d_prefix_keys,
        d_prefix_values,
        d_context: d_context.device_ptr(),
        qkv: qkv.device_ptr(),
        log_sum_exp: log_sum_exp.device_ptr().cast(),
        delta,
        prefix_keys,
        prefix_values,
        spans: spans.device_ptr().cast(),
        prefix_batch_stride: e.prefix_batch_stride,
        size: e.size,
        queries: e.queries,
        heads: e.heads,
        head_dim: e.head_dim,
        prefix: e.prefix,
        scale: e.scale,
    };
    let (block_rows, shared_q, shared_kv, [q, kv, of_prefix]) = if dtype == DType::F32 {
        let rows = sys::GLM_ATTENTION_BACKWARD_F32_ROWS;
        let kernels = [
            "attention_backward_q",
            "attention_backward_kv",
            "attention_backward_prefix",
        ];
        (
            rows,
            e.plain_bytes(2, 2 * rows, rows),
            e.plain_bytes(2, 2 * rows, 2 * rows),
            kernels,
        )
    } else {
        let kernels = [
            e.named([
                "attention_backward_q_d16",
                "attention_backward_q_d32",
                "attention_backward_q_d64",
                "attention_backward_q_d128",
            ]),
            e.named([
                "attention_backward_kv_d16",
                "attention_backward_kv_d32",
                "attention_backward_kv_d64",
                "attention_backward_kv_d128",
            ]),
            e.named([
                "attention_backward_prefix_d16",
                "attention_backward_prefix_d32",
                "attention_backward_prefix_d64",
                "attention_backward_prefix_d128",
            ]),
        ];
        (
            sys::GLM_ATTENTION_BACKWARD_ROWS,
            sys::GLM_ATTENTION_BACKWARD_Q_SHARED_BYTES * e.head_dim,
            sys::GLM_ATTENTION_BACKWARD_KV_SHARED_BYTES * e.head_dim
                + sys::GLM_ATTENTION_BACKWARD_STATISTICS_BYTES,
            kernels,
        )
    };
    let grid_q = e.grid(OPERATION, e.queries, block_rows, shared_q)?;
    let grid_kv = e.grid(OPERATION, e.queries, block_rows, shared_kv)?;
    // SAFETY: ops has checked qkv and dqkv [B S, heads 3 d], d_context and context [B S, heads d], log_sum_exp and spans as for
    // the forward pass, the prefix and its gradients [heads, P, d] or [B, heads, P, d], all on one device; delta has been launched above.
    unsafe {
        launch(card, q, dtype, grid_q, &params)?;
        launch(card, kv, dtype, grid_kv, &params)?;
        if !d_prefix_keys.is_null() {
            // To a prefix that they share all sequences are one.
            let size = if e.prefix_batch_stride == 0 { 1 } else { e.size };
            let grid = Extents { size, ..e }.grid(OPERATION, e.prefix, block_rows, shared_kv)?;
            launch(card, of_prefix, dtype, grid, &params)?;
        }
    }
    Ok(())
}

/// As [`crate::ops::attention_cached`].
pub(crate) fn attention_cached(
    qkv: &Tensor,
    (keys, values): (&mut Tensor, &mut Tensor),
    past: usize,
    spans: &Tensor,
    prefix: Prefix<'_>,
    heads: usize,
    context: &mut Tensor,
    log_sum_exp: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "attention_cached";
    let e = Extents::new(OPERATION, qkv, spans, prefix, heads)?;
    let capacity = size(OPERATION, keys.extent(1))? as u32;
    let (card, dtype) = (ordinal(qkv), qkv.dtype());
    let rows = e.size * e.queries;
    let hidden = e.heads * e.head_dim;
    let params = KvAppend {
        keys: keys.device_ptr_mut(),
        values: values.device_ptr_mut(),
        qkv: qkv.device_ptr(),
        rows,
        queries: e.queries,
        past: past as u32,
        capacity,
        heads: e.heads,
        head_dim: e.head_dim,
    };
    let piece = 16 / dtype.size();
    let pieces = match e.head_dim as usize % piece {
        0 => rows as usize * hidden as usize / piece,
        _ => rows as usize * hidden as usize,
    };
    let grid = Grid {
        blocks: [
            blocks(OPERATION, pieces, sys::GLM_KV_APPEND_THREADS as usize)?,
            1,
            1,
        ],
        threads: sys::GLM_KV_APPEND_THREADS,
        shared_bytes: 0,
    };
    // SAFETY: ops has checked that qkv is [B Q, heads 3 d] and the cache [B, capacity, heads d] with room for Q behind `past`, all
    // on one device.
    unsafe { launch(card, "kv_append", dtype, grid, &params)? };

    let key_count = past as u32 + e.queries;
    if e.queries == 1 && matches!(e.head_dim, 16 | 32 | 64 | 128) {
        let chunk = sys::GLM_ATTENTION_CHUNK;
        let chunks = e.prefix.div_ceil(chunk) + key_count.div_ceil(chunk);
        let partial = rows as usize * heads * chunks as usize * (e.head_dim as usize + 2) * 4;
        // More sequences than that keep a card busy with a block for each.
        if chunks == 1 || partial <= SCRATCH {
            // SAFETY: as for the append and as ops has checked; the scratch has room for the chunks.
            return unsafe {
                decode(
                    e,
                    qkv,
                    (keys, values),
                    (key_count, chunks),
                    spans,
                    prefix,
                    context,
                    log_sum_exp,
                )
            };
        }
    }
    let keys = Keys {
        keys: keys.device_ptr(),
        values: values.device_ptr(),
        batch_stride: u64::from(capacity) * u64::from(hidden),
        row_stride: hidden,
        head_stride: e.head_dim,
        count: key_count,
    };
    // SAFETY: as for the append; ops has checked context, log_sum_exp, spans and the prefix as for `attention`.
    unsafe { forward(OPERATION, e, qkv, &keys, spans, prefix, context, log_sum_exp) }
}

/// One query for each sequence, its keys cut into chunks.
///
/// # Safety
/// Tensors are those of [`crate::ops::attention_cached`], checked; more than one chunk fits into the scratch.
// SAFETY: as above.
unsafe fn decode(
    e: Extents,
    qkv: &Tensor,
    (keys, values): (&Tensor, &Tensor),
    (key_count, chunks): (u32, u32),
    spans: &Tensor,
    prefix: Prefix<'_>,
    context: &mut Tensor,
    log_sum_exp: &mut Tensor,
) -> Result<()> {
    let (card, dtype) = (ordinal(qkv), qkv.dtype());
    let scratch = device(card)?.scratch()?;
    let partial: *mut f32 = scratch.pointer().cast();
    let (prefix_keys, prefix_values) = pointers(prefix);
    let params = AttentionDecode {
        partial,
        context: context.device_ptr_mut(),
        log_sum_exp: log_sum_exp.device_ptr_mut().cast(),
        qkv: qkv.device_ptr(),
        keys: keys.device_ptr(),
        values: values.device_ptr(),
        prefix_keys,
        prefix_values,
        spans: spans.device_ptr().cast(),
        prefix_batch_stride: e.prefix_batch_stride,
        key_count,
        capacity: keys.extent(1) as u32,
        heads: e.heads,
        head_dim: e.head_dim,
        prefix: e.prefix,
        scale: e.scale,
    };
    let kernel = e.named([
        "attention_decode_d16",
        "attention_decode_d32",
        "attention_decode_d64",
        "attention_decode_d128",
    ]);
    let warps = sys::GLM_ATTENTION_THREADS / 32;
    let grid = e.grid("attention_cached", chunks, 1, 4 * warps * (e.head_dim + 2))?;
    // SAFETY: the caller's promise.
    unsafe { launch(card, kernel, dtype, grid, &params)? };
    if chunks == 1 {
        return Ok(());
    }
    let params = AttentionCombine {
        context: context.device_ptr_mut(),
        log_sum_exp: log_sum_exp.device_ptr_mut().cast(),
        partial,
        spans: spans.device_ptr().cast(),
        chunks,
        key_count,
        heads: e.heads,
        head_dim: e.head_dim,
        prefix: e.prefix,
        reserved: 0,
    };
    let grid = Grid {
        blocks: [e.heads, e.size, 1],
        threads: sys::GLM_ATTENTION_THREADS,
        shared_bytes: 0,
    };
    // SAFETY: the caller's promise; the chunks have been launched above.
    unsafe { launch(card, "attention_combine", dtype, grid, &params) }
}
