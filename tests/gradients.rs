//! Is the backward pass the derivative? Central differences in f64, for every operation and for whole toy models.

#[path = "common/mod.rs"]
mod common;

use common::assert_close;
use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::model::tune::{self, LoraTarget, PrefixConfig, Tuning};
use glmtune::model::{LoadOptions, Model, ModelConfig, Weights};
use glmtune::ops::{self, Prefix, PrefixGradients, WeightRef};
use glmtune::quant::{QuantTensor, QuantType, RowInt8};
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Shape, Tensor};

/// Half the distance between the two points of a central difference; its error is of the order of the square.
const H: f64 = 1e-5;

fn random(seed: u64, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let stream = Stream::new(seed, 99);
    let values: Vec<f64> = (0..shape.elements() as u64)
        .map(|i| f64::from(stream.normal(i)))
        .collect();
    Tensor::from_slice(&values, shape)
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    a.as_slice::<f64>()
        .iter()
        .zip(b.as_slice::<f64>())
        .map(|(a, b)| a * b)
        .sum()
}

/// The gradient of `f` at `x`, one element after the other.
fn numerical(x: &Tensor, mut f: impl FnMut(&Tensor) -> f64) -> Vec<f64> {
    let mut x = x.clone();
    (0..x.elements())
        .map(|i| {
            let center = x.as_slice::<f64>()[i];
            let mut at = |value: f64| {
                x.as_mut_slice::<f64>()[i] = value;
                let y = f(&x);
                x.as_mut_slice::<f64>()[i] = center;
                y
            };
            (at(center + H) - at(center - H)) / (2.0 * H)
        })
        .collect()
}

#[track_caller]
fn check(what: &str, analytic: &Tensor, numerical: &[f64]) {
    let size = numerical.iter().map(|x| x.abs()).fold(1.0, f64::max);
    assert_close(what, analytic.as_slice::<f64>(), numerical, 1e-8 * size, 1e-6);
}

fn zeros(shape: impl Into<Shape>) -> Tensor {
    Tensor::zeros(DType::F64, shape)
}

#[test]
fn linear_and_matmul() {
    for (m, n, k) in [(1, 3, 5), (7, 6, 4), (9, 70, 66)] {
        let (x, w, b, r, dy) = (
            random(1, [m, k]),
            random(2, [n, k]),
            random(3, [n]),
            random(4, [m, n]),
            random(5, [m, n]),
        );
        let forward = |x: &Tensor, w: &Tensor, b: &Tensor, r: &Tensor| {
            let mut y = zeros([m, n]);
            ops::linear(x, WeightRef::Dense(w), Some(b), Some((1.5, r)), &mut y).unwrap();
            dot(&y, &dy)
        };
        let residual = random(6, [m, k]);
        let mut dx = zeros([m, k]);
        ops::linear_backward_input(&dy, WeightRef::Dense(&w), Some((2.0, &residual)), &mut dx).unwrap();
        for (dx, r) in dx
            .as_mut_slice::<f64>()
            .iter_mut()
            .zip(residual.as_slice::<f64>())
        {
            *dx -= 2.0 * r;
        }
        check("dx", &dx, &numerical(&x, |x| forward(x, &w, &b, &r)));
        // Parameter gradients are added to what is there.
        let (mut dw, mut db) = (random(7, [n, k]), random(8, [n]));
        let (dw0, db0) = (dw.clone(), db.clone());
        ops::matmul(1.0, (&dy, true), (&x, false), 1.0, &mut dw).unwrap();
        ops::accumulate_column_sums(&dy, &mut db).unwrap();
        for (d, d0) in [(&mut dw, &dw0), (&mut db, &db0)] {
            for (d, d0) in d.as_mut_slice::<f64>().iter_mut().zip(d0.as_slice::<f64>()) {
                *d -= d0;
            }
        }
        check("dw", &dw, &numerical(&w, |w| forward(&x, w, &b, &r)));
        check("db", &db, &numerical(&b, |b| forward(&x, &w, b, &r)));
    }
}

