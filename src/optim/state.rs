//! What an optimizer remembers of each element, in parts.

use super::groups::keeps_32_bits;
use super::{OptimizerConfig, OptimizerKind};
use crate::error::{Error, Result};
use crate::ops::{self, AdamW, Adamw8bitSlot, AdamwSlot, BLOCK_8BIT, Lion, LionSlot, Sgd, SgdSlot, Span};
use crate::tensor::{DType, Tensor};

/// A part of the state.
#[derive(Debug)]
pub(super) struct Part {
    /// Its name in files: PyTorch's or bitsandbytes'.
    pub name: &'static str,
    /// The type of its elements.
    pub dtype: DType,
    /// How many elements of a parameter share one of its own.
    pub per: usize,
    /// Is no number of it below 0?
    pub is_magnitude: bool,
}

impl Part {
    const fn of_each(name: &'static str) -> Self {
        Self {
            name,
            dtype: DType::F32,
            per: 1,
            is_magnitude: false,
        }
    }

    /// Its elements for `n` of a parameter.
    pub fn elements(&self, n: usize) -> usize {
        n.div_ceil(self.per)
    }

    /// Its bytes for `n` elements of a parameter.
    pub fn bytes(&self, n: usize) -> u64 {
        (self.elements(n) * self.dtype.size()) as u64
    }
}

/// How the state of a parameter is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Both moments.
    Adamw,
    /// Both moments in codes, and the scale of every 256.
    Adamw8bit,
    /// Nothing.
    Sgd,
    /// The momentum.
    SgdMomentum,
    /// The momentum.
    Lion,
}

const ADAMW: [Part; 2] = [
    Part::of_each("exp_avg"),
    Part {
        is_magnitude: true,
        ..Part::of_each("exp_avg_sq")
    },
];
const CODES: Part = Part {
    dtype: DType::U8,
    ..Part::of_each("state1")
};
const SCALES: Part = Part {
    per: BLOCK_8BIT,
    is_magnitude: true,
    ..Part::of_each("absmax1")
};
const ADAMW_8BIT: [Part; 4] = [
    CODES,
    Part {
        name: "state2",
        ..CODES
    },
    SCALES,
    Part {
        name: "absmax2",
        ..SCALES
    },
];
const MOMENTUM: [Part; 1] = [Part::of_each("momentum_buffer")];
const LION: [Part; 1] = [Part::of_each("exp_avg")];

impl Format {
    /// That of the parameter `name`.
    pub fn of(config: &OptimizerConfig, name: &str, elements: usize) -> Self {
        match config.kind {
            OptimizerKind::Adamw8bit if !keeps_32_bits(name, elements) => Format::Adamw8bit,
            OptimizerKind::Adamw | OptimizerKind::Adamw8bit => Format::Adamw,
            OptimizerKind::Sgd if config.momentum == 0.0 => Format::Sgd,
            OptimizerKind::Sgd => Format::SgdMomentum,
            OptimizerKind::Lion => Format::Lion,
        }
    }

    /// Its parts, in the order of files. All are 0 before the first step: whatever codes mean, a scale of 0 makes them 0.
    pub fn parts(self) -> &'static [Part] {
        match self {
            Format::Adamw => &ADAMW,
            Format::Adamw8bit => &ADAMW_8BIT,
            Format::Sgd => &[],
            Format::SgdMomentum => &MOMENTUM,
            Format::Lion => &LION,
        }
    }

    /// Bytes of the state of `n` elements.
    pub fn bytes(self, n: usize) -> u64 {
        self.parts().iter().map(|part| part.bytes(n)).sum()
    }

    /// Where the state of a parameter may begin among that of others: at blocks of scales, else at 16 bytes.
    pub fn alignment(self) -> usize {
        match self {
            Format::Adamw8bit => BLOCK_8BIT,
            _ => 4,
        }
    }
}

/// What a step does to every element, whatever its parameter.
#[derive(Debug)]
pub(super) struct Rule {
    config: OptimizerConfig,
    correction1: f64,
    adamw: AdamW,
    sgd: Sgd,
    lion: Lion,
}

impl Rule {
    /// Step `t`, counted from 1, with gradients that are multiplied by `clip`.
    pub fn new(c: &OptimizerConfig, t: u64, clip: f64) -> Self {
        let clip = clip as f32;
        Self {
            config: *c,
            correction1: 1.0 - c.beta1.powf(t as f64),
            adamw: AdamW {
                clip,
                one_minus_beta1: (1.0 - c.beta1) as f32,
                beta2: c.beta2 as f32,
                one_minus_beta2: (1.0 - c.beta2) as f32,
                sqrt_correction2: (1.0 - c.beta2.powf(t as f64)).sqrt() as f32,
                epsilon: c.epsilon as f32,
            },
            sgd: Sgd {
                clip,
                momentum: c.momentum as f32,
            },
            lion: Lion {
                clip,
                beta1: c.beta1 as f32,
                one_minus_beta1: (1.0 - c.beta1) as f32,
                beta2: c.beta2 as f32,
                one_minus_beta2: (1.0 - c.beta2) as f32,
            },
        }
    }

    /// The rate and the decay of a [`Span`] of a parameter with this learning rate.
    pub fn rate_and_decay(&self, rate: f64, decayed: bool) -> (f32, f32) {
        let weight_decay = if decayed { self.config.weight_decay } else { 0.0 };
        let decay = (1.0 - rate * weight_decay) as f32;
        match self.config.kind {
            OptimizerKind::Adamw | OptimizerKind::Adamw8bit => ((rate / self.correction1) as f32, decay),
            OptimizerKind::Sgd => (rate as f32, weight_decay as f32),
            OptimizerKind::Lion => (rate as f32, decay),
        }
    }

    /// Updates parameters whose state is `state`, the parts of `format`.
    pub fn apply(&self, format: Format, state: &mut [Tensor], spans: Vec<Span<'_>>) -> Result<()> {
        match (format, state) {
            (Format::Adamw, [m, v]) => ops::adamw(&mut [AdamwSlot { m, v, spans }], &self.adamw),
            (Format::Adamw8bit, [m, v, m_absmax, v_absmax]) => {
                let slot = Adamw8bitSlot {
                    m,
                    v,
                    m_absmax,
                    v_absmax,
                    spans,
                };
                ops::adamw_8bit(&mut [slot], &self.adamw)
            }
            (Format::Sgd, []) => ops::sgd(&mut [SgdSlot { m: None, spans }], &self.sgd),
            (Format::SgdMomentum, [m]) => ops::sgd(&mut [SgdSlot { m: Some(m), spans }], &self.sgd),
            (Format::Lion, [m]) => ops::lion(&mut [LionSlot { m, spans }], &self.lion),
            (format, state) => Err(Error::Shape {
                operation: "Optimizer::step",
                found: format!("a state of {} parts", state.len()),
                expected: format!("the {} of {format:?}", format.parts().len()),
            }),
        }
    }
}
