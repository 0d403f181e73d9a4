//! 4-bit block-wise quantisation (NF4 and FP4) with double quantisation, equal to bitsandbytes' CPU results to the bit; and whole
//! numbers of 8 bits ([`RowInt8`]) and of 4 ([`QuantType::Int4`]) with a scale for each row.
//!
//! A weight `[out, in]` is flattened row-major and cut into blocks of 64. Each block keeps its largest magnitude
//! ("absmax") and for each element the 4-bit code of the table's value nearest to `x / absmax`. With double
//! quantisation the absmax are in turn kept as 8-bit codes in blocks of 256 around their mean:
//! `w = table[code] * (map[code8] * nested_absmax + offset)`. That is 4.127 bits a weight instead of 4.5.

mod blockwise;
mod bnb;
mod code;
mod ggml;
mod int4;
mod int8;
mod nested;
mod random;
mod thudm;

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::tensor::{DType, Device, Shape, Tensor};

pub use code::{FP4, INT4, NF4};
pub use ggml::GgmlType;
pub use int8::RowInt8;
pub use thudm::ThudmBits;

/// Elements that share one scale.
pub const BLOCK: usize = 64;
/// Scales that share one scale of scales.
pub const NESTED_BLOCK: usize = 256;

/// The table of values that the 16 codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// [`NF4`]: quantiles of the normal distribution, the better choice for weights.
    Nf4,
    /// [`FP4`]: 4-bit floating point.
    Fp4,
    /// [`INT4`]: whole numbers, with a scale for each row, which all blocks of the row repeat.
    Int4,
}

impl QuantType {
    /// bitsandbytes' name, `nf4` or `fp4`; `int4`, which it does not have.
    pub const fn name(self) -> &'static str {
        match self {
            QuantType::Nf4 => "nf4",
            QuantType::Fp4 => "fp4",
            QuantType::Int4 => "int4",
        }
    }

    /// The 16 values by code.
    pub fn table(self) -> &'static [f32; 16] {
        match self {
            QuantType::Nf4 => &NF4,
            QuantType::Fp4 => &FP4,
            QuantType::Int4 => &INT4,
        }
    }

    /// The table in ascending order with its midpoints: what quantising blocks needs. Whole numbers are not quantised by blocks.
    pub(crate) fn ranks(self) -> Option<&'static code::Ranks> {
        match self {
            QuantType::Nf4 => Some(&code::NF4_RANKS),
            QuantType::Fp4 => Some(&code::FP4_RANKS),
            QuantType::Int4 => None,
        }
    }
}

/// What the 8-bit codes of double quantisation mean: bitsandbytes' signed dynamic map, ascending.
pub(crate) fn nested_map() -> &'static [f32; 256] {
    &code::DYNAMIC
}

/// bitsandbytes' unsigned dynamic map, ascending: what the 8-bit codes of second moments mean.
pub(crate) fn unsigned_map() -> &'static [f32; 256] {
    &code::DYNAMIC_UNSIGNED
}

impl std::fmt::Display for QuantType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How the codes and scales of a weight follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As bitsandbytes has them: row by row.
    Rows,
    /// As the kernels of a CUDA device read them (`cuda/nf4.cuh`): in groups of rows, the codes renumbered, the last group
    /// padded.
    Groups,
}

/// One scale per block of [`BLOCK`] weights.
#[derive(Debug, Clone)]
pub enum Absmax {
    /// As they are, F32 `[blocks]`.
    Flat(Tensor),
    /// Double-quantised: `code[codes[b]] * nested_absmax[b / 256] + offset`.
    Nested {
        /// U8 `[blocks]`.
        codes: Tensor,
        /// F32, one per [`NESTED_BLOCK`] blocks.
        nested_absmax: Tensor,
        /// The mean of the scales.
        offset: f32,
        /// F32 `[256]`, what the codes mean: bitsandbytes' signed dynamic map.
        code: Tensor,
    },
}

