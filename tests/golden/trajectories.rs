//! Training runs of 20 steps, step by step, against PyTorch and PEFT: LoRA and QLoRA.

use std::path::Path;

use glmtune::checkpoint::Checkpoint;
use glmtune::config::LossReduction;
use glmtune::data::batch::{Batch, Span};
use glmtune::model::{LoadOptions, Model, ModelConfig, Weights, tune};
use glmtune::optim::OptimizerConfig;
use glmtune::quant::QuantType;
use glmtune::schedule::{Schedule, Scheduler};
use glmtune::tensor::{Compute, DType, Tensor};
use glmtune::train::{Options, Trainer};
use serde_json::Value;

use crate::common::{
    assert_close, exact_computes, golden, half_computes, read_safetensors, relative_l2, tolerance, values,
};

pub const FOLDER: &str = "chatglm_v1/trajectories";

/// Sequences `[B, S]` as the official model sees them without mask and positions: derived from the ids.
pub fn batch(config: &ModelConfig, ids: &[i64], labels: &[i64], len: usize) -> Batch {
    let narrow = |x: &[i64]| x.iter().map(|&x| x as i32).collect::<Vec<_>>();
    let size = ids.len() / len;
    let (mut positions, mut spans) = (Vec::new(), Vec::new());
    for row in ids.chunks_exact(len) {
        let first = |id: u32| row.iter().position(|&x| x == i64::from(id));
        let context = first(config.bos_token_id).expect("a sequence has <sop>");
        let mask = first(config.gmask_token_id)
            .or(first(config.mask_token_id))
            .expect("a sequence has a mask");
        for i in 0..len {
            let (position, block) = if i < context {
                (i, 0)
            } else {
                (mask, i - context + 1)
            };
            positions.extend([position as i32, block as i32]);
        }
        spans.push(Span { start: 0, context });
    }
    Batch {
        size,
        len,
        ids: narrow(ids),
        labels: narrow(labels),
        positions,
        spans,
    }
}

pub fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .expect("a list")
        .iter()
        .map(|x| x.as_f64().expect("a number"))
        .collect()
}

pub fn load(kind: &str, compute: Compute) -> Option<Model> {
    let dir = golden("chatglm_v1/checkpoint_fp32_safetensors")
        .or_else(|| golden("chatglm_v1/checkpoint_fp16_bin"))?;
    let weights = match kind {
        "qlora" => Weights::Quantized {
            quant_type: QuantType::Nf4,
            double_quant: true,
        },
        _ => Weights::AsStored,
    };
    Some(
        Model::load(
            &Checkpoint::open(&dir).unwrap(),
            &LoadOptions {
                compute,
                weights,
                ..LoadOptions::default()
            },
        )
        .unwrap(),
    )
}

/// The steps of a run: losses, gradient norms, learning rates; and the trainer after the last.
pub struct Walk {
    pub trainer: Trainer,
    pub losses: Vec<f64>,
    pub norms: Vec<f64>,
    pub rates: Vec<f64>,
    /// Gradients of the first step by name, before clipping.
    pub first: Vec<(String, Vec<f64>)>,
}

