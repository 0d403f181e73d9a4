//! chatglm.cpp's GGML files of ChatGLM-6B, read.
//!
//! Everything is little-endian; i and f stand for 32 bits (`ChatGLMConverter` in convert.py, `Pipeline::Pipeline` and
//! `ModelLoader::read_state_dict` in chatglm.cpp 0.4.2):
//!
//! | bytes | meaning |
//! |---|---|
//! | `ggml` | |
//! | i | kind of model: 1, ChatGLM-6B |
//! | i | version of the record: 2 (1 is older) |
//! | iiiiiii | type of the matrices, vocab, hidden, heads, heads of keys, layers, inner |
//! | f i f | epsilon, virtual tokens, base of the rotation |
//! | iii | longest sequence, `<eop>`, `<pad>` (-1: not said) |
//! | i, bytes | SentencePiece model |
//! | to the end | tensors: i length, name, i rank, i extents (outermost first), i type, zeros up to a multiple of 16, data |
//!
//! Version 1 has, after the version: type, vocab, hidden, heads, layers, inner, longest sequence, `<sop>`, `<eop>`, `<pad>`, `sep`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use super::entry::place;
use super::map::MappedFile;
use super::source::rows_of;
use super::{LM_HEAD, Source, Stored};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::quant::GgmlType;
use crate::tensor::{Bytes, DType, Shape, Tensor};
use crate::tokenizer::Tokenizer;

/// What every file starts with.
pub const MAGIC: &[u8; 4] = b"ggml";
/// Data start at multiples of this.
pub const ALIGNMENT: usize = 16;
/// No name of a tensor is longer.
const LONGEST_NAME: usize = 256;

/// An open GGML file: header read and checked, no weight in memory.
#[derive(Debug)]
pub struct GgmlFile {
    file: MappedFile,
    config: ModelConfig,
    tokenizer: Range<usize>,
    tensors: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone)]
struct Entry {
    kind: GgmlType,
    shape: Shape,
    range: Range<usize>,
}

impl GgmlFile {
    /// Opens a file and checks all of it but the weights themselves: that it ends where it should, holds each tensor of
    /// ChatGLM-6B once in its shape and nothing else, and a tokenizer whose special ids are the model's.
    ///
    /// # Errors
    /// Another format, another model, a file that is cut off, hostile or contradicts itself.
    pub fn open(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let all = file.bytes(0..file.len())?;
        let mut reader = Reader {
            path,
            bytes: all.as_slice(),
            at: 0,
        };
        let header = reader.header()?;
        let tokenizer = reader.tokenizer()?;
        let config = config(path, &header, &all.as_slice()[tokenizer.clone()])?;
        let mut tensors = BTreeMap::new();
        while reader.at < reader.bytes.len() {
            let (name, entry) = reader.tensor()?;
            if tensors.contains_key(&name) {
                return Err(reader.wrong(format!("the tensor {name} twice"), "each tensor once"));
            }
            tensors.insert(name, entry);
        }
        let opened = Self {
            file,
            config,
            tokenizer,
            tensors,
        };
        opened.check()?;
        Ok(opened)
    }

    /// Does the file start as GGML files do?
    pub fn recognizes(path: &Path) -> bool {
        let mut start = [0u8; 4];
        path.is_file()
            && File::open(path)
                .and_then(|mut file| file.read_exact(&mut start))
                .is_ok()
            && &start == MAGIC
    }

