//! Adapters made of adapters: scaled, added, of another rank.

use std::collections::{BTreeMap, BTreeSet};

use rayon::prelude::*;

use super::measure::{norm_of, root_of_squares};
use super::{Adapter, Update};
use crate::checkpoint::{AdapterConfig, Patterns};
use crate::error::{Error, Result};
use crate::factor::{self, Factors};
use crate::tensor::{DType, Tensor};

/// How many singular values stay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rank {
    /// At most so many, in every linear.
    Fixed(usize),
    /// In each linear as few as leave an error of at most this part of its norm.
    Error(f64),
}

/// What became of one linear's update.
#[derive(Debug, Clone, PartialEq)]
pub struct Resized {
    /// The linear.
    pub module: String,
    /// Its rank before.
    pub before: usize,
    /// Its rank now.
    pub after: usize,
    /// `|s B A|` before.
    pub norm: f64,
    /// `|s B A - s' B' A'|`, of the factors as they are written.
    pub error: f64,
}

/// The whole error, relative to the whole norm: `√(Σ error²) / √(Σ norm²)`, 0 if there was nothing.
pub fn total_error(resized: &[Resized]) -> f64 {
    let norm = root_of_squares(resized.iter().map(|r| r.norm));
    match norm > 0.0 {
        true => root_of_squares(resized.iter().map(|r| r.error)) / norm,
        false => 0.0,
    }
}

impl Update {
    /// The same product with rows and columns of zeros up to rank `r`.
    pub(super) fn padded(&self, r: usize) -> Self {
        let ((out, input), old) = (self.extents(), self.rank());
        if old >= r {
            return self.clone();
        }
        let (mut a, mut b) = (
            Tensor::zeros(DType::F32, [r, input]),
            Tensor::zeros(DType::F32, [out, r]),
        );
        a.as_mut_slice::<f32>()[..old * input].copy_from_slice(self.a.as_slice::<f32>());
        let rows = b.as_mut_slice::<f32>().chunks_exact_mut(r);
        for (row, from) in rows.zip(self.b.as_slice::<f32>().chunks_exact(old)) {
            row[..old].copy_from_slice(from);
        }
        Self { a, b, ..self.clone() }
    }

    /// The same product with another scale: B takes what is left, rounded to F32 unless the scale stays.
    pub(super) fn with_scale(&self, scale: f64) -> Self {
        if scale.to_bits() == self.scale.to_bits() {
            return self.clone();
        }
        let factor = self.scale / scale;
        let b: Vec<f32> = self
            .b
            .as_slice::<f32>()
            .iter()
            .map(|&x| (f64::from(x) * factor) as f32)
            .collect();
        Self {
            scale,
            b: Tensor::from_slice(&b, self.b.shape()),
            ..self.clone()
        }
    }
}

/// The adapter `factor` times as strong: alpha grows, A and B stay to the bit. As PEFT's `scale_layer`, magnitudes of DoRA and
/// modules that trained whole stay too.
///
/// # Errors
/// The factor is not finite.
pub fn scale(adapter: &Adapter, factor: f64) -> Result<Adapter> {
    if !factor.is_finite() {
        return Err(Error::input("--factor", factor, "a finite number", "use 0 to 1"));
    }
    let mut scaled = adapter.clone();
    scaled.config.lora_alpha *= factor;
    scaled.config.alpha_pattern = scaled.config.alpha_pattern.map(|alpha| factor * alpha);
    for (module, update) in &mut scaled.updates {
        update.scale = scaled.config.scale(module);
    }
    Ok(scaled)
}

