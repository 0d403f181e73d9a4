//! torch `.bin` files: a zip archive of stored (uncompressed) entries, used in place, and a pickle that names them.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;

use zip::{CompressionMethod, ZipArchive};

use super::entry::{Entry, checked_shape, place};
use super::map::MappedFile;
use super::pickle::{self, PickledTensor, printable};
use crate::error::{Error, Result};

/// The tensors of a `.bin` file.
///
/// # Errors
/// No zip archive (truncated, legacy, a Git LFS pointer), compressed entries, a pickle that wants more than tensors, a
/// storage that is missing or too short, a tensor that is not contiguous.
pub(super) fn entries(file: &MappedFile) -> Result<Vec<Entry>> {
    let all = file.bytes(0..file.len())?;
    let archive = Archive::open(file, all.as_slice())?;
    let pickle = archive.stored(file, "data.pkl")?;
    archive.check_byte_order(file, all.as_slice())?;
    let tensors = pickle::state_dict(file.path(), &all.as_slice()[pickle])?;
    tensors
        .into_iter()
        .map(|(name, tensor)| archive.entry(file, name, tensor))
        .collect()
}

/// The directory of the archive: what is stored where.
struct Archive {
    /// `archive/`, the folder that every entry lies in.
    prefix: String,
    /// Name to bytes; `None` for a compressed or encrypted entry.
    entries: HashMap<String, Option<Range<usize>>>,
}

impl Archive {
    fn open(file: &MappedFile, bytes: &[u8]) -> Result<Self> {
        check_magic(file, bytes)?;
        let broken = |what: String| {
            Error::input(
                file.path().display(),
                format!(
                    "a zip archive of {} bytes that cannot be read ({what})",
                    bytes.len()
                ),
                "a whole torch .bin",
                "the file is truncated or damaged: download it again and compare its size and sha256",
            )
        };
        let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(|e| broken(e.to_string()))?;
        if zip.has_duplicate_names() {
            return Err(broken("two entries of the same name".into()));
        }
        let mut entries = HashMap::with_capacity(zip.len());
        for i in 0..zip.len() {
            let entry = zip.by_index_raw(i).map_err(|e| broken(e.to_string()))?;
            let name = entry.name().map_err(|e| broken(e.to_string()))?.into_owned();
            let start = entry.data_start().and_then(|n| usize::try_from(n).ok());
            let size = usize::try_from(entry.compressed_size()).ok();
            let range = match (
                start,
                size.zip(start).and_then(|(size, start)| start.checked_add(size)),
            ) {
                (Some(start), Some(end)) if end <= bytes.len() => start..end,
                _ => {
                    return Err(broken(format!(
                        "the entry {} reaches past the end",
                        printable(&name)
                    )));
                }
            };
            let stored = entry.compression() == CompressionMethod::Stored && !entry.encrypted();
            entries.insert(name, stored.then_some(range));
        }
        let mut prefixes = entries.keys().filter_map(|name| name.strip_suffix("data.pkl"));
        match (prefixes.next(), prefixes.next()) {
            (Some(prefix), None) => Ok(Self {
                prefix: prefix.to_string(),
                entries,
            }),
            _ => Err(Error::input(
                file.path().display(),
                "a zip archive without exactly one data.pkl",
                "a file written by torch.save",
                "check that this is a weights file",
            )),
        }
    }

    fn stored(&self, file: &MappedFile, name: &str) -> Result<Range<usize>> {
        let found = match self.entries.get(&format!("{}{name}", self.prefix)) {
            Some(Some(range)) => return Ok(range.clone()),
            Some(None) => format!("the compressed entry {}", printable(name)),
            None => format!("no entry {}", printable(name)),
        };
        Err(Error::input(
            file.path().display(),
            found,
            "every storage in the archive, stored uncompressed as torch.save does",
            "the file was repacked or damaged: download it again",
        ))
    }

    fn check_byte_order(&self, file: &MappedFile, bytes: &[u8]) -> Result<()> {
        let name = format!("{}byteorder", self.prefix);
        let Some(Some(range)) = self.entries.get(&name) else {
            return Ok(());
        };
        if &bytes[range.clone()] != b"little" {
            return Err(Error::input(
                file.path().display(),
                "weights in big-endian byte order",
                "little-endian weights",
                "save them again on a little-endian machine",
            ));
        }
        Ok(())
    }

    /// Checks a tensor against its storage: bounds, contiguity, size.
    fn entry(&self, file: &MappedFile, name: String, tensor: PickledTensor) -> Result<Entry> {
        let damaged = |found: String, expected: String| {
            let remedy = "the file is damaged or was not written by torch.save: download it again";
            Error::input(place(file.path(), &name), found, expected, remedy)
        };
        let (shape, bytes) = checked_shape(file.path(), &name, &tensor.size, tensor.dtype)?;
        if tensor.stride.len() != tensor.size.len() {
            return Err(damaged(
                format!("strides {:?}", tensor.stride),
                format!("one for each extent of {shape}"),
            ));
        }
        let mut step = 1usize;
        for (&extent, &stride) in tensor.size.iter().zip(&tensor.stride).rev() {
            if extent > 1 && stride != step && bytes > 0 {
                return Err(Error::input(
                    place(file.path(), &name),
                    format!("strides {:?} for the shape {shape}", tensor.stride),
                    "a contiguous row-major tensor",
                    "save it again after .contiguous()",
                ));
            }
            step = step.saturating_mul(extent.max(1));
        }
        let storage = self.stored(file, &format!("data/{}", tensor.key))?;
        let size = tensor.dtype.size();
        if tensor.storage_elements.checked_mul(size) != Some(storage.len()) {
            return Err(damaged(
                format!("a storage of {} bytes", storage.len()),
                format!("{} elements of {}", tensor.storage_elements, tensor.dtype),
            ));
        }
        let start = tensor.offset.checked_mul(size);
        match start.and_then(|start| start.checked_add(bytes)).zip(start) {
            Some((end, start)) if end <= storage.len() => {
                let range = storage.start + start..storage.start + end;
                Ok(Entry {
                    name,
                    dtype: tensor.dtype,
                    shape,
                    range,
                })
            }
            _ => Err(damaged(
                format!("{shape} from element {} of a storage", tensor.offset),
                format!("a tensor inside its {} elements", tensor.storage_elements),
            )),
        }
    }
}

/// Names what people have instead of a `.bin`, which is more useful than "not a zip archive".
fn check_magic(file: &MappedFile, bytes: &[u8]) -> Result<()> {
    let (found, remedy) = if bytes.starts_with(b"PK") {
        return Ok(());
    } else if bytes.starts_with(b"version https://git-lfs") {
        (
            "a Git LFS pointer",
            "run `git lfs pull` in that folder, or download the file itself",
        )
    } else if bytes.starts_with(b"\x80\x02\x8a\x0al\xfc\x9cF") {
        (
            "the torch format from before version 1.6",
            "load and save it again with a newer torch",
        )
    } else if bytes.is_empty() {
        ("an empty file", "download it again")
    } else {
        (
            "something else than a zip archive",
            "the file is damaged or no weights file: download it again",
        )
    };
    Err(Error::input(
        file.path().display(),
        format!("{found} ({} bytes)", bytes.len()),
        "a zip archive written by torch.save",
        remedy,
    ))
}
