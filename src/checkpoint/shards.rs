//! The weights of a model folder: safetensors files of a bounded size, and their index.
//!
//! Weights go through in pieces of rows. While a thread of its own writes one, the next is made, and the one after that is read
//! from the disk by the system. So the disk is what a model is written at the speed of, and host memory holds a few pieces.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};

use serde_json::{Value, json};

use super::quantized::CACHE_FILE;
use super::{Checkpoint, SafetensorsWriter, atomic};
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};

/// Bytes of tensors in a file, as transformers cuts them: at most so many, or one tensor.
pub const SHARD_BYTES: u64 = 5_000_000_000;
/// Bytes of a piece, or one [`STEP`] of rows.
const PIECE: usize = 32 << 20;
/// Pieces start at multiples of so many rows, which is where products are cut too.
const STEP: usize = 256;
/// Pieces that may wait to be written.
const WAITING: usize = 2;
/// In the files' metadata: what wrote them.
const WRITER: &str = "glmtune";

/// A tensor of the folder.
#[derive(Debug, Clone)]
pub struct Part {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its type there.
    pub dtype: DType,
    /// Its extents.
    pub shape: Shape,
}

impl Part {
    fn bytes(&self) -> u64 {
        (self.shape.elements() * self.dtype.size()) as u64
    }

    /// The rows (elements of a vector) of each piece; one piece of none where there is no row.
    fn pieces(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let rows = self.shape.extents().first().copied().unwrap_or(1);
        let row = self.bytes() as usize / rows.max(1);
        let step = (PIECE / row.max(1) / STEP).max(1) * STEP;
        (0..rows.max(1))
            .step_by(step)
            .map(move |first| first..rows.min(first + step))
    }
}

/// Where the numbers of a folder come from, asked for in its order.
pub trait Pieces {
    /// Rows (elements of a vector) of a tensor, finite and of its type.
    ///
    /// # Errors
    /// They cannot be read or made.
    fn piece(&mut self, part: &Part, rows: Range<usize>) -> Result<Tensor>;

    /// These will be asked for soon.
    fn will_be_read(&mut self, _part: &Part, _rows: Range<usize>) {}
}

/// Writes `parts` into the folder `dir`: `model.safetensors`, or, of more than `most` bytes, files of at most so many (or of one tensor)
/// with `model.safetensors.index.json`. `dtype` is what the metadata call the type of the model. `progress` is told of bytes given
/// to the disk, bytes in all and the tensor at hand; its error ends the work.
///
/// # Errors
/// A piece cannot be made; the system refuses to write.
pub fn write_shards(
    dir: &Path,
    parts: &[Part],
    dtype: DType,
    most: u64,
    source: &mut dyn Pieces,
    progress: &mut dyn FnMut(u64, u64, &str) -> Result<()>,
) -> Result<()> {
    let shards = cut(parts, most);
    let files: Vec<String> = match shards.len() {
        1 => vec!["model.safetensors".to_string()],
        count => (1..=count)
            .map(|i| format!("model-{i:05}-of-{count:05}.safetensors"))
            .collect(),
    };
    let metadata = BTreeMap::from([
        ("format".to_string(), "pt".to_string()),
        (WRITER.to_string(), env!("CARGO_PKG_VERSION").to_string()),
        ("torch_dtype".to_string(), dtype.name().to_string()),
    ]);
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel::<Tensor>(WAITING);
        let (shards, files, metadata) = (&shards, &files, &metadata);
        let writing = scope.spawn(move || {
            for (shard, file) in shards.iter().zip(files) {
                write_file(&dir.join(file), shard, metadata, &receiver)?;
            }
            Ok(())
        });
        let made = make(parts, source, progress, &mut |piece| sender.send(piece).is_ok());
        drop(sender);
        let written = writing.join().expect("writing does not panic");
        // A writer that was left without pieces says so; what led to that is the reason.
        made.and(written)
    })?;
    let total: u64 = parts.iter().map(Part::bytes).sum();
    progress(total, total, "the index")?;
    if files.len() > 1 {
        let holders = shards.iter().zip(&files);
        let map: BTreeMap<&str, Value> = holders
            .flat_map(|(shard, file)| shard.iter().map(move |part| (part.name.as_str(), json!(file))))
            .collect();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        let path = dir.join("model.safetensors.index.json");
        atomic::write(&path, format!("{index:#}\n").as_bytes())?;
    }
    Ok(())
}

/// Makes every piece in its order and hands it to `send`, which says whether somebody still takes it.
fn make(
    parts: &[Part],
    source: &mut dyn Pieces,
    progress: &mut dyn FnMut(u64, u64, &str) -> Result<()>,
    send: &mut dyn FnMut(Tensor) -> bool,
) -> Result<()> {
    let total = parts.iter().map(Part::bytes).sum();
    let mut done = 0;
    let pieces = || {
        parts
            .iter()
            .flat_map(|part| part.pieces().map(move |rows| (part, rows)))
    };
    let mut ahead = pieces().skip(1);
    for (part, rows) in pieces() {
        progress(done, total, &part.name)?;
        if let Some((part, rows)) = ahead.next() {
            source.will_be_read(part, rows);
        }
        let piece = source.piece(part, rows)?;
        done += piece.byte_len() as u64;
        if !send(piece) {
            // The writer has stopped, and knows why.
            return Ok(());
        }
    }
    progress(total, total, "writing to the disk")
}

