//! A linear layer on dense or 4-bit weights, with an optional low-rank adapter.

use super::Param;
use crate::error::Result;
use crate::ops::{self, Adapter, WeightRef};
use crate::quant::QuantTensor;
use crate::rng::Stream;
use crate::tensor::{Compute, Tensor};

/// The matrix of a linear layer, `[out, in]`.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Dense; frozen or training.
    Dense(Param),
    /// 4-bit; frozen.
    Quant(Box<QuantTensor>),
}

impl Weight {
    /// As an operand.
    pub fn as_ref(&self) -> WeightRef<'_> {
        match self {
            Weight::Dense(p) => WeightRef::Dense(&p.value),
            Weight::Quant(q) => WeightRef::Quant(q),
        }
    }
}

/// LoRA (Hu et al. 2021): `scale * B A dropout(x)` added to the layer's output.
#[derive(Debug, Clone)]
pub struct Lora {
    /// `A [r, in]`.
    pub a: Param,
    /// `B [out, r]`.
    pub b: Param,
    /// `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.
    pub scale: f64,
    /// Probability that an element of x is dropped on its way into A, in training.
    pub dropout: f32,
}

impl Lora {
    /// The rank r.
    pub fn rank(&self) -> usize {
        self.a.value.extent(0)
    }
}

/// `y = x Wᵀ + bias + scale * dropout(x) Aᵀ Bᵀ`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `W [out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Param>,
    /// The adapter.
    pub lora: Option<Lora>,
}

/// What the backward pass of a [`Linear`] needs beside its input.
#[derive(Debug)]
pub struct LinearActivations {
    /// `u = dropout(x) Aᵀ [rows, r]`.
    pub u: Option<Tensor>,
}

/// Buffers that all layers share, one layer at a time.
#[derive(Debug)]
pub struct Scratch {
    /// `dropout(x)`, or the gradient that passes through it, `[rows, in]`; empty when nothing is dropped.
    pub dropped: Tensor,
    /// `du [rows, r]`.
    pub du: Tensor,
}

impl Linear {
    /// `(out, in)`.
    pub fn extents(&self) -> (usize, usize) {
        self.weight.as_ref().extents()
    }

    /// Activations for up to `rows` rows.
    ///
    /// # Errors
    /// The device has no room.
    pub fn activations(&self, compute: Compute, rows: usize) -> Result<LinearActivations> {
        let u = self.lora.as_ref().map(|lora| compute.zeros([rows, lora.rank()]));
        Ok(LinearActivations { u: u.transpose()? })
    }

    /// Does any parameter of the layer train?
    pub fn trains(&self) -> bool {
        let weight = matches!(&self.weight, Weight::Dense(p) if p.trains());
        let lora = self.lora.as_ref().is_some_and(|l| l.a.trains() || l.b.trains());
        weight || lora || self.bias.as_ref().is_some_and(Param::trains)
    }

