//! What `--format` and `--type` ask for.

use clap::ValueEnum;

use super::ExportArgs;
use crate::checkpoint::quantized::is_quantized_linear;
use crate::checkpoint::{Source, Stored};
use crate::cli::sources::Inputs;
use crate::error::{Error, Result};
use crate::export::card::Loads;
use crate::export::merged::Into;
use crate::export::thudm;
use crate::export::verify::Rounding;
use crate::quant::{Absmax, GgmlType, QuantType, ThudmBits};

/// What `--format` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// A file for chatglm.cpp
    Ggml,
    /// A folder in bitsandbytes' 4 bits, for transformers
    Bnb,
    /// A folder as THUDM's chatglm-6b-int4
    ThudmInt4,
    /// A folder as THUDM's chatglm-6b-int8
    ThudmInt8,
    /// The adapters as one folder that every version of PEFT loads
    Peft,
    /// No program reads GGUF files of ChatGLM-6B: refused
    #[value(hide = true)]
    Gguf,
}

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    Ggml(GgmlType),
    Bnb {
        quant_type: QuantType,
        double_quant: bool,
    },
    Thudm(ThudmBits),
    Peft,
}

/// In which form the linears are before they are exported, told by the first of them.
pub(super) enum Form {
    Floats,
    /// Floats of the base, in 4 bits because `--into` says so.
    Quantized(QuantType, bool),
    /// The few bits of the base itself.
    Few(Stored),
}

impl Form {
    /// # Errors
    /// The first linear cannot be read.
    pub(super) fn of(inputs: &Inputs) -> Result<Self> {
        let tensors = inputs.base.config().tensors();
        let Some((name, _)) = tensors.iter().find(|(name, _)| is_quantized_linear(name)) else {
            return Ok(Self::Floats);
        };
        Ok(match (Source::weight(&inputs.base, name)?, inputs.into) {
            (Stored::Dense(_), Into::Original) => Self::Floats,
            (
                Stored::Dense(_),
                Into::Dequantized {
                    quant_type,
                    double_quant,
                },
            ) => Self::Quantized(quant_type, double_quant),
            (few, _) => Self::Few(few),
        })
    }

    /// bitsandbytes' 4 bits, and whether scales are quantised too.
    fn in_four_bits(&self) -> Option<(QuantType, bool)> {
        match self {
            Self::Quantized(quant_type, double_quant) => Some((*quant_type, *double_quant)),
            Self::Few(Stored::Quant(weight)) if weight.quant_type != QuantType::Int4 => {
                Some((weight.quant_type, matches!(weight.absmax, Absmax::Nested { .. })))
            }
            _ => None,
        }
    }

    /// Does the format keep them as they are?
    pub(super) fn is_kept_by(&self, target: Target) -> bool {
        match (target, self) {
            (
                Target::Bnb {
                    quant_type,
                    double_quant,
                },
                _,
            ) => self.in_four_bits() == Some((quant_type, double_quant)),
            (Target::Thudm(bits), Self::Few(few)) => thudm::unchanged(few, bits).is_some(),
            _ => false,
        }
    }

    /// Were they rounded to few bits before?
    pub(super) fn is_rounded(&self) -> bool {
        !matches!(self, Self::Floats)
    }
}

/// Flags that do not go together, before any file is opened.
///
/// # Errors
/// `--format gguf`; a `--type` that the format does not have.
pub(super) fn check(format: FormatArg, kind: Option<&str>, no_double_quant: bool) -> Result<()> {
    if format == FormatArg::Gguf {
        return Err(Error::Usage(
            "--format gguf: found a format that no program reads ChatGLM-6B from (llama.cpp's `chatglm` is ChatGLM3 and GLM-4: \
             RMSNorm, SwiGLU, one rotation, where ChatGLM-6B has LayerNorm with biases, GELU, two rotations and a residual of \
             its own), expected ggml, which chatglm.cpp reads, or bnb; `glmtune merge` writes a Hugging Face folder"
                .into(),
        ));
    }
    let types: &[&str] = match format {
        FormatArg::Ggml => &["f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"],
        FormatArg::Bnb => &["nf4", "fp4"],
        _ => &[],
    };
    match kind {
        Some(kind) if types.is_empty() => Err(Error::Usage(format!(
            "--type: found {kind}, expected none: only ggml and bnb have types to choose from"
        ))),
        Some(kind) if !types.contains(&kind) => Err(Error::Usage(format!(
            "--type: found {kind}, expected one of {}",
            types.join(", ")
        ))),
        _ if no_double_quant && format != FormatArg::Bnb => Err(Error::Usage(
            "--no-double-quant: found it without --format bnb, which alone has double quantisation; expected both or neither"
                .into(),
        )),
        _ => Ok(()),
    }
}

