//! Does a folder hold exactly the tensors of its config?

use std::collections::BTreeMap;

use super::quantized::is_quantized_linear;
use super::rows::scales_of;
use super::{Checkpoint, LM_HEAD, WORD_EMBEDDINGS};
use crate::checkpoint::pickle::printable;
use crate::error::{Error, Result};
use crate::model::config::{ModelConfig, RowScaled};
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

/// How the matrix of a linear is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Floats,
    BnbFourBit,
    Rows(RowScaled),
}

impl Form {
    /// That of all linears, by `config.json`.
    fn expected(config: &ModelConfig) -> Self {
        match (config.row_scaled, &config.quantization_config) {
            (Some(rows), _) => Form::Rows(rows),
            (None, Some(_)) => Form::BnbFourBit,
            (None, None) => Form::Floats,
        }
    }

    /// That of one weight, by its own tensors; `None` when they are of none.
    fn found(checkpoint: &Checkpoint, name: &str, shape: Shape) -> Option<Self> {
        let has = |form: RowScaled| checkpoint.contains(&scales_of(name, form.scale_suffix()));
        let thudm = [RowScaled::ThudmInt8, RowScaled::ThudmInt4];
        let (dtype, found) = checkpoint.dtype(name).zip(checkpoint.shape(name))?;
        if quant_state(checkpoint, name).is_some() {
            return Some(Form::BnbFourBit);
        }
        if dtype.is_float() {
            return Some(Form::Floats);
        }
        if has(RowScaled::BnbInt8) {
            return Some(Form::Rows(RowScaled::BnbInt8));
        }
        let mut fitting = thudm
            .into_iter()
            .filter(|&form| has(form) && form.codes(shape) == found);
        fitting.next().map(Form::Rows)
    }

    /// What `config.json` has for it.
    fn key(self) -> &'static str {
        match self {
            Form::Floats => "neither quantization_bit nor quantization_config",
            Form::BnbFourBit => "quantization_config with load_in_4bit",
            Form::Rows(RowScaled::ThudmInt8) => "quantization_bit 8",
            Form::Rows(RowScaled::ThudmInt4) => "quantization_bit 4",
            Form::Rows(RowScaled::BnbInt8) => "quantization_config with load_in_8bit",
        }
    }
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Form::Floats => f.write_str("floats"),
            Form::BnbFourBit => f.write_str("bitsandbytes' 4 bits"),
            Form::Rows(rows) => rows.fmt(f),
        }
    }
}

/// All linears are stored in the form that `config.json` says. Beside bitsandbytes' 4 bits there may be floats: modules that it was
/// told to skip.
fn check_forms(checkpoint: &Checkpoint) -> Result<()> {
    let config = checkpoint.config();
    let expected = Form::expected(config);
    let linears = config
        .tensors()
        .into_iter()
        .filter(|(name, _)| is_quantized_linear(name));
    let forms = linears.filter_map(|(name, shape)| Some((Form::found(checkpoint, &name, shape)?, name)));
    let skips = expected == Form::BnbFourBit;
    let mut others = forms.filter(|(found, _)| *found != expected && !(skips && *found == Form::Floats));
    let Some((found, first)) = others.next() else {
        return Ok(());
    };
    Err(Error::input(
        checkpoint.dir().display(),
        format!(
            "{first} and {} other linears not as config.json says, but in {found}",
            others.count()
        ),
        format!("all linears in {expected}: config.json has {}", expected.key()),
        format!(
            "take config.json and all weights from the same repository; with {found} it has {}",
            found.key()
        ),
    ))
}

pub(super) fn validate(checkpoint: &Checkpoint) -> Result<()> {
    check_forms(checkpoint)?;
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
    if let Some(rows) = checkpoint
        .config()
        .row_scaled
        .filter(|_| is_quantized_linear(name))
    {
        let codes = rows.codes(expected);
        if found != codes || dtype != DType::I8 {
            problems.push(format!(
                "{name} {dtype} {found} instead of codes {} {codes}",
                DType::I8
            ));
        }
        let scales = scales_of(name, rows.scale_suffix());
        let outputs = Shape::new(&expected.extents()[..1]);
        match (checkpoint.shape(&scales), checkpoint.dtype(&scales)) {
            (Some(shape), Some(dtype)) if shape == outputs && dtype.is_float() => {}
            (Some(shape), Some(dtype)) => {
                problems.push(format!("{scales} {dtype} {shape} instead of floats {outputs}"));
            }
            _ => problems.push(format!("missing {scales} {outputs}")),
        }
    } else if quant_state(checkpoint, name).is_some() {
        let codes = expected.elements().div_ceil(2);
        if found.elements() * dtype.size() != codes {
            problems.push(format!(
                "{name} {dtype} {found} instead of {codes} bytes of 4-bit codes"
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
pub(super) fn quant_state(checkpoint: &Checkpoint, name: &str) -> Option<String> {
    STATES
        .iter()
        .map(|state| format!("{name}{state}"))
        .find(|key| checkpoint.contains(key))
}

fn is_inv_freq(name: &str) -> bool {
    name.starts_with("transformer.layers.") && name.ends_with(".attention.rotary_emb.inv_freq")
}

fn belongs_to_quantised(checkpoint: &Checkpoint, expected: &BTreeMap<String, Shape>, name: &str) -> bool {
    if let Some(rows) = checkpoint.config().row_scaled {
        return [rows.scale_suffix(), ".weight_format"].iter().any(|suffix| {
            let module = name.strip_suffix(suffix);
            module.is_some_and(|module| {
                let weight = format!("{module}.weight");
                is_quantized_linear(&weight) && expected.contains_key(&weight)
            })
        });
    }
    FLAT.iter().chain(&NESTED).chain(&STATES).any(|suffix| {
        name.strip_suffix(suffix).is_some_and(|weight| {
            expected
                .get(weight)
                .is_some_and(|shape| shape.extents().len() == 2)
                && quant_state(checkpoint, weight).is_some()
        })
    })
}
