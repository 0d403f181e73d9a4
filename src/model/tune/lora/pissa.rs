//! PiSSA (Meng et al. 2024): adapters that start as the principal part of the weight, which keeps the rest.
//!
//! With `W = U S Vᵀ`, `B₀ = U √(S / s)`, `A₀ = √(S / s) Vᵀ` (the r largest), `W_res = W - s B₀ A₀` takes the place of W and
//! B, A train on from B₀, A₀. A dense weight is held in the type that it had, as in PEFT. A 4-bit weight is decoded, and
//! the rest quantised again in the same way (QPiSSA, here of the decoded weight): the model starts as
//! `quantised(W_res) + s B₀ A₀`.
//!
//! What is saved is a plain adapter of rank 2r for the original base: `s (B A - B₀ A₀) = s [B, -B₀] [A; A₀]`. It gives the
//! model that was trained up to how W_res was rounded: nothing to see in F32, 2^-12 of a weight in F16; in 4 bits the
//! difference between two quantisations, so use such an adapter on the dense base or merge it there.

use super::weight;
use crate::error::{Error, Result};
use crate::factor;
use crate::nn::{Linear, Weight};
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

/// `A₀ [r, in]` and `B₀ [out, r]` of a weight, F32 on the host.
///
/// # Errors
/// The rank is above the lesser extent of the weight, which is named `place`; a weight is not finite.
pub(super) fn principal(
    place: &str,
    w: &Weight,
    r: usize,
    scale: f64,
    iterations: Option<usize>,
    stream: Stream,
) -> Result<(Tensor, Tensor)> {
    let (out, input) = w.as_ref().extents();
    if r > out.min(input) {
        let found = format!("--lora-r {r}");
        let expected = format!("at most {} for a weight [{out}, {input}]", out.min(input));
        return Err(Error::input(place, found, expected, "give a lower rank"));
    }
    let w = weight::decoded(w)?;
    crate::checkpoint::refuse_non_finite(place, &w)?;
    let factors = match iterations {
        None => factor::svd(&w, r)?,
        Some(iterations) => factor::low_rank(&w, r, iterations, stream)?,
    };
    let roots: Vec<f64> = factors.s.iter().map(|s| (s / scale).sqrt()).collect();
    let (mut a, mut b) = (factors.vt, factors.u);
    for (row, root) in a.as_mut_slice::<f32>().chunks_exact_mut(input).zip(&roots) {
        row.iter_mut().for_each(|x| *x = (f64::from(*x) * root) as f32);
    }
    for row in b.as_mut_slice::<f32>().chunks_exact_mut(r) {
        for (x, root) in row.iter_mut().zip(&roots) {
            *x = (f64::from(*x) * root) as f32;
        }
    }
    Ok((a, b))
}

/// Replaces the weight of `linear` by `W - scale * b a`. Depends on nothing but the three: a run that goes on finds the same
/// bits.
///
/// # Errors
/// The device has no room.
pub(super) fn leave_rest(
    linear: &mut Linear,
    place: &str,
    scale: f64,
    (a, b): &(Tensor, Tensor),
) -> Result<()> {
    let mut w = weight::decoded(&linear.weight)?;
    weight::add_product(&mut w, -scale, b, a)?;
    weight::replace(&mut linear.weight, &w, place)
}

/// `[a; a0]` and `[b, -b0]`: the adapter of rank 2r for the original base.
pub(super) fn joined(a: &Tensor, b: &Tensor, (a0, b0): &(Tensor, Tensor)) -> (Tensor, Tensor) {
    let (r, input) = a.shape().rows_and_columns();
    let out = b.extent(0);
    let rows = [a.as_slice::<f32>(), a0.as_slice::<f32>()].concat();
    let mut columns = Vec::with_capacity(2 * out * r);
    for (b, b0) in b
        .as_slice::<f32>()
        .chunks_exact(r)
        .zip(b0.as_slice::<f32>().chunks_exact(r))
    {
        columns.extend_from_slice(b);
        columns.extend(b0.iter().map(|x| -x));
    }
    (
        Tensor::from_slice(&rows, [2 * r, input]),
        Tensor::from_slice(&columns, [out, 2 * r]),
    )
}

/// What [`joined`] joined, to the bit: a, b and the pair a0, b0.
pub(super) fn parted(a: &Tensor, b: &Tensor) -> (Tensor, Tensor, (Tensor, Tensor)) {
    let (a, b) = (a.to_dtype(DType::F32), b.to_dtype(DType::F32));
    let (r, input) = (a.extent(0) / 2, a.extent(1));
    let out = b.extent(0);
    let (first, second) = a.as_slice::<f32>().split_at(r * input);
    let (mut left, mut right) = (Vec::with_capacity(out * r), Vec::with_capacity(out * r));
    for row in b.as_slice::<f32>().chunks_exact(2 * r) {
        left.extend_from_slice(&row[..r]);
        right.extend(row[r..].iter().map(|x| -x));
    }
    let rows = |x: &[f32]| Tensor::from_slice(x, [r, input]);
    let columns = |x: &[f32]| Tensor::from_slice(x, [out, r]);
    (rows(first), columns(&left), (rows(second), columns(&right)))
}
