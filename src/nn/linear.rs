//! A linear layer on weights that are dense or in few bits, with an optional low-rank adapter.

use super::Param;
use super::dora::{Dora, DoraScratch};
use crate::error::{Error, Result};
use crate::ops::{self, Adapter, WeightRef};
use crate::quant::{QuantTensor, RowInt8};
use crate::rng::Stream;
use crate::tensor::{Compute, Tensor};

/// The matrix of a linear layer, `[out, in]`.
#[derive(Debug, Clone)]
#[allow(
    clippy::large_enum_variant,
    reason = "a model has a hundred of them, all alike"
)]
pub enum Weight {
    /// Dense; frozen or training.
    Dense(Param),
    /// 4-bit; frozen.
    Quant(Box<QuantTensor>),
    /// 8-bit with a scale for each row; frozen.
    Int8(Box<RowInt8>),
}

impl Weight {
    /// As an operand.
    pub fn as_ref(&self) -> WeightRef<'_> {
        match self {
            Weight::Dense(p) => WeightRef::Dense(p.operand()),
            Weight::Quant(q) => WeightRef::Quant(q),
            Weight::Int8(q) => WeightRef::Int8(q),
        }
    }
}

/// The matrices of a block's four linears, in the order of the forward pass, when they were copied to where the block computes;
/// `None`: they are there.
pub type Fetched<'a> = Option<[WeightRef<'a>; 4]>;

/// LoRA (Hu et al. 2021): `scale * B A dropout(x)` added to the layer's output; or DoRA.
#[derive(Debug)]
pub struct Lora {
    /// `A [r, in]`.
    pub a: Param,
    /// `B [out, r]`.
    pub b: Param,
    /// `alpha / r`, or `alpha / sqrt(r)` for rsLoRA.
    pub scale: f64,
    /// Probability that an element of x is dropped on its way into A, in training.
    pub dropout: f32,
    /// The magnitudes, if this is DoRA.
    pub dora: Option<Dora>,
    /// `A` and `B` as PiSSA found them, F32 on the host, if W is what it left: `W₀ - scale B₀ A₀`.
    pub found: Option<(Tensor, Tensor)>,
}

impl Lora {
    /// The rank r.
    pub fn rank(&self) -> usize {
        self.a.value.extent(0)
    }

    /// Does any parameter of the adapter train?
    pub fn trains(&self) -> bool {
        let magnitude = self.dora.as_ref().is_some_and(|dora| dora.magnitude().trains());
        self.a.trains() || self.b.trains() || magnitude
    }

    /// The addition to `x Wᵀ`.
    fn adapter<'a>(&'a self, u: &'a Tensor) -> Adapter<'a> {
        Adapter {
            scale: self.scale,
            u,
            matrix: &self.b.value,
        }
    }

    /// The parameters with the last parts of their names, in PEFT's order.
    fn params(&self) -> impl Iterator<Item = (&'static str, &Param)> {
        let magnitude = self
            .dora
            .as_ref()
            .map(|dora| ("lora_magnitude_vector", dora.magnitude()));
        [("lora_A.weight", &self.a), ("lora_B.weight", &self.b)]
            .into_iter()
            .chain(magnitude)
    }
}

/// `y = x Wᵀ + bias + scale * dropout(x) Aᵀ Bᵀ`; with DoRA, `y = x Wᵀ + bias + (g - 1) ⊙ (x̃ Wᵀ) + g ⊙ (scale x̃ Aᵀ Bᵀ)` with
/// `x̃ = dropout(x)` and g the gain of [`Dora`].
#[derive(Debug)]
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
    /// With DoRA `z = dropout(x) Wᵀ + scale * u Bᵀ [rows, out]`.
    pub z: Option<Tensor>,
}

/// Buffers that all layers share, one layer at a time.
#[derive(Debug)]
pub struct Scratch {
    /// `dropout(x)`, or the gradient that passes through it, `[rows, in]`; empty when nothing is dropped.
    pub dropped: Tensor,
    /// `du [rows, r]`.
    pub du: Tensor,
    /// What DoRA needs.
    pub dora: DoraScratch,
}