#[test]
fn layer_norm() {
    let (m, n) = (5, 19);
    let (x, w, b, dy) = (
        random(1, [m, n]),
        random(2, [n]),
        random(3, [n]),
        random(4, [m, n]),
    );
    let forward = |x: &Tensor, w: &Tensor, b: &Tensor| {
        let (mut y, mut stats) = (zeros([m, n]), zeros([m, 2]));
        ops::layer_norm(x, w, b, 1e-5, &mut y, &mut stats).unwrap();
        (dot(&y, &dy), stats)
    };
    let (_, stats) = forward(&x, &w, &b);
    let (mut dx, mut dw, mut db) = (zeros([m, n]), zeros([n]), zeros([n]));
    ops::layer_norm_backward_input(&dy, &x, &w, &stats, &mut dx).unwrap();
    ops::layer_norm_backward_parameters(&dy, &x, &stats, &mut dw, &mut db).unwrap();
    check("dx", &dx, &numerical(&x, |x| forward(x, &w, &b).0));
    check("dw", &dw, &numerical(&w, |w| forward(&x, w, &b).0));
    check("db", &db, &numerical(&b, |b| forward(&x, &w, b).0));
}

#[test]
fn gelu() {
    let (x, dy) = (random(1, [3, 41]), random(2, [3, 41]));
    let mut d = dy.clone();
    ops::gelu_backward(&x, &mut d).unwrap();
    let forward = |x: &Tensor| {
        let mut y = zeros([3, 41]);
        ops::gelu(x, &mut y).unwrap();
        dot(&y, &dy)
    };
    check("dx", &d, &numerical(&x, forward));
}

#[test]
fn rope() {
    let (heads, d, m) = (2, 8, 5);
    let tables = glmtune::model::glm::rope_tables(Compute::cpu(DType::F64), d, 7).unwrap();
    let positions = Tensor::from_slice(&[0i32, 0, 1, 0, 2, 1, 6, 2, 3, 5], [m, 2]);
    let (x, dy) = (random(1, [m, heads * 3 * d]), random(2, [m, heads * 3 * d]));
    let forward = |x: &Tensor| {
        let mut y = x.clone();
        ops::rope(&mut y, &positions, &tables, heads, false).unwrap();
        dot(&y, &dy)
    };
    let mut dx = dy.clone();
    ops::rope(&mut dx, &positions, &tables, heads, true).unwrap();
    check("dx", &dx, &numerical(&x, forward));
}

