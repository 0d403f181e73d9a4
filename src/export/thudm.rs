//! THUDM's int4 and int8 folders (`chatglm-6b-int4`, `chatglm-6b-int8`), which the official code loads by the `quantization_bit` of
//! their config.json.
//!
//! | name | type | |
//! |---|---|---|
//! | `M.weight` | int8 `[out, in * bits / 8]` | codes ([`ThudmBits`]), of the four linears of each block |
//! | `M.weight_scale` | float16 `[out]` | |
//! | everything else | float16 | as `model.half().quantize(bits)` leaves it: embedding, biases, norms |
//!
//! The files are torch `.bin` files. A tied head is a second name of the embedding's storage, as torch saves it.

use std::fmt::Display;
use std::path::Path;

use half::f16;
use serde_json::{Map, Value, json};

use super::Progress;
use crate::checkpoint::quantized::{copy_companions, for_each_piece, is_quantized_linear};
use crate::checkpoint::shards::SHARD_BYTES;
use crate::checkpoint::{
    LM_HEAD, Source, Stored, TorchBinWriter, WORD_EMBEDDINGS, atomic, refuse_non_finite,
};
use crate::error::{Error, Result};
use crate::model::config;
use crate::quant::{Absmax, BLOCK, QuantTensor, QuantType, RowInt8, ThudmBits};
use crate::tensor::{DType, Shape, Tensor};

/// Writes the weights of `source` into the folder `dir` beside configuration, tokenizer and code of the model folder `base`.
///
/// Weights are rounded to float16 before they are quantised, as the official code does it. Linears that `source` has in these very
/// whole numbers go through unchanged.
///
/// # Errors
/// A weight that float16 cannot hold, that is no number or cannot be read; of 4 bits, a linear with an odd number of inputs; the
/// system refuses to write. `progress` said no.
pub fn write(
    source: &dyn Source,
    base: &Path,
    dir: &Path,
    bits: ThudmBits,
    progress: &mut Progress,
) -> Result<()> {
    write_shards(source, dir, bits, SHARD_BYTES, progress)?;
    copy_companions(base, dir)?;
    let mut keys = vec![
        ("quantization_bit", json!(bits.number())),
        ("quantization_embeddings", json!(false)),
        ("quantization_config", Value::Null),
        ("torch_dtype", json!("float16")),
        ("dtype", Value::Null),
    ];
    if source.separate_head()? {
        keys.push(("tie_word_embeddings", json!(false)));
    }
    config::copy(base, dir, &keys)
}

/// A weight of the source, with the tensors of the folder that it becomes.
struct Part {
    name: String,
    shape: Shape,
    specs: Vec<(String, DType, Shape)>,
}

impl Part {
    fn bytes(&self) -> u64 {
        let sizes = self
            .specs
            .iter()
            .map(|(_, dtype, shape)| shape.elements() * dtype.size());
        sizes.sum::<usize>() as u64
    }
}

fn parts(source: &dyn Source, bits: ThudmBits) -> Result<Vec<Part>> {
    let separate = source.separate_head()?;
    let mut parts = Vec::new();
    for (name, shape) in source.config().tensors() {
        if name == LM_HEAD && !separate {
            continue;
        }
        let specs = if is_quantized_linear(&name) {
            let (out, input) = shape.rows_and_columns();
            let width = input * bits.number() / 8;
            if width * 8 != input * bits.number() {
                let found = format!("{input} inputs");
                let expected = "an even number: two codes share a byte";
                return Err(Error::input(
                    source.place(&name),
                    found,
                    expected,
                    "export as thudm-int8",
                ));
            }
            vec![
                (name.clone(), DType::I8, Shape::new(&[out, width])),
                (scale_name(&name), DType::F16, Shape::new(&[out])),
            ]
        } else {
            vec![(name.clone(), DType::F16, shape)]
        };
        parts.push(Part { name, shape, specs });
    }
    Ok(parts)
}

fn scale_name(weight: &str) -> String {
    format!("{weight}_scale")
}

