//! Attention, its gradient, and attention over a cache.

use glmtune::ops::{self, Prefix, PrefixGradients};
use glmtune::tensor::{DType, Device, Tensor};

use crate::{TYPES, assert_matches, device, down, nan, random, twice, up, wide};

/// Start and context of each sequence.
type Spans = Vec<[i32; 2]>;

#[derive(Clone)]
struct Case {
    heads: usize,
    s: usize,
    d: usize,
    /// Keys of the prefix; 0 for none.
    prefix: usize,
    /// Has each sequence a prefix of its own?
    own: bool,
    spans: Spans,
}

impl Case {
    fn what(&self) -> String {
        let Self {
            heads,
            s,
            d,
            prefix,
            own,
            spans,
        } = self;
        let whose = if *own { " of each" } else { "" };
        format!("heads {heads} S {s} d {d} prefix {prefix}{whose} spans {spans:?}")
    }

    fn spans(&self) -> Tensor {
        Tensor::from_slice(self.spans.as_flattened(), [self.spans.len(), 2])
    }

    fn prefix(&self, dtype: DType) -> [Tensor; 2] {
        let [heads, length, d] = [self.heads, self.prefix.max(1), self.d];
        [11, 12].map(|seed| match self.own {
            false => random(dtype, [heads, length, d], seed, 1.0),
            true => random(dtype, [self.spans.len(), heads, length, d], seed, 1.0),
        })
    }

    /// Context, log_sum_exp, dqkv and the gradients of a prefix, which begin as random numbers; in f64 on the CPU.
    fn run(&self, device: Device, dtype: DType) -> Vec<Tensor> {
        let (compute, sums) = match device {
            Device::Cpu => (DType::F64, DType::F64),
            Device::Cuda(_) => (dtype, DType::F32),
        };
        let placed = |t: &Tensor| match device {
            Device::Cpu => wide(t),
            Device::Cuda(_) => up(device, t),
        };
        let (heads, d) = (self.heads, self.d);
        let rows = self.spans.len() * self.s;
        let qkv = placed(&random(dtype, [rows, 3 * heads * d], 1, 1.0));
        let d_context = placed(&random(dtype, [rows, heads * d], 2, 1.0));
        let [keys, values] = self.prefix(dtype).map(|t| placed(&t));
        let prefix = (self.prefix > 0).then_some(Prefix {
            keys: &keys,
            values: &values,
        });
        let spans = up(device, &self.spans());
        let mut context = up(device, &nan(compute, [rows, heads * d]));
        let mut log_sum_exp = up(device, &nan(sums, [rows * heads]));
        ops::attention(&qkv, &spans, prefix, heads, &mut context, &mut log_sum_exp).unwrap();
        let mut dqkv = up(device, &nan(compute, qkv.shape()));
        let [mut d_keys, mut d_values] = [13, 14].map(|seed| {
            up(
                device,
                &random(DType::F32, keys.shape(), seed, 1.0).to_dtype(sums),
            )
        });
        let gradients = prefix.map(|prefix| {
            let gradients = PrefixGradients {
                keys: &mut d_keys,
                values: &mut d_values,
            };
            (prefix, gradients)
        });
        ops::attention_backward(
            &d_context,
            &qkv,
            &context,
            &log_sum_exp,
            &spans,
            gradients,
            heads,
            &mut dqkv,
        )
        .unwrap();
        vec![context, log_sum_exp, dqkv, d_keys, d_values]
    }

    fn check(&self, device: Device, dtype: DType) {
        let what = self.what();
        let got = twice(&what, || self.run(device, dtype));
        let want = self.run(Device::Cpu, dtype);
        // A weight and the output are rounded; weights add up to 1.
        let k = self.terms(dtype, 1);
        assert_matches(&format!("context: {what}"), &got[0], &want[0], dtype, k, 1.0);
        // Products of d numbers, in f32.
        assert_matches(
            &format!("log_sum_exp: {what}"),
            &got[1],
            &want[1],
            DType::F32,
            self.d,
            4.0,
        );
        // A weight or dS of every query, each rounded.
        let names = ["dqkv", "prefix keys", "prefix values"];
        let queries = [self.s, self.s * self.spans.len(), self.s * self.spans.len()];
        for ((got, want), (name, k)) in got[2..].iter().zip(&want[2..]).zip(names.iter().zip(queries)) {
            let k = self.terms(dtype, k);
            assert_matches(&format!("gradient of {name}: {what}"), got, want, dtype, k, 1.0);
        }
    }

