//! Training the base's own weights: all of them, or some layers. What trains is held in the type of sums, on every device:
//! products round it as they read it, and there is no second copy unless [`super::Storage`] parts the two.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use super::storage::{MasterPlace, Trainable, set_value};
use crate::checkpoint::{Checkpoint, read_tensors, write_safetensors};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::nn::{Param, Weight};
use crate::tensor::{Device, Tensor, check_memory};

/// What of a layer trains, after the names that LLaMA-Factory takes: a tensor does when its name contains that of the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FreezeModules {
    /// Everything of the layer. Only this trains its LayerNorms.
    #[default]
    All,
    /// `mlp.dense_h_to_4h` and `mlp.dense_4h_to_h`.
    Mlp,
    /// `attention.query_key_value` and `attention.dense`.
    Attention,
}

impl FreezeModules {
    /// All of them.
    pub const ALL: [FreezeModules; 3] = [Self::All, Self::Mlp, Self::Attention];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Mlp => "mlp",
            Self::Attention => "attention",
        }
    }
}

impl fmt::Display for FreezeModules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for FreezeModules {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|m| m.name() == s).ok_or_else(|| {
            let expected = Self::ALL.map(Self::name).join(", ");
            Error::input("--trainable-modules", s, expected, "name one of them")
        })
    }
}

/// The file of a checkpoint with what trains.
const TRAINED: &str = "trained.safetensors";

/// Refuses `what` if it is too large to train in the host's memory: value, gradient and the two moments of the optimizer for each
/// element, but for what is lent or on disk.
fn check_room(model: &Model, what: &str, trains: &dyn Fn(&str) -> bool) -> Result<()> {
    let mut elements = 0;
    model.for_each_param(&mut |name, param| {
        if trains(name) {
            elements += param.value.elements();
        }
    });
    if model.device() != Device::Cpu {
        return Ok(());
    }
    // Whoever has masters on disk has moments there.
    let stored = match model.storage.masters {
        MasterPlace::Disk(_) => 0,
        MasterPlace::Device | MasterPlace::Host => 3,
    };
    let numbers = stored + u128::from(!model.storage.lent_gradients);
    let bytes = numbers * model.dtype().accumulator().size() as u128 * elements as u128;
    check_memory(
        what,
        bytes,
        "train fewer layers (method freeze) or an adapter (method lora)",
    )
}

/// Refuses the linears in 4 bits whose names `trains` selects.
fn refuse_quantized(model: &Model, what: &str, trains: &dyn Fn(&str) -> bool) -> Result<()> {
    for (i, block) in model.blocks.iter().enumerate() {
        for (module, linear) in block.linears() {
            let name = format!("transformer.layers.{i}.{module}.weight");
            let bits = match linear.weight {
                Weight::Dense(_) => continue,
                Weight::Quant(_) => 4,
                Weight::Int8(_) => 8,
            };
            if trains(&name) {
                return Err(Error::input(
                    format!("{what}: {name}"),
                    format!("a weight in {bits} bits"),
                    "a dense one",
                    "give the fp16 checkpoint and load it dense, or use method qlora",
                ));
            }
        }
    }
    Ok(())
}

fn train_those(model: &mut Model, what: &str, trains: &dyn Fn(&str) -> bool) -> Result<()> {
    refuse_quantized(model, what, trains)?;
    check_room(model, what, trains)?;
    let mut trainable = Trainable::new(model)?;
    model.for_each_param_mut(&mut |name, param| match trains(name) {
        true => trainable.make(param),
        false => Ok(()),
    })?;
    // The matrices of a block are streamed all or none.
    for block in &mut model.blocks {
        if block.linears().iter().any(|(_, linear)| !linear.weight.waits()) {
            for (_, linear) in block.linears_mut() {
                if let Some(there) = linear.weight.on(linear.weight.beside())? {
                    linear.weight = there;
                }
            }
        }
    }
    Ok(())
}

/// Makes every parameter trainable.
///
/// # Errors
/// Weights in 4 bits and heads in another storage than compute do not train; there is not enough memory.
pub(super) fn apply_full(model: &mut Model) -> Result<()> {
    model.check_head_trains("method full")?;
    train_those(model, "method full", &|_| true)
}

