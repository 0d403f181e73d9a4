//! Rotary positions and prefix-LM attention.

use super::{check, check_elements, check_indices, mismatch, on_device};
use crate::cpu;
use crate::cpu::attention::Extents;
use crate::data::batch::Span;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// 2-D rotary embedding of the q and k parts of `qkv [M, heads * 3 d]`, in place; back when `inverse`.
///
/// `positions [M, 2]` (I32), `tables [positions, d / 2]`: cosines, then sines, of `position * inv_freq`.
///
/// # Errors
/// Shapes or types do not fit, or a position lies outside the tables.
pub fn rope(
    qkv: &mut Tensor,
    positions: &Tensor,
    tables: &Tensor,
    heads: usize,
    inverse: bool,
) -> Result<()> {
    let (m, width) = qkv.shape().rows_and_columns();
    let head_dim = width / (3 * heads);
    let count = tables.shape().rows_and_columns().0;
    check(
        "rope",
        &[
            ("qkv", qkv, m, heads * 3 * head_dim),
            ("tables", tables, count, head_dim / 2),
        ],
    )?;
    check_elements("rope", "positions", positions, DType::I32, 2 * m)?;
    check_indices("rope", "position", positions.as_slice(), count)?;
    on_device!("rope", qkv, T => cpu::rope::rotate(
        qkv.as_mut_slice::<T>(),
        positions.as_slice(),
        tables.as_slice(),
        heads,
        head_dim,
        inverse,
    ));
    Ok(())
}

/// Prefix-LM attention over keys and values of the same rows.
///
/// `qkv [B S, heads * 3 d]` (rotated) -> `context [B S, heads d]`; `log_sum_exp [B heads, S]` is kept for the backward
/// pass. `softmax(mask(q kᵀ / sqrt(d))) v`, with the mask of [`Span`].
///
/// # Errors
/// Shapes or types do not fit.
pub fn attention(
    qkv: &Tensor,
    spans: &[Span],
    heads: usize,
    context: &mut Tensor,
    log_sum_exp: &mut Tensor,
) -> Result<()> {
    let e = attention_extents("attention", qkv, spans, heads)?;
    let rows = e.size * e.queries;
    check(
        "attention",
        &[
            ("qkv", qkv, rows, 3 * heads * e.head_dim),
            ("context", context, rows, heads * e.head_dim),
        ],
    )?;
    check_elements("attention", "log_sum_exp", log_sum_exp, qkv.dtype(), heads * rows)?;
    on_device!("attention", qkv, T => cpu::attention::forward(
        qkv.as_slice::<T>(),
        cpu::attention::Source::Own,
        spans,
        e,
        context.as_mut_slice(),
        log_sum_exp.as_mut_slice(),
    ));
    Ok(())
}

fn attention_extents(operation: &'static str, qkv: &Tensor, spans: &[Span], heads: usize) -> Result<Extents> {
    let (rows, width) = qkv.shape().rows_and_columns();
    if spans.is_empty() || !rows.is_multiple_of(spans.len()) || !width.is_multiple_of(3 * heads) {
        return Err(mismatch(
            operation,
            format!("qkv {} with {} spans", qkv.shape(), spans.len()),
            format!("[B * S, {heads} * 3 * d]"),
        ));
    }
    let s = rows / spans.len();
    if let Some(span) = spans.iter().find(|span| span.context > s || span.start > s) {
        return Err(mismatch(
            operation,
            format!("{span:?}"),
            format!("a span within {s} positions"),
        ));
    }
    Ok(Extents {
        size: spans.len(),
        queries: s,
        keys: s,
        heads,
        head_dim: width / (3 * heads),
    })
}

/// The gradient of [`attention`]: `dqkv [B S, heads * 3 d]` is written (still rotated).
///
/// # Errors
/// Shapes or types do not fit.
pub fn attention_backward(
    d_context: &Tensor,
    qkv: &Tensor,
    context: &Tensor,
    log_sum_exp: &Tensor,
    spans: &[Span],
    heads: usize,
    dqkv: &mut Tensor,
) -> Result<()> {
    let e = attention_extents("attention_backward", qkv, spans, heads)?;
    let (rows, width) = qkv.shape().rows_and_columns();
    check(
        "attention_backward",
        &[
            ("qkv", qkv, rows, width),
            ("d_context", d_context, rows, width / 3),
            ("context", context, rows, width / 3),
            ("dqkv", dqkv, rows, width),
        ],
    )?;
    check_elements(
        "attention_backward",
        "log_sum_exp",
        log_sum_exp,
        qkv.dtype(),
        heads * rows,
    )?;
    on_device!("attention_backward", qkv, T => cpu::attention::backward(
        d_context.as_slice::<T>(),
        qkv.as_slice(),
        context.as_slice(),
        log_sum_exp.as_slice(),
        spans,
        e,
        dqkv.as_mut_slice(),
    ));
    Ok(())
}

/// [`attention`] of `qkv [B Q, heads * 3 d]`, whose keys and values are appended to a cache first.
///
/// `keys` and `values` are `[B, capacity, heads d]` and hold `past` positions; they hold `past + Q` afterwards.
///
/// # Errors
/// Shapes or types do not fit, or the cache is full.
pub fn attention_cached(
    qkv: &Tensor,
    (keys, values): (&mut Tensor, &mut Tensor),
    past: usize,
    spans: &[Span],
    heads: usize,
    context: &mut Tensor,
    log_sum_exp: &mut Tensor,
) -> Result<()> {
    let (rows, width) = qkv.shape().rows_and_columns();
    let capacity = keys.extent(1);
    let queries = rows / spans.len().max(1);
    if spans.is_empty() || queries * spans.len() != rows || past + queries > capacity {
        return Err(mismatch(
            "attention_cached",
            format!(
                "{past} cached + {queries} new positions of {} sequences",
                spans.len()
            ),
            format!("at most {capacity} positions, as reserved"),
        ));
    }
    let e = Extents {
        size: spans.len(),
        queries,
        keys: past + queries,
        heads,
        head_dim: width / (3 * heads),
    };
    let hidden = heads * e.head_dim;
    check(
        "attention_cached",
        &[
            ("qkv", qkv, rows, 3 * hidden),
            ("keys", keys, e.size * capacity, hidden),
            ("values", values, e.size * capacity, hidden),
            ("context", context, rows, hidden),
        ],
    )?;
    check_elements(
        "attention_cached",
        "log_sum_exp",
        log_sum_exp,
        qkv.dtype(),
        heads * rows,
    )?;
    on_device!("attention_cached", qkv, T => {
        cpu::attention::append(qkv.as_slice::<T>(), e, past, capacity, keys.as_mut_slice(), values.as_mut_slice());
        let source = cpu::attention::Source::Cache { keys: keys.as_slice::<T>(), values: values.as_slice(), capacity };
        cpu::attention::forward(qkv.as_slice(), source, spans, e, context.as_mut_slice(), log_sum_exp.as_mut_slice());
    });
    Ok(())
}