#[test]
fn attention() {
    let (heads, d) = (2, 4);
    let cases: [(usize, Vec<Span>); 3] = [
        (
            6,
            vec![Span { start: 0, context: 3 }, Span { start: 2, context: 4 }],
        ),
        (
            5,
            vec![Span { start: 0, context: 0 }, Span { start: 5, context: 5 }],
        ),
        (67, vec![Span { start: 1, context: 9 }]),
    ];
    for (s, spans) in cases {
        let rows = s * spans.len();
        let pairs: Vec<i32> = spans
            .iter()
            .flat_map(|s| [s.start as i32, s.context as i32])
            .collect();
        let spans = Tensor::from_slice(&pairs, [spans.len(), 2]);
        let (qkv, d_context) = (random(1, [rows, heads * 3 * d]), random(2, [rows, heads * d]));
        // No prefix, one for all sequences, one for each.
        for (length, prefixes) in [(0, 1), (3, 1), (3, spans.extent(0))] {
            let keys = random(3, [prefixes, heads, length.max(1), d]);
            let values = random(4, [prefixes, heads, length.max(1), d]);
            let forward = |qkv: &Tensor, keys: &Tensor, values: &Tensor| {
                let (mut context, mut lse) = (zeros([rows, heads * d]), zeros([rows * heads]));
                let prefix = (length > 0).then_some(Prefix { keys, values });
                ops::attention(qkv, &spans, prefix, heads, &mut context, &mut lse).unwrap();
                (dot(&context, &d_context), context, lse)
            };
            let (_, context, lse) = forward(&qkv, &keys, &values);
            let mut dqkv = Tensor::from_slice(&vec![f64::NAN; qkv.elements()], qkv.shape());
            let (mut d_keys, mut d_values) = (zeros(keys.shape()), zeros(values.shape()));
            let prefix = (length > 0).then_some((
                Prefix {
                    keys: &keys,
                    values: &values,
                },
                PrefixGradients {
                    keys: &mut d_keys,
                    values: &mut d_values,
                },
            ));
            ops::attention_backward(&d_context, &qkv, &context, &lse, &spans, prefix, heads, &mut dqkv)
                .unwrap();
            let what = format!("S {s} prefix {length} of {prefixes}");
            check(
                &format!("{what}: dqkv"),
                &dqkv,
                &numerical(&qkv, |x| forward(x, &keys, &values).0),
            );
            check(
                &format!("{what}: prefix keys"),
                &d_keys,
                &numerical(&keys, |x| forward(&qkv, x, &values).0),
            );
            check(
                &format!("{what}: prefix values"),
                &d_values,
                &numerical(&values, |x| forward(&qkv, &keys, x).0),
            );
        }
    }
}

#[test]
fn embedding_and_rows() {
    let ids = Tensor::from_slice(&[2i32, 0, 2, 4], [4]);
    let (w, dy) = (random(1, [5, 3]), random(2, [4, 3]));
    let mut dw = zeros([5, 3]);
    ops::embedding_backward(&dy, &ids, &mut dw).unwrap();
    let forward = |w: &Tensor| {
        let mut y = zeros([4, 3]);
        ops::embedding(w, &ids, &mut y).unwrap();
        dot(&y, &dy)
    };
    check("dw", &dw, &numerical(&w, forward));

    let rows = Tensor::from_slice(&[3i32, 1], [2]);
    let (x, dy) = (random(3, [5, 3]), random(4, [2, 3]));
    let mut dx = Tensor::from_slice(&[f64::NAN; 15], [5, 3]);
    ops::scatter_rows(&dy, &rows, &mut dx).unwrap();
    let forward = |x: &Tensor| {
        let mut y = zeros([2, 3]);
        ops::gather_rows(x, &rows, &mut y).unwrap();
        dot(&y, &dy)
    };
    check("dx", &dx, &numerical(&x, forward));
}

#[test]
fn head_loss_in_one_chunk_and_in_many() {
    let (rows, v, k) = (4, 23, 6);
    let targets = Tensor::from_slice(&[0i32, 22, 7, 7], [rows]);
    let (x, w) = (random(1, [rows, k]), random(2, [v, k]));
    let scale = 0.37;
    for capacity in [rows * v, rows * 5, rows] {
        let forward = |x: &Tensor, w: &Tensor| {
            let mut scratch = ops::HeadScratch::of_logits(zeros([capacity]));
            let mut statistics = zeros([rows, ops::STATISTICS]);
            let head = WeightRef::Dense(w);
            let loss = ops::head_loss(x, head, &targets, &mut scratch, &mut statistics).unwrap();
            (scale * loss, scratch, statistics)
        };
        let (_, mut scratch, statistics) = forward(&x, &w);
        let (mut dx, mut dw) = (Tensor::from_slice(&[f64::NAN; 24], [rows, k]), zeros([v, k]));
        let buffers = (&mut scratch, &statistics);
        ops::head_loss_backward(
            &x,
            WeightRef::Dense(&w),
            &targets,
            scale,
            buffers,
            &mut dx,
            Some(&mut dw),
        )
        .unwrap();
        check("dx", &dx, &numerical(&x, |x| forward(x, &w).0));
        check("dw", &dw, &numerical(&w, |w| forward(&x, w).0));
    }
}

