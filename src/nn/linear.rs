//! A linear layer on dense or 4-bit weights, with an optional low-rank adapter.

use super::Param;
use crate::error::Result;
use crate::ops::{self, WeightRef};
use crate::quant::QuantTensor;
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

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
    pub fn activations(&self, dtype: DType, rows: usize) -> LinearActivations {
        LinearActivations {
            u: self
                .lora
                .as_ref()
                .map(|lora| Tensor::zeros(dtype, [rows, lora.rank()])),
        }
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
        ops::linear(
            x,
            self.weight.as_ref(),
            self.bias.as_ref().map(|b| &b.value),
            residual,
            y,
        )?;
        if let (Some(lora), Some(u)) = (&self.lora, &mut activations.u) {
            u.resize([x.extent(0), lora.rank()])?;
            let x = match dropout {
                Some(stream) if lora.dropout > 0.0 => {
                    scratch.dropped.resize(x.shape())?;
                    ops::dropout(x, lora.dropout, stream, &mut scratch.dropped)?;
                    &scratch.dropped
                }
                _ => x,
            };
            ops::matmul(1.0, (x, false), (&lora.a.value, true), 0.0, u)?;
            ops::matmul(lora.scale, (u, false), (&lora.b.value, true), 1.0, y)?;
        }
        Ok(())
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
        if let Some(dx) = dx.as_deref_mut() {
            ops::linear_backward_input(dy, self.weight.as_ref(), residual, dx)?;
        }
        let (Some(lora), Some(u)) = (&mut self.lora, &activations.u) else {
            return Ok(());
        };
        let dropout = dropout.filter(|_| lora.dropout > 0.0);
        let Scratch { dropped, du } = scratch;
        du.resize([dy.extent(0), lora.rank()])?;
        ops::matmul(lora.scale, (dy, false), (&lora.b.value, false), 0.0, du)?;
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
        match (dx, dropout) {
            (None, _) => {}
            (Some(dx), None) => ops::matmul(1.0, (du, false), (&lora.a.value, false), 1.0, dx)?,
            (Some(dx), Some(stream)) => {
                dropped.resize(dx.shape())?;
                ops::matmul(1.0, (du, false), (&lora.a.value, false), 0.0, dropped)?;
                ops::accumulate_dropout(dropped, lora.dropout, stream, dx)?;
            }
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
    pub(crate) fn for_each_param_mut(
        &mut self,
        name: &str,
        f: &mut dyn FnMut(&str, &mut Param) -> Result<()>,
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
