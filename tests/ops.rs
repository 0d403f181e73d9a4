//! Is every operation its definition, on every device and in every type?
//!
//! Each case runs an operation in f64, which is compared with the formula written out naively, and in f32, which is
//! compared with f64. Outputs start as NaN (what is not written shows) and end in guard elements (what is written too far
//! shows); each case runs twice and on one and on several threads, with equal bits.

#[path = "common/mod.rs"]
mod common;

use common::assert_close;
use glmtune::data::batch::Span;
use glmtune::model::glm::rope_tables;
use glmtune::ops::{self, Adapter, Prefix, PrefixGradients, WeightRef};
use glmtune::quant::{QuantTensor, QuantType, RowInt8};
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Device, Shape, Tensor};

const GUARDS: usize = 16;

/// Random numbers that f32 holds exactly.
fn span_tensor(spans: &[Span]) -> Tensor {
    let pairs = spans.iter().flat_map(|s| [s.start as i32, s.context as i32]);
    Tensor::from_slice(&pairs.collect::<Vec<_>>(), [spans.len(), 2])
}

fn random(seed: u64, shape: impl Into<Shape>, dtype: DType) -> Tensor {
    let shape = shape.into();
    let stream = Stream::new(seed, 7);
    let values: Vec<f32> = (0..shape.elements() as u64).map(|i| stream.normal(i)).collect();
    Tensor::from_slice(&values, shape).to_dtype(dtype)
}

/// An output full of NaN with guard elements behind its end.
fn output(dtype: DType, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let mut tensor = Tensor::from_slice(
        &vec![f64::NAN; shape.elements() + GUARDS],
        [shape.elements() + GUARDS],
    )
    .to_dtype(dtype);
    tensor.resize(shape).unwrap();
    tensor
}

#[track_caller]
fn check_guards(what: &str, tensor: &Tensor) {
    let mut whole = tensor.clone();
    if whole.resize([tensor.elements() + GUARDS]).is_ok() {
        let guards = whole.to_f64_vec().split_off(tensor.elements());
        assert!(
            guards.iter().all(|g| g.is_nan()),
            "{what}: wrote behind its output"
        );
    }
}

/// Runs `op` in both types and on several thread counts; compares f64 with `naive` and f32 with f64.
#[track_caller]
fn check(what: &str, depth: usize, naive: Option<&[f64]>, op: impl Fn(DType) -> Tensor + Sync) {
    let exact = op(DType::F64);
    check_guards(what, &exact);
    let exact = exact.to_f64_vec();
    if let Some(naive) = naive {
        assert_close(
            &format!("{what} (f64)"),
            &exact,
            naive,
            1e-11 * (depth as f64).sqrt().max(1.0),
            1e-11,
        );
    }
    let single = op(DType::F32);
    check_guards(what, &single);
    let atol = 4e-7 * (depth as f64).sqrt().max(1.0) * exact.iter().map(|x| x.abs()).fold(1.0, f64::max);
    assert_close(&format!("{what} (f32)"), &single.to_f64_vec(), &exact, atol, 2e-6);
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let again = pool.install(|| op(DType::F32));
        assert_eq!(
            again.bytes(),
            single.bytes(),
            "{what}: bits depend on {threads} threads, or on the run"
        );
    }
}

/// `[M, N]` sizes around the tiles of the CPU (strips of 64, few-row products of 4).
const SIZES: [(usize, usize, usize); 8] = [
    (1, 1, 2),
    (2, 3, 6),
    (4, 63, 64),
    (5, 64, 128),
    (3, 65, 66),
    (33, 130, 96),
    (70, 64, 256),
    (16, 192, 1088),
];

fn product(x: &[f64], w: &[f64], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
    (0..m * n)
        .map(|i| (0..k).map(|l| x[i / n * k + l] * w[i % n * k + l]).sum())
        .collect()
}

#[test]
fn linear() {
    for (m, n, k) in SIZES {
        let inputs = |d| {
            (
                random(1, [m, k], d),
                random(2, [n, k], d),
                random(3, [n], d),
                random(4, [m, n], d),
            )
        };
        let (x, w, b, r) = inputs(DType::F64);
        let (b, r) = (b.to_f64_vec(), r.to_f64_vec());
        let naive: Vec<f64> = product(&x.to_f64_vec(), &w.to_f64_vec(), (m, n, k))
            .iter()
            .enumerate()
            .map(|(i, p)| p + b[i % n] + 2.5 * r[i])
            .collect();
        check(&format!("linear {m} {n} {k}"), k, Some(&naive), |d| {
            let (x, w, b, r) = inputs(d);
            let mut y = output(d, [m, n]);
            ops::linear(&x, WeightRef::Dense(&w), Some(&b), Some((2.5, &r)), &mut y).unwrap();
            y
        });
    }
}

/// A weight in every stored form, and what it holds in f64.
fn stored(n: usize, k: usize) -> Vec<(&'static str, Stored, Vec<f64>)> {
    let w = random(2, [n, k], DType::F32);
    let half = w.to_dtype(DType::F16);
    let brain = w.to_dtype(DType::BF16);
    let mut out = vec![
        ("f16", Stored::Dense(half.clone()), half.to_f64_vec()),
        ("bf16", Stored::Dense(brain.clone()), brain.to_f64_vec()),
    ];
    for (name, quant_type, double) in [
        ("nf4", QuantType::Nf4, true),
        ("nf4 flat", QuantType::Nf4, false),
        ("fp4", QuantType::Fp4, true),
    ] {
        let q = QuantTensor::quantize(&w, quant_type, double).unwrap();
        let values = q.dequantize().to_f64_vec();
        out.push((name, Stored::Quant(Box::new(q)), values));
    }
    let q = RowInt8::quantize("w", &w).unwrap();
    let values = q.dequantize().to_f64_vec();
    out.push(("int8", Stored::Int8(q), values));
    if k > 0 && k.is_multiple_of(64) {
        let q = QuantTensor::quantize(&w, QuantType::Int4, false).unwrap();
        let values = q.dequantize().to_f64_vec();
        out.push(("int4", Stored::Quant(Box::new(q)), values));
    }
    out
}

enum Stored {
    Dense(Tensor),
    Quant(Box<QuantTensor>),
    Int8(RowInt8),
}

impl Stored {
    fn as_ref(&self) -> WeightRef<'_> {
        match self {
            Stored::Dense(w) => WeightRef::Dense(w),
            Stored::Quant(q) => WeightRef::Quant(q),
            Stored::Int8(q) => WeightRef::Int8(q),
        }
    }
}

#[test]
fn linear_decodes_every_stored_form_inside_the_product() {
    for (m, n, k) in SIZES {
        for (form, w, values) in stored(n, k) {
            let x = random(1, [m, k], DType::F64).to_f64_vec();
            let naive = product(&x, &values, (m, n, k));
            check(&format!("linear {form} {m} {n} {k}"), k, Some(&naive), |d| {
                let mut y = output(d, [m, n]);
                ops::linear(&random(1, [m, k], d), w.as_ref(), None, None, &mut y).unwrap();
                y
            });
            let dy = random(5, [m, n], DType::F64).to_f64_vec();
            let naive: Vec<f64> = (0..m * k)
                .map(|i| (0..n).map(|j| dy[i / k * n + j] * values[j * k + i % k]).sum())
                .collect();
            check(
                &format!("linear_backward_input {form} {m} {n} {k}"),
                n,
                Some(&naive),
                |d| {
                    let mut dx = output(d, [m, k]);
                    ops::linear_backward_input(&random(5, [m, n], d), w.as_ref(), None, &mut dx).unwrap();
                    dx
                },
            );
        }
    }
}

#[test]
fn linear_backward_input() {
    for (m, n, k) in SIZES {
        let inputs = |d| (random(1, [m, n], d), random(2, [n, k], d), random(3, [m, k], d));
        let (dy, w, r) = inputs(DType::F64);
        let (dy, w, r) = (dy.to_f64_vec(), w.to_f64_vec(), r.to_f64_vec());
        let naive: Vec<f64> = (0..m * k)
            .map(|i| (0..n).map(|j| dy[i / k * n + j] * w[j * k + i % k]).sum::<f64>() - 0.5 * r[i])
            .collect();
        check(
            &format!("linear_backward_input {m} {n} {k}"),
            n,
            Some(&naive),
            |d| {
                let (dy, w, r) = inputs(d);
                let mut dx = output(d, [m, k]);
                ops::linear_backward_input(&dy, WeightRef::Dense(&w), Some((-0.5, &r)), &mut dx).unwrap();
                dx
            },
        );
    }
}

