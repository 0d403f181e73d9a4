//! Batches through a model of which one layer is in memory at a time.
//!
//! Two models of 6 billion parameters beside each other take 25 GB; what two models make of a few prompts takes the hidden states of
//! those prompts. So the layers are loaded one after another from wherever weights come, every batch passes through the one that is
//! there, and it is dropped before the next; the head's matrix is read panel by panel. The numbers are those of
//! [`Model::forward`](super::Model::forward) to the bit: the same blocks do the same operations.

use std::collections::BTreeSet;
use std::ops::Range;

use super::config::ModelConfig;
use super::glm::{self, Block, BlockActivations, BlockDropout};
use super::load::{LoadOptions, Loader};
use super::tune::Merger;
use crate::checkpoint::{LM_HEAD, Source, Stored, WORD_EMBEDDINGS};
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::nn::{Geometry, Keys, NormActivations, Scratch};
use crate::ops::{self, HeadRef, HeadScratch, WeightRef};
use crate::tensor::ledger::account;
use crate::tensor::{Compute, DType, Tensor};

/// Rows of the embedding that are read at once.
const PIECE: usize = 1024;

/// A model to run: weights, and adapters alive on top of them.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    /// The weights, in the form in which they are to be held.
    pub source: &'a dyn Source,
    /// Adapters that are not part of the weights.
    pub adapters: Option<&'a Merger>,
}

impl<'a> Subject<'a> {
    /// Without adapters.
    pub fn plain(source: &'a dyn Source) -> Self {
        Self {
            source,
            adapters: None,
        }
    }
}

/// The weights of a subject with the modules that its adapters replace.
struct Replaced<'a>(Subject<'a>);

impl Replaced<'_> {
    /// The adapters that replace the weight `name`.
    fn replacing(&self, name: &str) -> Option<&Merger> {
        self.0.adapters.filter(|merger| merger.replaces(name))
    }

    /// Where the base keeps `name`: a head that only an adapter parts from the embedding is the embedding there.
    fn in_base<'n>(&self, name: &'n str) -> Result<&'n str> {
        match name == LM_HEAD && !self.0.source.separate_head()? {
            true => Ok(WORD_EMBEDDINGS),
            false => Ok(name),
        }
    }
}

impl Source for Replaced<'_> {
    fn config(&self) -> &ModelConfig {
        self.0.source.config()
    }

    fn separate_head(&self) -> Result<bool> {
        let parted = self.0.adapters.is_some_and(Merger::parts_head);
        Ok(parted || self.0.source.separate_head()?)
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        match self.replacing(name) {
            Some(_) => Ok(DType::F32),
            None => self.0.source.dtype(self.in_base(name)?),
        }
    }

    fn weight(&self, name: &str) -> Result<Stored> {
        match self.replacing(name) {
            Some(merger) => {
                let base = self.0.source.dense(self.in_base(name)?)?;
                merger.merge(name, base.to_dtype(DType::F32)).map(Stored::Dense)
            }
            None => self.0.source.weight(self.in_base(name)?),
        }
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<Tensor> {
        let (first, base) = (rows.start, self.0.source.rows(self.in_base(name)?, rows)?);
        match self.replacing(name) {
            Some(merger) => merger.merge_rows(name, first, base.to_dtype(DType::F32)),
            None => Ok(base),
        }
    }

    fn place(&self, name: &str) -> String {
        self.0.source.place(name)
    }
}

/// A batch on its way through the layers.
struct Traveller {
    /// Hidden states `[B S, hidden]`.
    x: Tensor,
    positions: Tensor,
    spans: Tensor,
    tables: Tensor,
}

/// What a model made of batches, and its head.
pub struct Swept<'a> {
    weights: Replaced<'a>,
    compute: Compute,
    head: &'static str,
    /// The final hidden states after the last LayerNorm, `[B S, hidden]`, of each batch.
    pub hidden: Vec<Tensor>,
}

