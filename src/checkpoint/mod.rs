//! Model weights and run state on disk.
//!
//! Reading: [`Checkpoint`] is an open Hugging Face folder; its tensors are mapped where the files store them, nothing
//! is copied, and nothing that a file says is executed or trusted. Writing: everything goes to a temporary file that is
//! renamed when it is whole.

mod adapter;
pub mod atomic;
mod entry;
mod fingerprint;
mod folder;
mod index;
mod map;
mod pickle;
pub mod quantized;
mod safetensors;
mod scratch;
mod torch_bin;
mod torch_writer;
mod validate;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use adapter::{AdapterConfig, read_adapter, write_adapter};
pub(crate) use folder::PartialFolder;
pub use safetensors::{SafetensorsWriter, write_safetensors};
pub use scratch::ScratchFile;
pub use torch_writer::{TorchBinWriter, write_torch_bin};

use self::entry::Entry;
use self::map::MappedFile;
use self::pickle::printable;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::tensor::{DType, Shape, Tensor};

/// The embedding, `[vocab_size, hidden_size]`.
pub const WORD_EMBEDDINGS: &str = "transformer.word_embeddings.weight";
/// The output projection, `[vocab_size, hidden_size]`; equal to the embedding in the published files.
pub const LM_HEAD: &str = "lm_head.weight";

/// An open Hugging Face model folder: headers read, files open, no weight in memory.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    paths: Vec<PathBuf>,
    files: Vec<MappedFile>,
    /// Name to file number and entry.
    tensors: BTreeMap<String, (usize, Entry)>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and weights: `model.safetensors`, sharded safetensors, `pytorch_model.bin` or
    /// sharded `.bin`, in this order of preference (that of transformers).
    ///
    /// # Errors
    /// The folder, a file or a shard is missing, truncated, hostile or contradicts the index. Names and shapes of
    /// tensors are checked by [`Checkpoint::validate`].
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            let found = if dir.exists() { "a file" } else { "nothing" };
            let remedy = "give the folder with config.json and the weights";
            return Err(Error::input(dir.display(), found, "a model folder", remedy));
        }
        let config = ModelConfig::read(dir)?;
        let source = index::find(dir)?;
        let mut paths: Vec<PathBuf> = Vec::new();
        let mut files = Vec::new();
        let mut tensors: BTreeMap<String, (usize, Entry)> = BTreeMap::new();
        for path in source.paths {
            let file = MappedFile::open(&path)?;
            for entry in entries(&file)? {
                let name = entry.name.clone();
                if let Some((first, _)) = tensors.insert(name.clone(), (files.len(), entry)) {
                    let first = paths.get(first).unwrap_or(&path);
                    return Err(Error::input(
                        entry::place(&path, &name),
                        format!("a tensor that {} holds too", first.display()),
                        "each tensor once",
                        "remove the file that does not belong to this checkpoint",
                    ));
                }
            }
            paths.push(path);
            files.push(file);
        }
        if let Some(index) = source.index {
            index.check(|name| tensors.get(name).map(|(file, _)| paths[*file].as_path()))?;
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            config,
            paths,
            files,
            tensors,
        })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Every tensor's name, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Is there a tensor of this name?
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The type a tensor is stored in.
    pub fn dtype(&self, name: &str) -> Option<DType> {
        self.tensors.get(name).map(|(_, entry)| entry.dtype)
    }

    /// The extents of a tensor.
    pub fn shape(&self, name: &str) -> Option<Shape> {
        self.tensors.get(name).map(|(_, entry)| entry.shape)
    }

    /// A tensor, mapped in place. Its pages are given back when the tensor is dropped.
    ///
    /// # Errors
    /// There is no such tensor, or its file shrank since it was opened.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some((file, entry)) = self.tensors.get(name) else {
            return Err(Error::input(
                self.dir.display(),
                format!("no tensor {}", printable(name)),
                "a checkpoint that holds it",
                "download the missing shard, or check that this is the right model",
            ));
        };
        read(&self.files[*file], entry)
    }

    /// `file: tensor`, for messages.
    pub fn place(&self, name: &str) -> String {
        match self.tensors.get(name) {
            Some((file, _)) => entry::place(&self.paths[*file], name),
            None => entry::place(&self.dir, name),
        }
    }

    /// The files that hold the weights.
    pub fn files(&self) -> &[PathBuf] {
        &self.paths
    }

    /// Free-form `__metadata__` of the safetensors files, all together (empty for `.bin`).
    ///
    /// # Errors
    /// A file changed since it was opened.
    pub fn metadata(&self) -> Result<BTreeMap<String, String>> {
        let mut out = BTreeMap::new();
        for file in self.files.iter().filter(|file| is_safetensors(file.path())) {
            out.extend(safetensors::metadata(file)?);
        }
        Ok(out)
    }

    /// Does the checkpoint hold an `lm_head` that differs from the embedding? Reads both, up to the first difference.
    ///
    /// # Errors
    /// A file changed since it was opened.
    pub fn has_separate_head(&self) -> Result<bool> {
        if !self.contains(LM_HEAD) || !self.contains(WORD_EMBEDDINGS) {
            return Ok(false);
        }
        let (head, embedding) = (self.tensor(LM_HEAD)?, self.tensor(WORD_EMBEDDINGS)?);
        Ok(head.dtype() != embedding.dtype() || head.bytes() != embedding.bytes())
    }

    /// Checks that the folder holds exactly the tensors of ChatGLM-6B with the sizes of `config.json`.
    ///
    /// `rotary_emb.inv_freq` is ignored, `lm_head.weight` may be missing when it is tied, and a linear's weight may be
    /// stored in bitsandbytes' 4-bit layout.
    ///
    /// # Errors
    /// One message that names every missing, extra and mis-shaped tensor (the first 20), with what was expected.
    pub fn validate(&self) -> Result<()> {
        validate::validate(self)
    }
}