/// A weight in 4 bits. Its tensors may lie in a mapped file.
#[derive(Debug, Clone)]
pub struct QuantTensor {
    /// What the codes mean.
    pub quant_type: QuantType,
    /// U8 `[ceil(n / 2)]`: two codes a byte, the even element in the HIGH nibble; of an odd count the last low nibble is
    /// the code of zero. So they are in the order of rows.
    pub codes: Tensor,
    /// The scales.
    pub absmax: Absmax,
    /// The order of both: that of rows on the host, that of groups on a device, and in host memory from where a device gets
    /// them.
    pub order: Order,
    /// The weight's extents, `[out, in]`.
    pub shape: Shape,
    /// What the weight was quantised from, and what bitsandbytes dequantises it to.
    pub source_dtype: DType,
}

impl QuantTensor {
    /// Quantises an F32, F16 or BF16 tensor; the result does not depend on the number of threads.
    ///
    /// # Errors
    /// An element is NaN or infinite (its index is named), another type, no elements at all, or scales so large that
    /// their mean overflows. The place named is "weight": see [`QuantTensor::quantize_named`].
    pub fn quantize(source: &Tensor, quant_type: QuantType, double_quant: bool) -> Result<Self> {
        Self::quantize_named("weight", source, quant_type, double_quant)
    }

    /// [`QuantTensor::quantize`] with the place (file and tensor) that an error names. Whole numbers have a scale for each row, never
    /// double-quantised.
    ///
    /// # Errors
    /// As [`QuantTensor::quantize`]; for whole numbers, rows that are no multiple of [`BLOCK`].
    pub fn quantize_named(
        place: &str,
        source: &Tensor,
        quant_type: QuantType,
        double_quant: bool,
    ) -> Result<Self> {
        match source.dtype() {
            DType::F32 => Self::quantize_elements::<f32>(place, source, quant_type, double_quant),
            DType::F16 => Self::quantize_elements::<f16>(place, source, quant_type, double_quant),
            DType::BF16 => Self::quantize_elements::<bf16>(place, source, quant_type, double_quant),
            other => Err(Error::input(
                place,
                other,
                "float32, float16 or bfloat16 to quantise",
                "give the checkpoint with the original weights",
            )),
        }
    }

    fn quantize_elements<T: blockwise::Stored>(
        place: &str,
        source: &Tensor,
        quant_type: QuantType,
        double_quant: bool,
    ) -> Result<Self> {
        let Some(ranks) = quant_type.ranks() else {
            return Self::quantize_rows::<T>(place, source);
        };
        let n = source.elements();
        if n == 0 {
            return Err(Error::input(
                place,
                "no elements",
                "at least one",
                "give the whole checkpoint",
            ));
        }
        let mut codes = Tensor::zeros(DType::U8, [n.div_ceil(2)]);
        let mut flat = Tensor::zeros(DType::F32, [n.div_ceil(BLOCK)]);
        if source.is_planned() || codes.is_planned() {
            return Self::planned(source, quant_type, double_quant, codes, flat);
        }
        let source_elements = source.as_slice::<T>();
        blockwise::quantize(source_elements, ranks, codes.as_mut_slice(), flat.as_mut_slice());
        refuse_non_finite(place, source_elements, source.shape(), flat.as_slice())?;
        let absmax = if double_quant {
            Absmax::nested(place, flat.as_slice())?
        } else {
            Absmax::Flat(flat)
        };
        Ok(Self {
            quant_type,
            codes,
            absmax,
            order: Order::Rows,
            shape: source.shape(),
            source_dtype: source.dtype(),
        })
    }

    /// What quantising `source` makes in a plan, with these codes and scales of blocks.
    ///
    /// # Errors
    /// None that a plan can have.
    pub(crate) fn planned(
        source: &Tensor,
        quant_type: QuantType,
        double_quant: bool,
        codes: Tensor,
        flat: Tensor,
    ) -> Result<Self> {
        let (device, blocks) = (codes.device(), flat.elements());
        let zeros = |dtype, n: usize| Tensor::zeros_on(device, dtype, [n]);
        let absmax = if double_quant {
            Absmax::Nested {
                codes: zeros(DType::U8, blocks)?,
                nested_absmax: zeros(DType::F32, blocks.div_ceil(NESTED_BLOCK))?,
                offset: 0.0,
                code: zeros(DType::F32, 256)?,
            }
        } else {
            Absmax::Flat(flat)
        };
        Ok(Self {
            quant_type,
            codes,
            absmax,
            shape: source.shape(),
            source_dtype: source.dtype(),
            order: match device {
                Device::Cpu => Order::Rows,
                Device::Cuda(_) => Order::Groups,
            },
        })
    }