/// The gradient over x of the loss on a head in 8 and in 4 bits: the derivative of the loss that the decoded numbers give.
#[test]
fn head_loss_on_heads_in_few_bits() {
    let (rows, v, k) = (3, 37, 64);
    let targets = Tensor::from_slice(&[5i32, 36, 0], [rows]);
    let source = random(2, [v, k]).to_dtype(DType::F32);
    let int8 = RowInt8::quantize("w", &source).unwrap();
    let nf4 = QuantTensor::quantize(&source, QuantType::Nf4, true).unwrap();
    let scale = 0.37;
    for (head, decoded) in [
        (WeightRef::Int8(&int8), int8.dequantize()),
        (WeightRef::Quant(&nf4), nf4.dequantize()),
    ] {
        for capacity in [rows * v, rows * 10, rows] {
            let forward = |x: &Tensor, head: WeightRef<'_>| {
                let mut scratch = ops::HeadScratch::of_logits(zeros([capacity]));
                let mut statistics = zeros([rows, ops::STATISTICS]);
                let loss = ops::head_loss(x, head, &targets, &mut scratch, &mut statistics).unwrap();
                (scale * loss, scratch, statistics)
            };
            let x = random(1, [rows, k]);
            let (loss, mut scratch, statistics) = forward(&x, head);
            let wide = decoded.to_dtype(DType::F64);
            let dense = WeightRef::Dense(&wide);
            assert_close("loss", &[loss], &[forward(&x, dense).0], 0.0, 1e-12);
            let mut dx = Tensor::from_slice(&[f64::NAN; 192], [rows, k]);
            let buffers = (&mut scratch, &statistics);
            ops::head_loss_backward(&x, head, &targets, scale, buffers, &mut dx, None).unwrap();
            check("dx", &dx, &numerical(&x, |x| forward(x, dense).0));
        }
    }
}

#[test]
fn dropout() {
    let (x, dy) = (random(1, [3, 50]), random(2, [3, 50]));
    let stream = Stream::new(5, 6);
    let forward = |x: &Tensor| {
        let mut y = zeros([3, 50]);
        ops::dropout(x, 0.4, stream, &mut y).unwrap();
        dot(&y, &dy)
    };
    let mut dx = zeros([3, 50]);
    ops::accumulate_dropout(&dy, 0.4, stream, &mut dx).unwrap();
    check("dx", &dx, &numerical(&x, forward));
    let dropped = dx.as_slice::<f64>().iter().filter(|&&d| d == 0.0).count();
    assert!((30..90).contains(&dropped), "{dropped} of 150 dropped at p = 0.4");
}

#[test]
fn prefix_heads() {
    let (shape, index) = ([3usize, 2, 4, 5], 1);
    let table = random(1, [4, 30]);
    let d = random(2, shape);
    for dropout in [None, Some((0.4, Stream::new(8, 9)))] {
        let forward = |table: &Tensor| {
            let mut y = zeros(shape);
            ops::prefix_heads(table, index, dropout, &mut y).unwrap();
            dot(&y, &d)
        };
        let mut d_table = zeros(table.shape());
        ops::prefix_heads_backward(&d, index, dropout, &mut d_table).unwrap();
        check("d_table", &d_table, &numerical(&table, forward));
    }
}

#[test]
fn tanh() {
    let (x, dy) = (random(1, [20]), random(2, [20]));
    let forward = |x: &Tensor| {
        let mut y = zeros([20]);
        ops::tanh(x, &mut y).unwrap();
        y
    };
    let mut d = dy.clone();
    ops::tanh_backward(&forward(&x), &mut d).unwrap();
    check("dx", &d, &numerical(&x, |x| dot(&forward(x), &dy)));
}

