//! Products with weights: in 4 bits, dense, of adapters, of the head.
//!
//! Weights are rotated, activations are not: in a model too the layer before has just written them.

use super::super::inputs::indices;
use super::super::report::Work;
use super::Bench;
use crate::error::Result;
use crate::ops::{self, HEAD_CHUNK, HeadRef, HeadScratch, WeightRef};
use crate::quant::{QuantTensor, QuantType, RowInt8};
use crate::rng::Stream;
use crate::tensor::{DType, Device, Tensor};

/// Rank of the adapters measured.
const RANK: usize = 8;

/// `y = x Wᵀ` and `dx = dy W` on NF4 weights.
pub(super) fn nf4(bench: &mut Bench<'_>) -> Result<()> {
    let device = bench.compute().device;
    for (n, k) in bench.linears() {
        bench.attempt("nf4", |bench| {
            let random = |i| QuantTensor::random([n, k], Stream::new(7, i as u64));
            let bytes = random(0).bytes();
            let copies = bench.copies(bytes);
            let weights = Bench::several(copies, |i| ops::place_quantized(random(i), device))?;
            let weights: Vec<WeightRef<'_>> = weights.iter().map(WeightRef::Quant).collect();
            both_ways(bench, "nf4", &weights, bytes)
        })?;
    }
    Ok(())
}

/// NF4 with double quantisation to the compute type.
pub(super) fn dequantize(bench: &mut Bench<'_>) -> Result<()> {
    let compute = bench.compute();
    for (n, k) in bench.linears() {
        bench.attempt("dequantize", |bench| {
            let random = |i| QuantTensor::random([n, k], Stream::new(7, i as u64));
            let mut dense = compute.zeros([n, k])?;
            let work = Work {
                bytes: (random(0).bytes() + dense.byte_len()) as f64,
                flops: 0.0,
            };
            let copies = bench.copies(random(0).bytes());
            let weights = Bench::several(copies, |i| ops::place_quantized(random(i), compute.device))?;
            let shape = [("N", n), ("K", k)];
            bench.case("dequantize", "nf4", &shape, work, copies, |i| {
                ops::dequantize(WeightRef::Quant(&weights[i % copies]), 0..n, &mut dense)
            })
        })?;
    }
    Ok(())
}

/// The same on weights of the compute type, and the gradient of the weight.
pub(super) fn dense(bench: &mut Bench<'_>) -> Result<()> {
    let compute = bench.compute();
    for (n, k) in bench.linears() {
        bench.attempt("dense", |bench| {
            let bytes = n * k * compute.dtype.size();
            let copies = bench.copies(bytes);
            let numbers = &bench.numbers;
            let weights = Bench::several(copies, |_| {
                numbers.tensor(compute.device, compute.dtype, [n, k], 0.02)
            })?;
            let weights: Vec<WeightRef<'_>> = weights.iter().map(WeightRef::Dense).collect();
            both_ways(bench, "dense", &weights, bytes)
        })?;
        for m in whole_batches(bench) {
            bench.attempt("dense", |bench| weight_gradient(bench, m, n, k))?;
        }
    }
    Ok(())
}

/// The numbers of rows of training.
fn whole_batches(bench: &Bench<'_>) -> Vec<usize> {
    let rows = &bench.settings.rows;
    let least = rows.iter().copied().max().unwrap_or(1).min(512);
    rows.iter().copied().filter(|&m| m >= least).collect()
}