#[test]
fn matmul() {
    for (m, n, k) in SIZES {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let inputs = |d| {
                let a = random(1, if ta { [k, m] } else { [m, k] }, d);
                (
                    a,
                    random(2, if tb { [n, k] } else { [k, n] }, d),
                    random(3, [m, n], d),
                )
            };
            let (a, b, c) = inputs(DType::F64);
            let (a, b, c) = (a.to_f64_vec(), b.to_f64_vec(), c.to_f64_vec());
            let at = |i: usize, l: usize| if ta { a[l * m + i] } else { a[i * k + l] };
            let bt = |l: usize, j: usize| if tb { b[j * k + l] } else { b[l * n + j] };
            let naive: Vec<f64> = (0..m * n)
                .map(|i| 1.5 * (0..k).map(|l| at(i / n, l) * bt(l, i % n)).sum::<f64>() + 2.0 * c[i])
                .collect();
            check(&format!("matmul {m} {n} {k} {ta} {tb}"), k, Some(&naive), |d| {
                let (a, b, mut c) = inputs(d);
                ops::matmul(1.5, (&a, ta), (&b, tb), 2.0, &mut c).unwrap();
                c
            });
        }
        // beta = 0 does not read what was there.
        check(&format!("matmul {m} {n} {k} into NaN"), k, None, |d| {
            let mut c = output(d, [m, n]);
            ops::matmul(
                1.0,
                (&random(1, [m, k], d), false),
                (&random(2, [n, k], d), true),
                0.0,
                &mut c,
            )
            .unwrap();
            c
        });
    }
}

#[test]
fn accumulate_column_sums() {
    for (m, n, _) in SIZES {
        let (dy, b) = (
            random(1, [m, n], DType::F64).to_f64_vec(),
            random(2, [n], DType::F64).to_f64_vec(),
        );
        let naive: Vec<f64> = (0..n)
            .map(|j| b[j] + (0..m).map(|i| dy[i * n + j]).sum::<f64>())
            .collect();
        check("accumulate_column_sums", m, Some(&naive), |d| {
            let mut db = random(2, [n], d);
            ops::accumulate_column_sums(&random(1, [m, n], d), &mut db).unwrap();
            db
        });
    }
}

/// Mean and reciprocal standard deviation of each row.
fn norm_stats(x: &[f64], n: usize) -> Vec<[f64; 2]> {
    x.chunks(n)
        .map(|row| {
            let mean = row.iter().sum::<f64>() / n as f64;
            let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / n as f64;
            [mean, 1.0 / (variance + 1e-5).sqrt()]
        })
        .collect()
}

#[test]
fn layer_norm() {
    for (m, _, n) in SIZES {
        let inputs = |d| (random(1, [m, n], d), random(2, [n], d), random(3, [n], d));
        let (x, w, b) = inputs(DType::F64);
        let (x, w, b) = (x.to_f64_vec(), w.to_f64_vec(), b.to_f64_vec());
        let stats = norm_stats(&x, n);
        let y = |i: usize| (x[i] - stats[i / n][0]) * stats[i / n][1];
        let naive: Vec<f64> = (0..m * n).map(|i| y(i) * w[i % n] + b[i % n]).collect();
        let run = |d| {
            let (x, w, b) = inputs(d);
            let (mut y, mut stats) = (output(d, [m, n]), output(d, [m, 2]));
            ops::layer_norm(&x, &w, &b, 1e-5, &mut y, &mut stats).unwrap();
            (y, stats)
        };
        check("layer_norm", n, Some(&naive), |d| run(d).0);
        check("layer_norm statistics", n, Some(&stats.concat()), |d| run(d).1);
        check("layer_norm_backward_input", n, None, |d| {
            let (x, w, _) = inputs(d);
            let mut dx = output(d, [m, n]);
            ops::layer_norm_backward_input(&random(4, [m, n], d), &x, &w, &run(d).1, &mut dx).unwrap();
            dx
        });
        let dy = random(4, [m, n], DType::F64).to_f64_vec();
        let sum = |j: usize, f: &dyn Fn(usize) -> f64| (0..m).map(|i| f(i * n + j)).sum::<f64>();
        let dw: Vec<f64> = (0..n).map(|j| sum(j, &|i| dy[i] * y(i)) + w[j]).collect();
        let db: Vec<f64> = (0..n).map(|j| sum(j, &|i| dy[i]) + b[j]).collect();
        for (part, naive) in [dw, db].iter().enumerate() {
            check("layer_norm_backward_parameters", m, Some(naive), |d| {
                let (x, mut dw, mut db) = inputs(d);
                ops::layer_norm_backward_parameters(&random(4, [m, n], d), &x, &run(d).1, &mut dw, &mut db)
                    .unwrap();
                if part == 0 { dw } else { db }
            });
        }
    }
}

#[test]
fn rope() {
    for (m, heads, d_head) in [(1, 1, 4), (3, 2, 8), (17, 4, 64)] {
        let positions: Vec<i32> = (0..2 * m as i32).map(|i| i * 7 % 19).collect();
        let positions = Tensor::from_slice(&positions, [m, 2]);
        let width = heads * 3 * d_head;
        let (half, quarter) = (d_head / 2, d_head / 4);
        let x = random(1, [m, width], DType::F64).to_f64_vec();
        let tables = rope_tables(Compute::cpu(DType::F64), d_head, 20)
            .unwrap()
            .to_f64_vec();
        let mut naive = x.clone();
        for (i, naive) in naive.iter_mut().enumerate() {
            let (row, e, part) = (i / width, i % d_head, i % (3 * d_head) / d_head);
            if part == 2 {
                continue;
            }
            let axis = e / half;
            let position = positions.as_slice::<i32>()[2 * row + axis] as usize;
            let f = e % half % quarter;
            let (cos, sin) = (tables[position * half + f], tables[position * half + quarter + f]);
            let other = if e % half < quarter {
                -x[i + quarter]
            } else {
                x[i - quarter]
            };
            *naive = x[i] * cos + other * sin;
        }
        let run = |d, inverse, x: &Tensor| {
            let mut qkv = x.clone();
            ops::rope(
                &mut qkv,
                &positions,
                &rope_tables(Compute::cpu(d), d_head, 20).unwrap(),
                heads,
                inverse,
            )
            .unwrap();
            qkv
        };
        check("rope", 4, Some(&naive), |d| {
            run(d, false, &random(1, [m, width], d))
        });
        check("rope there and back", 4, None, |d| {
            run(d, true, &run(d, false, &random(1, [m, width], d)))
        });
    }
}

/// `(S, spans)`: no padding, padding, an all-padding sequence, and lengths around the query block of 64.
fn attention_cases() -> Vec<(usize, Vec<Span>)> {
    vec![
        (1, vec![Span { start: 0, context: 1 }]),
        (
            6,
            vec![
                Span { start: 0, context: 3 },
                Span { start: 2, context: 4 },
                Span { start: 6, context: 6 },
            ],
        ),
        (
            63,
            vec![Span {
                start: 0,
                context: 63,
            }],
        ),
        (
            64,
            vec![
                Span {
                    start: 5,
                    context: 20,
                },
                Span { start: 0, context: 0 },
            ],
        ),
        (
            65,
            vec![Span {
                start: 0,
                context: 64,
            }],
        ),
        (
            150,
            vec![Span {
                start: 70,
                context: 80,
            }],
        ),
    ]
}

/// A prefix of `length` keys (0 for none), the same for all sequences or one for `each` of so many.
#[derive(Clone, Copy)]
struct PrefixCase {
    length: usize,
    each: Option<usize>,
}

/// No prefix, one for all, one for each of `size` sequences.
fn prefix_cases(size: usize) -> [PrefixCase; 3] {
    [(0, None), (5, None), (5, Some(size))].map(|(length, each)| PrefixCase { length, each })
}

impl PrefixCase {
    /// Keys and values `[heads, P, d]` or `[B, heads, P, d]`.
    fn keys_and_values(self, heads: usize, d_head: usize, d: DType) -> [Tensor; 2] {
        let length = self.length.max(1);
        [7, 8].map(|seed| match self.each {
            None => random(seed, [heads, length, d_head], d),
            Some(size) => random(seed, [size, heads, length, d_head], d),
        })
    }
}