    /// The file.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.file.len() as u64
    }

    /// The SentencePiece model that the file carries.
    ///
    /// # Errors
    /// The file changed since it was opened.
    pub fn tokenizer(&self) -> Result<Bytes> {
        self.file.bytes(self.tokenizer.clone())
    }

    /// How a tensor is stored.
    pub fn kind(&self, name: &str) -> Option<GgmlType> {
        self.tensors.get(name).map(|entry| entry.kind)
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| {
            let found = format!("no tensor {name}");
            let remedy = "convert or export the model again";
            Error::input(self.path().display(), found, "a file that holds it", remedy)
        })
    }

    /// Every tensor there and in its shape, nothing else.
    fn check(&self) -> Result<()> {
        let mut faults = Vec::new();
        let mut expected = 0;
        for (name, shape) in self.config.tensors() {
            if name == LM_HEAD {
                continue;
            }
            expected += 1;
            match self.tensors.get(&name) {
                None => faults.push(format!("no {name}")),
                Some(entry) if entry.shape != shape => {
                    faults.push(format!("{name} {} instead of {shape}", entry.shape));
                }
                Some(_) => {}
            }
        }
        let known: Vec<String> = self.config.tensors().into_iter().map(|(name, _)| name).collect();
        let extra = self
            .tensors
            .keys()
            .filter(|name| !known.contains(name) || *name == LM_HEAD);
        faults.extend(extra.map(|name| format!("the unknown tensor {name}")));
        if faults.is_empty() {
            return Ok(());
        }
        let more = match faults.len() {
            0..=4 => String::new(),
            n => format!(" and {} more", n - 4),
        };
        faults.truncate(4);
        Err(Error::input(
            self.path().display(),
            format!("{}{more}", faults.join(", ")),
            format!("the {expected} tensors of its configuration"),
            "the file is cut off or damaged: convert or download it again",
        ))
    }
}

impl Source for GgmlFile {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The format has no room for one.
    fn separate_head(&self) -> Result<bool> {
        Ok(false)
    }

    /// F16 where the file has it, else F32: what blocks were made from is not written down.
    fn dtype(&self, name: &str) -> Result<DType> {
        Ok(match self.entry(name)?.kind {
            GgmlType::F16 => DType::F16,
            _ => DType::F32,
        })
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        let rows = self.entry(name)?.shape.extents()[0];
        self.rows(name, 0..rows).map(Stored::Dense)
    }

    /// Floats in place, blocks decoded to F32.
    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        let entry = self.entry(name)?;
        let shape = rows_of(entry.shape, &rows, &self.place(name))?;
        let bytes = self.file.bytes(entry.bytes(&rows))?;
        match entry.kind {
            GgmlType::F32 => Tensor::from_bytes(bytes, DType::F32, shape),
            GgmlType::F16 => Tensor::from_bytes(bytes, DType::F16, shape),
            kind => {
                let mut out = Tensor::zeros(DType::F32, shape);
                if !out.is_planned() {
                    kind.decode(bytes.as_slice(), out.as_mut_slice());
                }
                Ok(out)
            }
        }
    }

    fn will_be_read(&self, name: &str, rows: Range<usize>) {
        if let Some(entry) = self.tensors.get(name) {
            self.file.will_be_read(entry.bytes(&rows));
        }
    }

    fn place(&self, name: &str) -> String {
        place(self.path(), name)
    }
}

impl Entry {
    /// Where these rows lie: elements of a vector.
    fn bytes(&self, rows: &Range<usize>) -> Range<usize> {
        let row: usize = self.shape.extents()[1..].iter().product();
        let at = |i: usize| self.range.start + self.kind.bytes(i * row);
        at(rows.start)..at(rows.end)
    }
}

/// The record before the tokenizer; what version 1 does not say has the value that chatglm.cpp gives it.
struct Header {
    vocab_size: i32,
    hidden_size: i32,
    heads: i32,
    key_heads: i32,
    layers: i32,
    inner: i32,
    epsilon: f32,
    virtual_tokens: i32,
    rotation: f32,
    longest: i32,
    eos: i32,
    pad: i32,
}

