//! A backward pass layer by layer: what is done with the gradients of a layer as soon as they are complete, and gradient
//! buffers that layers share because of it.
//!
//! Training every parameter of a model with plain gradients takes 4 bytes more for each. When a layer's parameters are
//! updated as soon as its backward pass has run (Lv et al. 2023, arXiv 2306.09782), the layers can take turns with the
//! buffers of one.

use super::glm::Block;
use super::{Loss, Model, Workspace};
use crate::data::batch::Batch;
use crate::error::{Error, Result};
use crate::nn::{PREFIX_ENCODER, Param, PrefixEncoder};
use crate::ops;
use crate::rng::Stream;
use crate::tensor::Tensor;
use crate::tensor::ledger::account;

/// A part of the model whose gradients a backward pass completes at once; in the order of the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// The final LayerNorm, and the output matrix if it is not the embedding.
    Head,
    /// A block.
    Block(usize),
    /// The embedding and the encoder of a prefix.
    Embedding,
}

impl Layer {
    /// Its place in the order of [`Model::layers`].
    pub fn place(self, model: &Model) -> usize {
        match self {
            Layer::Head => 0,
            Layer::Block(i) => model.blocks.len() - i,
            Layer::Embedding => model.blocks.len() + 1,
        }
    }
}

/// What is done around the backward pass of each layer.
pub trait ByLayer {
    /// Before the first gradient of `layer`.
    ///
    /// # Errors
    /// Whatever stops the backward pass.
    fn begin(&mut self, model: &mut Model, layer: Layer) -> Result<()>;

    /// When the gradients of `layer` are complete; nothing reads its parameters any more.
    ///
    /// # Errors
    /// Whatever stops the backward pass.
    fn end(&mut self, model: &mut Model, layer: Layer) -> Result<()>;
}

/// Every parameter has a gradient of its own, and all are looked at when the backward pass is over.
pub(super) struct Together;

impl ByLayer for Together {
    fn begin(&mut self, _: &mut Model, _: Layer) -> Result<()> {
        Ok(())
    }

    fn end(&mut self, _: &mut Model, _: Layer) -> Result<()> {
        Ok(())
    }
}

impl Model {
    /// Every layer, in the order of the backward pass.
    pub fn layers(&self) -> impl Iterator<Item = Layer> + use<> {
        let blocks = (0..self.blocks.len()).rev().map(Layer::Block);
        std::iter::once(Layer::Head)
            .chain(blocks)
            .chain([Layer::Embedding])
    }

    /// [`Model::for_each_param_mut`], of one layer.
    ///
    /// # Errors
    /// Whatever `f` returns.
    pub fn for_each_param_of_mut<'a>(
        &'a mut self,
        layer: Layer,
        f: &mut dyn FnMut(&str, &'a mut Param) -> Result<()>,
    ) -> Result<()> {
        match layer {
            Layer::Head => {
                self.final_layernorm
                    .for_each_param_mut("transformer.final_layernorm", f)?;
                match &mut self.lm_head {
                    Some(head) => f("lm_head.weight", head),
                    None => Ok(()),
                }
            }
            Layer::Block(i) => self.blocks[i].for_each_param_mut(&format!("transformer.layers.{i}"), f),
            Layer::Embedding => {
                f("transformer.word_embeddings.weight", &mut self.embedding)?;
                match &mut self.prefix {
                    Some(prefix) => prefix.for_each_param_mut(f),
                    None => Ok(()),
                }
            }
        }
    }

    /// The lowest layer that a backward pass reaches; none when nothing below the final norm trains.
    pub(super) fn lowest_layer(&self) -> Option<usize> {
        let prefix_trains = self.prefix.as_ref().is_some_and(PrefixEncoder::trains);
        if self.embedding.trains() || prefix_trains {
            Some(0)
        } else {
            self.blocks.iter().position(Block::trains)
        }
    }

    /// The loss of a batch, for [`Model::gradients_by_layer`] to follow.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn loss_to_learn(&self, ws: &mut Workspace, batch: &Batch, dropout: Stream) -> Result<Loss> {
        ops::pass(self.device(), || {
            self.forward(ws, batch, Some(dropout))?;
            self.head_loss(ws)
        })
    }

    /// The backward pass of the last [`Model::loss_to_learn`], which must have had a supervised token: the gradients of
    /// [`Model::loss_and_gradients`], with `by_layer` called around each layer. It may be run again, after another forward pass of its
    /// own when activations wait in host memory.
    ///
    /// # Errors
    /// As [`Model::loss_and_gradients`]; whatever `by_layer` returns.
    pub fn gradients_by_layer(
        &mut self,
        ws: &mut Workspace,
        scale: f64,
        dropout: Stream,
        by_layer: &mut (dyn ByLayer + Send),
    ) -> Result<()> {
        ops::pass(self.device(), || {
            if ws.head.spent {
                // The last backward pass has taken the places of these, and what it had come back from the host those of the
                // layers that it began with.
                if ws.activations.come_back() {
                    let pass = ws.pass;
                    self.forward_loaded(ws, pass, &mut |_| Ok(()))?;
                } else {
                    self.final_layernorm
                        .forward(ws.activations.last(), &mut ws.final_layernorm)?;
                }
                self.head_loss(ws)?;
            }
            self.backward(ws, scale, dropout, by_layer)
        })
    }

    /// A gradient that is missing is never taken for one that is 0.
    pub(super) fn check_gradients(&self) -> Result<()> {
        self.try_for_each_param(&mut |name, param| match param.trains() && param.grad.is_none() {
            true => Err(Error::Shape {
                operation: "Model::loss_and_gradients",
                found: format!("{name}, which trains with a gradient that is lent to it"),
                expected: "gradients of their own: see Model::gradients_by_layer".to_string(),
            }),
            false => Ok(()),
        })
    }
}

