//! Files that are not what their names say, because a download was cut off or never began.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Finding;
use super::machine::gb;
use crate::checkpoint::read_tensors;
use crate::error::Error;

/// How a git-LFS pointer begins. `git clone` without LFS leaves such a file of about 135 bytes in the place of every large one.
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// The shards of ChatGLM-6B v1.1.0, from the first on, in bytes.
const OFFICIAL: [u64; 8] = [
    1_740_651_802,
    1_879_731_432,
    1_980_385_902,
    1_913_294_120,
    1_879_722_289,
    1_879_731_496,
    1_074_103_621,
    1_069_286_123,
];

/// What browsers and download programs call a file that is not whole.
const UNFINISHED: [&str; 6] = [
    ".incomplete",
    ".part",
    ".partial",
    ".crdownload",
    ".aria2",
    ".download",
];

/// The files of a folder by name; a folder that cannot be listed has none.
pub(super) fn files(dir: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Vec<(String, PathBuf)> = entries
        .filter(|entry| entry.path().is_file())
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .collect();
    files.sort();
    files
}

/// The first bytes of a file; fewer when it is shorter.
pub(super) fn beginning(path: &Path, count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Ok(file) = fs::File::open(path) {
        // What cannot be read begins with nothing; whoever needs the file will say so.
        let _ = file.take(count).read_to_end(&mut bytes);
    }
    bytes
}

pub(super) fn is_pointer(path: &Path) -> bool {
    beginning(path, POINTER.len() as u64) == POINTER
}

/// One finding for all pointers of a folder, one for all unfinished downloads.
pub(super) fn look(what: &str, dir: &Path, findings: &mut Vec<Finding>) {
    let files = files(dir);
    let named = |which: &dyn Fn(&(String, PathBuf)) -> bool| -> Vec<&str> {
        files
            .iter()
            .filter(|file| which(file))
            .map(|(name, _)| name.as_str())
            .collect()
    };
    // Weights in two formats: transformers and this program take safetensors, and leave the others alone.
    let safetensors = files.iter().any(|(name, _)| name.ends_with(".safetensors"));
    let needed = |name: &str| {
        let weights = name.ends_with(".safetensors")
            || !safetensors && name.ends_with(".bin") && (name.contains("model-") || name.contains("model."));
        weights || ["config.json", "adapter_config.json", "ice_text.model"].contains(&name)
    };
    for stops in [true, false] {
        let pointers = named(&|(name, path)| needed(name) == stops && is_pointer(path));
        if pointers.is_empty() {
            continue;
        }
        let found = format!(
            "{}: {} git-LFS pointers instead of the files: {}",
            dir.display(),
            pointers.len(),
            list(&pointers)
        );
        let (key, remedy) = (
            "files.lfs_pointer",
            "run `git lfs install` and `git lfs pull` in that folder, or download the files themselves",
        );
        findings.push(match stops {
            true => Finding::stops(key, what, found, remedy),
            false => Finding::warns(key, what, found + ", which no run here reads", remedy),
        });
    }
    let unfinished = named(&|(name, _)| UNFINISHED.iter().any(|end| name.ends_with(end)));
    if !unfinished.is_empty() {
        findings.push(Finding::warns(
            "files.unfinished_download",
            what,
            format!(
                "{}: downloads that were not finished: {}",
                dir.display(),
                list(&unfinished)
            ),
            "download them to the end, or remove them if the whole files are there",
        ));
    }
}

/// The first names, and how many more there are.
pub(super) fn list(names: &[&str]) -> String {
    let shown = names.iter().take(8).copied().collect::<Vec<_>>().join(", ");
    match names.len() {
        0..=8 => shown,
        n => format!("{shown} and {} more", n - 8),
    }
}

