//! Adapters that come and go over one loaded base.

use std::path::Path;

use super::{Loaded, SavedModule, adapter_kind, load_adapter};
use crate::error::Result;
use crate::model::Model;
use crate::model::glm::Block;
use crate::nn::{Lora, Param, PrefixEncoder};

/// The half of a model that it does not wear now: an adapter, or what of the base the adapter stands in for.
#[derive(Debug)]
pub struct Exchange {
    /// Of every linear, in the order of the forward pass.
    loras: Vec<Option<Lora>>,
    prefix: Option<PrefixEncoder>,
    /// Parameters that the adapter replaces whole, by name.
    params: Vec<(String, Param)>,
    /// The adapter parts a tied head from the embedding: the head of the other half, which with the base is none.
    head: Option<Option<Param>>,
}

impl Exchange {
    /// Puts the adapter of a folder on a model without one; the model is left as it was when that fails.
    ///
    /// # Errors
    /// As [`load_adapter`].
    pub fn load(model: &mut Model, dir: &Path) -> Result<(Loaded, Self)> {
        let replaced: Vec<SavedModule> = match adapter_kind(dir)? {
            // A name that is none is refused below.
            Loaded::Lora(config) => (config.modules_to_save.iter())
                .filter_map(|name| name.rsplit('.').next()?.parse().ok())
                .collect(),
            Loaded::Prefix(_) => Vec::new(),
        };
        let parts =
            |module: &SavedModule| matches!(module, SavedModule::WordEmbeddings | SavedModule::LmHead);
        let tied = model.lm_head.is_none() && model.stored_head.is_none();
        let mut params = Vec::new();
        model.for_each_param(&mut |name, param| {
            let owner = name.rsplit('.').nth(1).unwrap_or(name);
            if replaced.iter().any(|module| module.name() == owner) {
                params.push((name.to_string(), Param::frozen(param.value.clone())));
            }
        });
        let mut base = Self {
            loras: model.linears().map(|_| None).collect(),
            prefix: None,
            params,
            head: (tied && replaced.iter().any(parts)).then_some(None),
        };
        match load_adapter(model, dir, false) {
            Ok(loaded) => Ok((loaded, base)),
            Err(error) => {
                base.exchange(model);
                Err(error)
            }
        }
    }

    /// Swaps the two halves: the model wears this one, and what it wore is kept here.
    pub fn exchange(&mut self, model: &mut Model) {
        let linears = model.blocks.iter_mut().flat_map(Block::linears_mut);
        for ((_, linear), other) in linears.zip(&mut self.loras) {
            std::mem::swap(&mut linear.lora, other);
        }
        std::mem::swap(&mut model.prefix, &mut self.prefix);
        let params = &mut self.params;
        let swapped = model.for_each_param_mut(&mut |name, param| {
            if let Some((_, other)) = params.iter_mut().find(|(of, _)| of == name) {
                std::mem::swap(param, other);
            }
            Ok(())
        });
        debug_assert!(swapped.is_ok(), "nothing above fails");
        if let Some(head) = &mut self.head {
            std::mem::swap(&mut model.lm_head, head);
        }
    }
}
