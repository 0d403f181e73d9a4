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
mod waiting;

pub use attention::{Attention, AttentionActivations, Geometry, Keys};
pub use dora::{Dora, DoraScratch};
pub use linear::{Fetched, Linear, LinearActivations, Lora, Scratch, Weight};
pub use mlp::{Mlp, MlpActivations};
pub use norm::{LayerNorm, NormActivations};
pub(crate) use prefix::PREFIX_ENCODER;
pub use prefix::{PrefixActivations, PrefixEncoder, Projection};

use crate::error::Result;
use crate::tensor::ledger::account;
use crate::tensor::{Device, Tensor};

/// A parameter. It trains if and only if it has a gradient, be it one of its own or one that is lent to it.
#[derive(Debug, Clone)]
pub struct Param {
    /// The value, in the type of sums when it trains; a frozen one may lie in a mapped file in another type.
    pub value: Tensor,
    /// The value rounded to the compute type, where passes read it: of a value that trains and lies where the device does
    /// not compute, in host memory or in a file.
    pub working: Option<Tensor>,
    /// The gradient, in the type of sums, of the value's shape, where the model computes. One that is lent is there only
    /// while the backward pass of its layer runs.
    pub grad: Option<Tensor>,
    trains: bool,
}

impl Param {
    /// A parameter that does not train.
    pub fn frozen(value: Tensor) -> Self {
        Self {
            value,
            working: None,
            grad: None,
            trains: false,
        }
    }

    /// A parameter that trains, its gradient 0.
    ///
    /// # Errors
    /// The device has no room for the gradient.
    pub fn trainable(value: Tensor) -> Result<Self> {
        let mut param = Self::borrowing(value);
        param.own_gradient(param.value.device())?;
        Ok(param)
    }

    /// A parameter that trains with a gradient that is lent to it.
    pub fn borrowing(value: Tensor) -> Self {
        Self {
            trains: true,
            ..Self::frozen(value)
        }
    }

    /// Gives a parameter that trains a gradient of its own on `device`, 0, if it has none.
    ///
    /// # Errors
    /// The device has no room.
    pub fn own_gradient(&mut self, device: Device) -> Result<()> {
        if self.trains && self.grad.is_none() {
            self.grad = Some(account("gradients", || {
                Tensor::zeros_on(device, self.value.dtype(), self.value.shape())
            })?);
        }
        Ok(())
    }

    /// Does it train?
    pub fn trains(&self) -> bool {
        self.trains
    }

    /// What passes read: the working copy, else the value.
    pub fn operand(&self) -> &Tensor {
        self.working.as_ref().unwrap_or(&self.value)
    }
}
