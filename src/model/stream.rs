//! Weights that wait in host memory, copied to the device ahead of their use.
//!
//! A pass needs the four matrices of one block after the other. Two sets of device buffers take turns: while a block computes with
//! one, the next block's matrices arrive in the other. The copy into a set is asked for when the kernels of the block that used
//! it last have been asked for; the tensors themselves see to the order ([`crate::ops::fetch`]).

use super::Model;
use super::glm::Block;
use crate::error::{Error, Result};
use crate::nn::Fetched;
use crate::ops::{self, WeightRef};
use crate::quant::{Absmax, QuantTensor, RowInt8};
use crate::tensor::ledger::account;
use crate::tensor::{Device, Tensor};

/// Device buffers for the matrices of two blocks; none when all matrices lie where the model computes.
#[derive(Debug)]
pub(super) struct WeightSlots {
    device: Device,
    slots: Option<[Slot; 2]>,
}

/// The matrices of one block.
#[derive(Debug)]
struct Slot {
    /// Which block's they are.
    block: Option<usize>,
    places: [Place; 4],
}

/// Room for one matrix.
#[derive(Debug)]
enum Place {
    Dense(Tensor),
    Quant(Box<QuantTensor>),
    Int8(Box<RowInt8>),
}

impl WeightSlots {
    /// For the passes of `model`.
    ///
    /// # Errors
    /// The device has no room; a matrix waits in host memory where others of its block do not, or in another form than the same
    /// matrix of other blocks.
    pub fn new(model: &Model) -> Result<Self> {
        let device = model.device();
        let mut waiting = Vec::new();
        for (i, block) in model.blocks.iter().enumerate() {
            match waiting_matrices(block, device) {
                0 => {}
                4 => waiting.push(block),
                n => {
                    let found = format!("{n} of 4 matrices of layer {i} in host memory");
                    return Err(mismatch(found, "all of them or none"));
                }
            }
        }
        let slot = || -> Result<Slot> {
            let place = |i: usize| {
                let matrices = waiting.iter().map(|block| block.linears()[i].1.weight.as_ref());
                Place::new(device, &matrices.collect::<Vec<_>>())
            };
            Ok(Slot {
                block: None,
                places: [place(0)?, place(1)?, place(2)?, place(3)?],
            })
        };
        let slots = match waiting.is_empty() {
            true => None,
            false => Some(account("weight slots", || Ok([slot()?, slot()?]))?),
        };
        Ok(Self { device, slots })
    }

    /// Begins a forward pass: what the buffers hold may have changed since.
    ///
    /// # Errors
    /// A copy cannot be asked for.
    pub fn begin(&mut self, blocks: &[Block]) -> Result<()> {
        for slot in self.slots.iter_mut().flatten() {
            slot.block = None;
        }
        self.ahead(blocks, 0)
    }

    /// The matrices of block `i`, when they wait in host memory; those of block `next`, if there is one, are on their way when this
    /// returns.
    ///
    /// # Errors
    /// A copy cannot be asked for.
    pub fn take(&mut self, blocks: &[Block], i: usize, next: Option<usize>) -> Result<Fetched<'_>> {
        self.ahead(blocks, i)?;
        if let Some(next) = next {
            self.ahead(blocks, next)?;
        }
        let slot = self.slots.as_ref().map(|slots| &slots[i % 2]);
        let slot = slot.filter(|slot| slot.block == Some(i));
        Ok(slot.map(|slot| slot.places.each_ref().map(Place::as_ref)))
    }

    /// Asks for the matrices of block `i`, if there is one, they wait in host memory and are not here yet.
    fn ahead(&mut self, blocks: &[Block], i: usize) -> Result<()> {
        let (Some(slots), Some(block)) = (&mut self.slots, blocks.get(i)) else {
            return Ok(());
        };
        let slot = &mut slots[i % 2];
        if slot.block == Some(i) || waiting_matrices(block, self.device) == 0 {
            return Ok(());
        }
        slot.block = None;
        for (place, (_, linear)) in slot.places.iter_mut().zip(block.linears()) {
            place.fetch(linear.weight.as_ref())?;
        }
        slot.block = Some(i);
        Ok(())
    }
}

fn waiting_matrices(block: &Block, device: Device) -> usize {
    let linears = block.linears().into_iter();
    linears
        .filter(|(_, linear)| !linear.weight.lies_on(device))
        .count()
}

