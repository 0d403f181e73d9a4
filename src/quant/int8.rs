//! 8-bit weights with one scale for each row, as THUDM's `chatglm-6b-int8` holds its linears.
//!
//! `w[i, k] = q[i, k] * scale[i]`, `scale[i] = max_k |w[i, k]| / 127`, `q = round(w / scale)` with halves to even. THUDM keeps
//! the scales in float16, which is a rounding of its own; here they are float32, which holds a float16 scale exactly.

use half::{bf16, f16};
use rayon::prelude::*;

use super::blockwise::Stored;
use super::not_finite;
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};

/// The largest magnitude of a code. -128 is never made, but read like any other.
const LARGEST: f32 = 127.0;

/// A weight `[out, in]` in 8 bits. Its tensors may lie in a mapped file or on a device.
#[derive(Debug, Clone)]
pub struct RowInt8 {
    /// U8 `[out, in]`: signed codes in two's complement.
    pub codes: Tensor,
    /// F32 `[out]`.
    pub scales: Tensor,
    /// What the weight was quantised from.
    pub source_dtype: DType,
}

impl RowInt8 {
    /// Quantises an F32, F16 or BF16 matrix; `place` is what an error names. The result does not depend on the number of
    /// threads. A row of zeros has the scale 0.
    ///
    /// # Errors
    /// An element is NaN or infinite (its indices are named), or the matrix is of another type.
    pub fn quantize(place: &str, source: &Tensor) -> Result<Self> {
        match source.dtype() {
            DType::F32 => Self::quantize_elements::<f32>(place, source),
            DType::F16 => Self::quantize_elements::<f16>(place, source),
            DType::BF16 => Self::quantize_elements::<bf16>(place, source),
            other => Err(Error::input(
                place,
                other,
                "float32, float16 or bfloat16 to quantise",
                "give the checkpoint with the original weights",
            )),
        }
    }

    fn quantize_elements<T: Stored>(place: &str, source: &Tensor) -> Result<Self> {
        let (rows, columns) = source.shape().rows_and_columns();
        let mut weight = Self {
            codes: Tensor::zeros(DType::U8, [rows, columns]),
            scales: Tensor::zeros(DType::F32, [rows]),
            source_dtype: source.dtype(),
        };
        if source.is_planned() || weight.codes.is_planned() {
            return Ok(weight);
        }
        let elements = source.as_slice::<T>();
        let width = columns.max(1);
        elements
            .par_chunks(width)
            .zip(weight.codes.bytes_mut().par_chunks_mut(width))
            .zip(weight.scales.as_mut_slice::<f32>())
            .for_each_init(
                || vec![0f32; columns],
                |wide, ((row, codes), scale)| {
                    T::widen(row, wide);
                    *scale = quantize_row(wide, codes);
                },
            );
        let bad = weight
            .scales
            .as_slice::<f32>()
            .iter()
            .position(|s| !s.is_finite());
        let Some(row) = bad else { return Ok(weight) };
        Err(not_finite(place, row, &elements[row * columns..][..columns]))
    }

    /// `[out, in]`.
    pub fn shape(&self) -> Shape {
        self.codes.shape()
    }

    /// `code * scale`, F32 of the weight's shape.
    pub fn dequantize(&self) -> Tensor {
        let mut out = Tensor::zeros(DType::F32, self.shape());
        if out.is_planned() {
            return out;
        }
        let width = self.shape().rows_and_columns().1.max(1);
        let rows = self.codes.bytes().chunks_exact(width);
        let scales = self.scales.as_slice::<f32>();
        for ((out, codes), scale) in out
            .as_mut_slice::<f32>()
            .chunks_exact_mut(width)
            .zip(rows)
            .zip(scales)
        {
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = f32::from(code as i8) * scale;
            }
        }
        out
    }

    /// Bytes of codes and scales.
    pub fn bytes(&self) -> usize {
        self.codes.byte_len() + self.scales.byte_len()
    }
}

