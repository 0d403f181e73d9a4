//! How far a result may be from what it was made from.
//!
//! Logits have no unit, so differences are measured by the spread of the reference's logits. Two figures are bounded: the largest
//! difference, which one wrong weight moves, and the mean, which a lost adapter moves and which few outliers do not blur. Measured on
//! `models/tiny-glm` with an adapter of 30 steps, 535 positions of the built-in prompts, most of them far from what it was trained on
//! (and, for depth, on 28 random layers of width 512: all figures smaller):
//!
//! | | largest / spread | mean / spread | allowed |
//! |---|--:|--:|--:|
//! | float32, another order of sums | 0.00003 | 0.000001 | 0.0005, 0.00005 |
//! | float16 | 0.008 | 0.0003 | 0.05, 0.003 |
//! | bfloat16 | 0.13 | 0.006 | 0.4, 0.03 |
//! | GGML q8_0 | 0.38 | 0.012 | 1, 0.05 |
//! | GGML q5_1, q5_0 | 2.1 | 0.095 | 4, 0.3 |
//! | GGML q4_1, q4_0 | 3.1 | 0.19 | 6, 0.5 |
//! | NF4, FP4 | 1.2 | 0.081 | 6, 0.5 |
//! | THUDM int8 | 0.15 | 0.011 | 1, 0.05 |
//! | THUDM int4 | 2.8 | 0.20 | 8, 1 |
//! | merged into the form of the base it was not trained on | 2.1 | 0.16 | 6, 0.5 |
//! | half of the adapter lost | 5.5 | 1.4 | |
//! | the adapter lost | 8.7 | 2.5 | |
//!
//! What is allowed is about three times what was measured, ten times where nothing but rounding is at work; a model that has lost its
//! adapter is beyond all of it. A scale for a whole row fits the fewer weights the longer the row is: 128 here, 4096 in ChatGLM-6B, so
//! THUDM's int4 is allowed more.

use std::fmt;

use crate::checkpoint::ggml::GgmlFile;
use crate::checkpoint::{LM_HEAD, Source};
use crate::error::Result;
use crate::model::config::Linears;
use crate::quant::GgmlType;
use crate::tensor::DType;

/// What may make a result differ from what it was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Nothing but sums in another order.
    F32,
    /// Weights rounded to float16.
    F16,
    /// Weights rounded to bfloat16.
    BF16,
    /// 8 bits, with a scale for each row (THUDM) or for each 32 weights (GGML's q8_0).
    Bits8,
    /// GGML's q5_0 and q5_1.
    Bits5,
    /// GGML's q4_0 and q4_1, NF4 and FP4 of bitsandbytes.
    Bits4,
    /// THUDM's 4 bits with a scale for each row.
    Bits4ByRow,
    /// The adapter was trained on another form of the base than it was merged into.
    AnotherBase,
    /// Both models are computed in float16.
    ComputedInF16,
    /// Both models are computed in bfloat16.
    ComputedInBF16,
}

impl From<DType> for Rounding {
    /// Of weights that were written in this type.
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            _ => Self::F32,
        }
    }
}

impl From<GgmlType> for Rounding {
    /// Of matrices that were written in this type.
    fn from(kind: GgmlType) -> Self {
        match kind {
            GgmlType::F32 => Self::F32,
            GgmlType::F16 => Self::F16,
            GgmlType::Q8_0 => Self::Bits8,
            GgmlType::Q5_0 | GgmlType::Q5_1 => Self::Bits5,
            GgmlType::Q4_0 | GgmlType::Q4_1 => Self::Bits4,
        }
    }
}

impl Rounding {
    /// Of a model folder, by how it stores its linears.
    ///
    /// # Errors
    /// A weight is missing.
    pub fn of(folder: &dyn Source) -> Result<Self> {
        Ok(match folder.config().linears() {
            Linears::Dense => Self::of_floats(folder)?,
            Linears::FourBit { .. } => Self::Bits4,
            Linears::RowInt4 => Self::Bits4ByRow,
            Linears::RowInt8 => Self::Bits8,
        })
    }

