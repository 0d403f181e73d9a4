//! Every activation of one micro-batch, reserved before step 1.

use super::Model;
use super::glm::{self, BackwardScratch, BlockActivations};
use crate::data::batch::{Batch, IGNORE, Span};
use crate::error::{Error, Result};
use crate::nn::{NormActivations, Scratch};
use crate::ops;
use crate::tensor::{DType, Tensor};

/// Logits of at most this many elements are held at once (64 MiB of f32); a larger vocabulary is taken in chunks.
const LOGITS: usize = 1 << 24;

/// The activations of one micro-batch and the buffers that forward and backward passes share.
#[derive(Debug)]
pub struct Workspace {
    max_size: usize,
    max_len: usize,
    pub(super) ids: Tensor,
    pub(super) positions: Tensor,
    pub(super) spans: Vec<Span>,
    pub(super) labelled: Tensor,
    pub(super) targets: Tensor,
    pub(super) tables: Tensor,
    /// `hidden[i]` is the input of block i; the last is the output of the last block.
    pub(super) hidden: Vec<Tensor>,
    pub(super) blocks: Vec<BlockActivations>,
    pub(super) final_layernorm: NormActivations,
    pub(super) head: HeadBuffers,
    pub(super) scratch: Scratch,
    pub(super) backward: BackwardScratch,
    /// The gradient over the current hidden state.
    pub(super) d: Tensor,
    pub(super) d_norm: Tensor,
}

/// Buffers of head and loss.
#[derive(Debug)]
pub(super) struct HeadBuffers {
    /// Final hidden states of the labelled rows.
    pub x: Tensor,
    pub dx: Tensor,
    pub logits: Tensor,
    pub statistics: Tensor,
}

impl Workspace {
    /// Room for up to `max_size` sequences of up to `max_len` tokens.
    pub(super) fn new(model: &Model, max_size: usize, max_len: usize) -> Self {
        let config = model.config();
        let (dtype, hidden, inner) = (model.dtype(), config.hidden_size, config.inner_hidden_size);
        let rows = max_size * max_len;
        let rank = model.max_rank();
        let dropped = if model.drops_out() {
            rows * inner.max(hidden)
        } else {
            0
        };
        let logits = (rows * config.vocab_size).min(LOGITS.max(rows));
        let plane = || Tensor::zeros(dtype, [rows, hidden]);
        Self {
            max_size,
            max_len,
            ids: Tensor::zeros(DType::I32, [rows]),
            positions: Tensor::zeros(DType::I32, [rows, 2]),
            spans: Vec::with_capacity(max_size),
            labelled: Tensor::zeros(DType::I32, [rows]),
            targets: Tensor::zeros(DType::I32, [rows]),
            // Padding keeps counting positions, so they stay below the padded length; the block position of the last
            // token is at most the length itself.
            tables: glm::rope_tables(dtype, config.head_dim(), max_len + 1),
            hidden: (0..=config.num_layers).map(|_| plane()).collect(),
            blocks: model
                .blocks
                .iter()
                .map(|block| block.activations(dtype, rows))
                .collect(),
            final_layernorm: NormActivations::new(dtype, rows, hidden),
            head: HeadBuffers {
                x: plane(),
                dx: plane(),
                logits: Tensor::zeros(dtype, [logits]),
                statistics: Tensor::zeros(dtype, [rows, ops::STATISTICS]),
            },
            scratch: Scratch {
                dropped: Tensor::zeros(dtype, [dropped]),
                du: Tensor::zeros(dtype, [rows, rank]),
            },
            backward: BackwardScratch::new(dtype, rows, hidden, inner),
            d: plane(),
            d_norm: plane(),
        }
    }

    /// Takes a batch over: checks it, uploads its indices, sizes the buffers.
    pub(super) fn load(&mut self, batch: &Batch) -> Result<()> {
        let (size, len) = (batch.size, batch.len);
        let rows = size * len;
        let fits = size <= self.max_size && len <= self.max_len && rows > 0;
        let consistent = batch.ids.len() == rows
            && batch.labels.len() == rows
            && batch.positions.len() == 2 * rows
            && batch.spans.len() == size
            && glm::spans_fit(&batch.spans, len);
        if !fits || !consistent {
            return Err(Error::Shape {
                operation: "Workspace::load",
                found: format!("{size} sequences of {len} tokens"),
                expected: format!(
                    "1 to {} sequences of 1 to {} tokens, with all arrays",
                    self.max_size, self.max_len
                ),
            });
        }
        self.ids.resize([rows])?;
        self.ids.as_mut_slice().copy_from_slice(&batch.ids);
        self.positions.resize([rows, 2])?;
        self.positions.as_mut_slice().copy_from_slice(&batch.positions);
        self.spans.clear();
        self.spans.extend_from_slice(&batch.spans);

        let count = batch.supervised();
        self.labelled.resize([count])?;
        self.targets.resize([count])?;
        let labelled = self.labelled.as_mut_slice::<i32>();
        let targets = self.targets.as_mut_slice::<i32>();
        let mut next = 0;
        for (b, labels) in batch.labels.chunks_exact(len).enumerate() {
            for (t, &label) in labels[1..].iter().enumerate() {
                if label != IGNORE {
                    labelled[next] = (b * len + t) as i32;
                    targets[next] = label;
                    next += 1;
                }
            }
        }
        let (_, hidden) = self.hidden[0].shape().rows_and_columns();
        self.hidden[0].resize([rows, hidden])?;
        for tensor in [&mut self.head.x, &mut self.head.dx] {
            tensor.resize([count, hidden])?;
        }
        self.head.statistics.resize([count, ops::STATISTICS])
    }

    /// The input of block `i` (0: the embeddings; the number of layers: the output of the last block), `[B S, hidden]`.
    pub fn hidden(&self, i: usize) -> &Tensor {
        &self.hidden[i]
    }

    /// What block `i` kept of the last forward pass.
    pub fn block(&self, i: usize) -> &BlockActivations {
        &self.blocks[i]
    }

    /// The final hidden states after the last LayerNorm, `[B S, hidden]`.
    pub fn final_hidden(&self) -> &Tensor {
        &self.final_layernorm.y
    }
}
