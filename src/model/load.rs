//! Weights from a checkpoint into a model, in place where possible.

use std::collections::BTreeMap;

use super::Model;
use super::config::ModelConfig;
use super::glm::Block;
use crate::checkpoint::{Checkpoint, refuse_non_finite};
use crate::error::{Error, Result};
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Param, Weight};
use crate::quant::{QuantTensor, QuantType};
use crate::rng::Stream;
use crate::tensor::{DType, Shape, Tensor};

/// In which form the four linears of each block are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// As the checkpoint stores them: dense tensors mapped in place, 4-bit tensors as they are.
    AsStored,
    /// In 4 bits; a dense checkpoint is quantised tensor by tensor in memory.
    Quantized {
        /// The code.
        quant_type: QuantType,
        /// Are block scales quantised too?
        double_quant: bool,
    },
}

/// How to load.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// F32, or F64 in gradient checks.
    pub compute: DType,
    /// The form of the linears.
    pub weights: Weights,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            compute: DType::F32,
            weights: Weights::AsStored,
        }
    }
}

/// Where the tensors of a model come from.
trait Source {
    fn tensor(&self, name: &str) -> Result<Tensor>;
    fn place(&self, name: &str) -> String;
}

impl Source for Checkpoint {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        Checkpoint::tensor(self, name)
    }

    fn place(&self, name: &str) -> String {
        Checkpoint::place(self, name)
    }
}

/// Normal weights, norms of 1 and 0, biases of 0: how models start before their first training.
struct Initializer {
    seed: u64,
    names: BTreeMap<String, (usize, Shape)>,
}

impl Source for Initializer {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some(&(number, shape)) = self.names.get(name) else {
            return Err(Error::input(
                name,
                "no such tensor",
                "a tensor of this configuration",
                "this is a bug",
            ));
        };
        if name.ends_with("layernorm.weight") {
            return Ok(Tensor::from_slice(&vec![1f32; shape.elements()], shape));
        }
        if name.ends_with(".bias") {
            return Ok(Tensor::zeros(DType::F32, shape));
        }
        let stream = Stream::new(self.seed, number as u64);
        let values: Vec<f32> = (0..shape.elements() as u64)
            .map(|i| 0.02 * stream.normal(i))
            .collect();
        Ok(Tensor::from_slice(&values, shape))
    }

    fn place(&self, name: &str) -> String {
        name.to_string()
    }
}

struct Loader<'a, S> {
    source: &'a S,
    options: &'a LoadOptions,
}

impl<S: Source> Loader<'_, S> {
    /// A small tensor (norm, bias) in the compute type; none of its numbers may be NaN or infinite.
    fn small(&self, name: &str) -> Result<Param> {
        let tensor = self.source.tensor(name)?;
        refuse_non_finite(&self.source.place(name), &tensor)?;
        Ok(Param::frozen(tensor.to_dtype(self.options.compute)))
    }

    fn norm(&self, name: &str, eps: f64) -> Result<LayerNorm> {
        let (weight, bias) = (
            self.small(&format!("{name}.weight"))?,
            self.small(&format!("{name}.bias"))?,
        );
        Ok(LayerNorm { weight, bias, eps })
    }

    fn linear(&self, name: &str) -> Result<Linear> {
        let weight_name = format!("{name}.weight");
        let stored = self.source.tensor(&weight_name)?;
        let weight = match (self.options.weights, stored.dtype()) {
            (_, DType::U8) => Weight::Quant(Box::new(QuantTensor::from_bnb(&weight_name, |n| {
                self.source.tensor(n)
            })?)),
            (Weights::AsStored, _) => Weight::Dense(self.large(&weight_name)?),
            (
                Weights::Quantized {
                    quant_type,
                    double_quant,
                },
                _,
            ) => {
                let place = self.source.place(&weight_name);
                Weight::Quant(Box::new(QuantTensor::quantize_named(
                    &place,
                    &stored,
                    quant_type,
                    double_quant,
                )?))
            }
        };
        Ok(Linear {
            weight,
            bias: Some(self.small(&format!("{name}.bias"))?),
            lora: None,
        })
    }

    /// A tensor of any size, in place; one wider than the compute type cannot be decoded tile by tile and is rounded here.
    fn large(&self, name: &str) -> Result<Param> {
        let tensor = self.source.tensor(name)?;
        let narrow = tensor.dtype().size() <= self.options.compute.size();
        Ok(Param::frozen(if narrow {
            tensor
        } else {
            tensor.to_dtype(self.options.compute)
        }))
    }

    fn model(&self, config: &ModelConfig, separate_head: bool) -> Result<Model> {
        Ok(Model {
            embedding: self.large("transformer.word_embeddings.weight")?,
            blocks: (0..config.num_layers)
                .map(|i| self.block(i, config))
                .collect::<Result<_>>()?,
            final_layernorm: self.norm("transformer.final_layernorm", config.layernorm_epsilon)?,
            lm_head: if separate_head {
                Some(self.large("lm_head.weight")?)
            } else {
                None
            },
            dtype: self.options.compute,
            config: config.clone(),
        })
    }

    fn block(&self, i: usize, config: &ModelConfig) -> Result<Block> {
        let name = format!("transformer.layers.{i}");
        let norm = |part: &str| self.norm(&format!("{name}.{part}"), config.layernorm_epsilon);
        let linear = |part: &str| self.linear(&format!("{name}.{part}"));
        Ok(Block {
            input_layernorm: norm("input_layernorm")?,
            attention: Attention {
                query_key_value: linear("attention.query_key_value")?,
                dense: linear("attention.dense")?,
                heads: config.num_attention_heads,
            },
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp {
                dense_h_to_4h: linear("mlp.dense_h_to_4h")?,
                dense_4h_to_h: linear("mlp.dense_4h_to_h")?,
            },
        })
    }
}

impl Model {
    /// Loads a checkpoint; everything is frozen. Dense weights stay in the mapped file.
    ///
    /// # Errors
    /// A tensor is missing, extra, mis-shaped or truncated, each named; a weight to be quantised is not finite.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Model> {
        checkpoint.validate()?;
        let separate_head = checkpoint.has_separate_head()?;
        Loader {
            source: checkpoint,
            options,
        }
        .model(checkpoint.config(), separate_head)
    }

    /// A model that has learnt nothing: weights and embedding normal with deviation 0.02, biases 0, norms 1; head tied.
    ///
    /// # Errors
    /// The configuration contradicts itself.
    pub fn initialize(config: &ModelConfig, seed: u64, options: &LoadOptions) -> Result<Model> {
        let names = config
            .tensors()
            .into_iter()
            .enumerate()
            .map(|(i, (name, shape))| (name, (i, shape)))
            .collect();
        Loader {
            source: &Initializer { seed, names },
            options,
        }
        .model(config, false)
    }
}
