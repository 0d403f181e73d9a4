//! A checkpoint quantised to 4 bits, written as a model folder of its own and found again at the next start.
//!
//! Tensors stream through one by one: at any time one source tensor is mapped and its 4-bit form in memory. The folder
//! appears under its name when it is whole; `glmtune.json` in it tells what it was made from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::fingerprint::{self, SourceFile, Stamp};
use super::folder::PartialFolder;
use super::{Checkpoint, LM_HEAD, SafetensorsWriter, Source, Stored, atomic, refuse_non_finite};
use crate::error::{Error, Result};
use crate::model::config::{self, QuantizationConfig};
use crate::quant::{Absmax, QuantTensor, QuantType};
use crate::tensor::{DType, Shape, Tensor};

/// The file in a 4-bit folder that tells its source.
pub const CACHE_FILE: &str = "glmtune.json";

/// The weights that are quantised, by the end of their names.
const LINEARS: [&str; 4] = [
    ".attention.query_key_value.weight",
    ".attention.dense.weight",
    ".mlp.dense_h_to_4h.weight",
    ".mlp.dense_4h_to_h.weight",
];

/// What else makes a folder a complete model: copied as it is.
const COMPANIONS: [&str; 11] = [
    "ice_text.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.txt",
    "generation_config.json",
    "configuration_chatglm.py",
    "modeling_chatglm.py",
    "quantization.py",
    "tokenization_chatglm.py",
];

/// Told of every step: source bytes done, source bytes in all, the tensor or file at hand. Its error ends the work and
/// leaves nothing behind.
pub type Progress<'a> = dyn FnMut(u64, u64, &str) -> Result<()> + 'a;

/// Where the 4-bit weights of [`open_or_quantize`] came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheStatus {
    /// There was no cache.
    Created,
    /// The cache is of this source.
    Reused,
    /// The source's files were touched, their content is the same.
    Refreshed,
    /// The source's content, or the cache itself, had changed: quantised again.
    Replaced,
    /// The source is in few bits itself and used as it is.
    AlreadyQuantized,
}

/// `glmtune.json`: what a 4-bit folder was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheRecord {
    /// The version of glmtune that wrote it.
    pub glmtune: String,
    /// `nf4` or `fp4`.
    pub quant_type: String,
    /// Are the scales quantised too?
    pub double_quant: bool,
    /// The source's files.
    pub source: Vec<SourceFile>,
}

impl CacheRecord {
    /// Reads `glmtune.json` of a 4-bit folder.
    ///
    /// # Errors
    /// There is none, or it is not what glmtune writes.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(CACHE_FILE);
        let text = fs::read(&path).map_err(Error::io(&path, "read"))?;
        serde_json::from_slice(&text).map_err(|e| {
            Error::input(
                path.display(),
                e,
                "what `glmtune quantize` writes",
                "delete that folder and quantise again",
            )
        })
    }

    fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).expect("strings and numbers are JSON");
        atomic::write(&dir.join(CACHE_FILE), format!("{text}\n").as_bytes())
    }

    /// Have the files of the source not been touched since?
    ///
    /// # Errors
    /// One of them cannot be looked at.
    pub fn is_untouched(&self, source: &Checkpoint) -> Result<bool> {
        Ok(self.stamps().eq(&fingerprint::stamps(&source_files(source))?))
    }

    fn stamps(&self) -> impl Iterator<Item = &Stamp> {
        self.source.iter().map(|file| &file.stamp)
    }
}

/// Is this weight one of the four linears of a block, which `quantize` stores in 4 bits?
pub fn is_quantized_linear(name: &str) -> bool {
    name.starts_with("transformer.layers.") && LINEARS.iter().any(|linear| name.ends_with(linear))
}

/// Is any weight of the checkpoint stored in bitsandbytes' 4-bit layout?
pub fn is_quantized(checkpoint: &Checkpoint) -> bool {
    checkpoint
        .names()
        .any(|name| name.contains(".quant_state.bitsandbytes__"))
}

/// Are the linears of the checkpoint in 4 or 8 bits, in whatever layout?
pub fn is_in_few_bits(checkpoint: &Checkpoint) -> bool {
    checkpoint.config().row_scaled.is_some() || is_quantized(checkpoint)
}

/// Where the 4-bit form of `source_dir` is kept: `nf4-cache` (`fp4-cache`, `-flat` without double quantisation) in the
/// model folder, or `<model>-nf4-cache` in `cache_dir`.
pub fn cache_folder(
    source_dir: &Path,
    cache_dir: Option<&Path>,
    quant_type: QuantType,
    double_quant: bool,
) -> PathBuf {
    let folder = format!("{quant_type}-cache{}", if double_quant { "" } else { "-flat" });
    match cache_dir {
        None => source_dir.join(folder),
        Some(root) => {
            let absolute = source_dir
                .canonicalize()
                .unwrap_or_else(|_| source_dir.to_path_buf());
            let model = absolute
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            root.join(format!("{model}-{folder}"))
        }
    }
}

