//! The hot operations on the CPU, with criterion: `cargo bench --bench ops [-- FILTER]`.
//!
//! Products report multiply-adds a second (as elements), everything else bytes a second. Sizes are slices of ChatGLM-6B's:
//! hidden 1024, inner 4096, heads of 128. `decode` is the product of one token: its bytes are those of the weight, to be
//! held against the memory bandwidth that `copy` shows.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use glmtune::model::glm::rope_tables;
use glmtune::ops::{self, WeightRef};
use glmtune::quant::{QuantTensor, QuantType};
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Shape, Tensor};

const F32: DType = DType::F32;

fn random(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let stream = Stream::new(seed, 1);
    let values: Vec<f32> = (0..shape.elements() as u64)
        .map(|i| stream.uniform(i) - 0.5)
        .collect();
    Tensor::from_slice(&values, shape)
}

fn zeros(shape: impl Into<Shape>) -> Tensor {
    Tensor::zeros(F32, shape)
}

fn products(c: &mut Criterion) {
    let (n, k) = (4096, 1024);
    let w = random(1, [n, k]);
    let half = w.to_dtype(DType::F16);
    let nf4 = QuantTensor::quantize(&w, QuantType::Nf4, true).expect("finite weights");
    let forms = [
        ("f32", WeightRef::Dense(&w), w.bytes().len()),
        ("f16", WeightRef::Dense(&half), half.bytes().len()),
        ("nf4", WeightRef::Quant(&nf4), nf4.bytes()),
    ];
    for (form, weight, bytes) in forms {
        let mut group = c.benchmark_group(format!("linear {form}"));
        for m in [16, 128, 512] {
            let (x, mut y) = (random(2, [m, k]), zeros([m, n]));
            let (dy, mut dx) = (random(3, [m, n]), zeros([m, k]));
            group.throughput(Throughput::Elements((m * n * k) as u64));
            group.bench_function(format!("forward M={m}"), |b| {
                b.iter(|| ops::linear(&x, weight, None, None, &mut y).expect("shapes fit"));
            });
            group.bench_function(format!("backward_input M={m}"), |b| {
                b.iter(|| ops::linear_backward_input(&dy, weight, None, &mut dx).expect("shapes fit"));
            });
        }
        let (x, mut y) = (random(2, [1, k]), zeros([1, n]));
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function("decode M=1", |b| {
            b.iter(|| ops::linear(&x, weight, None, None, &mut y).expect("shapes fit"));
        });
        group.finish();
    }
    let (dy, x, mut dw) = (random(3, [128, n]), random(2, [128, k]), zeros([n, k]));
    let mut group = c.benchmark_group("matmul");
    group.throughput(Throughput::Elements((128 * n * k) as u64));
    group.bench_function("weight gradient M=128", |b| {
        b.iter(|| ops::matmul(1.0, (&dy, true), (&x, false), 1.0, &mut dw).expect("shapes fit"));
    });
    group.finish();
}

fn attention(c: &mut Criterion) {
    let (heads, d, s) = (8, 128, 512);
    let spans = Tensor::from_slice(&[0, (s / 4) as i32], [1, 2]);
    let mut qkv = random(1, [s, heads * 3 * d]);
    let (mut context, mut lse) = (zeros([s, heads * d]), zeros([s * heads]));
    let (d_context, mut dqkv) = (random(2, [s, heads * d]), zeros([s, heads * 3 * d]));
    let tables = rope_tables(Compute::cpu(F32), d, s + 1).expect("host memory");
    let positions: Vec<i32> = (0..s as i32).flat_map(|t| [t, 0]).collect();
    let positions = Tensor::from_slice(&positions, [s, 2]);
    let mut group = c.benchmark_group("attention S=512");
    group.throughput(Throughput::Elements((2 * heads * s * s * d) as u64));
    group.bench_function("forward", |b| {
        b.iter(|| ops::attention(&qkv, &spans, None, heads, &mut context, &mut lse).expect("shapes fit"));
    });
    group.bench_function("backward", |b| {
        b.iter(|| {
            ops::attention_backward(&d_context, &qkv, &context, &lse, &spans, None, heads, &mut dqkv)
                .expect("shapes fit");
        });
    });
    group.throughput(Throughput::Bytes(qkv.bytes().len() as u64));
    group.bench_function("rope", |b| {
        b.iter(|| ops::rope(&mut qkv, &positions, &tables, heads, false).expect("shapes fit"));
    });
    group.finish();
}