/// The sum of adapters, each times its weight: `Σ w s B A` for each linear, exactly, by factors beside each other: A below A, B
/// beside B. Ranks add up; linears that only some of them adapt keep the ranks of those.
///
/// Where all `w s` of a linear are one number, that is its scale and no number is rounded; elsewhere B takes it, in F32.
///
/// # Errors
/// No adapter; DoRA, whose sum is no DoRA; modules that trained whole in more than one of them or with a weight other than 1, whose
/// sum needs the base; linears of different shapes; a weight is not finite.
pub fn add(adapters: &[(&Adapter, f64)]) -> Result<Adapter> {
    let Some((first, _)) = adapters.first() else {
        return Err(Error::input(
            "adapters",
            "none",
            "at least one",
            "name adapter folders",
        ));
    };
    for (adapter, weight) in adapters {
        let refused = |found: &str, expected: &str, remedy: &str| {
            Err(Error::input(adapter.dir.display(), found, expected, remedy))
        };
        if !weight.is_finite() {
            return Err(Error::input("--weights", weight, "finite numbers", "use 0 to 1"));
        }
        if adapters.len() > 1 && adapter.config.use_dora {
            let remedy = "merge it into the base with `glmtune merge`, and add the others there";
            return refused(
                "DoRA, whose magnitudes belong to one direction",
                "LoRA adapters",
                remedy,
            );
        }
    }
    let saved = added_modules(adapters)?;
    let modules: BTreeSet<&String> = adapters
        .iter()
        .flat_map(|(adapter, _)| adapter.updates.keys())
        .collect();
    let mut updates = BTreeMap::new();
    for &module in &modules {
        let terms: Vec<(&Adapter, &Update, f64)> = adapters
            .iter()
            .filter_map(|(adapter, weight)| {
                let update = adapter.updates.get(module)?;
                Some((*adapter, update, weight * update.scale))
            })
            .collect();
        let extents = terms[0].1.extents();
        if let Some((other, update, _)) = terms.iter().find(|(_, update, _)| update.extents() != extents) {
            let place = format!("{}: {module}", other.dir.display());
            let found = format!("a weight of {:?}", update.extents());
            let expected = format!("one of {extents:?}, as in {}", terms[0].0.dir.display());
            let remedy = "adapters of different base models cannot be added";
            return Err(Error::input(place, found, expected, remedy));
        }
        let factors: Vec<(f64, &Tensor, &Tensor)> = terms.iter().map(|(_, u, s)| (*s, &u.b, &u.a)).collect();
        let mut update = beside(&factors);
        update.magnitude = terms[0].1.magnitude.clone();
        updates.insert(module.clone(), update);
    }
    let folders: Vec<&Adapter> = adapters.iter().map(|(adapter, _)| *adapter).collect();
    let (target_modules, layers_to_transform) = Adapter::joined_targets(&folders, &modules);
    let mut modules_to_save: Vec<String> = Vec::new();
    for name in adapters
        .iter()
        .flat_map(|(adapter, _)| &adapter.config.modules_to_save)
    {
        if !modules_to_save.contains(name) {
            modules_to_save.push(name.clone());
        }
    }
    let mut sum = Adapter {
        dir: first.dir.clone(),
        config: AdapterConfig {
            target_modules,
            layers_to_transform,
            modules_to_save,
            // One scale means one thing only: that of several ranks is alpha / r.
            use_rslora: false,
            rank_pattern: Patterns::none(),
            alpha_pattern: Patterns::none(),
            ..first.config.clone()
        },
        updates,
        saved,
    };
    sum.config = sum.described()?;
    Ok(sum)
}

/// The modules that trained whole: only one adapter may bring each, as it is.
fn added_modules(adapters: &[(&Adapter, f64)]) -> Result<BTreeMap<String, Tensor>> {
    let mut saved: BTreeMap<String, Tensor> = BTreeMap::new();
    for (adapter, weight) in adapters {
        for (name, tensor) in &adapter.saved {
            let place = format!("{}: {}", adapter.dir.display(), name.escape_debug());
            let remedy = "merge the adapters into the base with `glmtune merge`";
            if *weight != 1.0 {
                let found = format!("a module that trained whole, and the weight {weight}");
                return Err(Error::input(
                    place,
                    found,
                    "the weight 1: part of it needs the base",
                    remedy,
                ));
            }
            if saved.insert(name.clone(), tensor.clone()).is_some() {
                let found = "a module that trained whole in another adapter too";
                return Err(Error::input(place, found, "at most one that replaces it", remedy));
            }
        }
    }
    Ok(saved)
}