/// Opens the 4-bit form of a model folder, quantising it first when there is none of the present source.
///
/// # Errors
/// The source is broken, or the cache cannot be written (a read-only model folder: `--cache-dir`).
pub fn open_or_quantize(
    source_dir: &Path,
    cache_dir: Option<&Path>,
    quant_type: QuantType,
    double_quant: bool,
    progress: &mut Progress,
) -> Result<(Checkpoint, CacheStatus)> {
    let source = Checkpoint::open(source_dir)?;
    if is_in_few_bits(&source) {
        return Ok((source, CacheStatus::AlreadyQuantized));
    }
    let cache = cache_folder(source_dir, cache_dir, quant_type, double_quant);
    let existed = cache.exists();
    if let Some((checkpoint, status)) = reuse(&source, &cache, quant_type, double_quant, progress)? {
        return Ok((checkpoint, status));
    }
    quantize_checkpoint(&source, &cache, quant_type, double_quant, progress)?;
    let status = if existed {
        CacheStatus::Replaced
    } else {
        CacheStatus::Created
    };
    Ok((Checkpoint::open(&cache)?, status))
}

/// The cache, if it is whole and of this very source.
fn reuse(
    source: &Checkpoint,
    cache: &Path,
    quant_type: QuantType,
    double_quant: bool,
    progress: &mut Progress,
) -> Result<Option<(Checkpoint, CacheStatus)>> {
    // A cache that does not open is no reason to stop: it is made again.
    let Ok(mut record) = CacheRecord::read(cache) else {
        return Ok(None);
    };
    let whole = || {
        Checkpoint::open(cache)
            .and_then(|c| c.validate().map(|()| c))
            .ok()
    };
    if record.quant_type != quant_type.name() || record.double_quant != double_quant {
        return Ok(None);
    }
    let paths = source_files(source);
    let stamps = fingerprint::stamps(&paths)?;
    if record.stamps().eq(&stamps) {
        return Ok(whole().map(|checkpoint| (checkpoint, CacheStatus::Reused)));
    }
    if !record
        .stamps()
        .map(|s| (&s.name, s.size))
        .eq(stamps.iter().map(|s| (&s.name, s.size)))
    {
        return Ok(None);
    }
    let total = stamps.iter().map(|s| s.size).sum();
    progress(0, total, "comparing the source with the one quantised before")?;
    let hashes = fingerprint::hashes(&paths)?;
    progress(total, total, "comparing the source with the one quantised before")?;
    if !record.source.iter().map(|file| &file.sha256).eq(&hashes) {
        return Ok(None);
    }
    let Some(checkpoint) = whole() else {
        return Ok(None);
    };
    record.source = files(stamps, hashes);
    // On a read-only folder the content is compared again next time, nothing worse.
    let _ = record.write(cache);
    Ok(Some((checkpoint, CacheStatus::Refreshed)))
}

