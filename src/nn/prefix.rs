//! The prefix encoder of P-Tuning v2 (Liu et al. 2022).
//!
//! A table `[P, 2 L hidden]` holds in row p the key of layer 0, its value, the key of layer 1, ... of position p, head after
//! head. It is an embedding, or two linears of a smaller one. Keys and values of a layer are taken out of it when the layer
//! comes up, forward and backward, into buffers that all layers share; dropout masks are drawn again.

use super::Param;
use crate::error::Result;
use crate::ops::{self, Prefix, PrefixGradients, WeightRef};
use crate::rng::Stream;
use crate::tensor::{Compute, Tensor};

/// Keys and values that every query of every layer sees before those of its sequence: no rotation, no mask. Its parameters
/// are of the type of sums on every device.
#[derive(Debug, Clone)]
pub struct PrefixEncoder {
    /// `[P, 2 L hidden]`, or `[P, hidden]` with a projection.
    pub embedding: Param,
    /// From the embedding to keys and values.
    pub projection: Option<Projection>,
    /// Probability that an element of a key or value is dropped, in training.
    pub dropout: f32,
}

/// `x -> tanh(x W0ᵀ + b0) W2ᵀ + b2`.
#[derive(Debug, Clone)]
pub struct Projection {
    /// `W0 [hidden, hidden]`.
    pub inner: Param,
    /// `b0 [hidden]`.
    pub inner_bias: Param,
    /// `W2 [2 L hidden, hidden]`.
    pub outer: Param,
    /// `b2 [2 L hidden]`.
    pub outer_bias: Param,
}

/// What the projection keeps for its backward pass.
#[derive(Debug)]
struct ProjectionActivations {
    /// Before the tanh, `[P, hidden]`.
    linear: Tensor,
    /// After it.
    inner: Tensor,
    table: Tensor,
}

/// The table of a pass, and the keys and values of the layer at hand.
#[derive(Debug)]
pub struct PrefixActivations {
    heads: usize,
    projection: Option<ProjectionActivations>,
    keys: Tensor,
    values: Tensor,
    backward: Option<PrefixBackward>,
}

/// Buffers of the backward pass.
#[derive(Debug)]
struct PrefixBackward {
    d_keys: Tensor,
    d_values: Tensor,
    /// Of the projection: the gradients over its table and over its inner layer.
    projection: Option<(Tensor, Tensor)>,
}

impl PrefixActivations {
    /// Keys and values of the layer that [`PrefixEncoder::layer`] was called for.
    pub fn prefix(&self) -> Prefix<'_> {
        Prefix {
            keys: &self.keys,
            values: &self.values,
        }
    }

    /// These, and zeroed gradients over them.
    ///
    /// # Errors
    /// The activations were not made for a backward pass; the device refuses.
    pub fn prefix_and_gradients(&mut self) -> Result<(Prefix<'_>, Option<PrefixGradients<'_>>)> {
        let prefix = Prefix {
            keys: &self.keys,
            values: &self.values,
        };
        let Some(PrefixBackward { d_keys, d_values, .. }) = &mut self.backward else {
            return Ok((prefix, None));
        };
        for (gradient, of) in [(&mut *d_keys, &self.keys), (&mut *d_values, &self.values)] {
            gradient.resize(of.shape())?;
            gradient.zero()?;
        }
        let gradients = PrefixGradients {
            keys: d_keys,
            values: d_values,
        };
        Ok((prefix, Some(gradients)))
    }
}

/// The name of the encoder in the official checkpoints.
pub(crate) const PREFIX_ENCODER: &str = "transformer.prefix_encoder";

impl PrefixEncoder {
    /// P, the keys of the prefix.
    pub fn len(&self) -> usize {
        self.embedding.value.extent(0)
    }

    /// Is there no key at all?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Does the encoder train?
    pub fn trains(&self) -> bool {
        self.embedding.trains()
    }

