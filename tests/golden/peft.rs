//! DoRA, PiSSA, rsLoRA, LoRA+ and `modules_to_save`, step by step against PEFT (`tests/goldens/make_peft.py`).

use std::path::{Path, PathBuf};

use glmtune::checkpoint::{Checkpoint, write_safetensors};
use glmtune::data::batch::Batch;
use glmtune::factor;
use glmtune::model::tune::{self, LoraConfig, LoraInit, LoraTarget, SavedModule, Tuning};
use glmtune::model::{LoadOptions, Model, Weights};
use glmtune::quant::QuantType;
use glmtune::rng::Stream;
use glmtune::tensor::{Compute, DType, Tensor};
use serde_json::Value;

use crate::common::{
    Tensors, assert_close, exact_computes, golden, half_computes, read_safetensors, relative_l2, values,
};
use crate::trajectories::batch;

/// The set of this repository: small enough to be whole.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/peft")
}

fn cases() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder()).unwrap().map(|e| e.unwrap().path());
    let mut cases: Vec<_> = entries.filter(|path| path.join("case.json").exists()).collect();
    cases.sort();
    assert!(cases.len() >= 8, "{cases:?}");
    cases
}

fn case(dir: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(dir.join("case.json")).unwrap()).unwrap()
}

fn names(value: &Value) -> Vec<&str> {
    let names = value.as_array().map(Vec::as_slice).unwrap_or_default();
    names.iter().map(|name| name.as_str().unwrap()).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    let list = value.as_array().expect("a list");
    list.iter().map(|x| x.as_f64().expect("a number")).collect()
}

fn config(case: &Value) -> LoraConfig {
    let peft = &case["peft_config"];
    let flag = |key: &str| peft[key].as_bool().unwrap_or(false);
    let targets = names(&peft["target_modules"]);
    let init = match peft["init_lora_weights"].as_str() {
        None => LoraInit::Kaiming,
        Some("pissa") => LoraInit::Pissa { iterations: None },
        Some(name) => LoraInit::Pissa {
            iterations: Some(name.strip_prefix("pissa_niter_").unwrap().parse().unwrap()),
        },
    };
    LoraConfig {
        r: peft["r"].as_u64().unwrap() as usize,
        alpha: peft["lora_alpha"].as_f64().unwrap(),
        rslora: flag("use_rslora"),
        dora: flag("use_dora"),
        targets: LoraTarget::ALL
            .into_iter()
            .filter(|t| targets.contains(&t.name()))
            .collect(),
        modules_to_save: names(&peft["modules_to_save"])
            .into_iter()
            .map(|m| m.parse().unwrap())
            .collect(),
        init,
        ..LoraConfig::default()
    }
}

/// The base in float32, as PEFT had it: what PiSSA leaves is rounded to the type that the base is held in.
fn base_folder(into: &Path) -> Option<()> {
    let source = golden("chatglm_v1/checkpoint_fp16_bin")?;
    let checkpoint = Checkpoint::open(&source).unwrap();
    let named = checkpoint.config().tensors().into_iter().map(|(name, _)| name);
    let tensors: Vec<(String, Tensor)> = named
        .map(|name| {
            let tensor = checkpoint.tensor(&name).unwrap().to_dtype(DType::F32);
            (name, tensor)
        })
        .collect();
    let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    write_safetensors(&into.join("model.safetensors"), &borrowed, &Default::default()).unwrap();
    std::fs::copy(source.join("config.json"), into.join("config.json")).unwrap();
    Some(())
}

fn base(dir: &Path, case: &Value, compute: Compute) -> Model {
    let weights = match case["base"].as_str() {
        Some("dense") => Weights::AsStored,
        _ => Weights::Quantized {
            quant_type: QuantType::Nf4,
            double_quant: true,
        },
    };
    Model::load(
        &Checkpoint::open(dir).unwrap(),
        &LoadOptions {
            compute,
            weights,
            ..LoadOptions::default()
        },
    )
    .unwrap()
}

/// PEFT's names in a state dictionary are ours but for the parameter inside the module of magnitudes, and modules that train
/// whole bear PEFT's prefix there.
fn peft_name(name: &str) -> String {
    let name = match name.strip_prefix("base_model.model.") {
        Some(_) => name.to_string(),
        None => format!("base_model.model.{name}"),
    };
    match name.ends_with("lora_magnitude_vector") {
        true => name + ".weight",
        false => name,
    }
}

