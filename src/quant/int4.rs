//! Whole numbers of 4 bits with a scale for each row, as THUDM's `chatglm-6b-int4` holds its linears:
//! `w[i, k] = q[i, k] * scale[i]`, `scale[i] = max_k |w[i, k]| / 7`, q in two's complement, the even column in the HIGH nibble.
//!
//! That is a block-wise code with the table [`INT4`](super::INT4), whose blocks of 64 repeat the scale of their row: so every
//! product, on every device, is the one that NF4 has. It costs 4.5 bits a weight where 4 would do.

use rayon::prelude::*;

use super::blockwise::Stored;
use super::{Absmax, BLOCK, Order, QuantTensor, QuantType, not_finite};
use crate::error::{Error, Result};
use crate::tensor::{DType, Shape, Tensor};

/// The largest magnitude of a code that quantising makes. -8 is read like any other.
const LARGEST: f32 = 7.0;

impl QuantTensor {
    /// The weight `shape` of the codes of its rows, U8, two a byte, and the scales of its rows, F32. Codes are used where they lie;
    /// `place` is what an error names.
    ///
    /// # Errors
    /// Rows are no multiple of [`BLOCK`], or codes or scales are too few or too many.
    pub fn from_int4_rows(
        place: &str,
        codes: Tensor,
        scales: &Tensor,
        shape: Shape,
        source_dtype: DType,
    ) -> Result<Self> {
        let (rows, blocks) = checked_rows(place, shape)?;
        if codes.elements() != shape.elements() / 2 || scales.elements() != rows {
            let found = format!(
                "{} bytes of codes, {} scales",
                codes.elements(),
                scales.elements()
            );
            let expected = format!("{} bytes of codes, {rows} scales", shape.elements() / 2);
            return Err(Error::input(
                place,
                found,
                expected,
                "download the checkpoint again",
            ));
        }
        let mut absmax = Tensor::zeros(DType::F32, [rows * blocks]);
        if !absmax.is_planned() {
            let of_blocks = absmax.as_mut_slice::<f32>().chunks_exact_mut(blocks);
            for (of_blocks, scale) in of_blocks.zip(scales.as_slice::<f32>()) {
                of_blocks.fill(*scale);
            }
        }
        Ok(Self {
            quant_type: QuantType::Int4,
            codes,
            absmax: Absmax::Flat(absmax),
            order: Order::Rows,
            shape,
            source_dtype,
        })
    }

    /// Codes to the nearest, halves to even; the scale of a row is F32, and 0 for a row of zeros.
    ///
    /// # Errors
    /// An element is not finite, or rows are no multiple of [`BLOCK`].
    pub(super) fn quantize_rows<T: Stored>(place: &str, source: &Tensor) -> Result<Self> {
        let shape = source.shape();
        let (rows, blocks) = checked_rows(place, shape)?;
        let mut codes = Tensor::zeros(DType::U8, [shape.elements() / 2]);
        let mut scales = Tensor::zeros(DType::F32, [rows]);
        if source.is_planned() || codes.is_planned() {
            return Self::from_int4_rows(place, codes, &scales, shape, source.dtype());
        }
        let (width, elements) = (blocks * BLOCK, source.as_slice::<T>());
        elements
            .par_chunks(width)
            .zip(codes.as_mut_slice::<u8>().par_chunks_mut(width / 2))
            .zip(scales.as_mut_slice::<f32>())
            .for_each_init(
                || vec![0f32; width],
                |wide, ((row, codes), scale)| {
                    T::widen(row, wide);
                    *scale = quantize_row(wide, codes);
                },
            );
        match scales.as_slice::<f32>().iter().position(|s| !s.is_finite()) {
            Some(row) => Err(not_finite(place, row, &elements[row * width..][..width])),
            None => Self::from_int4_rows(place, codes, &scales, shape, source.dtype()),
        }
    }
}

/// The number of rows, and of blocks in each.
fn checked_rows(place: &str, shape: Shape) -> Result<(usize, usize)> {
    let (rows, columns) = shape.rows_and_columns();
    if columns > 0 && columns.is_multiple_of(BLOCK) {
        return Ok((rows, columns / BLOCK));
    }
    let expected = format!("a multiple of {BLOCK} inputs for 4 bits with a scale for each row");
    let found = format!("a weight {shape}");
    Err(Error::input(
        place,
        found,
        expected,
        "use the fp16 or the int8 checkpoint",
    ))
}

