//! The model: embedding, blocks, final norm, head; forward, backward, loading.

pub mod cache;
pub mod config;
pub mod glm;
mod load;
mod save;
pub mod tune;
pub mod workspace;

pub use cache::KvCache;
pub use config::ModelConfig;
pub use load::{LoadOptions, Weights};
use workspace::HeadBuffers;
pub use workspace::Workspace;

use crate::data::batch::Batch;
use crate::error::Result;
use crate::nn::{Keys, LayerNorm, Linear, Param, PrefixActivations, PrefixEncoder};
use crate::ops::{self, WeightRef};
use crate::rng::Stream;
use crate::tensor::{Compute, DType, Device, Tensor, check_memory};
use glm::{Block, BlockDropout};

/// ChatGLM-6B, with or without adapters.
#[derive(Debug)]
pub struct Model {
    config: ModelConfig,
    compute: Compute,
    embedding: Param,
    blocks: Vec<Block>,
    final_layernorm: LayerNorm,
    /// The output matrix when it is not the embedding.
    lm_head: Option<Param>,
    /// Of P-Tuning v2.
    prefix: Option<PrefixEncoder>,
    /// NEFTune's alpha; 0 is off.
    neftune: f64,
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

    /// The output matrix `[V, hidden]`.
    fn head(&self) -> &Tensor {
        self.lm_head.as_ref().map_or(&self.embedding.value, |p| &p.value)
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

    /// Room for the activations of up to `max_size` sequences of up to `max_len` tokens. Made after
    /// [`tune::apply`], since adapters have activations too.
    ///
    /// # Errors
    /// Either is 0, or there is not enough memory.
    pub fn workspace(&self, max_size: usize, max_len: usize) -> Result<Workspace> {
        if max_size == 0 || max_len == 0 {
            return Err(crate::error::Error::input(
                "workspace",
                format!("{max_size} sequences of {max_len} tokens"),
                "at least one token",
                "check the data",
            ));
        }
        let config = self.config();
        // Per token and layer: two norms, query_key_value, context, dense and hidden; both sides of the GELU.
        let row = (config.num_layers + 6) * (8 * config.hidden_size + 2 * config.inner_hidden_size);
        if self.device() == Device::Cpu {
            let rows = (row * self.dtype().size()) as u128 * max_size as u128 * max_len as u128;
            check_memory(
                &format!("activations of {max_size} sequences of {max_len} tokens"),
                rows + self.prefix_bytes(max_size) as u128,
                "lower --micro-batch-size or --max-length",
            )?;
        }
        Workspace::new(self, max_size, max_len)
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

    /// Runs the batch through all blocks and the final norm, keeping every activation in `ws`.
    ///
    /// # Errors
    /// The batch does not fit the workspace, or an id lies outside the vocabulary.
    pub fn forward(&self, ws: &mut Workspace, batch: &Batch, dropout: Option<Stream>) -> Result<()> {
        ws.load(batch)?;
        ops::embedding(&self.embedding.value, &ws.ids, &mut ws.hidden[0])?;
        if let Some(pass) = dropout.filter(|_| self.neftune > 0.0) {
            let bound = self.neftune / ((batch.len * self.config.hidden_size) as f64).sqrt();
            ops::accumulate_noise(bound, glm::noise_stream(pass), &mut ws.hidden[0])?;
        }
        let of_prefix = dropout.map(glm::prefix_dropout);
        if let (Some(encoder), Some(prefix)) = (&self.prefix, &mut ws.prefix) {
            encoder.forward(prefix)?;
        }
        for (i, block) in self.blocks.iter().enumerate() {
            let (before, after) = ws.hidden.split_at_mut(i + 1);
            if let (Some(encoder), Some(prefix)) = (&self.prefix, &mut ws.prefix) {
                encoder.layer(i, batch.size, of_prefix, prefix)?;
            }
            let geometry = crate::nn::Geometry {
                spans: &ws.spans,
                positions: &ws.positions,
                tables: &ws.tables,
                prefix: ws.prefix.as_ref().map(PrefixActivations::prefix),
            };
            let dropout = dropout.map_or(BlockDropout::OFF, |base| BlockDropout::new(base, i));
            block.forward(
                &before[i],
                geometry,
                Keys::Own,
                dropout,
                &mut ws.blocks[i],
                &mut ws.scratch,
                &mut after[0],
            )?;
        }
        self.final_layernorm
            .forward(&ws.hidden[self.blocks.len()], &mut ws.final_layernorm)
    }

    /// Logits of every position of the last [`Model::forward`], `[B S, V]`, in the type of sums.
    ///
    /// # Errors
    /// The device has no room.
    pub fn logits(&self, ws: &Workspace) -> Result<Tensor> {
        let rows = ws.final_hidden().extent(0);
        let mut logits = self.compute.accumulators([rows, self.config.vocab_size])?;
        ops::linear(
            ws.final_hidden(),
            WeightRef::Dense(self.head()),
            None,
            None,
            &mut logits,
        )?;
        Ok(logits)
    }

    /// Cross-entropy over the labelled rows of the last forward pass.
    fn head_loss(&self, ws: &mut Workspace) -> Result<Loss> {
        let tokens = ws.targets.elements();
        if tokens == 0 {
            return Ok(Loss::default());
        }
        ops::gather_rows(&ws.final_layernorm.y, &ws.labelled, &mut ws.head.x)?;
        let head = &mut ws.head;
        let weight = WeightRef::Dense(self.head());
        let nll_sum = ops::head_loss(
            &head.x,
            weight,
            &ws.targets,
            &mut head.logits,
            &mut head.statistics,
        )?;
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
        ops::pass(self.device(), || {
            self.forward(ws, batch, Some(dropout))?;
            let loss = self.head_loss(ws)?;
            if loss.tokens > 0 {
                self.backward(ws, scale, dropout)?;
            }
            Ok(loss)
        })
    }

    fn backward(&mut self, ws: &mut Workspace, scale: f64, dropout: Stream) -> Result<()> {
        let layers = self.blocks.len();
        let rows_shape = ws.hidden[layers].shape();
        ws.d.resize(rows_shape)?;
        ws.d_norm.resize(rows_shape)?;

        // The head's own matrix or, when tied, the embedding, which is taken apart so that value and gradient can be
        // borrowed at once.
        let head = self.lm_head.as_mut().unwrap_or(&mut self.embedding);
        let Param { value, grad } = head;
        let buffers = (&mut ws.head.logits, &ws.head.statistics);
        ops::head_loss_backward(
            &ws.head.x,
            WeightRef::Dense(value),
            &ws.targets,
            scale,
            buffers,
            &mut ws.head.dx,
            grad.as_mut(),
        )?;
        ops::scatter_rows(&ws.head.dx, &ws.labelled, &mut ws.d_norm)?;

        let embedding_trains = self.embedding.trains();
        let prefix_trains = self.prefix.as_ref().is_some_and(PrefixEncoder::trains);
        let lowest = if embedding_trains || prefix_trains {
            Some(0)
        } else {
            self.blocks.iter().position(Block::trains)
        };
        let wanted = lowest.is_some();
        let dx = if wanted { Some(&mut ws.d) } else { None };
        self.final_layernorm
            .backward(&ws.hidden[layers], &ws.d_norm, &ws.final_layernorm, dx)?;
        let Some(lowest) = lowest else { return Ok(()) };
        let size = ws.spans.extent(0);
        let of_prefix = Some(glm::prefix_dropout(dropout));
        if let (Some(encoder), Some(prefix)) = (&self.prefix, &mut ws.prefix) {
            encoder.begin_backward(prefix)?;
        }
        for i in (lowest..layers).rev() {
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
            self.blocks[i].backward(
                &ws.hidden[i],
                geometry,
                gradients,
                dropout,
                &ws.blocks[i],
                buffers,
                &mut ws.d,
                propagate,
            )?;
            if let (Some(encoder), Some(prefix)) = (&mut self.prefix, &mut ws.prefix) {
                encoder.backward_layer(i, of_prefix, prefix)?;
            }
        }
        if let (Some(encoder), Some(prefix)) = (&mut self.prefix, &mut ws.prefix) {
            encoder.backward(prefix)?;
        }
        if let Some(grad) = &mut self.embedding.grad {
            ops::embedding_backward(&ws.d, &ws.ids, grad)?;
        }
        Ok(())
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
            let read = self.lm_head.is_none() || name != "transformer.word_embeddings.weight";
            if read && !name.starts_with(crate::nn::PREFIX_ENCODER) {
                bytes += param.value.byte_len();
            }
        });
        for (_, linear) in self.blocks.iter().flat_map(Block::linears) {
            if let crate::nn::Weight::Quant(weight) = &linear.weight {
                bytes += weight.bytes();
            }
        }
        bytes
    }

    /// The first activation of the last forward pass, in the order of computation, that holds a value that is not a
    /// number or infinite; named after its module. A tensor that cannot be read counts as such.
    pub fn first_non_finite(&self, ws: &Workspace) -> Option<String> {
        let bad = |tensor: &Tensor| !matches!(ops::non_finite(tensor), Ok(None));
        if bad(&ws.hidden[0]) {
            return Some("transformer.word_embeddings".to_string());
        }
        for i in 0..self.blocks.len() {
            if let Some((name, _)) = ws.blocks[i].named().into_iter().find(|(_, tensor)| bad(tensor)) {
                return Some(format!("transformer.layers.{i}.{name}"));
            }
            if bad(&ws.hidden[i + 1]) {
                return Some(format!("transformer.layers.{i}.mlp.dense_4h_to_h"));
            }
        }
        if bad(&ws.final_layernorm.y) {
            return Some("transformer.final_layernorm".to_string());
        }
        bad(&ws.head.statistics).then(|| "lm_head".to_string())
    }
}
