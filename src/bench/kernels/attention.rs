//! Attention over whole sequences, and of one new token over a cache.

use super::super::inputs::visible_pairs;
use super::super::report::Work;
use super::Bench;
use crate::error::Result;
use crate::ops;
use crate::tensor::Tensor;

/// Forward and backward of one sequence, a quarter of it context; then one token over as many cached ones. Operations are
/// those of the pairs that see each other.
pub(super) fn attention(bench: &mut Bench<'_>) -> Result<()> {
    for s in bench.settings.lengths.clone() {
        bench.attempt("attention", |bench| whole(bench, s))?;
        bench.attempt("attention", |bench| cached(bench, s))?;
    }
    Ok(())
}

fn whole(bench: &mut Bench<'_>, s: usize) -> Result<()> {
    let compute = bench.compute();
    let (heads, h) = (bench.config().num_attention_heads, bench.config().hidden_size);
    let spans = Tensor::from_slice(&[0, (s / 4) as i32], [1, 2]).into_device(compute.device)?;
    let qkv = bench.numbers.activations(compute, [s, 3 * h])?;
    let d_context = bench.numbers.activations(compute, [s, h])?;
    let (mut context, mut dqkv) = (compute.zeros([s, h])?, compute.zeros([s, 3 * h])?);
    let mut log_sum_exp = compute.accumulators([heads * s])?;
    let forward = Work {
        bytes: bench.bytes(4 * s * h),
        flops: 4.0 * h as f64 * visible_pairs(s, s / 4),
    };
    // Five products where forward has two.
    let backward = Work {
        bytes: bench.bytes(8 * s * h),
        flops: 2.5 * forward.flops,
    };
    let shape = [("S", s), ("heads", heads), ("d", h / heads)];
    bench.case("attention", "forward", &shape, forward, 1, |_| {
        ops::attention(&qkv, &spans, None, heads, &mut context, &mut log_sum_exp)
    })?;
    bench.case("attention", "backward", &shape, backward, 1, |_| {
        ops::attention_backward(
            &d_context,
            &qkv,
            &context,
            &log_sum_exp,
            &spans,
            None,
            heads,
            &mut dqkv,
        )
    })
}

fn cached(bench: &mut Bench<'_>, past: usize) -> Result<()> {
    let compute = bench.compute();
    let (heads, h) = (bench.config().num_attention_heads, bench.config().hidden_size);
    let spans = Tensor::from_slice(&[0, past as i32], [1, 2]).into_device(compute.device)?;
    let qkv = bench.numbers.activations(compute, [1, 3 * h])?;
    let mut context = compute.zeros([1, h])?;
    let mut log_sum_exp = compute.accumulators([heads])?;
    let shape = [1, past + 1, h];
    let bytes = 2 * (past + 1) * h * compute.dtype.size();
    let copies = bench.copies(bytes);
    let numbers = &bench.numbers;
    let mut caches = Bench::several(copies, |_| {
        Ok((
            numbers.activations(compute, shape)?,
            numbers.activations(compute, shape)?,
        ))
    })?;
    let work = Work {
        bytes: bytes as f64,
        flops: 4.0 * h as f64 * (past + 1) as f64,
    };
    let shape = [("cached", past), ("heads", heads), ("d", h / heads)];
    bench.case("attention", "one token", &shape, work, copies, |i| {
        let (keys, values) = &mut caches[i % copies];
        let cache = (keys, values);
        ops::attention_cached(
            &qkv,
            cache,
            past,
            &spans,
            None,
            heads,
            &mut context,
            &mut log_sum_exp,
        )
    })
}