    /// Of a GGML file, by its matrices.
    pub fn of_ggml(file: &GgmlFile) -> Self {
        let tensors = file.config().tensors();
        let matrices = tensors.iter().filter(|(_, shape)| shape.extents().len() > 1);
        coarsest(matrices.filter_map(|(name, _)| file.kind(name)).map(Self::from))
    }

    /// Of weights in floats, by the coarsest of their types: an embedding in float32 says nothing of linears in float16.
    ///
    /// # Errors
    /// A weight is missing.
    pub fn of_floats(source: &dyn Source) -> Result<Self> {
        let mut tensors = source.config().tensors();
        let separate = source.separate_head()?;
        tensors.retain(|(name, _)| separate || name != LM_HEAD);
        let kinds = tensors.iter().map(|(name, _)| source.dtype(name).map(Self::from));
        Ok(coarsest(kinds.collect::<Result<Vec<_>>>()?.into_iter()))
    }

    /// Of a comparison that is computed in this type.
    pub fn of_compute(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F16 => Some(Self::ComputedInF16),
            DType::BF16 => Some(Self::ComputedInBF16),
            _ => None,
        }
    }

    /// What it explains, in units of the spread of the reference's logits.
    const fn allowed(self) -> Bound {
        let (largest, mean) = match self {
            Self::F32 => (5e-4, 5e-5),
            Self::F16 => (0.05, 0.003),
            Self::BF16 => (0.4, 0.03),
            Self::Bits8 => (1.0, 0.05),
            Self::Bits5 => (4.0, 0.3),
            Self::Bits4 | Self::AnotherBase => (6.0, 0.5),
            Self::Bits4ByRow => (8.0, 1.0),
            // Activations of both models are rounded, independently of each other.
            Self::ComputedInF16 => (0.1, 0.006),
            Self::ComputedInBF16 => (0.8, 0.06),
        };
        Bound { largest, mean }
    }
}

impl fmt::Display for Rounding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::Bits8 => "8 bits",
            Self::Bits5 => "5 bits",
            Self::Bits4 => "4 bits",
            Self::Bits4ByRow => "4 bits with a scale for each row",
            Self::AnotherBase => "another base than that of the training",
            Self::ComputedInF16 => "computing in float16",
            Self::ComputedInBF16 => "computing in bfloat16",
        })
    }
}

fn coarsest(roundings: impl Iterator<Item = Rounding>) -> Rounding {
    let mean = |rounding: Rounding| rounding.allowed().mean;
    roundings.fold(Rounding::F32, |most, one| match mean(one) > mean(most) {
        true => one,
        false => most,
    })
}

/// What is let pass.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Of the largest difference of a logit.
    pub largest: f64,
    /// Of the mean difference; infinite when the user chose the other.
    pub mean: f64,
}

impl Bound {
    /// What `roundings` explain together, for a reference of this spread. Errors of different origin add at most; sums in another
    /// order are in every result.
    pub fn of(spread: f64, roundings: &[Rounding]) -> Self {
        let mut bound = Rounding::F32.allowed();
        for allowed in roundings
            .iter()
            .filter(|r| **r != Rounding::F32)
            .map(|r| r.allowed())
        {
            bound.largest += allowed.largest;
            bound.mean += allowed.mean;
        }
        Self {
            largest: spread * bound.largest,
            mean: spread * bound.mean,
        }
    }

    /// What the user lets pass.
    pub const fn chosen(largest: f64) -> Self {
        Self {
            largest,
            mean: f64::INFINITY,
        }
    }

    /// Is a NaN beyond it? Everything is that is not within it.
    pub fn admits(&self, largest: f64, mean: f64) -> bool {
        largest <= self.largest && mean <= self.mean
    }
}