    /// How many roundings in `dtype` a sum of `k` weights has: with f32, whose scores are sums of d products in that same
    /// type, d times as many.
    fn terms(&self, dtype: DType, k: usize) -> usize {
        if dtype == DType::F32 { k * self.d } else { k }
    }
}

/// Lengths around the tiles of 64 queries and 64, 48 or 32 keys; contexts of none, some and all; padding of none, some, all.
#[test]
fn attention_and_its_gradient_are_those_of_the_cpu() {
    let Some(device) = device() else { return };
    let lengths: [(usize, Spans); 8] = [
        (1, vec![[0, 1], [0, 0]]),
        (15, vec![[0, 7], [3, 9], [15, 15]]),
        (17, vec![[2, 2], [0, 17]]),
        (63, vec![[0, 63], [60, 62]]),
        (64, vec![[0, 0], [5, 20]]),
        (65, vec![[0, 64], [64, 64]]),
        (100, vec![[33, 40], [0, 70]]),
        (130, vec![[70, 80]]),
    ];
    for dtype in TYPES {
        for (i, (s, spans)) in lengths.iter().enumerate() {
            for (j, prefix) in [0, 5, 70].into_iter().enumerate() {
                Case {
                    heads: 1 + i % 2,
                    s: *s,
                    d: [16, 32, 64, 128][(i + j) % 4],
                    prefix,
                    own: (i + j) % 2 == 1,
                    spans: spans.clone(),
                }
                .check(device, dtype);
            }
        }
    }
}

/// Enough blocks for the kernel of 128 queries each; few keys, since they are emulated.
#[test]
fn many_heads_take_the_tall_kernel() {
    let Some(device) = device() else { return };
    for (prefix, own, spans) in [
        (0, false, vec![[1, 40], [63, 64], [62, 64], [60, 64]]),
        (7, true, vec![[64, 64], [63, 63], [0, 0], [65, 65]]),
    ] {
        Case {
            heads: 64,
            s: 65,
            d: 128,
            prefix,
            own,
            spans,
        }
        .check(device, DType::F16);
    }
}

/// The plain kernels take heads of any size.
#[test]
fn odd_heads_work_in_f32() {
    let Some(device) = device() else { return };
    for d in [1, 4, 20, 33, 100] {
        for prefix in [0, 5] {
            Case {
                heads: 2,
                s: 40,
                d,
                prefix,
                own: d % 2 == 0,
                spans: vec![[0, 7], [10, 20]],
            }
            .check(device, DType::F32);
        }
    }
}

#[test]
fn heads_without_a_kernel_are_refused() {
    let Some(device) = device() else { return };
    for (dtype, d) in [(DType::F16, 24), (DType::BF16, 8), (DType::F32, 129)] {
        let t = |dtype, shape: [usize; 2]| up(device, &nan(dtype, shape));
        let spans = up(device, &Tensor::from_slice(&[0i32, 1], [1, 2]));
        let qkv = t(dtype, [2, 3 * d]);
        let (mut context, mut log_sum_exp) = (t(dtype, [2, d]), t(DType::F32, [2, 1]));
        let refused = ops::attention(&qkv, &spans, None, 1, &mut context, &mut log_sum_exp);
        let message = refused.unwrap_err().to_string();
        assert!(
            message.contains("attention") && message.contains(&d.to_string()),
            "{message}"
        );
    }
}

