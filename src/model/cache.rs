//! Generation: keys and values of the positions so far.
//!
//! Inside its context ChatGLM-6B attends both ways: the keys of every position depend on the whole prompt. So nothing of two
//! different prompts can be shared, nor of two turns of a conversation; only sequences with the very same prompt share what was read
//! ([`Model::read`], [`Model::fork`]).

use std::sync::Arc;

use super::Model;
use super::glm::{self, BlockActivations, BlockDropout};
use super::stream::WeightSlots;
use crate::data::batch::{Batch, Span};
use crate::error::{Error, Result};
use crate::nn::{Geometry, Keys, NormActivations, PrefixEncoder, Scratch};
use crate::ops::{self, HeadScratch, Prefix};
use crate::tensor::{Compute, Device, Tensor, check_memory};

/// Rotated keys and values of every layer, for `size` sequences of up to `capacity` positions.
#[derive(Debug)]
pub struct KvCache {
    size: usize,
    capacity: usize,
    len: usize,
    /// Keys and values `[B, capacity, hidden]` of each layer.
    layers: Vec<(Tensor, Tensor)>,
    prefix: PrefixKeys,
    /// Did the keys of the prefix come with the cache? Else they are made when a prompt comes in.
    prefix_made: bool,
    spans: Tensor,
    /// Position and block position of the last token of each sequence.
    last: Vec<[i32; 2]>,
    tables: Tensor,
    buffers: Option<Buffers>,
    weights: WeightSlots,
}

/// Keys and values `[1, heads, P, d]` of a prefix, for each layer; empty without a prefix. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct PrefixKeys(Arc<Vec<(Tensor, Tensor)>>);

impl PrefixKeys {
    /// Room for those of `model`.
    fn room(model: &Model) -> Result<Self> {
        let Some(encoder) = &model.prefix else {
            return Ok(Self::default());
        };
        let (compute, config) = (model.compute(), model.config());
        let shape = [1, config.num_attention_heads, encoder.len(), config.head_dim()];
        let layers = (model.blocks.iter()).map(|_| Ok((compute.zeros(shape)?, compute.zeros(shape)?)));
        Ok(Self(Arc::new(layers.collect::<Result<_>>()?)))
    }

    /// Makes them of the encoder of `model`; what clones share is not touched.
    fn make(&mut self, model: &Model) -> Result<()> {
        match (&model.prefix, Arc::get_mut(&mut self.0)) {
            (Some(encoder), Some(layers)) => encoder.fill(model.compute, layers),
            _ => Ok(()),
        }
    }
}

/// A prompt that has been read on its own: what its sequences begin with.
#[derive(Debug)]
pub struct ReadPrompt {
    /// Keys and values `[1, len, hidden]` of each layer.
    layers: Vec<(Tensor, Tensor)>,
    len: usize,
    context: usize,
    last: [i32; 2],
    /// What the layers made of the last token, `[1, hidden]`.
    hidden: Tensor,
}

/// Activations of one forward pass; one block's serve all layers.
#[derive(Debug)]
struct Buffers {
    rows: usize,
    ids: Tensor,
    positions: Tensor,
    hidden: [Tensor; 2],
    /// Rows of an embedding that stays in host memory.
    embedded: Option<Tensor>,
    block: BlockActivations,
    final_layernorm: NormActivations,
    last_rows: Tensor,
    last: Tensor,
    logits: Tensor,
    head: HeadScratch,
    scratch: Scratch,
}

/// One set of buffers serves all layers: made, for each linear, for a layer that has an adapter there if any has one.
pub(super) fn shared_activations(model: &Model, compute: Compute, rows: usize) -> Result<BlockActivations> {
    let mut shared = model.blocks[0].activations(compute, rows)?;
    let BlockActivations { attention, mlp, .. } = &mut shared;
    for (i, place) in attention.linear.iter_mut().chain(&mut mlp.linear).enumerate() {
        let mut linears = model.blocks.iter().map(|block| block.linears()[i].1);
        if let Some(adapted) = linears.find(|linear| linear.lora.is_some()) {
            *place = adapted.activations(compute, rows)?;
        }
    }
    Ok(shared)
}

