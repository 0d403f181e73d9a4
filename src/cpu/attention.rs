//! Prefix-LM attention, one block of queries at a time: the score matrix is never held as a whole.

use std::ops::Range;

use super::matrix::{Mat, MatMut, gemm};
use super::panel::WIDTH;
use super::parallel;
use super::real::{Real, max, sum, vectorized};
use crate::data::batch::Span;

/// Queries in a block.
const BLOCK: usize = 64;

/// The extents of one attention call.
#[derive(Debug, Clone, Copy)]
pub struct Extents {
    /// Sequences B.
    pub size: usize,
    /// Queries of each sequence.
    pub queries: usize,
    /// Keys of each sequence; query `i` stands at key position `keys - queries + i`.
    pub keys: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Keys of the prefix, which every query sees before those of its sequence.
    pub prefix: usize,
    /// Prefixes: one for all sequences, or one for each.
    pub prefixes: usize,
}

impl Extents {
    fn scale<T: Real>(&self) -> T {
        T::of(1.0 / (self.head_dim as f64).sqrt())
    }

    /// Rough nanoseconds of `products` matrix products over the visible pairs.
    fn nanoseconds(&self, products: usize) -> usize {
        self.size * self.heads * self.queries * self.keys * self.head_dim * products / 20
    }
}

/// The keys of its sequence that the query at position `i` sees: a range, empty for a padding query that has a prefix to see
/// instead, or `None` for one that has not and attends uniformly to all.
fn visible(span: Span, i: usize, prefix: usize) -> Option<Range<usize>> {
    if i >= span.start {
        Some(span.start..span.context.max(i + 1))
    } else if prefix > 0 {
        Some(0..0)
    } else {
        None
    }
}

/// The number of keys that a block of queries ending before position `end` can touch.
fn reach(span: Span, first: usize, end: usize, keys: usize) -> usize {
    if first < span.start {
        keys
    } else {
        span.context.max(end).min(keys)
    }
}

/// One head's operands, rows being positions.
struct Head<'a, T> {
    q: Mat<'a, T>,
    k: Mat<'a, T>,
    v: Mat<'a, T>,
}

/// Where keys and values come from.
#[derive(Clone, Copy)]
pub enum Source<'a, T> {
    /// Beside the queries, in `qkv`.
    Own,
    /// A cache: keys and values `[B, capacity, heads d]`.
    Cache {
        /// Keys after rotation.
        keys: &'a [T],
        /// Values.
        values: &'a [T],
        /// Positions reserved for each sequence.
        capacity: usize,
    },
}

/// Keys and values `[prefixes, heads, prefix, d]` that every query sees, unrotated; empty if there are none.
#[derive(Debug, Clone, Copy)]
pub struct Prefix<'a, T> {
    /// Keys.
    pub keys: &'a [T],
    /// Values.
    pub values: &'a [T],
}

impl<'a, T> Prefix<'a, T> {
    /// No prefix.
    pub const NONE: Self = Self {
        keys: &[],
        values: &[],
    };

    /// Keys and values of head `h` of sequence `b`.
    fn head(&self, e: Extents, b: usize, h: usize) -> [Mat<'a, T>; 2] {
        let size = e.prefix * e.head_dim;
        let at = (b % e.prefixes * e.heads + h) * size;
        [self.keys, self.values].map(|x| Mat::contiguous(&x[at..][..size], e.prefix, e.head_dim))
    }
}

/// A head's keys or values, to be multiplied with blocks of queries: transposed once when there are enough of those.
struct Panels<'a, T> {
    rows: Mat<'a, T>,
    /// Empty for few queries, whose products do not pay for it.
    panels: Vec<T>,
}

/// Fewer queries than this read keys and values where they are.
const WORTH_PANELS: usize = 16;

impl<'a, T: Real> Panels<'a, T> {
    fn new(rows: Mat<'a, T>, count: usize, queries: usize) -> Self {
        let head_dim = rows.column_count();
        let count = if queries < WORTH_PANELS { 0 } else { count };
        let mut panels = vec![T::ZERO; count.next_multiple_of(WIDTH) * head_dim];
        for (i, panel) in panels.chunks_exact_mut(WIDTH * head_dim).enumerate() {
            let keys = i * WIDTH..((i + 1) * WIDTH).min(count);
            rows.rows(keys).t().copy_to_panel(panel);
        }
        Self { rows, panels }
    }