/// Codes of one row, two a byte; its scale, which is not finite when one of its elements is not.
fn quantize_row(row: &[f32], codes: &mut [u8]) -> f32 {
    // NaN has the largest magnitude of all in this order, so that it is not passed over.
    let largest = row.iter().map(|x| x.to_bits() & !(1 << 31)).max();
    let scale = f32::from_bits(largest.unwrap_or(0)) / LARGEST;
    if scale == 0.0 || !scale.is_finite() {
        codes.fill(0);
        return scale;
    }
    // Beyond 7 only where the scale is subnormal, and so has few digits.
    let code = |x: f32| (x / scale).round_ties_even().clamp(-LARGEST, LARGEST) as i8 as u8 & 15;
    for (byte, pair) in codes.iter_mut().zip(row.chunks_exact(2)) {
        *byte = code(pair[0]) << 4 | code(pair[1]);
    }
    scale
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn random(rows: usize) -> Tensor {
        let stream = Stream::new(7, 0);
        let values: Vec<f32> = (0..(rows * 128) as u64).map(|i| stream.normal(i)).collect();
        Tensor::from_slice(&values, [rows, 128])
    }

    /// The definition, element by element.
    #[test]
    fn codes_are_the_nearest_and_the_largest_is_7() {
        let source = random(5);
        let weight = QuantTensor::quantize(&source, QuantType::Int4, true).unwrap();
        let (scales, restored) = (weight.block_absmax(), weight.dequantize());
        assert_eq!((scales.len(), weight.bytes()), (10, 5 * 64 + 10 * 4));
        for (i, row) in source.as_slice::<f32>().chunks(128).enumerate() {
            let scale = row.iter().fold(0f32, |a, x| a.max(x.abs())) / 7.0;
            assert_eq!(scales[2 * i..2 * i + 2], [scale; 2]);
            for (k, x) in row.iter().enumerate() {
                let byte = weight.codes.bytes()[(i * 128 + k) / 2];
                // As a shift of a signed byte: the sign comes along.
                let code = if k % 2 == 0 {
                    byte as i8 >> 4
                } else {
                    (byte << 4) as i8 >> 4
                };
                assert_eq!(f32::from(code), (x / scale).round_ties_even());
                assert_eq!(restored.as_slice::<f32>()[i * 128 + k], f32::from(code) * scale);
            }
        }
    }

    #[test]
    fn every_nibble_is_a_number_in_twos_complement() {
        let bytes: Vec<u8> = (0..=255).collect();
        let scales = Tensor::from_slice(&[2f32, 0.5, -1.0, 0.0], [4]);
        let codes = Tensor::from_slice(&bytes, [256]);
        let shape = Shape::new(&[4, 128]);
        let weight = QuantTensor::from_int4_rows("w", codes, &scales, shape, DType::F16).unwrap();
        let decoded = weight.dequantize();
        for (byte, pair) in bytes.iter().zip(decoded.as_slice::<f32>().chunks(2)) {
            let scale = scales.as_slice::<f32>()[usize::from(byte / 64)];
            let [high, low] = [*byte as i8 >> 4, (byte << 4) as i8 >> 4];
            assert_eq!(pair, [f32::from(high) * scale, f32::from(low) * scale]);
        }
    }

    #[test]
    fn what_is_no_number_is_named_and_rows_of_other_lengths_are_refused() {
        for bad in [f32::NAN, f32::NEG_INFINITY] {
            let mut source = random(4);
            source.as_mut_slice::<f32>()[2 * 128 + 70] = bad;
            let error = QuantTensor::quantize_named("file: w", &source, QuantType::Int4, false).unwrap_err();
            assert!(error.to_string().contains("file: w[2, 70]"), "{error}");
        }
        let ragged = Tensor::zeros(DType::F32, [2, 96]);
        let error = QuantTensor::quantize(&ragged, QuantType::Int4, false).unwrap_err();
        assert!(error.to_string().contains("multiple of 64"), "{error}");
        let (codes, scales) = (Tensor::zeros(DType::U8, [64]), Tensor::zeros(DType::F32, [2]));
        let shape = Shape::new(&[2, 128]);
        assert!(QuantTensor::from_int4_rows("w", codes, &scales, shape, DType::F16).is_err());
    }
}
