//! Training runs of 20 steps against PyTorch: P-Tuning v2, freeze, every parameter.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use glmtune::model::tune::{self, FreezeModules, PrefixConfig, Tuning};
use glmtune::model::{LoadOptions, Model};
use glmtune::tensor::{Compute, DType};
use serde_json::Value;

use crate::common::{
    assert_close, exact_computes, golden, half_computes, prefix_folder, read_safetensors, relative_l2,
    tolerance, values,
};
use crate::forward::load;
use crate::trajectories::{FOLDER, Walk, numbers, trajectory, walk_on};

/// The runs of the set that are of these methods.
fn runs() -> Vec<(String, PathBuf)> {
    let Some(folder) = golden(FOLDER) else {
        return Vec::new();
    };
    let entries = std::fs::read_dir(&folder).unwrap();
    let mut runs: Vec<_> = entries
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), e.path()))
        .filter(|(_, dir)| dir.join("trajectory.json").exists() && !dir.join("initial_adapter").exists())
        .collect();
    runs.sort();
    runs.retain(|(run, dir)| {
        let other = &trajectory(dir)["hyperparameters"]["optimizer"];
        if !other.is_null() {
            eprintln!("SKIPPED: {run}: {other} does not rescale eps with its bias correction, as no optimizer here does");
        }
        other.is_null()
    });
    runs
}

/// The model of a run as it is before the first step.
fn start(dir: &Path, compute: Compute) -> Option<Model> {
    let kind = trajectory(dir)["hyperparameters"]["kind"]
        .as_str()
        .unwrap()
        .to_string();
    let options = LoadOptions {
        compute,
        ..LoadOptions::default()
    };
    let base = match kind.as_str() {
        "full_untied" => "chatglm_v1/checkpoint_untied_fp16_safetensors",
        _ => "chatglm_v1/checkpoint_fp16_bin",
    };
    let mut model = load(base, &options)?;
    match kind.as_str() {
        "ptuning" => {
            let weights = dir.join("initial_prefix_encoder.safetensors");
            let tensors = read_safetensors(&weights);
            let embedding = &tensors["transformer.prefix_encoder.embedding.weight"];
            // The set was made without dropout.
            let config = PrefixConfig {
                pre_seq_len: embedding.extent(0),
                projection: tensors.len() > 1,
                dropout: 0.0,
            };
            tune::restore(
                &mut model,
                &Tuning::PTuning(config),
                prefix_folder(&weights).path(),
            )
            .unwrap();
        }
        "freeze" => {
            let modules = FreezeModules::All;
            tune::apply(&mut model, &Tuning::Freeze { layers: 1, modules }, 0).unwrap();
        }
        "full" | "full_untied" => tune::apply(&mut model, &Tuning::Full, 0).unwrap(),
        other => panic!("a run of the unknown kind {other}"),
    }
    Some(model)
}

/// What trains, by name.
fn trained(model: &Model) -> BTreeMap<String, Vec<f64>> {
    let mut out = BTreeMap::new();
    model.for_each_param(&mut |name, param| {
        if param.trains() {
            out.insert(name.to_string(), values(&param.value));
        }
    });
    out
}

/// The golden final values of a parameter, and which of its elements they are; all or a sample of them.
fn last_values(dir: &Path) -> BTreeMap<String, (Option<Vec<usize>>, Vec<f64>)> {
    let whole = ["final_prefix_encoder", "final_trainable"];
    let whole = whole.map(|name| dir.join(format!("{name}.safetensors")));
    if let Some(path) = whole.iter().find(|path| path.exists()) {
        let tensors = read_safetensors(path).into_iter();
        return tensors.map(|(name, t)| (name, (None, t.to_f64_vec()))).collect();
    }
    let tensors = read_safetensors(&dir.join("final_sampled.safetensors"));
    let names = tensors.keys().filter_map(|name| name.strip_suffix("@index"));
    names
        .map(|name| {
            let at = tensors[&format!("{name}@index")].as_slice::<i64>();
            let at = at.iter().map(|&i| i as usize).collect();
            let values = tensors[&format!("{name}@value")].to_f64_vec();
            (name.to_string(), (Some(at), values))
        })
        .collect()
}

