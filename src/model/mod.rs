//! The model: embedding, blocks, final norm, head; forward, backward, loading.

mod activations;
pub mod by_layer;
pub mod cache;
pub mod config;
pub mod glm;
mod head;
mod load;
mod policy;
mod save;
mod skeleton;
mod stream;
pub mod sweep;
mod trace;
pub mod tune;
pub mod workspace;

pub use by_layer::{ByLayer, Layer, LayerGradients};
pub use cache::{KvCache, PrefixKeys, ReadPrompt};
pub use config::{Linears, ModelConfig, RowScaled};
use head::StoredHead;
pub use load::{EmbeddingPlace, HeadStorage, LoadOptions, LoadedFrom, Weights};
pub use policy::{LayerPolicy, Recompute};
pub use trace::LayerPass;
use workspace::HeadBuffers;
pub use workspace::Workspace;

use crate::data::batch::Batch;
use crate::error::Result;
use crate::nn::{Keys, LayerNorm, Linear, NormActivations, Param, PrefixActivations, PrefixEncoder};
use crate::ops;
use crate::rng::Stream;
use crate::tensor::{Compute, DType, Device, check_memory};
use activations::Lent;
use by_layer::Together;
use glm::{Block, BlockDropout};

/// ChatGLM-6B, with or without adapters.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    compute: Compute,
    embedding: Param,
    blocks: Vec<Block>,
    final_layernorm: LayerNorm,
    /// The output matrix when it is dense and not the embedding.
    lm_head: Option<Param>,
    /// The output matrix when it is held in another form; there is no `lm_head` beside it.
    stored_head: Option<StoredHead>,
    /// Of P-Tuning v2.
    prefix: Option<PrefixEncoder>,
    /// NEFTune's alpha; 0 is off.
    neftune: f64,
    /// Of weights that train whole.
    storage: tune::Storage,
}

/// The summed negative log-likelihood of supervised tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Loss {
    /// `Σ -ln p(label)`, in nats.
    pub nll_sum: f64,
    /// The number of supervised tokens.
    pub tokens: usize,
}

impl Loss {
    /// Nats a token; NaN when nothing was supervised.
    pub fn mean(&self) -> f64 {
        self.nll_sum / self.tokens as f64
    }
}

/// How well the model foresaw one supervised token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// `ln p(label)`, in nats.
    pub log_prob: f64,
    /// Was no other token more probable?
    pub correct: bool,
}

impl Model {
    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The compute type.
    pub fn dtype(&self) -> DType {
        self.compute.dtype
    }

    /// Where the model computes.
    pub fn device(&self) -> Device {
        self.compute.device
    }

    /// Where the model computes, and in which type.
    pub fn compute(&self) -> Compute {
        self.compute
    }

    /// Adds noise to the embeddings in training (NEFTune, Jain et al. 2023): uniform in `±alpha / sqrt(S H)`, S being the
    /// padded length of the batch, as in transformers. 0 turns it off.
    ///
    /// # Errors
    /// Alpha is negative or not finite.
    pub fn set_neftune(&mut self, alpha: f64) -> Result<()> {
        if !alpha.is_finite() || alpha < 0.0 {
            let remedy = "use 5 to 15, or 0 for none";
            return Err(crate::error::Error::input(
                "--neftune-alpha",
                alpha,
                "at least 0",
                remedy,
            ));
        }
        self.neftune = alpha;
        Ok(())
    }

    /// The linears of all blocks, in the order of the forward pass.
    fn linears(&self) -> impl Iterator<Item = &Linear> + Clone {
        let named = self.blocks.iter().flat_map(Block::linears);
        named.map(|(_, linear)| linear)
    }

    /// [`Model::workspace_with`] layers that keep everything that a product made.
    ///
    /// # Errors
    /// As there.
    pub fn workspace(&self, max_size: usize, max_len: usize) -> Result<Workspace> {
        self.workspace_with(max_size, max_len, &[])
    }

