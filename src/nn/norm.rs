//! LayerNorm with weight and bias.

use super::Param;
use crate::error::Result;
use crate::ops;
use crate::tensor::{Compute, Tensor};

/// `y = (x - mean) / sqrt(var + eps) * weight + bias` over the last axis.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    /// `[features]`.
    pub weight: Param,
    /// `[features]`.
    pub bias: Param,
    /// Added to the variance.
    pub eps: f64,
}

/// Output and statistics.
#[derive(Debug)]
pub struct NormActivations {
    /// The normalised rows `[rows, features]`.
    pub y: Tensor,
    /// Mean and reciprocal standard deviation of each row, `[rows, 2]`.
    pub stats: Tensor,
}

impl NormActivations {
    /// For up to `rows` rows of `features`.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(compute: Compute, rows: usize, features: usize) -> Result<Self> {
        Ok(Self {
            y: compute.zeros([rows, features])?,
            stats: compute.accumulators([rows, 2])?,
        })
    }
}

impl LayerNorm {
    /// Does the layer train?
    pub fn trains(&self) -> bool {
        self.weight.trains() || self.bias.trains()
    }

    /// Fills `activations` from `x [rows, features]`.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, x: &Tensor, activations: &mut NormActivations) -> Result<()> {
        activations.y.resize(x.shape())?;
        activations.stats.resize([x.extent(0), 2])?;
        let NormActivations { y, stats } = activations;
        ops::layer_norm(x, &self.weight.value, &self.bias.value, self.eps, y, stats)
    }

    /// From `dy` and the rows' statistics: adds the parameters' gradients and writes `dx` if asked for.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn backward(
        &mut self,
        x: &Tensor,
        dy: &Tensor,
        stats: &Tensor,
        dx: Option<&mut Tensor>,
    ) -> Result<()> {
        if let (Some(dw), Some(db)) = (&mut self.weight.grad, &mut self.bias.grad) {
            ops::layer_norm_backward_parameters(dy, x, stats, dw, db)?;
        }
        match dx {
            Some(dx) => ops::layer_norm_backward_input(dy, x, &self.weight.value, stats, dx),
            None => Ok(()),
        }
    }

    pub(crate) fn for_each_param<'a>(&'a self, name: &str, f: &mut dyn FnMut(&str, &'a Param)) {
        f(&format!("{name}.weight"), &self.weight);
        f(&format!("{name}.bias"), &self.bias);
    }

    pub(crate) fn for_each_param_mut<'a>(
        &'a mut self,
        name: &str,
        f: &mut dyn FnMut(&str, &'a mut Param) -> Result<()>,
    ) -> Result<()> {
        f(&format!("{name}.weight"), &mut self.weight)?;
        f(&format!("{name}.bias"), &mut self.bias)
    }
}