    /// `block [queries, keys] = alpha * x [queries, d] kᵀ`.
    fn multiply(&self, alpha: T, x: Mat<'_, T>, mut block: MatMut<'_, T>) {
        if self.panels.is_empty() {
            let keys = 0..block.column_count();
            return gemm(alpha, x, self.rows.rows(keys).t(), T::ZERO, &mut block);
        }
        let head_dim = self.rows.column_count();
        let panels = self.panels.chunks_exact(WIDTH * head_dim);
        for (mut out, panel) in block.split_columns(WIDTH).into_iter().zip(panels) {
            let k = Mat::new(panel, head_dim, out.column_count(), WIDTH);
            gemm(alpha, x, k, T::ZERO, &mut out);
        }
    }
}

fn head<'a, T>(qkv: &'a [T], source: Source<'a, T>, e: Extents, b: usize, h: usize) -> Head<'a, T> {
    let (d, wide) = (e.head_dim, 3 * e.heads * e.head_dim);
    let own =
        |part: usize, rows: usize| Mat::new(&qkv[b * e.queries * wide + (3 * h + part) * d..], rows, d, wide);
    match source {
        Source::Own => Head {
            q: own(0, e.queries),
            k: own(1, e.keys),
            v: own(2, e.keys),
        },
        Source::Cache {
            keys,
            values,
            capacity,
        } => {
            let at = |x: &'a [T]| Mat::new(&x[b * capacity * e.heads * d + h * d..], e.keys, d, e.heads * d);
            Head {
                q: own(0, e.queries),
                k: at(keys),
                v: at(values),
            }
        }
    }
}

/// `context = softmax(mask(q kᵀ / sqrt(d))) v` for every head; `log_sum_exp [B, heads, S]` is kept for the backward pass.
///
/// The prefix stands before a sequence's own keys. A padding query sees it alone, and all keys uniformly when there is none:
/// the official code blocks with -10000, to which an unblocked score is always superior.
/// `qkv [B S, heads, 3 d]` is rotated already. The official per-layer coefficient divides the scores before the mask
/// and multiplies them again before the softmax: it cancels here.
pub fn forward<T: Real>(
    qkv: &[T],
    source: Source<'_, T>,
    prefix: Prefix<'_, T>,
    spans: &[Span],
    e: Extents,
    context: &mut [T],
    log_sum_exp: &mut [T],
) {
    let offset = e.keys - e.queries;
    let d = e.head_dim;
    let tasks: Vec<_> = context
        .chunks_mut((e.queries * e.heads * d).max(1))
        .zip(log_sum_exp.chunks_mut((e.heads * e.queries).max(1)))
        .enumerate()
        .flat_map(|(b, (context, lse))| {
            let heads = MatMut::contiguous(context, e.queries, e.heads * d).split_columns(d);
            heads
                .into_iter()
                .zip(lse.chunks_mut(e.queries))
                .enumerate()
                .map(move |(h, (c, l))| (b, h, c, l))
        })
        .collect();
    parallel::items(tasks, e.nanoseconds(2), |(b, h, mut context, lse)| {
        let Head { q, k, v } = head(qkv, source, e, b, h);
        let [prefix_k, prefix_v] = prefix.head(e, b, h);
        let span = spans[b];
        let mut scores = vec![T::ZERO; BLOCK.min(e.queries) * (e.prefix + e.keys)];
        let keys_in_panels = Panels::new(k, e.keys, e.queries);
        let prefix_in_panels = Panels::new(prefix_k, e.prefix, e.queries);
        for first in (0..e.queries).step_by(BLOCK) {
            let rows = first..(first + BLOCK).min(e.queries);
            let keys = reach(span, offset + first, offset + rows.end, e.keys);
            let all = e.prefix + keys;
            let scores = &mut scores[..rows.len() * all];
            let mut block = MatMut::contiguous(scores, rows.len(), all);
            let queries = q.rows(rows.clone());
            prefix_in_panels.multiply(e.scale(), queries, block.columns(0..e.prefix));
            keys_in_panels.multiply(e.scale(), queries, block.columns(e.prefix..all));
            for (i, row) in scores.chunks_exact_mut(all).enumerate() {
                let seen = visible(span, offset + first + i, e.prefix);
                lse[first + i] = softmax(row, e.prefix, seen);
            }
            let p = Mat::contiguous(scores, rows.len(), all);
            let (of_prefix, own) = (p.columns(0..e.prefix), p.columns(e.prefix..all));
            gemm(
                T::ONE,
                own,
                v.rows(0..keys),
                T::ZERO,
                &mut context.rows(rows.clone()),
            );
            if e.prefix > 0 {
                gemm(T::ONE, of_prefix, prefix_v, T::ONE, &mut context.rows(rows));
            }
        }
    });
}

