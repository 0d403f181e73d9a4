//! Layers: parameters, forward and hand-written backward.
//!
//! A layer owns its parameters; the caller owns the activations, which the forward pass fills and the backward pass
//! reads. Activation gradients are written, parameter gradients are added to. A parameter trains if and only if it has a
//! gradient, and only then is its gradient computed.

mod attention;
mod dora;
mod linear;
mod mlp;
mod norm;
mod prefix;

pub use attention::{Attention, AttentionActivations, Geometry, Keys};
pub use dora::{Dora, DoraScratch};
pub use linear::{Linear, LinearActivations, Lora, Scratch, Weight};
pub use mlp::{Mlp, MlpActivations};
pub use norm::{LayerNorm, NormActivations};
pub(crate) use prefix::PREFIX_ENCODER;
pub use prefix::{PrefixActivations, PrefixEncoder, Projection};

use crate::error::Result;
use crate::tensor::Tensor;

/// A parameter. It trains if and only if it has a gradient.
#[derive(Debug, Clone)]
pub struct Param {
    /// The value, in the type of sums when it trains; a frozen one may lie in a mapped file in another type.
    pub value: Tensor,
    /// The gradient, of the value's type, shape and device.
    pub grad: Option<Tensor>,
}

impl Param {
    /// A parameter that does not train.
    pub fn frozen(value: Tensor) -> Self {
        Self { value, grad: None }
    }

    /// A parameter that trains, its gradient 0.
    ///
    /// # Errors
    /// The device has no room for the gradient.
    pub fn trainable(value: Tensor) -> Result<Self> {
        let grad = Tensor::zeros_on(value.device(), value.dtype(), value.shape())?;
        Ok(Self {
            value,
            grad: Some(grad),
        })
    }

    /// Does it train?
    pub fn trains(&self) -> bool {
        self.grad.is_some()
    }
}