/// As `Prefix`; what is blocked gets a score that every unblocked one exceeds, as the official -10000.
fn naive_attention(
    qkv: &[f64],
    s: usize,
    spans: &[Span],
    heads: usize,
    d: usize,
    case: PrefixCase,
) -> Vec<f64> {
    let width = heads * 3 * d;
    let prefix = case.length;
    let [prefix_keys, prefix_values] = case
        .keys_and_values(heads, d, DType::F64)
        .map(|tensor| tensor.to_f64_vec());
    let mut out = vec![0.0; spans.len() * s * heads * d];
    for (b, span) in spans.iter().enumerate() {
        for h in 0..heads {
            let at = |part: usize, t: usize| &qkv[(b * s + t) * width + (3 * h + part) * d..][..d];
            let own = if case.each.is_some() { b } else { 0 };
            let of_prefix = |x: &[f64], j: usize| x[((own * heads + h) * prefix + j) * d..][..d].to_vec();
            let keys: Vec<Vec<f64>> = (0..prefix)
                .map(|j| of_prefix(&prefix_keys, j))
                .chain((0..s).map(|j| at(1, j).to_vec()))
                .collect();
            let values: Vec<Vec<f64>> = (0..prefix)
                .map(|j| of_prefix(&prefix_values, j))
                .chain((0..s).map(|j| at(2, j).to_vec()))
                .collect();
            for i in 0..s {
                let visible = |j: usize| i >= span.start && j >= span.start && (j < span.context || j <= i);
                let scores: Vec<f64> = keys
                    .iter()
                    .enumerate()
                    .map(|(j, key)| {
                        let dot: f64 = at(0, i).iter().zip(key).map(|(q, k)| q * k).sum();
                        if j < prefix || visible(j - prefix) {
                            dot / (d as f64).sqrt()
                        } else {
                            -1e9
                        }
                    })
                    .collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|x| (x - top).exp()).sum();
                for (value, score) in values.iter().zip(&scores) {
                    let p = (score - top).exp() / total;
                    for (e, v) in value.iter().enumerate() {
                        out[((b * s + i) * heads + h) * d + e] += p * v;
                    }
                }
            }
        }
    }
    out
}

#[test]
fn attention() {
    let (heads, d_head) = (2, 8);
    for ((s, spans), case) in attention_cases()
        .into_iter()
        .flat_map(|case| prefix_cases(case.1.len()).map(|prefix| (case.clone(), prefix)))
    {
        let length = case.length;
        let rows = s * spans.len();
        let naive = naive_attention(
            &random(1, [rows, heads * 3 * d_head], DType::F64).to_f64_vec(),
            s,
            &spans,
            heads,
            d_head,
            case,
        );
        let run = |d| {
            let qkv = random(1, [rows, heads * 3 * d_head], d);
            let [keys, values] = case.keys_and_values(heads, d_head, d);
            let prefix = (length > 0).then_some(Prefix {
                keys: &keys,
                values: &values,
            });
            let (mut context, mut lse) = (output(d, [rows, heads * d_head]), output(d, [rows * heads]));
            ops::attention(&qkv, &span_tensor(&spans), prefix, heads, &mut context, &mut lse).unwrap();
            let mut dqkv = output(d, qkv.shape());
            let dy = random(2, [rows, heads * d_head], d);
            let [mut d_keys, mut d_values] = [9, 10].map(|seed| random(seed, keys.shape(), d));
            let gradients = PrefixGradients {
                keys: &mut d_keys,
                values: &mut d_values,
            };
            ops::attention_backward(
                &dy,
                &qkv,
                &context,
                &lse,
                &span_tensor(&spans),
                prefix.map(|prefix| (prefix, gradients)),
                heads,
                &mut dqkv,
            )
            .unwrap();
            [context, dqkv, d_keys, d_values]
        };
        check(&format!("attention {s}"), s, Some(&naive), |d| run(d)[0].clone());
        for (i, what) in ["dqkv", "d_prefix_keys", "d_prefix_values"]
            .into_iter()
            .enumerate()
        {
            check(
                &format!(
                    "attention_backward {s} prefix {length} of {:?}: {what}",
                    case.each
                ),
                s,
                None,
                |d| {
                    let [_, gradients @ ..] = run(d);
                    gradients[i].clone()
                },
            );
        }
    }
}

/// Prompt first, then token by token: the same rows as all at once, where the queries are causal.
#[test]
fn attention_cached() {
    let (heads, d_head, s, prompt) = (2, 8, 12, 7);
    let spans = [Span { start: 0, context: 6 }, Span { start: 3, context: 7 }];
    let hidden = heads * d_head;
    let whole = random(1, [2 * s, 3 * hidden], DType::F64).to_f64_vec();
    // A padding query without a prefix attends uniformly to all keys there are: those of the prompt.
    let prompts: Vec<f64> = whole
        .chunks(s * 3 * hidden)
        .flat_map(|sequence| &sequence[..prompt * 3 * hidden])
        .copied()
        .collect();
    for case in prefix_cases(spans.len()) {
        let length = case.length;
        let mut naive = naive_attention(&whole, s, &spans, heads, d_head, case);
        let first = naive_attention(&prompts, prompt, &spans, heads, d_head, case);
        for (b, span) in spans.iter().enumerate() {
            let padding = span.start * hidden;
            naive[b * s * hidden..][..padding].copy_from_slice(&first[b * prompt * hidden..][..padding]);
        }
        check("attention_cached", s, Some(&naive), |d| {
            let whole = random(1, [2 * s, 3 * hidden], d);
            let [prefix_keys, prefix_values] = case.keys_and_values(heads, d_head, d);
            let prefix = (length > 0).then_some(Prefix {
                keys: &prefix_keys,
                values: &prefix_values,
            });
            let (mut keys, mut values) = (output(d, [2, s, hidden]), output(d, [2, s, hidden]));
            let mut out = output(d, [2 * s, hidden]);
            let steps = std::iter::once((0, prompt)).chain((prompt..s).map(|t| (t, 1)));
            for (past, count) in steps {
                let rows: Vec<i32> = (0..2)
                    .flat_map(|b| (past..past + count).map(move |t| (b * s + t) as i32))
                    .collect();
                let rows = Tensor::from_slice(&rows, [rows.len()]);
                let mut qkv = output(d, [2 * count, 3 * hidden]);
                ops::gather_rows(&whole, &rows, &mut qkv).unwrap();
                let (mut context, mut lse) = (output(d, [2 * count, hidden]), output(d, [2 * count * heads]));
                ops::attention_cached(
                    &qkv,
                    (&mut keys, &mut values),
                    past,
                    &span_tensor(&spans),
                    prefix,
                    heads,
                    &mut context,
                    &mut lse,
                )
                .unwrap();
                for (i, row) in rows.as_slice::<i32>().iter().enumerate() {
                    let bytes = hidden * d.size();
                    let (to, from) = (*row as usize * bytes, i * bytes);
                    out.bytes_mut()[to..to + bytes].copy_from_slice(&context.bytes()[from..from + bytes]);
                }
            }
            out
        });
    }
}