/// Gradient buffers that are lent to a layer while its backward pass runs.
///
/// The largest parameters of all layers share one buffer, the second largest the next, and so on. What gathers its gradient
/// from several layers keeps one of its own: a prefix, and an embedding that is the head too.
///
/// In ChatGLM-6B a block has 201,379,840 parameters: 806 MB for all blocks, and 2.14 GB for the embedding, which is the head.
#[derive(Debug)]
pub struct LayerGradients {
    /// Those that are not lent now, the largest first.
    buffers: Vec<Option<Tensor>>,
    /// Of each parameter that trains, the buffer that it borrows; for each layer in the order of [`Model::layers`].
    slots: Vec<Vec<Option<usize>>>,
    bytes: usize,
}

impl LayerGradients {
    /// Takes their gradients away from all parameters that can borrow one, and makes room for the gradients of one layer.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(model: &mut Model) -> Result<Self> {
        let compute = model.compute();
        let tied = model.lm_head.is_none();
        let (mut extents, mut slots): (Vec<usize>, _) = (Vec::new(), Vec::new());
        for layer in model.layers() {
            // The size of each parameter that trains, if it borrows its gradient.
            let mut sizes = Vec::new();
            model.for_each_param_of_mut(layer, &mut |name, param| {
                if !param.trains() {
                    return Ok(());
                }
                let gathers = name.starts_with(PREFIX_ENCODER) || (tied && layer == Layer::Embedding);
                if gathers {
                    sizes.push(None);
                    return param.own_gradient(compute.device);
                }
                param.grad = None;
                sizes.push(Some(param.value.elements()));
                Ok(())
            })?;
            let mut order: Vec<usize> = (0..sizes.len()).filter(|&i| sizes[i].is_some()).collect();
            order.sort_by_key(|&i| std::cmp::Reverse(sizes[i]));
            let mut of_layer = vec![None; sizes.len()];
            extents.resize(extents.len().max(order.len()), 0);
            for (slot, i) in order.into_iter().enumerate() {
                of_layer[i] = Some(slot);
                extents[slot] = extents[slot].max(sizes[i].unwrap_or(0));
            }
            slots.push(of_layer);
        }
        let bytes = extents.iter().sum::<usize>() * compute.dtype.accumulator().size();
        let buffers = extents.into_iter().map(|n| compute.accumulators([n]).map(Some));
        Ok(Self {
            buffers: account("gradients", || buffers.collect::<Result<_>>())?,
            slots,
            bytes,
        })
    }

    /// Bytes of the buffers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Lends the parameters of `layer` their gradients, all 0.
    ///
    /// # Errors
    /// They are lent to another layer; the device refuses.
    pub fn lend(&mut self, model: &mut Model, layer: Layer) -> Result<()> {
        let Self { buffers, slots, .. } = self;
        let mut slots = slots[layer.place(model)].iter();
        let mut lent = Vec::new();
        model.for_each_param_of_mut(layer, &mut |name, param| {
            if param.trains()
                && let Some(&Some(slot)) = slots.next()
            {
                let mut buffer = buffers[slot].take().ok_or_else(|| Error::Shape {
                    operation: "LayerGradients::lend",
                    found: format!("{name}, whose buffer is lent already"),
                    expected: "one layer at a time".to_string(),
                })?;
                buffer.resize(param.value.shape())?;
                lent.push(param.grad.insert(buffer));
            }
            Ok(())
        })?;
        ops::zero_all(&mut lent)
    }

    /// Takes back what `layer` was lent, if it was.
    ///
    /// # Errors
    /// None that a model of the kind that [`LayerGradients::new`] saw gives.
    pub fn take_back(&mut self, model: &mut Model, layer: Layer) -> Result<()> {
        let Self { buffers, slots, .. } = self;
        let mut slots = slots[layer.place(model)].iter();
        model.for_each_param_of_mut(layer, &mut |_, param| {
            if param.trains()
                && let Some(&Some(slot)) = slots.next()
                && let Some(gradient) = param.grad.take()
            {
                buffers[slot] = Some(gradient);
            }
            Ok(())
        })
    }

    /// Begins a backward pass: takes back what one that failed has left lent, and sets the gradients that are not lent to 0.
    ///
    /// # Errors
    /// The device refuses.
    pub fn begin(&mut self, model: &mut Model) -> Result<()> {
        for layer in model.layers() {
            self.take_back(model, layer)?;
        }
        model.zero_gradients()
    }
}