fn toy() -> ModelConfig {
    ModelConfig {
        vocab_size: 40,
        hidden_size: 16,
        inner_hidden_size: 24,
        num_layers: 2,
        num_attention_heads: 2,
        max_sequence_length: 32,
        pad_token_id: 3,
        mask_token_id: 24,
        gmask_token_id: 25,
        bos_token_id: 28,
        eos_token_id: 29,
        ..ModelConfig::chatglm_6b()
    }
}

/// One left-padded and one right-padded sequence.
fn toy_batch() -> Batch {
    let (size, len) = (2, 7);
    let ids: Vec<i32> = (0..size * len).map(|i| (i * 11 % 40) as i32).collect();
    let mut labels = vec![IGNORE; size * len];
    labels[4..7].copy_from_slice(&ids[4..7]);
    labels[len + 2..len + 6].copy_from_slice(&ids[len + 2..len + 6]);
    let positions = [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1], [1, 2], [1, 3]]
        .into_iter()
        .chain([[0, 0], [1, 0], [1, 1], [1, 2], [1, 3], [1, 4], [1, 5]])
        .flatten()
        .collect();
    Batch {
        size,
        len,
        ids,
        labels,
        positions,
        spans: vec![Span { start: 2, context: 4 }, Span { start: 0, context: 2 }],
    }
}

/// Compares the gradient of every trainable parameter (up to 12 of its elements) with central differences.
fn check_model(mut model: Model) {
    let batch = toy_batch();
    let mut ws = model.workspace(batch.size, batch.len).unwrap();
    // B of a new adapter is 0, which would hide A's gradient.
    let mut number = 0;
    model
        .for_each_param_mut(&mut |_, param| {
            if param.trains() {
                number += 1;
                let noise = random(number, param.value.shape());
                for (v, n) in param
                    .value
                    .as_mut_slice::<f64>()
                    .iter_mut()
                    .zip(noise.as_slice::<f64>())
                {
                    *v += 0.3 * n;
                }
            }
            Ok(())
        })
        .unwrap();
    let stream = Stream::new(3, 5);
    let scale = 0.7;
    let loss = model.loss_and_gradients(&mut ws, &batch, scale, stream).unwrap();
    assert_eq!(loss.tokens, batch.supervised());
    let mut gradients: Vec<(String, Vec<f64>)> = Vec::new();
    model.for_each_param(&mut |name, param| {
        if let Some(grad) = &param.grad {
            gradients.push((name.to_string(), grad.as_slice().to_vec()));
        }
    });
    assert!(!gradients.is_empty());
    let nudge = |model: &mut Model, name: &str, i: usize, by: f64| {
        model
            .for_each_param_mut(&mut |n, param| {
                if n == name {
                    param.value.as_mut_slice::<f64>()[i] += by;
                }
                Ok(())
            })
            .unwrap();
    };
    for (name, gradient) in &gradients {
        let stride = gradient.len().div_ceil(12).max(1);
        for i in (0..gradient.len()).step_by(stride) {
            nudge(&mut model, name, i, H);
            let up = model
                .loss_and_gradients(&mut ws, &batch, scale, stream)
                .unwrap()
                .nll_sum;
            nudge(&mut model, name, i, -2.0 * H);
            let down = model
                .loss_and_gradients(&mut ws, &batch, scale, stream)
                .unwrap()
                .nll_sum;
            nudge(&mut model, name, i, H);
            let numerical = scale * (up - down) / (2.0 * H);
            assert_close(
                &format!("{name}[{i}]"),
                &gradient[i..=i],
                &[numerical],
                2e-8,
                2e-6,
            );
        }
    }
}

#[test]
fn whole_model_every_parameter() {
    let options = LoadOptions {
        compute: Compute::cpu(DType::F64),
        weights: Weights::AsStored,
        ..LoadOptions::default()
    };
    let mut model = Model::initialize(&toy(), 1, &options).unwrap();
    tune::apply(&mut model, &Tuning::Full, 1).unwrap();
    check_model(model);
}