/// A prompt, then token by token; returns contexts, statistics and the cache, of which what is not reached stays NaN.
fn generate(case: &Case, device: Device, dtype: DType, capacity: usize, steps: &[usize]) -> Vec<Tensor> {
    let (compute, sums) = match device {
        Device::Cpu => (DType::F64, DType::F64),
        Device::Cuda(_) => (dtype, DType::F32),
    };
    let placed = |t: &Tensor| match device {
        Device::Cpu => wide(t),
        Device::Cuda(_) => up(device, t),
    };
    let (heads, size) = (case.heads, case.spans.len());
    let hidden = heads * case.d;
    let spans = up(device, &case.spans());
    let [prefix_keys, prefix_values] = case.prefix(dtype).map(|t| placed(&t));
    let prefix = (case.prefix > 0).then_some(Prefix {
        keys: &prefix_keys,
        values: &prefix_values,
    });
    let cache = || up(device, &nan(compute, [size, capacity, hidden]));
    let (mut keys, mut values) = (cache(), cache());
    let (mut past, mut out) = (0, Vec::new());
    for (i, &count) in steps.iter().enumerate() {
        let rows = size * count;
        let qkv = placed(&random(dtype, [rows, 3 * hidden], 20 + i as u64, 1.0));
        let mut context = up(device, &nan(compute, [rows, hidden]));
        let mut log_sum_exp = up(device, &nan(sums, [rows * heads]));
        ops::attention_cached(
            &qkv,
            (&mut keys, &mut values),
            past,
            &spans,
            prefix,
            heads,
            &mut context,
            &mut log_sum_exp,
        )
        .unwrap();
        past += count;
        out.extend([context, log_sum_exp]);
    }
    out.extend([keys, values]);
    out
}

#[test]
fn attention_over_a_cache_is_that_of_the_cpu() {
    let Some(device) = device() else { return };
    let prompts: [(&[usize], usize, Spans); 6] = [
        (&[1, 1, 1], 3, vec![[0, 1], [0, 0], [1, 1]]),
        (&[7, 1, 1], 9, vec![[0, 6], [3, 7]]),
        (&[62, 1, 1, 1], 70, vec![[0, 62], [61, 62], [30, 40]]),
        (&[40, 30, 1], 71, vec![[2, 39]]),
        (&[129, 1], 140, vec![[0, 100], [70, 129]]),
        (&[64, 64, 1], 129, vec![[5, 60]]),
    ];
    for dtype in TYPES {
        for (i, (steps, capacity, spans)) in prompts.iter().enumerate() {
            for (j, prefix) in [0, 5, 70].into_iter().enumerate() {
                let case = Case {
                    heads: 1 + i % 2,
                    s: 0,
                    d: [128, 16, 64, 32][(i + j) % 4],
                    prefix,
                    own: (i + j) % 2 == 1,
                    spans: spans.clone(),
                };
                let what = format!("steps {steps:?} {}", case.what());
                let got = twice(&what, || generate(&case, device, dtype, *capacity, steps));
                let want = generate(&case, Device::Cpu, dtype, *capacity, steps);
                let (contexts, caches) = want.split_at(2 * steps.len());
                for (n, (pair, got)) in contexts.chunks(2).zip(got.chunks(2)).enumerate() {
                    let k = case.terms(dtype, 1);
                    assert_matches(&format!("step {n}: {what}"), &got[0], &pair[0], dtype, k, 1.0);
                    assert_matches(
                        &format!("step {n}: log_sum_exp: {what}"),
                        &got[1],
                        &pair[1],
                        DType::F32,
                        case.d,
                        4.0,
                    );
                }
                for (got, want) in got[2 * steps.len()..].iter().zip(caches) {
                    let same = |a: f64, b: f64| a == b || a.is_nan() && b.is_nan();
                    let (got, want) = (down(got).to_f64_vec(), want.to_f64_vec());
                    assert!(
                        got.iter().zip(&want).all(|(&a, &b)| same(a, b)),
                        "the cache is a copy: {what}"
                    );
                }
            }
        }
    }
}

/// A head in f32 that no chunk kernel takes.
#[test]
fn a_cache_of_odd_heads_works_in_f32() {
    let Some(device) = device() else { return };
    let case = Case {
        heads: 2,
        s: 0,
        d: 20,
        prefix: 3,
        own: true,
        spans: vec![[0, 6], [3, 7]],
    };
    let steps = [7, 1, 1];
    let got = twice("odd", || generate(&case, device, DType::F32, 9, &steps));
    let want = generate(&case, Device::Cpu, DType::F32, 9, &steps);
    for (got, want) in got.iter().zip(&want).step_by(2).take(steps.len()) {
        assert_matches("odd heads over a cache", got, want, DType::F32, 1, 1.0);
    }
}
