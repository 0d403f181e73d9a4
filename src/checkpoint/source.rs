//! Weights by name, one at a time: what models are loaded from, and what is written, quantised and compared.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::quant::{QuantTensor, RowInt8};
use crate::tensor::{DType, Shape, Tensor};

/// A weight in the form in which it is kept.
#[derive(Debug, Clone)]
pub enum Stored {
    /// Floats, in place where possible.
    Dense(Tensor),
    /// Four bits with a scale for each block.
    Quant(QuantTensor),
    /// Eight bits with a scale for each row.
    Int8(RowInt8),
}

impl Stored {
    /// The numbers it stands for, F32 on the host; a dense tensor is widened.
    pub fn decoded(&self) -> Tensor {
        match self {
            Stored::Dense(tensor) => tensor.to_dtype(DType::F32),
            Stored::Quant(weight) => weight.dequantize(),
            Stored::Int8(weight) => weight.dequantize(),
        }
    }
}

/// The weights of a model by their names in a checkpoint ([`ModelConfig::tensors`]). Nothing is in memory but what was asked for
/// and not yet dropped.
pub trait Source: Sync {
    /// The sizes.
    fn config(&self) -> &ModelConfig;

    /// Is the head another matrix than the embedding? Then both have a weight, else only the embedding is asked for.
    ///
    /// # Errors
    /// They have to be read to know, and cannot be.
    fn separate_head(&self) -> Result<bool>;

    /// The type of a dense weight; of one in few bits that which it was quantised from.
    ///
    /// # Errors
    /// There is no such weight.
    fn dtype(&self, name: &str) -> Result<DType>;

    /// A weight.
    ///
    /// # Errors
    /// There is no such weight, or it cannot be read.
    fn weight(&self, name: &str) -> Result<Stored>;

    /// `file: tensor`, for messages.
    fn place(&self, name: &str) -> String;

    /// Rows of a weight (elements of one that is a vector) as floats: what is in few bits is decoded to F32. A weight that cannot be
    /// read in pieces is read whole, and most of it dropped.
    ///
    /// # Errors
    /// As [`Source::weight`]; the weight has fewer rows.
    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        let whole = self.dense(name)?;
        rows_of(whole.shape(), &rows, &self.place(name))?;
        Ok(whole.rows(rows))
    }

    /// These rows will be asked for next: reading them from the disk may begin.
    fn will_be_read(&self, _name: &str, _rows: Range<usize>) {}

    /// A weight as floats: what is in few bits is decoded to F32.
    ///
    /// # Errors
    /// As [`Source::weight`].
    fn dense(&self, name: &str) -> Result<Tensor> {
        Ok(match self.weight(name)? {
            Stored::Dense(tensor) => tensor,
            other => other.decoded(),
        })
    }
}

/// The shape of the rows `rows` of a tensor of the shape `of`: elements where it is a vector.
///
/// # Errors
/// There are fewer; `place` is what the message names.
pub(super) fn rows_of(of: Shape, rows: &Range<usize>, place: &str) -> Result<Shape> {
    let mut extents = of.extents().to_vec();
    match extents.first_mut() {
        Some(first) if rows.start <= rows.end && rows.end <= *first => {
            *first = rows.len();
            Ok(Shape::new(&extents))
        }
        _ => {
            let remedy = "this is a bug: please report it";
            Err(Error::input(
                place,
                format!("{of}"),
                format!("rows {rows:?}"),
                remedy,
            ))
        }
    }
}
