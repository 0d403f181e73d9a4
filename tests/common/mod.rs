//! What every test ring shares: the one comparison, and the golden sets.
#![allow(dead_code, missing_docs)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use glmtune::tensor::{Compute, DType, Device, Tensor};

/// Fails unless `|got - want| <= atol + rtol * |want|` holds for every element (so NaN fails) and the lengths agree.
#[track_caller]
pub fn assert_close(what: &str, got: &[f64], want: &[f64], atol: f64, rtol: f64) {
    assert_eq!(got.len(), want.len(), "{what}: number of elements");
    let mut worst = (0usize, -1.0f64);
    let mut bad = 0usize;
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (g - w).abs();
        let within = error <= atol + rtol * w.abs();
        if !within {
            bad += 1;
            let excess = if error.is_nan() { f64::INFINITY } else { error };
            if excess > worst.1 {
                worst = (i, excess);
            }
        }
    }
    assert!(
        bad == 0,
        "{what}: {bad} of {} elements differ; worst at {}: got {}, want {} (atol {atol}, rtol {rtol})",
        got.len(),
        worst.0,
        got[worst.0],
        want[worst.0]
    );
}

/// `||got - want|| / ||want||`; NaN stays NaN.
pub fn relative_l2(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let d: f64 = got.iter().zip(want).map(|(g, w)| (g - w) * (g - w)).sum();
    let n: f64 = want.iter().map(|w| w * w).sum();
    (d / n).sqrt()
}

/// The golden set in use: `GLMTUNE_GOLDENS`, else the small set of this repository.
pub fn goldens() -> PathBuf {
    match std::env::var_os("GLMTUNE_GOLDENS") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens"),
    }
}

/// A path inside the golden set, or `None` with a loud line when this set lacks it.
pub fn golden(relative: &str) -> Option<PathBuf> {
    let path = goldens().join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("SKIPPED: this golden set has no {relative}");
    None
}

/// `manifest.json` of the golden set.
pub fn manifest() -> serde_json::Value {
    let path = goldens().join("manifest.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap()
}

/// The recommended tolerance of an entry of the manifest (`file` as the manifest spells it).
pub fn tolerance(file: &str) -> serde_json::Value {
    let manifest = manifest();
    let entries = manifest["entries"].as_array().expect("manifest has entries");
    let entry = entries
        .iter()
        .find(|e| e["file"] == file)
        .unwrap_or_else(|| panic!("manifest has no entry {file}"));
    entry["tolerance"].clone()
}

/// The CUDA device of this build, emulated or a card, or `None` with a loud line.
pub fn cuda_device() -> Option<Device> {
    match glmtune::cuda::describe(0) {
        Ok(_) => Some(Device::Cuda(0)),
        Err(why) => {
            eprintln!("SKIPPED: no CUDA device: {why}");
            None
        }
    }
}

/// Everything that computes in f32: what the goldens' own tolerances hold for.
pub fn exact_computes() -> Vec<Compute> {
    let cuda = cuda_device().map(|device| Compute {
        device,
        dtype: DType::F32,
    });
    [Compute::cpu(DType::F32)].into_iter().chain(cuda).collect()
}

/// The CUDA device in fp16 and in bf16.
pub fn half_computes() -> Vec<Compute> {
    let types = [DType::F16, DType::BF16];
    let cuda = cuda_device().into_iter();
    cuda.flat_map(|device| types.map(|dtype| Compute { device, dtype }))
        .collect()
}

/// A copy on the host.
pub fn host(tensor: &Tensor) -> Tensor {
    tensor.to_device(Device::Cpu).unwrap()
}

/// Every element as f64, wherever the tensor lives.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    host(tensor).to_f64_vec()
}

/// Tensors by name.
pub type Tensors = BTreeMap<String, Tensor>;

/// Every tensor of a safetensors file, owned (bool becomes U8).
pub fn read_safetensors(path: &Path) -> Tensors {
    let data = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file =
        safetensors::SafeTensors::deserialize(&data).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.iter()
        .map(|(name, view)| {
            let dtype = match view.dtype() {
                safetensors::Dtype::F64 => DType::F64,
                safetensors::Dtype::F32 => DType::F32,
                safetensors::Dtype::F16 => DType::F16,
                safetensors::Dtype::BF16 => DType::BF16,
                safetensors::Dtype::I64 => DType::I64,
                safetensors::Dtype::I32 => DType::I32,
                safetensors::Dtype::U8 | safetensors::Dtype::BOOL => DType::U8,
                other => panic!("{}: {name} holds {other:?}", path.display()),
            };
            let mut tensor = Tensor::zeros(dtype, view.shape());
            tensor.bytes_mut().copy_from_slice(view.data());
            (name.to_string(), tensor)
        })
        .collect()
}

/// The tensors of a safetensors file with a prefix as the official trainer saves them: a folder with `pytorch_model.bin`.
pub fn prefix_folder(weights: &Path) -> tempfile::TempDir {
    let tensors = read_safetensors(weights);
    let named: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    let dir = tempfile::tempdir().unwrap();
    glmtune::checkpoint::write_torch_bin(&dir.path().join("pytorch_model.bin"), &named).unwrap();
    dir
}
