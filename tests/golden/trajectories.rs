//! Training runs of 20 steps, step by step, against PyTorch and PEFT: LoRA and QLoRA.

use std::path::Path;

use glmtune::checkpoint::Checkpoint;
use glmtune::config::LossReduction;
use glmtune::data::batch::{Batch, Span};
use glmtune::model::{LoadOptions, Model, ModelConfig, Weights, tune};
use glmtune::optim::AdamWConfig;
use glmtune::quant::QuantType;
use glmtune::schedule::{Schedule, Scheduler};
use glmtune::tensor::{DType, Tensor};
use glmtune::train::{Options, Trainer};
use serde_json::Value;

use crate::common::{assert_close, golden, read_safetensors, relative_l2, tolerance};

const FOLDER: &str = "chatglm_v1/trajectories";

/// Sequences `[B, S]` as the official model sees them without mask and positions: derived from the ids.
fn batch(config: &ModelConfig, ids: &[i64], labels: &[i64], len: usize) -> Batch {
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

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .expect("a list")
        .iter()
        .map(|x| x.as_f64().expect("a number"))
        .collect()
}

fn load(kind: &str) -> Option<Model> {
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
                compute: DType::F32,
                weights,
            },
        )
        .unwrap(),
    )
}

fn check(run: &str, dir: &Path) -> Option<()> {
    let text = std::fs::read_to_string(dir.join("trajectory.json")).unwrap();
    let want: Value = serde_json::from_str(&text).unwrap();
    let tolerance = tolerance(&format!("{FOLDER}/{run}/"));
    let bound = |key: &str| {
        tolerance[key]
            .as_f64()
            .unwrap_or_else(|| panic!("{run}: tolerance {key}"))
    };
    let h = &want["hyperparameters"];
    let number = |key: &str| h[key].as_f64();

    let mut model = load(h["kind"].as_str().unwrap())?;
    tune::load_adapter(&mut model, &dir.join("initial_adapter"), true).unwrap();
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
        adamw: AdamWConfig {
            beta1: h["betas"][0].as_f64().unwrap(),
            beta2: h["betas"][1].as_f64().unwrap(),
            epsilon: number("eps").unwrap(),
            weight_decay: number("weight_decay").unwrap(),
            exclude_bias_and_norm: true,
        },
        schedule: Schedule {
            scheduler: Scheduler::ALL.into_iter().find(|s| s.name() == schedule).unwrap(),
            base: number("lr").unwrap(),
            warmup_steps: h["warmup_steps"].as_u64().unwrap_or(0),
            total_steps: steps as u64,
        },
        max_grad_norm: number("max_grad_norm").unwrap_or(0.0),
        reduction: LossReduction::MicroBatch,
        seed: 0,
    };
    let mut trainer = Trainer::new(model, options, size, len).unwrap();
    let (mut losses, mut norms, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    let rows = |t: &Tensor, i: usize| t.as_slice::<i64>()[i * size * len..][..size * len].to_vec();
    for step in 0..steps {
        let micro_batches: Vec<Batch> = (step * accumulation..(step + 1) * accumulation)
            .map(|i| batch(&config, &rows(ids, i), &rows(labels, i), len))
            .collect();
        let report = trainer.step(&micro_batches).unwrap();
        losses.push(report.loss);
        norms.push(report.grad_norm);
        rates.push(report.learning_rate);
    }
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
    for (name, tensor) in tune::adapter_tensors(trainer.model()) {
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

/// Every trajectory of the set that starts from an adapter.
#[test]
fn training_walks_the_path_of_pytorch() {
    let Some(folder) = golden(FOLDER) else { return };
    let mut checked = 0;
    let mut names: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    for name in names {
        let run = name.to_str().unwrap();
        let dir = folder.join(run);
        if dir.join("initial_adapter").is_dir() && check(run, &dir).is_some() {
            eprintln!("{run}: as PyTorch");
            checked += 1;
        }
    }
    assert!(checked > 0, "no LoRA trajectory in {}", folder.display());
}