    /// Room for the activations of up to `max_size` sequences of up to `max_len` tokens, layer by layer as `policies` says;
    /// a layer beyond the last one is as [`LayerPolicy::default`]. Made after [`tune::apply`], since adapters have activations
    /// too and layers that nothing below trains keep none.
    ///
    /// # Errors
    /// Either is 0, there are more policies than layers, or there is not enough memory.
    pub fn workspace_with(
        &self,
        max_size: usize,
        max_len: usize,
        policies: &[LayerPolicy],
    ) -> Result<Workspace> {
        if max_size == 0 || max_len == 0 {
            return Err(crate::error::Error::input(
                "workspace",
                format!("{max_size} sequences of {max_len} tokens"),
                "at least one token",
                "check the data",
            ));
        }
        if policies.len() > self.blocks.len() {
            return Err(crate::error::Error::input(
                "workspace",
                format!("policies of {} layers", policies.len()),
                format!("at most {}", self.blocks.len()),
                "give each layer one",
            ));
        }
        let config = self.config();
        let (hidden, inner) = (config.hidden_size, config.inner_hidden_size);
        let lowest = self.lowest_layer().unwrap_or(config.num_layers);
        let policy = |i: usize| policies.get(i).copied().unwrap_or_default();
        let kept = (lowest..config.num_layers).map(|i| policy(i).recompute.values(hidden, inner));
        // Beside what layers keep: about twice all that one makes, for the set they share and the gradients.
        let row = kept.sum::<usize>() + 2 * (8 * hidden + 2 * inner);
        if self.device() == Device::Cpu {
            let rows = (row * self.dtype().size()) as u128 * max_size as u128 * max_len as u128;
            check_memory(
                &format!("activations of {max_size} sequences of {max_len} tokens"),
                rows + self.prefix_bytes(max_size) as u128,
                "lower --micro-batch-size or --max-length",
            )?;
        }
        Workspace::new(self, max_size, max_len, policies)
    }

    /// What the workspace holds for a prefix: a layer's keys and values with their gradients, and the table of a projection
    /// with its own.
    fn prefix_bytes(&self, size: usize) -> usize {
        let Some(prefix) = &self.prefix else { return 0 };
        let (hidden, layers) = (self.config.hidden_size, self.config.num_layers);
        let each = if prefix.dropout > 0.0 { size } else { 1 };
        let table = if prefix.projection.is_some() {
            4 * layers + 3
        } else {
            0
        };
        (4 * each + table) * prefix.len() * hidden * self.dtype().accumulator().size()
    }

    /// Runs the batch through all blocks and the final norm. With the stream of a training pass, dropout drops and `ws` keeps
    /// what a backward pass needs.
    ///
    /// # Errors
    /// The batch does not fit the workspace, or an id lies outside the vocabulary.
    pub fn forward(&self, ws: &mut Workspace, batch: &Batch, dropout: Option<Stream>) -> Result<()> {
        ws.load(batch)?;
        self.forward_loaded(ws, dropout, &mut |_| Ok(()))
    }

    /// [`Model::forward_seen`] of the batch that the workspace holds.
    fn forward_loaded(
        &self,
        ws: &mut Workspace,
        pass: Option<Stream>,
        see: &mut dyn FnMut(LayerPass<'_>) -> Result<()>,
    ) -> Result<()> {
        ws.weights.begin(&self.blocks)?;
        ws.pass = pass;
        let size = ws.spans.extent(0);
        let x = ws.activations.first();
        self.embed(&ws.host_ids, &ws.ids, ws.embedded.as_mut(), x)?;
        if let Some(pass) = pass.filter(|_| self.neftune > 0.0) {
            let bound = self.neftune / ((x.extent(0) / size * self.config.hidden_size) as f64).sqrt();
            ops::accumulate_noise(bound, glm::noise_stream(pass), x)?;
        }
        let of_prefix = pass.map(glm::prefix_dropout);
        if let (Some(encoder), Some(prefix)) = (&self.prefix, &mut ws.prefix) {
            encoder.forward(prefix)?;
        }
        for (i, block) in self.blocks.iter().enumerate() {
            if let (Some(encoder), Some(prefix)) = (&self.prefix, &mut ws.prefix) {
                encoder.layer(i, size, of_prefix, prefix)?;
            }
            let geometry = crate::nn::Geometry {
                spans: &ws.spans,
                positions: &ws.positions,
                tables: &ws.tables,
                prefix: ws.prefix.as_ref().map(PrefixActivations::prefix),
            };
            let dropout = pass.map_or(BlockDropout::OFF, |base| BlockDropout::new(base, i));
            let fetched = ws.weights.take(&self.blocks, i, Some(i + 1))?;
            let scratch = &mut ws.scratch;
            ws.activations.with_layer(i, |lent| {
                let Lent {
                    x, activations, out, ..
                } = lent;
                block.forward(
                    x,
                    fetched,
                    geometry,
                    Keys::Own,
                    dropout,
                    activations,
                    scratch,
                    out,
                )?;
                see(LayerPass {
                    layer: i,
                    x,
                    activations,
                    out,
                })
            })?;
            if pass.is_some() {
                ws.activations.store(i)?;
            }
        }
        self.final_layernorm
            .forward(ws.activations.last(), &mut ws.final_layernorm)
    }

    /// Cross-entropy over the labelled rows of the last forward pass.
    fn head_loss(&self, ws: &mut Workspace) -> Result<Loss> {
        let tokens = ws.targets.elements();
        if tokens == 0 {
            return Ok(Loss::default());
        }
        ops::gather_rows(&ws.final_layernorm.y, &ws.labelled, &mut ws.head.x)?;
        let HeadBuffers {
            x,
            scratch,
            statistics,
            spent,
            ..
        } = &mut ws.head;
        *spent = false;
        let nll_sum = ops::head_loss(x, self.head(), &ws.targets, scratch, statistics)?;
        Ok(Loss { nll_sum, tokens })
    }

    /// The loss of a batch, without dropout.
    ///
    /// # Errors
    /// As [`Model::forward`]; a label lies outside the vocabulary.
    pub fn loss(&self, ws: &mut Workspace, batch: &Batch) -> Result<Loss> {
        ops::pass(self.device(), || {
            self.forward(ws, batch, None)?;
            self.head_loss(ws)
        })
    }

    /// [`Model::loss`] token by token: the score of every supervised token, in the order of the batch's labels.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn token_scores(&self, ws: &mut Workspace, batch: &Batch) -> Result<Vec<TokenScore>> {
        self.loss(ws, batch)?;
        let HeadBuffers {
            statistics, scores, ..
        } = &mut ws.head;
        scores.resize(statistics.shape())?;
        scores.copy_from(statistics)?;
        let scores = scores.to_f64_vec();
        let rows = scores.chunks_exact(ops::STATISTICS);
        Ok(rows
            .map(|s| TokenScore {
                log_prob: s[2] - s[0] - s[1].ln(),
                correct: s[2] >= s[0],
            })
            .collect())
    }