/// Copies the keys and values of `qkv [B Q, heads, 3 d]` behind the `past` positions of a cache `[B, capacity, heads d]`.
pub fn append<T: Real>(
    qkv: &[T],
    e: Extents,
    past: usize,
    capacity: usize,
    keys: &mut [T],
    values: &mut [T],
) {
    let d = e.head_dim;
    let hidden = e.heads * d;
    for (row, qkv) in qkv.chunks_exact(3 * hidden).enumerate() {
        let at = (row / e.queries * capacity + past + row % e.queries) * hidden;
        for (h, part) in qkv.chunks_exact(3 * d).enumerate() {
            keys[at + h * d..][..d].copy_from_slice(&part[d..2 * d]);
            values[at + h * d..][..d].copy_from_slice(&part[2 * d..]);
        }
    }
}

/// Softmax over the prefix and the visible part of a row of scores, 0 elsewhere; returns `ln Σ exp`.
#[inline(always)]
fn softmax<T: Real>(row: &mut [T], prefix: usize, visible: Option<Range<usize>>) -> T {
    let Some(visible) = visible else {
        row.fill(T::ONE / T::of(row.len() as f64));
        return T::ZERO;
    };
    let (prefix, own) = row.split_at_mut(prefix);
    own[..visible.start].fill(T::ZERO);
    own[visible.end..].fill(T::ZERO);
    let own = &mut own[visible];
    vectorized(
        #[inline(always)]
        || {
            let top = max(&[max(prefix), max(own)]);
            let mut total = T::ZERO;
            for part in [&mut *prefix, &mut *own] {
                for x in part.iter_mut() {
                    *x = (*x - top).exp();
                }
                total += sum(part, |x| x);
            }
            let inverse = T::ONE / total;
            for part in [prefix, own] {
                for x in part.iter_mut() {
                    *x *= inverse;
                }
            }
            top + total.ln()
        },
    )
}

