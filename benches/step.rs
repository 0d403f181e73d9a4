//! One optimizer step of a small ChatGLM on the CPU: `cargo bench --bench step -- [--json] [--threads N] [--mode M]`.
//!
//! Prints tokens a second of forward, backward and AdamW for each configuration and mode; `benches/peer/` runs the same
//! configurations in PyTorch, interleaved with this program.

use std::time::Instant;

use glmtune::data::batch::{Batch, IGNORE, Span};
use glmtune::model::tune::{self, LoraConfig, LoraTarget, Tuning};
use glmtune::model::{LoadOptions, Model, ModelConfig, Weights};
use glmtune::ops;
use glmtune::quant::QuantType;
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Tensor};

struct Setup {
    name: &'static str,
    hidden: usize,
    layers: usize,
    heads: usize,
    vocabulary: usize,
    size: usize,
    len: usize,
}

const SETUPS: [Setup; 3] = [
    Setup {
        name: "h128",
        hidden: 128,
        layers: 4,
        heads: 4,
        vocabulary: 1024,
        size: 2,
        len: 64,
    },
    Setup {
        name: "h256",
        hidden: 256,
        layers: 4,
        heads: 4,
        vocabulary: 4096,
        size: 2,
        len: 128,
    },
    Setup {
        name: "h512",
        hidden: 512,
        layers: 6,
        heads: 8,
        vocabulary: 8192,
        size: 1,
        len: 128,
    },
];

fn config(s: &Setup) -> ModelConfig {
    let v = s.vocabulary as u32;
    ModelConfig {
        vocab_size: s.vocabulary,
        hidden_size: s.hidden,
        inner_hidden_size: 4 * s.hidden,
        num_layers: s.layers,
        num_attention_heads: s.heads,
        max_sequence_length: 512,
        pad_token_id: 3,
        mask_token_id: v - 16,
        gmask_token_id: v - 15,
        bos_token_id: v - 12,
        eos_token_id: v - 11,
        ..ModelConfig::chatglm_6b()
    }
}

/// A quarter of each sequence is context; all the rest is supervised.
fn batch(s: &Setup) -> Batch {
    let rows = s.size * s.len;
    let context = s.len / 4;
    let stream = Stream::new(1, 1);
    let ids: Vec<i32> = (0..rows as u64)
        .map(|i| stream.below(i, s.vocabulary) as i32)
        .collect();
    let mut labels = ids.clone();
    let mut positions = Vec::new();
    for b in 0..s.size {
        labels[b * s.len..b * s.len + context].fill(IGNORE);
        for t in 0..s.len {
            let block = (t + 1).saturating_sub(context);
            positions.extend([t.min(context - 1) as i32, block as i32]);
        }
    }
    Batch {
        size: s.size,
        len: s.len,
        ids,
        labels,
        positions,
        spans: vec![Span { start: 0, context }; s.size],
    }
}

fn tokens_per_second(s: &Setup, mode: &str, seconds: f64) -> f64 {
    let weights = match mode {
        "qlora" => Weights::Quantized {
            quant_type: QuantType::Nf4,
            double_quant: true,
        },
        _ => Weights::AsStored,
    };
    let options = LoadOptions {
        compute: Compute::cpu(DType::F32),
        weights,
        ..LoadOptions::default()
    };
    let mut model = Model::initialize(&config(s), 1, &options).expect("a valid configuration");
    let tuning = match mode {
        "full" => Tuning::Full,
        _ => Tuning::Lora(LoraConfig {
            targets: LoraTarget::ALL.to_vec(),
            ..LoraConfig::default()
        }),
    };
    tune::apply(&mut model, &tuning, 1).expect("a valid tuning");
    let batch = batch(s);
    let mut ws = model.workspace(s.size, s.len).expect("a workspace");
    let mut moments: Vec<(Tensor, Tensor)> = Vec::new();
    model.for_each_param(&mut |_, p| {
        if let Some(g) = &p.grad {
            moments.push((
                Tensor::zeros(DType::F32, g.shape()),
                Tensor::zeros(DType::F32, g.shape()),
            ));
        }
    });
    let scale = 1.0 / batch.supervised() as f64;
    let factors = ops::AdamW {
        clip: 1.0,
        one_minus_beta1: 0.1,
        beta2: 0.999,
        one_minus_beta2: 0.001,
        sqrt_correction2: 0.5,
        epsilon: 1e-8,
    };
    let mut step = |i: u64| {
        let loss = model
            .loss_and_gradients(&mut ws, &batch, scale, Stream::new(1, i))
            .expect("a step");
        assert!(loss.mean().is_finite());
        let mut moments = moments.iter_mut();
        let update = model.for_each_param_mut(&mut |_, p| {
            if let Some(g) = &mut p.grad {
                let (m, v) = moments.next().expect("as many moments as gradients");
                let slot = ops::AdamwSlot {
                    m,
                    v,
                    spans: vec![ops::Span::whole(&mut p.value, g, 1e-5, 1.0)],
                };
                ops::adamw(&mut [slot], &factors)?;
                g.bytes_mut().fill(0);
            }
            Ok(())
        });
        update.expect("an update");
    };
    for i in 0..3 {
        step(i);
    }
    let start = Instant::now();
    let mut steps = 0;
    while start.elapsed().as_secs_f64() < seconds {
        step(3 + steps);
        steps += 1;
    }
    (steps as usize * s.size * s.len) as f64 / start.elapsed().as_secs_f64()
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |flag: &str| {
        arguments
            .iter()
            .position(|a| a == flag)
            .and_then(|i| arguments.get(i + 1))
            .cloned()
    };
    let threads: usize = value("--threads").and_then(|n| n.parse().ok()).unwrap_or(2);
    let seconds: f64 = value("--seconds").and_then(|n| n.parse().ok()).unwrap_or(2.0);
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .expect("one thread pool");
    for s in &SETUPS {
        if value("--config").is_some_and(|c| c != s.name) {
            continue;
        }
        for mode in ["lora", "qlora", "full"] {
            if value("--mode").is_some_and(|m| m != mode) {
                continue;
            }
            let rate = tokens_per_second(s, mode, seconds);
            if arguments.iter().any(|a| a == "--json") {
                println!(
                    "{}",
                    serde_json::json!({"config": s.name, "mode": mode, "threads": threads, "tokens_per_second": rate})
                );
            } else {
                println!("{:5} {mode:5} {threads} threads {rate:10.0} tokens/s", s.name);
            }
        }
    }
}