#[test]
fn gelu() {
    for n in [1, 15, 1023, 1024, 1025, 70_000] {
        let x = random(1, [n], DType::F64).to_f64_vec();
        let u = |x: f64| (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
        let naive: Vec<f64> = x.iter().map(|&x| 0.5 * x * (1.0 + u(x).tanh())).collect();
        check("gelu", 1, Some(&naive), |d| {
            let mut y = output(d, [n]);
            ops::gelu(&random(1, [n], d), &mut y).unwrap();
            y
        });
        check("gelu_backward", 1, None, |d| {
            let mut dy = random(2, [n], d);
            ops::gelu_backward(&random(1, [n], d), &mut dy).unwrap();
            dy
        });
    }
}

#[test]
fn dropout() {
    for n in [1, 7, 1024, 70_001] {
        let (p, stream) = (0.25f32, Stream::new(3, 4));
        let x = random(1, [n], DType::F64).to_f64_vec();
        let kept = |i: usize| {
            if stream.uniform(i as u64) >= p {
                x[i] / 0.75
            } else {
                0.0
            }
        };
        let naive: Vec<f64> = (0..n).map(kept).collect();
        check("dropout", 1, Some(&naive), |d| {
            let mut y = output(d, [n]);
            ops::dropout(&random(1, [n], d), p, stream, &mut y).unwrap();
            y
        });
        let y = random(2, [n], DType::F64).to_f64_vec();
        let naive: Vec<f64> = (0..n).map(|i| y[i] + kept(i)).collect();
        check("accumulate_dropout", 1, Some(&naive), |d| {
            let mut y = random(2, [n], d);
            ops::accumulate_dropout(&random(1, [n], d), p, stream, &mut y).unwrap();
            y
        });
    }
}

#[test]
fn prefix_heads_and_their_gradient() {
    let (size, heads, length, d_head, count, index) = (3, 2, 5, 6, 4, 2);
    let width = heads * d_head;
    let columns = count * width;
    let (p, stream) = (0.25f32, Stream::new(3, 4));
    for dropout in [None, Some((p, stream))] {
        let factor = |i: usize| match dropout {
            None => 1.0,
            Some(_) if stream.uniform(i as u64) >= p => 1.0 / 0.75,
            Some(_) => 0.0,
        };
        let table = random(1, [length, columns], DType::F64).to_f64_vec();
        let dy = random(2, [size, heads, length, d_head], DType::F64).to_f64_vec();
        let mut want = vec![0.0; dy.len()];
        let mut gradient = random(3, [length, columns], DType::F64).to_f64_vec();
        for (i, want) in want.iter_mut().enumerate() {
            let (c, position) = (i % d_head, i / d_head % length);
            let (h, b) = (i / d_head / length % heads, i / d_head / length / heads);
            let column = index * width + h * d_head + c;
            let factor = factor((b * length + position) * columns + column);
            *want = factor * table[position * columns + column];
            gradient[position * columns + column] += factor * dy[i];
        }
        check("prefix_heads", size * length, Some(&want), |d| {
            let mut y = output(d, [size, heads, length, d_head]);
            ops::prefix_heads(&random(1, [length, columns], d), index, dropout, &mut y).unwrap();
            y
        });
        check("prefix_heads_backward", length, Some(&gradient), |d| {
            let mut d_table = random(3, [length, columns], d);
            let dy = random(2, [size, heads, length, d_head], d);
            ops::prefix_heads_backward(&dy, index, dropout, &mut d_table).unwrap();
            d_table
        });
    }
    // A prefix of all sequences is the first sequence's.
    let table = random(1, [length, columns], DType::F32);
    let (mut of_all, mut of_each) = (
        output(DType::F32, [heads, length, d_head]),
        output(DType::F32, [1, heads, length, d_head]),
    );
    ops::prefix_heads(&table, index, None, &mut of_all).unwrap();
    ops::prefix_heads(&table, index, None, &mut of_each).unwrap();
    assert_eq!(of_all.bytes(), of_each.bytes());
    for (index, shape) in [(4, [heads, length, d_head]), (0, [heads, length + 1, d_head])] {
        let refused = ops::prefix_heads(&table, index, None, &mut output(DType::F32, shape));
        assert!(refused.unwrap_err().to_string().contains("prefix_heads"));
    }
}

#[test]
fn tanh() {
    for n in [1, 7, 70_001] {
        let x = random(1, [n], DType::F64).to_f64_vec();
        let naive: Vec<f64> = x.iter().map(|x| x.tanh()).collect();
        check("tanh", 1, Some(&naive), |d| {
            let mut y = output(d, [n]);
            ops::tanh(&random(1, [n], d), &mut y).unwrap();
            y
        });
        let dy = random(2, [n], DType::F64).to_f64_vec();
        let naive: Vec<f64> = x.iter().zip(&dy).map(|(y, dy)| dy * (1.0 - y * y)).collect();
        check("tanh_backward", 1, Some(&naive), |d| {
            let mut dy = random(2, [n], d);
            ops::tanh_backward(&random(1, [n], d), &mut dy).unwrap();
            dy
        });
    }
}

#[test]
fn embedding_and_its_gradient() {
    let (v, n) = (11, 66);
    let ids = [3i32, 0, 10, 3, 3, 7];
    let ids = Tensor::from_slice(&ids, [6]);
    for (form, w, values) in stored(v, n) {
        let Stored::Dense(w) = w else { continue };
        let naive: Vec<f64> = ids
            .as_slice::<i32>()
            .iter()
            .flat_map(|&i| values[i as usize * n..][..n].to_vec())
            .collect();
        check(&format!("embedding {form}"), 1, Some(&naive), |d| {
            let mut y = output(d, [6, n]);
            ops::embedding(&w, &ids, &mut y).unwrap();
            y
        });
    }
    let dy = random(4, [6, n], DType::F64).to_f64_vec();
    let mut naive = random(5, [v, n], DType::F64).to_f64_vec();
    for (i, &id) in ids.as_slice::<i32>().iter().enumerate() {
        for j in 0..n {
            naive[id as usize * n + j] += dy[i * n + j];
        }
    }
    check("embedding_backward", 3, Some(&naive), |d| {
        let mut dw = random(5, [v, n], d);
        ops::embedding_backward(&random(4, [6, n], d), &ids, &mut dw).unwrap();
        dw
    });
}

#[test]
fn rows_by_number() {
    let rows = Tensor::from_slice(&[4i32, 0, 2], [3]);
    let x = random(1, [5, 7], DType::F64).to_f64_vec();
    let naive: Vec<f64> = [4, 0, 2].iter().flat_map(|&r| x[r * 7..][..7].to_vec()).collect();
    check("gather_rows", 1, Some(&naive), |d| {
        let mut y = output(d, [3, 7]);
        ops::gather_rows(&random(1, [5, 7], d), &rows, &mut y).unwrap();
        y
    });
    let x = random(2, [3, 7], DType::F64).to_f64_vec();
    let mut naive = vec![0.0; 35];
    for (i, r) in [4, 0, 2].into_iter().enumerate() {
        naive[r * 7..][..7].copy_from_slice(&x[i * 7..][..7]);
    }
    check("scatter_rows", 1, Some(&naive), |d| {
        let mut y = output(d, [5, 7]);
        ops::scatter_rows(&random(2, [3, 7], d), &rows, &mut y).unwrap();
        y
    });
}

#[test]
fn head_loss() {
    for (rows, v, k, capacity) in [
        (1, 5, 4, 5),
        (3, 130, 64, 390),
        (3, 130, 64, 3 * 40),
        (5, 1000, 66, 5),
    ] {
        let targets: Vec<i32> = (0..rows as i32).map(|i| i * 37 % v as i32).collect();
        let targets = Tensor::from_slice(&targets, [rows]);
        let inputs = |d| (random(1, [rows, k], d), random(2, [v, k], d));
        let (x, w) = inputs(DType::F64);
        let logits = product(&x.to_f64_vec(), &w.to_f64_vec(), (rows, v, k));
        let (mut loss, mut dlogits) = (0.0, logits.clone());
        for (r, row) in dlogits.chunks_mut(v).enumerate() {
            let top = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = row.iter().map(|z| (z - top).exp()).sum();
            let target = targets.as_slice::<i32>()[r] as usize;
            loss += top + total.ln() - row[target];
            for z in row.iter_mut() {
                *z = 0.5 * (*z - top).exp() / total;
            }
            row[target] -= 0.5;
        }
        let run = |d| {
            let (x, w) = inputs(d);
            let mut scratch = ops::HeadScratch::of_logits(output(d, [capacity]));
            let mut statistics = output(d, [rows, ops::STATISTICS]);
            let head = WeightRef::Dense(&w);
            let loss = ops::head_loss(&x, head, &targets, &mut scratch, &mut statistics).unwrap();
            check_guards("head_loss", &statistics);
            (loss, scratch, statistics)
        };
        check("head_loss", k, Some(&[loss]), |d| {
            Tensor::from_slice(&[run(d).0], [1])
        });
        let w = w.to_f64_vec();
        let dx: Vec<f64> = (0..rows * k)
            .map(|i| (0..v).map(|j| dlogits[i / k * v + j] * w[j * k + i % k]).sum())
            .collect();
        let x = x.to_f64_vec();
        let dw: Vec<f64> = (0..v * k)
            .map(|i| (0..rows).map(|r| dlogits[r * v + i / k] * x[r * k + i % k]).sum())
            .collect();
        for (part, naive) in [dx, dw].iter().enumerate() {
            check("head_loss_backward", v, Some(naive), |d| {
                let (x, w) = inputs(d);
                let (_, mut scratch, statistics) = run(d);
                let (mut dx, mut dw) = (output(d, [rows, k]), Tensor::zeros(d, [v, k]));
                let buffers = (&mut scratch, &statistics);
                let head = WeightRef::Dense(&w);
                ops::head_loss_backward(&x, head, &targets, 0.5, buffers, &mut dx, Some(&mut dw)).unwrap();
                if part == 0 { dx } else { dw }
            });
        }
    }
}

const ADAMW: ops::AdamW = ops::AdamW {
    clip: 0.5,
    one_minus_beta1: 0.1,
    beta2: 0.999,
    one_minus_beta2: 0.001,
    sqrt_correction2: 0.7,
    epsilon: 1e-8,
};

/// Around a task and a block of the optimizers' operations.
const PARAMETER_SIZES: [usize; 5] = [1, 7, 257, 40_000, 150_001];

/// A parameter, its gradient and two moments, the second from 0.
fn parameter(n: usize) -> [Tensor; 4] {
    let mut tensors = [1, 2, 3, 4].map(|seed| random(seed, [n], DType::F32));
    for x in tensors[3].as_mut_slice::<f32>() {
        *x = x.abs();
    }
    tensors
}

#[test]
fn adamw_and_sum_of_squares() {
    for n in PARAMETER_SIZES {
        let [p, g, m, v] = parameter(n);
        let (mut p1, mut m1, mut v1) = (p.clone(), m.clone(), v.clone());
        let slot = ops::AdamwSlot {
            m: &mut m1,
            v: &mut v1,
            spans: vec![ops::Span::whole(&mut p1, &g, 0.01, 0.99)],
        };
        ops::adamw(&mut [slot], &ADAMW).unwrap();
        let [p, g, m, v] = [p, g, m, v].map(|t| t.to_f64_vec());
        let mut want = Vec::new();
        for i in 0..n {
            let g = 0.5 * g[i];
            let (m, v) = (m[i] + 0.1 * (g - m[i]), 0.999 * v[i] + 0.001 * g * g);
            want.push(p[i] * 0.99 - 0.01 * m / (v.sqrt() / 0.7 + 1e-8));
        }
        assert_close("adamw", &p1.to_f64_vec(), &want, 1e-6, 1e-5);
        let want: f64 = g.iter().map(|x| x * x).sum();
        let got = ops::sum_of_squares(&parameter(n)[1]).unwrap();
        assert_close("sum_of_squares", &[got], &[want], 0.0, 1e-12);
    }
}

#[test]
fn adamw_8bit() {
    let goldens = include_str!("goldens/optimizers.json");
    let goldens: serde_json::Value = serde_json::from_str(goldens).unwrap();
    let maps: [Vec<f64>; 2] =
        ["signed_map", "unsigned_map"].map(|key| serde_json::from_value(goldens[key].clone()).unwrap());
    for n in PARAMETER_SIZES {
        let [mut p, ..] = parameter(n);
        let blocks = n.div_ceil(ops::BLOCK_8BIT);
        let mut codes = [0, 1].map(|_| Tensor::zeros(DType::U8, [n]));
        let mut absmax = [0, 1].map(|_| Tensor::zeros(DType::F32, [blocks]));
        for seed in 1..4 {
            let g = random(seed, [n], DType::F32);
            let before = [0, 1].map(|k| {
                let of = |(i, &code): (usize, &u8)| {
                    let scale = absmax[k].as_slice::<f32>()[i / ops::BLOCK_8BIT];
                    maps[k][usize::from(code)] * f64::from(scale)
                };
                let codes = codes[k].as_slice::<u8>().iter().enumerate();
                codes.map(of).collect::<Vec<f64>>()
            });
            let mut want = p.to_f64_vec();
            let [m, v] = &mut codes;
            let [m_absmax, v_absmax] = &mut absmax;
            let slot = ops::Adamw8bitSlot {
                m,
                v,
                m_absmax,
                v_absmax,
                spans: vec![ops::Span::whole(&mut p, &g, 0.01, 0.99)],
            };
            ops::adamw_8bit(&mut [slot], &ADAMW).unwrap();
            let [mut m, mut v] = before;
            for (i, g) in g.to_f64_vec().into_iter().enumerate() {
                m[i] += 0.1 * (0.5 * g - m[i]);
                v[i] = 0.999 * v[i] + 0.001 * 0.25 * g * g;
                want[i] = want[i] * 0.99 - 0.01 * m[i] / (v[i].sqrt() / 0.7 + 1e-8);
            }
            assert_close("adamw_8bit", &p.to_f64_vec(), &want, 1e-6, 1e-5);
            for (k, moment) in [m, v].into_iter().enumerate() {
                for (j, block) in moment.chunks(ops::BLOCK_8BIT).enumerate() {
                    let largest = block.iter().fold(0f64, |most, x| most.max(x.abs()));
                    let scale = f64::from(absmax[k].as_slice::<f32>()[j]);
                    assert_close("absmax", &[scale], &[largest], 0.0, 1e-6);
                    let codes = &codes[k].as_slice::<u8>()[j * ops::BLOCK_8BIT..][..block.len()];
                    for (x, &code) in block.iter().zip(codes) {
                        let off = |value: &f64| (value - x / largest).abs();
                        let least = maps[k].iter().map(off).fold(f64::INFINITY, f64::min);
                        // f32 cannot tell between two values that are equally near but for 1e-6.
                        let got = off(&maps[k][usize::from(code)]);
                        assert!(got <= least + 1e-6, "{n}: moment {k}: {x} is code {code}");
                    }
                }
            }
        }
    }
}

#[test]
fn sgd() {
    for n in PARAMETER_SIZES {
        for momentum in [None, Some(0.9)] {
            let [p, g, m, _] = parameter(n);
            let (mut p1, mut m1) = (p.clone(), m.clone());
            let slot = ops::SgdSlot {
                m: momentum.map(|_| &mut m1),
                spans: vec![ops::Span::whole(&mut p1, &g, 0.25, 0.125)],
            };
            let factors = ops::Sgd {
                clip: 0.5,
                momentum: 0.9,
            };
            ops::sgd(&mut [slot], &factors).unwrap();
            let [p, g, m] = [p, g, m].map(|t| t.to_f64_vec());
            let before = momentum.unwrap_or(0.0);
            let update: Vec<f64> = (0..n)
                .map(|i| before * m[i] + 0.5 * g[i] + 0.125 * p[i])
                .collect();
            let want: Vec<f64> = p.iter().zip(&update).map(|(p, u)| p - 0.25 * u).collect();
            assert_close("sgd, p", &p1.to_f64_vec(), &want, 1e-6, 1e-6);
            let want = if momentum.is_some() { update } else { m };
            assert_close("sgd, m", &m1.to_f64_vec(), &want, 1e-6, 1e-6);
        }
    }
}

#[test]
fn lion() {
    for n in PARAMETER_SIZES {
        let [p, g, m, _] = parameter(n);
        let (mut p1, mut m1) = (p.clone(), m.clone());
        let slot = ops::LionSlot {
            m: &mut m1,
            spans: vec![ops::Span::whole(&mut p1, &g, 0.25, 0.99)],
        };
        let factors = ops::Lion {
            clip: 0.5,
            beta1: 0.9,
            one_minus_beta1: 0.1,
            beta2: 0.99,
            one_minus_beta2: 0.01,
        };
        ops::lion(&mut [slot], &factors).unwrap();
        let [p, g, m, p1] = [p, g, m, p1].map(|t| t.to_f64_vec());
        let momentum: Vec<f64> = (0..n).map(|i| 0.99 * m[i] + 0.005 * g[i]).collect();
        assert_close("lion, m", &m1.to_f64_vec(), &momentum, 1e-6, 1e-6);
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for i in 0..n {
            let mean = 0.9 * m[i] + 0.05 * g[i];
            // Rounding may decide the sign of next to nothing.
            if mean.abs() > 1e-6 {
                got.push(p1[i]);
                want.push(0.99 * p[i] - 0.25 * mean.signum());
            }
        }
        assert!(got.len() * 10 >= n * 9);
        assert_close("lion, p", &got, &want, 1e-6, 1e-6);
    }
    // NaN is not taken for a sign.
    let [mut p, mut g, mut m, _] = parameter(1);
    g.write(&[f32::NAN]).unwrap();
    let slot = ops::LionSlot {
        m: &mut m,
        spans: vec![ops::Span::whole(&mut p, &g, 0.25, 1.0)],
    };
    let factors = ops::Lion {
        clip: 1.0,
        beta1: 0.9,
        one_minus_beta1: 0.1,
        beta2: 0.99,
        one_minus_beta2: 0.01,
    };
    ops::lion(&mut [slot], &factors).unwrap();
    assert!(p.as_slice::<f32>()[0].is_nan() && m.as_slice::<f32>()[0].is_nan());
}

#[test]
fn many_parameters_at_once_are_as_one_after_the_other() {
    let sizes = [3, 40_000, 1];
    let mut together = sizes.map(parameter);
    let mut apart = together.clone();
    ops::adamw(&mut slots(&mut together), &ADAMW).unwrap();
    for slot in slots(&mut apart) {
        ops::adamw(&mut [slot], &ADAMW).unwrap();
    }
    for (a, b) in together.iter().zip(&apart) {
        assert!(a.iter().zip(b).all(|(a, b)| a.bytes() == b.bytes()));
    }

    let mut g = together.map(|[_, g, ..]| g);
    let all: Vec<&Tensor> = g.iter().collect();
    let sums = ops::sums_of_squares(&all).unwrap();
    let apart: Vec<f64> = all.iter().map(|g| ops::sum_of_squares(g).unwrap()).collect();
    assert_eq!(sums, apart);
    assert_eq!(
        ops::sum_of_squares_all(&all).unwrap(),
        sums[0] + sums[1] + sums[2]
    );
    assert_eq!(ops::sum_of_squares_all(&[]).unwrap(), 0.0);
    assert!(ops::sums_of_squares(&[]).unwrap().is_empty());

    ops::zero_all(&mut g.iter_mut().collect::<Vec<_>>()).unwrap();
    assert!(g.iter().all(|g| g.bytes().iter().all(|&byte| byte == 0)));
    assert!(ops::adamw(&mut [], &ADAMW).is_ok() && ops::zero_all(&mut []).is_ok());
}

/// A span and what is not of it: `len` elements from `p_at`, `g_at` and `state_at` of tensors that are longer.
#[test]
fn spans_update_their_ranges_and_nothing_else() {
    const BLOCK: usize = ops::BLOCK_8BIT;
    // Where they begin in the parameter, the gradient and the state, and how long they are.
    let ranges = [(0, 512, 256, 300), (777, 0, 768, 1), (300, 300, 1024, 450)];
    let state_len = 1500;
    let whole = |n: usize, seed| random(seed, [n], DType::F32);
    let mut parts = ranges.map(|(_, _, _, len)| parameter(len));
    for (i, part) in parts.iter_mut().enumerate() {
        // Not the same numbers in each.
        part[0] = whole(part[0].elements(), 50 + i as u64);
    }
    // Long tensors with the ranges in them, and what they are when the ranges have been updated apart.
    let embed = |long: &Tensor, at: usize, part: &Tensor| {
        let mut long = long.clone();
        let size = long.dtype().size();
        long.bytes_mut()[at * size..][..part.byte_len()].copy_from_slice(part.bytes());
        long
    };
    let factors = ops::Sgd {
        clip: 0.5,
        momentum: 0.9,
    };
    let lion = ops::Lion {
        clip: 0.5,
        beta1: 0.9,
        one_minus_beta1: 0.1,
        beta2: 0.99,
        one_minus_beta2: 0.01,
    };
    for rule in ["adamw", "adamw_8bit", "sgd", "lion"] {
        let codes = rule == "adamw_8bit";
        let mut state = [40, 41].map(|seed| match codes {
            true => random_codes(seed, state_len),
            false => whole(state_len, seed),
        });
        state[1]
            .bytes_mut()
            .iter_mut()
            .skip(3)
            .step_by(4)
            .for_each(|b| *b &= 0x7f);
        let mut absmax = [42, 43].map(|seed| whole(state_len.div_ceil(BLOCK), seed));
        absmax
            .iter_mut()
            .for_each(|t| t.as_mut_slice::<f32>().iter_mut().for_each(|x| *x = x.abs()));
        let mut p = ranges.map(|(p_at, ..)| whole(1400, p_at as u64));
        let mut g = ranges.map(|(_, g_at, ..)| whole(1400, 7 + g_at as u64));
        let (mut want_p, mut want_state, mut want_absmax) = (p.clone(), state.clone(), absmax.clone());
        for (i, (p_at, g_at, state_at, len)) in ranges.into_iter().enumerate() {
            let [value, gradient, ..] = &parts[i];
            p[i] = embed(&p[i], p_at, value);
            g[i] = embed(&g[i], g_at, gradient);
            let cut = |t: &Tensor, at: usize, len: usize| {
                let size = t.dtype().size();
                let mut out = Tensor::zeros(t.dtype(), [len]);
                out.bytes_mut()
                    .copy_from_slice(&t.bytes()[at * size..][..len * size]);
                out
            };
            let (mut value, blocks) = (value.clone(), len.div_ceil(BLOCK));
            let [mut m, mut v] = [&state[0], &state[1]].map(|t| cut(t, state_at, len));
            let [mut ma, mut va] = [&absmax[0], &absmax[1]].map(|t| cut(t, state_at / BLOCK, blocks));
            update(
                rule,
                (&mut m, &mut v),
                (&mut ma, &mut va),
                &factors,
                &lion,
                || vec![ops::Span::whole(&mut value, gradient, 0.01, 0.9)],
            );
            want_p[i] = embed(&p[i], p_at, &value);
            want_state = [
                embed(&want_state[0], state_at, &m),
                embed(&want_state[1], state_at, &v),
            ];
            let at = state_at / BLOCK;
            want_absmax = [embed(&want_absmax[0], at, &ma), embed(&want_absmax[1], at, &va)];
        }
        let ([m, v], [ma, va]) = (&mut state, &mut absmax);
        update(rule, (m, v), (ma, va), &factors, &lion, || {
            let spans = p.iter_mut().zip(&g).zip(ranges);
            spans
                .map(|((p, g), (p_at, g_at, state_at, len))| ops::Span {
                    p,
                    g,
                    p_at,
                    g_at,
                    state_at,
                    len,
                    rate: 0.01,
                    decay: 0.9,
                })
                .collect()
        });
        let got = p.iter().chain(&state).chain(&absmax);
        let want = want_p.iter().chain(&want_state).chain(&want_absmax);
        for (i, (got, want)) in got.zip(want).enumerate() {
            assert!(got.bytes() == want.bytes(), "{rule}: tensor {i}");
        }
    }
    // A span past an end is refused.
    let [mut p, g, mut m, mut v] = parameter(10);
    for (p_at, g_at, state_at, len) in [(1, 0, 0, 10), (0, 1, 0, 10), (0, 0, 1, 10), (0, 0, 0, usize::MAX)] {
        let span = ops::Span {
            p_at,
            g_at,
            state_at,
            len,
            ..ops::Span::whole(&mut p, &g, 0.1, 1.0)
        };
        let (m, v, spans) = (&mut m, &mut v, vec![span]);
        assert!(ops::adamw(&mut [ops::AdamwSlot { m, v, spans }], &ADAMW).is_err());
    }
}

fn random_codes(seed: u64, n: usize) -> Tensor {
    let stream = Stream::new(seed, 0);
    let codes: Vec<u8> = (0..n as u64).map(|i| stream.below(i, 256) as u8).collect();
    Tensor::from_slice(&codes, [n])
}

/// One update by name.
fn update<'a>(
    rule: &str,
    (m, v): (&mut Tensor, &mut Tensor),
    (m_absmax, v_absmax): (&mut Tensor, &mut Tensor),
    sgd: &ops::Sgd,
    lion: &ops::Lion,
    spans: impl FnOnce() -> Vec<ops::Span<'a>>,
) {
    let spans = spans();
    match rule {
        "adamw" => ops::adamw(&mut [ops::AdamwSlot { m, v, spans }], &ADAMW),
        "adamw_8bit" => {
            let slot = ops::Adamw8bitSlot {
                m,
                v,
                m_absmax,
                v_absmax,
                spans,
            };
            ops::adamw_8bit(&mut [slot], &ADAMW)
        }
        "sgd" => ops::sgd(&mut [ops::SgdSlot { m: Some(m), spans }], sgd),
        _ => ops::lion(&mut [ops::LionSlot { m, spans }], lion),
    }
    .unwrap();
}