/// Runs `batches` through the layers of `subject`, without dropout; `see` is told of each layer before it is loaded.
///
/// In memory are one layer, the activations of the largest batch, and the hidden states of all.
///
/// # Errors
/// A batch does not fit the model; a weight cannot be read; a hidden state is not finite, with the layer that made it; what `see`
/// returns.
pub fn sweep<'a>(
    subject: Subject<'a>,
    compute: Compute,
    batches: &[Batch],
    see: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Swept<'a>> {
    let weights = Replaced(subject);
    let head = match weights.separate_head()? {
        true => LM_HEAD,
        false => WORD_EMBEDDINGS,
    };
    let options = &LoadOptions {
        compute,
        ..LoadOptions::default()
    };
    let loader = Loader {
        source: &weights,
        options,
    };
    let config = subject.source.config();
    let mut travellers = embed(&loader, batches)?;
    for layer in 0..config.num_layers {
        see(layer)?;
        let mut block = loader.block(layer, config)?;
        if let Some(adapters) = subject.adapters {
            account("adapters", || adapters.put_on(layer, &mut block, compute))?;
        }
        let place = |part: &str| weights.place(&format!("transformer.layers.{layer}.{part}.weight"));
        through(&block, &mut travellers, compute, &place)?;
    }
    let norm = loader.norm("transformer.final_layernorm", config.layernorm_epsilon)?;
    let hidden = travellers.into_iter().map(|traveller| {
        let (rows, hidden) = traveller.x.shape().rows_and_columns();
        let mut out = NormActivations::new(compute, rows, hidden)?;
        norm.forward(&traveller.x, &mut out)?;
        refuse_non_finite(&weights.place("transformer.final_layernorm.weight"), &out.y)?;
        Ok(out.y)
    });
    let hidden = hidden.collect::<Result<_>>()?;
    Ok(Swept {
        weights,
        compute,
        head,
        hidden,
    })
}

/// The batches with the embeddings of their tokens. Of the matrix only the rows are read that they need.
fn embed(loader: &Loader<'_, Replaced<'_>>, batches: &[Batch]) -> Result<Vec<Traveller>> {
    let (weights, compute) = (loader.source, loader.options.compute);
    let config = weights.config();
    for batch in batches {
        check(batch, config)?;
    }
    let ids: BTreeSet<i32> = batches.iter().flat_map(|batch| &batch.ids).copied().collect();
    let ids: Vec<i32> = ids.into_iter().collect();
    let table = account("embedding", || rows_at(weights, &ids))?;
    let table = table.to_device_as(compute.device, compute.dtype)?;
    refuse_non_finite(&weights.place(WORD_EMBEDDINGS), &table)?;
    let travel = |batch: &Batch| -> Result<Traveller> {
        let rows = batch.size * batch.len;
        let indices = |values: &[i32], shape: &[usize]| -> Result<Tensor> {
            Tensor::from_slice(values, shape).into_device(compute.device)
        };
        // Every id is one of the table's.
        let places = batch.ids.iter().filter_map(|id| ids.binary_search(id).ok());
        let places: Vec<i32> = places.map(|place| place as i32).collect();
        let mut x = compute.zeros([rows, config.hidden_size])?;
        ops::embedding(&table, &indices(&places, &[rows])?, &mut x)?;
        Ok(Traveller {
            x,
            positions: indices(&batch.positions, &[rows, 2])?,
            spans: indices(&glm::span_indices(&batch.spans), &[batch.size, 2])?,
            tables: glm::rope_tables(compute, config.head_dim(), batch.len + 1)?,
        })
    };
    account("hidden states", || batches.iter().map(travel).collect())
}

/// As [`super::Workspace`] checks what it is given.
fn check(batch: &Batch, config: &ModelConfig) -> Result<()> {
    let rows = batch.size * batch.len;
    let consistent = rows > 0
        && batch.ids.len() == rows
        && batch.positions.len() == 2 * rows
        && batch.spans.len() == batch.size
        && glm::spans_fit(&batch.spans, batch.len);
    if !consistent {
        return Err(Error::Shape {
            operation: "sweep",
            found: format!("{} sequences of {} tokens", batch.size, batch.len),
            expected: "at least one token, with all arrays".to_string(),
        });
    }
    glm::check_indices("sweep", "token id", &batch.ids, config.vocab_size)?;
    glm::check_indices("sweep", "position", &batch.positions, batch.len + 1)
}

/// The embeddings of `ids`, which ascend, in the type of the file.
fn rows_at(weights: &Replaced<'_>, ids: &[i32]) -> Result<Tensor> {
    let mut table: Option<Tensor> = None;
    let mut filled = 0;
    let mut rest = ids;
    while let Some(&first) = rest.first() {
        let first = first as usize;
        let count = rest.partition_point(|&id| (id as usize) < first + PIECE);
        let (piece, after) = rest.split_at(count);
        rest = after;
        let last = piece.last().map_or(first, |&id| id as usize);
        let rows = weights.rows(WORD_EMBEDDINGS, first..last + 1)?;
        let (_, columns) = rows.shape().rows_and_columns();
        let width = columns * rows.dtype().size();
        let table = table.get_or_insert_with(|| Tensor::zeros(rows.dtype(), [ids.len(), columns]));
        for &id in piece {
            let row = &rows.bytes()[(id as usize - first) * width..][..width];
            table.bytes_mut()[filled * width..][..width].copy_from_slice(row);
            filled += 1;
        }
    }
    table.ok_or_else(|| Error::Shape {
        operation: "sweep",
        found: "no batch".to_string(),
        expected: "at least one".to_string(),
    })
}