    /// `table[code] * absmax`, F32 of the weight's shape. bitsandbytes rounds this once more to [`Self::source_dtype`].
    pub fn dequantize(&self) -> Tensor {
        let mut out = Tensor::zeros(DType::F32, self.shape);
        let absmax = self.block_absmax();
        blockwise::dequantize(self.codes.as_slice(), &absmax, self.table(), out.as_mut_slice());
        out
    }

    /// The 16 values by code.
    pub fn table(&self) -> &'static [f32; 16] {
        self.quant_type.table()
    }

    /// The scale of every block, double quantisation undone.
    pub fn block_absmax(&self) -> Vec<f32> {
        match &self.absmax {
            Absmax::Flat(absmax) => absmax.as_slice().to_vec(),
            Absmax::Nested {
                codes,
                nested_absmax,
                offset,
                code,
            } => nested::dequantize(
                codes.as_slice(),
                nested_absmax.as_slice(),
                *offset,
                code.as_slice(),
            ),
        }
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        let scales = match &self.absmax {
            Absmax::Flat(absmax) => absmax.byte_len(),
            Absmax::Nested {
                codes, nested_absmax, ..
            } => codes.byte_len() + nested_absmax.byte_len(),
        };
        self.codes.byte_len() + scales
    }
}

impl Absmax {
    /// These with what `f` makes of the tensor that has one element for each block; the rest is shared.
    pub(crate) fn map_blocks(&self, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Absmax::Flat(absmax) => Absmax::Flat(f(absmax)?),
            Absmax::Nested {
                codes,
                nested_absmax,
                offset,
                code,
            } => Absmax::Nested {
                codes: f(codes)?,
                nested_absmax: nested_absmax.clone(),
                offset: *offset,
                code: code.clone(),
            },
        })
    }

    fn nested(place: &str, absmax: &[f32]) -> Result<Self> {
        let nested = nested::quantize(absmax);
        if !nested.offset.is_finite() || nested.scales.iter().any(|s| !s.is_finite()) {
            return Err(Error::input(
                place,
                "weights whose mean magnitude overflows float32",
                "weights below 1e38",
                "check the checkpoint, or quantise without double quantisation",
            ));
        }
        Ok(Absmax::Nested {
            codes: Tensor::from_slice(&nested.codes, [nested.codes.len()]),
            nested_absmax: Tensor::from_slice(&nested.scales, [nested.scales.len()]),
            offset: nested.offset,
            code: Tensor::from_slice(&code::DYNAMIC[..], [256]),
        })
    }
}

/// Names the first element of `row` that is not a number.
fn not_finite<T: blockwise::Stored>(place: &str, row: usize, elements: &[T]) -> Error {
    let mut wide = vec![0f32; elements.len()];
    T::widen(elements, &mut wide);
    let column = wide.iter().position(|x| !x.is_finite()).unwrap_or(0);
    Error::input(
        format!("{place}[{row}, {column}]"),
        wide[column],
        "a finite weight",
        "the checkpoint is damaged: download or convert it again",
    )
}

/// A weight that is not a number would poison its whole block without a trace: names the first one.
fn refuse_non_finite<T: blockwise::Stored>(
    place: &str,
    source: &[T],
    shape: Shape,
    absmax: &[f32],
) -> Result<()> {
    let Some(block) = absmax.iter().position(|a| !a.is_finite()) else {
        return Ok(());
    };
    let start = block * BLOCK;
    let elements = &source[start..source.len().min(start + BLOCK)];
    let mut wide = vec![0f32; elements.len()];
    T::widen(elements, &mut wide);
    let within = wide.iter().position(|x| !x.is_finite()).unwrap_or(0);
    let (_, columns) = shape.rows_and_columns();
    let (row, column) = ((start + within) / columns, (start + within) % columns);
    Err(Error::input(
        format!("{place}[{row}, {column}]"),
        wide[within],
        "a finite weight",
        "the checkpoint is damaged: download or convert it again",
    ))
}

#[cfg(test)]
mod tests;