    /// `y [M, out]` from `x [M, in]`, plus `alpha * residual`; dropout is off without a stream.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        residual: Option<(f64, &Tensor)>,
        dropout: Option<Stream>,
        activations: &mut LinearActivations,
        scratch: &mut Scratch,
        y: &mut Tensor,
    ) -> Result<()> {
        let (weight, bias) = (self.weight.as_ref(), self.bias.as_ref().map(|b| &b.value));
        let (Some(lora), Some(u)) = (&self.lora, &mut activations.u) else {
            return ops::linear(x, weight, bias, residual, y);
        };
        u.resize([x.extent(0), lora.rank()])?;
        let seen = match dropout {
            Some(stream) if lora.dropout > 0.0 => {
                scratch.dropped.resize(x.shape())?;
                ops::dropout(x, lora.dropout, stream, &mut scratch.dropped)?;
                &scratch.dropped
            }
            _ => x,
        };
        ops::matmul(1.0, (seen, false), (&lora.a.value, true), 0.0, u)?;
        let adapter = Adapter {
            scale: lora.scale,
            u,
            matrix: &lora.b.value,
        };
        ops::linear_adapted(x, weight, bias, residual, adapter, y)
    }

    /// From `dy [M, out]`: adds the parameters' gradients, and writes `dx = dy W + … + alpha * residual` if asked for.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn backward(
        &mut self,
        x: &Tensor,
        dy: &Tensor,
        residual: Option<(f64, &Tensor)>,
        dropout: Option<Stream>,
        activations: &LinearActivations,
        scratch: &mut Scratch,
        mut dx: Option<&mut Tensor>,
    ) -> Result<()> {
        if let Weight::Dense(Param { grad: Some(dw), .. }) = &mut self.weight {
            ops::matmul(1.0, (dy, true), (x, false), 1.0, dw)?;
        }
        if let Some(Param { grad: Some(db), .. }) = &mut self.bias {
            ops::accumulate_column_sums(dy, db)?;
        }
        let weight = self.weight.as_ref();
        let (Some(lora), Some(u)) = (&mut self.lora, &activations.u) else {
            return match dx {
                Some(dx) => ops::linear_backward_input(dy, weight, residual, dx),
                None => Ok(()),
            };
        };
        let dropout = dropout.filter(|_| lora.dropout > 0.0);
        let Scratch { dropped, du } = scratch;
        du.resize([dy.extent(0), lora.rank()])?;
        ops::matmul(lora.scale, (dy, false), (&lora.b.value, false), 0.0, du)?;
        let adapter = Adapter {
            scale: 1.0,
            u: du,
            matrix: &lora.a.value,
        };
        match (dx.as_deref_mut(), dropout) {
            (None, _) => {}
            (Some(dx), None) => ops::linear_backward_input_adapted(dy, weight, residual, adapter, dx)?,
            (Some(dx), Some(_)) => ops::linear_backward_input(dy, weight, residual, dx)?,
        }
        if let Some(db) = &mut lora.b.grad {
            ops::matmul(lora.scale, (dy, true), (u, false), 1.0, db)?;
        }
        if let Some(da) = &mut lora.a.grad {
            let x = match dropout {
                Some(stream) => {
                    dropped.resize(x.shape())?;
                    ops::dropout(x, lora.dropout, stream, dropped)?;
                    &*dropped
                }
                None => x,
            };
            ops::matmul(1.0, (du, true), (x, false), 1.0, da)?;
        }
        if let (Some(dx), Some(stream)) = (dx, dropout) {
            dropped.resize(dx.shape())?;
            ops::matmul(1.0, (du, false), (&lora.a.value, false), 0.0, dropped)?;
            ops::accumulate_dropout(dropped, lora.dropout, stream, dx)?;
        }
        Ok(())
    }

    /// Visits the parameters; `name` is that of the layer, without a dot at its end.
    pub(crate) fn for_each_param<'a>(&'a self, name: &str, f: &mut dyn FnMut(&str, &'a Param)) {
        if let Weight::Dense(p) = &self.weight {
            f(&format!("{name}.weight"), p);
        }
        if let Some(p) = &self.bias {
            f(&format!("{name}.bias"), p);
        }
        if let Some(lora) = &self.lora {
            f(&format!("base_model.model.{name}.lora_A.weight"), &lora.a);
            f(&format!("base_model.model.{name}.lora_B.weight"), &lora.b);
        }
    }

    /// [`Linear::for_each_param`], to change them.
    pub(crate) fn for_each_param_mut<'a>(
        &'a mut self,
        name: &str,
        f: &mut dyn FnMut(&str, &'a mut Param) -> Result<()>,
    ) -> Result<()> {
        if let Weight::Dense(p) = &mut self.weight {
            f(&format!("{name}.weight"), p)?;
        }
        if let Some(p) = &mut self.bias {
            f(&format!("{name}.bias"), p)?;
        }
        if let Some(lora) = &mut self.lora {
            f(&format!("base_model.model.{name}.lora_A.weight"), &mut lora.a)?;
            f(&format!("base_model.model.{name}.lora_B.weight"), &mut lora.b)?;
        }
        Ok(())
    }
}
