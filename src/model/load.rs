//! Weights from a checkpoint into a model, in place where possible.

use std::collections::BTreeMap;

use super::Model;
use super::config::ModelConfig;
use super::glm::Block;
use crate::checkpoint::{Checkpoint, refuse_non_finite};
use crate::error::{Error, Result};
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Param, Weight};
use crate::ops;
use crate::quant::{QuantTensor, QuantType};
use crate::rng::Stream;
use crate::tensor::{Compute, DType, Device, Shape, Tensor};

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
    /// Where the model will compute, and in which type: on the CPU F32, or F64 in gradient checks; on a CUDA device
    /// BF16, F16 or F32.
    pub compute: Compute,
    /// The form of the linears.
    pub weights: Weights,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            compute: Compute::cpu(DType::F32),
            weights: Weights::AsStored,
        }
    }
}

/// Where the tensors of a model come from.
trait Source {
    fn tensor(&self, name: &str) -> Result<Tensor>;
    fn place(&self, name: &str) -> String;

    /// The linear weight `name`, where it never was dense.
    fn quantized(&self, _name: &str) -> Option<QuantTensor> {
        None
    }
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

impl Initializer {
    fn new(config: &ModelConfig, seed: u64) -> Self {
        let tensors = config.tensors().into_iter().enumerate();
        Self {
            seed,
            names: tensors.map(|(i, (name, shape))| (name, (i, shape))).collect(),
        }
    }
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

/// Weights that only have the right sizes and variances: random codes, and an embedding whose logits are small, so that
/// the loss starts near the logarithm of the vocabulary.
struct Synthesizer(Initializer);

impl Source for Synthesizer {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let Some(&(number, shape)) = self
            .0
            .names
            .get(name)
            .filter(|_| name.ends_with("embeddings.weight"))
        else {
            return self.0.tensor(name);
        };
        // A random sign and mantissa on one exponent: f16 between 2^e and 2^(e + 1), about 2 / hidden.
        let (_, hidden) = shape.rows_and_columns();
        let exponent = 16 - hidden.ilog2().min(14) as u16;
        let mut tensor = Tensor::zeros(DType::F16, shape);
        Stream::new(self.0.seed, number as u64).fill(tensor.bytes_mut());
        for bits in bytemuck::cast_slice_mut::<u8, u16>(tensor.bytes_mut()) {
            *bits = (*bits & 0x83ff) | (exponent << 10);
        }
        Ok(tensor)
    }

    fn place(&self, name: &str) -> String {
        name.to_string()
    }

    fn quantized(&self, name: &str) -> Option<QuantTensor> {
        let &(number, shape) = self.0.names.get(name)?;
        Some(QuantTensor::random(
            shape,
            Stream::new(self.0.seed, number as u64),
        ))
    }
}

struct Loader<'a, S> {
    source: &'a S,
    options: &'a LoadOptions,
}

impl<S: Source> Loader<'_, S> {
    /// A small tensor (norm, bias) in the type of sums; none of its numbers may be NaN or infinite.
    fn small(&self, name: &str) -> Result<Param> {
        let tensor = self.source.tensor(name)?;
        refuse_non_finite(&self.source.place(name), &tensor)?;
        let Compute { device, dtype } = self.options.compute;
        Ok(Param::frozen(
            tensor.to_dtype(dtype.accumulator()).into_device(device)?,
        ))
    }

    fn norm(&self, name: &str, eps: f64) -> Result<LayerNorm> {
        let (weight, bias) = (
            self.small(&format!("{name}.weight"))?,
            self.small(&format!("{name}.bias"))?,
        );
        Ok(LayerNorm { weight, bias, eps })
    }

    fn linear(&self, name: &str) -> Result<Linear> {
        Ok(Linear {
            weight: self.weight(&format!("{name}.weight"))?,
            bias: Some(self.small(&format!("{name}.bias"))?),
            lora: None,
        })
    }

    fn weight(&self, name: &str) -> Result<Weight> {
        let place = |weight| {
            let weight = ops::place_quantized(weight, self.options.compute.device)?;
            Ok(Weight::Quant(Box::new(weight)))
        };
        if let Some(weight) = self.source.quantized(name) {
            return place(weight);
        }
        let stored = self.source.tensor(name)?;
        match (self.options.weights, stored.dtype()) {
            (_, DType::U8) => place(QuantTensor::from_bnb(name, |n| self.source.tensor(n))?),
            (Weights::AsStored, _) => Ok(Weight::Dense(self.large(name)?)),
            (
                Weights::Quantized {
                    quant_type,
                    double_quant,
                },
                _,
            ) => {
                let (place, device) = (self.source.place(name), self.options.compute.device);
                let weight = ops::quantize(&place, &stored, quant_type, double_quant, device)?;
                Ok(Weight::Quant(Box::new(weight)))
            }
        }
    }

    /// A tensor of any size. On the CPU in place; one wider than the compute type cannot be decoded tile by tile and is
    /// rounded here. A device gets a copy in the compute type.
    fn large(&self, name: &str) -> Result<Param> {
        let tensor = self.source.tensor(name)?;
        let Compute { device, dtype } = self.options.compute;
        Ok(Param::frozen(match device {
            Device::Cuda(_) => tensor.to_device_as(device, dtype)?,
            Device::Cpu if tensor.dtype().size() <= dtype.size() => tensor,
            Device::Cpu => tensor.to_dtype(dtype),
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
            prefix: None,
            neftune: 0.0,
            compute: self.options.compute,
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
        Loader {
            source: &Initializer::new(config, seed),
            options,
        }
        .model(config, false)
    }

    /// A model to measure with: NF4 weights of random codes, random embedding, head tied. It has the bytes and the costs of
    /// a real one, needs no checkpoint, and at most one tensor at a time lies in host memory on its way to a device.
    ///
    /// # Errors
    /// The device has no room.
    pub fn synthetic(config: &ModelConfig, seed: u64, compute: Compute) -> Result<Model> {
        Loader {
            source: &Synthesizer(Initializer::new(config, seed)),
            options: &LoadOptions {
                compute,
                weights: Weights::AsStored,
            },
        }
        .model(config, false)
    }
}
