//! GGML files for chatglm.cpp: what its `convert.py` writes, from any source. The layout stands in [`crate::checkpoint::ggml`],
//! the block types in `quant/ggml.rs`.

use std::io::Write;
use std::path::Path;

use super::Progress;
use crate::checkpoint::atomic::AtomicFile;
use crate::checkpoint::ggml::{ALIGNMENT, GgmlFile, MAGIC};
use crate::checkpoint::quantized::is_quantized_linear;
use crate::checkpoint::{LM_HEAD, Source};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::quant::GgmlType;
use crate::tensor::Shape;
use crate::tokenizer::Tokenizer;

/// Elements of the embedding that are encoded at once: at most 16 MiB of output.
const PIECE: usize = 1 << 22;

/// A GGML file that is whole, but still under a temporary name; dropped, it is removed.
#[derive(Debug)]
pub struct Written {
    file: AtomicFile,
}

impl Written {
    /// Opens it where it lies, to be compared with what it was made from.
    ///
    /// # Errors
    /// It is not what was written.
    pub fn open(&self) -> Result<GgmlFile> {
        GgmlFile::open(self.file.temporary())
    }

    /// Brings it to the disk and gives it its name, in place of an older file.
    ///
    /// # Errors
    /// The system refuses.
    pub fn commit(self) -> Result<()> {
        self.file.commit()
    }
}

/// Writes a GGML file of version 2 beside `file`, which [`Written::commit`] makes of it: matrices (the embedding too) in the
/// type `kind`, vectors in F32, with the SentencePiece model of `tokenizer` (a file, or a folder with `ice_text.model`). Host
/// memory holds one linear as the source makes it, and its bytes in the file.
///
/// chatglm.cpp takes its ids from the SentencePiece model alone, so the vocabulary of 150528 with its image tokens is refused
/// like any other whose special ids differ.
///
/// # Errors
/// A head of its own, for which the format has no room; a matrix whose rows are not whole blocks; another tokenizer; a weight
/// that the type cannot hold; files that cannot be read or written. `progress` said no.
pub fn write(
    source: &dyn Source,
    tokenizer: &Path,
    file: &Path,
    kind: GgmlType,
    progress: &mut Progress,
) -> Result<Written> {
    let tensors = tensors(source, kind)?;
    let proto = tokenizer_proto(source.config(), tokenizer)?;
    let mut start = header(source.config(), kind, file)?;
    start.extend(int(proto.len(), file)?);
    start.extend(proto);
    let total = tensors.iter().fold(start.len(), |at, tensor| tensor.end(at)) as u64;

    let mut out = AtomicFile::create(file)?;
    let mut write = |bytes: &[u8]| out.write_all(bytes).map_err(Error::io(file, "write"));
    write(&start)?;
    let mut at = start.len();
    let mut piece = Vec::new();
    for tensor in &tensors {
        progress(at as u64, total, &tensor.name)?;
        piece.clear();
        piece.extend(tensor.head(file)?);
        piece.resize(piece.len() + tensor.padding(at), 0);
        let extents = tensor.shape.extents();
        let (rows, row) = (extents[0], extents[1..].iter().product::<usize>());
        // A linear that is in few bits, or merged, is made whole anyway; an embedding is too large for that.
        let step = match is_quantized_linear(&tensor.name) {
            true => rows,
            false => (PIECE / row).max(1),
        };
        for first in (0..rows).step_by(step) {
            let last = rows.min(first + step);
            source.will_be_read(&tensor.name, last..rows.min(last + step));
            let part = source.rows(&tensor.name, first..last)?;
            let place = source.place(&tensor.name);
            tensor.kind.encode(&place, &part, first, &mut piece)?;
            write(&piece)?;
            at += piece.len();
            piece.clear();
            progress(at as u64, total, &tensor.name)?;
        }
    }
    progress(total, total, "writing to the disk")?;
    Ok(Written { file: out })
}

/// A tensor of the file.
struct Entry {
    name: String,
    kind: GgmlType,
    shape: Shape,
}

