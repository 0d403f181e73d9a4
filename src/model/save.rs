//! A model as a checkpoint folder: what [`super::Model::load`] and the official code read.
//!
//! Tensors go one by one, in pieces, from where they live into the file: host memory holds at most one of them beside what
//! the model itself has there.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde_json::{Value, json};

use super::{Model, config};
use crate::checkpoint::quantized::{companions, is_quantized, is_quantized_linear};
use crate::checkpoint::{
    Checkpoint, LM_HEAD, PartialFolder, SafetensorsWriter, WORD_EMBEDDINGS, atomic, refuse_non_finite,
};
use crate::error::{Error, Result};
use crate::nn::Param;
use crate::tensor::{DType, Device, Shape, Tensor};

/// Bytes of tensors in a file, as transformers cuts them: at most so many, or one tensor.
pub const SHARD_BYTES: u64 = 5_000_000_000;
/// Elements that are converted at once.
const PIECE: usize = 1 << 20;
/// In the files' metadata: what wrote them.
const WRITER: &str = "glmtune";

/// Where a tensor of the folder comes from.
enum Origin<'a> {
    /// The model.
    Model(&'a Param),
    /// The base: the model has no use for it, or not another one.
    Base,
}

/// A tensor of the folder, in the base's type.
struct Entry<'a> {
    name: String,
    dtype: DType,
    shape: Shape,
    origin: Origin<'a>,
}

impl Entry<'_> {
    fn bytes(&self) -> u64 {
        (self.shape.elements() * self.dtype.size()) as u64
    }
}

/// Writes `model` into the folder `dir`, with the names, types, configuration, tokenizer and code of the folder `base`.
///
/// Each tensor is rounded to the type in which the base stores it: float16 for the official checkpoints, which the files'
/// metadata and `config.json` say. A tied head is written twice, as the official files do, if the base has it twice; one
/// that has become separate makes `tie_word_embeddings` false. Files of more than `shard_bytes` are cut, with an index.
///
/// # Errors
/// The base is in 4 bits or another model; the model has an adapter; a weight is beyond what its type can hold; `dir` holds
/// other files or cannot be written.
pub(super) fn save(model: &Model, base: &Path, dir: &Path, shard_bytes: u64) -> Result<()> {
    let source = Checkpoint::open(base)?;
    if is_quantized(&source) {
        let remedy = "give the fp16 checkpoint that it was made from";
        return Err(Error::input(
            base.display(),
            "4-bit weights",
            "dense ones",
            remedy,
        ));
    }
    refuse_foreign(&source, dir)?;
    let entries = entries(model, &source)?;
    let shards = cut(&entries, shard_bytes);
    let folder = PartialFolder::create(dir)?;
    let metadata = BTreeMap::from([
        ("format".to_string(), "pt".to_string()),
        (WRITER.to_string(), env!("CARGO_PKG_VERSION").to_string()),
        (
            "torch_dtype".to_string(),
            stored_dtype(&source).name().to_string(),
        ),
    ]);
    let mut files = BTreeMap::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "model.safetensors".to_string(),
            count => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let specs: Vec<_> = shard.iter().map(|e| (e.name.clone(), e.dtype, e.shape)).collect();
        let mut writer = SafetensorsWriter::create(&folder.dir().join(&file), &specs, &metadata)?;
        for entry in *shard {
            write(&source, entry, &mut writer)?;
            files.insert(entry.name.clone(), Value::from(file.clone()));
        }
        writer.finish()?;
    }
    if shards.len() > 1 {
        let total: u64 = entries.iter().map(Entry::bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": files });
        let path = folder.dir().join("model.safetensors.index.json");
        atomic::write(&path, format!("{index:#}\n").as_bytes())?;
    }
    for path in companions(&source) {
        let target = folder.dir().join(path.file_name().unwrap_or_default());
        std::fs::copy(&path, &target).map_err(Error::io(&target, "write"))?;
    }
    // transformers ties them unless it is told otherwise.
    let separate = match model.stored_head {
        Some(_) => source.has_separate_head()?,
        None => model.lm_head.is_some(),
    };
    let keys = match separate {
        true => vec![("tie_word_embeddings", json!(false))],
        false => Vec::new(),
    };
    config::copy(base, folder.dir(), &keys)?;
    folder.commit(dir)
}

/// The type of the largest tensor.
fn stored_dtype(source: &Checkpoint) -> DType {
    source
        .dtype(WORD_EMBEDDINGS)
        .unwrap_or(source.config().torch_dtype)
}

