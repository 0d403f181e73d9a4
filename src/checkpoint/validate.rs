//! Does a folder hold exactly the tensors of its config?

use std::collections::BTreeMap;

use super::{Checkpoint, LM_HEAD, WORD_EMBEDDINGS};
use crate::checkpoint::pickle::printable;
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape};

/// bitsandbytes' keys beside `<weight>` of a 4-bit linear: always there, and with double quantisation.
const FLAT: [&str; 2] = [".absmax", ".quant_map"];
const NESTED: [&str; 2] = [".nested_absmax", ".nested_quant_map"];
const STATES: [&str; 2] = [".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"];

/// At most this many tensors are named in one message.
const SHOWN: usize = 20;

/// The first problems, and how many more there are.
pub(super) fn list(problems: &[String]) -> String {
    let mut text = problems
        .iter()
        .take(SHOWN)
        .cloned()
        .collect::<Vec<_>>()
        .join("; ");
    if problems.len() > SHOWN {
        text.push_str(&format!("; and {} more", problems.len() - SHOWN));
    }
    text
}

pub(super) fn validate(checkpoint: &Checkpoint) -> Result<()> {
    let config = checkpoint.config();
    let expected: BTreeMap<String, Shape> = config.tensors().into_iter().collect();
    let mut problems = Vec::new();
    for (name, shape) in config.tensors() {
        match (checkpoint.shape(&name), checkpoint.dtype(&name)) {
            (Some(found), Some(dtype)) => check(checkpoint, &name, shape, found, dtype, &mut problems),
            _ if name == LM_HEAD && config.tie_word_embeddings => {}
            _ => problems.push(format!("missing {name} {shape}")),
        }
    }
    for name in checkpoint.names() {
        if !expected.contains_key(name)
            && !is_inv_freq(name)
            && !belongs_to_quantised(checkpoint, &expected, name)
        {
            let shape = checkpoint.shape(name).unwrap_or(Shape::new(&[]));
            problems.push(format!("extra {} {shape}", printable(name)));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::input(
        checkpoint.dir().display(),
        list(&problems),
        format!(
            "the tensors of a ChatGLM-6B with {} layers, as config.json says",
            config.num_layers
        ),
        remedy(checkpoint),
    ))
}

fn remedy(checkpoint: &Checkpoint) -> String {
    let rows = checkpoint
        .shape(WORD_EMBEDDINGS)
        .and_then(|shape| shape.extents().first().copied());
    match rows {
        Some(rows) if rows != checkpoint.config().vocab_size && matches!(rows, 130_528 | 150_528) => format!(
            "the weights have the vocabulary of the {} revision: take config.json, tokenizer and weights from one revision",
            if rows == 150_528 {
                "first (150528)"
            } else {
                "current (130528)"
            }
        ),
        _ => "take config.json and all weights from the same model, and nothing else into the folder"
            .to_string(),
    }
}

fn check(
    checkpoint: &Checkpoint,
    name: &str,
    expected: Shape,
    found: Shape,
    dtype: DType,
    problems: &mut Vec<String>,
) {
    if quant_state(checkpoint, name).is_some() {
        let codes = Shape::new(&[expected.elements().div_ceil(2), 1]);
        if found != codes || dtype != DType::U8 {
            problems.push(format!(
                "{name} {dtype} {found} instead of 4-bit codes {} {codes}",
                DType::U8
            ));
        }
        let nested = checkpoint.dtype(&format!("{name}.absmax")) == Some(DType::U8);
        let needed = FLAT.iter().chain(if nested { NESTED.as_slice() } else { &[] });
        for suffix in needed.filter(|suffix| !checkpoint.contains(&format!("{name}{suffix}"))) {
            problems.push(format!("missing {name}{suffix}"));
        }
    } else if found != expected {
        problems.push(format!("{name} {found} instead of {expected}"));
    } else if !matches!(dtype, DType::F16 | DType::BF16 | DType::F32) {
        problems.push(format!(
            "{name} of {dtype} instead of float16, bfloat16 or float32"
        ));
    }
}

/// The key of a weight's 4-bit state, when it has one.
fn quant_state(checkpoint: &Checkpoint, name: &str) -> Option<String> {
    STATES
        .iter()
        .map(|state| format!("{name}{state}"))
        .find(|key| checkpoint.contains(key))
}

fn is_inv_freq(name: &str) -> bool {
    name.starts_with("transformer.layers.") && name.ends_with(".attention.rotary_emb.inv_freq")
}

fn belongs_to_quantised(checkpoint: &Checkpoint, expected: &BTreeMap<String, Shape>, name: &str) -> bool {
    FLAT.iter().chain(&NESTED).chain(&STATES).any(|suffix| {
        name.strip_suffix(suffix).is_some_and(|weight| {
            expected
                .get(weight)
                .is_some_and(|shape| shape.extents().len() == 2)
                && quant_state(checkpoint, weight).is_some()
        })
    })
}