/// `Σ s B A` as one product.
fn beside(terms: &[(f64, &Tensor, &Tensor)]) -> Update {
    let (scale, same) = (
        terms[0].0,
        terms.iter().all(|(s, ..)| s.to_bits() == terms[0].0.to_bits()),
    );
    let (scale, factor): (f64, fn(f64) -> f64) = match same && scale != 0.0 {
        true => (scale, |_| 1.0),
        false => (1.0, |s| s),
    };
    let (out, input) = (terms[0].1.extent(0), terms[0].2.extent(1));
    let r: usize = terms.iter().map(|(_, b, _)| b.extent(1)).sum();
    let a: Vec<f32> = terms
        .iter()
        .flat_map(|(_, _, a)| a.as_slice::<f32>())
        .copied()
        .collect();
    let mut b = Vec::with_capacity(out * r);
    for row in 0..out {
        for &(s, from, _) in terms {
            let width = from.extent(1);
            let values = &from.as_slice::<f32>()[row * width..][..width];
            b.extend(values.iter().map(|&x| (f64::from(x) * factor(s)) as f32));
        }
    }
    Update {
        scale,
        a: Tensor::from_slice(&a, [r, input]),
        b: Tensor::from_slice(&b, [out, r]),
        magnitude: None,
    }
}

/// The adapter of a lower rank that is nearest to it in every linear: the largest singular triples of `s B A`, shared out evenly between
/// B and A. Scales stay; so do DoRA's magnitudes and modules that trained whole.
///
/// # Errors
/// The rank is 0 or above that of every linear; the error is not in 0..1; a number is not finite.
pub fn resize(adapter: &Adapter, rank: Rank) -> Result<(Adapter, Vec<Resized>)> {
    let highest = adapter.updates.values().map(Update::rank).max().unwrap_or(0);
    match rank {
        Rank::Fixed(r) if !(1..=highest).contains(&r) => {
            let expected = format!("from 1 to {highest}, the highest rank there is");
            return Err(Error::input("--rank", r, expected, "a rank can only be lowered"));
        }
        Rank::Error(e) if !(0.0..1.0).contains(&e) => {
            let expected = "a part of the norm, from 0 and below 1";
            return Err(Error::input("--error", e, expected, "use 0.01 to 0.2"));
        }
        _ => {}
    }
    let each: Vec<(&String, &Update)> = adapter.updates.iter().collect();
    let done: Vec<(Update, Resized)> = each
        .par_iter()
        .map(|(module, update)| {
            let new = nearest(update, rank)?;
            let resized = Resized {
                module: module.to_string(),
                before: update.rank(),
                after: new.rank(),
                norm: norm_of(&[update.term(1.0)])?,
                error: norm_of(&[update.term(1.0), new.term(-1.0)])?,
            };
            Ok((new, resized))
        })
        .collect::<Result<_>>()?;
    let mut lower = adapter.clone();
    let mut report = Vec::with_capacity(done.len());
    for (update, resized) in done {
        lower.updates.insert(resized.module.clone(), update);
        report.push(resized);
    }
    lower.config = lower.described()?;
    Ok((lower, report))
}

/// The nearest update of a lower rank.
fn nearest(update: &Update, rank: Rank) -> Result<Update> {
    let Factors { u, s, vt } = factor::product_svd(&[update.term(1.0)])?;
    let r = match rank {
        Rank::Fixed(r) => r.min(update.rank()).min(s.len()),
        Rank::Error(part) => {
            let allowed = part * root_of_squares(s.iter().copied());
            let left = |r: usize| root_of_squares(s[r..].iter().copied());
            (1..=s.len()).find(|&r| left(r) <= allowed).unwrap_or(s.len())
        }
    };
    let ((out, input), triples) = (update.extents(), s.len());
    // U D Vᵀ = scale (U √(D / scale)) (√(D / scale) Vᵀ)
    let scale = match update.scale.abs() {
        0.0 => 1.0,
        scale => scale,
    };
    let roots: Vec<f64> = s[..r].iter().map(|s| (s / scale).sqrt()).collect();
    let (u, vt) = (u.as_slice::<f64>(), vt.as_slice::<f64>());
    let a: Vec<f32> = roots
        .iter()
        .zip(vt.chunks_exact(input))
        .flat_map(|(root, row)| row.iter().map(move |x| (x * root) as f32))
        .collect();
    let b: Vec<f32> = u
        .chunks_exact(triples)
        .flat_map(|row| row.iter().zip(&roots).map(|(x, root)| (x * root) as f32))
        .collect();
    Ok(Update {
        scale,
        a: Tensor::from_slice(&a, [r, input]),
        b: Tensor::from_slice(&b, [out, r]),
        magnitude: update.magnitude.clone(),
    })
}
