//! Everything that memory bandwidth limits. All operands are rotated.

use super::super::inputs::indices;
use super::super::report::Work;
use super::Bench;
use crate::error::Result;
use crate::model::glm::rope_tables;
use crate::ops;
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

/// Rank of the adapters whose update is measured.
const RANK: usize = 8;

/// What moves `n` elements of the compute type and does next to nothing else.
fn moves(bench: &Bench<'_>, n: usize) -> Work {
    Work {
        bytes: bench.bytes(n),
        flops: 0.0,
    }
}

/// Pairs of activations `[m, n]`, to rotate among.
fn pairs(bench: &Bench<'_>, m: usize, n: usize) -> Result<Vec<(Tensor, Tensor)>> {
    let compute = bench.compute();
    let copies = bench.copies(2 * m * n * compute.dtype.size());
    Bench::several(copies, |_| {
        let x = bench.numbers.activations(compute, [m, n])?;
        Ok((x, bench.numbers.activations(compute, [m, n])?))
    })
}

pub(super) fn norm(bench: &mut Bench<'_>) -> Result<()> {
    let compute = bench.compute();
    let n = bench.config().hidden_size;
    for m in bench.pointwise_rows() {
        bench.attempt("norm", |bench| {
            let mut sets = pairs(bench, m, n)?;
            let copies = sets.len();
            let weight = bench.numbers.parameters(compute, [n])?;
            let bias = bench.numbers.parameters(compute, [n])?;
            let mut stats = compute.accumulators([m, 2])?;
            let shape = [("M", m), ("N", n)];
            bench.case("norm", "forward", &shape, moves(bench, 2 * m * n), copies, |i| {
                let (x, y) = &mut sets[i % copies];
                ops::layer_norm(x, &weight, &bias, 1e-5, y, &mut stats)
            })?;
            let dy = bench.numbers.activations(compute, [m, n])?;
            bench.case("norm", "backward", &shape, moves(bench, 3 * m * n), copies, |i| {
                let (x, dx) = &mut sets[i % copies];
                ops::layer_norm_backward_input(&dy, x, &weight, &stats, dx)
            })?;
            let (mut dw, mut db) = (compute.accumulators([n])?, compute.accumulators([n])?);
            let work = moves(bench, 2 * m * n);
            bench.case("norm", "parameters", &shape, work, copies, |i| {
                let (x, dy) = &sets[i % copies];
                ops::layer_norm_backward_parameters(dy, x, &stats, &mut dw, &mut db)
            })
        })?;
    }
    Ok(())
}

pub(super) fn gelu(bench: &mut Bench<'_>) -> Result<()> {
    let n = bench.config().inner_hidden_size;
    for m in bench.pointwise_rows() {
        bench.attempt("gelu", |bench| {
            let mut sets = pairs(bench, m, n)?;
            let copies = sets.len();
            let shape = [("M", m), ("N", n)];
            bench.case("gelu", "forward", &shape, moves(bench, 2 * m * n), copies, |i| {
                let (x, y) = &mut sets[i % copies];
                ops::gelu(x, y)
            })?;
            bench.case("gelu", "backward", &shape, moves(bench, 3 * m * n), copies, |i| {
                let (x, d) = &mut sets[i % copies];
                ops::gelu_backward(x, d)
            })
        })?;
    }
    Ok(())
}

pub(super) fn rope(bench: &mut Bench<'_>) -> Result<()> {
    let compute = bench.compute();
    let (heads, h) = (bench.config().num_attention_heads, bench.config().hidden_size);
    for m in bench.pointwise_rows() {
        bench.attempt("rope", |bench| {
            let copies = bench.copies(3 * m * h * compute.dtype.size());
            let numbers = &bench.numbers;
            let mut qkv = Bench::several(copies, |_| numbers.activations(compute, [m, 3 * h]))?;
            let tables = rope_tables(compute, h / heads, m + 1)?;
            let positions = indices(compute.device, [m, 2], m)?;
            let shape = [("M", m), ("heads", heads), ("d", h / heads)];
            // Queries and keys, in place.
            bench.case("rope", "in place", &shape, moves(bench, 4 * m * h), copies, |i| {
                ops::rope(&mut qkv[i % copies], &positions, &tables, heads, false)
            })
        })?;
    }
    Ok(())
}