/// Quantises the four linears of every block of `source` and writes the model folder `output_dir`: `model.safetensors`
/// in bitsandbytes' layout (everything else in its stored type; the head left out when it equals the embedding),
/// `config.json` with `quantization_config`, the tokenizer's files, and `glmtune.json`.
///
/// Host memory peaks at the largest source tensor (the embedding, 1.07 GB): of 5.36 GB of ChatGLM-6B's real shapes
/// (`glmtune synth --num-layers 8`, fp16 `.bin` shards) `quantize` made 1.9 GB with a VmHWM of 1,050,212 kB and 13 s of
/// CPU time, hashing included.
///
/// `quant_state` is padded with spaces to a length known in advance, which no JSON reader minds. A folder written here
/// before is replaced at the end; until then it stays as it was.
///
/// # Errors
/// The source lacks tensors, holds weights that are not numbers, is in few bits already or changes meanwhile;
/// `output_dir` cannot be written, holds something else, or is being written by another process.
pub fn quantize_checkpoint(
    source: &Checkpoint,
    output_dir: &Path,
    quant_type: QuantType,
    double_quant: bool,
    progress: &mut Progress,
) -> Result<()> {
    if is_in_few_bits(source) {
        let remedy = "use this folder as it is, or give the fp16 checkpoint";
        let found = match source.config().row_scaled {
            Some(_) => format!("linears in {}", source.config().linears()),
            None => "4-bit weights".into(),
        };
        return Err(Error::input(
            source.dir().display(),
            found,
            "a checkpoint to quantise",
            remedy,
        ));
    }
    source.validate()?;
    refuse_foreign(source, output_dir)?;
    let partial = PartialFolder::create(output_dir)?;
    let paths = source_files(source);
    let stamps = fingerprint::stamps(&paths)?;
    let cancelled = AtomicBool::new(false);
    let hashes = std::thread::scope(|scope| {
        let hashing = scope.spawn(|| {
            paths
                .iter()
                .map(|path| fingerprint::hash(path, &cancelled))
                .collect::<Result<Vec<String>>>()
        });
        let written = write_folder(
            source,
            source.dir(),
            partial.dir(),
            quant_type,
            double_quant,
            progress,
        );
        cancelled.store(written.is_err(), Ordering::Relaxed);
        let hashes = hashing.join().expect("hashing does not panic");
        written.and(hashes)
    })?;
    if let Some((_, path)) = fingerprint::stamps(&paths)?
        .iter()
        .zip(&stamps)
        .zip(&paths)
        .find(|((a, b), _)| a != b)
    {
        let remedy = "wait until the download or copy is finished, then quantise again";
        return Err(Error::input(
            path.display(),
            "a change while it was read",
            "a file at rest",
            remedy,
        ));
    }
    let record = CacheRecord {
        glmtune: env!("CARGO_PKG_VERSION").to_string(),
        quant_type: quant_type.name().to_string(),
        double_quant,
        source: files(stamps, hashes),
    };
    record.write(partial.dir())?;
    partial.commit(output_dir)
}

fn files(stamps: Vec<Stamp>, hashes: Vec<String>) -> Vec<SourceFile> {
    stamps
        .into_iter()
        .zip(hashes)
        .map(|(stamp, sha256)| SourceFile { stamp, sha256 })
        .collect()
}

/// Every file that the 4-bit folder depends on.
fn source_files(source: &Checkpoint) -> Vec<PathBuf> {
    let mut paths = vec![source.dir().join("config.json")];
    paths.extend(companions(source));
    paths.extend(source.files().iter().cloned());
    paths
}

/// The files of a model folder beside configuration and weights: tokenizer and code.
pub(crate) fn companions(source: &Checkpoint) -> impl Iterator<Item = PathBuf> {
    companions_in(source.dir())
}

fn companions_in(dir: &Path) -> impl Iterator<Item = PathBuf> {
    COMPANIONS
        .iter()
        .map(|name| dir.join(name))
        .filter(|path| path.is_file())
}

/// Writes the weights of `source` into the folder `dir`: `model.safetensors` with the four linears of every block in bitsandbytes'
/// layout and everything else in its type, the head left out when it is the embedding; beside `config.json`, tokenizer and code of
/// the model folder `base`. A linear that `source` has in these very 4 bits keeps its bits.
///
/// # Errors
/// A weight that is in other 4 bits, is no number or cannot be read; the system refuses to write.
pub(crate) fn write_folder(
    source: &dyn Source,
    base: &Path,
    dir: &Path,
    quant_type: QuantType,
    double_quant: bool,
    progress: &mut Progress,
) -> Result<()> {
    let separate = source.separate_head()?;
    let mut tensors = source.config().tensors();
    tensors.retain(|(name, _)| separate || name != LM_HEAD);

    let mut specs: Vec<(String, DType, Shape)> = Vec::new();
    let mut total = 0;
    for (name, shape) in &tensors {
        let dtype = source.dtype(name)?;
        total += (shape.elements() * dtype.size()) as u64;
        if is_quantized_linear(name) {
            specs.extend(QuantTensor::bnb_specs(
                name,
                *shape,
                dtype,
                quant_type,
                double_quant,
            ));
        } else {
            specs.push((name.clone(), dtype, *shape));
        }
    }
    let lengths: BTreeMap<String, usize> = specs
        .iter()
        .map(|(name, dtype, shape)| (name.clone(), shape.elements() * dtype.size()))
        .collect();
    let file = dir.join("model.safetensors");
    let mut writer = SafetensorsWriter::create(&file, &specs, &BTreeMap::new())?;
    let mut done = 0;
    for (name, shape) in &tensors {
        progress(done, total, name)?;
        let bytes = (shape.elements() * source.dtype(name)?.size()) as u64;
        if is_quantized_linear(name) {
            let quantized = in_four_bits(source, name, quant_type, double_quant)?;
            for (key, part) in quantized.to_bnb(name) {
                let mut bytes = std::borrow::Cow::Borrowed(part.bytes());
                if bytes.len() < lengths[&key] {
                    bytes.to_mut().resize(lengths[&key], b' ');
                }
                writer.write(&key, &bytes)?;
            }
        } else {
            let mut failure = None;
            let written = writer.write_from(name, |out| {
                for_each_piece(source, name, *shape, &mut |piece, first| {
                    progress(
                        done + bytes * first as u64 / shape.extents()[0] as u64,
                        total,
                        name,
                    )?;
                    out.write_all(piece.bytes()).map_err(Error::io(&file, "write"))
                })
                .map_err(|error| {
                    failure = Some(error);
                    std::io::Error::other("the source ended")
                })
            });
            match failure {
                Some(error) => return Err(error),
                None => written?,
            }
        }
        done += bytes;
    }
    progress(total, total, "writing to the disk")?;
    writer.finish()?;
    copy_companions(base, dir)?;
    let quantization = QuantizationConfig {
        quant_type: quant_type.name().to_string(),
        use_double_quant: double_quant,
        compute_dtype: source.config().torch_dtype.name().to_string(),
    };
    let keys = [
        ("quantization_bit", Value::Null),
        ("quantization_config", quantization.to_json()),
        ("tie_word_embeddings", json!(!separate)),
    ];
    config::copy(base, dir, &keys)
}