    /// Activations for up to `size` sequences with `heads` heads of `head_dim`, `backward` or only for a forward pass.
    ///
    /// # Errors
    /// The device has no room.
    pub fn activations(
        &self,
        compute: Compute,
        size: usize,
        [heads, head_dim]: [usize; 2],
        backward: bool,
    ) -> Result<PrefixActivations> {
        let length = self.len();
        let size = if self.dropout > 0.0 && backward { size } else { 1 };
        let shape = [size, heads, length, head_dim];
        let extents = |p: &Projection| p.outer.value.shape().rows_and_columns();
        let projection = self.projection.as_ref().map(|p| {
            let (columns, hidden) = extents(p);
            Ok(ProjectionActivations {
                linear: compute.accumulators([length, hidden])?,
                inner: compute.accumulators([length, hidden])?,
                table: compute.accumulators([length, columns])?,
            })
        });
        let gradients = |p: &Projection| {
            let (columns, hidden) = extents(p);
            Ok((
                compute.accumulators([length, columns])?,
                compute.accumulators([length, hidden])?,
            ))
        };
        Ok(PrefixActivations {
            heads,
            projection: projection.transpose()?,
            keys: compute.zeros(shape)?,
            values: compute.zeros(shape)?,
            backward: match backward {
                true => Some(PrefixBackward {
                    d_keys: compute.accumulators(shape)?,
                    d_values: compute.accumulators(shape)?,
                    projection: self.projection.as_ref().map(gradients).transpose()?,
                }),
                false => None,
            },
        })
    }