#[test]
fn whole_model_lora_with_dropout_on_dense_and_quantised_weights() {
    let quantized = Weights::Quantized {
        quant_type: QuantType::Nf4,
        double_quant: true,
    };
    let all = LoraTarget::ALL.to_vec();
    let some = vec![LoraTarget::QueryKeyValue, LoraTarget::Dense4HToH];
    for (weights, targets, dropout, rslora) in [
        (Weights::AsStored, all.clone(), 0.0, false),
        (quantized, all, 0.3, false),
        (quantized, some, 0.2, true),
    ] {
        let mut model = Model::initialize(
            &toy(),
            1,
            &LoadOptions {
                compute: Compute::cpu(DType::F64),
                weights,
                ..LoadOptions::default()
            },
        )
        .unwrap();
        tune::apply(
            &mut model,
            &Tuning::Lora(tune::LoraConfig {
                r: 3,
                alpha: 6.0,
                dropout,
                rslora,
                targets,
                ..tune::LoraConfig::default()
            }),
            1,
        )
        .unwrap();
        check_model(model);
    }
}

#[test]
fn whole_model_with_a_prefix() {
    let quantized = Weights::Quantized {
        quant_type: QuantType::Nf4,
        double_quant: true,
    };
    for (weights, projection, dropout) in [
        (Weights::AsStored, false, 0.0),
        (Weights::AsStored, true, 0.0),
        (quantized, false, 0.3),
        (Weights::AsStored, true, 0.3),
    ] {
        let compute = Compute::cpu(DType::F64);
        let mut model = Model::initialize(
            &toy(),
            1,
            &LoadOptions {
                compute,
                weights,
                ..LoadOptions::default()
            },
        )
        .unwrap();
        let config = PrefixConfig {
            pre_seq_len: 3,
            projection,
            dropout,
        };
        tune::apply(&mut model, &Tuning::PTuning(config), 1).unwrap();
        let mut trained = 0;
        model.for_each_param(&mut |_, param| trained += usize::from(param.trains()));
        assert_eq!(trained, if projection { 5 } else { 1 });
        check_model(model);
    }
}

#[test]
fn whole_model_with_some_layers_frozen() {
    use tune::FreezeModules::{All, Attention, Mlp};
    for (layers, modules, tensors) in [(1, All, 12), (-1, Mlp, 4), (2, Attention, 8)] {
        let compute = Compute::cpu(DType::F64);
        let weights = Weights::AsStored;
        let mut model = Model::initialize(
            &toy(),
            1,
            &LoadOptions {
                compute,
                weights,
                ..LoadOptions::default()
            },
        )
        .unwrap();
        tune::apply(&mut model, &Tuning::Freeze { layers, modules }, 1).unwrap();
        let mut trained = Vec::new();
        model.for_each_param(&mut |name, param| {
            if param.trains() {
                trained.push(name.to_string());
            }
        });
        assert_eq!(trained.len(), tensors, "{trained:?}");
        check_model(model);
    }
}

#[test]
fn whole_model_modules_to_save_and_noise() {
    for tied in [true, false] {
        let options = LoadOptions {
            compute: Compute::cpu(DType::F64),
            weights: Weights::AsStored,
            ..LoadOptions::default()
        };
        let mut model = Model::initialize(&toy(), 1, &options).unwrap();
        if !tied {
            tune::untie_head(&mut model).unwrap();
        }
        let config = tune::LoraConfig {
            r: 2,
            dropout: 0.2,
            targets: vec![LoraTarget::Dense],
            modules_to_save: match tied {
                true => vec![
                    tune::SavedModule::WordEmbeddings,
                    tune::SavedModule::FinalLayernorm,
                ],
                false => tune::SavedModule::ALL.to_vec(),
            },
            ..tune::LoraConfig::default()
        };
        tune::apply(&mut model, &Tuning::Lora(config), 1).unwrap();
        // The noise is a constant to the gradient, the same in every pass of one number.
        model.set_neftune(5.0).unwrap();
        check_model(model);
    }
}

