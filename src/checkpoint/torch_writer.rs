//! Writing torch `.bin` files that `torch.load(weights_only=True)` opens.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, ZipWriter};

use super::atomic::AtomicFile;
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};

/// Writes tensors to a torch `.bin`: temporary file, fsync, rename.
///
/// # Errors
/// Two tensors of the same name, or the system refuses to write.
pub fn write_torch_bin(path: &Path, tensors: &[(String, &Tensor)]) -> Result<()> {
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, t)| (name.clone(), t.dtype(), t.shape()))
        .collect();
    let mut writer = TorchBinWriter::create(path, &specs)?;
    for (name, tensor) in tensors {
        writer.write_from(name, |w| w.write_all(tensor.bytes()))?;
    }
    writer.finish()
}

/// Writes a torch `.bin` tensor by tensor, in any order: stored entries aligned to 64 bytes, pickle protocol 2.
pub struct TorchBinWriter {
    path: PathBuf,
    zip: ZipWriter<AtomicFile>,
    /// Name to storage key and bytes; an entry leaves when it is written.
    pending: BTreeMap<String, (usize, u64)>,
}

impl TorchBinWriter {
    /// Starts the archive with the pickle of `specs`.
    ///
    /// # Errors
    /// Two specs of the same name, or the system refuses to write.
    pub fn create(path: &Path, specs: &[(String, DType, Shape)]) -> Result<Self> {
        Self::create_sharing(path, specs, &[])
    }

    /// [`TorchBinWriter::create`] with more names of tensors: each of `shared` is a name and that of the spec whose storage it
    /// shares, as torch saves tied weights.
    ///
    /// # Errors
    /// As [`TorchBinWriter::create`]; a name that shares with none of `specs`.
    pub fn create_sharing(
        path: &Path,
        specs: &[(String, DType, Shape)],
        shared: &[(&str, &str)],
    ) -> Result<Self> {
        let mut entries: Vec<(usize, &str, DType, Shape)> = specs
            .iter()
            .enumerate()
            .map(|(key, (name, dtype, shape))| (key, name.as_str(), *dtype, *shape))
            .collect();
        for (name, of) in shared {
            let Some((key, (_, dtype, shape))) = specs.iter().enumerate().find(|(_, spec)| spec.0 == *of)
            else {
                let found = format!("{name}, which shares with {of}");
                let remedy = "this is a bug: please report it";
                return Err(Error::input(
                    path.display(),
                    found,
                    "a tensor of the file",
                    remedy,
                ));
            };
            entries.push((key, name, *dtype, *shape));
        }
        let mut pending = BTreeMap::new();
        for (key, (name, dtype, shape)) in specs.iter().enumerate() {
            let bytes = (shape.elements() * dtype.size()) as u64;
            if pending.insert(name.clone(), (key, bytes)).is_some() {
                let found = format!("two tensors named {name}");
                return Err(Error::input(
                    path.display(),
                    found,
                    "each name once",
                    "rename one of them",
                ));
            }
        }
        let zip = ZipWriter::new(AtomicFile::create(path)?);
        let mut writer = Self {
            path: path.to_path_buf(),
            zip,
            pending,
        };
        writer.entry("data.pkl", |w| w.write_all(&pickle(&entries)), 0)?;
        writer.entry("byteorder", |w| w.write_all(b"little"), 0)?;
        Ok(writer)
    }

    fn entry(
        &mut self,
        name: &str,
        produce: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
        bytes: u64,
    ) -> Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .with_alignment(64)
            .large_file(bytes >= u64::from(u32::MAX));
        let io = |e: std::io::Error| Error::Io {
            path: self.path.clone(),
            action: "write",
            source: e,
        };
        self.zip
            .start_file(format!("archive/{name}"), options)
            .map_err(|e| io(e.into()))?;
        produce(&mut self.zip).map_err(io)
    }

    /// Writes one tensor by a function that produces its bytes piece by piece.
    ///
    /// # Errors
    /// A name that was not announced or is written already, another number of bytes, a full disk.
    pub fn write_from(
        &mut self,
        name: &str,
        produce: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<()> {
        let wrong = |path: &Path, found: String, expected: String| {
            let place = format!("{}: {name}", path.display());
            Error::input(place, found, expected, "this is a bug: please report it")
        };
        let Some((key, bytes)) = self.pending.remove(name) else {
            return Err(wrong(
                &self.path,
                "a write".into(),
                "a tensor announced and not yet written".into(),
            ));
        };
        let mut count = 0;
        self.entry(
            &format!("data/{key}"),
            |w| {
                let mut counted = Counted { inner: w, count: 0 };
                produce(&mut counted)?;
                count = counted.count;
                Ok(())
            },
            bytes,
        )?;
        if count != bytes {
            return Err(wrong(
                &self.path,
                format!("{count} bytes"),
                format!("{bytes} bytes"),
            ));
        }
        Ok(())
    }

    /// Writes the directory, brings the file to the disk and gives it its name.
    ///
    /// # Errors
    /// A tensor was never written, or the system refuses.
    pub fn finish(mut self) -> Result<()> {
        if let Some(name) = self.pending.keys().next() {
            return Err(Error::input(
                self.path.display(),
                format!("{} tensors never written ({name} ...)", self.pending.len()),
                "every tensor announced",
                "this is a bug: please report it",
            ));
        }
        self.entry("version", |w| w.write_all(b"3\n"), 0)?;
        let path = self.path;
        let file = self.zip.finish().map_err(|e| Error::Io {
            path,
            action: "write",
            source: e.into(),
        })?;
        file.commit()
    }
}

struct Counted<'a> {
    inner: &'a mut dyn Write,
    count: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.count += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

/// `{name: _rebuild_tensor_v2(storage i, 0, size, stride, False, OrderedDict())}` in pickle protocol 2.
fn pickle(entries: &[(usize, &str, DType, Shape)]) -> Vec<u8> {
    let mut out = vec![0x80, 2, b'}', b'('];
    for (key, name, dtype, shape) in entries {
        text(&mut out, name);
        out.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend_from_slice(format!("ctorch\n{}\n", storage(*dtype)).as_bytes());
        text(&mut out, &key.to_string());
        text(&mut out, "cpu");
        whole(&mut out, shape.elements());
        out.extend_from_slice(b"tQ");
        whole(&mut out, 0);
        let extents = shape.extents();
        let strides: Vec<usize> = (1..=extents.len())
            .map(|i| extents[i..].iter().product())
            .collect();
        for tuple in [extents, &strides] {
            out.push(b'(');
            tuple.iter().for_each(|&n| whole(&mut out, n));
            out.push(b't');
        }
        out.extend_from_slice(b"\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend_from_slice(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// BININT, or LONG1 for what does not fit.
fn whole(out: &mut Vec<u8>, n: usize) {
    match i32::try_from(n) {
        Ok(n) => {
            out.push(b'J');
            out.extend_from_slice(&n.to_le_bytes());
        }
        Err(_) => {
            out.extend_from_slice(&[0x8a, 8]);
            out.extend_from_slice(&(n as u64).to_le_bytes());
        }
    }
}

fn storage(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "DoubleStorage",
        DType::F32 => "FloatStorage",
        DType::F16 => "HalfStorage",
        DType::BF16 => "BFloat16Storage",
        DType::I64 => "LongStorage",
        DType::I32 => "IntStorage",
        DType::U8 => "ByteStorage",
        DType::I8 => "CharStorage",
    }
}
