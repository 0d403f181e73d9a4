//! Weights from a checkpoint into a model, in place where possible.

use std::collections::BTreeMap;

use super::Model;
use super::config::{Linears, ModelConfig};
use super::glm::Block;
use super::tune::Storage;
use crate::checkpoint::quantized::is_quantized_linear;
use crate::checkpoint::{Checkpoint, Source, Stored, refuse_non_finite};
use crate::error::{Error, Result};
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Param, Weight};
use crate::ops;
use crate::quant::{QuantTensor, QuantType};
use crate::rng::Stream;
use crate::tensor::ledger::account;
use crate::tensor::{Compute, DType, Device, Shape, Tensor};

/// In which form the four linears of each block are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    /// As the checkpoint stores them: dense tensors mapped in place, tensors in few bits as they are.
    AsStored,
    /// In few bits: a dense checkpoint is quantised to 4 tensor by tensor in memory, one in few bits is used as it is.
    Quantized {
        /// The code.
        quant_type: QuantType,
        /// Are block scales quantised too?
        double_quant: bool,
    },
}

/// In which form the head's matrix is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadStorage {
    /// On a device in the compute type, on the CPU as the checkpoint stores it.
    #[default]
    Compute,
    /// In 8 bits with a scale for each row.
    Int8,
    /// In NF4, double-quantised.
    Nf4,
    /// In host memory; a device gets it in chunks, every time it is used.
    Stream,
}

impl std::str::FromStr for HeadStorage {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "compute" => Ok(Self::Compute),
            "int8" => Ok(Self::Int8),
            "nf4" => Ok(Self::Nf4),
            "stream" => Ok(Self::Stream),
            _ => Err(Error::Usage(format!(
                "--head-storage: found {name}, expected auto, compute, int8, nf4 or stream"
            ))),
        }
    }
}

/// Where the embedding matrix lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmbeddingPlace {
    /// Where the model computes.
    #[default]
    Device,
    /// In the mapped file: the rows of a batch are gathered on the host and uploaded.
    Host,
}

/// What a checkpoint holds, as far as memory is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedFrom {
    /// The type of what is stored dense.
    pub dtype: DType,
    /// The form of the linears.
    pub linears: Linears,
    /// Is the head another matrix than the embedding?
    pub separate_head: bool,
}

impl LoadedFrom {
    /// What a run holds that wants its linears in 4 bits: those in few bits are used as they are.
    pub fn in_four_bits(self, double_quant: bool) -> Self {
        let linears = match self.linears {
            Linears::Dense => Linears::FourBit { double_quant },
            few_bits => few_bits,
        };
        Self { linears, ..self }
    }
}

/// How to load.
#[derive(Debug, Clone, Copy)]
pub struct LoadOptions {
    /// Where the model will compute, and in which type: on the CPU F32, or F64 in gradient checks; on a CUDA device
    /// BF16, F16 or F32.
    pub compute: Compute,
    /// The form of the linears.
    pub weights: Weights,
    /// Do the linears' matrices stay in host memory, to be copied ahead of their use?
    pub stream: bool,
    /// The form of the head.
    pub head: HeadStorage,
    /// The place of the embedding.
    pub embedding: EmbeddingPlace,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            compute: Compute::cpu(DType::F32),
            weights: Weights::AsStored,
            stream: false,
            head: HeadStorage::default(),
            embedding: EmbeddingPlace::default(),
        }
    }
}

/// Normal weights, norms of 1 and 0, biases of 0: how models start before their first training.
struct Initializer<'a> {
    config: &'a ModelConfig,
    seed: u64,
    names: BTreeMap<String, (usize, Shape)>,
}

impl<'a> Initializer<'a> {
    fn new(config: &'a ModelConfig, seed: u64) -> Self {
        let tensors = config.tensors().into_iter().enumerate();
        Self {
            config,
            seed,
            names: tensors.map(|(i, (name, shape))| (name, (i, shape))).collect(),
        }
    }
}

impl Initializer<'_> {
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
}

impl Source for Initializer<'_> {
    fn config(&self) -> &ModelConfig {
        self.config
    }

    fn separate_head(&self) -> Result<bool> {
        Ok(false)
    }

    fn dtype(&self, _name: &str) -> Result<DType> {
        Ok(DType::F32)
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        self.tensor(name).map(Stored::Dense)
    }

    fn place(&self, name: &str) -> String {
        name.to_string()
    }
}

/// Weights that only have the right sizes and variances: random codes or, dense, random numbers, and an embedding whose logits are
/// small, so that the loss starts near the logarithm of the vocabulary.
struct Synthesizer<'a> {
    names: Initializer<'a>,
    dense: bool,
}

impl Synthesizer<'_> {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        let matrix = |(_, shape): &&(usize, Shape)| shape.extents().len() == 2;
        let Some(&(number, shape)) = self.names.names.get(name).filter(matrix) else {
            return self.names.tensor(name);
        };
        // A random sign and mantissa on one exponent: f16 between 2^e and 2^(e + 1), of the embedding about 2 / hidden, of a linear
        // about 0.02.
        let (_, hidden) = shape.rows_and_columns();
        let exponent = match name.ends_with("embeddings.weight") {
            true => 16 - hidden.ilog2().min(14) as u16,
            false => 9,
        };
        let mut tensor = Tensor::zeros(DType::F16, shape);
        Stream::new(self.names.seed, number as u64).fill(tensor.bytes_mut());
        for bits in bytemuck::cast_slice_mut::<u8, u16>(tensor.bytes_mut()) {
            *bits = (*bits & 0x83ff) | (exponent << 10);
        }
        Ok(tensor)
    }
}

