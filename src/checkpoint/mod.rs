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
pub mod ggml;
mod index;
mod map;
mod notice;
mod pickle;
pub mod quantized;
mod rows;
mod safetensors;
mod scratch;
pub mod shards;
mod source;
mod torch_bin;
mod torch_writer;
mod validate;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

pub use adapter::{AdapterConfig, PEFT_PREFIX, Patterns, read_adapter, write_adapter, write_adapter_twice};
pub(crate) use folder::PartialFolder;
pub(crate) use notice::say_once;
pub use safetensors::{SafetensorsWriter, write_safetensors};
pub use scratch::{ScratchFile, evict, free_disk};
pub use shards::check_output;
pub use source::{Source, Stored};
pub use torch_writer::{TorchBinWriter, write_torch_bin};

use self::entry::Entry;
use self::map::MappedFile;
use self::pickle::printable;
use self::quantized::is_quantized_linear;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::quant::QuantTensor;
use crate::tensor::{DType, Shape, Tensor};

/// The embedding, `[vocab_size, hidden_size]`.
pub const WORD_EMBEDDINGS: &str = "transformer.word_embeddings.weight";
/// The output projection, `[vocab_size, hidden_size]`; equal to the embedding in the published files.
pub const LM_HEAD: &str = "lm_head.weight";

/// Rows of head and embedding that are compared at once: 32 MiB of float16.
const COMPARED_ROWS: usize = 4096;

