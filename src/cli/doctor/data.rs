//! A data file: what records it holds, and what of them a run would cut.

use std::path::Path;

use super::{Finding, Level};
use crate::data::record::{Columns, read_records};
use crate::data::sample::{Cut, Options, encode_all};
use crate::tokenizer::Tokenizer;

const WHAT: &str = "data";
/// The default of `--max-length` in training.
const MAX_LENGTH: usize = 1024;

pub(super) fn look(path: &Path, tokenizer: Option<&Tokenizer>, findings: &mut Vec<Finding>) {
    if super::downloads::is_pointer(path) {
        findings.push(Finding::stops(
            "files.lfs_pointer",
            WHAT,
            format!("{}: a git-LFS pointer instead of the file", path.display()),
            "run `git lfs install` and `git lfs pull` in that folder, or download the file itself",
        ));
        return;
    }
    let (records, shape) = match read_records(path, &Columns::default()) {
        Ok(read) => read,
        Err(error) => {
            findings.push(Finding::of("data.records", Level::Stops, WHAT, &error));
            return;
        }
    };
    findings.push(Finding::fine(
        "data.records",
        WHAT,
        format!("{}: {} records, {shape}", path.display(), records.len()),
    ));
    let Some(tokenizer) = tokenizer else {
        return;
    };
    // Without limits, so that nothing is cut.
    let (samples, report) = match encode_all(tokenizer, &records, &Options::default()) {
        Ok(encoded) => encoded,
        Err(error) => {
            findings.push(Finding::of("data.records", Level::Stops, WHAT, &error));
            return;
        }
    };
    let lengths = samples.iter().map(|sample| (sample.ids.len(), &sample.place));
    if let Some((longest, place)) = lengths.max_by_key(|(length, _)| *length) {
        let longer = samples.iter().filter(|s| s.ids.len() > MAX_LENGTH).count();
        findings.push(match longer {
            0 => Finding::fine(
                "data.lengths",
                WHAT,
                format!("longest: {longest} tokens ({place})"),
            ),
            n => Finding::warns(
                "data.lengths",
                WHAT,
                format!(
                    "{n} of {} records are longer than {MAX_LENGTH} tokens, the longest {longest} ({place})",
                    samples.len()
                ),
                format!(
                    "train with a higher --max-length than {MAX_LENGTH}, or their answers lose their ends"
                ),
            ),
        });
    }
    let written_out = report.cuts.iter().filter(|(_, cut)| *cut == Cut::SpecialToken);
    let places: Vec<&str> = written_out.map(|(place, _)| place.as_str()).collect();
    if !places.is_empty() {
        findings.push(Finding::warns(
            "data.special_tokens",
            WHAT,
            format!(
                "{} records hold a special token such as <sop> written out: {}",
                places.len(),
                super::downloads::list(&places)
            ),
            "remove it from their texts: the model takes it for the token",
        ));
    }
}