/// DoRA as PEFT computes it, written out: `x̃` is what dropout leaves of x, and the norm n is a constant.
struct NaiveDora<'a> {
    w: &'a [f64],
    bias: &'a [f64],
    residual: &'a [f64],
    norms: Vec<f64>,
    scale: f64,
    dims: [usize; 4],
}

impl NaiveDora<'_> {
    fn adapted(w: &[f64], a: &[f64], b: &[f64], scale: f64, [_, out, input, r]: [usize; 4]) -> Vec<f64> {
        let element = |i: usize| {
            (0..r)
                .map(|j| b[i / input * r + j] * a[j * input + i % input])
                .sum::<f64>()
        };
        (0..out * input).map(|i| w[i] + scale * element(i)).collect()
    }

    fn forward(&self, x: &[f64], seen: &[f64], a: &[f64], b: &[f64], magnitude: &[f64]) -> Vec<f64> {
        let [rows, out, input, r] = self.dims;
        let times = |x: &[f64], m: usize, w: &[f64], i: usize, k: usize| {
            (0..k).map(|l| x[m * k + l] * w[i * k + l]).sum::<f64>()
        };
        let u: Vec<f64> = (0..rows * r)
            .map(|i| times(seen, i / r, a, i % r, input))
            .collect();
        (0..rows * out)
            .map(|at| {
                let (m, i) = (at / out, at % out);
                let gain = magnitude[i] / self.norms[i];
                let plain = times(x, m, self.w, i, input) + self.bias[i] + 1.5 * self.residual[at];
                let low = self.scale * times(&u, m, b, i, r);
                plain + (gain - 1.0) * times(seen, m, self.w, i, input) + gain * low
            })
            .collect()
    }
}

