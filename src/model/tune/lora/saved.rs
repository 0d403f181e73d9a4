//! Modules that train whole beside the adapters, as PEFT's `modules_to_save`.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::model::Model;
use crate::nn::Param;
use crate::tensor::Device;

/// A module that trains as a copy of the base's and is saved with the adapter, by PEFT's name in `modules_to_save`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SavedModule {
    /// `transformer.word_embeddings`.
    WordEmbeddings,
    /// `lm_head`.
    LmHead,
    /// `input_layernorm` of every block.
    InputLayernorm,
    /// `post_attention_layernorm` of every block.
    PostAttentionLayernorm,
    /// `transformer.final_layernorm`.
    FinalLayernorm,
}

impl SavedModule {
    /// All, in the order of the forward pass.
    pub const ALL: [SavedModule; 5] = [
        Self::WordEmbeddings,
        Self::InputLayernorm,
        Self::PostAttentionLayernorm,
        Self::FinalLayernorm,
        Self::LmHead,
    ];

    /// PEFT's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::WordEmbeddings => "word_embeddings",
            Self::LmHead => "lm_head",
            Self::InputLayernorm => "input_layernorm",
            Self::PostAttentionLayernorm => "post_attention_layernorm",
            Self::FinalLayernorm => "final_layernorm",
        }
    }
}

impl fmt::Display for SavedModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for SavedModule {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|m| m.name() == s).ok_or_else(|| {
            Error::input(
                "modules_to_save",
                s,
                Self::ALL.map(Self::name).join(", "),
                "name modules of ChatGLM-6B",
            )
        })
    }
}

/// Visits the parameters of `modules` by their names in the checkpoint.
///
/// With a tied head one matrix has two uses. PEFT wraps a module, not a matrix: what is named trains as a copy, the other
/// use keeps the frozen original. So the head is parted from the embedding before either of them is visited.
pub(super) fn for_each(
    model: &mut Model,
    modules: &[SavedModule],
    f: &mut dyn FnMut(&str, &mut Param) -> Result<()>,
) -> Result<()> {
    let parted = [SavedModule::WordEmbeddings, SavedModule::LmHead];
    if modules.contains(&SavedModule::LmHead) {
        model.check_head_trains("modules_to_save")?;
    }
    // A head that is held in another form has a matrix of its own already.
    if model.lm_head.is_none() && model.stored_head.is_none() && parted.iter().any(|m| modules.contains(m)) {
        // A clone of a frozen tensor shares its memory.
        model.lm_head = Some(Param::frozen(model.embedding.value.clone()));
    }
    model.for_each_param_mut(&mut |name, param| match is_of(modules, name) {
        true => f(name, param),
        false => Ok(()),
    })
}

/// How many numbers `modules` hold.
pub(super) fn elements(model: &Model, modules: &[SavedModule]) -> usize {
    let mut count = 0;
    model.for_each_param(&mut |name, param| {
        let uses = |module: SavedModule| modules.contains(&module) && of(module, name);
        count += SavedModule::ALL.into_iter().filter(|m| uses(*m)).count() * param.value.elements();
    });
    match model.lm_head.is_none() && modules.contains(&SavedModule::LmHead) {
        true => count + model.embedding.value.elements(),
        false => count,
    }
}

/// Is `name` a parameter of one of `modules`?
pub(super) fn is_of(modules: &[SavedModule], name: &str) -> bool {
    modules.iter().any(|&module| of(module, name))
}

/// Is `name` a parameter of `module`?
fn of(module: SavedModule, name: &str) -> bool {
    let owner = name.rsplit_once('.').map_or("", |(owner, _)| owner);
    owner.rsplit('.').next() == Some(module.name())
}

/// Makes copies of `modules` in the type of sums that train.
///
/// # Errors
/// The device has no room.
pub(super) fn train(model: &mut Model, modules: &[SavedModule]) -> Result<()> {
    let (dtype, device) = (model.dtype().accumulator(), model.device());
    for_each(model, modules, &mut |_, param| {
        let host = param.value.to_device(Device::Cpu)?;
        *param = Param::trainable(host.to_dtype(dtype).into_device(device)?)?;
        Ok(())
    })
}
