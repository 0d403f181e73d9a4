//! What an optimizer remembers of each parameter, in memory and on disk.

use std::collections::BTreeMap;
use std::path::Path;

use super::groups::keeps_32_bits;
use super::{OptimizerConfig, OptimizerKind, Trained};
use crate::checkpoint::{read_metadata, read_tensors, refuse_non_finite, write_safetensors};
use crate::error::{Error, Result};
use crate::ops::BLOCK_8BIT;
use crate::tensor::{DType, Device, Tensor};

/// The key of the file's metadata that names the kind.
const KIND: &str = "optim";
const REMEDY: &str = "resume with the model and the flags that the run was started with";

/// The state of one parameter. F32 and of the parameter's shape, but for the codes of 8 bits and their scales.
#[derive(Debug)]
pub(super) enum State {
    /// The first and the second moment.
    Adamw { exp_avg: Tensor, exp_avg_sq: Tensor },
    /// Both moments in codes, U8, and the scale of every 256.
    Adamw8bit {
        state1: Tensor,
        state2: Tensor,
        absmax1: Tensor,
        absmax2: Tensor,
    },
    /// Nothing without momentum.
    Sgd { momentum_buffer: Option<Tensor> },
    /// The momentum.
    Lion { exp_avg: Tensor },
}

impl State {
    /// The state before the first step.
    pub fn new(config: &OptimizerConfig, name: &str, value: &Tensor) -> Result<Self> {
        let zeros = || Tensor::zeros_on(value.device(), DType::F32, value.shape());
        Ok(match config.kind {
            OptimizerKind::Adamw8bit if !keeps_32_bits(name, value.elements()) => {
                let blocks = value.elements().div_ceil(BLOCK_8BIT);
                // Whatever the codes, a scale of 0 makes them 0.
                let codes = || Tensor::zeros_on(value.device(), DType::U8, value.shape());
                let absmax = || Tensor::zeros_on(value.device(), DType::F32, [blocks]);
                State::Adamw8bit {
                    state1: codes()?,
                    state2: codes()?,
                    absmax1: absmax()?,
                    absmax2: absmax()?,
                }
            }
            OptimizerKind::Adamw | OptimizerKind::Adamw8bit => State::Adamw {
                exp_avg: zeros()?,
                exp_avg_sq: zeros()?,
            },
            OptimizerKind::Sgd => State::Sgd {
                momentum_buffer: (config.momentum != 0.0).then(zeros).transpose()?,
            },
            OptimizerKind::Lion => State::Lion { exp_avg: zeros()? },
        })
    }

    /// Its tensors by their names in a file.
    pub fn parts(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            State::Adamw { exp_avg, exp_avg_sq } => vec![("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)],
            State::Adamw8bit {
                state1,
                state2,
                absmax1,
                absmax2,
            } => vec![
                ("state1", state1),
                ("state2", state2),
                ("absmax1", absmax1),
                ("absmax2", absmax2),
            ],
            State::Sgd { momentum_buffer } => momentum_buffer
                .iter()
                .map(|buffer| ("momentum_buffer", buffer))
                .collect(),
            State::Lion { exp_avg } => vec![("exp_avg", exp_avg)],
        }
    }

    /// The tensors of [`State::parts`], in that order.
    fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        match self {
            State::Adamw { exp_avg, exp_avg_sq } => vec![exp_avg, exp_avg_sq],
            State::Adamw8bit {
                state1,
                state2,
                absmax1,
                absmax2,
            } => vec![state1, state2, absmax1, absmax2],
            State::Sgd { momentum_buffer } => momentum_buffer.iter_mut().collect(),
            State::Lion { exp_avg } => vec![exp_avg],
        }
    }
}

/// Is no number of this part below 0?
fn is_magnitude(part: &str) -> bool {
    matches!(part, "exp_avg_sq" | "absmax1" | "absmax2")
}

pub(super) fn save(path: &Path, kind: OptimizerKind, step: u64, trained: &[Trained]) -> Result<()> {
    let mut tensors = vec![("step".to_string(), Tensor::from_slice(&[step as i64], [1]))];
    for t in trained {
        for (part, tensor) in t.state.parts() {
            tensors.push((format!("{part}.{}", t.name), tensor.to_device(Device::Cpu)?));
        }
    }
    let tensors: Vec<(String, &Tensor)> = tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
    let metadata = BTreeMap::from([
        ("format".to_string(), "pt".to_string()),
        (KIND.to_string(), kind.name().to_string()),
    ]);
    write_safetensors(path, &tensors, &metadata)
}

/// Fills the states; the result is the number of steps taken.
pub(super) fn load(path: &Path, kind: OptimizerKind, trained: &mut [Trained]) -> Result<u64> {
    let mut tensors = read_tensors(path)?;
    let metadata = read_metadata(path)?;
    // Files of the first version, which had one optimizer, do not name it.
    let found = metadata.get(KIND).map_or("adamw", String::as_str);
    if found != kind.name() {
        let found = format!("the state of optimizer {found}");
        let expected = format!("that of {}", kind.name());
        return Err(Error::input(path.display(), found, expected, REMEDY));
    }
    let mut take = |name: &str, like: Option<&Tensor>| -> Result<Tensor> {
        let place = format!("{}: {name}", path.display());
        let found = tensors
            .remove(name)
            .ok_or_else(|| Error::input(&place, "nothing", "a tensor", REMEDY))?;
        let (dtype, shape) = like.map_or((DType::I64, [1].into()), |t| (t.dtype(), t.shape()));
        if (found.dtype(), found.shape()) != (dtype, shape) {
            let is = format!("{} {}", found.dtype(), found.shape());
            return Err(Error::input(place, is, format!("{dtype} {shape}"), REMEDY));
        }
        Ok(found)
    };
    let step = take("step", None)?.as_slice::<i64>()[0];
    let step = u64::try_from(step)
        .map_err(|_| Error::input(format!("{}: step", path.display()), step, "a step from 0", REMEDY))?;
    // Everything is checked before anything is changed.
    let mut read = Vec::new();
    for t in trained.iter() {
        for (part, like) in t.state.parts() {
            let name = format!("{part}.{}", t.name);
            let tensor = take(&name, Some(like))?;
            let place = format!("{}: {name}", path.display());
            refuse_non_finite(&place, &tensor)?;
            if is_magnitude(part) {
                refuse_negative(&place, tensor.as_slice())?;
            }
            read.push(tensor);
        }
    }
    if let Some(name) = tensors.keys().next() {
        return Err(Error::input(
            path.display(),
            format!("{name}, which belongs to nothing that trains now"),
            format!("the state of {} parameters", trained.len()),
            REMEDY,
        ));
    }
    // Copied: what was read may be mapped, the state is written.
    let states = trained.iter_mut().flat_map(|t| t.state.tensors_mut());
    for (to, from) in states.zip(&read) {
        to.copy_from(from)?;
    }
    Ok(step)
}

fn refuse_negative(place: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|&x| x < 0.0) {
        None => Ok(()),
        Some(i) => Err(Error::input(
            format!("{place}[{i}]"),
            values[i],
            "a number from 0",
            "the file is damaged: resume from another checkpoint",
        )),
    }
}
