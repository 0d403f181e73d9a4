//! Weights that were never quantised: random codes and scales, to measure with.

use super::{Absmax, BLOCK, NESTED_BLOCK, NF4, Order, QuantTensor, QuantType, code};
use crate::rng::Stream;
use crate::tensor::{DType, Shape, Tensor};

impl QuantTensor {
    /// An NF4 weight `[out, in]` with double quantisation, of random codes and scales; its elements have a variance of
    /// about `1 / in`, so that a product keeps that of its input. Made in host memory, as fast as random bytes are.
    pub fn random(shape: impl Into<Shape>, stream: Stream) -> Self {
        let shape = shape.into();
        let (_, columns) = shape.rows_and_columns();
        let blocks = shape.elements().div_ceil(BLOCK);
        let part = |n: u64| Stream::new(stream.seed(), stream.stream() * 2 + n);
        let random = |n: u64, len: usize| {
            let mut bytes = Tensor::zeros(DType::U8, [len]);
            part(n).fill(bytes.bytes_mut());
            bytes
        };
        // Every code is as likely as any other.
        let square = NF4.iter().map(|x| x * x).sum::<f32>() / 16.0;
        let offset = (square * columns as f32).sqrt().recip();
        let nested = vec![0.2 * offset; blocks.div_ceil(NESTED_BLOCK)];
        Self {
            quant_type: QuantType::Nf4,
            codes: random(0, shape.elements().div_ceil(2)),
            absmax: Absmax::Nested {
                codes: random(1, blocks),
                nested_absmax: Tensor::from_slice(&nested, [nested.len()]),
                offset,
                code: Tensor::from_slice(&code::DYNAMIC[..], [256]),
            },
            order: Order::Rows,
            shape,
            source_dtype: DType::F16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_weight_keeps_the_variance_of_its_input() {
        let weight = QuantTensor::random([64, 512], Stream::new(1, 2));
        let values = weight.dequantize().to_f64_vec();
        let variance = values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
        assert!((variance * 512.0 - 1.0).abs() < 0.1, "{variance}");
        let other = QuantTensor::random([64, 512], Stream::new(1, 3));
        assert_ne!(weight.codes.bytes(), other.codes.bytes());
    }
}
