//! What the layers keep of a forward pass for the backward pass, and what they share.
//!
//! A block computes in one set of buffers, [`BlockActivations`], that serves all layers. What a layer keeps of it
//! ([`super::policy`]) are tensors of its own that take their places in the set while the layer is at hand: tensors are
//! exchanged, nothing is copied. A layer below all that train keeps nothing.
//!
//! What an offloaded layer keeps waits in page-locked host memory. Two sets of device tensors, the slots, and a ring of hidden
//! states serve all of these layers, in turn:
//!
//! ```text
//! kernels   forward 5    | forward 6    | forward 7   ...  backward 7    | backward 6    | backward 5
//! copies                 | store 5      | store 6     ...                | fetch 5       | fetch 4
//! ```
//!
//! Layer 7 computes in the slot that 5 did: its kernels wait for the copy of 5, which had the time of layer 6. The last two are
//! never stored: nothing takes their slots before their backward passes.

use super::Model;
use super::cache::shared_activations;
use super::glm::{Block, BlockActivations};
use super::policy::{LayerPolicy, Part, Recompute};
use crate::error::{Error, Result};
use crate::nn::NormActivations;
use crate::ops;
use crate::tensor::ledger::account;
use crate::tensor::{Compute, DType, Tensor};

/// Tensors that a layer keeps, with their places in the set.
type Kept = Vec<(Part, Tensor)>;

/// Hidden states and activations of all layers.
#[derive(Debug)]
pub(super) struct Activations {
    /// Hidden states `[rows, hidden]`: the ring, that of each layer that keeps its input on the device, and the output of the
    /// last layer.
    planes: Vec<Tensor>,
    /// Which of them holds the input of layer i; the last, the output of the last layer.
    plane_of: Vec<usize>,
    layers: Vec<Layer>,
    /// The layers below it keep nothing.
    lowest: usize,
    /// The layers whose activations wait in host memory.
    offloaded: Vec<usize>,
    slots: [Kept; SLOTS],
    shared: BlockActivations,
}

#[derive(Debug)]
struct Layer {
    recompute: Recompute,
    /// Of an offloaded layer in host memory, empty where they are never stored.
    kept: Kept,
    offload: Option<Offload>,
}

#[derive(Debug)]
struct Offload {
    /// Which of the offloaded layers it is.
    number: usize,
    /// Its input in host memory.
    x: Tensor,
}

/// A layer at hand.
pub(super) struct Lent<'a> {
    pub recompute: Recompute,
    /// Its input.
    pub x: &'a Tensor,
    pub activations: &'a mut BlockActivations,
    /// Its output, where a forward pass writes it.
    pub out: &'a mut Tensor,
}

/// One of them is computed in while the other is copied.
const SLOTS: usize = 2;

/// How many hidden states layers need that do not keep theirs on the device: one is read while the next is written, and with
/// offloading while the one before is copied.
const PASSED_ON: usize = 2;
const OFFLOADED: usize = 3;

impl Activations {
    /// For `rows` rows.
    ///
    /// # Errors
    /// The device has no room.
    pub fn new(model: &Model, rows: usize, policies: &[LayerPolicy]) -> Result<Self> {
        let compute = model.compute();
        let hidden = model.config().hidden_size;
        let lowest = model.lowest_layer().unwrap_or(model.blocks.len());
        let mut plane_of = Vec::with_capacity(model.blocks.len() + 1);
        let mut layers = Vec::with_capacity(model.blocks.len());
        let policy = |i: usize| policies.get(i).copied().unwrap_or_default();
        let offloaded: Vec<usize> = (lowest..model.blocks.len())
            .filter(|&i| policy(i).offload)
            .collect();
        let ring = if offloaded.is_empty() {
            PASSED_ON
        } else {
            OFFLOADED
        };
        let ring = ring.min(lowest + offloaded.len());
        let mut passed_on = 0;
        let mut planes = ring;
        for (i, block) in model.blocks.iter().enumerate() {
            let LayerPolicy { recompute, .. } = policy(i);
            let number = offloaded.iter().position(|&layer| layer == i);
            if i < lowest || number.is_some() {
                plane_of.push(passed_on % ring);
                passed_on += 1;
            } else {
                plane_of.push(planes);
                planes += 1;
            }
            let layer = account("activations", || -> Result<_> {
                let place = Place {
                    compute,
                    pinned: number.is_some(),
                };
                let rows = match number {
                    Some(number) if number + SLOTS >= offloaded.len() => 0,
                    _ => rows,
                };
                let x = number.map(|number| {
                    let x = place.tensor(compute.dtype, [rows, hidden])?;
                    Ok(Offload { number, x })
                });
                let parts = Part::ALL
                    .into_iter()
                    .filter(|part| i >= lowest && part.width(block) > 0 && part.is_kept(recompute, block));
                Ok(Layer {
                    recompute,
                    kept: parts
                        .map(|part| Ok((part, place.part(part, rows, part.width(block))?)))
                        .collect::<Result<_>>()?,
                    offload: x.transpose()?,
                })
            });
            layers.push(layer?);
        }
        plane_of.push(planes);
        Ok(Self {
            planes: (0..=planes)
                .map(|i| {
                    let kept = i >= ring && i < planes;
                    let name = if kept { "activations" } else { "transients" };
                    account(name, || compute.zeros([rows, hidden]))
                })
                .collect::<Result<_>>()?,
            plane_of,
            slots: [
                slot(model, compute, rows, &layers, 0)?,
                slot(model, compute, rows, &layers, 1)?,
            ],
            shared: shared_buffers(model, compute, rows, &layers, qkv_stay(&layers[lowest..]))?,
            layers,
            lowest,
            offloaded,
        })
    }