/// A large tensor of the set by the rows that the set keeps of it.
fn kept(tensor: &Tensor, rows: &[i64]) -> Vec<f64> {
    let all = values(tensor);
    let (m, n) = tensor.shape().rows_and_columns();
    if m <= 1000 {
        return all;
    }
    rows.iter()
        .flat_map(|&row| all[row as usize * n..][..n].to_vec())
        .collect()
}

struct Walk {
    model: Model,
    losses: Vec<f64>,
    norms: Vec<f64>,
    first: Vec<(String, Vec<f64>)>,
    started: Vec<(String, Tensor)>,
    after: Vec<f64>,
}

/// The steps of a case. AdamW is written out here, with the rate and decay of each of PEFT's groups: what is tested is what
/// trains and its gradients, in whatever order the optimizer of the program visits them.
fn walk(dir: &Path, base_dir: &Path, compute: Compute) -> Walk {
    let want = case(dir);
    let config = config(&want);
    let mut model = base(base_dir, &want, compute);
    let whole = dir.join("initial_adapter/adapter_config.json").exists()
        && !config
            .modules_to_save
            .iter()
            .any(|m| matches!(m, SavedModule::WordEmbeddings | SavedModule::LmHead));
    let tuning = Tuning::Lora(config);
    if whole {
        tune::restore(&mut model, &tuning, &dir.join("initial_adapter")).unwrap();
    } else {
        // The set keeps only some rows of these: they start as the base's own, the adapter as PEFT's.
        tune::apply(&mut model, &tuning, 1).unwrap();
        let start = read_safetensors(&dir.join("initial_adapter/adapter_model.safetensors"));
        model
            .for_each_param_mut(&mut |name, param| {
                if name.contains(".lora_") {
                    param.value.write(start[name].as_slice::<f32>())?;
                }
                Ok(())
            })
            .unwrap();
    }
    let rows = read_safetensors(&dir.join("after.safetensors"))["rows"]
        .as_slice::<i64>()
        .to_vec();
    let batches = read_safetensors(&folder().join("batches.safetensors"));
    let (ids, labels) = (&batches["input_ids"], &batches["labels"]);
    let [count, size, len] = *ids.shape().extents() else {
        panic!("input_ids")
    };
    let model_config = model.config().clone();
    let batches: Vec<Batch> = (0..count)
        .map(|i| {
            let part = |t: &Tensor| t.as_slice::<i64>()[i * size * len..][..size * len].to_vec();
            batch(&model_config, &part(ids), &part(labels), len)
        })
        .collect();
    let h = &want["hyperparameters"];
    let rate_and_decay = |name: &str| match want["groups"].as_array() {
        None => (h["lr"].as_f64().unwrap(), h["weight_decay"].as_f64().unwrap()),
        Some(groups) => {
            let name = peft_name(name);
            let group = groups
                .iter()
                .find(|g| names(&g["names"]).contains(&name.as_str()));
            let group = group.unwrap_or_else(|| panic!("PEFT trains no {name}"));
            (
                group["lr"].as_f64().unwrap(),
                group["weight_decay"].as_f64().unwrap(),
            )
        }
    };
    let mut rates = Vec::new();
    model.for_each_param(&mut |name, param| {
        if param.trains() {
            rates.push(rate_and_decay(name));
        }
    });
    let started = tune::adapter_tensors(&model).unwrap();
    let mut ws = model.workspace(size, len).unwrap();
    let (mut losses, mut norms, mut first) = (Vec::new(), Vec::new(), Vec::new());
    let mut moments: Vec<(Vec<f64>, Vec<f64>)> = vec![Default::default(); rates.len()];
    let scale = if compute.dtype == DType::F16 { 1024.0 } else { 1.0 };
    for step in 0..want["steps"].as_u64().unwrap() as usize {
        let batch = &batches[step % count];
        model.zero_gradients().unwrap();
        let tokens = batch.supervised() as f64;
        let loss = model
            .loss_and_gradients(&mut ws, batch, scale / tokens, Stream::new(0, 0))
            .unwrap();
        losses.push(loss.mean());
        let (mut square, mut i) = (0.0, 0);
        let (beta1, beta2) = (0.9, 0.999);
        let (c1, c2) = (
            1.0 - f64::powi(beta1, step as i32 + 1),
            1.0 - f64::powi(beta2, step as i32 + 1),
        );
        model
            .for_each_param_mut(&mut |name, param| {
                let Some(grad) = &param.grad else { return Ok(()) };
                let grad: Vec<f64> = values(grad).into_iter().map(|g| g / scale).collect();
                square += grad.iter().map(|g| g * g).sum::<f64>();
                if step == 0 {
                    let kept = kept(param.grad.as_ref().unwrap(), &rows);
                    first.push((name.to_string(), kept.into_iter().map(|g| g / scale).collect()));
                }
                let (rate, decay) = rates[i];
                let (m, v) = &mut moments[i];
                i += 1;
                m.resize(grad.len(), 0.0);
                v.resize(grad.len(), 0.0);
                let mut value = values(&param.value);
                for (((p, g), m), v) in value.iter_mut().zip(&grad).zip(m).zip(v) {
                    *m += (1.0 - beta1) * (g - *m);
                    *v = beta2 * *v + (1.0 - beta2) * g * g;
                    *p = *p * (1.0 - rate * decay) - rate / c1 * *m / ((*v / c2).sqrt() + 1e-8);
                }
                let value: Vec<f32> = value.into_iter().map(|x| x as f32).collect();
                param.value.write(&value)
            })
            .unwrap();
        norms.push(square.sqrt());
    }
    model.forward(&mut ws, &batches[0], None).unwrap();
    let logits = model.logits(&ws).unwrap();
    let vocabulary = logits.extent(1);
    let logits = values(&logits);
    let after = (1..=size).flat_map(|b| logits[(b * len - 1) * vocabulary..][..vocabulary].to_vec());
    let after = after.collect();
    Walk {
        model,
        losses,
        norms,
        first,
        started,
        after,
    }
}

