//! Where weights that train whole lie: masters in 32 bits, the rounded copies that passes read, gradients.
//!
//! A weight of n elements that trains where the model computes takes 4n bytes there, and 4n of a gradient. In 16 bits passes
//! read no more than its rounded value, so that a copy of 2n bytes is enough, with the master in host memory or on disk,
//! where the optimizer fetches it from; and gradients can be lent ([`crate::model::LayerGradients`]).
//!
//! | bytes of a matrix's element | device | host | disk |
//! |---|---|---|---|
//! | masters on the device | 4 | | |
//! | on the host | 2 | 4 | |
//! | on disk | 2 | | 4 |
//! | on the host or on disk, matrices of blocks streamed | slots for two blocks | + 2 | |
//!
//! Passes come to the same bits either way, since products round a matrix in 32 bits as they read it; but for products of up to 16
//! rows, which a kernel of their own sums in another order when the matrix has 16 bits.

use std::path::PathBuf;

use crate::checkpoint::ScratchFile;
use crate::error::Result;
use crate::model::Model;
use crate::nn::Param;
use crate::tensor::ledger::account;
use crate::tensor::{Compute, Device, Tensor};

/// Where the matrices that train whole lie in 32 bits. Biases and norms, and everything on a device that computes in 32 bits, lie
/// where the model computes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum MasterPlace {
    /// Where the model computes, which then reads them.
    #[default]
    Device,
    /// In page-locked host memory, and rounded copies where the model computes.
    Host,
    /// In a scratch file of this folder, mapped, and rounded copies where the model computes.
    Disk(PathBuf),
}

/// The scratch file of [`MasterPlace::Disk`]. Its name is free again as soon as its tensors are made, so that it goes when they do,
/// however the program ends.
const FILE: &str = "masters.scratch";

/// How weights that train whole are stored.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Storage {
    /// The place of the masters.
    pub masters: MasterPlace,
    /// Will gradients be lent, so that there are none of their own to be made?
    pub lent_gradients: bool,
}

impl Model {
    /// Stores the weights that [`super::apply`] or [`super::restore`] make trainable whole as `storage` says.
    pub fn set_storage(&mut self, storage: Storage) {
        self.storage = storage;
    }
}

/// Makes weights trainable as the model's [`Storage`] says.
pub(super) struct Trainable {
    compute: Compute,
    storage: Storage,
    /// Of masters on disk.
    file: Option<ScratchFile>,
}

impl Trainable {
    /// # Errors
    /// The folder of the masters cannot be written.
    pub fn new(model: &Model) -> Result<Self> {
        let storage = model.storage.clone();
        let file = match &storage.masters {
            MasterPlace::Disk(folder) => Some(ScratchFile::create(&folder.join(FILE))?),
            _ => None,
        };
        Ok(Self {
            compute: model.compute(),
            storage,
            file,
        })
    }

    /// Makes a parameter trainable. Its master is a copy of its value: the frozen one may lie in a mapped file.
    ///
    /// # Errors
    /// The device, the host or the disk has no room.
    pub fn make(&mut self, param: &mut Param) -> Result<()> {
        let Compute { device, dtype } = self.compute;
        let sums = dtype.accumulator();
        let mut trainable = match self.master(&param.value)? {
            None => Param::borrowing(match (param.value.dtype() == sums, device) {
                (true, _) => param.value.to_device(device)?,
                (false, Device::Cpu) => param.value.to_dtype(sums),
                (false, Device::Cuda(_)) => param
                    .value
                    .to_device(Device::Cpu)?
                    .to_dtype(sums)
                    .into_device(device)?,
            }),
            Some(mut master) => {
                match param.value.device() {
                    Device::Cpu => convert(&param.value, &mut master),
                    Device::Cuda(_) => convert(&param.value.to_device(Device::Cpu)?, &mut master),
                }
                let mut trainable = Param::borrowing(master);
                if device != Device::Cpu {
                    trainable.working = Some(match param.value.beside() == device {
                        // What is frozen has been rounded already, and nobody else will read it.
                        true => std::mem::replace(&mut param.value, Tensor::zeros(dtype, [0])),
                        false => param.value.to_device_as(device, dtype)?,
                    });
                }
                trainable
            }
        };
        if !self.storage.lent_gradients {
            trainable.own_gradient(device)?;
        }
        *param = trainable;
        Ok(())
    }

    /// Room for a master, if it lies elsewhere than where the model computes.
    fn master(&mut self, value: &Tensor) -> Result<Option<Tensor>> {
        let Compute { device, dtype } = self.compute;
        let (sums, shape) = (dtype.accumulator(), value.shape());
        if shape.extents().len() < 2 || (device != Device::Cpu && dtype == sums) {
            return Ok(None);
        }
        account("masters", || match (&self.storage.masters, &mut self.file) {
            (MasterPlace::Disk(_), Some(file)) => file.tensor(sums, shape).map(Some),
            (MasterPlace::Host, _) if device != Device::Cpu => {
                Tensor::zeros_pinned(device, sums, shape).map(Some)
            }
            _ => Ok(None),
        })
    }
}

/// Gives a parameter that trains the value `from`, which lies on the host, and rounds its working copy anew.
pub(super) fn set_value(param: &mut Param, from: &Tensor) -> Result<()> {
    let (device, sums) = (param.value.device(), param.value.dtype());
    if device != Device::Cpu {
        // The old one goes first: two of the largest need not fit.
        let shape = param.value.shape();
        param.value = Tensor::zeros(sums, [0]);
        param.value = account("what trains", || from.to_device_as(device, sums))?;
        debug_assert_eq!(param.value.shape(), shape);
        return Ok(());
    }
    convert(from, &mut param.value);
    if let Some(working) = &mut param.working {
        match working.device() {
            Device::Cpu => convert(&param.value, working),
            device => {
                let dtype = working.dtype();
                // The old one goes first: two of the largest need not fit.
                *working = Tensor::zeros(dtype, [0]);
                *working = account("weights", || param.value.to_device_as(device, dtype))?;
            }
        }
    }
    Ok(())
}

/// Elements that are converted at once.
const PIECE: usize = 1 << 22;

/// `to = from` in the type of `to`, both on the host, in pieces. In a plan there is nothing to be converted.
fn convert(from: &Tensor, to: &mut Tensor) {
    if from.is_planned() || to.is_planned() {
        return;
    }
    let (dtype, size) = (to.dtype(), to.dtype().size());
    let sources = from.bytes().chunks(PIECE * from.dtype().size());
    for (source, to) in sources.zip(to.bytes_mut().chunks_mut(PIECE * size)) {
        let mut piece = Tensor::zeros(from.dtype(), [to.len() / size]);
        piece.bytes_mut().copy_from_slice(source);
        to.copy_from_slice(piece.to_dtype(dtype).bytes());
    }
}