/// Codes of one row; its scale, which is not finite when one of its elements is not.
fn quantize_row(row: &[f32], codes: &mut [u8]) -> f32 {
    // NaN has the largest magnitude of all in this order, so that it is not passed over.
    let largest = row.iter().map(|x| x.to_bits() & !(1 << 31)).max();
    let scale = f32::from_bits(largest.unwrap_or(0)) / LARGEST;
    if scale == 0.0 || !scale.is_finite() {
        codes.fill(0);
        return scale;
    }
    for (code, x) in codes.iter_mut().zip(row) {
        // Beyond 127 only where the scale is subnormal, and so has few digits.
        let rounded = (x / scale).round_ties_even().clamp(-LARGEST, LARGEST);
        *code = (rounded as i8) as u8;
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn random(rows: usize, columns: usize) -> Tensor {
        let stream = Stream::new(7, 0);
        let values: Vec<f32> = (0..(rows * columns) as u64).map(|i| stream.normal(i)).collect();
        Tensor::from_slice(&values, [rows, columns])
    }

    /// The definition, element by element.
    #[test]
    fn codes_are_the_nearest_to_even_and_the_largest_is_127() {
        let source = random(5, 33);
        let weight = RowInt8::quantize("w", &source).unwrap();
        for (i, row) in source.as_slice::<f32>().chunks(33).enumerate() {
            let largest = row.iter().fold(0f32, |a, x| a.max(x.abs()));
            let scale = largest / 127.0;
            assert_eq!(weight.scales.as_slice::<f32>()[i], scale);
            let codes = &weight.codes.bytes()[i * 33..][..33];
            for (x, &code) in row.iter().zip(codes) {
                assert_eq!(f32::from(code as i8), (x / scale).round_ties_even());
            }
            assert!(codes.iter().any(|&code| (code as i8).unsigned_abs() == 127));
        }
        let restored = weight.dequantize();
        for (i, (x, y)) in (source.as_slice::<f32>().iter())
            .zip(restored.as_slice::<f32>())
            .enumerate()
        {
            let scale = weight.scales.as_slice::<f32>()[i / 33];
            assert!((x - y).abs() <= 0.5001 * scale, "{x} became {y}");
        }
    }

    #[test]
    fn halves_go_to_even_and_a_row_of_zeros_stays() {
        let source = Tensor::from_slice(&[127f32, 0.5, 1.5, -2.5, 0.0, 0.0, -0.0, 0.0], [2, 4]);
        let weight = RowInt8::quantize("w", &source).unwrap();
        assert_eq!(weight.codes.bytes(), [127, 0, 2, -2i8 as u8, 0, 0, 0, 0]);
        assert_eq!(weight.scales.as_slice::<f32>(), [1.0, 0.0]);
        assert_eq!(weight.bytes(), 8 + 8);
    }

    #[test]
    fn every_stored_type_gives_the_codes_of_its_values() {
        let source = random(3, 40);
        for dtype in [DType::F16, DType::BF16] {
            let stored = source.to_dtype(dtype);
            let direct = RowInt8::quantize("w", &stored).unwrap();
            let wide = RowInt8::quantize("w", &stored.to_dtype(DType::F32)).unwrap();
            assert_eq!(direct.codes.bytes(), wide.codes.bytes());
            assert_eq!(direct.scales.bytes(), wide.scales.bytes());
            assert_eq!(direct.source_dtype, dtype);
        }
    }

    #[test]
    fn the_smallest_numbers_do_not_overflow_a_code() {
        let tiny = f32::from_bits(190);
        let source = Tensor::from_slice(&[tiny, -tiny, f32::from_bits(1), 0.0], [1, 4]);
        let weight = RowInt8::quantize("w", &source).unwrap();
        assert_eq!(weight.codes.bytes(), [127, -127i8 as u8, 1, 0]);
    }

    #[test]
    fn a_weight_that_is_no_number_is_named() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut source = random(4, 8);
            source.as_mut_slice::<f32>()[2 * 8 + 5] = bad;
            let error = RowInt8::quantize("lm_head.weight", &source)
                .unwrap_err()
                .to_string();
            assert!(error.contains("lm_head.weight[2, 5]"), "{error}");
        }
    }
}
