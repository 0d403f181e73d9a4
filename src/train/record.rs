//! What `run.json` says of a run from its start.

use std::path::Path;

use super::{Inputs, RunState, fingerprint, method};
use crate::config::RunConfig;
use crate::model::Model;
use crate::report::{Digest, Parameters, Program, RunRecord};

/// What `run.json` says of the run from its start.
pub(super) fn of(
    config: &RunConfig,
    model: &Model,
    inputs: &Inputs,
    state: &RunState,
    device: String,
) -> RunRecord {
    let (trainable, _, base) = method::counts(model);
    let digest = |of: &str, path: &Path, sha256: String| Digest {
        of: of.to_string(),
        path: path.display().to_string(),
        sha256,
    };
    let mut hashes = vec![
        digest("training samples", &config.data, inputs.fingerprint()),
        digest("base", &config.model, state.base.clone()),
    ];
    let files = [
        ("training data", Some(&config.data)),
        ("evaluation data", config.eval_data.as_ref()),
        ("replayed data", config.replay.as_ref()),
        ("tokenizer", Some(&config.model.join("ice_text.model"))),
    ]
    .map(|(of, path)| (of, path.cloned()));
    for (of, path) in files {
        if let Some(path) = path
            && let Ok(sha256) = fingerprint::of_file(&path)
        {
            hashes.push(digest(of, &path, sha256));
        }
    }
    RunRecord {
        program: Program {
            version: env!("CARGO_PKG_VERSION").to_string(),
            sha256: std::env::current_exe()
                .ok()
                .and_then(|path| fingerprint::of_file(&path).ok()),
        },
        method: method::words(config),
        model: config.model.display().to_string(),
        device,
        dtype: model.dtype().name().to_string(),
        parameters: Parameters {
            trainable: trainable as u64,
            total: base as u64,
        },
        total_steps: state.total_steps,
        hashes,
        ..RunRecord::default()
    }
}
