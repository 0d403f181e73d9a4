//! Rows of whole numbers exactly as THUDM's own code makes them (`QuantizedLinear` in the model repository's quantization.py):
//! in float16, each operation rounded to float16.
//!
//! `scale[i] = max_k |w[i, k]| / n`, `q[i, k] = round(w[i, k] / scale[i])`, halves to even, with n = 127 of 8 bits and 7 of 4. The
//! even column of 4 bits lies in the high half of a byte, the odd one in the low half, both in two's complement.
//!
//! Beside [`RowInt8`](super::RowInt8), whose scales are float32, scales are coarser by up to `2⁻¹¹`. The official code differs in
//! one place: where a scale is below `2⁻¹⁴`, and so has few digits, a quotient may lie beyond n, which it wraps around to the other
//! sign; here it stays n.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::ggml::{Arithmetic, nearest};
use super::not_finite;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Bits of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThudmBits {
    /// `chatglm-6b-int4`.
    Four,
    /// `chatglm-6b-int8`.
    Eight,
}

impl ThudmBits {
    /// `quantization_bit`.
    pub const fn number(self) -> usize {
        match self {
            ThudmBits::Four => 4,
            ThudmBits::Eight => 8,
        }
    }

    /// The largest code.
    const fn largest(self) -> f32 {
        match self {
            ThudmBits::Four => 7.0,
            ThudmBits::Eight => 127.0,
        }
    }

    /// Quantises rows of a weight, F16 `[rows, in]`: codes I8 `[rows, in * bits / 8]` and scales F16 `[rows]`. `first_row` is the number
    /// of the first one, for errors.
    ///
    /// # Errors
    /// An element is NaN or infinite.
    ///
    /// # Panics
    /// Another type; of 4 bits, an odd number of columns.
    pub fn quantize(self, place: &str, weight: &Tensor, first_row: usize) -> Result<(Tensor, Tensor)> {
        let (rows, columns) = weight.shape().rows_and_columns();
        let width = columns * self.number() / 8;
        assert!(columns * self.number() == width * 8);
        let mut codes = Tensor::zeros(DType::I8, [rows, width]);
        let mut scales = Tensor::zeros(DType::F16, [rows]);
        let elements = weight.as_slice::<f16>();
        elements
            .par_chunks(columns.max(1))
            .zip(codes.bytes_mut().par_chunks_mut(width.max(1)))
            .zip(scales.as_mut_slice::<f16>())
            .for_each_init(
                || vec![0f32; columns],
                |wide, ((row, codes), scale)| {
                    row.convert_to_f32_slice(wide);
                    *scale = self.quantize_row(wide, codes);
                },
            );
        match scales
            .as_slice::<f16>()
            .iter()
            .position(|scale| !scale.is_finite())
        {
            None => Ok((codes, scales)),
            Some(row) => {
                let elements = &elements[row * columns..][..columns];
                Err(not_finite(place, first_row + row, elements))
            }
        }
    }

