//! Rotary positions and prefix-LM attention.

use super::{
    check, check_device, check_elements, check_index_tensor, check_indices, check_sums, mismatch, on_device,
};
use crate::cpu::attention::Extents;
use crate::cpu::real::Real;
use crate::data::batch::Span;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};
use crate::{cpu, cuda};

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
    check("rope", &[("qkv", qkv, m, heads * 3 * head_dim)])?;
    check_sums("rope", "tables", tables, count * (head_dim / 2), qkv)?;
    check_index_tensor("rope", "positions", positions, 2 * m, qkv)?;
    check_indices("rope", "position", positions, count)?;
    on_device!("rope", qkv, T => cpu::rope::rotate(
        qkv.as_mut_slice::<T>(),
        positions.as_slice(),
        tables.as_slice(),
        heads,
        head_dim,
        inverse,
    ), cuda => cuda::pointwise::rope(qkv, positions, tables, heads, inverse));
    Ok(())
}

/// Keys and values that every query sees before those of its sequence, unrotated: P-Tuning v2. `[heads, P, d]` for all
/// sequences, or `[B, heads, P, d]`.
///
/// A padding query sees the prefix and nothing else, as in the official code.
#[derive(Debug, Clone, Copy)]
pub struct Prefix<'a> {
    /// Keys.
    pub keys: &'a Tensor,
    /// Values.
    pub values: &'a Tensor,
}

/// The gradients of a [`Prefix`], of its shape and of the type of sums.
#[derive(Debug)]
pub struct PrefixGradients<'a> {
    /// Of the keys.
    pub keys: &'a mut Tensor,
    /// Of the values.
    pub values: &'a mut Tensor,
}

/// Prefix-LM attention over keys and values of the same rows, and of a prefix if there is one.
///
/// `qkv [B S, heads * 3 d]` (rotated) -> `context [B S, heads d]`; `log_sum_exp [B heads, S]` is kept for the backward
/// pass. `softmax(mask(q kᵀ / sqrt(d))) v`, with the mask of [`Span`]; `spans [B, 2]` (I32) holds start and context.
///
/// # Errors
/// Shapes or types do not fit.
pub fn attention(
    qkv: &Tensor,
    spans: &Tensor,
    prefix: Option<Prefix<'_>>,
    heads: usize,
    context: &mut Tensor,
    log_sum_exp: &mut Tensor,
) -> Result<()> {
    let e = attention_extents("attention", qkv, spans, prefix, heads)?;
    let rows = e.size * e.queries;
    check(
        "attention",
        &[
            ("qkv", qkv, rows, 3 * heads * e.head_dim),
            ("context", context, rows, heads * e.head_dim),
        ],
    )?;
    check_sums("attention", "log_sum_exp", log_sum_exp, heads * rows, qkv)?;
    on_device!("attention", qkv, T => cpu::attention::forward(
        qkv.as_slice::<T>(),
        cpu::attention::Source::Own,
        host_prefix(prefix),
        &host_spans(spans),
        e,
        context.as_mut_slice(),
        log_sum_exp.as_mut_slice(),
    ), cuda => cuda::attention::attention(qkv, spans, pair(prefix), heads, context, log_sum_exp));
    Ok(())
}

fn attention_extents(
    operation: &'static str,
    qkv: &Tensor,
    spans: &Tensor,
    prefix: Option<Prefix<'_>>,
    heads: usize,
) -> Result<Extents> {
    let (rows, width) = qkv.shape().rows_and_columns();
    let size = check_spans(operation, spans, qkv)?;
    if !rows.is_multiple_of(size) || !width.is_multiple_of(3 * heads) {
        return Err(mismatch(
            operation,
            format!("qkv {} with {size} spans", qkv.shape()),
            format!("[B * S, {heads} * 3 * d]"),
        ));
    }
    let s = rows / size;
    if spans.device() == Device::Cpu
        && let Some(span) = host_spans(spans)
            .iter()
            .find(|span| span.context > s || span.start > s)
    {
        return Err(mismatch(
            operation,
            format!("{span:?}"),
            format!("a span within {s} positions"),
        ));
    }
    let head_dim = width / (3 * heads);
    let (prefix, prefixes) = check_prefix(operation, prefix, [size, heads, head_dim], qkv)?;
    Ok(Extents {
        size,
        queries: s,
        keys: s,
        heads,
        head_dim,
        prefix,
        prefixes,
    })
}

/// The number of keys of a prefix, and of how many sequences it is: 1 for all, or each.
fn check_prefix(
    operation: &'static str,
    prefix: Option<Prefix<'_>>,
    [size, heads, head_dim]: [usize; 3],
    qkv: &Tensor,
) -> Result<(usize, usize)> {
    let Some(Prefix { keys, values }) = prefix else {
        return Ok((0, 1));
    };
    let shape = keys.shape();
    let (length, prefixes) = match *shape.extents() {
        [h, length, _] if h == heads => (length, 1),
        [each, h, length, _] if h == heads && (each == 1 || each == size) => (length, each),
        _ => {
            return Err(mismatch(
                operation,
                format!("prefix keys {shape}"),
                format!("prefix keys [{heads}, P, {head_dim}] or [{size}, {heads}, P, {head_dim}]"),
            ));
        }
    };
    let rows = prefixes * heads * length;
    check_device(operation, "prefix", keys, qkv.device())?;
    check(
        operation,
        &[
            ("prefix keys", keys, rows, head_dim),
            ("prefix values", values, rows, head_dim),
        ],
    )?;
    check_elements(operation, "prefix keys", keys, qkv.dtype(), rows * head_dim)?;
    Ok((length, prefixes))
}