/// Makes `modules` of the last `layers` layers trainable, or of the first ones when the number is negative.
///
/// # Errors
/// The model has no such layers, or they are in 4 bits; there is not enough memory.
pub(super) fn apply_freeze(model: &mut Model, layers: i64, modules: FreezeModules) -> Result<()> {
    let count = model.blocks.len();
    let wanted = usize::try_from(layers.unsigned_abs()).unwrap_or(usize::MAX);
    if wanted == 0 || wanted > count {
        let expected = format!("1 to {count} (the last), or -1 to -{count} (the first)");
        let remedy = "give the number of layers to train, such as 3";
        return Err(Error::input("--trainable-layers", layers, expected, remedy));
    }
    let chosen = if layers > 0 {
        count - wanted..count
    } else {
        0..wanted
    };
    let module = match modules {
        FreezeModules::All => "",
        FreezeModules::Mlp => "mlp.",
        FreezeModules::Attention => "attention.",
    };
    let prefixes: Vec<String> = chosen
        .map(|i| format!("transformer.layers.{i}.{module}"))
        .collect();
    train_those(model, "method freeze", &|name| {
        prefixes.iter().any(|prefix| name.starts_with(prefix.as_str()))
    })
}

/// Takes the values that train from the checkpoint again. A device in bf16 has rounded those of an fp16 checkpoint as it
/// loaded them, and so has one in fp16 those of an fp32 checkpoint; training begins from what the files hold.
///
/// # Errors
/// The checkpoint is not the one that the model was loaded from.
pub fn widen(model: &mut Model, checkpoint: &Checkpoint) -> Result<()> {
    model.for_each_param_mut(&mut |name, param| {
        if param.trains() && checkpoint.contains(name) {
            let tensor = checkpoint.tensor(name)?;
            if tensor.shape() != param.value.shape() || !tensor.dtype().is_float() {
                let found = format!("{} {}", tensor.dtype(), tensor.shape());
                let expected = format!("floats {}", param.value.shape());
                let remedy = "give the checkpoint that the model was loaded from";
                return Err(Error::input(checkpoint.place(name), found, expected, remedy));
            }
            set_value(param, &tensor)?;
        }
        Ok(())
    })
}

/// Writes the parameters that train, as they are, to `trained.safetensors`.
///
/// # Errors
/// Nothing trains, or the folder cannot be written.
pub(super) fn save(model: &Model, dir: &Path) -> Result<()> {
    let mut tensors = Vec::new();
    model.try_for_each_param(&mut |name, param| {
        if param.trains() {
            // Masters on the host are written from where they lie.
            let value = match param.value.device() {
                Device::Cpu => Cow::Borrowed(&param.value),
                Device::Cuda(_) => Cow::Owned(param.value.to_device(Device::Cpu)?),
            };
            tensors.push((name.to_string(), value));
        }
        Ok(())
    })?;
    if tensors.is_empty() {
        let found = "a model of which nothing trains";
        return Err(Error::input(
            dir.display(),
            found,
            "trained weights",
            "train first",
        ));
    }
    std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), &**t)).collect();
    write_safetensors(&dir.join(TRAINED), &borrowed, &BTreeMap::new())
}

/// Gives the parameters that train the values that [`save`] wrote.
///
/// # Errors
/// The file holds others: each difference is named.
pub(super) fn restore(model: &mut Model, dir: &Path) -> Result<()> {
    let path = dir.join(TRAINED);
    let mut tensors = read_tensors(&path)?;
    if tensors.contains_key("lm_head.weight") {
        untie_head(model)?;
    }
    let remedy = "resume with the model and the settings that the run began with";
    let place = |name: &str| format!("{}: {name}", path.display());
    model.for_each_param_mut(&mut |name, param| {
        if !param.trains() {
            return Ok(());
        }
        let (shape, dtype) = (param.value.shape(), param.value.dtype());
        let expected = format!("{dtype} {shape}");
        let Some(tensor) = tensors.remove(name) else {
            return Err(Error::input(place(name), "nothing", expected, remedy));
        };
        if tensor.shape() != shape || tensor.dtype() != dtype {
            let found = format!("{} {}", tensor.dtype(), tensor.shape());
            return Err(Error::input(place(name), found, expected, remedy));
        }
        set_value(param, &tensor)
    })?;
    match tensors.keys().next() {
        None => Ok(()),
        Some(name) => {
            let expected = "only what trains with these settings";
            Err(Error::input(place(name), "a trained tensor", expected, remedy))
        }
    }
}

/// Gives a model with a tied head an output matrix of its own, a copy of the embedding: the two then train apart. A model
/// whose head is separate already stays as it is.
///
/// # Errors
/// The device has no room, or the head is held in a form that cannot train.
pub fn untie_head(model: &mut Model) -> Result<()> {
    model.check_head_trains("a head of its own")?;
    if model.lm_head.is_none() {
        let mut head = Param::frozen(model.embedding.operand().to_device(model.device())?);
        if model.embedding.trains() {
            Trainable::new(model)?.make(&mut head)?;
            set_value(&mut head, &model.embedding.value.to_device(Device::Cpu)?)?;
        }
        model.lm_head = Some(head);
    }
    Ok(())
}
