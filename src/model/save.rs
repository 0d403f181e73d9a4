//! A model as a checkpoint folder: what [`super::Model::load`] and the official code read.
//!
//! Tensors go one by one, in pieces, from where they live into the file: host memory holds at most one of them beside what
//! the model itself has there.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use serde_json::json;

use super::{Model, config};
use crate::checkpoint::quantized::{companions, is_quantized, is_quantized_linear};
use crate::checkpoint::{
    Checkpoint, LM_HEAD, PartialFolder, WORD_EMBEDDINGS, check_output, refuse_non_finite, shards,
};
use crate::error::{Error, Result};
use crate::nn::Param;
use crate::tensor::{DType, Device, Shape, Tensor};

/// Where a tensor of the folder comes from.
#[derive(Clone, Copy)]
enum Origin<'a> {
    /// The model.
    Model(&'a Param),
    /// The base: the model has no use for it, or not another one.
    Base,
}

/// Writes `model` into the folder `dir`, with the names, types, configuration, tokenizer and code of the folder `base`.
///
/// Each tensor is rounded to the type in which the base stores it: float16 for the official checkpoints, which the files'
/// metadata and `config.json` say. A tied head is written twice, as the official files do, if the base has it twice; one
/// that has become separate makes `tie_word_embeddings` false. Files of more than `shard_bytes` are cut, with an index.
///
/// # Errors
/// The base is in few bits or another model; the model has an adapter; a weight is beyond what its type can hold; `dir` holds
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
    check_output(dir, &[("the base model itself", base)], true)?;
    let (parts, origins) = parts(model, &source)?;
    let folder = PartialFolder::create(dir)?;
    let mut values = Values {
        source: &source,
        origins,
        at_hand: None,
    };
    let (dtype, mut progress) = (stored_dtype(&source), |_: u64, _: u64, _: &str| Ok(()));
    shards::write_shards(
        folder.dir(),
        &parts,
        dtype,
        shard_bytes,
        &mut values,
        &mut progress,
    )?;
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

/// The tensors of the base, in its order, and a head that it has not; and where each comes from.
fn parts<'a>(
    model: &'a Model,
    source: &Checkpoint,
) -> Result<(Vec<shards::Part>, BTreeMap<String, Origin<'a>>)> {
    let mut params = BTreeMap::new();
    model.for_each_param(&mut |name, param| {
        params.insert(name.to_string(), param);
    });
    let mut names: Vec<String> = source.names().map(str::to_string).collect();
    if params.contains_key(LM_HEAD) && !source.contains(LM_HEAD) {
        names.push(LM_HEAD.to_string());
    }
    let (mut parts, mut origins) = (Vec::with_capacity(names.len()), BTreeMap::new());
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
        let shape = match (origin, source.shape(&name)) {
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
        origins.insert(name.clone(), origin);
        parts.push(shards::Part { name, dtype, shape });
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
    Ok((parts, origins))
}

/// The numbers of a model in the base's types.
struct Values<'a> {
    source: &'a Checkpoint,
    origins: BTreeMap<String, Origin<'a>>,
    /// The tensor whose pieces are asked for.
    at_hand: Option<(String, Value<'a>)>,
}

/// The numbers of a tensor on the host.
enum Value<'a> {
    Model(&'a Tensor),
    Copied(Tensor),
    /// The base's, to the bit.
    Base,
}

impl shards::Pieces for Values<'_> {
    fn piece(&mut self, part: &shards::Part, rows: Range<usize>) -> Result<Tensor> {
        if self.at_hand.as_ref().is_none_or(|(name, _)| *name != part.name) {
            // Two of them are not in memory at once.
            self.at_hand = None;
            self.at_hand = Some((part.name.clone(), self.value(part)?));
        }
        let value = match &self.at_hand {
            Some((_, Value::Model(value))) => value,
            Some((_, Value::Copied(value))) => value,
            _ => return self.source.tensor_rows(&part.name, rows),
        };
        let rounded = value.rows(rows).to_dtype(part.dtype);
        refuse_non_finite(&part.name, &rounded).map_err(|_| {
            let found = format!("a number that {} cannot hold", part.dtype);
            let remedy = "train on, or again, with a lower learning rate";
            Error::input(&part.name, found, "finite weights", remedy)
        })?;
        Ok(rounded)
    }
}

impl<'a> Values<'a> {
    fn value(&self, part: &shards::Part) -> Result<Value<'a>> {
        let Some(&Origin::Model(param)) = self.origins.get(&part.name) else {
            return Ok(Value::Base);
        };
        let value = match param.value.device() {
            Device::Cpu => Value::Model(&param.value),
            Device::Cuda(_) => Value::Copied(param.value.to_device(Device::Cpu)?),
        };
        let held = match &value {
            Value::Copied(tensor) => tensor,
            _ => &param.value,
        };
        // A frozen value that the device holds in another type of 16 bits, or in one that is narrower than the base's: what has
        // not changed keeps the base's bits.
        let narrowed = held.dtype() != part.dtype && held.dtype().size() <= part.dtype.size();
        let unchanged = narrowed
            && !param.trains()
            && self.source.contains(&part.name)
            && same_rounded(&self.source.tensor(&part.name)?, held);
        Ok(if unchanged { Value::Base } else { value })
    }
}

/// Is `value` what becomes of `stored` in its type?
fn same_rounded(stored: &Tensor, value: &Tensor) -> bool {
    const ROWS: usize = 256;
    let rows = stored.shape().extents()[0];
    (0..rows).step_by(ROWS).all(|first| {
        let piece = first..rows.min(first + ROWS);
        let rounded = stored.rows(piece.clone()).to_dtype(value.dtype());
        rounded.bytes() == value.rows(piece).bytes()
    })
}