    /// Begins a pass: fills the table, which without a projection is the embedding itself.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, activations: &mut PrefixActivations) -> Result<()> {
        let (Some(p), Some(a)) = (&self.projection, &mut activations.projection) else {
            return Ok(());
        };
        let linear = |x: &Tensor, w: &Param, b: &Param, y: &mut Tensor| {
            ops::linear(x, WeightRef::Dense(&w.value), Some(&b.value), None, y)
        };
        linear(&self.embedding.value, &p.inner, &p.inner_bias, &mut a.linear)?;
        ops::tanh(&a.linear, &mut a.inner)?;
        linear(&a.inner, &p.outer, &p.outer_bias, &mut a.table)
    }

    /// Takes keys and values of layer `layer` out of the table: for all `size` sequences, or with dropout (off without a
    /// stream) for each its own.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn layer(
        &self,
        layer: usize,
        size: usize,
        dropout: Option<Stream>,
        activations: &mut PrefixActivations,
    ) -> Result<()> {
        let PrefixActivations {
            heads,
            projection,
            keys,
            values,
            ..
        } = activations;
        let table = projection.as_ref().map_or(&self.embedding.value, |p| &p.table);
        let dropout = self.mask(dropout);
        let size = if dropout.is_some() { size } else { 1 };
        let head_dim = keys.extent(3);
        for (i, heads_of_layer) in [(2 * layer, keys), (2 * layer + 1, values)] {
            heads_of_layer.resize([size, *heads, self.len(), head_dim])?;
            ops::prefix_heads(table, i, dropout, heads_of_layer)?;
        }
        Ok(())
    }

    /// Fills keys and values `[1, heads, P, d]` of every layer, for generation: without dropout.
    ///
    /// # Errors
    /// Shapes do not fit; the device has no room.
    pub fn fill(&self, compute: Compute, layers: &mut [(Tensor, Tensor)]) -> Result<()> {
        let Some((first, _)) = layers.first() else {
            return Ok(());
        };
        let heads = [first.extent(1), first.extent(3)];
        let mut activations = self.activations(compute, 1, heads, false)?;
        self.forward(&mut activations)?;
        let projection = activations.projection.as_ref();
        let table = projection.map_or(&self.embedding.value, |p| &p.table);
        for (i, (keys, values)) in layers.iter_mut().enumerate() {
            ops::prefix_heads(table, 2 * i, None, keys)?;
            ops::prefix_heads(table, 2 * i + 1, None, values)?;
        }
        Ok(())
    }

    fn mask(&self, dropout: Option<Stream>) -> Option<(f32, Stream)> {
        let stream = dropout.filter(|_| self.dropout > 0.0)?;
        Some((self.dropout, stream))
    }

    /// Begins a backward pass: no layer has given to the table's gradient yet.
    ///
    /// # Errors
    /// The device refuses.
    pub fn begin_backward(&self, activations: &mut PrefixActivations) -> Result<()> {
        match &mut activations.backward {
            Some(PrefixBackward {
                projection: Some((d_table, _)),
                ..
            }) => d_table.zero(),
            _ => Ok(()),
        }
    }

    /// Adds the gradients over keys and values of layer `layer` to that over the table.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn backward_layer(
        &mut self,
        layer: usize,
        dropout: Option<Stream>,
        activations: &mut PrefixActivations,
    ) -> Result<()> {
        let dropout = self.mask(dropout);
        let (Some(d_embedding), Some(backward)) = (&mut self.embedding.grad, &mut activations.backward)
        else {
            return Ok(());
        };
        let PrefixBackward {
            d_keys,
            d_values,
            projection,
        } = backward;
        let d_table = projection.as_mut().map_or(d_embedding, |(d_table, _)| d_table);
        ops::prefix_heads_backward(d_keys, 2 * layer, dropout, d_table)?;
        ops::prefix_heads_backward(d_values, 2 * layer + 1, dropout, d_table)
    }

    /// Ends a backward pass: from the table's gradient to those of the projection and its embedding.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn backward(&mut self, activations: &mut PrefixActivations) -> Result<()> {
        let PrefixActivations {
            projection, backward, ..
        } = activations;
        let gradients = backward.as_mut().and_then(|b| b.projection.as_mut());
        let (Some(p), Some(a), Some((d_table, d_inner))) = (&mut self.projection, projection, gradients)
        else {
            return Ok(());
        };
        let parameters = |d: &Tensor, x: &Tensor, w: &mut Param, b: &mut Param| {
            if let Some(dw) = &mut w.grad {
                ops::matmul(1.0, (d, true), (x, false), 1.0, dw)?;
            }
            match &mut b.grad {
                Some(db) => ops::accumulate_column_sums(d, db),
                None => Ok(()),
            }
        };
        parameters(d_table, &a.inner, &mut p.outer, &mut p.outer_bias)?;
        ops::matmul(1.0, (d_table, false), (&p.outer.value, false), 0.0, d_inner)?;
        ops::tanh_backward(&a.inner, d_inner)?;
        parameters(d_inner, &self.embedding.value, &mut p.inner, &mut p.inner_bias)?;
        match &mut self.embedding.grad {
            Some(d) => ops::matmul(1.0, (d_inner, false), (&p.inner.value, false), 1.0, d),
            None => Ok(()),
        }
    }

    /// Visits the parameters by their official names.
    pub(crate) fn for_each_param<'a>(&'a self, f: &mut dyn FnMut(&str, &'a Param)) {
        f(&format!("{PREFIX_ENCODER}.embedding.weight"), &self.embedding);
        if let Some(p) = &self.projection {
            f(&format!("{PREFIX_ENCODER}.trans.0.weight"), &p.inner);
            f(&format!("{PREFIX_ENCODER}.trans.0.bias"), &p.inner_bias);
            f(&format!("{PREFIX_ENCODER}.trans.2.weight"), &p.outer);
            f(&format!("{PREFIX_ENCODER}.trans.2.bias"), &p.outer_bias);
        }
    }

    /// [`PrefixEncoder::for_each_param`], to change them.
    pub(crate) fn for_each_param_mut<'a>(
        &'a mut self,
        f: &mut dyn FnMut(&str, &'a mut Param) -> Result<()>,
    ) -> Result<()> {
        f(&format!("{PREFIX_ENCODER}.embedding.weight"), &mut self.embedding)?;
        let Some(p) = &mut self.projection else {
            return Ok(());
        };
        f(&format!("{PREFIX_ENCODER}.trans.0.weight"), &mut p.inner)?;
        f(&format!("{PREFIX_ENCODER}.trans.0.bias"), &mut p.inner_bias)?;
        f(&format!("{PREFIX_ENCODER}.trans.2.weight"), &mut p.outer)?;
        f(&format!("{PREFIX_ENCODER}.trans.2.bias"), &mut p.outer_bias)
    }
}