/// The tolerances of the golden trajectories: what 20 steps of PyTorch in another order of sums differ by.
const LOSS: f64 = 5e-5;
const NORM: f64 = 1e-4;
const UPDATE: f64 = 1e-3;

fn check(dir: &Path, base_dir: &Path, compute: Compute) {
    let what = format!(
        "{} on {}",
        dir.file_name().unwrap().to_string_lossy(),
        compute.device
    );
    let want = case(dir);
    let walk = walk(dir, base_dir, compute);
    assert_close(
        &format!("{what}: losses"),
        &walk.losses,
        &numbers(&want["loss"]),
        LOSS,
        0.0,
    );
    assert_close(
        &format!("{what}: norms"),
        &walk.norms,
        &numbers(&want["grad_norm"]),
        0.0,
        NORM,
    );
    let first = read_safetensors(&dir.join("step0_grads.safetensors"));
    assert_eq!(walk.first.len(), first.len(), "{what}: {:?}", first.keys());
    for (name, got) in &walk.first {
        let want = first[&peft_name(name)].to_f64_vec();
        let largest = want.iter().fold(0f64, |most, g| most.max(g.abs()));
        assert_close(
            &format!("{what}: {name}: gradient"),
            got,
            &want,
            2e-5 * largest + 1e-9,
            2e-4,
        );
    }
    let last = read_safetensors(&dir.join("final_adapter/adapter_model.safetensors"));
    let after = read_safetensors(&dir.join("after.safetensors"));
    let rows = after["rows"].as_slice::<i64>();
    let finals = tune::adapter_tensors(&walk.model).unwrap();
    assert_eq!(finals.len(), last.len(), "{what}: {:?}", last.keys());
    for ((name, got), (_, start)) in finals.iter().zip(&walk.started) {
        let minus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>();
        let (got, start, want) = (kept(got, rows), kept(start, rows), last[name].to_f64_vec());
        let error = relative_l2(&minus(&got, &start), &minus(&want, &start));
        assert!(error <= UPDATE, "{what}: {name}: the update differs by {error}");
    }
    assert_close(
        &format!("{what}: logits after"),
        &walk.after,
        &after["logits"].to_f64_vec(),
        2e-3,
        0.0,
    );
    eprintln!("{what}: as PEFT");
}

#[test]
fn training_walks_the_path_of_peft() {
    let base_dir = tempfile::tempdir().unwrap();
    if base_folder(base_dir.path()).is_none() {
        return;
    }
    for compute in exact_computes() {
        for dir in cases() {
            check(&dir, base_dir.path(), compute);
        }
    }
}

