//! Attention over whole sequences, and of one new token over a cache.

use super::super::inputs::visible_pairs;
use super::super::report::Work;
use super::Bench;
use crate::error::Result;
use crate::ops;
use crate::rng::Stream;
use crate::tensor::Tensor;

/// Forward and backward of one sequence, a quarter of it context; then one token over as many cached ones. Operations are
/// those of the pairs that see each other.
pub(super) fn attention(bench: &mut Bench<'_>) -> Result<()> {
    for s in bench.settings.lengths.clone() {
        bench.attempt("attention", |bench| whole(bench, s))?;
        bench.attempt("attention", |bench| cached(bench, s))?;
    }
    bench.attempt("attention", prefix)
}

/// Keys of one layer out of the table of a prefix of 128, with dropout for each of 4 sequences, and back.
fn prefix(bench: &mut Bench<'_>) -> Result<()> {
    const LENGTH: usize = 128;
    const SIZE: usize = 4;
    let compute = bench.compute();
    let (heads, h) = (bench.config().num_attention_heads, bench.config().hidden_size);
    let shape = [SIZE, heads, LENGTH, h / heads];
    let table = bench.numbers.parameters(compute, [LENGTH, 2 * h])?;
    let mut d_table = compute.accumulators([LENGTH, 2 * h])?;
    let (mut keys, dy) = (compute.zeros(shape)?, compute.accumulators(shape)?);
    let dropout = Some((0.1, Stream::new(1, 1)));
    let n = SIZE * LENGTH * h;
    let work = |bytes| Work { bytes, flops: 0.0 };
    let names = [("B", SIZE), ("P", LENGTH), ("heads", heads)];
    let forward = work(bench.bytes(n) + (4 * LENGTH * h) as f64);
    bench.case("attention", "prefix", &names, forward, 1, |_| {
        ops::prefix_heads(&table, 1, dropout, &mut keys)
    })?;
    let backward = work((4 * n + 8 * LENGTH * h) as f64);
    bench.case("attention", "prefix back", &names, backward, 1, |_| {
        ops::prefix_heads_backward(&dy, 1, dropout, &mut d_table)
    })
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