    /// Calls `f` with layer `i`: what it keeps stands in the set meanwhile.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn with_layer<R>(&mut self, i: usize, f: impl FnOnce(Lent<'_>) -> Result<R>) -> Result<R> {
        let Self {
            planes,
            plane_of,
            layers,
            slots,
            shared,
            ..
        } = self;
        let Layer {
            recompute,
            kept,
            offload,
        } = &mut layers[i];
        let mut exchange = |set: &mut BlockActivations| match offload {
            None => kept
                .iter_mut()
                .for_each(|(part, tensor)| part.exchange(tensor, set)),
            Some(Offload { number, .. }) => {
                let slot = &mut slots[*number % SLOTS];
                let here = slot.iter_mut().filter(|(part, _)| has(kept, *part));
                here.for_each(|(part, tensor)| part.exchange(tensor, set));
            }
        };
        exchange(shared);
        let [x, out] = planes
            .get_disjoint_mut([plane_of[i], plane_of[i + 1]])
            .expect("a layer does not write where it reads");
        let result = f(Lent {
            recompute: *recompute,
            x,
            activations: shared,
            out,
        });
        exchange(shared);
        result
    }

    /// After the forward pass of layer `i` was asked for, and before that of the next: lets what it keeps go to host memory, if
    /// that is where it waits.
    ///
    /// # Errors
    /// A copy cannot be asked for.
    pub fn store(&mut self, i: usize) -> Result<()> {
        let Layer { kept, offload, .. } = &mut self.layers[i];
        let Some(Offload { number, x }) = offload else {
            return Ok(());
        };
        if *number + SLOTS >= self.offloaded.len() {
            return Ok(());
        }
        let slot = &self.slots[*number % SLOTS];
        let device = |part| slot.iter().find(|(of, _)| *of == part).map(|(_, tensor)| tensor);
        let parts = kept
            .iter_mut()
            .filter_map(|(part, host)| Some((device(*part)?, host)));
        for (device, host) in parts.chain([(&self.planes[self.plane_of[i]], x)]) {
            host.resize(device.shape())?;
            ops::store(device, host)?;
        }
        Ok(())
    }

    /// Does a backward pass let layers come back into the places of others? These are then not there for a second one.
    pub fn come_back(&self) -> bool {
        self.offloaded.len() > SLOTS
    }

    /// After the backward pass of layer `i` was asked for: lets what the next layer for its slot keeps come back, while the
    /// layers between run.
    ///
    /// # Errors
    /// A copy cannot be asked for.
    pub fn fetch_next(&mut self, i: usize) -> Result<()> {
        let number = self.layers[i].offload.as_ref().map(|offload| offload.number);
        let Some(next) = number.and_then(|number| number.checked_sub(SLOTS)) else {
            return Ok(());
        };
        let layer = self.offloaded[next];
        let Layer { kept, offload, .. } = &self.layers[layer];
        for (part, host) in kept {
            let mut slot = self.slots[next % SLOTS].iter_mut();
            if let Some((_, device)) = slot.find(|(of, _)| of == part) {
                device.resize(host.shape())?;
                ops::fetch(host, device)?;
            }
        }
        let x = &mut self.planes[self.plane_of[layer]];
        match offload {
            Some(offload) => {
                x.resize(offload.x.shape())?;
                ops::fetch(&offload.x, x)
            }
            None => Ok(()),
        }
    }

    /// Do layers keep what a backward pass down to layer `lowest` needs?
    ///
    /// # Errors
    /// They do not: something trains that did not when the workspace was made.
    pub fn check_kept(&self, lowest: usize) -> Result<()> {
        if lowest >= self.lowest {
            return Ok(());
        }
        Err(Error::Shape {
            operation: "backward",
            found: format!("a gradient in layer {lowest}"),
            expected: format!("none below {}, as when the workspace was made", self.lowest),
        })
    }

    /// Are some layer's q, k and v there before its feed-forward layer has gone back? Otherwise their place in the set has
    /// room for the gradient over the inner values too.
    pub fn qkv_stay(&self) -> bool {
        qkv_stay(&self.layers[self.lowest..])
    }

    /// The input of the first layer.
    pub fn first(&mut self) -> &mut Tensor {
        &mut self.planes[self.plane_of[0]]
    }

    /// The output of the last layer.
    pub fn last(&self) -> &Tensor {
        &self.planes[self.plane_of[self.layers.len()]]
    }
}