fn check(run: &str, dir: &Path, compute: Compute) -> Option<()> {
    let want = trajectory(dir);
    let tolerance = tolerance(&format!("{FOLDER}/{run}/"));
    let bound = |key: &str| tolerance[key].as_f64().unwrap_or_else(|| panic!("{run}: {key}"));
    let model = start(dir, compute)?;
    let initial = trained(&model);
    let names: Vec<&str> = want["trainable"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_str().unwrap())
        .collect();
    assert_eq!(initial.len(), names.len(), "{run}: tensors that train");
    assert!(names.iter().all(|name| initial.contains_key(*name)), "{run}");

    let walk = walk_on(model, run, dir);
    let list = |key: &str| numbers(&want[key]);
    let close = |what: &str, got: &[f64], want: &[f64], atol: f64, rtol: f64| {
        assert_close(&format!("{run}: {what}"), got, want, atol, rtol);
    };
    close("learning rates", &walk.rates, &list("lr"), 1e-18, 1e-9);
    close("losses", &walk.losses, &list("loss"), bound("loss_abs"), 0.0);
    close(
        "norms",
        &walk.norms,
        &list("grad_norm"),
        0.0,
        bound("grad_norm_rel"),
    );

    let last = trained(walk.trainer.model());
    let golden = last_values(dir);
    assert_eq!(golden.len(), last.len(), "{run}: golden final tensors");
    let (mut inside, mut all) = (0, 0);
    for (name, (at, want)) in &golden {
        let at = at.clone().unwrap_or_else(|| (0..want.len()).collect());
        let got: Vec<f64> = at.iter().map(|&i| last[name][i]).collect();
        let change =
            |x: &[f64]| -> Vec<f64> { x.iter().zip(&at).map(|(x, &i)| x - initial[name][i]).collect() };
        let error = relative_l2(&change(&got), &change(want));
        let most = bound("final_update_rel_l2_per_tensor");
        assert!(
            error <= most,
            "{run}: {name}: the update differs by {error} (most {most})"
        );
        let near = bound("final_param_abs_for_99_9_percent_of_elements");
        let differences = got.iter().zip(want).map(|(g, w)| (g - w).abs());
        inside += differences.filter(|d| *d <= near).count();
        all += got.len();
    }
    let share = inside as f64 / all as f64;
    assert!(
        share >= 0.999,
        "{run}: {share} of the final elements are within the tolerance"
    );
    Some(())
}

#[test]
fn prefixes_layers_and_whole_models_walk_the_path_of_pytorch() {
    for compute in exact_computes() {
        for (run, dir) in runs() {
            if check(&run, &dir, compute).is_some() {
                eprintln!("{run} on {}: as PyTorch", compute.device);
            }
        }
    }
}

/// The golden norms of the first step's gradients.
fn first_norms(want: &Value) -> BTreeMap<String, f64> {
    let norms = want["step0_grad_norms"].as_object().unwrap();
    norms
        .iter()
        .map(|(name, norm)| (name.clone(), norm.as_f64().unwrap()))
        .collect()
}

/// As for adapters (`trajectories.rs`): what is computed in fp16 and bf16 stays within 16 u of f32.
#[test]
fn in_half_precision_they_stay_beside_pytorch() {
    for compute in half_computes() {
        let unit = match compute.dtype {
            DType::F16 => 2f64.powi(-11),
            _ => 2f64.powi(-8),
        };
        for (run, dir) in runs() {
            let Some(model) = start(&dir, compute) else {
                continue;
            };
            let what = format!("{run} in {}", compute.dtype);
            let Walk { losses, first, .. } = walk_on(model, &run, &dir);
            let want = trajectory(&dir);
            // Of full runs the set has only the gradients' norms.
            let file = dir.join("step0_grads.safetensors");
            let gradients = file.exists().then(|| read_safetensors(&file));
            let norms = first_norms(&want);
            let mut worst = (0f64, String::new());
            for (name, got) in &first {
                let error = match &gradients {
                    Some(gradients) => relative_l2(got, &gradients[name].to_f64_vec()),
                    None => {
                        let norm = got.iter().map(|g| g * g).sum::<f64>().sqrt();
                        (norm - norms[name]).abs() / norms[name]
                    }
                };
                assert!(!error.is_nan(), "{what}: {name}");
                if error > worst.0 {
                    worst = (error, name.clone());
                }
            }
            let off = losses
                .iter()
                .zip(numbers(&want["loss"]))
                .map(|(a, b)| (a - b).abs());
            let off = off.fold(0.0, f64::max);
            eprintln!(
                "{what}: gradients within {:.2e} ({}), losses within {off:.2e} ({:.2e})",
                worst.0,
                worst.1,
                16.0 * unit
            );
            assert!(worst.0 <= 16.0 * unit, "{what}: gradients differ by {worst:?}");
            assert!(off <= 16.0 * unit, "{what}: losses differ by {off}");
        }
    }
}
