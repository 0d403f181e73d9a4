//! safetensors files: a validated header, and tensors used where they lie.

use std::collections::BTreeMap;
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value, json};

use super::atomic::AtomicFile;
use super::entry::{Entry, checked_shape, place};
use super::map::MappedFile;
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};

/// The tensors of a safetensors file.
///
/// # Errors
/// A truncated file, a header that contradicts itself, a type this crate has no use for.
pub(super) fn entries(file: &MappedFile) -> Result<Vec<Entry>> {
    let all = file.bytes(0..file.len())?;
    let (start, metadata) = header(file, all.as_slice())?;
    let mut out = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = dtype(info.dtype).ok_or_else(|| {
            Error::input(
                place(file.path(), &name),
                format!("{:?}", info.dtype),
                "F16, BF16, F32, F64, I32, I64, I8, U8 or BOOL",
                "use the fp16 weights",
            )
        })?;
        let (shape, _) = checked_shape(file.path(), &name, &info.shape, dtype)?;
        let (begin, end) = info.data_offsets;
        out.push(Entry {
            name,
            dtype,
            shape,
            range: start + begin..start + end,
        });
    }
    Ok(out)
}

/// The free-form `__metadata__` of a safetensors file.
pub(super) fn metadata(file: &MappedFile) -> Result<BTreeMap<String, String>> {
    let all = file.bytes(0..file.len())?;
    let (_, metadata) = header(file, all.as_slice())?;
    Ok(metadata
        .metadata()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect())
}

/// Where the data starts, and the validated header.
fn header(file: &MappedFile, bytes: &[u8]) -> Result<(usize, safetensors::tensor::Metadata)> {
    let (length, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| {
        let remedy = if bytes.starts_with(b"version https://git-lfs") {
            "this is a Git LFS pointer: run `git lfs pull` in that folder, or download the file itself"
        } else {
            "the file is truncated or damaged: download it again and compare its size and sha256"
        };
        Error::input(
            file.path().display(),
            format!("{} bytes that are no safetensors file ({e})", bytes.len()),
            "a header and the data it describes",
            remedy,
        )
    })?;
    Ok((8 + length, metadata))
}

fn dtype(dtype: Dtype) -> Option<DType> {
    Some(match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::U8 | Dtype::BOOL => DType::U8,
        Dtype::I8 => DType::I8,
        _ => return None,
    })
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "F64",
        DType::F32 => "F32",
        DType::F16 => "F16",
        DType::BF16 => "BF16",
        DType::I64 => "I64",
        DType::I32 => "I32",
        DType::U8 => "U8",
        DType::I8 => "I8",
    }
}

/// Writes tensors to a safetensors file: temporary file, fsync, rename. A full disk leaves an old file whole.
///
/// # Errors
/// Two tensors of the same name, or the system refuses to write.
pub fn write_safetensors(
    path: &Path,
    tensors: &[(String, &Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, t)| (name.clone(), t.dtype(), t.shape()))
        .collect();
    let mut writer = SafetensorsWriter::create(path, &specs, metadata)?;
    for (name, tensor) in tensors {
        writer.write(name, tensor.bytes())?;
    }
    writer.finish()
}

/// Writes a safetensors file tensor by tensor, in any order; it appears under its name when all are there.
///
/// The file orders tensors by element size, largest first, and the data starts at a multiple of 8 bytes: every tensor
/// is aligned for its type and can be used in place. Dropping an unfinished writer removes the temporary file.
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    place: String,
    ranges: BTreeMap<String, Range<u64>>,
    missing: usize,
    written: BTreeMap<String, bool>,
}

impl SafetensorsWriter {
    /// Starts the file with a header for `specs`; `metadata` is stored as `__metadata__` (`format: pt` when empty, as
    /// transformers asks for).
    ///
    /// # Errors
    /// Two specs of the same name, or the system refuses to write.
    pub fn create(
        path: &Path,
        specs: &[(String, DType, Shape)],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let mut order: Vec<_> = specs.iter().collect();
        order.sort_by_key(|(_, dtype, _)| std::cmp::Reverse(dtype.size()));
        let mut header = Map::new();
        header.insert(
            "__metadata__".into(),
            if metadata.is_empty() {
                json!({ "format": "pt" })
            } else {
                json!(metadata)
            },
        );
        let mut position = 0u64;
        let mut ranges = BTreeMap::new();
        for (name, dtype, shape) in order {
            let (_, bytes) = checked_shape(path, name, shape.extents(), *dtype)?;
            let end = position + bytes as u64;
            let info = json!({
                "dtype": dtype_name(*dtype), "shape": shape.extents(), "data_offsets": [position, end]
            });
            ranges.insert(name.clone(), position..end);
            if header.insert(name.clone(), info).is_some() {
                return Err(Error::input(
                    path.display(),
                    format!("two tensors named {name}"),
                    "each name once",
                    "rename one of them",
                ));
            }
            position = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let start = 8 + header.len() as u64;
        for range in ranges.values_mut() {
            *range = range.start + start..range.end + start;
        }
        let mut file = AtomicFile::create(path)?;
        let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io(path, "write"));
        write(&(header.len() as u64).to_le_bytes())?;
        write(&header)?;
        let written = ranges.keys().map(|name| (name.clone(), false)).collect();
        Ok(Self {
            file,
            place: path.display().to_string(),
            missing: ranges.len(),
            ranges,
            written,
        })
    }

    /// Writes the bytes of one tensor.
    ///
    /// # Errors
    /// A name that is not in the header or was written already, another number of bytes, a full disk.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write_from(name, |w| w.write_all(bytes))
    }

    /// Writes one tensor by a function that produces its bytes piece by piece.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::write`].
    pub fn write_from(
        &mut self,
        name: &str,
        produce: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<()> {
        let io = |e| Error::Io {
            path: self.place.clone().into(),
            action: "write",
            source: e,
        };
        let wrong = |found: String, expected: String| {
            Error::input(
                format!("{}: {name}", self.place),
                found,
                expected,
                "this is a bug: please report it",
            )
        };
        let range = match (self.ranges.get(name), self.written.get(name)) {
            (Some(range), Some(false)) => range.clone(),
            (Some(_), _) => return Err(wrong("a second write".into(), "each tensor once".into())),
            (None, _) => return Err(wrong("a write".into(), "a tensor named in the header".into())),
        };
        self.file.seek(SeekFrom::Start(range.start)).map_err(io)?;
        produce(&mut self.file).map_err(io)?;
        let position = self.file.stream_position().map_err(io)?;
        if position != range.end {
            return Err(wrong(
                format!("{} bytes", position.saturating_sub(range.start)),
                format!("{} bytes", range.end - range.start),
            ));
        }
        self.written.insert(name.to_string(), true);
        self.missing -= 1;
        Ok(())
    }

    /// Brings the file to the disk and gives it its name.
    ///
    /// # Errors
    /// A tensor of the header was never written, or the system refuses.
    pub fn finish(self) -> Result<()> {
        if self.missing > 0 {
            let names: Vec<_> = self
                .written
                .iter()
                .filter(|(_, w)| !**w)
                .map(|(n, _)| n.as_str())
                .take(5)
                .collect();
            return Err(Error::input(
                &self.place,
                format!(
                    "{} tensors never written ({} ...)",
                    self.missing,
                    names.join(", ")
                ),
                "every tensor of the header",
                "this is a bug: please report it",
            ));
        }
        self.file.commit()
    }
}
