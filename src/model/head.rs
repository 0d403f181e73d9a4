//! The model's two ends: the embedding, which may stay in host memory, and the head, in whatever form it is held.
//!
//! | storage | matrix | a device multiplies | bytes of ChatGLM-6B's on a card |
//! |---|---|---|---|
//! | compute | compute type; on the CPU as stored | it | 1.07e9 |
//! | int8 | 8 bits, a scale for each row | it, decoded inside the product | 0.54e9 |
//! | nf4 | NF4, double-quantised | panels, decoded one at a time; to generate, it | 0.28e9 + 0.07e9 |
//! | stream | compute type, in page-locked host memory | panels, copied one ahead | 0.13e9 |
//!
//! Streaming gives the same bits as the compute type. A head that trains is held in the compute type's sums, as every parameter.

use super::load::Loader;
use super::workspace::Workspace;
use super::{EmbeddingPlace, HeadStorage, Model};
use crate::checkpoint::{LM_HEAD, Source, WORD_EMBEDDINGS};
use crate::error::{Error, Result};
use crate::nn::Param;
use crate::ops::{self, HEAD_CHUNK, HeadRef, HeadScratch, WeightRef};
use crate::quant::{QuantTensor, QuantType, RowInt8};
use crate::tensor::ledger::account;
use crate::tensor::{Compute, Device, Tensor};

/// A frozen output matrix in another form than a dense one where the model computes.
#[derive(Debug)]
pub(super) enum StoredHead {
    Int8(Box<RowInt8>),
    Nf4(Box<QuantTensor>),
    /// As [`HeadRef::Streamed`].
    Streamed(Vec<Tensor>),
}

impl StoredHead {
    fn as_ref(&self) -> HeadRef<'_> {
        match self {
            Self::Int8(w) => HeadRef::Here(WeightRef::Int8(w)),
            Self::Nf4(w) => HeadRef::Here(WeightRef::Quant(w)),
            Self::Streamed(pieces) => HeadRef::Streamed(pieces),
        }
    }

    /// Its storage, as configurations name it.
    fn name(&self) -> &'static str {
        match self {
            Self::Int8(_) => "int8",
            Self::Nf4(_) => "nf4",
            Self::Streamed(_) => "stream",
        }
    }

    /// Bytes of the matrix, wherever they lie.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Int8(w) => w.bytes(),
            Self::Nf4(w) => w.bytes(),
            Self::Streamed(pieces) => pieces.iter().map(Tensor::byte_len).sum(),
        }
    }
}

impl<S: Source + ?Sized> Loader<'_, S> {
    /// The embedding. It stays in the file when the options say so, unless a tied head needs the same matrix on the device.
    pub(super) fn embedding(&self, separate_head: bool) -> Result<Param> {
        let shared = !separate_head && self.options.head == HeadStorage::Compute;
        if self.options.embedding == EmbeddingPlace::Host && !shared {
            return self.source.dense(WORD_EMBEDDINGS).map(Param::frozen);
        }
        self.large(WORD_EMBEDDINGS)
    }

    /// The head: a dense matrix of its own, or one in another form; neither when it is the embedding as it lies there.
    pub(super) fn head(&self, separate: bool) -> Result<(Option<Param>, Option<StoredHead>)> {
        let name = if separate { LM_HEAD } else { WORD_EMBEDDINGS };
        let Compute { device, dtype } = self.options.compute;
        let stored = match (self.options.head, device) {
            (HeadStorage::Compute, _) | (HeadStorage::Stream, Device::Cpu) => {
                let dense = separate.then(|| self.large(name)).transpose()?;
                return Ok((dense, None));
            }
            (HeadStorage::Int8, _) => {
                let weight = RowInt8::quantize(&self.source.place(name), &self.source.dense(name)?)?;
                StoredHead::Int8(Box::new(ops::place_int8(weight, device)?))
            }
            (HeadStorage::Nf4, _) => {
                let (place, source) = (self.source.place(name), self.source.dense(name)?);
                let weight = ops::quantize(&place, &source, QuantType::Nf4, true, device)?;
                StoredHead::Nf4(Box::new(weight))
            }
            (HeadStorage::Stream, Device::Cuda(_)) => {
                let source = self.source.dense(name)?;
                let (rows, _) = source.shape().rows_and_columns();
                let pieces = (0..rows).step_by(HEAD_CHUNK).map(|start| {
                    let end = (start + HEAD_CHUNK).min(rows);
                    pinned_rows(&source, start..end, Compute { device, dtype })
                });
                StoredHead::Streamed(pieces.collect::<Result<_>>()?)
            }
        };
        Ok((None, Some(stored)))
    }
}