impl Source for Synthesizer<'_> {
    fn config(&self) -> &ModelConfig {
        self.names.config
    }

    fn separate_head(&self) -> Result<bool> {
        Ok(false)
    }

    fn dtype(&self, _name: &str) -> Result<DType> {
        Ok(DType::F16)
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        let linear = |_: &&(usize, Shape)| !self.dense && is_quantized_linear(name);
        match self.names.names.get(name).filter(linear) {
            Some(&(number, shape)) => {
                let stream = Stream::new(self.names.seed, number as u64);
                Ok(Stored::Quant(QuantTensor::random(shape, stream)))
            }
            None => self.tensor(name).map(Stored::Dense),
        }
    }

    fn place(&self, name: &str) -> String {
        name.to_string()
    }
}

pub(super) struct Loader<'a, S: ?Sized> {
    pub source: &'a S,
    pub options: &'a LoadOptions,
}

impl<S: Source + ?Sized> Loader<'_, S> {
    /// A small tensor (norm, bias) in the type of sums; none of its numbers may be NaN or infinite.
    fn small(&self, name: &str) -> Result<Param> {
        let tensor = self.source.dense(name)?;
        if !tensor.is_planned() {
            refuse_non_finite(&self.source.place(name), &tensor)?;
        }
        let Compute { device, dtype } = self.options.compute;
        Ok(Param::frozen(
            tensor.to_dtype(dtype.accumulator()).into_device(device)?,
        ))
    }

    pub(super) fn norm(&self, name: &str, eps: f64) -> Result<LayerNorm> {
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

    /// The matrix of a linear layer. One that is to be streamed is made on the device as well, and copied out of it.
    fn weight(&self, name: &str) -> Result<Weight> {
        let weight = self.weight_in_place(name)?;
        match self.options.stream && self.options.compute.device != Device::Cpu {
            true => weight.into_host(),
            false => Ok(weight),
        }
    }

    fn weight_in_place(&self, name: &str) -> Result<Weight> {
        let device = self.options.compute.device;
        let stored = match self.source.weight(name)? {
            Stored::Quant(weight) => {
                return Ok(Weight::Quant(Box::new(ops::place_quantized(weight, device)?)));
            }
            Stored::Int8(weight) => return Ok(Weight::Int8(Box::new(ops::place_int8(weight, device)?))),
            Stored::Dense(stored) => stored,
        };
        match (self.options.weights, stored.dtype()) {
            (Weights::AsStored, _) => Ok(Weight::Dense(self.dense(stored)?)),
            (
                Weights::Quantized {
                    quant_type,
                    double_quant,
                },
                _,
            ) => {
                let place = self.source.place(name);
                let weight = ops::quantize(&place, &stored, quant_type, double_quant, device)?;
                Ok(Weight::Quant(Box::new(weight)))
            }
        }
    }

    /// A tensor of any size. On the CPU in place; one wider than the compute type cannot be decoded tile by tile and is
    /// rounded here. A device gets a copy in the compute type.
    pub(super) fn large(&self, name: &str) -> Result<Param> {
        self.dense(self.source.dense(name)?)
    }

    fn dense(&self, tensor: Tensor) -> Result<Param> {
        let Compute { device, dtype } = self.options.compute;
        Ok(Param::frozen(match device {
            Device::Cuda(_) => tensor.to_device_as(device, dtype)?,
            Device::Cpu if tensor.dtype().size() <= dtype.size() => tensor,
            Device::Cpu => tensor.to_dtype(dtype),
        }))
    }

    pub fn model(&self) -> Result<Model> {
        let (config, separate_head) = (self.source.config(), self.source.separate_head()?);
        let (lm_head, stored_head) = account("head", || self.head(separate_head))?;
        Ok(Model {
            embedding: account("embedding", || self.embedding(separate_head))?,
            blocks: (0..config.num_layers)
                .map(|i| self.block(i, config))
                .collect::<Result<_>>()?,
            final_layernorm: account("weights", || {
                self.norm("transformer.final_layernorm", config.layernorm_epsilon)
            })?,
            lm_head,
            stored_head,
            prefix: None,
            neftune: 0.0,
            storage: Storage::default(),
            compute: self.options.compute,
            config: config.clone(),
        })
    }

    pub(super) fn block(&self, i: usize, config: &ModelConfig) -> Result<Block> {
        account("weights", || self.block_tensors(i, config))
    }

    fn block_tensors(&self, i: usize, config: &ModelConfig) -> Result<Block> {
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
        Self::load_from(checkpoint, options)
    }

    /// [`Model::load`], from wherever weights come.
    ///
    /// # Errors
    /// A weight is missing or cannot be read; one that is to be quantised is not finite.
    pub fn load_from(source: &dyn Source, options: &LoadOptions) -> Result<Model> {
        Loader { source, options }.model()
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
        .model()
    }

    /// A model to measure with: NF4 weights of random codes, random embedding, head tied. It has the bytes and the costs of
    /// a real one, needs no checkpoint, and at most one tensor at a time lies in host memory on its way to a device.
    ///
    /// # Errors
    /// The device has no room.
    pub fn synthetic(config: &ModelConfig, seed: u64, compute: Compute) -> Result<Model> {
        let options = LoadOptions {
            compute,
            ..LoadOptions::default()
        };
        Self::synthetic_as(config, seed, false, &options)
    }

    /// [`Model::synthetic`], with fp16 weights if it is `dense`, loaded as `options` say.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn synthetic_as(
        config: &ModelConfig,
        seed: u64,
        dense: bool,
        options: &LoadOptions,
    ) -> Result<Model> {
        let names = Initializer::new(config, seed);
        let source = &Synthesizer { names, dense };
        Loader { source, options }.model()
    }
}
