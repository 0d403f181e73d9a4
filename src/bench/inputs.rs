//! What is measured with: random numbers, a batch, the sizes of a model.

use std::path::Path;

use crate::data::batch::{Batch, IGNORE, Span};
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::rng::Stream;
use crate::tensor::{Compute, DType, Device, Shape, Tensor};

/// The sizes called `name`: `chatglm-6b`, `tiny`, or those of a `config.json` (or of the folder it lies in).
///
/// # Errors
/// There is no such file, or it is no ChatGLM-6B's.
pub fn model_config(name: &str) -> Result<ModelConfig> {
    match name {
        "chatglm-6b" => Ok(ModelConfig::chatglm_6b()),
        "tiny" => Ok(ModelConfig {
            vocab_size: 1024,
            hidden_size: 128,
            inner_hidden_size: 512,
            num_layers: 2,
            num_attention_heads: 2,
            mask_token_id: 1000,
            gmask_token_id: 1001,
            bos_token_id: 1004,
            eos_token_id: 1005,
            ..ModelConfig::chatglm_6b()
        }),
        _ => {
            let path = Path::new(name);
            if path.is_dir() {
                ModelConfig::read(path)
            } else if path.file_name().is_some_and(|file| file == "config.json") {
                ModelConfig::read(path.parent().unwrap_or(Path::new("")))
            } else {
                let expected = "chatglm-6b, tiny, or the path of a config.json";
                Err(Error::input("--config", name, expected, "check the path"))
            }
        }
    }
}

/// Normal numbers for operands of any size: some, repeated. Drawing each would take longer than measuring with them.
pub struct Numbers {
    normal: Vec<f32>,
}

impl Numbers {
    /// `len` different ones.
    pub fn new(len: usize) -> Self {
        let stream = Stream::new(0, 0x0062_656e_6368);
        Self {
            normal: (0..len as u64).map(|i| stream.normal(i)).collect(),
        }
    }

    /// A tensor of `dtype` with deviation `scale`.
    ///
    /// # Errors
    /// The device has no room.
    pub fn tensor(
        &self,
        device: Device,
        dtype: DType,
        shape: impl Into<Shape>,
        scale: f32,
    ) -> Result<Tensor> {
        let mut tensor = Tensor::zeros(dtype, shape);
        // Not a power of two, so that rows of a matrix differ.
        let len = self.normal.len() - 3;
        let scaled: Vec<f32> = self.normal[..len].iter().map(|x| scale * x).collect();
        let block = Tensor::from_slice(&scaled, [len]).to_dtype(dtype);
        let bytes = tensor.bytes_mut();
        for to in bytes.chunks_mut(block.byte_len()) {
            to.copy_from_slice(&block.bytes()[..to.len()]);
        }
        tensor.into_device(device)
    }

    /// [`Numbers::tensor`] of activations: the compute type, deviation 1.
    ///
    /// # Errors
    /// The device has no room.
    pub fn activations(&self, compute: Compute, shape: impl Into<Shape>) -> Result<Tensor> {
        self.tensor(compute.device, compute.dtype, shape, 1.0)
    }

    /// [`Numbers::tensor`] of parameters: the type of sums, deviation 0.1.
    ///
    /// # Errors
    /// The device has no room.
    pub fn parameters(&self, compute: Compute, shape: impl Into<Shape>) -> Result<Tensor> {
        self.tensor(compute.device, compute.dtype.accumulator(), shape, 0.1)
    }
}

/// Random indices below `bound`.
///
/// # Errors
/// The device has no room.
pub fn indices(device: Device, shape: impl Into<Shape>, bound: usize) -> Result<Tensor> {
    let shape = shape.into();
    let stream = Stream::new(1, 0x0062_656e_6368);
    let values: Vec<i32> = (0..shape.elements() as u64)
        .map(|i| stream.below(i, bound) as i32)
        .collect();
    Tensor::from_slice(&values, shape).into_device(device)
}

/// `size` random sequences of `len` tokens, a quarter of each context, the rest supervised. `number` tells batches apart.
pub fn batch(config: &ModelConfig, size: usize, len: usize, number: u64) -> Batch {
    let context = len / 4;
    let stream = Stream::new(2, number);
    let ids: Vec<i32> = (0..(size * len) as u64)
        .map(|i| stream.below(i, config.vocab_size) as i32)
        .collect();
    let mut labels = ids.clone();
    for row in labels.chunks_mut(len) {
        row[..context].fill(IGNORE);
    }
    Batch {
        size,
        len,
        ids,
        labels,
        positions: (0..size)
            .flat_map(|_| (0..len).flat_map(|t| position(t, context)))
            .collect(),
        spans: vec![Span { start: 0, context }; size],
    }
}

/// Position and block position of token `t`, with the mask token last in the context.
pub fn position(t: usize, context: usize) -> [i32; 2] {
    let last = context.saturating_sub(1);
    [t.min(last) as i32, (t + 1).saturating_sub(context) as i32]
}

/// Pairs of query and key that see each other, `len` tokens of which `context` see each other both ways.
pub fn visible_pairs(len: usize, context: usize) -> f64 {
    let rest = (len - context) as f64;
    len as f64 * context as f64 + rest * (rest + 1.0) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_those_of_the_mask() {
        for (len, context) in [(1, 0), (7, 0), (7, 3), (7, 7), (32, 8)] {
            let pairs = (0..len)
                .flat_map(|i| (0..len).map(move |j| (i, j)))
                .filter(|&(i, j)| j < context || j <= i)
                .count();
            assert_eq!(visible_pairs(len, context), pairs as f64, "{len} {context}");
        }
    }

    #[test]
    fn a_batch_fits_its_model() {
        let config = model_config("tiny").unwrap();
        let batch = batch(&config, 2, 16, 0);
        assert_eq!(batch.supervised(), 2 * 12);
        assert_eq!(batch.positions[..8], [0, 0, 1, 0, 2, 0, 3, 0]);
        assert_eq!(batch.positions[8..12], [3, 1, 3, 2]);
        assert!(batch.ids.iter().all(|&id| (0..1024).contains(&id)));
        assert!(model_config("no-such-model").is_err());
    }
}