/// The gradient of [`forward`] over `qkv` (keys and values own), which is written, and over the prefix, added to `d_prefix`
/// (keys, values; as long as the prefix).
///
/// With P recomputed from `log_sum_exp`: `dV = Pᵀ dO`, `dS = P * (dO Vᵀ - rowsum(dO * O))`, `dQ = dS K / sqrt(d)`,
/// `dK = dSᵀ Q / sqrt(d)` (Dao et al. 2022, appendix B). Uniform weights are constants: such a query gives to V only.
pub fn backward<T: Real>(
    d_context: &[T],
    qkv: &[T],
    context: &[T],
    log_sum_exp: &[T],
    prefix: Prefix<'_, T>,
    spans: &[Span],
    e: Extents,
    dqkv: &mut [T],
    d_prefix: [&mut [T]; 2],
) {
    let d = e.head_dim;
    let s = e.queries;
    let wide = 3 * e.heads * d;
    let size = e.heads * e.prefix * d;
    // What each sequence gives to the prefix; added up below in one order for every number of threads.
    let mut shares = vec![T::ZERO; 2 * e.size * size];
    let mut shares_left = shares.as_mut_slice();
    let mut tasks = Vec::with_capacity(e.size * e.heads);
    for (b, dqkv) in dqkv.chunks_mut((s * wide).max(1)).enumerate() {
        let gradients = MatMut::contiguous(dqkv, s, wide).split_columns(3 * d);
        for (h, gradient) in gradients.into_iter().enumerate() {
            let (share, rest) = std::mem::take(&mut shares_left).split_at_mut(2 * e.prefix * d);
            shares_left = rest;
            tasks.push((b, h, gradient, share));
        }
    }
    parallel::items(tasks, e.nanoseconds(5), |(b, h, gradient, share)| {
        let Head { q, k, v } = head(qkv, Source::Own, e, b, h);
        let [prefix_k, prefix_v] = prefix.head(e, b, h);
        let span = spans[b];
        let at = b * s * e.heads * d + h * d;
        let output = Mat::new(&context[at..], s, d, e.heads * d);
        let d_output = Mat::new(&d_context[at..], s, d, e.heads * d);
        let lse = &log_sum_exp[(b * e.heads + h) * s..][..s];
        let mut parts = gradient.split_columns(d).into_iter();
        let (Some(mut dq), Some(mut dk), Some(mut dv)) = (parts.next(), parts.next(), parts.next()) else {
            return;
        };
        for i in 0..s {
            dk.row(i).fill(T::ZERO);
            dv.row(i).fill(T::ZERO);
        }
        let (d_prefix_k, d_prefix_v) = share.split_at_mut(e.prefix * d);
        let mut d_prefix_k = MatMut::contiguous(d_prefix_k, e.prefix, d);
        let mut d_prefix_v = MatMut::contiguous(d_prefix_v, e.prefix, d);
        let mut p = vec![T::ZERO; BLOCK.min(s) * (e.prefix + s)];
        let mut ds = p.clone();
        let (keys_in_panels, values_in_panels) = (Panels::new(k, s, s), Panels::new(v, s, s));
        let [prefix_keys, prefix_values] = [prefix_k, prefix_v].map(|x| Panels::new(x, e.prefix, s));
        for first in (0..s).step_by(BLOCK) {
            let rows = first..(first + BLOCK).min(s);
            let keys = reach(span, first, rows.end, s);
            let all = e.prefix + keys;
            let (p, ds) = (&mut p[..rows.len() * all], &mut ds[..rows.len() * all]);
            let (qb, dob) = (q.rows(rows.clone()), d_output.rows(rows.clone()));
            let mut block = MatMut::contiguous(p, rows.len(), all);
            prefix_keys.multiply(e.scale(), qb, block.columns(0..e.prefix));
            keys_in_panels.multiply(e.scale(), qb, block.columns(e.prefix..all));
            let mut block = MatMut::contiguous(ds, rows.len(), all);
            prefix_values.multiply(T::ONE, dob, block.columns(0..e.prefix));
            values_in_panels.multiply(T::ONE, dob, block.columns(e.prefix..all));
            for (i, (p, ds)) in p.chunks_exact_mut(all).zip(ds.chunks_exact_mut(all)).enumerate() {
                let i = first + i;
                let delta = super::real::sum2(output.row(i, 0..d), d_output.row(i, 0..d), |o, g| o * g);
                score_gradient(p, ds, e.prefix, visible(span, i, e.prefix), lse[i], delta);
            }
            let [p, ds] = [&*p, &*ds].map(|x| Mat::contiguous(x, rows.len(), all));
            let [own_p, own_ds] = [p, ds].map(|x| x.columns(e.prefix..all));
            gemm(
                e.scale(),
                own_ds,
                k.rows(0..keys),
                T::ZERO,
                &mut dq.rows(rows.clone()),
            );
            gemm(e.scale(), own_ds.t(), qb, T::ONE, &mut dk.rows(0..keys));
            gemm(T::ONE, own_p.t(), dob, T::ONE, &mut dv.rows(0..keys));
            if e.prefix > 0 {
                let [p, ds] = [p, ds].map(|x| x.columns(0..e.prefix));
                gemm(e.scale(), ds, prefix_k, T::ONE, &mut dq.rows(rows));
                gemm(e.scale(), ds.t(), qb, T::ONE, &mut d_prefix_k);
                gemm(T::ONE, p.t(), dob, T::ONE, &mut d_prefix_v);
            }
        }
    });
    let part = e.prefix * d;
    let [d_keys, d_values] = d_prefix;
    for (i, share) in shares.chunks_exact((2 * part).max(1)).enumerate() {
        let (keys, values) = share.split_at(part);
        let head = i % (e.prefixes * e.heads);
        let range = head * part..(head + 1) * part;
        for (sums, share) in [(&mut d_keys[range.clone()], keys), (&mut d_values[range], values)] {
            for (sum, &x) in sums.iter_mut().zip(share) {
                *sum += x;
            }
        }
    }
}

/// Turns a row of scores into P and the row of dP into dS.
#[inline(always)]
fn score_gradient<T: Real>(
    p: &mut [T],
    ds: &mut [T],
    prefix: usize,
    visible: Option<Range<usize>>,
    log_sum_exp: T,
    delta: T,
) {
    let Some(visible) = visible else {
        p.fill(T::ONE / T::of(p.len() as f64));
        ds.fill(T::ZERO);
        return;
    };
    let visible = prefix + visible.start..prefix + visible.end;
    for hidden in [prefix..visible.start, visible.end..p.len()] {
        p[hidden.clone()].fill(T::ZERO);
        ds[hidden].fill(T::ZERO);
    }
    for seen in [0..prefix, visible] {
        let (p, ds) = (&mut p[seen.clone()], &mut ds[seen]);
        vectorized(
            #[inline(always)]
            || {
                for (p, ds) in p.iter_mut().zip(ds.iter_mut()) {
                    *p = (*p - log_sum_exp).exp();
                    *ds = *p * (*ds - delta);
                }
            },
        );
    }
}