    /// Codes of one row; its scale, which is not finite when one of its elements is not.
    fn quantize_row(self, row: &[f32], codes: &mut [u8]) -> f16 {
        let n = self.largest();
        // NaN has the largest magnitude of all in this order, so that it is not passed over.
        let largest = row.iter().map(|x| x.to_bits() & !(1 << 31)).max();
        let scale = f16::rounded(f32::from_bits(largest.unwrap_or(0)) / n);
        // Of a row of zeros, and of numbers so small that nothing is left of their scale, codes stand for zero whatever they are.
        let code = |x: f32| match scale == 0.0 {
            true => 0,
            false => nearest(f16::rounded(x / scale), -n, n) as i8 as u8,
        };
        match self {
            ThudmBits::Eight => {
                for (out, &x) in codes.iter_mut().zip(row) {
                    *out = code(x);
                }
            }
            ThudmBits::Four => {
                for (out, pair) in codes.iter_mut().zip(row.as_chunks::<2>().0) {
                    *out = code(pair[0]) << 4 | code(pair[1]) & 15;
                }
            }
        }
        f16::from_f32(scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn random(rows: usize, columns: usize) -> Tensor {
        let stream = Stream::new(5, 0);
        let values: Vec<f32> = (0..rows * columns)
            .map(|i| stream.normal(i as u64) * 10f32.powi(-((i / columns % 4) as i32)))
            .collect();
        Tensor::from_slice(&values, [rows, columns]).to_dtype(DType::F16)
    }

    /// The code of an element, read from the bytes.
    fn code(bits: ThudmBits, codes: &Tensor, i: usize) -> i32 {
        match bits {
            ThudmBits::Eight => i32::from(codes.as_slice::<i8>()[i]),
            ThudmBits::Four => {
                let byte = codes.bytes()[i / 2];
                let nibble = if i.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
                i32::from(nibble as i8) - if nibble > 7 { 16 } else { 0 }
            }
        }
    }

    /// The formula in f64, each operation rounded to float16.
    #[test]
    fn every_code_is_the_formula() {
        let weight = random(12, 70);
        let values = weight.to_f64_vec();
        let r = |x: f64| f16::from_f64(x).to_f64();
        for (bits, n) in [(ThudmBits::Four, 7.0), (ThudmBits::Eight, 127.0)] {
            let (codes, scales) = bits.quantize("w", &weight, 0).unwrap();
            assert_eq!(codes.shape().extents(), [12, 70 * bits.number() / 8]);
            for (i, x) in values.iter().enumerate() {
                let row = &values[i / 70 * 70..][..70];
                let scale = r(row.iter().fold(0f64, |a, x| a.max(x.abs())) / n);
                assert_eq!(scales.to_f64_vec()[i / 70], scale);
                let want = r(x / scale).round_ties_even();
                assert_eq!(f64::from(code(bits, &codes, i)), want, "{bits:?} {i}");
                assert!(want.abs() <= n);
            }
        }
    }

    /// Computed by quantization.py's formula in torch 2 (float16 on the CPU), with the packing of its kernel.
    #[test]
    fn halves_go_to_even_and_pairs_into_one_byte() {
        let weight = Tensor::from_slice(&[7f32, 0.5, 1.5, -2.5, -7.0, 3.0, -1.0, 0.0], [2, 4]);
        let weight = weight.to_dtype(DType::F16);
        let (codes, scales) = ThudmBits::Four.quantize("w", &weight, 0).unwrap();
        assert_eq!(codes.bytes(), [0x70, 0x2e, 0x93, 0xf0]);
        assert_eq!(scales.to_f64_vec(), [1.0, 1.0]);
        let (codes, _) = ThudmBits::Eight.quantize("w", &weight, 0).unwrap();
        assert_eq!(codes.as_slice::<i8>(), [127, 9, 27, -45, -127, 54, -18, 0]);
    }

    #[test]
    fn rows_without_a_scale_are_zero_and_small_ones_do_not_wrap() {
        let unit = 2f32.powi(-24);
        let rows = [
            0.0,
            -0.0,
            0.0,
            0.0,
            10.0 * unit,
            -10.0 * unit,
            unit,
            0.0,
            3.0 * unit,
            unit,
            0.0,
            0.0,
        ];
        let weight = Tensor::from_slice(&rows, [3, 4]).to_dtype(DType::F16);
        let (codes, scales) = ThudmBits::Four.quantize("w", &weight, 0).unwrap();
        assert_eq!(codes.bytes(), [0, 0, 0x79, 0x10, 0, 0]);
        assert_eq!(scales.to_f64_vec(), [0.0, f64::from(unit), 0.0]);
    }

    #[test]
    fn a_weight_that_is_no_number_is_named() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut weight = random(4, 8);
            weight.as_mut_slice::<f16>()[2 * 8 + 5] = f16::from_f32(bad);
            let error = ThudmBits::Eight.quantize("w", &weight, 100).unwrap_err();
            assert!(error.to_string().contains("w[102, 5]"), "{error}");
        }
    }
}