/// Where tensors are made.
#[derive(Clone, Copy)]
struct Place {
    compute: Compute,
    /// In host memory that the device copies from and to.
    pinned: bool,
}

impl Place {
    fn tensor(self, dtype: DType, shape: [usize; 2]) -> Result<Tensor> {
        let device = self.compute.device;
        if self.pinned {
            Tensor::zeros_pinned(device, dtype, shape)
        } else {
            Tensor::zeros_on(device, dtype, shape)
        }
    }

    /// Room for `rows` rows of a part.
    fn part(self, part: Part, rows: usize, width: usize) -> Result<Tensor> {
        let dtype = self.compute.dtype;
        let dtype = if part == Part::LogSumExp {
            dtype.accumulator()
        } else {
            dtype
        };
        self.tensor(dtype, [rows, width])
    }
}

fn has(kept: &Kept, part: Part) -> bool {
    kept.iter().any(|(of, _)| *of == part)
}

/// Device tensors for what layers of one slot keep.
fn slot(model: &Model, compute: Compute, rows: usize, layers: &[Layer], number: usize) -> Result<Kept> {
    let offload = |layer: &Layer| layer.offload.as_ref().map(|offload| offload.number % SLOTS);
    let here = |(layer, _): &(&Layer, &Block)| offload(layer) == Some(number);
    let place = Place {
        compute,
        pinned: false,
    };
    let mut slot = Kept::new();
    for part in Part::ALL {
        let keep = layers.iter().zip(&model.blocks).filter(here);
        let keep = keep.filter(|(layer, _)| has(&layer.kept, part));
        if let Some(width) = keep.map(|(_, block)| part.width(block)).max() {
            slot.push((part, place.part(part, rows, width)?));
        }
    }
    Ok(slot)
}

fn qkv_stay(layers: &[Layer]) -> bool {
    layers.iter().any(|layer| layer.recompute != Recompute::Smart)
}

/// The set that all layers compute in, empty where every layer keeps a tensor of its own.
fn shared_buffers(
    model: &Model,
    compute: Compute,
    rows: usize,
    layers: &[Layer],
    qkv_stay: bool,
) -> Result<BlockActivations> {
    let (hidden, inner) = (model.config().hidden_size, model.config().inner_hidden_size);
    let mut shared = shared_activations(model, compute, 0)?;
    shared.input_layernorm = NormActivations::new(compute, rows, hidden)?;
    shared.post_attention_layernorm = NormActivations::new(compute, rows, hidden)?;
    shared.mlp.active = compute.zeros([rows, inner.max(3 * hidden)])?;
    for part in Part::ALL {
        let drops = |(layer, block): &(&Layer, &Block)| part.width(block) > 0 && !has(&layer.kept, part);
        let dropped = layers.iter().zip(&model.blocks).filter(drops);
        let width = dropped.map(|(_, block)| part.width(block)).max();
        let lent = part == Part::Qkv && !qkv_stay;
        if let Some(width) = width.map(|width| if lent { width.max(inner) } else { width })
            && let Some(place) = part.of(&mut shared)
        {
            let device = Place {
                compute,
                pinned: false,
            };
            *place = device.part(part, rows, width)?;
        }
    }
    Ok(shared)
}
