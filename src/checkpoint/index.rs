//! Which files of a folder hold the weights, and what the index says about them.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::pickle::printable;
use crate::error::{Error, Result};

/// The files of a checkpoint in shard order.
pub(super) struct Source {
    pub paths: Vec<PathBuf>,
    pub index: Option<Index>,
}

/// A `*.index.json`. Its `metadata.total_size` is not read: the published file has that of an older revision.
#[derive(Deserialize)]
struct IndexFile {
    weight_map: BTreeMap<String, String>,
}

/// An index and where it lies.
pub(super) struct Index {
    path: PathBuf,
    weight_map: BTreeMap<String, String>,
}

/// Finds the weights of `dir`.
///
/// # Errors
/// There are none, a shard of the index is missing, or shards lie there without an index.
pub(super) fn find(dir: &Path) -> Result<Source> {
    for (single, index) in [
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ] {
        if dir.join(single).exists() {
            return Ok(Source {
                paths: vec![dir.join(single)],
                index: None,
            });
        }
        let path = dir.join(index);
        if path.exists() {
            return sharded(dir, path);
        }
    }
    let mut seen: Vec<String> = std::fs::read_dir(dir)
        .map_err(Error::io(dir, "list"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.ends_with(".bin") || name.ends_with(".safetensors"))
        .collect();
    seen.sort();
    let (found, remedy) = match seen.first() {
        Some(name) => (
            format!("{} but no index and no single file of weights", printable(name)),
            "download pytorch_model.bin.index.json (or model.safetensors.index.json) into the folder too",
        ),
        None => (
            "no weights".to_string(),
            "download the weights into this folder, or check the path",
        ),
    };
    let expected = "model.safetensors, pytorch_model.bin, or shards with their .index.json";
    Err(Error::input(dir.display(), found, expected, remedy))
}

fn sharded(dir: &Path, path: PathBuf) -> Result<Source> {
    let text = std::fs::read(&path).map_err(Error::io(&path, "read"))?;
    let file: IndexFile = serde_json::from_slice(&text).map_err(|e| {
        Error::input(
            path.display(),
            e,
            "a JSON object with weight_map",
            "download the index again",
        )
    })?;
    let index = Index {
        path,
        weight_map: file.weight_map,
    };
    let mut names: Vec<&String> = index.weight_map.values().collect();
    names.sort();
    names.dedup();
    if names.is_empty() {
        let found = "an empty weight_map";
        return Err(Error::input(
            index.path.display(),
            found,
            "the shard of every tensor",
            "download the index again",
        ));
    }
    let mut paths = Vec::with_capacity(names.len());
    let mut missing = Vec::new();
    for name in names {
        // A plain name: an index must not point out of its folder.
        let mut components = Path::new(name).components();
        let plain = matches!(
            (components.next(), components.next()),
            (Some(Component::Normal(_)), None)
        );
        if !plain || name.contains(['/', '\\']) {
            return Err(Error::input(
                index.path.display(),
                format!("the shard {}", printable(name)),
                "the name of a file in the same folder",
                "take the index from a source you trust",
            ));
        }
        let path = dir.join(name);
        if !path.exists() {
            missing.push(name.as_str());
        }
        paths.push(path);
    }
    if !missing.is_empty() {
        let shown = missing
            .iter()
            .take(20)
            .map(|name| printable(name))
            .collect::<Vec<_>>()
            .join(", ");
        return Err(Error::input(
            dir.display(),
            format!("no {shown}{}", if missing.len() > 20 { ", ..." } else { "" }),
            format!("the {} shards that {} names", paths.len(), index.path.display()),
            "download the missing shards into this folder",
        ));
    }
    Ok(Source {
        paths,
        index: Some(index),
    })
}

impl Index {
    /// Checks that every tensor lies where the index says; `holder` gives the file that holds a tensor.
    pub(super) fn check<'a>(&self, holder: impl Fn(&str) -> Option<&'a Path>) -> Result<()> {
        let mut wrong = Vec::new();
        for (name, shard) in &self.weight_map {
            let actual = holder(name).map(|path| path.file_name().unwrap_or_default().to_string_lossy());
            match actual {
                Some(actual) if actual == shard.as_str() => {}
                Some(actual) => wrong.push(format!("{} in {actual} instead of {shard}", printable(name))),
                None => wrong.push(format!("no {} in {shard}", printable(name))),
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Error::input(
            self.path.display(),
            super::validate::list(&wrong),
            "every tensor in the shard that the index names",
            "the shards and the index are of different revisions, or a shard is damaged: download them again",
        ))
    }
}