impl Target {
    /// # Errors
    /// `--into requantized` of a format that is not in those bits; PEFT without an adapter.
    pub(super) fn new(args: &ExportArgs, inputs: &Inputs, form: &Form) -> Result<Self> {
        if inputs.requantize && args.format != FormatArg::Bnb {
            return Err(Error::Usage(
                "--into: found requantized, expected original or dequantized: what is written has the bits of --format".into(),
            ));
        }
        let kind = args.kind.as_deref();
        Ok(match args.format {
            FormatArg::Ggml | FormatArg::Gguf => {
                let named = GgmlType::ALL.into_iter().find(|t| Some(t.name()) == kind);
                Self::Ggml(named.unwrap_or(GgmlType::Q4_0))
            }
            FormatArg::Bnb => {
                // What is in 4 bits keeps them.
                let (held, double) = form.in_four_bits().unwrap_or((QuantType::Nf4, true));
                let named = [QuantType::Nf4, QuantType::Fp4]
                    .into_iter()
                    .find(|t| Some(t.name()) == kind);
                let quant_type = named.unwrap_or(held);
                let double_quant = double && !args.no_double_quant;
                if matches!(form, Form::Quantized(..))
                    && inputs.strengths().is_empty()
                    && (quant_type, double_quant) != (held, double)
                {
                    return Err(Error::Usage(format!(
                        "--into: found dequantized, 4 bits ({held}) that would be rounded to others, expected original: leave --into \
                         out, or --type and --no-double-quant"
                    )));
                }
                Self::Bnb {
                    quant_type,
                    double_quant,
                }
            }
            FormatArg::ThudmInt4 => Self::Thudm(ThudmBits::Four),
            FormatArg::ThudmInt8 => Self::Thudm(ThudmBits::Eight),
            FormatArg::Peft if inputs.strengths().is_empty() => {
                return Err(Error::Usage(
                    "--format peft: found no --adapter, expected at least one: it is adapters that are written".into(),
                ));
            }
            FormatArg::Peft => Self::Peft,
        })
    }

    /// For people.
    pub(super) fn in_words(self) -> String {
        match self {
            Self::Ggml(kind) => format!("GGML {kind}"),
            Self::Bnb {
                quant_type,
                double_quant: true,
            } => format!("bitsandbytes {quant_type} with double quantisation"),
            Self::Bnb { quant_type, .. } => format!("bitsandbytes {quant_type}"),
            Self::Thudm(bits) => format!("THUDM int{}", bits.number()),
            Self::Peft => "PEFT adapter".to_string(),
        }
    }

    /// Who reads it.
    pub(super) fn loads(self) -> Loads {
        match self {
            Self::Ggml(_) => Loads::Ggml,
            Self::Bnb { .. } => Loads::Bitsandbytes,
            Self::Thudm(_) => Loads::Thudm,
            Self::Peft => Loads::Peft,
        }
    }

    /// What the format does to weights.
    pub(super) fn rounding(self) -> Option<Rounding> {
        Some(match self {
            Self::Ggml(GgmlType::F32) => Rounding::F32,
            Self::Ggml(GgmlType::F16) => Rounding::F16,
            Self::Ggml(GgmlType::Q8_0) | Self::Thudm(ThudmBits::Eight) => Rounding::Bits8,
            Self::Ggml(GgmlType::Q5_0 | GgmlType::Q5_1) => Rounding::Bits5,
            Self::Ggml(GgmlType::Q4_0 | GgmlType::Q4_1) | Self::Bnb { .. } => Rounding::Bits4,
            Self::Thudm(ThudmBits::Four) => Rounding::Bits4ByRow,
            Self::Peft => return None,
        })
    }

    /// Are weights kept in few bits?
    pub(super) fn rounds(self) -> bool {
        !matches!(self, Self::Ggml(GgmlType::F32 | GgmlType::F16) | Self::Peft)
    }
}