#[test]
fn round_into() {
    let from = random(5, [70_000], DType::F32);
    for dtype in [DType::F16, DType::BF16] {
        for (range, at) in [(0..70_000, 0), (3..69_999, 1), (5..5, 70_000), (100..101, 69_999)] {
            let mut to = random(6, [70_000], DType::F32).to_dtype(dtype);
            let mut want = to.to_f64_vec();
            let rounded = from.to_dtype(dtype).to_f64_vec();
            want[at..at + range.len()].copy_from_slice(&rounded[range.clone()]);
            ops::round_into(&from, range, &mut to, at).unwrap();
            assert_eq!(to.to_f64_vec(), want);
        }
        let mut to = output(dtype, [10]);
        assert!(ops::round_into(&from, 0..10, &mut to, 1).is_err());
        assert!(ops::round_into(&from, 69_999..70_001, &mut to, 0).is_err());
        assert!(ops::round_into(&to.clone(), 0..10, &mut to, 0).is_err());
    }
    assert!(ops::round_into(&from, 0..10, &mut output(DType::F32, [10]), 0).is_err());
}

/// AdamW's slots, each with its own decay and step size.
fn slots(parameters: &mut [[Tensor; 4]]) -> Vec<ops::AdamwSlot<'_>> {
    let slots = parameters.iter_mut().enumerate();
    slots
        .map(|(i, [p, g, m, v])| ops::AdamwSlot {
            m,
            v,
            spans: vec![ops::Span::whole(p, g, [0.01, 0.02, 0.03][i], [0.9, 1.0, 0.5][i])],
        })
        .collect()
}

