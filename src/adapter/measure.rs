//! How large an update is, and how far two of them are apart.

use super::Update;
use crate::error::Result;
use crate::factor::{self, Term};
use crate::ops;
use crate::tensor::{DType, Tensor};

/// Sizes of `s B A`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norms {
    /// `|s B A|`, the root of the sum of squares.
    pub frobenius: f64,
    /// The largest singular value.
    pub spectral: f64,
    /// How many directions it uses: `exp(-Σ p ln p)` with `p = σ / Σ σ` (Roy and Vetterli 2007), from 1 to the rank; 0 if the
    /// update is zero.
    pub effective_rank: f64,
}

impl Update {
    /// The update as a term of a sum, `factor` times.
    pub(super) fn term(&self, factor: f64) -> Term<'_> {
        (factor * self.scale, &self.b, &self.a)
    }
}

/// The sizes of an update.
///
/// # Errors
/// A number is not finite.
pub fn norms(update: &Update) -> Result<Norms> {
    let spectrum = factor::product_spectrum(&[update.term(1.0)])?;
    let sum: f64 = spectrum.iter().sum();
    let entropy: f64 = spectrum
        .iter()
        .map(|s| s / sum)
        .filter(|p| *p > 0.0)
        .map(|p| -p * p.ln())
        .sum();
    Ok(Norms {
        frobenius: root_of_squares(spectrum.iter().copied()),
        spectral: spectrum.first().copied().unwrap_or(0.0),
        effective_rank: if sum > 0.0 { entropy.exp() } else { 0.0 },
    })
}

/// Two updates of one linear.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// `|s B A|` of the first, 0 if it has none.
    pub first: f64,
    /// The same of the second.
    pub second: f64,
    /// `|s B A - s' B' A'|`.
    pub difference: f64,
    /// `<s B A, s' B' A'> / (|s B A| |s' B' A'|)`, if neither is zero.
    pub cosine: Option<f64>,
}

/// How far two updates of one linear are apart.
///
/// # Errors
/// They are of linears of different shapes; a number is not finite.
pub fn difference(first: Option<&Update>, second: Option<&Update>) -> Result<Difference> {
    let size = |update: Option<&Update>| match update {
        Some(update) => norm_of(&[update.term(1.0)]),
        None => Ok(0.0),
    };
    let (a, b) = (size(first)?, size(second)?);
    let (difference, inner) = match (first, second) {
        (Some(first), Some(second)) => (
            norm_of(&[first.term(1.0), second.term(-1.0)])?,
            factor::product_inner(first.term(1.0), second.term(1.0))?,
        ),
        _ => (a + b, 0.0),
    };
    Ok(Difference {
        first: a,
        second: b,
        difference,
        cosine: (a > 0.0 && b > 0.0).then(|| inner / (a * b)),
    })
}

/// `|Σ s B A|`.
pub(super) fn norm_of(terms: &[Term]) -> Result<f64> {
    Ok(root_of_squares(factor::product_spectrum(terms)?.into_iter()))
}

/// `√(Σ x²)`.
pub fn root_of_squares(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

/// `|W|`.
pub fn norm(tensor: &Tensor) -> f64 {
    let squares = tensor.to_dtype(DType::F32);
    squares
        .as_slice::<f32>()
        .iter()
        .map(|&x| f64::from(x) * f64::from(x))
        .sum::<f64>()
        .sqrt()
}

/// `|V - W|` of two tensors of one shape.
pub fn distance(v: &Tensor, w: &Tensor) -> f64 {
    let (v, w) = (v.to_dtype(DType::F32), w.to_dtype(DType::F32));
    let pairs = v.as_slice::<f32>().iter().zip(w.as_slice::<f32>());
    pairs
        .map(|(&v, &w)| (f64::from(v) - f64::from(w)).powi(2))
        .sum::<f64>()
        .sqrt()
}

/// `|m ⊙ V / |V| - W|` with `V = W + s B A`, row by row: how far DoRA moves a weight `[out, in]`.
///
/// # Errors
/// Shapes do not fit.
pub fn dora_change(update: &Update, weight: &Tensor) -> Result<f64> {
    let old = weight.to_dtype(DType::F32);
    let mut new = old.clone();
    ops::matmul(
        update.scale,
        (&update.b, false),
        (&update.a, false),
        1.0,
        &mut new,
    )?;
    let input = update.extents().1;
    let Some(magnitude) = &update.magnitude else {
        return Ok(distance(&new, &old));
    };
    let rows = new
        .as_slice::<f32>()
        .chunks_exact(input)
        .zip(old.as_slice::<f32>().chunks_exact(input));
    let mut squares = 0.0;
    for ((new, old), m) in rows.zip(magnitude.to_f64_vec()) {
        let stretch = m / root_of_squares(new.iter().map(|&x| f64::from(x)));
        squares += new
            .iter()
            .zip(old)
            .map(|(&v, &w)| (f64::from(v) * stretch - f64::from(w)).powi(2))
            .sum::<f64>();
    }
    Ok(squares.sqrt())
}
