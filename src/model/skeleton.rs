//! A model of the right sizes for a plan: no checkpoint, no contents.

use std::collections::HashMap;

use super::config::ModelConfig;
use super::load::{LoadOptions, Loader, Source};
use super::{LoadedFrom, Model};
use crate::checkpoint::{Checkpoint, WORD_EMBEDDINGS};
use crate::error::{Error, Result};
use crate::quant::{Absmax, BLOCK, NESTED_BLOCK, Order, QuantTensor, QuantType};
use crate::tensor::{DType, Shape, Tensor};

/// The tensors of a checkpoint that a plan is made for.
struct Skeleton {
    shapes: HashMap<String, Shape>,
    from: LoadedFrom,
}

impl Skeleton {
    fn shape(&self, name: &str) -> Result<Shape> {
        let expected = "a tensor of this configuration";
        let found = self.shapes.get(name).copied();
        found.ok_or_else(|| Error::input(name, "no such tensor", expected, "this is a bug"))
    }
}

impl Source for Skeleton {
    fn tensor(&self, name: &str) -> Result<Tensor> {
        Ok(Tensor::planned_mapped(self.from.dtype, self.shape(name)?))
    }

    fn place(&self, name: &str) -> String {
        name.to_string()
    }

    fn quantized(&self, name: &str) -> Option<QuantTensor> {
        let double_quant = self.from.double_quant?;
        let shape = self.shape(name).ok()?;
        let blocks = shape.elements().div_ceil(BLOCK);
        let mapped = |dtype, n: usize| Tensor::planned_mapped(dtype, [n]);
        Some(QuantTensor {
            quant_type: QuantType::Nf4,
            codes: mapped(DType::U8, shape.elements().div_ceil(2)),
            absmax: if double_quant {
                Absmax::Nested {
                    codes: mapped(DType::U8, blocks),
                    nested_absmax: mapped(DType::F32, blocks.div_ceil(NESTED_BLOCK)),
                    offset: 0.0,
                    code: mapped(DType::F32, 256),
                }
            } else {
                Absmax::Flat(mapped(DType::F32, blocks))
            },
            order: Order::Rows,
            shape,
            source_dtype: self.from.dtype,
        })
    }
}

impl LoadedFrom {
    /// What `checkpoint` holds.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let quantized = checkpoint.config().quantization_config.as_ref();
        Ok(Self {
            dtype: checkpoint.tensor(WORD_EMBEDDINGS)?.dtype(),
            double_quant: quantized.map(|quantized| quantized.use_double_quant),
            separate_head: checkpoint.has_separate_head()?,
        })
    }
}

impl Model {
    /// The model that [`Model::load`] would make of such a checkpoint; for the scope of
    /// [`crate::tensor::ledger::Ledger::plan`] only, since it has no weights.
    ///
    /// # Errors
    /// The options do not fit the configuration.
    pub fn planned(config: &ModelConfig, from: LoadedFrom, options: &LoadOptions) -> Result<Model> {
        let source = &Skeleton {
            shapes: config.tensors().into_iter().collect(),
            from,
        };
        Loader { source, options }.model(config, from.separate_head)
    }
}
