//! A model of the right sizes for a plan: no checkpoint, no contents.

use std::collections::HashMap;

use super::config::{Linears, ModelConfig};
use super::load::{LoadOptions, Loader};
use super::{LoadedFrom, Model};
use crate::checkpoint::quantized::is_quantized_linear;
use crate::checkpoint::{Checkpoint, Source, Stored, WORD_EMBEDDINGS};
use crate::error::{Error, Result};
use crate::quant::{Absmax, BLOCK, NESTED_BLOCK, Order, QuantTensor, QuantType, RowInt8};
use crate::tensor::{DType, Shape, Tensor};

/// The tensors of a checkpoint that a plan is made for.
struct Skeleton<'a> {
    config: &'a ModelConfig,
    shapes: HashMap<String, Shape>,
    from: LoadedFrom,
}

impl Skeleton<'_> {
    fn shape(&self, name: &str) -> Result<Shape> {
        let expected = "a tensor of this configuration";
        let found = self.shapes.get(name).copied();
        found.ok_or_else(|| Error::input(name, "no such tensor", expected, "this is a bug"))
    }
}

impl Source for Skeleton<'_> {
    fn config(&self) -> &ModelConfig {
        self.config
    }

    fn separate_head(&self) -> Result<bool> {
        Ok(self.from.separate_head)
    }

    fn dtype(&self, _name: &str) -> Result<DType> {
        Ok(self.from.dtype)
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        let shape = self.shape(name)?;
        let linears = match is_quantized_linear(name) {
            true => self.from.linears,
            false => Linears::Dense,
        };
        let mapped = |dtype, n: usize| Tensor::planned_mapped(dtype, [n]);
        let (rows, _) = shape.rows_and_columns();
        let source_dtype = self.from.dtype;
        let double_quant = match linears {
            Linears::FourBit { double_quant } => double_quant,
            Linears::Dense => return Ok(Stored::Dense(Tensor::planned_mapped(source_dtype, shape))),
            // The scales are not mapped: they are stored in another type, or once for all blocks of a row.
            Linears::RowInt4 => {
                let codes = mapped(DType::U8, shape.elements() / 2);
                let scales = Tensor::planned_mapped(DType::F32, [rows]);
                let weight = QuantTensor::from_int4_rows(name, codes, &scales, shape, source_dtype)?;
                return Ok(Stored::Quant(weight));
            }
            Linears::RowInt8 => {
                return Ok(Stored::Int8(RowInt8 {
                    codes: Tensor::planned_mapped(DType::U8, shape),
                    scales: Tensor::zeros(DType::F32, [rows]),
                    source_dtype,
                }));
            }
        };
        let blocks = shape.elements().div_ceil(BLOCK);
        Ok(Stored::Quant(QuantTensor {
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
            source_dtype,
        }))
    }

    fn place(&self, name: &str) -> String {
        name.to_string()
    }
}

impl LoadedFrom {
    /// What `checkpoint` holds.
    ///
    /// # Errors
    /// A tensor cannot be read.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        Ok(Self {
            dtype: checkpoint.tensor(WORD_EMBEDDINGS)?.dtype(),
            linears: checkpoint.config().linears(),
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
            config,
            shapes: config.tensors().into_iter().collect(),
            from,
        };
        Loader { source, options }.model()
    }
}