/// `pytorch_model.bin`, or files of at most `most` bytes (or of one weight) with an index.
fn write_shards(
    source: &dyn Source,
    dir: &Path,
    bits: ThudmBits,
    most: u64,
    progress: &mut Progress,
) -> Result<()> {
    let parts = parts(source, bits)?;
    let total = parts.iter().map(Part::bytes).sum();
    let mut shards: Vec<Vec<&Part>> = Vec::new();
    let mut size = 0;
    for part in &parts {
        match shards.last_mut() {
            Some(shard) if size + part.bytes() <= most => shard.push(part),
            _ => {
                shards.push(vec![part]);
                size = 0;
            }
        }
        size += part.bytes();
    }
    let mut map = Map::new();
    let mut done = 0;
    for (i, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => "pytorch_model.bin".to_string(),
            count => format!("pytorch_model-{:05}-of-{count:05}.bin", i + 1),
        };
        let specs: Vec<_> = shard.iter().flat_map(|part| part.specs.clone()).collect();
        let tied = shard.iter().any(|part| part.name == WORD_EMBEDDINGS) && !source.separate_head()?;
        let shared: &[_] = if tied { &[(LM_HEAD, WORD_EMBEDDINGS)] } else { &[] };
        let mut writer = TorchBinWriter::create_sharing(&dir.join(&file), &specs, shared)?;
        for part in shard {
            progress(done, total, &part.name)?;
            if is_quantized_linear(&part.name) {
                write_linear(source, part, bits, &mut writer)?;
            } else {
                write_dense(source, part, &dir.join(&file), &mut writer, &mut |share| {
                    let bytes = part.bytes() as f64 * share;
                    progress(done + bytes as u64, total, &part.name)
                })?;
            }
            done += part.bytes();
        }
        progress(done, total, "writing to the disk")?;
        writer.finish()?;
        let names = specs.iter().map(|(name, ..)| name.as_str());
        map.extend(
            names
                .chain(shared.iter().map(|(name, _)| *name))
                .map(|name| (name.to_string(), json!(file))),
        );
    }
    if shards.len() > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
        let path = dir.join("pytorch_model.bin.index.json");
        atomic::write(&path, format!("{index:#}\n").as_bytes())?;
    }
    Ok(())
}

fn write_linear(
    source: &dyn Source,
    part: &Part,
    bits: ThudmBits,
    writer: &mut TorchBinWriter,
) -> Result<()> {
    let place = source.place(&part.name);
    let stored = source.weight(&part.name)?;
    let (codes, scales) = match unchanged(&stored, bits) {
        Some(kept) => kept,
        None => {
            let floats = match stored {
                Stored::Dense(floats) => floats,
                few => few.decoded(),
            };
            bits.quantize(&place, &in_half(&place, floats)?, 0)?
        }
    };
    writer.write_from(&part.name, |out| out.write_all(codes.bytes()))?;
    writer.write_from(&scale_name(&part.name), |out| out.write_all(scales.bytes()))
}

/// Codes and scales of a weight that is in these whole numbers already, with scales that float16 holds.
pub(crate) fn unchanged(stored: &Stored, bits: ThudmBits) -> Option<(Tensor, Tensor)> {
    let (codes, scales) = match (stored, bits) {
        (Stored::Int8(RowInt8 { codes, scales, .. }), ThudmBits::Eight) => {
            (codes.clone(), scales.as_slice::<f32>().to_vec())
        }
        (
            Stored::Quant(QuantTensor {
                quant_type: QuantType::Int4,
                codes,
                absmax: Absmax::Flat(absmax),
                shape,
                ..
            }),
            ThudmBits::Four,
        ) => {
            // The blocks of a row repeat its scale.
            let blocks = (shape.rows_and_columns().1 / BLOCK).max(1);
            let scales = absmax.as_slice::<f32>().iter().step_by(blocks).copied();
            (codes.clone(), scales.collect())
        }
        _ => return None,
    };
    let halves: Vec<f16> = scales.iter().map(|scale| f16::from_f32(*scale)).collect();
    let same = halves
        .iter()
        .zip(&scales)
        .all(|(half, scale)| half.to_f32() == *scale);
    same.then(|| (codes, Tensor::from_slice(&halves, [halves.len()])))
}

fn write_dense(
    source: &dyn Source,
    part: &Part,
    file: &Path,
    writer: &mut TorchBinWriter,
    progress: &mut dyn FnMut(f64) -> Result<()>,
) -> Result<()> {
    let rows = part.shape.extents()[0] as f64;
    let mut failure = None;
    let written = writer.write_from(&part.name, |out| {
        for_each_piece(source, &part.name, part.shape, &mut |piece, first| {
            progress(first as f64 / rows)?;
            let half = in_half(source.place(&part.name), piece.clone())?;
            out.write_all(half.bytes()).map_err(Error::io(file, "write"))
        })
        .map_err(|error| {
            failure = Some(error);
            std::io::Error::other("the source ended")
        })
    });
    match failure {
        Some(error) => Err(error),
        None => written,
    }
}

/// Rounded to float16.
fn in_half(place: impl Display, floats: Tensor) -> Result<Tensor> {
    if floats.dtype() == DType::F16 {
        return Ok(floats);
    }
    let half = floats.to_dtype(DType::F16);
    let place = place.to_string();
    refuse_non_finite(&place, &floats)?;
    refuse_non_finite(&place, &half).map_err(|_| {
        let found = "a number beyond 65504";
        let expected = "weights that float16 holds, as the official files are";
        Error::input(
            &place,
            found,
            expected,
            "export as bnb, or use `glmtune merge --type bf16` or fp32",
        )
    })?;
    Ok(half)
}