impl Scratch {
    /// For passes of up to `rows` rows through `linears`.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new<'a>(
        compute: Compute,
        rows: usize,
        linears: impl Iterator<Item = &'a Linear> + Clone,
    ) -> Result<Self> {
        let adapted = linears
            .clone()
            .filter_map(|l| Some((l.extents().1, l.lora.as_ref()?)));
        let rank = adapted.clone().map(|(_, lora)| lora.rank()).max();
        let dropped = adapted.filter(|(_, lora)| lora.dropout > 0.0);
        let dropped = dropped.map(|(input, _)| input).max();
        Ok(Self {
            dropped: compute.zeros([rows * dropped.unwrap_or(0)])?,
            du: compute.zeros([rows * rank.unwrap_or(0)])?,
            dora: DoraScratch::new(compute, rows, linears)?,
        })
    }
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
        let lora = self.lora.as_ref();
        let u = lora.map(|lora| compute.zeros([rows, lora.rank()]));
        let dora = lora.filter(|lora| lora.dora.is_some());
        let z = dora.map(|_| compute.zeros([rows, self.extents().0]));
        Ok(LinearActivations {
            u: u.transpose()?,
            z: z.transpose()?,
        })
    }

    /// Does any parameter of the layer train?
    pub fn trains(&self) -> bool {
        let weight = matches!(&self.weight, Weight::Dense(p) if p.trains());
        let lora = self.lora.as_ref().is_some_and(Lora::trains);
        weight || lora || self.bias.as_ref().is_some_and(Param::trains)
    }

    /// `y [M, out]` from `x [M, in]`, plus `alpha * residual`; dropout is off without a stream. `fetched` is the matrix when it
    /// was copied to where the layer computes.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        fetched: Option<WeightRef<'_>>,
        residual: Option<(f64, &Tensor)>,
        dropout: Option<Stream>,
        activations: &mut LinearActivations,
        scratch: &mut Scratch,
        y: &mut Tensor,
    ) -> Result<()> {
        let weight = fetched.unwrap_or_else(|| self.weight.as_ref());
        let bias = self.bias.as_ref().map(|b| &b.value);
        let Some(lora) = &self.lora else {
            return ops::linear(x, weight, bias, residual, y);
        };
        self.recompute(x, fetched, dropout, activations, scratch)?;
        let Some(z) = &activations.z else {
            let u = activations.u.as_ref().ok_or_else(no_room)?;
            return ops::linear_adapted(x, weight, bias, residual, lora.adapter(u), y);
        };
        if let Some(stream) = dropout.filter(|_| lora.dropout > 0.0) {
            // x Wᵀ - x̃ Wᵀ is one product.
            ops::dropout_rest(x, lora.dropout, stream, &mut scratch.dropped)?;
            ops::linear(&scratch.dropped, weight, bias, residual, y)?;
            lora.with_gain(weight, &mut scratch.dora, |gain, _| {
                ops::accumulate_scaled_columns(z, gain, y)
            })?;
        } else {
            lora.with_gain(weight, &mut scratch.dora, |gain, _| {
                ops::scale_columns(z, gain, 0.0, bias, residual, y)
            })?;
        }
        Ok(())
    }

    /// Makes u, and with DoRA z: what [`Linear::forward`] leaves for the backward pass beside x, without its y.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn recompute(
        &self,
        x: &Tensor,
        fetched: Option<WeightRef<'_>>,
        dropout: Option<Stream>,
        activations: &mut LinearActivations,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Some(lora) = &self.lora else { return Ok(()) };
        let u = activations.u.as_mut().ok_or_else(no_room)?;
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
        let Some(z) = &mut activations.z else {
            return Ok(());
        };
        let weight = fetched.unwrap_or_else(|| self.weight.as_ref());
        z.resize([x.extent(0), weight.extents().0])?;
        ops::linear_adapted(seen, weight, None, None, lora.adapter(u), z)
    }

    /// Does the backward pass read x?
    pub fn reads_input(&self) -> bool {
        let weight = matches!(&self.weight, Weight::Dense(p) if p.trains());
        weight || self.lora.is_some()
    }

    /// From `dy [M, out]`: adds the parameters' gradients, and writes `dx = dy W + … + alpha * residual` if asked for.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn backward(
        &mut self,
        x: &Tensor,
        fetched: Option<WeightRef<'_>>,
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
        let weight = fetched.unwrap_or_else(|| self.weight.as_ref());
        let Some(lora) = &mut self.lora else {
            return match dx {
                Some(dx) => ops::linear_backward_input(dy, weight, residual, dx),
                None => Ok(()),
            };
        };
        let u = activations.u.as_ref().ok_or_else(no_room)?;
        let dropout = dropout.filter(|_| lora.dropout > 0.0);
        let Scratch { dropped, du, dora } = scratch;
        du.resize([dy.extent(0), lora.rank()])?;
        // The gradient over x Wᵀ + scale u Bᵀ: dy itself, or with DoRA g ⊙ dy.
        let dz = match &activations.z {
            None => dy,
            Some(z) => {
                lora.with_gain(weight, dora, |gain, dora| {
                    let dz = dora.dz_rows(dy.extent(0), dy.extent(1))?;
                    ops::scale_columns(dy, gain, 0.0, None, None, dz)
                })?;
                if let Some((Some(dm), inverse)) = lora.dora.as_mut().map(Dora::gradient_mut) {
                    ops::accumulate_column_products(dy, z, inverse, dm)?;
                }
                &dora.dz
            }
        };
        ops::matmul(lora.scale, (dz, false), (&lora.b.value, false), 0.0, du)?;
        let adapter = Adapter {
            scale: 1.0,
            u: du,
            matrix: &lora.a.value,
        };
        match (dx.as_deref_mut(), dropout) {
            (None, _) => {}
            (Some(dx), None) => ops::linear_backward_input_adapted(dz, weight, residual, adapter, dx)?,
            (Some(dx), Some(_)) => ops::linear_backward_input(dy, weight, residual, dx)?,
        }
        if let Some(db) = &mut lora.b.grad {
            ops::matmul(lora.scale, (dz, true), (u, false), 1.0, db)?;
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
            if activations.z.is_some() {
                // x has gone through W as it is, x̃ once more: (g - 1) ⊙ dy.
                lora.with_gain(weight, dora, |gain, dora| {
                    let dz = dora.dz_rows(dy.extent(0), dy.extent(1))?;
                    ops::scale_columns(dy, gain, -1.0, None, None, dz)?;
                    ops::linear_backward_input_adapted(dz, weight, None, adapter, dropped)
                })?;
            } else {
                ops::matmul(1.0, (du, false), (&lora.a.value, false), 0.0, dropped)?;
            }
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
            for (part, param) in lora.params() {
                f(&format!("base_model.model.{name}.{part}"), param);
            }
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
            if let Some(dora) = &mut lora.dora {
                f(
                    &format!("base_model.model.{name}.lora_magnitude_vector"),
                    dora.magnitude_mut(),
                )?;
            }
        }
        Ok(())
    }
}

/// An adapter is never passed over because its activations were made for a layer without one.
fn no_room() -> Error {
    Error::Shape {
        operation: "Linear",
        found: "activations of a layer without an adapter".to_string(),
        expected: "those of a layer with one".to_string(),
    }
}
