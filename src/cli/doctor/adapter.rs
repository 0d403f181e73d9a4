//! An adapter: can it be read, what was it trained on, and does it belong to the base?

use std::path::Path;

use super::downloads;
use super::{Finding, Level};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::quantized::is_quantized;
use crate::error::Error;
use crate::model::tune::{self, Loaded, Merger, Strength};
use crate::train::{TrainedOn, base_fingerprint};

const WHAT: &str = "adapter";

pub(super) fn look(dir: &Path, base: Option<&Checkpoint>, findings: &mut Vec<Finding>) {
    if !dir.is_dir() {
        let found = format!("{}: no folder; expected: an adapter", dir.display());
        findings.push(Finding::stops("adapter.folder", WHAT, found, "check the path"));
        return;
    }
    downloads::look(WHAT, dir, findings);
    let kind = match tune::adapter_kind(dir) {
        Ok(kind) => kind,
        Err(error) => {
            findings.push(Finding::of("adapter.files", Level::Stops, WHAT, &error));
            return;
        }
    };
    let described = match &kind {
        Loaded::Lora(config) => format!("LoRA of rank {} on {}", config.r, config.targets_in_words()),
        Loaded::Prefix(prefix) => format!("a prefix of {} (P-Tuning v2)", prefix.pre_seq_len),
    };
    findings.push(Finding::fine(
        "adapter.files",
        WHAT,
        format!("{}: {described}", dir.display()),
    ));
    if let Some(base) = base {
        findings.push(match fits(dir, &kind, base) {
            Ok(()) => Finding::fine(
                "adapter.base",
                WHAT,
                "every tensor of it has its place in the base",
            ),
            Err(error) => Finding::of("adapter.base", Level::Stops, WHAT, &error),
        });
    }
    match TrainedOn::read(dir) {
        Err(error) => findings.push(Finding::of("adapter.run", Level::Stops, WHAT, &error)),
        Ok(run) => of_run(&run, base, findings),
    }
}

/// Do its tensors have the sizes of the base?
fn fits(dir: &Path, kind: &Loaded, base: &Checkpoint) -> Result<(), Error> {
    match kind {
        Loaded::Lora(_) => Merger::open(base.config(), &[Strength { dir, factor: 1.0 }]).map(|_| ()),
        Loaded::Prefix(_) => tune::check_prefix(base.config(), dir).map(|_| ()),
    }
}

/// What the run beside it says.
fn of_run(run: &TrainedOn, base: Option<&Checkpoint>, findings: &mut Vec<Finding>) {
    let missing: Vec<String> = run
        .merged
        .iter()
        .filter(|dir| !dir.exists())
        .map(|dir| dir.display().to_string())
        .collect();
    if !missing.is_empty() {
        let missing: Vec<&str> = missing.iter().map(String::as_str).collect();
        findings.push(Finding::stops(
            "adapter.merged_before",
            WHAT,
            format!(
                "adapters that were merged into the base before it was trained are not there: {}",
                downloads::list(&missing)
            ),
            "put them back where run.toml names them: without them it was trained on another model",
        ));
    }
    let Some((trained_on, base)) = run.base.as_ref().zip(base) else {
        return;
    };
    if is_quantized(base) || !missing.is_empty() {
        return;
    }
    findings.push(match base_fingerprint(base, &run.merged) {
        Ok(found) if found == *trained_on => Finding::fine(
            "adapter.fingerprint",
            WHAT,
            "the weights of the base are those that it was trained on",
        ),
        Ok(_) => Finding::warns(
            "adapter.fingerprint",
            WHAT,
            format!(
                "the weights in {} are not those that it was trained on",
                base.dir().display()
            ),
            "give --model the base of the training: on this one its answers may be useless",
        ),
        Err(error) => Finding::of("adapter.fingerprint", Level::Stops, WHAT, &error),
    });
}