/// An open Hugging Face model folder: headers read, files open, no weight in memory.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: ModelConfig,
    paths: Vec<PathBuf>,
    files: Vec<MappedFile>,
    /// Name to file number and entry.
    tensors: BTreeMap<String, (usize, Entry)>,
    /// Is the head another matrix than the embedding? Known once it was asked for: both are read for it.
    separate_head: OnceLock<bool>,
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
            separate_head: OnceLock::new(),
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
        let (file, entry) = self.entry(name)?;
        read(file, entry)
    }

    /// The bytes of a tensor, whatever its type, as U8 of another shape: codes in the containers of others.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`]; or it does not have as many bytes.
    fn bytes_of(&self, name: &str, shape: impl Into<Shape>) -> Result<Tensor> {
        let (file, entry) = self.entry(name)?;
        let shape = shape.into();
        if entry.range.len() != shape.elements() {
            return Err(Error::input(
                self.place(name),
                format!("{} bytes of {}", entry.range.len(), entry.dtype),
                format!("{} bytes of codes", shape.elements()),
                "download the checkpoint again, all of it from one repository",
            ));
        }
        Tensor::from_bytes(file.bytes(entry.range.clone())?, DType::U8, shape)
    }

    fn entry(&self, name: &str) -> Result<(&MappedFile, &Entry)> {
        match self.tensors.get(name) {
            Some((file, entry)) => Ok((&self.files[*file], entry)),
            None => Err(Error::input(
                self.dir.display(),
                format!("no tensor {}", printable(name)),
                "a checkpoint that holds it",
                "download the missing shard, or check that this is the right model",
            )),
        }
    }

    /// The extents that a matrix of this name has by `config.json`.
    fn expected_shape(&self, name: &str) -> Result<Shape> {
        let mut tensors = self.config.tensors().into_iter();
        let found = tensors.find(|(tensor, _)| tensor == name);
        found.map(|(_, shape)| shape).ok_or_else(|| {
            let expected = "a tensor of a ChatGLM-6B with the layers of config.json";
            Error::input(self.dir.display(), printable(name), expected, "check the name")
        })
    }

    /// Rows of a tensor, mapped in place: elements of one that is a vector.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`]; there are fewer.
    pub fn tensor_rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        let Some((file, entry)) = self.tensors.get(name) else {
            return self.tensor(name);
        };
        let (shape, bytes) = entry.rows(&rows, || self.place(name))?;
        Tensor::from_bytes(self.files[*file].bytes(bytes)?, entry.dtype, shape)
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
        if let Some(known) = self.separate_head.get() {
            return Ok(*known);
        }
        let separate = self.head_differs()?;
        Ok(*self.separate_head.get_or_init(|| separate))
    }

    fn head_differs(&self) -> Result<bool> {
        if !self.contains(LM_HEAD) || !self.contains(WORD_EMBEDDINGS) {
            return Ok(false);
        }
        let key = |name: &str| (self.dtype(name), self.shape(name));
        if key(LM_HEAD) != key(WORD_EMBEDDINGS) {
            return Ok(true);
        }
        // In pieces: of two whole matrices that are mapped and read, 2 GB would be in memory.
        let rows = self.shape(LM_HEAD).map_or(0, |shape| shape.rows_and_columns().0);
        for first in (0..rows).step_by(COMPARED_ROWS) {
            let piece = |name| self.tensor_rows(name, first..rows.min(first + COMPARED_ROWS));
            if piece(LM_HEAD)?.bytes() != piece(WORD_EMBEDDINGS)?.bytes() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Checks that the folder holds exactly the tensors of ChatGLM-6B with the sizes of `config.json`.
    ///
    /// `rotary_emb.inv_freq` is ignored, `lm_head.weight` may be missing when it is tied, and the weights of linears are in the
    /// form that `config.json` says: floats, bitsandbytes' 4 or 8 bits, THUDM's int4 or int8.
    ///
    /// # Errors
    /// One message that names every missing, extra and mis-shaped tensor (the first 20), with what was expected.
    pub fn validate(&self) -> Result<()> {
        validate::validate(self)
    }
}

impl Source for Checkpoint {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn separate_head(&self) -> Result<bool> {
        self.has_separate_head()
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        if self.config.row_scaled.is_some() && is_quantized_linear(name) {
            // The tensors do not say what it was made of, and decoding it would tell no more.
            return self.entry(name).map(|_| self.config.torch_dtype);
        }
        Ok(match self.weight(name)? {
            Stored::Dense(tensor) => tensor.dtype(),
            Stored::Quant(weight) => weight.source_dtype,
            Stored::Int8(weight) => weight.source_dtype,
        })
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        if let Some(form) = self.config.row_scaled.filter(|_| is_quantized_linear(name)) {
            return rows::read(self, name, form, self.expected_shape(name)?);
        }
        if validate::quant_state(self, name).is_some() {
            let shape = self.expected_shape(name)?;
            let weight = QuantTensor::from_bnb(name, |n| match n == name {
                true => self.bytes_of(n, [shape.elements().div_ceil(2), 1]),
                false => self.tensor(n),
            })?;
            if weight.shape != shape {
                let remedy = "take config.json and all weights from the same model";
                return Err(Error::input(self.place(name), weight.shape, shape, remedy));
            }
            return Ok(Stored::Quant(weight));
        }
        let stored = self.tensor(name)?;
        if !stored.dtype().is_float() {
            let remedy = "take config.json and all weights from the same model";
            return Err(Error::input(self.place(name), stored.dtype(), "floats", remedy));
        }
        Ok(Stored::Dense(stored))
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        match self.dtype(name) {
            // 4-bit codes may lie in floats.
            Some(dtype) if dtype.is_float() && validate::quant_state(self, name).is_none() => {
                self.tensor_rows(name, rows)
            }
            _ => {
                let whole = self.dense(name)?;
                source::rows_of(whole.shape(), &rows, &self.place(name))?;
                Ok(whole.rows(rows))
            }
        }
    }

    fn will_be_read(&self, name: &str, rows: Range<usize>) {
        if let Some((file, entry)) = self.tensors.get(name)
            && let Ok((_, bytes)) = entry.rows(&rows, || self.place(name))
        {
            self.files[*file].will_be_read(bytes);
        }
    }

    fn place(&self, name: &str) -> String {
        Checkpoint::place(self, name)
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

/// Every tensor of the weights in a folder, whatever they are of, mapped in place: one file, or shards and their index.
///
/// # Errors
/// There are none, or as [`read_tensors`].
pub fn read_folder(dir: &Path) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for path in weight_files(dir)? {
        tensors.extend(read_tensors(&path)?);
    }
    Ok(tensors)
}

/// The files of weights that [`read_folder`] reads: one, or the shards of an index in the order of their names.
///
/// # Errors
/// There are none, or a shard of the index is missing.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(index::find(dir)?.paths)
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
        DType::F16 => first(tensor.as_slice::<half::f16>(), |x| {
            exponent_full(x.to_bits(), 0x7c00)
        }),
        DType::BF16 => first(tensor.as_slice::<half::bf16>(), |x| {
            exponent_full(x.to_bits(), 0x7f80)
        }),
        DType::F32 => first(tensor.as_slice::<f32>(), |x| !x.is_finite()),
        // Held in f32 at most: what becomes infinite there is no weight either.
        DType::F64 => first(tensor.as_slice::<f64>(), |x| !(x as f32).is_finite()),
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

/// The index of the first element that is `bad`. Without a way out of the inner loop it takes vectors.
fn first<T: Copy>(elements: &[T], bad: impl Fn(T) -> bool) -> Option<usize> {
    const PIECE: usize = 4096;
    let (number, piece) = elements
        .chunks(PIECE)
        .enumerate()
        .find(|(_, piece)| piece.iter().fold(false, |any, &x| any | bad(x)))?;
    let within = piece.iter().position(|&x| bad(x))?;
    Some(number * PIECE + within)
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