/// Some rows of a matrix in page-locked memory, in the compute type.
fn pinned_rows(source: &Tensor, rows: std::ops::Range<usize>, compute: Compute) -> Result<Tensor> {
    let (_, columns) = source.shape().rows_and_columns();
    let shape = [rows.len(), columns];
    let mut piece = Tensor::zeros_pinned(compute.device, compute.dtype, shape)?;
    if !piece.is_planned() {
        let size = source.dtype().size() * columns;
        let mut stored = Tensor::zeros(source.dtype(), shape);
        (stored.bytes_mut()).copy_from_slice(&source.bytes()[rows.start * size..rows.end * size]);
        (piece.bytes_mut()).copy_from_slice(stored.to_dtype(compute.dtype).bytes());
    }
    Ok(piece)
}

impl Model {
    /// The output matrix `[V, hidden]`.
    pub(super) fn head(&self) -> HeadRef<'_> {
        match &self.stored_head {
            Some(stored) => stored.as_ref(),
            None => {
                let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
                HeadRef::Here(WeightRef::Dense(head.operand()))
            }
        }
    }

    /// Refuses to let a head train that is held in a form that cannot.
    ///
    /// # Errors
    /// It is; `what` wants it to train.
    pub(super) fn check_head_trains(&self, what: &str) -> Result<()> {
        let Some(stored) = &self.stored_head else {
            return Ok(());
        };
        Err(Error::input(
            format!("{what}: lm_head"),
            format!("a head in storage {}", stored.name()),
            "storage compute",
            "a head that trains needs --head-storage compute",
        ))
    }

    /// Does the embedding stay in host memory, beside a device that computes?
    pub(super) fn gathers_on_host(&self) -> bool {
        self.embedding.operand().device() != self.device()
    }

    /// Page-locked memory for `rows` rows of an embedding that stays on the host.
    ///
    /// # Errors
    /// The system does not lock so much.
    pub(super) fn embedding_staging(&self, rows: usize) -> Result<Option<Tensor>> {
        let Compute { device, dtype } = self.compute;
        let shape = [rows, self.config.hidden_size];
        self.gathers_on_host()
            .then(|| account("staging", || Tensor::zeros_pinned(device, dtype, shape)))
            .transpose()
    }

    /// `y [M, hidden]`: the embeddings of `ids`, which `there` holds where the model computes.
    ///
    /// # Errors
    /// An id lies outside the vocabulary, or the staging memory was made for another model.
    pub(super) fn embed(
        &self,
        ids: &[i32],
        there: &Tensor,
        staging: Option<&mut Tensor>,
        y: &mut Tensor,
    ) -> Result<()> {
        match staging {
            Some(staging) if self.gathers_on_host() => {
                ops::embedding_from_host(self.embedding.operand(), ids, staging, y)
            }
            _ => ops::embedding(self.embedding.operand(), there, y),
        }
    }

    /// Logits of every position of the last [`Model::forward`], `[B S, V]`, in the type of sums.
    ///
    /// # Errors
    /// The device has no room.
    pub fn logits(&self, ws: &Workspace) -> Result<Tensor> {
        let rows = ws.final_hidden().extent(0);
        let mut logits = self.compute.accumulators([rows, self.config.vocab_size])?;
        let mut scratch = HeadScratch::new(self.compute, self.head(), 0)?;
        ops::head_logits(ws.final_hidden(), self.head(), &mut scratch, &mut logits)?;
        Ok(logits)
    }
}
