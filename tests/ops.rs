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
use glmtune::quant::{QuantTensor, QuantType};
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Shape, Tensor};

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
    out
}

enum Stored {
    Dense(Tensor),
    Quant(Box<QuantTensor>),
}

impl Stored {
    fn as_ref(&self) -> WeightRef<'_> {
        match self {
            Stored::Dense(w) => WeightRef::Dense(w),
            Stored::Quant(q) => WeightRef::Quant(q),
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

/// Keys and values `[heads, P, d]` of a prefix; P 0 for none.
fn attention_prefix(heads: usize, prefix: usize, d_head: usize, d: DType) -> [Tensor; 2] {
    [7, 8].map(|seed| random(seed, [heads, prefix.max(1), d_head], d))
}

/// As `Prefix`; what is blocked gets a score that every unblocked one exceeds, as the official -10000.
fn naive_attention(qkv: &[f64], s: usize, spans: &[Span], heads: usize, d: usize, prefix: usize) -> Vec<f64> {
    let width = heads * 3 * d;
    let [prefix_keys, prefix_values] =
        attention_prefix(heads, prefix, d, DType::F64).map(|tensor| tensor.to_f64_vec());
    let mut out = vec![0.0; spans.len() * s * heads * d];
    for (b, span) in spans.iter().enumerate() {
        for h in 0..heads {
            let at = |part: usize, t: usize| &qkv[(b * s + t) * width + (3 * h + part) * d..][..d];
            let of_prefix = |x: &[f64], j: usize| x[(h * prefix + j) * d..][..d].to_vec();
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
    for ((s, spans), length) in attention_cases()
        .into_iter()
        .flat_map(|case| [(case.clone(), 0), (case, 5)])
    {
        let rows = s * spans.len();
        let naive = naive_attention(
            &random(1, [rows, heads * 3 * d_head], DType::F64).to_f64_vec(),
            s,
            &spans,
            heads,
            d_head,
            length,
        );
        let run = |d| {
            let qkv = random(1, [rows, heads * 3 * d_head], d);
            let [keys, values] = attention_prefix(heads, length, d_head, d);
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
                &format!("attention_backward {s} prefix {length}: {what}"),
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
    for length in [0, 5] {
        let mut naive = naive_attention(&whole, s, &spans, heads, d_head, length);
        let first = naive_attention(&prompts, prompt, &spans, heads, d_head, length);
        for (b, span) in spans.iter().enumerate() {
            let padding = span.start * hidden;
            naive[b * s * hidden..][..padding].copy_from_slice(&first[b * prompt * hidden..][..padding]);
        }
        check("attention_cached", s, Some(&naive), |d| {
            let whole = random(1, [2 * s, 3 * hidden], d);
            let [prefix_keys, prefix_values] = attention_prefix(heads, length, d_head, d);
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
            let (mut logits, mut statistics) = (output(d, [capacity]), output(d, [rows, ops::STATISTICS]));
            let loss =
                ops::head_loss(&x, WeightRef::Dense(&w), &targets, &mut logits, &mut statistics).unwrap();
            check_guards("head_loss", &statistics);
            (loss, logits, statistics)
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
                let (_, mut logits, statistics) = run(d);
                let (mut dx, mut dw) = (output(d, [rows, k]), Tensor::zeros(d, [v, k]));
                let buffers = (&mut logits, &statistics);
                let head = WeightRef::Dense(&w);
                ops::head_loss_backward(&x, head, &targets, 0.5, buffers, &mut dx, Some(&mut dw)).unwrap();
                if part == 0 { dx } else { dw }
            });
        }
    }
}

#[test]
fn adamw_and_sum_of_squares() {
    for n in [1, 7, 40_000, 150_001] {
        let base = |seed| random(seed, [n], DType::F32);
        let (p, g, m, mut v) = (base(1), base(2), base(3), base(4));
        for x in v.as_mut_slice::<f32>() {
            *x = x.abs();
        }
        let factors = ops::AdamW {
            clip: 0.5,
            decay: 0.99,
            one_minus_beta1: 0.1,
            beta2: 0.999,
            one_minus_beta2: 0.001,
            step_size: 0.01,
            sqrt_correction2: 0.7,
            epsilon: 1e-8,
        };
        let (mut p1, mut m1, mut v1) = (p.clone(), m.clone(), v.clone());
        ops::adamw(&mut p1, &g, &mut m1, &mut v1, &factors).unwrap();
        let [p, g, m, v] = [p, g, m, v].map(|t| t.to_f64_vec());
        let mut want = Vec::new();
        for i in 0..n {
            let g = 0.5 * g[i];
            let (m, v) = (m[i] + 0.1 * (g - m[i]), 0.999 * v[i] + 0.001 * g * g);
            want.push(p[i] * 0.99 - 0.01 * m / (v.sqrt() / 0.7 + 1e-8));
        }
        assert_close("adamw", &p1.to_f64_vec(), &want, 1e-6, 1e-5);
        let want: f64 = g.iter().map(|x| x * x).sum();
        assert_close(
            "sum_of_squares",
            &[ops::sum_of_squares(&base(2)).unwrap()],
            &[want],
            0.0,
            1e-12,
        );
    }
}

#[test]
fn many_parameters_at_once_are_as_one_after_the_other() {
    let sizes = [3, 40_000, 1];
    let tensors = |seed: u64| -> Vec<Tensor> {
        let random = |(i, n): (usize, &usize)| random(seed + i as u64, [*n], DType::F32);
        sizes.iter().enumerate().map(random).collect()
    };
    let factors = ops::AdamW {
        clip: 0.5,
        decay: 0.9,
        one_minus_beta1: 0.1,
        beta2: 0.999,
        one_minus_beta2: 0.001,
        step_size: 0.01,
        sqrt_correction2: 0.7,
        epsilon: 1e-8,
    };
    let (mut p, mut g, mut m) = (tensors(1), tensors(11), tensors(21));
    let mut v: Vec<Tensor> = sizes.iter().map(|&n| Tensor::zeros(DType::F32, [n])).collect();
    let mut one = (p.clone(), m.clone(), v.clone());
    let mut slots: Vec<ops::AdamwSlot> = (p.iter_mut().zip(&g))
        .zip(m.iter_mut().zip(&mut v))
        .enumerate()
        .map(|(i, ((p, g), (m, v)))| ops::AdamwSlot {
            p,
            g,
            m,
            v,
            decayed: i != 1,
        })
        .collect();
    ops::adamw_all(&mut slots, &factors).unwrap();
    for i in 0..3 {
        let decay = if i == 1 { 1.0 } else { 0.9 };
        let (p1, m1, v1) = (&mut one.0[i], &mut one.1[i], &mut one.2[i]);
        ops::adamw(p1, &g[i], m1, v1, &ops::AdamW { decay, ..factors }).unwrap();
        for (all, one) in [(&p[i], p1), (&m[i], m1), (&v[i], v1)] {
            assert_eq!(all.bytes(), one.bytes());
        }
    }

    let sum = ops::sum_of_squares_all(&g.iter().collect::<Vec<_>>()).unwrap();
    let parts: f64 = g.iter().map(|g| ops::sum_of_squares(g).unwrap()).sum();
    assert_eq!(sum, parts);
    assert_eq!(ops::sum_of_squares_all(&[]).unwrap(), 0.0);

    ops::zero_all(&mut g.iter_mut().collect::<Vec<_>>()).unwrap();
    assert!(g.iter().all(|g| g.bytes().iter().all(|&byte| byte == 0)));
    assert!(ops::adamw_all(&mut [], &factors).is_ok() && ops::zero_all(&mut []).is_ok());
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
            ops::dequantize(&weight, &mut values).unwrap();
            assert_eq!(values.to_f64_vec(), weight.dequantize().to_f64_vec());
            check_guards("dequantize", &values);
        }
    }
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