/// Tensors in their order, in files of at most `most` bytes or of one tensor.
fn cut(parts: &[Part], most: u64) -> Vec<&[Part]> {
    let mut shards = Vec::new();
    let (mut first, mut bytes) = (0, 0);
    for (i, part) in parts.iter().enumerate() {
        if i > first && bytes + part.bytes() > most {
            shards.push(&parts[first..i]);
            (first, bytes) = (i, 0);
        }
        bytes += part.bytes();
    }
    shards.push(&parts[first..]);
    shards
}

/// One file of pieces that arrive in its order.
fn write_file(
    path: &Path,
    parts: &[Part],
    metadata: &BTreeMap<String, String>,
    pieces: &Receiver<Tensor>,
) -> Result<()> {
    let specs: Vec<_> = parts
        .iter()
        .map(|part| (part.name.clone(), part.dtype, part.shape))
        .collect();
    let mut writer = SafetensorsWriter::create(path, &specs, metadata)?;
    for part in parts {
        writer.write_from(&part.name, |out| {
            for _ in part.pieces() {
                let piece = pieces
                    .recv()
                    .map_err(|_| io::Error::other("the rest was not made"))?;
                out.write_all(piece.bytes())?;
            }
            Ok(())
        })?;
    }
    writer.finish()
}

/// Refuses to write a model to `dir` where something lies that would be lost: anything but nothing, an empty folder, or with
/// `overwrite` a model that glmtune wrote. `inputs`, each with what a message calls it, are never replaced.
///
/// # Errors
/// As said.
pub fn check_output(dir: &Path, inputs: &[(&str, &Path)], overwrite: bool) -> Result<()> {
    let wrong = |found: String, expected: &str, remedy: &str| {
        Err(Error::input(dir.display(), found, expected, remedy))
    };
    for (what, input) in inputs {
        if let (Ok(a), Ok(b)) = (dir.canonicalize(), input.canonicalize())
            && b.starts_with(&a)
        {
            let inside = if a == b { "" } else { ", which lies inside" };
            return wrong(
                format!("{what}{inside}"),
                "another folder",
                "give another --output",
            );
        }
    }
    if !dir.exists() {
        return Ok(());
    }
    if !dir.is_dir() {
        return wrong("a file".into(), "a folder", "give another --output");
    }
    let mut entries = std::fs::read_dir(dir).map_err(Error::io(dir, "list"))?;
    let Some(first) = entries.next() else {
        return Ok(());
    };
    let mut foreign = std::fs::read_dir(dir).map_err(Error::io(dir, "list"))?.flatten();
    match (is_ours(dir), overwrite) {
        (true, true) => match foreign.find(is_foreign) {
            None => Ok(()),
            Some(entry) => wrong(
                format!(
                    "{}, which glmtune did not write",
                    entry.file_name().to_string_lossy()
                ),
                "a model that glmtune wrote, and nothing else",
                "move it away, or give another --output",
            ),
        },
        (true, false) => wrong(
            "a model that glmtune wrote before".into(),
            "nothing or an empty folder",
            "give --overwrite to replace it, or another --output",
        ),
        (false, _) => {
            let name = first.map(|entry| entry.file_name().to_string_lossy().into_owned());
            let name = name.unwrap_or_default();
            wrong(
                format!("other files ({name} ...)"),
                "nothing, an empty folder, or a model that glmtune wrote",
                "give another --output",
            )
        }
    }
}

/// Is this no part of a model folder? Only the 4-bit copies are folders themselves.
fn is_foreign(entry: &std::fs::DirEntry) -> bool {
    let name = entry.file_name().to_string_lossy().into_owned();
    match entry.file_type() {
        Ok(kind) if kind.is_file() => {
            let parts = [".safetensors", ".bin", ".json", ".py", ".md", ".txt", ".model"];
            !parts.iter().any(|part| name.ends_with(part))
        }
        Ok(kind) if kind.is_dir() => !(name.starts_with("nf4-cache") || name.starts_with("fp4-cache")),
        _ => true,
    }
}

/// Did glmtune write the model folder `dir`? It says so in the files' metadata, in a record or in the model card.
fn is_ours(dir: &Path) -> bool {
    let metadata = || Checkpoint::open(dir).and_then(|c| c.metadata());
    let card = || std::fs::read_to_string(dir.join("README.md")).unwrap_or_default();
    dir.join(CACHE_FILE).exists()
        || metadata().is_ok_and(|m| m.contains_key(WRITER) && m.contains_key("torch_dtype"))
        || card().starts_with("---\n") && card().contains("\n- glmtune\n")
}