pub fn trajectory(dir: &Path) -> Value {
    let text = std::fs::read_to_string(dir.join("trajectory.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn walk(run: &str, dir: &Path, compute: Compute) -> Option<Walk> {
    let want = trajectory(dir);
    let mut model = load(want["hyperparameters"]["kind"].as_str().unwrap(), compute)?;
    tune::load_adapter(&mut model, &dir.join("initial_adapter"), true).unwrap();
    Some(walk_on(model, run, dir))
}

/// The steps of a run, from a model that trains.
pub fn walk_on(model: Model, run: &str, dir: &Path) -> Walk {
    let want = trajectory(dir);
    let h = &want["hyperparameters"];
    let number = |key: &str| h[key].as_f64();
    let config = model.config().clone();
    let batches = read_safetensors(&dir.join("batches.safetensors"));
    let (ids, labels) = (&batches["input_ids"], &batches["labels"]);
    let shape = ids.shape();
    let [steps, middle @ .., size, len] = shape.extents() else {
        panic!("{run}: input_ids")
    };
    let (steps, size, len, accumulation) = (*steps, *size, *len, middle.first().copied().unwrap_or(1));

    let schedule = h["schedule"].as_str().unwrap();
    let options = Options {
        optimizer: OptimizerConfig {
            beta1: h["betas"][0].as_f64().unwrap(),
            beta2: h["betas"][1].as_f64().unwrap(),
            epsilon: number("eps").unwrap(),
            weight_decay: number("weight_decay").unwrap(),
            exclude_bias_and_norm: h["hf_groups"] == true,
            ..OptimizerConfig::default()
        },
        schedule: Schedule {
            scheduler: Scheduler::ALL.into_iter().find(|s| s.name() == schedule).unwrap(),
            base: number("lr").unwrap(),
            warmup_steps: h["warmup_steps"].as_u64().unwrap_or(0),
            total_steps: steps as u64,
            ..Schedule::default()
        },
        max_grad_norm: number("max_grad_norm").unwrap_or(0.0),
        in_backward: false,
        reduction: LossReduction::MicroBatch,
        seed: 0,
    };
    let mut trainer = Trainer::new(model, options, size, len).unwrap();
    let (mut losses, mut norms, mut rates, mut first) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let rows = |t: &Tensor, i: usize| t.as_slice::<i64>()[i * size * len..][..size * len].to_vec();
    for step in 0..steps {
        let micro_batches: Vec<Batch> = (step * accumulation..(step + 1) * accumulation)
            .map(|i| batch(&config, &rows(ids, i), &rows(labels, i), len))
            .collect();
        let report = trainer.step(&micro_batches).unwrap();
        losses.push(report.loss);
        norms.push(report.grad_norm);
        rates.push(report.learning_rate);
        if step == 0 {
            let scale = report.loss_scale.map_or(1.0, |s| s.scale);
            trainer.model().for_each_param(&mut |name, param| {
                if let Some(grad) = &param.grad {
                    let grad = values(grad).into_iter().map(|g| g / scale).collect();
                    first.push((name.to_string(), grad));
                }
            });
        }
    }
    Walk {
        trainer,
        losses,
        norms,
        rates,
        first,
    }
}

fn check(run: &str, dir: &Path, compute: Compute) -> Option<()> {
    let want = trajectory(dir);
    let tolerance = tolerance(&format!("{FOLDER}/{run}/"));
    let bound = |key: &str| {
        tolerance[key]
            .as_f64()
            .unwrap_or_else(|| panic!("{run}: tolerance {key}"))
    };
    let Walk {
        trainer,
        losses,
        norms,
        rates,
        ..
    } = walk(run, dir, compute)?;
    assert_close(
        &format!("{run}: learning rates"),
        &rates,
        &numbers(&want["lr"]),
        1e-18,
        1e-9,
    );
    assert_close(
        &format!("{run}: losses"),
        &losses,
        &numbers(&want["loss"]),
        bound("loss_abs"),
        0.0,
    );
    assert_close(
        &format!("{run}: norms"),
        &norms,
        &numbers(&want["grad_norm"]),
        0.0,
        bound("grad_norm_rel"),
    );

    let initial = read_safetensors(&dir.join("initial_adapter/adapter_model.safetensors"));
    let mut last = read_safetensors(&dir.join("final_adapter/adapter_model.safetensors"));
    let (mut inside, mut all) = (0, 0);
    for (name, tensor) in tune::adapter_tensors(trainer.model()).unwrap() {
        let (got, start) = (tensor.to_f64_vec(), initial[&name].to_f64_vec());
        let want = last
            .remove(&name)
            .unwrap_or_else(|| panic!("{run}: PEFT trained no {name}"))
            .to_f64_vec();
        let minus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>();
        let error = relative_l2(&minus(&got, &start), &minus(&want, &start));
        let most = bound("final_update_rel_l2_per_tensor");
        assert!(
            error <= most,
            "{run}: {name}: the update differs by {error} (most {most})"
        );
        let near = bound("final_param_abs_for_99_9_percent_of_elements");
        inside += got
            .iter()
            .zip(&want)
            .filter(|(g, w)| (*g - *w).abs() <= near)
            .count();
        all += got.len();
    }
    assert!(last.is_empty(), "{run}: not trained here: {:?}", last.keys());
    let share = inside as f64 / all as f64;
    assert!(
        share >= 0.999,
        "{run}: {share} of the final elements are within the tolerance"
    );
    Some(())
}

/// The trajectories of the set that start from an adapter.
fn runs() -> Vec<(String, std::path::PathBuf)> {
    let Some(folder) = golden(FOLDER) else {
        return Vec::new();
    };
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut runs: Vec<_> = entries
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), e.path()))
        .filter(|(_, dir)| dir.join("initial_adapter").is_dir())
        .collect();
    runs.sort();
    runs
}

#[test]
fn training_walks_the_path_of_pytorch() {
    for compute in exact_computes() {
        let mut checked = 0;
        for (run, dir) in runs() {
            if check(&run, &dir, compute).is_some() {
                eprintln!("{run} on {}: as PyTorch", compute.device);
                checked += 1;
            }
        }
        assert!(checked > 0, "no LoRA trajectory in the set");
    }
}

/// In fp16 and bf16 the first step's gradients and every step's loss are those of f32 within what the type can tell.
///
/// A gradient is a chain of products of rounded numbers: each of the three blocks rounds its activations and their
/// gradients some ten times, so `|g - g32| / |g32|` is near `sqrt(60) u`, `u` being half an epsilon (2^-11, 2^-8); 16 u
/// is twice that. The losses (near ln V = 7) are means over tokens of differences of logits of size 10: 16 u as well.
#[test]
fn training_in_half_precision_stays_beside_pytorch() {
    for compute in half_computes() {
        let unit = match compute.dtype {
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        for (run, dir) in runs() {
            let Some(walk) = walk(&run, &dir, compute) else {
                continue;
            };
            let what = format!("{run} in {}", compute.dtype);
            let want = read_safetensors(&dir.join("step0_grads.safetensors"));
            let mut worst = 0f64;
            for (name, got) in &walk.first {
                let want = want
                    .get(name)
                    .or_else(|| want.get(&name.replace(".weight", ".default.weight")))
                    .unwrap_or_else(|| panic!("{what}: no golden gradient of {name}"));
                // B starts at 0, so A has no gradient in the first step.
                let want = want.to_f64_vec();
                if want.iter().all(|&g| g == 0.0) {
                    assert!(got.iter().all(|&g| g == 0.0), "{what}: {name}");
                    continue;
                }
                worst = worst.max(relative_l2(got, &want));
            }
            let losses = numbers(&trajectory(&dir)["loss"]);
            let off = walk.losses.iter().zip(&losses).map(|(a, b)| (a - b).abs());
            let off = off.fold(0.0, f64::max);
            eprintln!(
                "{what}: gradients within {worst:.2e}, losses within {off:.2e} ({:.2e})",
                16.0 * unit
            );
            assert!(worst <= 16.0 * unit, "{what}: gradients differ by {worst}");
            assert!(off <= 16.0 * unit, "{what}: losses differ by {off}");
        }
    }
}