/// A linear of `source` in 4 bits: as it has it, or quantised from its floats.
fn in_four_bits(
    source: &dyn Source,
    name: &str,
    quant_type: QuantType,
    double_quant: bool,
) -> Result<QuantTensor> {
    let place = source.place(name);
    let floats = match source.weight(name)? {
        Stored::Dense(floats) => floats,
        Stored::Quant(weight) if weight.quant_type != QuantType::Int4 => {
            let double = matches!(weight.absmax, Absmax::Nested { .. });
            if (weight.quant_type, double) == (quant_type, double_quant) {
                return Ok(weight);
            }
            let named = |quant_type, double| match double {
                true => format!("{quant_type} with double quantisation"),
                false => format!("{quant_type} without double quantisation"),
            };
            return Err(Error::input(
                place,
                named(weight.quant_type, double),
                format!("floats, or {}", named(quant_type, double_quant)),
                "weights are not rounded to 4 bits twice: give the fp16 checkpoint, or ask for what this one is in",
            ));
        }
        few => few.decoded().to_dtype(source.dtype(name)?),
    };
    QuantTensor::quantize_named(&place, &floats, quant_type, double_quant)
}

/// Elements that are read at once.
const PIECE: usize = 1 << 22;

/// Calls `f` with the rows of a dense weight (the elements of a vector) in the source's type and their number, piece by piece:
/// host memory holds 16 MiB of it.
///
/// # Errors
/// A weight that is no number or cannot be read; those of `f`.
pub(crate) fn for_each_piece(
    source: &dyn Source,
    name: &str,
    shape: Shape,
    f: &mut dyn FnMut(&Tensor, usize) -> Result<()>,
) -> Result<()> {
    let dtype = source.dtype(name)?;
    let extents = shape.extents();
    let (rows, row) = (extents[0], extents[1..].iter().product::<usize>());
    let step = (PIECE / row.max(1)).max(1);
    for first in (0..rows).step_by(step) {
        let last = rows.min(first + step);
        source.will_be_read(name, last..rows.min(last + step));
        let piece = source.rows(name, first..last)?;
        let piece = match piece.dtype() == dtype {
            true => piece,
            false => piece.to_dtype(dtype),
        };
        refuse_non_finite(&source.place(name), &piece)?;
        f(&piece, first)?;
    }
    Ok(())
}

/// Copies tokenizer and code of the model folder `base` into `dir`.
pub(crate) fn copy_companions(base: &Path, dir: &Path) -> Result<()> {
    for path in companions_in(base) {
        let target = dir.join(path.file_name().unwrap_or_default());
        fs::copy(&path, &target).map_err(Error::io(&target, "write"))?;
    }
    Ok(())
}

/// Whatever `output_dir` holds is replaced only when `quantize` wrote it.
fn refuse_foreign(source: &Checkpoint, output_dir: &Path) -> Result<()> {
    let empty = |dir: &Path| fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    let same = |a: &Path, b: &Path| {
        a.canonicalize()
            .ok()
            .is_some_and(|a| b.canonicalize().is_ok_and(|b| a == b))
    };
    let ours = output_dir.join(CACHE_FILE).is_file() && !same(output_dir, source.dir());
    if !output_dir.exists() || ours || (output_dir.is_dir() && empty(output_dir)) {
        return Ok(());
    }
    let expected = format!("nothing, an empty folder, or one with {CACHE_FILE}");
    Err(Error::input(
        output_dir.display(),
        "other files",
        expected,
        "give another --output (or --cache-dir)",
    ))
}

#[cfg(test)]
mod tests;
