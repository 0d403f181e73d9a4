//! The feed-forward layer.

use super::{Linear, LinearActivations, Scratch};
use crate::error::Result;
use crate::ops::{self, WeightRef};
use crate::rng::Stream;
use crate::tensor::{Compute, Tensor};

/// `dense_4h_to_h(gelu(dense_h_to_4h(x)))`.
#[derive(Debug)]
pub struct Mlp {
    /// `[inner, hidden]`.
    pub dense_h_to_4h: Linear,
    /// `[hidden, inner]`.
    pub dense_4h_to_h: Linear,
}

/// What the feed-forward layer keeps for its backward pass.
#[derive(Debug)]
pub struct MlpActivations {
    /// Before the activation, `[rows, inner]`.
    pub inner: Tensor,
    /// After it, `[rows, inner]`.
    pub active: Tensor,
    /// Of the two linears.
    pub linear: [LinearActivations; 2],
}

impl Mlp {
    /// Activations for up to `rows` rows.
    ///
    /// # Errors
    /// The device has no room.
    pub fn activations(&self, compute: Compute, rows: usize) -> Result<MlpActivations> {
        let (inner, _) = self.dense_h_to_4h.extents();
        Ok(MlpActivations {
            inner: compute.zeros([rows, inner])?,
            active: compute.zeros([rows, inner])?,
            linear: [
                self.dense_h_to_4h.activations(compute, rows)?,
                self.dense_4h_to_h.activations(compute, rows)?,
            ],
        })
    }

    /// `y = mlp(x) + alpha * x`. `fetched` are the two matrices when they were copied to where the layer computes.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        fetched: Option<[WeightRef<'_>; 2]>,
        alpha: f64,
        dropout: [Option<Stream>; 2],
        activations: &mut MlpActivations,
        scratch: &mut Scratch,
        y: &mut Tensor,
    ) -> Result<()> {
        self.expand(x, fetched.map(|f| f[0]), dropout[0], activations, scratch)?;
        self.activate(activations)?;
        let MlpActivations {
            active,
            linear: [_, down],
            ..
        } = activations;
        self.dense_4h_to_h.forward(
            active,
            fetched.map(|f| f[1]),
            Some((alpha, x)),
            dropout[1],
            down,
            scratch,
            y,
        )
    }

    /// The first part of [`Mlp::forward`]: up to the GELU.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn expand(
        &self,
        x: &Tensor,
        fetched: Option<WeightRef<'_>>,
        dropout: Option<Stream>,
        activations: &mut MlpActivations,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let MlpActivations {
            inner,
            linear: [up, _],
            ..
        } = activations;
        inner.resize([x.extent(0), self.dense_h_to_4h.extents().0])?;
        self.dense_h_to_4h
            .forward(x, fetched, None, dropout, up, scratch, inner)
    }

    /// The second part: the GELU.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn activate(&self, activations: &mut MlpActivations) -> Result<()> {
        let MlpActivations { inner, active, .. } = activations;
        active.resize(inner.shape())?;
        ops::gelu(inner, active)
    }

    /// From `dy`: adds the parameters' gradients and writes `dx = … + alpha * dy`. `d_inner [rows, inner]` is scratch.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn backward(
        &mut self,
        x: &Tensor,
        fetched: Option<[WeightRef<'_>; 2]>,
        dy: &Tensor,
        alpha: f64,
        dropout: [Option<Stream>; 2],
        activations: &MlpActivations,
        (scratch, d_inner): (&mut Scratch, &mut Tensor),
        dx: &mut Tensor,
    ) -> Result<()> {
        let MlpActivations {
            inner,
            active,
            linear,
        } = activations;
        d_inner.resize(inner.shape())?;
        self.dense_4h_to_h.backward(
            active,
            fetched.map(|f| f[1]),
            dy,
            None,
            dropout[1],
            &linear[1],
            scratch,
            Some(d_inner),
        )?;
        ops::gelu_backward(inner, d_inner)?;
        self.dense_h_to_4h.backward(
            x,
            fetched.map(|f| f[0]),
            d_inner,
            Some((alpha, dy)),
            dropout[0],
            &linear[0],
            scratch,
            Some(dx),
        )
    }
}
