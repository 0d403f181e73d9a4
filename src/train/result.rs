//! What a run leaves: an adapter or a model in the run's folder, read back after it was written.

use std::path::Path;

use super::Inputs;
use crate::checkpoint::{Checkpoint, read_tensors};
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::evaluate;
use crate::model::{LayerPolicy, Model, tune};
use crate::tensor::Tensor;

/// Writes the adapter (LoRA, prefix) into `dir`, or the whole model (freeze, full) into a folder of its own there.
///
/// # Errors
/// Something cannot be written, or does not read back as it was written.
pub(super) fn write(model: &Model, tuning: &tune::Tuning, config: &RunConfig, dir: &Path) -> Result<()> {
    match tuning {
        tune::Tuning::Lora(_) => {
            tune::save(model, tuning, &config.model, dir)?;
            verify(
                &dir.join("adapter_model.safetensors"),
                &tune::adapter_tensors(model)?,
            )
        }
        tune::Tuning::PTuning(_) => tune::save(model, tuning, &config.model, dir),
        tune::Tuning::Freeze { .. } | tune::Tuning::Full => {
            let dir = dir.join(MODEL);
            tune::save_model(model, &config.model, &dir)?;
            Checkpoint::open(&dir)?.validate()
        }
    }
}

/// The folder of a trained model, in that of the run.
pub(super) const MODEL: &str = "model";

/// Files of a run folder that [`write()`] writes for an adapter; a new run replaces them.
pub(super) const FILES: [&str; 4] = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "forgetting.safetensors",
];

/// The evaluation loss of a model that is no longer trained, in the memory that its training was planned for.
pub(super) fn loss(model: &Model, inputs: &Inputs, layers: &[LayerPolicy]) -> Result<Option<f64>> {
    if !inputs.has_evaluation() {
        return Ok(None);
    }
    let mut workspace = model.workspace_with(inputs.widest(), inputs.longest(), layers)?;
    let metrics = evaluate::loss(model, &mut workspace, inputs.evaluation_batches())?;
    Ok(Some(metrics.loss))
}

/// Reads the written adapter back and compares it with memory, bit by bit.
fn verify(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut written = read_tensors(path)?;
    for (name, tensor) in tensors {
        // A tensor that is written in another form than it is trained (PiSSA) is not there under its own shape.
        let same = written
            .remove(name)
            .is_none_or(|w| w.shape() != tensor.shape() || w.bytes() == tensor.bytes());
        if !same {
            let place = format!("{}: {name}", path.display());
            let remedy = "the disk does not keep what is written to it: write to another with --output";
            return Err(Error::input(
                place,
                "other values than were written",
                "the adapter in memory",
                remedy,
            ));
        }
    }
    Ok(())
}

/// A warning when some adapter pair changes nothing: its B is zero throughout.
///
/// # Errors
/// The adapter cannot be copied from the device.
pub(super) fn zero_update(model: &Model) -> Result<Option<String>> {
    let tensors = tune::adapter_tensors(model)?;
    let of_b: Vec<_> = tensors
        .iter()
        .filter(|(name, _)| name.contains(".lora_B."))
        .collect();
    let zero: Vec<&str> = of_b
        .iter()
        .filter(|(_, tensor)| tensor.bytes().iter().all(|&byte| byte == 0))
        .map(|(name, _)| name.as_str())
        .collect();
    Ok(zero.first().map(|first| {
        format!(
            "the update of {} of {} adapted layers is zero (first: {first}): the adapter changes nothing there; train longer \
             or with a higher --learning-rate",
            zero.len(),
            of_b.len()
        )
    }))
}