fn both_ways(
    bench: &mut Bench<'_>,
    group: &'static str,
    weights: &[WeightRef<'_>],
    weight_bytes: usize,
) -> Result<()> {
    let compute = bench.compute();
    let copies = weights.len();
    let (n, k) = weights[0].extents();
    for m in bench.settings.rows.clone() {
        bench.attempt(group, |bench| {
            let x = bench.numbers.activations(compute, [m, k])?;
            let dy = bench.numbers.activations(compute, [m, n])?;
            let (mut y, mut dx) = (compute.zeros([m, n])?, compute.zeros([m, k])?);
            let work = Work {
                bytes: weight_bytes as f64 + bench.bytes(m * (n + k)),
                flops: 2.0 * (m * n) as f64 * k as f64,
            };
            let shape = [("M", m), ("N", n), ("K", k)];
            bench.case(group, "forward", &shape, work, copies, |i| {
                ops::linear(&x, weights[i % copies], None, None, &mut y)
            })?;
            bench.case(group, "backward", &shape, work, copies, |i| {
                ops::linear_backward_input(&dy, weights[i % copies], None, &mut dx)
            })
        })?;
    }
    Ok(())
}

/// `dW += dyᵀ x`, in the type of sums: training all parameters.
fn weight_gradient(bench: &mut Bench<'_>, m: usize, n: usize, k: usize) -> Result<()> {
    let compute = bench.compute();
    let x = bench.numbers.activations(compute, [m, k])?;
    let dy = bench.numbers.activations(compute, [m, n])?;
    let mut dw = compute.accumulators([n, k])?;
    let work = Work {
        bytes: bench.bytes(m * (n + k)) + 2.0 * dw.byte_len() as f64,
        flops: 2.0 * (m * n) as f64 * k as f64,
    };
    let shape = [("M", m), ("N", n), ("K", k)];
    bench.case("dense", "weight gradient", &shape, work, 1, |_| {
        ops::matmul(1.0, (&dy, true), (&x, false), 1.0, &mut dw)
    })
}

/// The products of one adapter: `u = x Aᵀ, y += s u Bᵀ`, and `du = s dy B, dB += s dyᵀ u, dA += duᵀ x, dx += du A`.
pub(super) fn lora(bench: &mut Bench<'_>) -> Result<()> {
    let compute = bench.compute();
    for (n, k) in bench.linears() {
        for m in whole_batches(bench) {
            bench.attempt("lora", |bench| {
                let activations = |columns| bench.numbers.activations(compute, [m, columns]);
                let (x, dy) = (activations(k)?, activations(n)?);
                let (mut y, mut dx) = (compute.zeros([m, n])?, compute.zeros([m, k])?);
                let (mut u, mut du) = (compute.zeros([m, RANK])?, compute.zeros([m, RANK])?);
                let a = bench.numbers.parameters(compute, [RANK, k])?;
                let b = bench.numbers.parameters(compute, [n, RANK])?;
                let mut da = compute.accumulators([RANK, k])?;
                let mut db = compute.accumulators([n, RANK])?;
                let shape = [("M", m), ("N", n), ("K", k), ("r", RANK)];
                let flops = (2 * m * RANK * (n + k)) as f64;
                let parameters = (a.byte_len() + b.byte_len()) as f64;
                let work = Work {
                    bytes: bench.bytes(m * (k + 2 * n)) + parameters,
                    flops,
                };
                bench.case("lora", "forward", &shape, work, 1, |_| {
                    ops::matmul(1.0, (&x, false), (&a, true), 0.0, &mut u)?;
                    ops::matmul(2.0, (&u, false), (&b, true), 1.0, &mut y)
                })?;
                let work = Work {
                    bytes: bench.bytes(m * (n + 3 * k)) + 3.0 * parameters,
                    flops: 2.0 * flops,
                };
                bench.case("lora", "backward", &shape, work, 1, |_| {
                    ops::matmul(2.0, (&dy, false), (&b, false), 0.0, &mut du)?;
                    ops::matmul(2.0, (&dy, true), (&u, false), 1.0, &mut db)?;
                    ops::matmul(1.0, (&du, true), (&x, false), 1.0, &mut da)?;
                    ops::matmul(1.0, (&du, false), (&a, false), 1.0, &mut dx)
                })
            })?;
        }
    }
    Ok(())
}

/// Logits of one token, and head with loss of supervised rows.
pub(super) fn head(bench: &mut Bench<'_>) -> Result<()> {
    let compute = bench.compute();
    let (v, k) = (bench.config().vocab_size, bench.config().hidden_size);
    let bytes = v * k * compute.dtype.size();
    let copies = bench.copies(bytes);
    let numbers = &bench.numbers;
    let scale = (k as f32).sqrt().recip();
    let weights = Bench::several(copies, |_| {
        numbers.tensor(compute.device, compute.dtype, [v, k], scale)
    })?;
    bench.attempt("head", |bench| {
        let x = bench.numbers.activations(compute, [1, k])?;
        let mut logits = compute.accumulators([1, v])?;
        let work = Work {
            bytes: bytes as f64 + bench.bytes(k) + logits.byte_len() as f64,
            flops: 2.0 * (v * k) as f64,
        };
        bench.case(
            "head",
            "logits",
            &[("M", 1), ("V", v), ("K", k)],
            work,
            copies,
            |i| {
                ops::linear(
                    &x,
                    WeightRef::Dense(&weights[i % copies]),
                    None,
                    None,
                    &mut logits,
                )
            },
        )
    })?;
    for rows in whole_batches(bench) {
        bench.attempt("head", |bench| {
            let heads: Vec<_> = weights.iter().map(|w| WeightRef::Dense(w).into()).collect();
            loss(bench, rows, "", &heads)
        })?;
    }
    let Some(source) = weights.into_iter().next() else {
        return Ok(());
    };
    let source = source.to_device(Device::Cpu)?;
    bench.attempt("head", |bench| {
        let weight = ops::place_int8(RowInt8::quantize("head", &source)?, compute.device)?;
        form(bench, " int8", WeightRef::Int8(&weight).into(), weight.bytes())
    })?;
    bench.attempt("head", |bench| {
        let weight = ops::quantize("head", &source, QuantType::Nf4, true, compute.device)?;
        form(bench, " nf4", WeightRef::Quant(&weight).into(), weight.bytes())
    })?;
    if compute.device == Device::Cpu {
        return Ok(());
    }
    bench.attempt("head", |bench| {
        let pieces = (source.bytes().chunks(HEAD_CHUNK * k * compute.dtype.size())).map(|bytes| {
            let shape = [bytes.len() / (k * compute.dtype.size()), k];
            let mut piece = Tensor::zeros_pinned(compute.device, compute.dtype, shape)?;
            piece.bytes_mut().copy_from_slice(bytes);
            Ok(piece)
        });
        let pieces = pieces.collect::<Result<Vec<_>>>()?;
        form(bench, " streamed", HeadRef::Streamed(&pieces), bytes)
    })
}

/// Logits of one token and loss of supervised rows with a head in another form.
fn form(bench: &mut Bench<'_>, name: &str, head: HeadRef<'_>, bytes: usize) -> Result<()> {
    let compute = bench.compute();
    let (v, k) = head.extents();
    let x = bench.numbers.activations(compute, [1, k])?;
    let mut logits = compute.accumulators([1, v])?;
    let mut scratch = HeadScratch::new(compute, head, 0)?;
    let work = Work {
        bytes: bytes as f64 + bench.bytes(k) + logits.byte_len() as f64,
        flops: 2.0 * (v * k) as f64,
    };
    let shape = [("M", 1), ("V", v), ("K", k)];
    bench.case("head", &format!("logits{name}"), &shape, work, 1, |_| {
        ops::head_logits(&x, head, &mut scratch, &mut logits)
    })?;
    for rows in whole_batches(bench) {
        loss(bench, rows, name, &[head])?;
    }
    Ok(())
}

fn loss(bench: &mut Bench<'_>, rows: usize, name: &str, heads: &[HeadRef<'_>]) -> Result<()> {
    let compute = bench.compute();
    let copies = heads.len();
    let (v, k) = heads[0].extents();
    let x = bench.numbers.activations(compute, [rows, k])?;
    let targets = indices(compute.device, [rows], v)?;
    let chunk = crate::model::workspace::logits_elements(rows, v);
    let mut scratch = HeadScratch::new(compute, heads[0], chunk)?;
    let mut statistics = compute.accumulators([rows, ops::STATISTICS])?;
    let mut dx = Tensor::zeros_on(compute.device, DType::F32, [rows, k])?;
    let forward = Work {
        bytes: (v * k * compute.dtype.size()) as f64 + bench.bytes(rows * k),
        flops: 2.0 * (rows * k) as f64 * v as f64,
    };
    let both = Work {
        bytes: 2.0 * forward.bytes + dx.byte_len() as f64,
        flops: 2.0 * forward.flops,
    };
    let shape = [("rows", rows), ("V", v), ("K", k)];
    bench.case("head", &format!("loss{name}"), &shape, forward, copies, |i| {
        ops::head_loss(&x, heads[i % copies], &targets, &mut scratch, &mut statistics).map(drop)
    })?;
    let name = format!("loss and gradient{name}");
    bench.case("head", &name, &shape, both, copies, |i| {
        let head = heads[i % copies];
        ops::head_loss(&x, head, &targets, &mut scratch, &mut statistics)?;
        let buffers = (&mut scratch, &statistics);
        ops::head_loss_backward(&x, head, &targets, 1.0, buffers, &mut dx, None)
    })
}
