//! Self-attention with the prefix mask and 2-D rotary positions.

use super::{Linear, LinearActivations, Scratch};
use crate::error::Result;
use crate::ops::{self, Prefix, PrefixGradients, WeightRef};
use crate::rng::Stream;
use crate::tensor::{Compute, Tensor};

/// `dense(attention(rope(query_key_value(x))))`; rows of the qkv weight are interleaved per head: q, k, v of head 0, then
/// of head 1, ...
#[derive(Debug)]
pub struct Attention {
    /// `[3 hidden, hidden]`.
    pub query_key_value: Linear,
    /// `[hidden, hidden]`.
    pub dense: Linear,
    /// Heads.
    pub heads: usize,
}

/// What attention keeps for its backward pass.
#[derive(Debug)]
pub struct AttentionActivations {
    /// Rotated q, unscaled rotated k, v: `[rows, heads * 3 d]`.
    pub qkv: Tensor,
    /// The heads' outputs `[rows, hidden]`.
    pub context: Tensor,
    /// `ln Σ exp` of every query, `[B heads, S]`.
    pub log_sum_exp: Tensor,
    /// Of the two linears.
    pub linear: [LinearActivations; 2],
}

/// Where the keys come from.
#[derive(Debug)]
pub enum Keys<'a> {
    /// The rows themselves: training, evaluation.
    Own,
    /// A cache that the rows are appended to: generation.
    Cache {
        /// `[B, capacity, hidden]`.
        keys: &'a mut Tensor,
        /// `[B, capacity, hidden]`.
        values: &'a mut Tensor,
        /// Positions held so far.
        past: usize,
    },
}

/// What a layer needs to know of the batch; all but the prefix is the same for every layer.
#[derive(Debug, Clone, Copy)]
pub struct Geometry<'a> {
    /// Visibility of each sequence, `[B, 2]`, I32: see [`crate::data::batch::Span`].
    pub spans: &'a Tensor,
    /// `[rows, 2]`, I32.
    pub positions: &'a Tensor,
    /// Cosines and sines by position.
    pub tables: &'a Tensor,
    /// Keys and values that this layer's queries see beside those of their sequence.
    pub prefix: Option<Prefix<'a>>,
}

impl Attention {
    /// Activations for up to `rows` rows.
    ///
    /// # Errors
    /// The device has no room.
    pub fn activations(&self, compute: Compute, rows: usize) -> Result<AttentionActivations> {
        let (wide, hidden) = self.query_key_value.extents();
        Ok(AttentionActivations {
            qkv: compute.zeros([rows, wide])?,
            context: compute.zeros([rows, hidden])?,
            log_sum_exp: compute.accumulators([rows * self.heads])?,
            linear: [
                self.query_key_value.activations(compute, rows)?,
                self.dense.activations(compute, rows)?,
            ],
        })
    }

    /// `y = dense(…) + alpha * x`. `fetched` are the two matrices when they were copied to where the layer computes.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(
        &self,
        x: &Tensor,
        fetched: Option<[WeightRef<'_>; 2]>,
        alpha: f64,
        geometry: Geometry<'_>,
        keys: Keys<'_>,
        dropout: [Option<Stream>; 2],
        activations: &mut AttentionActivations,
        scratch: &mut Scratch,
        y: &mut Tensor,
    ) -> Result<()> {
        self.project(
            x,
            fetched.map(|f| f[0]),
            geometry,
            dropout[0],
            activations,
            scratch,
        )?;
        let AttentionActivations {
            qkv,
            context,
            log_sum_exp,
            linear: [_, dense_linear],
        } = activations;
        let rows = x.extent(0);
        context.resize([rows, self.dense.extents().1])?;
        log_sum_exp.resize([rows * self.heads])?;
        match keys {
            Keys::Own => {
                ops::attention(
                    qkv,
                    geometry.spans,
                    geometry.prefix,
                    self.heads,
                    context,
                    log_sum_exp,
                )?;
            }
            Keys::Cache { keys, values, past } => {
                let cache = (keys, values);
                ops::attention_cached(
                    qkv,
                    cache,
                    past,
                    geometry.spans,
                    geometry.prefix,
                    self.heads,
                    context,
                    log_sum_exp,
                )?;
            }
        }
        self.dense.forward(
            context,
            fetched.map(|f| f[1]),
            Some((alpha, x)),
            dropout[1],
            dense_linear,
            scratch,
            y,
        )
    }

    /// The first part of [`Attention::forward`]: rotated q, k and v.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn project(
        &self,
        x: &Tensor,
        fetched: Option<WeightRef<'_>>,
        geometry: Geometry<'_>,
        dropout: Option<Stream>,
        activations: &mut AttentionActivations,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let AttentionActivations {
            qkv,
            linear: [linear, _],
            ..
        } = activations;
        qkv.resize([x.extent(0), self.query_key_value.extents().0])?;
        self.query_key_value
            .forward(x, fetched, None, dropout, linear, scratch, qkv)?;
        ops::rope(qkv, geometry.positions, geometry.tables, self.heads, false)
    }

    /// From `dy`: adds the parameters' gradients and those of the prefix, and writes `dx = … + alpha * dy` if asked for.
    ///
    /// `d_context [rows, hidden]` and `dqkv [rows, 3 hidden]` are scratch.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn backward(
        &mut self,
        x: &Tensor,
        fetched: Option<[WeightRef<'_>; 2]>,
        dy: &Tensor,
        alpha: f64,
        geometry: Geometry<'_>,
        prefix: Option<PrefixGradients<'_>>,
        dropout: [Option<Stream>; 2],
        activations: &AttentionActivations,
        (scratch, d_context, dqkv): (&mut Scratch, &mut Tensor, &mut Tensor),
        dx: Option<&mut Tensor>,
    ) -> Result<()> {
        let AttentionActivations {
            qkv,
            context,
            log_sum_exp,
            linear,
        } = activations;
        d_context.resize(context.shape())?;
        dqkv.resize(qkv.shape())?;
        self.dense.backward(
            context,
            fetched.map(|f| f[1]),
            dy,
            None,
            dropout[1],
            &linear[1],
            scratch,
            Some(d_context),
        )?;
        ops::attention_backward(
            d_context,
            qkv,
            context,
            log_sum_exp,
            geometry.spans,
            geometry.prefix.zip(prefix),
            self.heads,
            dqkv,
        )?;
        ops::rope(dqkv, geometry.positions, geometry.tables, self.heads, true)?;
        self.query_key_value.backward(
            x,
            fetched.map(|f| f[0]),
            dqkv,
            Some((alpha, dy)),
            dropout[0],
            &linear[0],
            scratch,
            dx,
        )
    }
}
