//! A forward pass seen from within, layer by layer: no layer keeps all that it makes.

use super::glm::BlockActivations;
use super::{Model, Workspace};
use crate::data::batch::Batch;
use crate::error::Result;
use crate::ops;
use crate::rng::Stream;
use crate::tensor::Tensor;

/// A layer in a forward pass: see [`Model::forward_seen`].
#[derive(Debug, Clone, Copy)]
pub struct LayerPass<'a> {
    /// Its number.
    pub layer: usize,
    /// Its input.
    pub x: &'a Tensor,
    /// What it made of it.
    pub activations: &'a BlockActivations,
    /// Its output.
    pub out: &'a Tensor,
}

impl Model {
    /// [`Model::forward`] that shows each layer's activations to `see` while they stand in the workspace: the next layer
    /// computes in the same buffers.
    ///
    /// # Errors
    /// As [`Model::forward`]; those of `see`.
    pub fn forward_seen(
        &self,
        ws: &mut Workspace,
        batch: &Batch,
        dropout: Option<Stream>,
        see: &mut dyn FnMut(LayerPass<'_>) -> Result<()>,
    ) -> Result<()> {
        ws.load(batch)?;
        self.forward_loaded(ws, dropout, see)
    }

    /// The first activation of the last forward pass, in the order of computation, that holds a value that is not a
    /// number or infinite; named after its module. A tensor that cannot be read counts as such.
    ///
    /// Not every activation is kept: the forward pass runs again.
    pub fn first_non_finite(&self, ws: &mut Workspace) -> Option<String> {
        let bad = |tensor: &Tensor| !matches!(ops::non_finite(tensor), Ok(None));
        let mut first = None;
        let again = self.forward_loaded(ws, ws.pass, &mut |pass| {
            let of_layer = |name| format!("transformer.layers.{}.{name}", pass.layer);
            let named = pass.activations.named().into_iter();
            if first.is_none() && pass.layer == 0 && bad(pass.x) {
                first = Some("transformer.word_embeddings".to_string());
            }
            if first.is_none() {
                first = named
                    .chain([("mlp.dense_4h_to_h", pass.out)])
                    .find_map(|(name, tensor)| bad(tensor).then(|| of_layer(name)));
            }
            Ok(())
        });
        if first.is_some() {
            return first;
        }
        if let Err(error) = again {
            return Some(format!("the forward pass ({error})"));
        }
        if bad(&ws.final_layernorm.y) {
            return Some("transformer.final_layernorm".to_string());
        }
        bad(&ws.head.statistics).then(|| "lm_head".to_string())
    }
}
