//! `run.toml` read: every key known, every value of its type, every complaint in one line.

use std::path::Path;

use serde::Serialize;

use super::RunConfig;
use crate::error::{Error, Result};

/// The keys of a file, each of its type; `learning-rate` is as good as `learning_rate`.
pub(super) fn read_table(path: &Path) -> Result<toml::Table> {
    let text = std::fs::read(path).map_err(Error::io(path, "read"))?;
    let text = String::from_utf8(text).map_err(|e| {
        let found = format!("text that is not UTF-8 (byte {})", e.utf8_error().valid_up_to());
        file_error(path.display(), found)
    })?;
    let parsed: toml::Table = text.parse().map_err(|e: toml::de::Error| {
        let before = e
            .span()
            .and_then(|span| text.get(..span.start))
            .unwrap_or_default();
        let line = 1 + before.matches('\n').count();
        file_error(
            format!("{}:{line}", path.display()),
            e.message().replace('\n', " "),
        )
    })?;
    let table = parsed
        .into_iter()
        .map(|(key, value)| (key.replace('-', "_"), value))
        .collect();
    parse(&table, path)?;
    Ok(table)
}

/// What the table of a file says, so that a wrong key is the file's and not the command line's.
pub(super) fn parse(table: &toml::Table, path: &Path) -> Result<RunConfig> {
    table
        .clone()
        .try_into()
        .map_err(|e| file_error(path.display(), one_line(&e)))
}

fn file_error(place: impl std::fmt::Display, found: String) -> Error {
    let remedy = "mend the file; `glmtune train --help` lists every flag";
    Error::input(place, found, "the flags of `glmtune train` as keys", remedy)
}

/// What the TOML reader says over several lines, without its list of all keys.
pub(super) fn one_line(error: &toml::de::Error) -> String {
    let text = error.to_string().trim().replace('\n', " ");
    match text.split_once(", expected one of") {
        Some((unknown, _)) if unknown.starts_with("unknown field") => unknown.to_string(),
        _ => text
            .replace("usize", "a whole number")
            .replace("u64", "a whole number"),
    }
}

/// TOML's whole numbers end at 2^63, and its writer does not say which one was too large.
pub(super) fn too_large(flags: &impl Serialize, error: &toml::ser::Error) -> Error {
    let flags = serde_json::to_value(flags).unwrap_or_default();
    let large = |value: &serde_json::Value| value.is_u64() && !value.is_i64();
    let found = flags
        .as_object()
        .and_then(|map| map.iter().find(|(_, value)| large(value)));
    Error::Usage(match found {
        Some((key, value)) => format!(
            "--{}: found {value}, expected a whole number below 2^63",
            key.replace('_', "-")
        ),
        None => error.to_string(),
    })
}