/// The configuration: the record's numbers, and the special ids that only the tokenizer knows.
fn config(path: &Path, header: &Header, tokenizer: &[u8]) -> Result<ModelConfig> {
    let wrong = |found: String, expected: String| {
        let remedy = "the file is damaged, or of another model: convert ChatGLM-6B again";
        Error::input(path.display(), found, expected, remedy)
    };
    let extent = |what: &str, value: i32| {
        usize::try_from(value).map_err(|_| wrong(format!("{what} {value}"), "a number of at least 1".into()))
    };
    if header.key_heads != header.heads {
        let found = format!("{} heads of keys for {} heads", header.key_heads, header.heads);
        return Err(wrong(found, "as many, as ChatGLM-6B has".into()));
    }
    if header.rotation != 10_000.0 {
        let found = format!("rotations of base {}", header.rotation);
        return Err(wrong(found, "10000, as ChatGLM-6B has".into()));
    }
    if header.virtual_tokens != 0 {
        return Err(Error::input(
            path.display(),
            format!("a prefix of {} virtual tokens", header.virtual_tokens),
            "none: files of ChatGLM-6B do not hold the keys and values of one",
            "use the base and the P-Tuning folder with `glmtune chat --adapter`",
        ));
    }
    let at = format!("{}: tokenizer", path.display());
    let special = Tokenizer::parse(tokenizer, &at, 0)?.special();
    for (what, found, expected) in [
        ("<eop>", header.eos, special.eop),
        ("<pad>", header.pad, special.pad),
    ] {
        if found != -1 && i64::from(found) != i64::from(expected) {
            return Err(wrong(
                format!("{what} with the id {found}"),
                format!("{expected}, as its tokenizer has it"),
            ));
        }
    }
    let config = ModelConfig {
        vocab_size: extent("vocab_size", header.vocab_size)?,
        hidden_size: extent("hidden_size", header.hidden_size)?,
        inner_hidden_size: extent("intermediate_size", header.inner)?,
        num_layers: extent("num_hidden_layers", header.layers)?,
        num_attention_heads: extent("num_attention_heads", header.heads)?,
        // The shortest decimal number of the f32, as config.json has it: 1e-5, not 0.00000999999974.
        layernorm_epsilon: header
            .epsilon
            .to_string()
            .parse()
            .unwrap_or(f64::from(header.epsilon)),
        max_sequence_length: extent("max_length", header.longest)?,
        bos_token_id: special.sop,
        eos_token_id: special.eop,
        mask_token_id: special.mask,
        gmask_token_id: special.gmask,
        pad_token_id: special.pad,
        tie_word_embeddings: true,
        torch_dtype: DType::F16,
        quantization_config: None,
        row_scaled: None,
    };
    config.check(path)?;
    Ok(config)
}

