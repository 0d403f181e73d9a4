//! Adapters added to the base's own weights: where a new run starts from the result of an earlier one.

use std::fmt;
use std::path::Path;

use super::folder::placed;
use super::merger::{Merger, Strength};
use super::{saved, weight};
use crate::checkpoint::AdapterConfig;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::nn::Weight;
use crate::tensor::Device;

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
    let merger = Merger::open(model.config(), &[Strength { dir, factor: 1.0 }])?;
    let (mut linears, mut requantized) = (0, 0);
    for (i, block) in model.blocks.iter_mut().enumerate() {
        for (module, linear) in block.linears_mut() {
            let name = format!("transformer.layers.{i}.{module}.weight");
            if !merger.changes(&name) {
                continue;
            }
            let w = merger.merge(&name, weight::decoded(&linear.weight)?)?;
            let place = format!("{} merged into layer {i} {module}", dir.display());
            weight::replace(&mut linear.weight, &w, &place)?;
            linears += 1;
            requantized += usize::from(!matches!(linear.weight, Weight::Dense(_)));
        }
    }
    let (_, config) = merger.adapters().next().expect("one adapter was opened");
    let config = config.clone();
    let replaced = replace_saved(model, &merger)?;
    Ok(Merged {
        config,
        linears,
        requantized,
        replaced,
    })
}

/// Puts modules that trained whole in their places, frozen: on the host in the type of sums, on a device in the type of the
/// matrix that was there. Returns how many tensors they are.
fn replace_saved(model: &mut Model, merger: &Merger) -> Result<usize> {
    let (dtype, device) = (model.dtype().accumulator(), model.device());
    let modules = merger.saved();
    let mut count = 0;
    saved::for_each(model, modules, &mut |name, param| {
        let Some(new) = merger.replacement(name) else {
            return Ok(());
        };
        let tensor = match new.needs_base() {
            true => new.over(&param.value.to_device(Device::Cpu)?),
            false => new.over(&param.value),
        };
        let dtype = match device {
            Device::Cuda(_) => param.value.dtype(),
            Device::Cpu => dtype,
        };
        *param = placed(&tensor, dtype, device, false)?;
        count += 1;
        Ok(())
    })?;
    Ok(count)
}