impl Buffers {
    fn new(model: &Model, size: usize, rows: usize) -> Result<Self> {
        let (compute, config) = (model.compute(), model.config());
        let hidden = config.hidden_size;
        Ok(Self {
            rows,
            ids: compute.indices([rows])?,
            positions: compute.indices([rows, 2])?,
            hidden: [compute.zeros([rows, hidden])?, compute.zeros([rows, hidden])?],
            embedded: model.embedding_staging(rows)?,
            block: shared_activations(model, compute, rows)?,
            final_layernorm: NormActivations::new(compute, size, hidden)?,
            last_rows: compute.indices([size])?,
            last: compute.zeros([size, hidden])?,
            logits: compute.accumulators([size, config.vocab_size])?,
            head: HeadScratch::new(compute, model.head(), 0)?,
            scratch: Scratch::new(compute, 0, model.linears())?,
        })
    }
}

impl KvCache {
    fn new(model: &Model, size: usize, capacity: usize, prefix: Option<&PrefixKeys>) -> Result<Self> {
        let (compute, config) = (model.compute(), model.config());
        let plane = || compute.zeros([size, capacity, config.hidden_size]);
        Ok(Self {
            size,
            capacity,
            len: 0,
            layers: (model.blocks.iter())
                .map(|_| Ok((plane()?, plane()?)))
                .collect::<Result<_>>()?,
            prefix: match prefix {
                Some(made) => made.clone(),
                None => PrefixKeys::room(model)?,
            },
            prefix_made: prefix.is_some(),
            spans: compute.indices([size, 2])?,
            last: Vec::with_capacity(size),
            tables: glm::rope_tables(compute, config.head_dim(), capacity + 1)?,
            buffers: None,
            weights: WeightSlots::new(model)?,
        })
    }

    /// Positions held so far, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Is nothing held yet?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions reserved for each sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets everything, to start another batch of the same size.
    pub fn clear(&mut self) {
        self.len = 0;
    }
}

impl Model {
    /// A cache for `size` sequences of up to `capacity` positions, padding included.
    ///
    /// # Errors
    /// Either is 0, or there is not enough memory.
    pub fn cache(&self, size: usize, capacity: usize) -> Result<KvCache> {
        self.checked_cache(size, capacity, None)
    }

    /// [`Model::cache`] with the keys of the prefix as [`Model::prefix_keys`] made them: of this model, as it is.
    ///
    /// # Errors
    /// As there.
    pub fn cache_with(&self, size: usize, capacity: usize, prefix: &PrefixKeys) -> Result<KvCache> {
        self.checked_cache(size, capacity, Some(prefix))
    }

