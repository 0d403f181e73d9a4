//! What a layer keeps of its forward pass for its backward pass, and what is computed again.
//!
//! In values of the compute type, a token and a layer, `h` being the hidden size and `inner` that of the feed-forward layer:
//!
//! | kept | values | none | smart | full |
//! |---|---|---|---|---|
//! | x, the input | h | kept | kept | kept |
//! | q, k and v, rotated | 3 h | kept | again | again |
//! | context | h | kept | kept | again |
//! | y, after attention | h | kept | kept | again |
//! | inner, before the GELU | inner | kept | again | again |
//! | outputs of the LayerNorms and of the GELU | 2 h + inner | again | again | again |
//! | u of a linear's adapter | r | kept | dense, FC2 | again |
//! | z of a linear with DoRA | out | kept | again | again |
//!
//! Beside context stand its log-sum-exps, one of the type of sums for each head. With DoRA the u of dense and FC2 is made
//! again under `smart` too, together with their z. A linear's own product runs again where a later operation reads it:
//! QKV's and FC1's under `smart`, dense's too under `full`, FC2's never.
//!
//! What all layers share is, a token:
//!
//! | shared | values | when |
//! |---|---|---|
//! | hidden states and the gradients over them | 4 h | always |
//! | outputs of the LayerNorms | 2 h | always |
//! | output of the GELU, then the gradient over q, k and v | max(inner, 3 h) | always |
//! | x̃ = dropout(x), the widest that an adapter has, and du | inner + r | adapters that drop |
//! | gradient over inner | inner | some layer is `none` or `full` |
//! | inner, q, k and v | inner + 3 h | some layer is `smart` or `full` |
//! | the same where q, k and v lend their place to the gradient over inner | inner + max(inner, 3 h) | all are `smart` |
//! | context, y | 2 h | some layer is `full` |
//! | slots and ring of offloaded layers | 2 (kept - h) + 3 h | some layer is offloaded |
//!
//! At ChatGLM-6B's size in 16 bits that is 18, 22 and 27 times 8 KiB with LoRA that drops on every linear, for layers that are
//! all `none`, all `smart`, all `full`.

use serde::{Deserialize, Serialize};

use super::glm::{Block, BlockActivations};
use crate::nn::Linear;
use crate::tensor::Tensor;

/// How much of a layer's forward pass runs again ahead of its backward pass. Gradients are the same to the bit under every
/// choice: the same operations run on the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// LayerNorms and the GELU, no product: x, qkv, context, y and inner are kept.
    #[default]
    None,
    /// QKV and FC1 too: x, context and y are kept.
    Smart,
    /// Everything but FC2's product: x is kept.
    Full,
}

impl Recompute {
    /// Every choice, from the most kept to the least.
    pub const ALL: [Self; 3] = [Self::None, Self::Smart, Self::Full];

    /// Values of the compute type that a layer without an adapter keeps for each token, x included; `smart` and `none` keep a
    /// log-sum-exp for each head beside.
    pub const fn values(self, hidden: usize, inner: usize) -> usize {
        match self {
            Self::None => 6 * hidden + inner,
            Self::Smart => 3 * hidden,
            Self::Full => hidden,
        }
    }
}

/// How one layer treats what its backward pass needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct LayerPolicy {
    /// What is computed again.
    pub recompute: Recompute,
    /// Does what is kept wait in host memory?
    pub offload: bool,
}

/// A tensor of [`BlockActivations`] that some policy keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Qkv,
    Context,
    LogSumExp,
    Y,
    Inner,
    /// u of linear i, in the order of the forward pass.
    U(usize),
    /// z of linear i.
    Z(usize),
}

/// The linears of a block, as [`Block::linears`] orders them.
pub(super) const DENSE: usize = 1;
pub(super) const FC2: usize = 3;

impl Part {
    pub const ALL: [Self; 13] = [
        Self::Qkv,
        Self::Context,
        Self::LogSumExp,
        Self::Y,
        Self::Inner,
        Self::U(0),
        Self::U(1),
        Self::U(2),
        Self::U(3),
        Self::Z(0),
        Self::Z(1),
        Self::Z(2),
        Self::Z(3),
    ];

    /// Does a layer keep it?
    pub fn is_kept(self, recompute: Recompute, block: &Block) -> bool {
        match recompute {
            Recompute::None => true,
            Recompute::Full => false,
            Recompute::Smart => match self {
                Self::Context | Self::LogSumExp | Self::Y => true,
                Self::U(i) => (i == DENSE || i == FC2) && !has_dora(block.linears()[i].1),
                Self::Qkv | Self::Inner | Self::Z(_) => false,
            },
        }
    }

    /// Its values for one token in `block`; 0 where there is no such tensor.
    pub fn width(self, block: &Block) -> usize {
        let linear = |i: usize| block.linears()[i].1;
        let (hidden, inner) = {
            let (inner, hidden) = block.mlp.dense_h_to_4h.extents();
            (hidden, inner)
        };
        match self {
            Self::Qkv => 3 * hidden,
            Self::Context | Self::Y => hidden,
            Self::LogSumExp => block.attention.heads,
            Self::Inner => inner,
            Self::U(i) => linear(i).lora.as_ref().map_or(0, |lora| lora.rank()),
            Self::Z(i) if has_dora(linear(i)) => linear(i).extents().0,
            Self::Z(_) => 0,
        }
    }

    /// Where it lies in `activations`, if the linear there has an adapter.
    pub fn of(self, activations: &mut BlockActivations) -> Option<&mut Tensor> {
        let BlockActivations {
            attention, y, mlp, ..
        } = activations;
        let mut linears = attention.linear.iter_mut().chain(&mut mlp.linear);
        match self {
            Self::Qkv => Some(&mut attention.qkv),
            Self::Context => Some(&mut attention.context),
            Self::LogSumExp => Some(&mut attention.log_sum_exp),
            Self::Y => Some(y),
            Self::Inner => Some(&mut mlp.inner),
            Self::U(i) => linears.nth(i)?.u.as_mut(),
            Self::Z(i) => linears.nth(i)?.z.as_mut(),
        }
    }
}

impl Part {
    /// Puts `tensor` into its place in `activations`, and takes out what was there.
    pub fn exchange(self, tensor: &mut Tensor, activations: &mut BlockActivations) {
        if let Some(place) = self.of(activations) {
            std::mem::swap(place, tensor);
        }
    }
}

fn has_dora(linear: &Linear) -> bool {
    linear.lora.as_ref().is_some_and(|lora| lora.dora.is_some())
}
