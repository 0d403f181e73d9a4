//! Model folders that `transformers` and the official modelling code load.

use std::ops::Range;
use std::path::Path;

use serde_json::{Value, json};

use super::Progress;
use crate::checkpoint::quantized::companions;
use crate::checkpoint::shards::{Part, Pieces, write_shards};
use crate::checkpoint::{Checkpoint, LM_HEAD, Source, WORD_EMBEDDINGS, atomic, refuse_non_finite};
use crate::error::{Error, Result};
use crate::generate::GenerationConfig;
use crate::model::config::{self, ModelConfig};
use crate::tensor::{DType, Shape, Tensor};

pub use crate::checkpoint::shards::SHARD_BYTES;

/// The settings of generation beside a model.
const GENERATION: &str = "generation_config.json";

/// Writes the weights of `source` into the folder `dir` as safetensors, cut into files of at most `shard_bytes` with an index, beside
/// the configuration, tokenizer, code and generation settings of the model folder `base`.
///
/// Weights have the types that `source` says, a LayerNorm in float32 among float16 if so it is, or all of them `dtype`. A tied
/// head is written twice, as the official files have it, where `base` stores it twice; one that has become separate makes
/// `tie_word_embeddings` false. `config.json` keeps all keys of `base` but those of a quantisation. The rotary frequencies that the
/// official files carry go along. Without settings of generation in `base`, those of the official `model.chat` are written.
///
/// # Errors
/// A weight cannot be read, is not finite, or is beyond what its type can hold; the system refuses to write.
pub fn write(
    source: &dyn Source,
    base: &Path,
    dir: &Path,
    dtype: Option<DType>,
    shard_bytes: u64,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let stored = Checkpoint::open(base)?;
    let separate = source.separate_head()?;
    let mut parts = Vec::new();
    for (name, shape) in source.config().tensors() {
        let own = name != LM_HEAD || separate;
        if !own && !stored.contains(LM_HEAD) {
            continue;
        }
        let of = if own { name.as_str() } else { WORD_EMBEDDINGS };
        let dtype = match dtype {
            Some(dtype) => dtype,
            None => source.dtype(of)?,
        };
        parts.push(Part { name, dtype, shape });
    }
    parts.extend(buffers(&stored));
    let model_dtype = dtype.map_or_else(|| source.dtype(WORD_EMBEDDINGS), Ok)?;
    let mut weights = Weights {
        source,
        separate,
        stored: &stored,
    };
    write_shards(dir, &parts, model_dtype, shard_bytes, &mut weights, progress)?;
    for path in companions(&stored) {
        let target = dir.join(path.file_name().unwrap_or_default());
        std::fs::copy(&path, &target).map_err(Error::io(&target, "write"))?;
    }
    if !dir.join(GENERATION).exists() {
        write_generation(source.config(), dir)?;
    }
    let mut keys = vec![
        ("torch_dtype", json!(model_dtype.name())),
        ("dtype", Value::Null),
        ("quantization_config", Value::Null),
        ("quantization_bit", Value::Null),
        ("quantization_embeddings", Value::Null),
    ];
    if separate {
        keys.push(("tie_word_embeddings", json!(false)));
    }
    config::copy(base, dir, &keys)
}

/// What the official files hold beside weights: the rotary frequencies of each layer, which the official code reads.
fn buffers(stored: &Checkpoint) -> Vec<Part> {
    let names = stored
        .names()
        .filter(|name| name.ends_with(".rotary_emb.inv_freq"));
    names
        .filter_map(|name| {
            Some(Part {
                name: name.to_string(),
                dtype: stored.dtype(name)?,
                shape: stored.shape(name)?,
            })
        })
        .collect()
}

/// Where the pieces of the folder come from.
struct Weights<'a> {
    source: &'a dyn Source,
    separate: bool,
    stored: &'a Checkpoint,
}

impl Weights<'_> {
    /// The name under which the source knows a weight; nothing of a buffer, which the base alone has.
    fn known<'b>(&self, part: &'b Part) -> Option<&'b str> {
        match part.name.as_str() {
            LM_HEAD if !self.separate => Some(WORD_EMBEDDINGS),
            name if name.ends_with(".inv_freq") => None,
            name => Some(name),
        }
    }
}

impl Pieces for Weights<'_> {
    fn piece(&mut self, part: &Part, rows: Range<usize>) -> Result<Tensor> {
        let Some(name) = self.known(part) else {
            return self.stored.tensor_rows(&part.name, rows);
        };
        let mut extents = part.shape.extents().to_vec();
        extents[0] = rows.len();
        let mut piece = self.source.rows(name, rows)?;
        if piece.shape() != Shape::new(&extents) {
            let remedy = "this is a bug: please report it";
            let place = self.source.place(name);
            return Err(Error::input(place, piece.shape(), format!("{extents:?}"), remedy));
        }
        let place = || self.source.place(name);
        if piece.dtype() != part.dtype {
            refuse_non_finite(&place(), &piece)?;
            piece = piece.to_dtype(part.dtype);
            return match refuse_non_finite(&place(), &piece) {
                Ok(()) => Ok(piece),
                Err(_) => {
                    let found = format!("a number that {} cannot hold", part.dtype);
                    let remedy = "write it with --type bf16 or fp32, which hold larger ones";
                    Err(Error::input(place(), found, "weights that fit", remedy))
                }
            };
        }
        refuse_non_finite(&place(), &piece)?;
        Ok(piece)
    }

    fn will_be_read(&mut self, part: &Part, rows: Range<usize>) {
        if let Some(name) = self.known(part) {
            self.source.will_be_read(name, rows);
        }
    }
}

/// The settings with which the official `model.chat` answers.
fn write_generation(config: &ModelConfig, dir: &Path) -> Result<()> {
    let official = GenerationConfig::default();
    let settings = json!({
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "max_length": official.max_length,
        "do_sample": official.do_sample,
        "num_beams": 1,
        "temperature": official.temperature,
        "top_p": official.top_p,
        "top_k": official.top_k,
    });
    atomic::write(&dir.join(GENERATION), format!("{settings:#}\n").as_bytes())
}