    /// The loss of a batch; adds `scale * d(nll_sum)/dθ` to the gradient of every parameter that has one.
    ///
    /// `dropout` numbers this forward pass: each adapter draws its mask from a stream derived from it.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn loss_and_gradients(
        &mut self,
        ws: &mut Workspace,
        batch: &Batch,
        scale: f64,
        dropout: Stream,
    ) -> Result<Loss> {
        self.check_gradients()?;
        ops::pass(self.device(), || {
            self.forward(ws, batch, Some(dropout))?;
            let loss = self.head_loss(ws)?;
            if loss.tokens > 0 {
                self.backward(ws, scale, dropout, &mut Together)?;
            }
            Ok(loss)
        })
    }

    fn backward(
        &mut self,
        ws: &mut Workspace,
        scale: f64,
        dropout: Stream,
        by_layer: &mut (dyn ByLayer + Send),
    ) -> Result<()> {
        let layers = self.blocks.len();
        let rows_shape = ws.activations.last().shape();
        let d_final = &mut ws.backward.d_norm;
        d_final.resize(rows_shape)?;

        by_layer.begin(self, Layer::Head)?;
        // The gradient of the head's own matrix or, when tied, of the embedding is taken away while the matrix is read.
        let dense = self.lm_head.as_mut().unwrap_or(&mut self.embedding);
        let mut grad = match &self.stored_head {
            Some(_) => None,
            None => dense.grad.take(),
        };
        let HeadBuffers {
            x,
            scratch,
            statistics,
            dx,
            spent,
            ..
        } = &mut ws.head;
        *spent = true;
        let done = ops::head_loss_backward(
            x,
            self.head(),
            &ws.targets,
            scale,
            (scratch, statistics),
            dx,
            grad.as_mut(),
        );
        if let Some(grad) = grad {
            let dense = self.lm_head.as_mut().unwrap_or(&mut self.embedding);
            dense.grad = Some(grad);
        }
        done?;
        ops::scatter_rows(&ws.head.dx, &ws.labelled, d_final)?;

        let embedding_trains = self.embedding.trains();
        let lowest = self.lowest_layer();
        let wanted = lowest.is_some();
        // The head has read the norm's output.
        let NormActivations { y: d, stats } = &mut ws.final_layernorm;
        let dx = if wanted { Some(&mut *d) } else { None };
        self.final_layernorm
            .backward(ws.activations.last(), d_final, stats, dx)?;
        by_layer.end(self, Layer::Head)?;
        let Some(lowest) = lowest else { return Ok(()) };
        ws.activations.check_kept(lowest)?;
        let size = ws.spans.extent(0);
        let of_prefix = Some(glm::prefix_dropout(dropout));
        if let (Some(encoder), Some(prefix)) = (&self.prefix, &mut ws.prefix) {
            encoder.begin_backward(prefix)?;
        }
        for i in (lowest..layers).rev() {
            by_layer.begin(self, Layer::Block(i))?;
            let (mut prefix, mut gradients) = (None, None);
            if let (Some(encoder), Some(activations)) = (&self.prefix, &mut ws.prefix) {
                encoder.layer(i, size, of_prefix, activations)?;
                let (taken, over) = activations.prefix_and_gradients()?;
                (prefix, gradients) = (Some(taken), over);
            }
            let geometry = crate::nn::Geometry {
                spans: &ws.spans,
                positions: &ws.positions,
                tables: &ws.tables,
                prefix,
            };
            let buffers = (&mut ws.scratch, &mut ws.backward);
            let dropout = BlockDropout::new(dropout, i);
            let propagate = i > lowest || embedding_trains;
            let below = i.checked_sub(1).filter(|&below| below >= lowest);
            let fetched = ws.weights.take(&self.blocks, i, below)?;
            let block = &mut self.blocks[i];
            ws.activations.with_layer(i, |lent| {
                let Lent {
                    recompute,
                    x,
                    activations,
                    ..
                } = lent;
                block.backward(
                    x,
                    fetched,
                    geometry,
                    gradients,
                    dropout,
                    recompute,
                    activations,
                    buffers,
                    d,
                    propagate,
                )
            })?;
            if let (Some(encoder), Some(prefix)) = (&mut self.prefix, &mut ws.prefix) {
                encoder.backward_layer(i, of_prefix, prefix)?;
            }
            ws.activations.fetch_next(i)?;
            by_layer.end(self, Layer::Block(i))?;
        }
        by_layer.begin(self, Layer::Embedding)?;
        if let (Some(encoder), Some(prefix)) = (&mut self.prefix, &mut ws.prefix) {
            encoder.backward(prefix)?;
        }
        if let Some(grad) = &mut self.embedding.grad {
            ops::embedding_backward(d, &ws.ids, grad)?;
        }
        by_layer.end(self, Layer::Embedding)
    }

    /// Sets every gradient to 0.
    ///
    /// # Errors
    /// The device refuses.
    pub fn zero_gradients(&mut self) -> Result<()> {
        let mut gradients = Vec::new();
        self.for_each_param_mut(&mut |_, param| {
            gradients.extend(&mut param.grad);
            Ok(())
        })?;
        ops::zero_all(&mut gradients)
    }

    /// Visits every parameter in a fixed order, by its name in the checkpoint (adapters: by PEFT's name). Weights in 4
    /// bits are not parameters.
    pub fn for_each_param<'a>(&'a self, f: &mut dyn FnMut(&str, &'a Param)) {
        f("transformer.word_embeddings.weight", &self.embedding);
        for (i, block) in self.blocks.iter().enumerate() {
            block.for_each_param(&format!("transformer.layers.{i}"), f);
        }
        self.final_layernorm
            .for_each_param("transformer.final_layernorm", f);
        if let Some(head) = &self.lm_head {
            f("lm_head.weight", head);
        }
        if let Some(prefix) = &self.prefix {
            prefix.for_each_param(f);
        }
    }

    /// [`Model::for_each_param`] with something that can fail; stops at the first error.
    ///
    /// # Errors
    /// Whatever `f` returns.
    pub fn try_for_each_param<'a>(&'a self, f: &mut dyn FnMut(&str, &'a Param) -> Result<()>) -> Result<()> {
        let mut result = Ok(());
        self.for_each_param(&mut |name, param| {
            if result.is_ok() {
                result = f(name, param);
            }
        });
        result
    }

    /// [`Model::for_each_param`], to change them; stops at the first error.
    ///
    /// # Errors
    /// Whatever `f` returns.
    pub fn for_each_param_mut<'a>(
        &'a mut self,
        f: &mut dyn FnMut(&str, &'a mut Param) -> Result<()>,
    ) -> Result<()> {
        f("transformer.word_embeddings.weight", &mut self.embedding)?;
        for (i, block) in self.blocks.iter_mut().enumerate() {
            block.for_each_param_mut(&format!("transformer.layers.{i}"), f)?;
        }
        self.final_layernorm
            .for_each_param_mut("transformer.final_layernorm", f)?;
        if let Some(head) = &mut self.lm_head {
            f("lm_head.weight", head)?;
        }
        match &mut self.prefix {
            Some(prefix) => prefix.for_each_param_mut(f),
            None => Ok(()),
        }
    }

    /// Bytes of weights that one decode step reads: all of them, but of a separate embedding only the rows of its tokens,
    /// which are not counted.
    pub fn decode_bytes(&self) -> usize {
        let mut bytes = 0;
        self.for_each_param(&mut |name, param| {
            // The keys and values of a prefix are read, which are made of its parameters once.
            let separate = self.lm_head.is_some() || self.stored_head.is_some();
            let read = !separate || name != "transformer.word_embeddings.weight";
            if read && !name.starts_with(crate::nn::PREFIX_ENCODER) {
                bytes += param.operand().byte_len();
            }
        });
        bytes += self.stored_head.as_ref().map_or(0, StoredHead::bytes);
        for (_, linear) in self.blocks.iter().flat_map(Block::linears) {
            bytes += match &linear.weight {
                crate::nn::Weight::Dense(_) => 0,
                crate::nn::Weight::Quant(weight) => weight.bytes(),
                crate::nn::Weight::Int8(weight) => weight.bytes(),
            };
        }
        bytes
    }
}