/// Every batch through one layer.
fn through(
    block: &Block,
    travellers: &mut [Traveller],
    compute: Compute,
    place: &(dyn Fn(&str) -> String + Sync),
) -> Result<()> {
    let rows = travellers.iter().map(|t| t.x.extent(0)).max().unwrap_or(0);
    let (_, hidden) = block.attention.query_key_value.extents();
    let linears = block.linears();
    let linears = linears.iter().map(|(_, linear)| *linear);
    let (mut activations, mut scratch, mut out) = account("transients", || -> Result<_> {
        Ok((
            block.activations(compute, rows)?,
            Scratch::new(compute, rows, linears)?,
            compute.zeros([rows, hidden])?,
        ))
    })?;
    ops::pass(compute.device, || {
        for traveller in travellers {
            let geometry = Geometry {
                spans: &traveller.spans,
                positions: &traveller.positions,
                tables: &traveller.tables,
                prefix: None,
            };
            block.forward(
                &traveller.x,
                None,
                geometry,
                Keys::Own,
                BlockDropout::OFF,
                &mut activations,
                &mut scratch,
                &mut out,
            )?;
            if ops::non_finite(&out)?.is_some() {
                let part = first_non_finite(&activations)?.unwrap_or("mlp.dense_4h_to_h");
                return refuse_non_finite(&place(part), &out);
            }
            traveller.x.copy_from(&out)?;
        }
        Ok(())
    })
}

/// The first module of a block whose output is not finite; attention without weights of its own counts as its linear.
fn first_non_finite(activations: &BlockActivations) -> Result<Option<&'static str>> {
    for (name, tensor) in activations.named() {
        if ops::non_finite(tensor)?.is_some() {
            return Ok(Some(match name {
                "attention.context" => "attention.query_key_value",
                "mlp.gelu" => "mlp.dense_h_to_4h",
                name => name,
            }));
        }
    }
    Ok(None)
}

/// A NaN is an error that names the weight behind it, and never a number in a table.
fn refuse_non_finite(place: &str, tensor: &Tensor) -> Result<()> {
    let Some((_, count)) = ops::non_finite(tensor)? else {
        return Ok(());
    };
    Err(Error::input(
        place,
        format!("{count} NaN or infinite values in what it makes of the prompts"),
        "finite values",
        "the file or an adapter is damaged: check both with `glmtune inspect`, or compute with --dtype fp32",
    ))
}

impl Swept<'_> {
    /// V.
    pub fn vocabulary(&self) -> usize {
        self.weights.config().vocab_size
    }

    /// A panel of the output matrix: the rows `classes`.
    ///
    /// # Errors
    /// It cannot be read, or the device has no room.
    pub fn panel(&self, classes: Range<usize>) -> Result<Tensor> {
        let stored = account("head", || self.weights.rows(self.head, classes))?;
        stored.to_device_as(self.compute.device, self.compute.dtype)
    }

    /// `[R, C]`: the logits of the C classes of `panel` for the hidden states `x [R, hidden]`, in the type of sums, on the host.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn logits(&self, x: &Tensor, panel: &Tensor) -> Result<Tensor> {
        let head = HeadRef::Here(WeightRef::Dense(panel));
        let mut logits = self.compute.accumulators([x.extent(0), panel.extent(0)])?;
        let mut scratch = HeadScratch::new(self.compute, head, 0)?;
        ops::head_logits(x, head, &mut scratch, &mut logits)?;
        logits.into_device(crate::tensor::Device::Cpu)
    }

    /// The final hidden states of some positions of one batch, `[R, hidden]`.
    ///
    /// # Errors
    /// A position lies outside the batch.
    pub fn positions(&self, batch: usize, positions: &[i32]) -> Result<Tensor> {
        let hidden = &self.hidden[batch];
        let (_, columns) = hidden.shape().rows_and_columns();
        let mut x = self.compute.zeros([positions.len(), columns])?;
        let rows = Tensor::from_slice(positions, [positions.len()]).into_device(self.compute.device)?;
        ops::gather_rows(hidden, &rows, &mut x)?;
        Ok(x)
    }

    /// `file: tensor` of the output matrix, for messages.
    pub fn place_of_head(&self) -> String {
        self.weights.place(self.head)
    }
}