/// First gradients and losses in 16 bits, as `trajectories` asks for them.
#[test]
fn training_in_half_precision_stays_beside_peft() {
    let base_dir = tempfile::tempdir().unwrap();
    if base_folder(base_dir.path()).is_none() {
        return;
    }
    for compute in half_computes() {
        let unit = match compute.dtype {
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        for dir in cases() {
            let name = dir.file_name().unwrap().to_string_lossy().into_owned();
            let what = format!("{name} in {}", compute.dtype);
            let walk = walk(&dir, base_dir.path(), compute);
            let first = read_safetensors(&dir.join("step0_grads.safetensors"));
            let mut worst = 0f64;
            for (name, got) in &walk.first {
                let want = first[&peft_name(name)].to_f64_vec();
                if want.iter().any(|&g| g != 0.0) {
                    worst = worst.max(relative_l2(got, &want));
                }
            }
            let losses = numbers(&case(&dir)["loss"]);
            let off = walk
                .losses
                .iter()
                .zip(&losses)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f64::max);
            eprintln!(
                "{what}: gradients within {worst:.2e}, losses within {off:.2e} ({:.2e})",
                16.0 * unit
            );
            assert!(worst <= 16.0 * unit, "{what}: gradients differ by {worst}");
            assert!(off <= 16.0 * unit, "{what}: losses differ by {off}");
        }
    }
}

fn product(f: &factor::Factors) -> Vec<f64> {
    let (u, vt) = (f.u.to_f64_vec(), f.vt.to_f64_vec());
    let (m, r, n) = (f.u.extent(0), f.s.len(), f.vt.extent(1));
    let element = |i: usize| {
        (0..r)
            .map(|k| u[i / n * r + k] * f.s[k] * vt[k * n + i % n])
            .sum()
    };
    (0..m * n).map(element).collect()
}

/// From the same random start, subspace iterations give what `torch.svd_lowrank` gives.
#[test]
fn subspace_iterations_are_those_of_torch() {
    let Some(base) = golden("chatglm_v1/checkpoint_fp16_bin") else {
        return;
    };
    let checkpoint = Checkpoint::open(&base).unwrap();
    let sketches: Tensors = read_safetensors(&folder().join("sketches.safetensors"));
    let mut checked = 0;
    for (key, sketch) in &sketches {
        let Some(stem) = key.strip_suffix(".sketch") else {
            continue;
        };
        let (name, iterations) = stem.rsplit_once('.').unwrap();
        let w = checkpoint.tensor(name).unwrap().to_dtype(DType::F32);
        let f = factor::low_rank_from(&w, sketch, iterations.parse().unwrap()).unwrap();
        assert_close(
            stem,
            &f.s,
            &sketches[&format!("{stem}.s")].to_f64_vec(),
            1e-5,
            1e-5,
        );
        let (got, n) = (product(&f), w.extent(1));
        let rows = sketches[&format!("{stem}.product.rows")].to_f64_vec();
        assert_close(stem, &got[..8 * n], &rows, 2e-5, 0.0);
        let columns: Vec<f64> = got.chunks_exact(n).flat_map(|row| row[..8].to_vec()).collect();
        let want = sketches[&format!("{stem}.product.columns")].to_f64_vec();
        assert_close(stem, &columns, &want, 2e-5, 0.0);
        checked += 1;
    }
    assert_eq!(checked, 4);
}

/// What our own decomposition starts with is what PEFT's starts with: A and B up to signs, so their product.
#[test]
fn pissa_starts_as_in_peft() {
    let base_dir = tempfile::tempdir().unwrap();
    if base_folder(base_dir.path()).is_none() {
        return;
    }
    let dir = folder().join("pissa");
    let want = case(&dir);
    let peft = read_safetensors(&dir.join("initial_adapter/adapter_model.safetensors"));
    for compute in exact_computes() {
        let mut model = base(base_dir.path(), &want, compute);
        let config = config(&want);
        let r = config.r;
        tune::apply(&mut model, &Tuning::Lora(config), 3).unwrap();
        let ours = tune::adapter_tensors(&model).unwrap();
        assert_eq!(ours.len(), peft.len());
        // The first half of the rank alone: s (B A - B₀ A₀) is 0.
        let half = |a: &Tensor, b: &Tensor| {
            let (n, width) = (a.extent(1), b.extent(1));
            let (a, b) = (a.to_f64_vec(), b.to_f64_vec());
            let element = |i: usize| {
                (0..r)
                    .map(|k| b[i / n * width + k] * a[k * n + i % n])
                    .sum::<f64>()
            };
            (0..b.len() / width * n).map(element).collect::<Vec<_>>()
        };
        for pair in ours.chunks_exact(2) {
            let [(name_a, a), (name_b, b)] = pair else {
                unreachable!()
            };
            assert_close(
                name_a,
                &half(a, b),
                &half(&peft[name_a], &peft[name_b]),
                2e-6,
                1e-5,
            );
        }
    }
}