#[test]
fn non_finite() {
    for dtype in [DType::F32, DType::F64] {
        let mut values = vec![1.0; 1000];
        let find =
            |values: &[f64]| ops::non_finite(&Tensor::from_slice(values, [1000]).to_dtype(dtype)).unwrap();
        assert_eq!(find(&values), None);
        values[700] = f64::NEG_INFINITY;
        values[999] = f64::NAN;
        assert_eq!(find(&values), Some((700, 2)));
    }
}

#[test]
fn pass_changes_nothing_but_the_waiting() {
    let (x, w) = (
        random(1, [70, 256], DType::F32),
        random(2, [130, 256], DType::F32),
    );
    let run = || {
        let mut y = output(DType::F32, [70, 130]);
        ops::linear(&x, WeightRef::Dense(&w), None, None, &mut y).unwrap();
        y
    };
    for threads in [1, 2, 5] {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        let inside = pool.install(|| ops::pass(x.device(), run));
        assert_eq!(inside.bytes(), run().bytes(), "{threads} threads");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let d = DType::F32;
    let t = |shape: [usize; 2]| Tensor::zeros(d, shape);
    let w = t([3, 4]);
    assert!(ops::linear(&t([2, 5]), WeightRef::Dense(&w), None, None, &mut t([2, 3])).is_err());
    assert!(ops::linear(&t([2, 4]), WeightRef::Dense(&w), None, None, &mut t([2, 4])).is_err());
    assert!(
        ops::linear(
            &t([2, 4]),
            WeightRef::Dense(&w),
            Some(&t([1, 4])),
            None,
            &mut t([2, 3])
        )
        .is_err()
    );
    assert!(
        ops::linear(
            &t([2, 4]),
            WeightRef::Dense(&w),
            None,
            Some((1.0, &t([1, 3]))),
            &mut t([2, 3])
        )
        .is_err()
    );
    assert!(ops::linear_backward_input(&t([2, 4]), WeightRef::Dense(&w), None, &mut t([2, 4])).is_err());
    assert!(ops::matmul(1.0, (&t([2, 4]), false), (&t([5, 4]), false), 0.0, &mut t([2, 4])).is_err());
    assert!(ops::gelu(&t([2, 4]), &mut t([2, 3])).is_err());
    let ids = |i: i32| Tensor::from_slice(&[i], [1]);
    for bad in [-1, 3] {
        assert!(
            ops::embedding(&w, &ids(bad), &mut t([1, 4])).is_err(),
            "token id {bad}"
        );
        assert!(
            ops::gather_rows(&w, &ids(bad), &mut t([1, 4])).is_err(),
            "row {bad}"
        );
    }
    let spans = [Span { start: 0, context: 9 }];
    assert!(
        ops::attention(
            &t([2, 12]),
            &span_tensor(&spans),
            None,
            1,
            &mut t([2, 4]),
            &mut t([1, 2])
        )
        .is_err(),
        "context beyond the end"
    );
    let (keys, values) = (t([3, 4]), t([2, 4]));
    let prefix = Prefix {
        keys: &keys,
        values: &values,
    };
    let spans = span_tensor(&[Span { start: 0, context: 1 }]);
    assert!(
        ops::attention(
            &t([2, 12]),
            &spans,
            Some(prefix),
            1,
            &mut t([2, 4]),
            &mut t([1, 2])
        )
        .is_err(),
        "a prefix with more keys than values"
    );
    let tables = rope_tables(Compute::cpu(d), 4, 2).unwrap();
    let positions = Tensor::from_slice(&[0i32, 2], [1, 2]);
    assert!(
        ops::rope(&mut t([1, 12]), &positions, &tables, 1, false).is_err(),
        "position beyond the tables"
    );
}

#[test]
fn a_quantised_weight_stays_as_it_is_on_the_cpu() {
    let dense = random(1, [4, 128], DType::F32);
    let weight = QuantTensor::quantize(&dense, QuantType::Nf4, true).unwrap();
    let codes = weight.codes.bytes().to_vec();
    let placed = ops::place_quantized(weight, glmtune::tensor::Device::Cpu).unwrap();
    assert_eq!(placed.codes.bytes(), codes);
}

#[test]
fn quantising_and_decoding_on_the_cpu_are_those_of_the_weight() {
    let dense = random(1, [6, 128], DType::BF16);
    for (quant_type, double) in [(QuantType::Nf4, true), (QuantType::Fp4, false)] {
        let weight = QuantTensor::quantize(&dense, quant_type, double).unwrap();
        let cpu = glmtune::tensor::Device::Cpu;
        let same = ops::quantize("weight", &dense, quant_type, double, cpu).unwrap();
        assert_eq!(same.codes.bytes(), weight.codes.bytes());
        assert_eq!(same.block_absmax(), weight.block_absmax());
        for dtype in [DType::F32, DType::F64] {
            let mut values = output(dtype, [6, 128]);
            let rows = 0..weight.shape.rows_and_columns().0;
            ops::dequantize(WeightRef::Quant(&weight), rows, &mut values).unwrap();
            assert_eq!(values.to_f64_vec(), weight.dequantize().to_f64_vec());
            check_guards("dequantize", &values);
        }
    }
}

#[test]
fn eight_bits_are_decoded_row_by_row() {
    let dense = random(1, [6, 33], DType::F16);
    let weight = RowInt8::quantize("weight", &dense).unwrap();
    let placed = ops::place_int8(weight.clone(), glmtune::tensor::Device::Cpu).unwrap();
    assert_eq!(placed.codes.bytes(), weight.codes.bytes());
    let want = weight.dequantize().to_f64_vec();
    for dtype in [DType::F32, DType::F64] {
        let mut values = output(dtype, [3, 33]);
        ops::dequantize(WeightRef::Int8(&weight), 2..5, &mut values).unwrap();
        assert_eq!(values.to_f64_vec(), want[2 * 33..5 * 33]);
        check_guards("dequantize", &values);
    }
    let mut values = output(DType::F32, [3, 33]);
    assert!(ops::dequantize(WeightRef::Int8(&weight), 4..7, &mut values).is_err());
}

/// Rows gathered on the host are those of the embedding, in every pair of types.
#[test]
fn an_embedding_on_the_host_is_gathered_and_converted() {
    let ids = [3i32, 0, 3, 6];
    let numbers = Tensor::from_slice(&ids, [4]);
    for from in [DType::F32, DType::F16, DType::BF16] {
        let w = random(1, [7, 40], from);
        for to in [DType::F32, DType::F16, DType::BF16] {
            let (mut staging, mut y) = (output(to, [4, 40]), output(to, [4, 40]));
            ops::embedding_from_host(&w, &ids, &mut staging, &mut y).unwrap();
            let all = w.to_dtype(to);
            let row = 40 * to.size();
            let want: Vec<u8> = ids
                .iter()
                .flat_map(|&id| all.bytes()[id as usize * row..][..row].to_vec())
                .collect();
            assert!(y.bytes() == want, "{from} to {to}");
            check_guards("embedding_from_host", &y);
        }
    }
    let w = random(1, [7, 40], DType::F32);
    let (mut staging, mut y) = (output(DType::F32, [4, 40]), output(DType::F32, [4, 40]));
    ops::embedding(&w, &numbers, &mut y).unwrap();
    for wrong in [-1, 7] {
        let result = ops::embedding_from_host(&w, &[0, wrong, 1, 2], &mut staging, &mut y);
        assert!(
            result
                .unwrap_err()
                .to_string()
                .contains(&format!("token id {wrong}"))
        );
    }
}

#[test]
fn logits_of_a_head_are_the_product() {
    for (form, w, values) in stored(130, 64) {
        let x = random(1, [5, 64], DType::F64).to_f64_vec();
        let naive = product(&x, &values, (5, 130, 64));
        check(&format!("head_logits {form}"), 64, Some(&naive), |d| {
            let mut y = output(d, [5, 130]);
            let mut scratch = ops::HeadScratch::of_logits(output(d, [0]));
            ops::head_logits(&random(1, [5, 64], d), w.as_ref(), &mut scratch, &mut y).unwrap();
            y
        });
    }
    let pieces = [random(2, [130, 64], DType::F32)];
    let mut scratch = ops::HeadScratch::of_logits(output(DType::F32, [0]));
    let mut y = output(DType::F32, [5, 130]);
    let streamed = ops::HeadRef::Streamed(&pieces);
    let result = ops::head_logits(&random(1, [5, 64], DType::F32), streamed, &mut scratch, &mut y);
    assert!(result.unwrap_err().to_string().contains("CPU"));
}

#[test]
fn an_adapted_product_is_the_product_and_the_adapter() {
    for (m, n, k) in SIZES {
        for rank in [1usize, 5] {
            for (form, w, values) in stored(n, k) {
                let what = format!("{form} {m} {n} {k} rank {rank}");
                let (x, u, b) = (
                    random(1, [m, k], DType::F64),
                    random(2, [m, rank], DType::F64),
                    random(3, [n, rank], DType::F64),
                );
                let mut naive = product(&x.to_f64_vec(), &values, (m, n, k));
                for (y, more) in naive
                    .iter_mut()
                    .zip(product(&u.to_f64_vec(), &b.to_f64_vec(), (m, n, rank)))
                {
                    *y += 0.5 * more;
                }
                check(&format!("linear_adapted {what}"), k + rank, Some(&naive), |d| {
                    let mut y = output(d, [m, n]);
                    let (u, matrix) = (&random(2, [m, rank], d), &random(3, [n, rank], d));
                    let adapter = Adapter {
                        scale: 0.5,
                        u,
                        matrix,
                    };
                    ops::linear_adapted(&random(1, [m, k], d), w.as_ref(), None, None, adapter, &mut y)
                        .unwrap();
                    y
                });
                let (dy, a) = (
                    random(5, [m, n], DType::F64).to_f64_vec(),
                    random(6, [rank, k], DType::F64).to_f64_vec(),
                );
                let u = u.to_f64_vec();
                let naive: Vec<f64> = (0..m * k)
                    .map(|i| {
                        let (row, column) = (i / k, i % k);
                        let base: f64 = (0..n).map(|j| dy[row * n + j] * values[j * k + column]).sum();
                        base + (0..rank)
                            .map(|r| 0.5 * u[row * rank + r] * a[r * k + column])
                            .sum::<f64>()
                    })
                    .collect();
                check(
                    &format!("linear_backward_input_adapted {what}"),
                    n + rank,
                    Some(&naive),
                    |d| {
                        let mut dx = output(d, [m, k]);
                        let (u, matrix) = (&random(2, [m, rank], d), &random(6, [rank, k], d));
                        let adapter = Adapter {
                            scale: 0.5,
                            u,
                            matrix,
                        };
                        ops::linear_backward_input_adapted(
                            &random(5, [m, n], d),
                            w.as_ref(),
                            None,
                            adapter,
                            &mut dx,
                        )
                        .unwrap();
                        dx
                    },
                );
            }
        }
    }
    let (w, x) = (random(1, [4, 8], DType::F32), random(2, [3, 8], DType::F32));
    let (u, matrix) = (&random(3, [3, 2], DType::F32), &random(4, [2, 4], DType::F32));
    let adapter = Adapter {
        scale: 1.0,
        u,
        matrix,
    };
    let mut y = output(DType::F32, [3, 4]);
    assert!(
        ops::linear_adapted(&x, WeightRef::Dense(&w), None, None, adapter, &mut y).is_err(),
        "a matrix of the wrong side"
    );
}

#[test]
fn what_dropout_took() {
    for n in [1, 7, 1024, 70_001] {
        let (p, stream) = (0.25f32, Stream::new(3, 4));
        let x = random(1, [n], DType::F64).to_f64_vec();
        let naive: Vec<f64> = (0..n)
            .map(|i| match stream.uniform(i as u64) >= p {
                true => x[i] - x[i] / 0.75,
                false => x[i],
            })
            .collect();
        check("dropout_rest", 1, Some(&naive), |d| {
            let mut y = output(d, [n]);
            ops::dropout_rest(&random(1, [n], d), p, stream, &mut y).unwrap();
            y
        });
    }
}

#[test]
fn noise() {
    for n in [1, 6, 1025, 70_001] {
        let stream = Stream::new(9, 1 << 33);
        let y = random(2, [n], DType::F64).to_f64_vec();
        let naive: Vec<f64> = (0..n)
            .map(|i| y[i] + 0.375 * f64::from(2.0 * stream.uniform(i as u64) - 1.0))
            .collect();
        check("accumulate_noise", 1, Some(&naive), |d| {
            let mut y = random(2, [n], d);
            ops::accumulate_noise(0.375, stream, &mut y).unwrap();
            y
        });
    }
}

#[test]
fn cast() {
    let x = random(1, [33], DType::F32);
    for to in [DType::F64, DType::F32, DType::F16, DType::BF16] {
        let mut y = output(to, [33]);
        ops::cast(&x, &mut y).unwrap();
        check_guards("cast", &y);
        assert_eq!(y.bytes(), x.to_dtype(to).bytes());
    }
    let mut indices = Tensor::zeros(DType::I32, [33]);
    assert!(ops::cast(&x, &mut indices).is_err());
    assert!(ops::cast(&x, &mut Tensor::zeros(DType::F16, [32])).is_err());
}

#[test]
fn row_squares() {
    for (n, k) in [(1, 1), (3, 64), (70, 33), (5, 4096)] {
        let squares = |w: &[f64]| {
            w.chunks_exact(k)
                .map(|row| row.iter().map(|w| w * w).sum())
                .collect::<Vec<f64>>()
        };
        let naive = squares(&random(1, [n, k], DType::F64).to_f64_vec());
        check("row_squares", k, Some(&naive), |d| {
            let mut y = output(d, [n]);
            ops::row_squares(WeightRef::Dense(&random(1, [n, k], d)), &mut y).unwrap();
            y
        });
        let quantized = QuantTensor::quantize(&random(1, [n, k], DType::F32), QuantType::Nf4, true).unwrap();
        let naive = squares(&quantized.dequantize().to_f64_vec());
        check("row_squares 4-bit", k, Some(&naive), |d| {
            let mut y = output(d, [n]);
            ops::row_squares(WeightRef::Quant(&quantized), &mut y).unwrap();
            y
        });
    }
}

/// The norm of a row by its products is the norm of the row.
#[test]
fn dora_gain() {
    for (n, k, r) in [(1, 1, 1), (5, 7, 3), (130, 40, 8)] {
        let s = 0.75;
        let all = |d| {
            let (w, a, b) = (random(1, [n, k], d), random(2, [r, k], d), random(3, [n, r], d));
            let mut squares = output(d, [n]);
            ops::row_squares(WeightRef::Dense(&w), &mut squares).unwrap();
            let (mut p, mut gram, mut q) = (output(d, [r, n]), output(d, [r, r]), output(d, [n, r]));
            ops::matmul(1.0, (&a, false), (&w, true), 0.0, &mut p).unwrap();
            ops::matmul(1.0, (&a, false), (&a, true), 0.0, &mut gram).unwrap();
            ops::matmul(1.0, (&b, false), (&gram, false), 0.0, &mut q).unwrap();
            (w, a, b, squares, p, q)
        };
        let (w, a, b, ..) = all(DType::F64);
        let ba = product(&b.to_f64_vec(), &transposed(&a.to_f64_vec(), r, k), (n, k, r));
        let w: Vec<f64> = w.to_f64_vec().iter().zip(&ba).map(|(w, ba)| w + s * ba).collect();
        let norms = w
            .chunks_exact(k)
            .map(|row| row.iter().map(|w| w * w).sum::<f64>().sqrt());
        let norms: Vec<f64> = norms.collect();
        let m = random(4, [n], DType::F64).to_f64_vec();
        let gains: Vec<f64> = m.iter().zip(&norms).map(|(m, norm)| m / norm).collect();
        let inverses: Vec<f64> = norms.iter().map(|norm| 1.0 / norm).collect();
        for (first, naive) in [(true, gains), (false, inverses)] {
            check("dora_gain", 4 * k, Some(&naive), |d| {
                let (_, _, b, squares, p, q) = all(d);
                let (mut gain, mut inverse) = (output(d, [n]), output(d, [n]));
                let m = random(4, [n], d);
                ops::dora_gain(&m, &squares, &b, (&p, &q), s, (&mut gain, &mut inverse)).unwrap();
                if first { gain } else { inverse }
            });
        }
    }
}

fn transposed(x: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    (0..rows * columns)
        .map(|i| x[i % rows * columns + i / rows])
        .collect()
}

#[test]
fn scaled_columns() {
    for (m, n, _) in SIZES {
        let inputs = |d| {
            (
                random(1, [m, n], d),
                random(2, [n], d),
                random(3, [n], d),
                random(4, [m, n], d),
            )
        };
        let (x, g, b, r) = inputs(DType::F64);
        let (x, g, b, r) = (x.to_f64_vec(), g.to_f64_vec(), b.to_f64_vec(), r.to_f64_vec());
        let naive: Vec<f64> = (0..m * n)
            .map(|i| (g[i % n] - 1.0) * x[i] + b[i % n] + 2.5 * r[i])
            .collect();
        check("scale_columns", 1, Some(&naive), |d| {
            let ((x, g, b, r), mut y) = (inputs(d), output(d, [m, n]));
            ops::scale_columns(&x, &g, -1.0, Some(&b), Some((2.5, &r)), &mut y).unwrap();
            y
        });
        let naive: Vec<f64> = (0..m * n).map(|i| r[i] + g[i % n] * x[i]).collect();
        check("accumulate_scaled_columns", 1, Some(&naive), |d| {
            let (x, g, _, mut y) = inputs(d);
            ops::accumulate_scaled_columns(&x, &g, &mut y).unwrap();
            y
        });
        let naive: Vec<f64> = (0..n)
            .map(|j| b[j] + g[j] * (0..m).map(|i| x[i * n + j] * r[i * n + j]).sum::<f64>())
            .collect();
        check("accumulate_column_products", m, Some(&naive), |d| {
            let (x, g, mut sums, r) = inputs(d);
            ops::accumulate_column_products(&x, &r, &g, &mut sums).unwrap();
            sums
        });
    }
}

/// On the CPU a copy beside the kernels is a copy.
#[test]
fn host_tensors_are_fetched_and_stored_at_once() {
    for dtype in [DType::F32, DType::F64] {
        let from = random(3, [5, 7], dtype);
        let mut to = output(dtype, [7, 5]);
        ops::fetch(&from, &mut to).unwrap();
        assert_eq!(to.bytes(), from.bytes());
        check_guards("fetch", &to);
        let mut to = Tensor::zeros_pinned(Device::Cpu, dtype, [35]).unwrap();
        ops::store(&from, &mut to).unwrap();
        assert_eq!(to.bytes(), from.bytes());
        let mut part = Tensor::zeros(dtype, [20]);
        ops::fetch_range(&from, 7..17, &mut part, 3).unwrap();
        ops::store_range(&part, 3..13, &mut to, 0).unwrap();
        assert_eq!(to.to_f64_vec()[..10], from.to_f64_vec()[7..17]);
        assert_eq!(to.to_f64_vec()[10..], from.to_f64_vec()[10..]);
        assert!(ops::fetch_range(&from, 0..10, &mut part, 11).is_err());
        assert!(ops::store_range(&part, 15..21, &mut to, 0).is_err());
        let mut short = output(dtype, [34]);
        assert!(ops::fetch(&from, &mut short).is_err() && ops::store(&from, &mut short).is_err());
    }
}