#[test]
fn dora_on_dense_and_quantised_weights() {
    use glmtune::nn::{Linear, Lora, Param, Scratch, Weight};
    let dims @ [rows, out, input, r] = [5, 6, 64, 3];
    let compute = Compute::cpu(DType::F64);
    let stream = Stream::new(11, 12);
    for (quantized, dropout) in [(false, 0.0), (false, 0.4), (true, 0.0), (true, 0.4)] {
        let dense = random(1, [out, input]);
        let four = QuantTensor::quantize(&dense.to_dtype(DType::F32), QuantType::Nf4, true).unwrap();
        let (weight, w) = match quantized {
            true => (
                Weight::Quant(Box::new(four.clone())),
                four.dequantize().to_f64_vec(),
            ),
            false => (Weight::Dense(Param::frozen(dense.clone())), dense.to_f64_vec()),
        };
        let (a, b, bias) = (random(2, [r, input]), random(3, [out, r]), random(4, [out]));
        let mut linear = Linear {
            weight,
            bias: Some(Param::frozen(bias.clone())),
            lora: Some(Lora {
                a: Param::trainable(a.clone()).unwrap(),
                b: Param::trainable(b.clone()).unwrap(),
                scale: 0.6,
                dropout,
                dora: None,
                found: None,
            }),
        };
        linear.start_dora().unwrap();
        let adapted = NaiveDora::adapted(&w, a.as_slice(), b.as_slice(), 0.6, dims);
        let norms = adapted
            .chunks_exact(input)
            .map(|row| row.iter().map(|w| w * w).sum::<f64>().sqrt());
        let norms: Vec<f64> = norms.collect();
        let lora = linear.lora.as_mut().unwrap();
        let magnitude = lora.dora.as_mut().unwrap().magnitude_mut();
        assert_close(
            "m starts as the norm",
            magnitude.value.as_slice(),
            &norms,
            1e-6,
            1e-6,
        );
        // Away from the start, where the gain is 1.
        magnitude.value = random(5, [out]);
        let m = magnitude.value.clone();
        let (x, dy, residual) = (
            random(6, [rows, input]),
            random(7, [rows, out]),
            random(8, [rows, out]),
        );
        let mut mask = zeros([rows, input]);
        let ones = Tensor::from_slice(&vec![1f64; rows * input], [rows, input]);
        ops::dropout(&ones, dropout, stream, &mut mask).unwrap();
        let naive = NaiveDora {
            w: &w,
            bias: bias.as_slice(),
            residual: residual.as_slice(),
            norms,
            scale: 0.6,
            dims,
        };
        let run = |x: &Tensor, a: &Tensor, b: &Tensor, m: &Tensor| {
            let x: &[f64] = x.as_slice();
            let seen: Vec<f64> = x.iter().zip(mask.as_slice::<f64>()).map(|(x, k)| x * k).collect();
            let y = naive.forward(x, &seen, a.as_slice(), b.as_slice(), m.as_slice());
            Tensor::from_slice(&y, [rows, out])
        };
        let mut scratch = Scratch::new(compute, rows, std::iter::once(&linear)).unwrap();
        let mut activations = linear.activations(compute, rows).unwrap();
        let mut y = zeros([rows, out]);
        let drop = (dropout > 0.0).then_some(stream);
        linear
            .forward(
                &x,
                None,
                Some((1.5, &residual)),
                drop,
                &mut activations,
                &mut scratch,
                &mut y,
            )
            .unwrap();
        let want = run(&x, &a, &b, &m);
        assert_close("y", y.as_slice(), want.as_slice(), 1e-10, 1e-10);
        let (mut dx, extra) = (zeros([rows, input]), random(9, [rows, input]));
        linear
            .backward(
                &x,
                None,
                &dy,
                Some((2.0, &extra)),
                drop,
                &activations,
                &mut scratch,
                Some(&mut dx),
            )
            .unwrap();
        for (dx, extra) in dx.as_mut_slice::<f64>().iter_mut().zip(extra.as_slice::<f64>()) {
            *dx -= 2.0 * extra;
        }
        check("dora dx", &dx, &numerical(&x, |x| dot(&run(x, &a, &b, &m), &dy)));
        let lora = linear.lora.as_ref().unwrap();
        let gradient = |p: &Param| p.grad.clone().unwrap();
        check(
            "dora dA",
            &gradient(&lora.a),
            &numerical(&a, |a| dot(&run(&x, a, &b, &m), &dy)),
        );
        check(
            "dora dB",
            &gradient(&lora.b),
            &numerical(&b, |b| dot(&run(&x, &a, b, &m), &dy)),
        );
        let dm = gradient(lora.dora.as_ref().unwrap().magnitude());
        check("dora dm", &dm, &numerical(&m, |m| dot(&run(&x, &a, &b, m), &dy)));
    }
}

#[test]
fn a_batch_without_labels_gives_no_gradient() {
    let options = LoadOptions {
        compute: Compute::cpu(DType::F64),
        weights: Weights::AsStored,
        ..LoadOptions::default()
    };
    let mut model = Model::initialize(&toy(), 1, &options).unwrap();
    tune::apply(&mut model, &Tuning::Full, 1).unwrap();
    let mut batch = toy_batch();
    batch.labels.fill(IGNORE);
    let mut ws = model.workspace(batch.size, batch.len).unwrap();
    let loss = model
        .loss_and_gradients(&mut ws, &batch, 1.0, Stream::new(0, 0))
        .unwrap();
    assert_eq!((loss.nll_sum, loss.tokens), (0.0, 0));
    model.for_each_param(&mut |name, param| {
        assert!(
            param
                .grad
                .as_ref()
                .unwrap()
                .as_slice::<f64>()
                .iter()
                .all(|&g| g == 0.0),
            "{name}"
        );
    });
}
