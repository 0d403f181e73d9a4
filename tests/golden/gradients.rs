//! Gradients of every parameter against PyTorch's.

use glmtune::checkpoint::Checkpoint;
use glmtune::model::tune::{self, Tuning};
use glmtune::model::{LoadOptions, Model};
use glmtune::rng::Stream;

use crate::common::{
    exact_computes, golden, half_computes, read_safetensors, relative_l2, tolerance, values,
};
use crate::forward::batch;
use glmtune::tensor::{Compute, DType};

fn check(gradients: &str, checkpoint: &str, inputs: &str, head_apart: bool) {
    for compute in exact_computes().into_iter().chain(half_computes()) {
        check_on(compute, gradients, checkpoint, inputs, head_apart);
    }
}

fn check_on(compute: Compute, gradients: &str, checkpoint: &str, inputs: &str, head_apart: bool) {
    let file = format!("chatglm_v1/gradients/{gradients}.safetensors");
    let (Some(path), Some(dir), Some(inputs)) = (
        golden(&file),
        golden(checkpoint),
        golden(&format!("chatglm_v1/forward/{inputs}.safetensors")),
    ) else {
        return;
    };
    let mut model = Model::load(
        &Checkpoint::open(&dir).unwrap(),
        &LoadOptions {
            compute,
            ..LoadOptions::default()
        },
    )
    .unwrap();
    if head_apart {
        tune::untie_head(&mut model).unwrap();
    }
    tune::apply(&mut model, &Tuning::Full, 0).unwrap();
    let batch = batch(&read_safetensors(&inputs));
    let mut ws = model.workspace(batch.size, batch.len).unwrap();
    let scale = 1.0 / batch.supervised() as f64;
    // Twice: parameter gradients are added to, activation gradients written.
    for _ in 0..2 {
        model
            .loss_and_gradients(&mut ws, &batch, 0.5 * scale, Stream::new(0, 0))
            .unwrap();
    }

    let want = read_safetensors(&path);
    let tolerance = tolerance(&file);
    let bound = |key: &str| tolerance[key].as_f64().unwrap();
    // In 16 bits: 16 u, as for training runs (trajectories.rs).
    let (rel, max_abs) = match compute.dtype {
        DType::F16 => (16.0 / 2048.0, f64::INFINITY),
        DType::BF16 => (16.0 / 256.0, f64::INFINITY),
        _ => (bound("rel_l2_per_tensor"), bound("max_abs")),
    };
    let mut checked = 0;
    model.for_each_param(&mut |name, param| {
        let Some(want) = want.get(name) else { return };
        let (got, want) = (values(param.grad.as_ref().unwrap()), want.to_f64_vec());
        let l2 = relative_l2(&got, &want);
        let worst = got
            .iter()
            .zip(&want)
            .map(|(g, w)| (g - w).abs())
            .fold(0.0, f64::max);
        assert!(
            l2 <= rel && worst <= max_abs,
            "{gradients}: {name}: relative L2 {l2:e}, largest difference {worst:e}"
        );
        if max_abs.is_infinite() {
            checked += 1;
            return;
        }
        let dot: f64 = got.iter().zip(&want).map(|(g, w)| g * w).sum();
        let norms =
            got.iter().map(|g| g * g).sum::<f64>().sqrt() * want.iter().map(|w| w * w).sum::<f64>().sqrt();
        assert!(
            dot / norms > 1.0 - 1e-9,
            "{gradients}: {name}: cosine {}",
            dot / norms
        );
        checked += 1;
    });
    assert_eq!(checked, want.len(), "{gradients}: tensors checked");
}

#[test]
fn tied_gradients_of_a_right_padded_batch() {
    check(
        "full_tied_train_rightpad",
        "chatglm_v1/checkpoint_fp16_bin",
        "train_rightpad",
        false,
    );
}

#[test]
fn tied_gradients_of_a_left_padded_batch() {
    check(
        "full_tied_leftpad_tokenizer",
        "chatglm_v1/checkpoint_fp16_bin",
        "leftpad_tokenizer",
        false,
    );
}

#[test]
fn gradients_with_a_head_of_its_own() {
    check(
        "full_untied_train_rightpad",
        "chatglm_v1/checkpoint_untied_fp16_safetensors",
        "train_rightpad",
        false,
    );
}

#[test]
fn gradients_of_a_head_that_starts_as_the_embedding() {
    check(
        "full_separate_train_rightpad",
        "chatglm_v1/checkpoint_fp16_bin",
        "train_rightpad",
        true,
    );
}