fn pointwise(c: &mut Criterion) {
    let (m, n) = (512, 1024);
    let (x, w, bias) = (random(1, [m, n]), random(2, [n]), random(3, [n]));
    let (mut y, mut stats) = (zeros([m, n]), zeros([m, 2]));
    let mut group = c.benchmark_group("pointwise");
    group.throughput(Throughput::Bytes(2 * x.bytes().len() as u64));
    group.bench_function("copy", |b| b.iter(|| y.bytes_mut().copy_from_slice(x.bytes())));
    group.bench_function("layer_norm", |b| {
        b.iter(|| ops::layer_norm(&x, &w, &bias, 1e-5, &mut y, &mut stats).expect("shapes fit"));
    });
    group.bench_function("layer_norm_backward_input", |b| {
        b.iter(|| ops::layer_norm_backward_input(&x, &x, &w, &stats, &mut y).expect("shapes fit"));
    });
    group.bench_function("gelu", |b| b.iter(|| ops::gelu(&x, &mut y).expect("shapes fit")));
    group.bench_function("gelu_backward", |b| {
        b.iter(|| {
            y.bytes_mut().copy_from_slice(x.bytes());
            ops::gelu_backward(&x, &mut y).expect("shapes fit");
        })
    });
    group.bench_function("dropout", |b| {
        b.iter(|| ops::dropout(&x, 0.1, Stream::new(1, 2), &mut y).expect("shapes fit"));
    });
    group.finish();

    let n = 1 << 22;
    let (from, mut to) = (random(1, [8 * n]), zeros([8 * n]));
    let mut group = c.benchmark_group("memory");
    group.sample_size(20);
    group.throughput(Throughput::Bytes(from.bytes().len() as u64));
    group.bench_function("read", |b| b.iter(|| ops::sum_of_squares(&from).expect("f32")));
    group.throughput(Throughput::Bytes(2 * from.bytes().len() as u64));
    group.bench_function("copy", |b| {
        b.iter(|| to.bytes_mut().copy_from_slice(from.bytes()))
    });
    let (mut p, g, mut m, mut v) = (random(1, [n]), random(2, [n]), zeros([n]), zeros([n]));
    let factors = ops::AdamW {
        clip: 1.0,
        one_minus_beta1: 0.1,
        beta2: 0.999,
        one_minus_beta2: 0.001,
        sqrt_correction2: 0.5,
        epsilon: 1e-8,
    };
    group.throughput(Throughput::Bytes(28 * n as u64));
    group.bench_function("adamw", |b| {
        b.iter(|| {
            let slot = ops::AdamwSlot {
                m: &mut m,
                v: &mut v,
                spans: vec![ops::Span::whole(&mut p, &g, 1e-5, 1.0)],
            };
            ops::adamw(&mut [slot], &factors).expect("shapes fit");
        });
    });
    group.finish();
}

fn head(c: &mut Criterion) {
    let (rows, v, k) = (64, 32_768, 1024);
    let targets: Vec<i32> = (0..rows as i32).map(|i| i * 500).collect();
    let targets = Tensor::from_slice(&targets, [rows]);
    let (x, w) = (random(1, [rows, k]), random(2, [v, k]).to_dtype(DType::F16));
    let mut scratch = ops::HeadScratch::of_logits(zeros([rows * v]));
    let (mut statistics, mut dx) = (zeros([rows, ops::STATISTICS]), zeros([rows, k]));
    let mut group = c.benchmark_group("head f16");
    group.sample_size(20);
    group.throughput(Throughput::Elements((rows * v * k) as u64));
    let weight = WeightRef::Dense(&w);
    group.bench_function("head_loss", |b| {
        b.iter(|| ops::head_loss(&x, weight, &targets, &mut scratch, &mut statistics).expect("shapes fit"));
    });
    group.bench_function("head_loss_backward", |b| {
        b.iter(|| {
            let buffers = (&mut scratch, &statistics);
            ops::head_loss_backward(&x, weight, &targets, 1.0, buffers, &mut dx, None).expect("shapes fit");
        });
    });
    group.finish();
}

fn quantise(c: &mut Criterion) {
    let w = random(1, [4096, 1024]).to_dtype(DType::F16);
    let mut group = c.benchmark_group("quantize");
    group.throughput(Throughput::Bytes(w.bytes().len() as u64));
    for (name, quant_type) in [("nf4", QuantType::Nf4), ("fp4", QuantType::Fp4)] {
        group.bench_function(name, |b| {
            b.iter(|| QuantTensor::quantize(&w, quant_type, true).expect("finite"))
        });
    }
    group.finish();
}

criterion_group!(benches, products, attention, pointwise, head, quantise);
criterion_main!(benches);