impl Entry {
    /// Length and name, rank and extents, type.
    fn head(&self, file: &Path) -> Result<Vec<u8>> {
        let extents = self.shape.extents();
        let mut head = int(self.name.len(), file)?.to_vec();
        head.extend(self.name.as_bytes());
        head.extend(int(extents.len(), file)?);
        for &extent in extents {
            head.extend(int(extent, file)?);
        }
        head.extend(self.kind.id().to_le_bytes());
        Ok(head)
    }

    /// Zeros between the head, which starts at `at`, and the data.
    fn padding(&self, at: usize) -> usize {
        let end = at + 4 * (3 + self.shape.extents().len()) + self.name.len();
        end.next_multiple_of(ALIGNMENT) - end
    }

    /// Where the next one starts.
    fn end(&self, at: usize) -> usize {
        let head = 4 * (3 + self.shape.extents().len()) + self.name.len();
        at + head + self.padding(at) + self.kind.bytes(self.shape.elements())
    }
}

/// The tensors in the order of convert.py, which is that of the configuration.
fn tensors(source: &dyn Source, kind: GgmlType) -> Result<Vec<Entry>> {
    if source.separate_head()? {
        return Err(Error::input(
            source.place(LM_HEAD),
            "a head that differs from the embedding",
            "a tied one: GGML files of ChatGLM-6B have no room for a second matrix",
            "export as bnb or thudm-int8, or `glmtune merge` into a Hugging Face folder",
        ));
    }
    let mut entries = Vec::new();
    for (name, shape) in source.config().tensors() {
        if name == LM_HEAD {
            continue;
        }
        let (_, columns) = shape.rows_and_columns();
        let matrix = shape.extents().len() == 2;
        let kind = if matrix { kind } else { GgmlType::F32 };
        if !columns.is_multiple_of(kind.block()) {
            return Err(Error::input(
                source.place(&name),
                format!("rows of {columns}"),
                format!(
                    "a multiple of {}: {kind} stores so many elements together",
                    kind.block()
                ),
                "use --type f16 or f32",
            ));
        }
        entries.push(Entry { name, kind, shape });
    }
    Ok(entries)
}

/// The bytes of the SentencePiece model, which must be the configuration's.
fn tokenizer_proto(config: &ModelConfig, tokenizer: &Path) -> Result<Vec<u8>> {
    let path = match tokenizer.is_dir() {
        true => tokenizer.join("ice_text.model"),
        false => tokenizer.to_path_buf(),
    };
    let proto = std::fs::read(&path).map_err(Error::io(&path, "open"))?;
    Tokenizer::parse(&proto, &path.display().to_string(), 0)?.check(config)?;
    Ok(proto)
}

/// Magic, kind of model, version and record.
fn header(config: &ModelConfig, kind: GgmlType, file: &Path) -> Result<Vec<u8>> {
    let heads = config.num_attention_heads;
    let mut out = MAGIC.to_vec();
    // ChatGLM-6B, version 2.
    out.extend([1i32, 2, kind.id()].map(i32::to_le_bytes).concat());
    for number in [
        config.vocab_size,
        config.hidden_size,
        heads,
        heads,
        config.num_layers,
        config.inner_hidden_size,
    ] {
        out.extend(int(number, file)?);
    }
    out.extend((config.layernorm_epsilon as f32).to_le_bytes());
    // No prefix: convert.py writes its length but never its keys and values.
    out.extend(0i32.to_le_bytes());
    out.extend(10_000f32.to_le_bytes());
    for number in [
        config.max_sequence_length,
        config.eos_token_id as usize,
        config.pad_token_id as usize,
    ] {
        out.extend(int(number, file)?);
    }
    Ok(out)
}

fn int(number: usize, file: &Path) -> Result<[u8; 4]> {
    let small = i32::try_from(number).map_err(|_| {
        let remedy = "export to another format";
        Error::input(file.display(), number, "a number that fits 32 bits", remedy)
    })?;
    Ok(small.to_le_bytes())
}