/// The tensors of the base, in its order, and a head that it has not.
fn entries<'a>(model: &'a Model, source: &Checkpoint) -> Result<Vec<Entry<'a>>> {
    let mut params = BTreeMap::new();
    model.for_each_param(&mut |name, param| {
        params.insert(name.to_string(), param);
    });
    let mut names: Vec<String> = source.names().map(str::to_string).collect();
    if params.contains_key(LM_HEAD) && !source.contains(LM_HEAD) {
        names.push(LM_HEAD.to_string());
    }
    let mut entries = Vec::with_capacity(names.len());
    for name in names {
        let origin = match params.remove(&name) {
            Some(param) => Origin::Model(param),
            None if name == LM_HEAD && model.stored_head.is_some() => Origin::Base,
            None if name == LM_HEAD => Origin::Model(&model.embedding),
            None if is_quantized_linear(&name) => {
                let remedy = "load the base dense: a 4-bit model is no checkpoint of its base";
                return Err(Error::input(name, "a weight in 4 bits", "a dense one", remedy));
            }
            None => Origin::Base,
        };
        let dtype = source.dtype(&name).unwrap_or(stored_dtype(source));
        let shape = match (&origin, source.shape(&name)) {
            (Origin::Model(param), stored) => {
                let shape = param.value.shape();
                if stored.is_some_and(|stored| stored != shape) {
                    let found = format!("{shape} in the model");
                    let expected = format!("{}", stored.unwrap_or(shape));
                    let remedy = "give the base that the model was loaded from";
                    return Err(Error::input(source.place(&name), found, expected, remedy));
                }
                shape
            }
            (Origin::Base, stored) => stored.unwrap_or(Shape::new(&[])),
        };
        entries.push(Entry {
            name,
            dtype,
            shape,
            origin,
        });
    }
    if let Some(name) = params.keys().next() {
        let found = format!("{name}, which the base has not");
        let remedy = "an adapter or a prefix is saved by itself; merge an adapter first";
        return Err(Error::input(
            "save the model",
            found,
            "weights of the base",
            remedy,
        ));
    }
    Ok(entries)
}

/// Entries in their order, in pieces of at most `most` bytes or of one tensor.
fn cut<'a, 'b>(entries: &'b [Entry<'a>], most: u64) -> Vec<&'b [Entry<'a>]> {
    let mut shards = Vec::new();
    let (mut first, mut bytes) = (0, 0);
    for (i, entry) in entries.iter().enumerate() {
        if i > first && bytes + entry.bytes() > most {
            shards.push(&entries[first..i]);
            (first, bytes) = (i, 0);
        }
        bytes += entry.bytes();
    }
    shards.push(&entries[first..]);
    shards
}

fn write(source: &Checkpoint, entry: &Entry<'_>, writer: &mut SafetensorsWriter) -> Result<()> {
    let Origin::Model(param) = entry.origin else {
        return writer.write(&entry.name, source.tensor(&entry.name)?.bytes());
    };
    let copied;
    let value = match param.value.device() {
        Device::Cpu => &param.value,
        Device::Cuda(_) => {
            copied = param.value.to_device(Device::Cpu)?;
            &copied
        }
    };
    // A frozen value that the device holds in another type of 16 bits, or in one that is narrower than the base's: what has
    // not changed keeps the base's bits.
    let narrowed = value.dtype() != entry.dtype && value.dtype().size() <= entry.dtype.size();
    if narrowed && !param.trains() && source.contains(&entry.name) {
        let stored = source.tensor(&entry.name)?;
        if same_rounded(&stored, value) {
            return writer.write(&entry.name, stored.bytes());
        }
    }
    writer.write_from(&entry.name, |out| {
        pieces(value, |piece| {
            let rounded = piece.to_dtype(entry.dtype);
            if refuse_non_finite(&entry.name, &rounded).is_err() {
                let what = format!("{} holds a number that {} cannot", entry.name, entry.dtype);
                return Err(io::Error::other(what));
            }
            out.write_all(rounded.bytes())
        })
    })
}

/// Calls `f` on the tensor in pieces, in their order.
fn pieces<E>(tensor: &Tensor, mut f: impl FnMut(&Tensor) -> Result<(), E>) -> Result<(), E> {
    let size = tensor.dtype().size();
    for bytes in tensor.bytes().chunks(PIECE * size) {
        let mut piece = Tensor::zeros(tensor.dtype(), [bytes.len() / size]);
        piece.bytes_mut().copy_from_slice(bytes);
        f(&piece)?;
    }
    Ok(())
}

/// Is `value` what becomes of `stored` in its type?
fn same_rounded(stored: &Tensor, value: &Tensor) -> bool {
    let size = value.dtype().size();
    let mut at = 0;
    let compared = pieces(stored, |piece| {
        let bytes = piece.elements() * size;
        let same = piece.to_dtype(value.dtype()).bytes() == &value.bytes()[at..at + bytes];
        at += bytes;
        match same {
            true => Ok(()),
            false => Err(()),
        }
    });
    compared.is_ok()
}

/// What `dir` holds is replaced only when this module wrote it.
fn refuse_foreign(source: &Checkpoint, dir: &Path) -> Result<()> {
    let empty = |dir: &Path| std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    let same = match (dir.canonicalize(), source.dir().canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    };
    let ours = || {
        let metadata = Checkpoint::open(dir).and_then(|c| c.metadata());
        metadata.is_ok_and(|m| m.contains_key(WRITER) && m.contains_key("torch_dtype"))
    };
    if !dir.exists() || !same && dir.is_dir() && (empty(dir) || ours()) {
        return Ok(());
    }
    let found = if same {
        "the base model itself"
    } else {
        "other files"
    };
    let expected = "nothing, an empty folder, or a model that glmtune trained";
    Err(Error::input(
        dir.display(),
        found,
        expected,
        "give another folder",
    ))
}