pub(super) fn embedding(bench: &mut Bench<'_>) -> Result<()> {
    let compute = bench.compute();
    let (v, n) = (bench.config().vocab_size, bench.config().hidden_size);
    let weight = bench.numbers.activations(compute, [v, n])?;
    for m in bench.pointwise_rows() {
        bench.attempt("embedding", |bench| {
            let ids = indices(compute.device, [m], v)?;
            let mut y = compute.zeros([m, n])?;
            let shape = [("M", m), ("N", n), ("V", v)];
            bench.case("embedding", "gather", &shape, moves(bench, 2 * m * n), 1, |_| {
                ops::embedding(&weight, &ids, &mut y)
            })
        })?;
    }
    Ok(())
}

pub(super) fn dropout(bench: &mut Bench<'_>) -> Result<()> {
    let n = bench.config().hidden_size;
    for m in bench.pointwise_rows() {
        bench.attempt("dropout", |bench| {
            let mut sets = pairs(bench, m, n)?;
            let copies = sets.len();
            let shape = [("M", m), ("N", n)];
            bench.case(
                "dropout",
                "forward",
                &shape,
                moves(bench, 2 * m * n),
                copies,
                |i| {
                    let (x, y) = &mut sets[i % copies];
                    ops::dropout(x, 0.1, Stream::new(1, i as u64), y)
                },
            )
        })?;
    }
    Ok(())
}

/// One parameter that trains.
struct Trained {
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
}

/// The update of all adapters of a model, and their gradient norm.
pub(super) fn adamw(bench: &mut Bench<'_>) -> Result<()> {
    let compute = bench.compute();
    let mut trained = Vec::new();
    for _ in 0..bench.config().num_layers {
        for (n, k) in bench.linears() {
            for shape in [[RANK, k], [n, RANK]] {
                trained.push(Trained {
                    p: bench.numbers.parameters(compute, shape)?,
                    g: bench.numbers.parameters(compute, shape)?,
                    m: compute.accumulators(shape)?,
                    v: compute.accumulators(shape)?,
                });
            }
        }
    }
    let elements: usize = trained.iter().map(|t| t.p.elements()).sum();
    let shape = [("tensors", trained.len()), ("N", elements)];
    let factors = ops::AdamW {
        clip: 1.0,
        one_minus_beta1: 0.1,
        beta2: 0.999,
        one_minus_beta2: 0.001,
        sqrt_correction2: 0.5,
        epsilon: 1e-8,
    };
    let work = |each: usize| Work {
        bytes: (each * elements) as f64,
        flops: 0.0,
    };
    bench.case("adamw", "update", &shape, work(28), 1, |_| {
        let slots = trained.iter_mut().map(|t| ops::AdamwSlot {
            m: &mut t.m,
            v: &mut t.v,
            spans: vec![ops::Span::whole(&mut t.p, &t.g, 1e-5, 1.0)],
        });
        ops::adamw(&mut slots.collect::<Vec<_>>(), &factors)
    })?;
    let mut eight = Vec::new();
    for t in &trained {
        let shape = t.p.shape();
        let zeros = |dtype, n: usize| Tensor::zeros_on(compute.device, dtype, [n]);
        let codes = || zeros(DType::U8, shape.elements());
        let absmax = || zeros(DType::F32, shape.elements().div_ceil(ops::BLOCK_8BIT));
        eight.push([codes()?, codes()?, absmax()?, absmax()?]);
    }
    bench.case("adamw", "update, 8 bits", &shape, work(16), 1, |_| {
        let slots = trained.iter_mut().zip(&mut eight);
        let slots = slots.map(|(t, [m, v, m_absmax, v_absmax])| ops::Adamw8bitSlot {
            m,
            v,
            m_absmax,
            v_absmax,
            spans: vec![ops::Span::whole(&mut t.p, &t.g, 1e-5, 1.0)],
        });
        ops::adamw_8bit(&mut slots.collect::<Vec<_>>(), &factors)
    })?;
    let gradients: Vec<&Tensor> = trained.iter().map(|t| &t.g).collect();
    bench.case("adamw", "gradient norm", &shape, work(4), 1, |_| {
        ops::sum_of_squares_all(&gradients).map(drop)
    })
}