/// A position in the file; every step is checked against its end.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn wrong(&self, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
        let remedy = "the file is damaged or no GGML file of ChatGLM-6B: convert or download it again";
        Error::input(self.path.display(), found, expected, remedy)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(length).filter(|&end| end <= self.bytes.len());
        let Some(end) = end else {
            return Err(Error::input(
                self.path.display(),
                format!("{} bytes", self.bytes.len()),
                format!("{length} more from byte {} on", self.at),
                "the file is cut off: convert or download it again",
            ));
        };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn int(&mut self) -> Result<i32> {
        let bytes = self.take(4)?;
        Ok(i32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn float(&mut self) -> Result<f32> {
        Ok(f32::from_bits(self.int()? as u32))
    }

    /// A length that a file claims.
    fn length(&mut self, what: &str, most: usize) -> Result<usize> {
        let at = self.at;
        let length = self.int()?;
        let within = usize::try_from(length).ok().filter(|n| (1..=most).contains(n));
        within.ok_or_else(|| self.wrong(format!("{what} of {length} at byte {at}"), format!("1 to {most}")))
    }

    fn header(&mut self) -> Result<Header> {
        self.magic()?;
        match self.int()? {
            1 => {}
            other => {
                let name = match other {
                    2 => "ChatGLM2-6B".to_string(),
                    3 => "ChatGLM3-6B".to_string(),
                    4 => "GLM-4".to_string(),
                    1004 => "GLM-4V".to_string(),
                    _ => format!("the unknown model {other}"),
                };
                let remedy = "give a file converted from ChatGLM-6B";
                let found = format!("a GGML file of {name}");
                return Err(Error::input(self.path.display(), found, "ChatGLM-6B", remedy));
            }
        }
        let version = self.int()?;
        if !(1..=2).contains(&version) {
            return Err(self.wrong(format!("version {version} of the header"), "1 or 2"));
        }
        let kind = self.int()?;
        if GgmlType::from_id(kind).is_none() {
            return Err(self.wrong(
                format!("the type {kind}"),
                "f32, f16, q8_0, q5_1, q5_0, q4_1 or q4_0",
            ));
        }
        let (vocab_size, hidden_size, heads) = (self.int()?, self.int()?, self.int()?);
        let key_heads = if version == 1 { heads } else { self.int()? };
        let (layers, inner) = (self.int()?, self.int()?);
        let (mut epsilon, mut virtual_tokens, mut rotation) = (1e-5, 0, 10_000.0);
        if version == 2 {
            (epsilon, virtual_tokens, rotation) = (self.float()?, self.int()?, self.float()?);
        }
        let longest = self.int()?;
        if version == 1 {
            // <sop>, which the tokenizer tells.
            self.int()?;
        }
        let (eos, pad) = (self.int()?, self.int()?);
        if version == 1 {
            // `sep`, which nothing uses.
            self.int()?;
        }
        Ok(Header {
            vocab_size,
            hidden_size,
            heads,
            key_heads,
            layers,
            inner,
            epsilon,
            virtual_tokens,
            rotation,
            longest,
            eos,
            pad,
        })
    }

    /// Names what people have instead, which is more useful than "bad magic".
    fn magic(&mut self) -> Result<()> {
        let start = &self.bytes[..self.bytes.len().min(4)];
        let (found, remedy) = match start {
            b"ggml" => {
                self.at = 4;
                return Ok(());
            }
            b"GGUF" => (
                "a GGUF file",
                "no GGUF reader has ChatGLM-6B: give a file of chatglm.cpp's convert.py",
            ),
            b"PK\x03\x04" => ("a torch .bin", "give the folder that it lies in"),
            b"vers" => (
                "a Git LFS pointer",
                "run `git lfs pull` in that folder, or download the file itself",
            ),
            _ => (
                "something else",
                "give a file of chatglm.cpp's convert.py or of `glmtune export --format ggml`",
            ),
        };
        let found = format!("{found} ({} bytes)", self.bytes.len());
        Err(Error::input(
            self.path.display(),
            found,
            "a file that starts with `ggml`",
            remedy,
        ))
    }

    fn tokenizer(&mut self) -> Result<Range<usize>> {
        let length = self.length("a tokenizer", self.bytes.len())?;
        self.take(length)?;
        Ok(self.at - length..self.at)
    }

    fn tensor(&mut self) -> Result<(String, Entry)> {
        let length = self.length("a name", LONGEST_NAME)?;
        let at = self.at;
        let name = match std::str::from_utf8(self.take(length)?) {
            Ok(name) if name.chars().all(|c| c.is_ascii_graphic()) => name.to_string(),
            _ => {
                return Err(self.wrong(
                    format!("a name of {length} other bytes at byte {at}"),
                    "letters and points",
                ));
            }
        };
        let rank = self.length("a rank", 2)?;
        let mut extents = [0; 2];
        for extent in &mut extents[..rank] {
            // None is larger than a file could be.
            *extent = self.length("an extent", i32::MAX as usize)?;
        }
        let shape = Shape::new(&extents[..rank]);
        let number = self.int()?;
        let Some(kind) = GgmlType::from_id(number) else {
            let found = format!("{name} of the type {number}");
            return Err(self.wrong(found, "f32, f16, q8_0, q5_1, q5_0, q4_1 or q4_0"));
        };
        let (rows, columns) = shape.rows_and_columns();
        if !columns.is_multiple_of(kind.block()) {
            let found = format!("{name} {shape} in {kind}");
            return Err(self.wrong(found, format!("rows of a multiple of {}", kind.block())));
        }
        let bytes = kind.bytes(columns).checked_mul(rows);
        let Some(bytes) = bytes else {
            return Err(self.wrong(format!("{name} {shape}"), "a tensor that fits the file"));
        };
        self.take(self.at.next_multiple_of(ALIGNMENT) - self.at)?;
        self.take(bytes)?;
        let range = self.at - bytes..self.at;
        Ok((name, Entry { kind, shape, range }))
    }
}
