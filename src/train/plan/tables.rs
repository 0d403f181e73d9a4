//! What fits, by method, card and length: the tables of the README.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::fit::{Asked, Candidate, Limits, fit};
use super::layout::{Layout, StateOn};
use super::{CONTEXT, Card, Work, options};
use crate::config::{Method, RunConfig};
use crate::error::Result;
use crate::model::{HeadStorage, Linears, LoadedFrom, ModelConfig, Recompute};
use crate::optim::OptimizerKind;
use crate::tensor::{Compute, DType, Device};

const LENGTHS: [usize; 5] = [512, 1024, 2048, 4096, 8192];
/// Memory in 10⁹ bytes, and the card whose rates choose.
const CARDS: [(u64, &str); 5] = [
    (6, "RTX 3060"),
    (8, "RTX 3060"),
    (12, "RTX 3060"),
    (16, "RTX 4060 Ti"),
    (24, "RTX 3090"),
];
const METHODS: [(Method, OptimizerKind, &str); 5] = [
    (Method::Qlora, OptimizerKind::Adamw, "qlora, r 8"),
    (Method::Lora, OptimizerKind::Adamw, "lora, r 8"),
    (Method::Ptuning, OptimizerKind::Adamw, "ptuning, 128"),
    (Method::Freeze, OptimizerKind::Adamw, "freeze, last 3 layers"),
    (Method::Full, OptimizerKind::Adamw8bit, "full, adamw_8bit"),
];

/// One sequence a step, bf16: for each method and card a row, for each length the layout that would be chosen and what it takes.
///
/// # Errors
/// A method does not fit the model.
pub fn tables(model: &ModelConfig) -> Result<String> {
    let mut text = String::from("| method | GB |");
    LENGTHS.iter().for_each(|length| {
        let _ = write!(text, " {length} |");
    });
    text.push_str("\n|---|---|");
    text.push_str(&"---|".repeat(LENGTHS.len()));
    text.push('\n');
    for (method, optim, name) in METHODS {
        for (gb, card) in CARDS {
            let _ = write!(text, "| {name} | {gb} |");
            for length in LENGTHS {
                let _ = write!(text, " {} |", cell(model, method, optim, length, (gb, card))?);
            }
            text.push('\n');
        }
    }
    Ok(text)
}

fn cell(
    model: &ModelConfig,
    method: Method,
    optim: OptimizerKind,
    length: usize,
    (gb, card): (u64, &str),
) -> Result<String> {
    let config = RunConfig {
        method,
        optim,
        ..RunConfig::default()
    };
    let work = Work {
        model: model.clone(),
        from: LoadedFrom {
            dtype: DType::F16,
            linears: match config.in_four_bits() {
                true => Linears::FourBit { double_quant: true },
                false => Linears::Dense,
            },
            separate_head: !model.tie_word_embeddings,
        },
        tuning: super::tuning(&config)?,
        compute: Compute {
            device: Device::Cuda(0),
            dtype: DType::BF16,
        },
        options: options(&config),
        batch: 1,
        length,
        samples: 1,
        folder: PathBuf::new(),
        answers: Vec::new(),
        context: CONTEXT,
    };
    let limits = Limits {
        device: gb * 1_000_000_000,
        host: None,
    };
    let Some(card) = Card::named(card) else {
        return Ok("-".into());
    };
    Ok(match fit(&work, &Asked::default(), limits, &card) {
        Ok(fit) => short(&fit.ladder[0]),
        Err(_) => "-".into(),
    })
}

/// `smart PS 5.6 +37`: what layers keep, letters for what is moved, GB of the card, GB of host memory if it is more than one.
fn short(candidate: &Candidate) -> String {
    let Candidate {
        layout, device, host, ..
    } = candidate;
    let mut text = kept(layout);
    let letters = [
        (layout.layers.iter().any(|layer| layer.offload), "O"),
        (layout.stream, "W"),
        (layout.head == HeadStorage::Stream, "H"),
        (layout.head == HeadStorage::Int8, "8"),
        (layout.head == HeadStorage::Nf4, "4"),
        (layout.state != StateOn::Device, "P"),
        (layout.in_backward, "B"),
    ];
    let letters: String = letters
        .iter()
        .filter(|(is, _)| *is)
        .map(|(_, letter)| *letter)
        .collect();
    if !letters.is_empty() {
        let _ = write!(text, " {letters}");
    }
    let _ = write!(text, " {:.1}", *device as f64 / 1e9);
    if *host > 1_000_000_000 {
        let _ = write!(text, " +{:.0}", *host as f64 / 1e9);
    }
    text
}

/// `none`, `smart`, `full`, or two of them.
fn kept(layout: &Layout) -> String {
    let names = [
        (Recompute::Full, "full"),
        (Recompute::Smart, "smart"),
        (Recompute::None, "none"),
    ];
    let has = |recompute| layout.layers.iter().any(|layer| layer.recompute == recompute);
    let kept: Vec<&str> = names
        .iter()
        .filter(|(r, _)| has(*r))
        .map(|(_, name)| *name)
        .collect();
    kept.join("/")
}