/// A prefix as a device takes it.
fn pair(prefix: Option<Prefix<'_>>) -> Option<(&Tensor, &Tensor)> {
    prefix.map(|prefix| (prefix.keys, prefix.values))
}

/// A prefix on the host, checked.
fn host_prefix<'a, T: Real>(prefix: Option<Prefix<'a>>) -> cpu::attention::Prefix<'a, T> {
    prefix.map_or(cpu::attention::Prefix::NONE, |prefix| cpu::attention::Prefix {
        keys: prefix.keys.as_slice(),
        values: prefix.values.as_slice(),
    })
}

/// The number of sequences that `spans [B, 2]` (I32: start, context) describes.
fn check_spans(operation: &'static str, spans: &Tensor, qkv: &Tensor) -> Result<usize> {
    let (size, two) = spans.shape().rows_and_columns();
    if size == 0 || two != 2 {
        let found = format!("spans {}", spans.shape());
        return Err(mismatch(operation, found, "spans [B, 2]"));
    }
    check_index_tensor(operation, "spans", spans, 2 * size, qkv)?;
    Ok(size)
}

/// The spans of a host tensor; a negative number, which no caller writes, would become one past every length.
fn host_spans(spans: &Tensor) -> Vec<Span> {
    let pairs = spans.as_slice::<i32>().chunks_exact(2);
    let spans = pairs.map(|pair| Span {
        start: pair[0] as usize,
        context: pair[1] as usize,
    });
    spans.collect()
}

/// The gradient of [`attention`]: `dqkv [B S, heads * 3 d]` is written (still rotated), a prefix's gradients are added to.
///
/// # Errors
/// Shapes or types do not fit.
pub fn attention_backward(
    d_context: &Tensor,
    qkv: &Tensor,
    context: &Tensor,
    log_sum_exp: &Tensor,
    spans: &Tensor,
    prefix: Option<(Prefix<'_>, PrefixGradients<'_>)>,
    heads: usize,
    dqkv: &mut Tensor,
) -> Result<()> {
    let (prefix, mut gradients) = prefix.unzip();
    let e = attention_extents("attention_backward", qkv, spans, prefix, heads)?;
    if let Some(gradients) = &gradients {
        let elements = e.prefixes * heads * e.prefix * e.head_dim;
        check_sums(
            "attention_backward",
            "prefix gradients",
            gradients.keys,
            elements,
            qkv,
        )?;
        check_sums(
            "attention_backward",
            "prefix gradients",
            gradients.values,
            elements,
            qkv,
        )?;
    }
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
    check_sums(
        "attention_backward",
        "log_sum_exp",
        log_sum_exp,
        heads * rows,
        qkv,
    )?;
    on_device!("attention_backward", qkv, T => cpu::attention::backward(
        d_context.as_slice::<T>(),
        qkv.as_slice(),
        context.as_slice(),
        log_sum_exp.as_slice(),
        host_prefix(prefix),
        &host_spans(spans),
        e,
        dqkv.as_mut_slice(),
        gradients.as_mut().map_or([&mut [], &mut []], |g| [g.keys.as_mut_slice(), g.values.as_mut_slice()]),
    ), cuda => cuda::attention::attention_backward(
        d_context,
        qkv,
        context,
        log_sum_exp,
        spans,
        pair(prefix),
        heads,
        dqkv,
        gradients.map(|gradients| (gradients.keys, gradients.values)),
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
    spans: &Tensor,
    prefix: Option<Prefix<'_>>,
    heads: usize,
    context: &mut Tensor,
    log_sum_exp: &mut Tensor,
) -> Result<()> {
    let (rows, width) = qkv.shape().rows_and_columns();
    let capacity = keys.extent(1);
    let size = check_spans("attention_cached", spans, qkv)?;
    let queries = rows / size;
    if queries * size != rows || past + queries > capacity {
        return Err(mismatch(
            "attention_cached",
            format!("{past} cached + {queries} new positions of {size} sequences"),
            format!("at most {capacity} positions, as reserved"),
        ));
    }
    let head_dim = width / (3 * heads);
    let (length, prefixes) = check_prefix("attention_cached", prefix, [size, heads, head_dim], qkv)?;
    let e = Extents {
        size,
        queries,
        keys: past + queries,
        heads,
        head_dim,
        prefix: length,
        prefixes,
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
    check_sums("attention_cached", "log_sum_exp", log_sum_exp, heads * rows, qkv)?;
    on_device!("attention_cached", qkv, T => {
        cpu::attention::append(qkv.as_slice::<T>(), e, past, capacity, keys.as_mut_slice(), values.as_mut_slice());
        let source = cpu::attention::Source::Cache { keys: keys.as_slice::<T>(), values: values.as_slice(), capacity };
        let prefix = host_prefix(prefix);
        cpu::attention::forward(qkv.as_slice(), source, prefix, &host_spans(spans), e, context.as_mut_slice(), log_sum_exp.as_mut_slice());
    }, cuda => cuda::attention::attention_cached(
        qkv,
        (keys, values),
        past,
        spans,
        pair(prefix),
        heads,
        context,
        log_sum_exp,
    ));
    Ok(())
}
