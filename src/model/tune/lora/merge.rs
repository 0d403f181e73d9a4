//! Adapters added to the base's own weights: where a new run starts from the result of an earlier one.

use std::fmt;
use std::path::Path;

use super::folder::Folder;
use super::weight;
use crate::checkpoint::AdapterConfig;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::nn::Weight;
use crate::tensor::Tensor;

/// What [`merge`] did.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// The adapter's configuration.
    pub config: AdapterConfig,
    /// Linears whose weight was changed.
    pub linears: usize,
    /// How many of them are in 4 bits: decoded, changed, quantised again.
    pub requantized: usize,
    /// Tensors of `modules_to_save` that were put in the place of the base's.
    pub replaced: usize,
}

impl fmt::Display for Merged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r {} into {} linears", self.config.r, self.linears)?;
        if self.requantized > 0 {
            write!(f, ", {} of them in 4 bits: rounded anew", self.requantized)?;
        }
        if self.replaced > 0 {
            write!(f, ", {} tensors replaced", self.replaced)?;
        }
        Ok(())
    }
}

/// Adds the adapter of a PEFT folder to the base: `W += s B A`, with DoRA `W = m ⊙ (W + s B A) / |W + s B A|` row by row;
/// modules that trained whole take the places of the base's. Computed in F32 on the host, held as W was.
///
/// Adapters may follow each other; each is one of the base that those before it left.
///
/// # Errors
/// As [`super::load_adapter`]; the model carries an adapter already; the result does not fit the weight's type.
pub(in crate::model::tune) fn merge(model: &mut Model, dir: &Path) -> Result<Merged> {
    if model.linears().any(|linear| linear.lora.is_some()) {
        let remedy = "merge into the base first, then add the adapter that trains";
        let found = "a model that carries an adapter";
        return Err(Error::input(dir.display(), found, "a base without one", remedy));
    }
    let mut folder = Folder::read(dir)?;
    let scale = folder.scale();
    let (mut linears, mut requantized) = (0, 0);
    for (i, block) in model.blocks.iter_mut().enumerate() {
        for (module, linear) in block.linears_mut() {
            let Some(pair) = folder.take(i, module, linear.extents())? else {
                continue;
            };
            let mut w = weight::decoded(&linear.weight)?;
            weight::add_product(&mut w, scale, &pair.b, &pair.a)?;
            if let Some(magnitude) = &pair.magnitude {
                stretch(&mut w, magnitude);
            }
            let place = format!("{} merged into layer {i} {module}", dir.display());
            weight::replace(&mut linear.weight, &w, &place)?;
            linears += 1;
            requantized += usize::from(matches!(linear.weight, Weight::Quant(_)));
        }
    }
    let replaced = folder.put_saved(model, false)?;
    let config = folder.finish(linears)?;
    Ok(Merged {
        config,
        linears,
        requantized,
        replaced,
    })
}

/// Gives every row of `w` the length that `magnitude` says. A row of zeros becomes NaN, as in PEFT, and is refused later.
fn stretch(w: &mut Tensor, magnitude: &Tensor) {
    let (_, input) = w.shape().rows_and_columns();
    let rows = w.as_mut_slice::<f32>().chunks_exact_mut(input);
    for (row, m) in rows.zip(magnitude.to_f64_vec()) {
        let square: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let factor = m / square.sqrt();
        row.iter_mut().for_each(|x| *x = (f64::from(*x) * factor) as f32);
    }
}
