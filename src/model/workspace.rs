//! Every activation of one micro-batch, reserved before step 1.

use super::Model;
use super::activations::Activations;
use super::glm::{self, BackwardScratch};
use super::policy::LayerPolicy;
use super::stream::WeightSlots;
use crate::data::batch::{Batch, IGNORE};
use crate::error::{Error, Result};
use crate::nn::{NormActivations, PrefixActivations, Scratch};
use crate::ops::{self, HeadScratch};
use crate::rng::Stream;
use crate::tensor::ledger::account;
use crate::tensor::{Compute, Tensor};

/// Logits of at most this many elements are held at once (64 MiB of f32); a larger vocabulary is taken in chunks.
const LOGITS: usize = 1 << 24;

/// How many logits the head of `rows` labelled rows holds at once.
pub(crate) fn logits_elements(rows: usize, vocabulary: usize) -> usize {
    (rows * vocabulary).min(LOGITS.max(rows))
}

/// The activations of one micro-batch and the buffers that forward and backward passes share.
#[derive(Debug)]
pub struct Workspace {
    max_size: usize,
    max_len: usize,
    vocabulary: usize,
    pub(super) ids: Tensor,
    pub(super) positions: Tensor,
    pub(super) spans: Tensor,
    pub(super) labelled: Tensor,
    pub(super) targets: Tensor,
    pub(super) tables: Tensor,
    /// The number of the last forward pass, if it was one of training, to run it again.
    pub(super) pass: Option<Stream>,
    pub(super) activations: Activations,
    /// Its y becomes the gradient over the current hidden state in the backward pass.
    pub(super) final_layernorm: NormActivations,
    pub(super) head: HeadBuffers,
    /// The ids once more, for an embedding that stays in host memory.
    pub(super) host_ids: Vec<i32>,
    /// Its rows, on their way to the first layer.
    pub(super) embedded: Option<Tensor>,
    /// Of a model with a prefix.
    pub(super) prefix: Option<PrefixActivations>,
    pub(super) scratch: Scratch,
    pub(super) weights: WeightSlots,
    pub(super) backward: BackwardScratch,
}

/// Buffers of head and loss.
#[derive(Debug)]
pub(super) struct HeadBuffers {
    /// Final hidden states of the labelled rows.
    pub x: Tensor,
    pub dx: Tensor,
    pub scratch: HeadScratch,
    /// Has a backward pass overwritten the logits?
    pub spent: bool,
    pub statistics: Tensor,
    /// A copy of the statistics on the host.
    pub scores: Tensor,
}

impl Workspace {
    /// Room for up to `max_size` sequences of up to `max_len` tokens.
    ///
    /// # Errors
    /// The device has no room.
    pub(super) fn new(
        model: &Model,
        max_size: usize,
        max_len: usize,
        policies: &[LayerPolicy],
    ) -> Result<Self> {
        account("transients", || Self::reserve(model, max_size, max_len, policies))
    }

    fn reserve(model: &Model, max_size: usize, max_len: usize, policies: &[LayerPolicy]) -> Result<Self> {
        let (config, compute) = (model.config(), model.compute());
        let (hidden, inner) = (config.hidden_size, config.inner_hidden_size);
        let rows = max_size * max_len;
        let logits = logits_elements(rows, config.vocab_size);
        let plane = || compute.zeros([rows, hidden]);
        let activations = Activations::new(model, rows, policies)?;
        let d_inner = activations.qkv_stay().then_some(inner);
        Ok(Self {
            max_size,
            max_len,
            vocabulary: config.vocab_size,
            ids: compute.indices([rows])?,
            positions: compute.indices([rows, 2])?,
            spans: compute.indices([max_size, 2])?,
            labelled: compute.indices([rows])?,
            targets: compute.indices([rows])?,
            // Padding keeps counting positions, so they stay below the padded length; the block position of the last
            // token is at most the length itself.
            tables: glm::rope_tables(compute, config.head_dim(), max_len + 1)?,
            pass: None,
            activations,
            final_layernorm: NormActivations::new(compute, rows, hidden)?,
            head: account("logits", || -> Result<_> {
                Ok(HeadBuffers {
                    x: plane()?,
                    dx: compute.accumulators([rows, hidden])?,
                    scratch: HeadScratch::new(compute, model.head(), logits)?,
                    spent: false,
                    statistics: compute.accumulators([rows, ops::STATISTICS])?,
                    scores: Compute::cpu(compute.dtype).accumulators([rows, ops::STATISTICS])?,
                })
            })?,
            host_ids: Vec::with_capacity(rows),
            embedded: model.embedding_staging(rows)?,
            prefix: match &model.prefix {
                Some(encoder) => {
                    let heads = [config.num_attention_heads, config.head_dim()];
                    Some(encoder.activations(compute, max_size, heads, true)?)
                }
                None => None,
            },
            weights: WeightSlots::new(model)?,
            scratch: Scratch::new(compute, rows, model.linears())?,
            backward: BackwardScratch::new(compute, rows, hidden, d_inner)?,
        })
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
        let positions = self.tables.extent(0);
        glm::check_indices("Workspace::load", "token id", &batch.ids, self.vocabulary)?;
        glm::check_indices("Workspace::load", "position", &batch.positions, positions)?;
        self.ids.resize([rows])?;
        self.ids.write(&batch.ids)?;
        self.host_ids.clear();
        self.host_ids.extend_from_slice(&batch.ids);
        self.positions.resize([rows, 2])?;
        self.positions.write(&batch.positions)?;
        self.spans.resize([size, 2])?;
        self.spans.write(&glm::span_indices(&batch.spans))?;

        let count = batch.supervised();
        let (mut labelled, mut targets) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for (b, labels) in batch.labels.chunks_exact(len).enumerate() {
            for (t, &label) in labels[1..].iter().enumerate() {
                if label != IGNORE {
                    labelled.push((b * len + t) as i32);
                    targets.push(label);
                }
            }
        }
        glm::check_indices("Workspace::load", "label", &targets, self.vocabulary)?;
        self.labelled.resize([count])?;
        self.labelled.write(&labelled)?;
        self.targets.resize([count])?;
        self.targets.write(&targets)?;
        let first = self.activations.first();
        let (_, hidden) = first.shape().rows_and_columns();
        first.resize([rows, hidden])?;
        for tensor in [&mut self.head.x, &mut self.head.dx] {
            tensor.resize([count, hidden])?;
        }
        self.head.statistics.resize([count, ops::STATISTICS])
    }

    /// The final hidden states after the last LayerNorm, `[B S, hidden]`, until a backward pass.
    pub fn final_hidden(&self) -> &Tensor {
        &self.final_layernorm.y
    }
}