impl Place {
    /// For the largest of `matrices`, which all have the form of the first.
    fn new(device: Device, matrices: &[WeightRef<'_>]) -> Result<Self> {
        let room = |like: &Tensor, elements: &dyn Fn(WeightRef<'_>) -> Option<usize>| {
            let elements = matrices.iter().map(|&matrix| elements(matrix));
            match elements
                .collect::<Option<Vec<_>>>()
                .and_then(|all| all.into_iter().max())
            {
                Some(elements) => Tensor::zeros_on(device, like.dtype(), [elements]),
                None => Err(forms_differ()),
            }
        };
        let Some(first) = matrices.first() else {
            return Err(forms_differ());
        };
        let weight = match first {
            WeightRef::Dense(first) => {
                let dense = |matrix: WeightRef<'_>| match matrix {
                    WeightRef::Dense(tensor) if tensor.dtype() == first.dtype() => Some(tensor.elements()),
                    _ => None,
                };
                return Ok(Place::Dense(room(first, &dense)?));
            }
            WeightRef::Quant(first) => *first,
            WeightRef::Int8(first) => {
                let codes = |matrix: WeightRef<'_>| match matrix {
                    WeightRef::Int8(weight) => Some(weight.codes.elements()),
                    _ => None,
                };
                return Ok(Place::Int8(Box::new(RowInt8 {
                    codes: room(&first.codes, &codes)?,
                    scales: first.scales.clone(),
                    source_dtype: first.source_dtype,
                })));
            }
        };
        let codes = |matrix: WeightRef<'_>| match matrix {
            WeightRef::Quant(weight) => Some(weight.codes.elements()),
            _ => None,
        };
        let scales = |matrix: WeightRef<'_>| match matrix {
            WeightRef::Quant(matrix) => match (&matrix.absmax, &weight.absmax) {
                (Absmax::Flat(absmax), Absmax::Flat(_)) => Some(absmax.elements()),
                (Absmax::Nested { codes, .. }, Absmax::Nested { .. }) => Some(codes.elements()),
                _ => None,
            },
            _ => None,
        };
        Ok(Place::Quant(Box::new(QuantTensor {
            quant_type: weight.quant_type,
            codes: room(&weight.codes, &codes)?,
            absmax: match &weight.absmax {
                Absmax::Flat(absmax) => Absmax::Flat(room(absmax, &scales)?),
                Absmax::Nested {
                    codes,
                    nested_absmax,
                    offset,
                    code,
                } => Absmax::Nested {
                    codes: room(codes, &scales)?,
                    nested_absmax: nested_absmax.clone(),
                    offset: *offset,
                    code: code.clone(),
                },
            },
            order: weight.order,
            shape: weight.shape,
            source_dtype: weight.source_dtype,
        })))
    }

    fn as_ref(&self) -> WeightRef<'_> {
        match self {
            Place::Dense(tensor) => WeightRef::Dense(tensor),
            Place::Quant(weight) => WeightRef::Quant(weight),
            Place::Int8(weight) => WeightRef::Int8(weight),
        }
    }

    /// Asks for a copy of `from`.
    fn fetch(&mut self, from: WeightRef<'_>) -> Result<()> {
        let fetch = |from: &Tensor, to: &mut Tensor| {
            to.resize(from.shape())?;
            ops::fetch(from, to)
        };
        let (to, from) = match (self, from) {
            (Place::Dense(to), WeightRef::Dense(from)) => return fetch(from, to),
            (Place::Quant(to), WeightRef::Quant(from)) => (to, from),
            (Place::Int8(to), WeightRef::Int8(from)) => {
                fetch(&from.codes, &mut to.codes)?;
                // They are on the device already, and clones share them.
                to.scales = from.scales.clone();
                to.source_dtype = from.source_dtype;
                return Ok(());
            }
            _ => return Err(forms_differ()),
        };
        fetch(&from.codes, &mut to.codes)?;
        match (&mut to.absmax, &from.absmax) {
            (Absmax::Flat(to), Absmax::Flat(from)) => fetch(from, to)?,
            (
                Absmax::Nested {
                    codes: to,
                    nested_absmax: nested_to,
                    offset: offset_to,
                    code: code_to,
                },
                Absmax::Nested {
                    codes,
                    nested_absmax,
                    offset,
                    code,
                },
            ) => {
                fetch(codes, to)?;
                // They are on the device already, and clones share them.
                (*nested_to, *offset_to, *code_to) = (nested_absmax.clone(), *offset, code.clone());
            }
            _ => return Err(forms_differ()),
        }
        to.quant_type = from.quant_type;
        to.order = from.order;
        to.shape = from.shape;
        to.source_dtype = from.source_dtype;
        Ok(())
    }
}

fn forms_differ() -> Error {
    mismatch(
        "a matrix in another form than in other layers",
        "one form, dense, in 8 bits or in 4",
    )
}

fn mismatch(found: impl Into<String>, expected: &str) -> Error {
    Error::input(
        "weights streamed from host memory",
        found.into(),
        expected,
        "load the model without streaming",
    )
}