    /// Keys and values of the prefix of P-Tuning v2, if there is one, for any number of caches.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn prefix_keys(&self) -> Result<PrefixKeys> {
        let mut keys = PrefixKeys::room(self)?;
        keys.make(self)?;
        Ok(keys)
    }

    fn checked_cache(&self, size: usize, capacity: usize, prefix: Option<&PrefixKeys>) -> Result<KvCache> {
        if size == 0 || capacity == 0 {
            return Err(Error::input(
                "cache",
                format!("{size} x {capacity}"),
                "at least 1 x 1",
                "give a prompt",
            ));
        }
        let config = self.config();
        if self.device() == Device::Cpu {
            let position = (2 * config.num_layers * config.hidden_size * self.dtype().size()) as u128;
            let own = self.prefix.as_ref().filter(|_| prefix.is_none());
            let keys_of_prefix = own.map_or(0, PrefixEncoder::len) as u128;
            check_memory(
                &format!("keys and values of {size} conversations of {capacity} tokens"),
                position * (size as u128 * capacity as u128 + keys_of_prefix),
                "lower --max-new-tokens, --max-length or --batch-size",
            )?;
        }
        KvCache::new(self, size, capacity, prefix)
    }

    /// Makes room for passes of `queries` tokens a sequence, which [`Model::prefill`] does otherwise.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn reserve(&self, cache: &mut KvCache, queries: usize) -> Result<()> {
        let rows = cache.size * queries;
        if cache.buffers.as_ref().is_none_or(|buffers| buffers.rows < rows) {
            cache.buffers = Some(Buffers::new(self, cache.size, rows)?);
        }
        Ok(())
    }

    /// Runs left-padded prompts; returns the logits after their last tokens, `[B, V]` on the host in the type of sums.
    ///
    /// # Errors
    /// The batch does not fit the cache, or an id lies outside the vocabulary.
    pub fn prefill(&self, cache: &mut KvCache, batch: &Batch) -> Result<Tensor> {
        self.begin(cache, batch)?;
        self.extend(cache, &batch.ids, &batch.positions)
    }

    /// Makes the cache ready to take a batch in.
    fn begin(&self, cache: &mut KvCache, batch: &Batch) -> Result<()> {
        if batch.size != cache.size || batch.len == 0 || !glm::spans_fit(&batch.spans, batch.len) {
            return Err(Error::Shape {
                operation: "Model::prefill",
                found: format!("{} sequences of {} tokens", batch.size, batch.len),
                expected: format!("{} sequences", cache.size),
            });
        }
        cache.len = 0;
        cache.spans.write(&glm::span_indices(&batch.spans))?;
        cache.last = batch
            .positions
            .chunks_exact(2 * batch.len)
            .map(|p| [p[2 * batch.len - 2], p[2 * batch.len - 1]])
            .collect();
        if !cache.prefix_made {
            cache.prefix.make(self)?;
        }
        Ok(())
    }

    /// Reads one prompt, for any number of sequences that begin with it.
    ///
    /// # Errors
    /// The batch is not a single prompt without padding, or as [`Model::prefill`].
    pub fn read(&self, prompt: &Batch, prefix: &PrefixKeys) -> Result<ReadPrompt> {
        let [span] = prompt.spans[..] else {
            return Err(one_prompt(prompt));
        };
        if span.start != 0 {
            return Err(one_prompt(prompt));
        }
        let mut cache = self.cache_with(1, prompt.len, prefix)?;
        self.begin(&mut cache, prompt)?;
        self.advance(&mut cache, &prompt.ids, &prompt.positions, false)?;
        // The other activations go: they are larger than keys and values.
        let hidden = cache.buffers.take().map(|buffers| buffers.last);
        Ok(ReadPrompt {
            layers: cache.layers,
            len: prompt.len,
            context: span.context,
            last: cache.last[0],
            hidden: hidden.ok_or_else(|| one_prompt(prompt))?,
        })
    }

    /// Begins every sequence of the cache with its prompt; returns the logits after them, `[B, V]` on the host in the type of sums.
    ///
    /// Keys and values have the bits that each prompt has when it is read alone. Those of [`Model::prefill`] of all of them differ from
    /// these at most in their last bits, where other kernels compute the products of more rows.
    ///
    /// # Errors
    /// There are more or fewer prompts than sequences, or they do not fit the cache.
    pub fn fork(&self, cache: &mut KvCache, prompts: &[&ReadPrompt]) -> Result<Tensor> {
        let len = prompts.iter().map(|prompt| prompt.len).max().unwrap_or(0);
        if prompts.len() != cache.size || len > cache.capacity {
            return Err(Error::Shape {
                operation: "Model::fork",
                found: format!("{} prompts of up to {len} tokens", prompts.len()),
                expected: format!("{} of up to {}", cache.size, cache.capacity),
            });
        }
        let hidden = self.config().hidden_size;
        self.reserve(cache, 1)?;
        let mut buffers = match cache.buffers.take() {
            Some(buffers) => buffers,
            None => Buffers::new(self, cache.size, cache.size)?,
        };
        buffers.last.resize([cache.size, hidden])?;
        let mut spans = Vec::with_capacity(cache.size);
        for (row, prompt) in prompts.iter().enumerate() {
            let start = len - prompt.len;
            let at = (row * cache.capacity + start) * hidden;
            for ((keys, values), (from_keys, from_values)) in cache.layers.iter_mut().zip(&prompt.layers) {
                keys.copy_range(at, from_keys, 0..prompt.len * hidden)?;
                values.copy_range(at, from_values, 0..prompt.len * hidden)?;
            }
            buffers.last.copy_range(row * hidden, &prompt.hidden, 0..hidden)?;
            let context = start + prompt.context;
            spans.push(Span { start, context });
        }
        cache.spans.write(&glm::span_indices(&spans))?;
        cache.last = prompts.iter().map(|prompt| prompt.last).collect();
        cache.len = len;
        let logits = ops::pass(self.device(), || self.logits_of_last(&mut buffers));
        cache.buffers = Some(buffers);
        logits
    }

    /// Appends one token to each sequence; returns the next logits, `[B, V]` on the host in the type of sums.
    ///
    /// # Errors
    /// The cache is full, or an id lies outside the vocabulary.
    pub fn decode(&self, cache: &mut KvCache, tokens: &[u32]) -> Result<Tensor> {
        for last in &mut cache.last {
            last[1] += 1;
        }
        let ids: Vec<i32> = tokens
            .iter()
            .map(|&t| i32::try_from(t).unwrap_or(i32::MAX))
            .collect();
        let positions: Vec<i32> = cache.last.iter().flatten().copied().collect();
        self.extend(cache, &ids, &positions)
    }

    fn extend(&self, cache: &mut KvCache, ids: &[i32], positions: &[i32]) -> Result<Tensor> {
        let logits = self.advance(cache, ids, positions, true)?;
        logits.ok_or_else(|| Error::input("generation", "no logits", "some", "this is a bug"))
    }

    /// Runs `ids` behind what the cache holds; with `head`, returns the logits after the last of each sequence.
    fn advance(
        &self,
        cache: &mut KvCache,
        ids: &[i32],
        positions: &[i32],
        head: bool,
    ) -> Result<Option<Tensor>> {
        let rows = ids.len();
        let queries = rows / cache.size;
        if queries == 0 || cache.len + queries > cache.capacity {
            return Err(Error::input(
                "generation",
                format!("{} tokens", cache.len + queries.max(1)),
                format!("at most {}", cache.capacity),
                "shorten the prompt or ask for fewer new tokens",
            ));
        }
        let mut buffers = match cache.buffers.take() {
            Some(buffers) if buffers.rows >= rows => buffers,
            _ => Buffers::new(self, cache.size, rows)?,
        };
        let device = self.device();
        let logits = ops::pass(device, || {
            self.layers_with(cache, &mut buffers, ids, positions, queries)?;
            head.then(|| self.logits_of_last(&mut buffers)).transpose()
        });
        cache.buffers = Some(buffers);
        cache.len += queries;
        logits
    }

    /// The layers; what they make of the last token of each sequence is left in `buffers.last`.
    fn layers_with(
        &self,
        cache: &mut KvCache,
        buffers: &mut Buffers,
        ids: &[i32],
        positions: &[i32],
        queries: usize,
    ) -> Result<()> {
        let rows = ids.len();
        let hidden = self.config().hidden_size;
        let Buffers {
            ids: id_tensor,
            positions: position_tensor,
            hidden: [x, out],
            ..
        } = buffers;
        glm::check_indices("generation", "token id", ids, self.config().vocab_size)?;
        glm::check_indices("generation", "position", positions, cache.tables.extent(0))?;
        cache.weights.begin(&self.blocks)?;
        id_tensor.resize([rows])?;
        id_tensor.write(ids)?;
        position_tensor.resize([rows, 2])?;
        position_tensor.write(positions)?;
        x.resize([rows, hidden])?;
        self.embed(ids, id_tensor, buffers.embedded.as_mut(), x)?;
        for (i, (block, (keys, values))) in self.blocks.iter().zip(&mut cache.layers).enumerate() {
            let geometry = Geometry {
                spans: &cache.spans,
                positions: position_tensor,
                tables: &cache.tables,
                prefix: cache
                    .prefix
                    .0
                    .get(i)
                    .map(|(keys, values)| Prefix { keys, values }),
            };
            let keys = Keys::Cache {
                keys,
                values,
                past: cache.len,
            };
            let fetched = cache.weights.take(&self.blocks, i, Some(i + 1))?;
            block.forward(
                x,
                fetched,
                geometry,
                keys,
                BlockDropout::OFF,
                &mut buffers.block,
                &mut buffers.scratch,
                out,
            )?;
            std::mem::swap(x, out);
        }
        let last_rows: Vec<i32> = (0..cache.size).map(|b| ((b + 1) * queries - 1) as i32).collect();
        buffers.last.resize([cache.size, hidden])?;
        buffers.last_rows.write(&last_rows)?;
        ops::gather_rows(x, &buffers.last_rows, &mut buffers.last)
    }

    /// Final norm and head of `buffers.last`.
    fn logits_of_last(&self, buffers: &mut Buffers) -> Result<Tensor> {
        self.final_layernorm
            .forward(&buffers.last, &mut buffers.final_layernorm)?;
        let last = &buffers.final_layernorm.y;
        ops::head_logits(last, self.head(), &mut buffers.head, &mut buffers.logits)?;
        buffers.logits.to_device(Device::Cpu)
    }
}

fn one_prompt(found: &Batch) -> Error {
    Error::Shape {
        operation: "Model::read",
        found: format!("{} sequences of {} tokens", found.size, found.len),
        expected: "one prompt without padding".to_string(),
    }
}