/// Every tensor of one `.safetensors` or torch `.bin` file, mapped in place.
///
/// # Errors
/// The file is missing, truncated, hostile, or none of both formats.
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let file = MappedFile::open(path)?;
    entries(&file)?
        .into_iter()
        .map(|entry| Ok((entry.name.clone(), read(&file, &entry)?)))
        .collect()
}

/// The free-form `__metadata__` of a `.safetensors` file.
///
/// # Errors
/// The file is missing, truncated, or of another format.
pub fn read_metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    safetensors::metadata(&MappedFile::open(path)?)
}

/// A NaN never goes on unseen: refuses a tensor of floats that holds one, or an infinity.
pub(crate) fn refuse_non_finite(place: &str, tensor: &Tensor) -> Result<()> {
    let exponent_full = |bits: u16, mask: u16| bits & mask == mask;
    let bad = match tensor.dtype() {
        DType::F16 => tensor
            .as_slice::<half::f16>()
            .iter()
            .position(|x| exponent_full(x.to_bits(), 0x7c00)),
        DType::BF16 => tensor
            .as_slice::<half::bf16>()
            .iter()
            .position(|x| exponent_full(x.to_bits(), 0x7f80)),
        DType::F32 => tensor.as_slice::<f32>().iter().position(|x| !x.is_finite()),
        // Held in f32 at most: what becomes infinite there is no weight either.
        DType::F64 => tensor
            .as_slice::<f64>()
            .iter()
            .position(|&x| !(x as f32).is_finite()),
        _ => None,
    };
    match bad {
        None => Ok(()),
        Some(i) => {
            let remedy = "the file is damaged: download, convert or train it again";
            Err(Error::input(
                format!("{place}[{i}]"),
                "NaN or infinity",
                "a finite weight",
                remedy,
            ))
        }
    }
}

fn is_safetensors(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "safetensors")
}

fn entries(file: &MappedFile) -> Result<Vec<Entry>> {
    if is_safetensors(file.path()) {
        safetensors::entries(file)
    } else {
        torch_bin::entries(file)
    }
}

fn read(file: &MappedFile, entry: &Entry) -> Result<Tensor> {
    Tensor::from_bytes(file.bytes(entry.range.clone())?, entry.dtype, entry.shape)
}