/// The files of weights that a folder should hold: the one that is whole, or those of the index. Missing and broken ones are
/// findings. Returns whether all are there and can be read.
pub(super) fn shards(dir: &Path, findings: &mut Vec<Finding>) -> bool {
    let before = findings.len();
    let mut expected = Vec::new();
    for (single, index) in [
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ] {
        if dir.join(single).exists() {
            expected = vec![single.to_string()];
            break;
        }
        let path = dir.join(index);
        if path.exists() && !is_pointer(&path) {
            match of_index(&path) {
                Ok(names) => expected = names,
                Err(error) => findings.push(Finding::of("model.index", super::Level::Stops, "model", &error)),
            }
            break;
        }
    }
    let weights = |(name, _): &(String, PathBuf)| name.ends_with(".bin") || name.ends_with(".safetensors");
    if expected.is_empty() && findings.len() == before && !files(dir).iter().any(weights) {
        findings.push(Finding::stops(
            "model.weights",
            "weights",
            format!("{}: no weights", dir.display()),
            "download model.safetensors or pytorch_model.bin, or the shards with their index, into this folder",
        ));
    }
    let missing: Vec<&str> = expected
        .iter()
        .filter(|name| !dir.join(name).exists())
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        findings.push(Finding::stops(
            "model.shards_missing",
            "model",
            format!(
                "{}: no {} (of {} that the index names)",
                dir.display(),
                list(&missing),
                expected.len()
            ),
            "download them into this folder",
        ));
    }
    for name in &expected {
        let path = dir.join(name);
        if path.exists()
            && !is_pointer(&path)
            && let Err(error) = read_tensors(&path)
        {
            findings.push(broken(&path, name, &error));
        }
    }
    findings.len() == before && !expected.iter().any(|name| is_pointer(&dir.join(name)))
}

fn of_index(path: &Path) -> Result<Vec<String>, Error> {
    let text = fs::read(path).map_err(Error::io(path, "read"))?;
    let wrong = |found: String| {
        Error::input(
            path.display(),
            found,
            "a JSON object with weight_map",
            "download the index again",
        )
    };
    let index: BTreeMap<String, Value> = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
    let map = index.get("weight_map").and_then(Value::as_object);
    let map = map.ok_or_else(|| wrong("no weight_map".to_string()))?;
    let mut names: Vec<String> = map.values().filter_map(Value::as_str).map(String::from).collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// A file of weights that cannot be read: cut off, if it is shorter than the published one.
fn broken(path: &Path, name: &str, error: &Error) -> Finding {
    let size = fs::metadata(path).map_or(0, |metadata| metadata.len());
    match official(name).filter(|&official| size < official) {
        Some(official) => Finding::stops(
            "model.shard_truncated",
            "model",
            format!(
                "{}: {size} bytes of the {official} that were published ({} are missing)",
                path.display(),
                gb(official - size)
            ),
            "download this file again: the download was cut off",
        ),
        None => Finding {
            remedy: Some("download this file again, or write it again".to_string()),
            ..Finding::of("model.shard_broken", super::Level::Stops, "model", error)
        },
    }
}

/// The published size of a shard of this name.
fn official(name: &str) -> Option<u64> {
    let number = name
        .strip_prefix("pytorch_model-0000")?
        .strip_suffix("-of-00008.bin")?;
    let number: usize = number.parse().ok()?;
    OFFICIAL.get(number.checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_shards_are_known_by_their_names() {
        assert_eq!(official("pytorch_model-00001-of-00008.bin"), Some(1_740_651_802));
        assert_eq!(official("pytorch_model-00008-of-00008.bin"), Some(1_069_286_123));
        assert_eq!(official("pytorch_model-00009-of-00008.bin"), None);
        assert_eq!(official("model-00001-of-00008.safetensors"), None);
        // What all of them hold: 6,173,286,400 parameters and the head once more, in two bytes each, with some hundred bytes for
        // each tensor.
        let total: u64 = OFFICIAL.iter().sum();
        assert_eq!(total, 13_416_906_785);
        assert_eq!(list(&["a"; 10]), "a, a, a, a, a, a, a, a and 2 more");
    }
}
