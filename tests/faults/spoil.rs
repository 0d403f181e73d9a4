//! What the tests of the program from outside share: one line of errors, and ways to spoil a file.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use glmtune::checkpoint::{read_tensors, write_safetensors};
use glmtune::tensor::{DType, Tensor};
use serde_json::Value;

use crate::program::{fails, text};

/// Runs the command; the last line of its errors, after checking that it is the only one and holds `words`.
#[track_caller]
pub fn one_line(what: &str, command: &mut Command, code: i32, words: &[&str]) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let line = fails(&output, code);
    let stderr = text(&output.stderr);
    assert_eq!(stderr.matches("error: ").count(), 1, "{what}: {stderr}");
    for word in words {
        assert!(line.contains(word), "{what}: no {word:?} in: {line}");
    }
}

pub fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// Halves a file.
pub fn halve(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

/// Puts `value` first in a tensor of a safetensors file.
pub fn poke(path: &Path, name: &str, value: f32) {
    let mut tensors = read_tensors(path).unwrap();
    let old = &tensors[name];
    let mut values = old.to_dtype(DType::F32);
    values.as_mut_slice::<f32>()[0] = value;
    let new = values.to_dtype(old.dtype());
    tensors.insert(name.to_string(), new);
    let owned: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    let fresh = path.with_extension("new");
    write_safetensors(&fresh, &owned, &Default::default()).unwrap();
    fs::rename(fresh, path).unwrap();
}
