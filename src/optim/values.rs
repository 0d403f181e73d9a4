//! Values that lie on the host, on their way through the device: each is fetched for its update, rounded into the copy that
//! passes read, and written back.

use super::layout::{Piece, ValueSlots};
use super::pages::{Taking, here, no_gradient};
use crate::error::{Error, Result};
use crate::ops::{self, Span};
use crate::tensor::{DType, Device, Tensor};

/// A place on the device for the values of one page after the other.
#[derive(Debug)]
struct Slot {
    value: Tensor,
    holds: Option<usize>,
    /// Where values do not lie in page-locked memory: such memory on the way back, and what is in it.
    bounce: Option<Tensor>,
    leaving: Vec<Piece>,
    /// The values rounded, where the copies that passes read wait in host memory.
    rounded: Option<Tensor>,
}

/// The slots, taken in turn.
#[derive(Debug)]
pub(super) struct Values {
    slots: Vec<Slot>,
    next: usize,
}

impl Values {
    /// Makes the slots. `pinned`: do all values lie in page-locked memory? `waiting`: the type of the copies that wait in host memory
    /// to be read, if some do.
    ///
    /// # Errors
    /// The device or the host has no room.
    pub fn new(layout: ValueSlots, device: Device, pinned: bool, waiting: Option<DType>) -> Result<Self> {
        let shape = [layout.elements];
        let slot = |_| -> Result<Slot> {
            Ok(Slot {
                value: Tensor::zeros_on(device, DType::F32, shape)?,
                holds: None,
                bounce: (!pinned)
                    .then(|| Tensor::zeros_pinned(device, DType::F32, shape))
                    .transpose()?,
                leaving: Vec::new(),
                rounded: waiting
                    .map(|dtype| Tensor::zeros_on(device, dtype, shape))
                    .transpose()?,
            })
        };
        Ok(Self {
            slots: (0..layout.slots).map(slot).collect::<Result<_>>()?,
            next: 0,
        })
    }

    /// Every tensor of the slots.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.slots.iter().flat_map(|slot| {
            std::iter::once(&slot.value)
                .chain(&slot.bounce)
                .chain(&slot.rounded)
        })
    }

    /// How many pages can be on their way at once.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Asks for those values of `page` that take the step now.
    ///
    /// # Errors
    /// A copy cannot be asked for.
    pub fn ask(&mut self, page: usize, pieces: &[Piece], taking: &mut [Taking<'_>]) -> Result<()> {
        let slots = self.slots.len();
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % slots;
        slot.holds = Some(page);
        for (t, piece) in here(pieces, taking) {
            let range = piece.at..piece.at + piece.len;
            ops::fetch_range(&t.param.value, range, &mut slot.value, piece.state_at)?;
        }
        Ok(())
    }

    /// Updates the values of `page` that were asked for, one after the other by `apply`, and sends them back; the result is their
    /// number.
    ///
    /// # Errors
    /// A gradient is missing, shapes do not fit, or a copy cannot be asked for.
    pub fn update(
        &mut self,
        page: usize,
        pieces: &[Piece],
        taking: &mut [Taking<'_>],
        mut apply: impl FnMut(Span<'_>) -> Result<()>,
    ) -> Result<usize> {
        let slot = self.slots.iter_mut().find(|slot| slot.holds == Some(page));
        let slot = slot.ok_or_else(|| Error::Shape {
            operation: "Optimizer::step",
            found: format!("no values of page {page} on the device"),
            expected: "values that were asked for".into(),
        })?;
        slot.holds = None;
        slot.land(taking)?;
        let mut updated = 0;
        for (t, piece) in here(pieces, taking) {
            let param = &mut *t.param;
            apply(Span {
                p: &mut slot.value,
                g: param.grad.as_ref().ok_or_else(|| no_gradient(piece))?,
                p_at: piece.state_at,
                g_at: piece.at,
                state_at: piece.state_at,
                len: piece.len,
                rate: t.rate,
                decay: t.decay,
            })?;
            let here = piece.state_at..piece.state_at + piece.len;
            match (&mut param.working, &mut slot.rounded) {
                (Some(working), Some(rounded)) if working.device() == Device::Cpu => {
                    ops::round_into(&slot.value, here.clone(), rounded, here.start)?;
                    ops::store_range(rounded, here.clone(), working, piece.at)?;
                }
                (Some(working), _) => ops::round_into(&slot.value, here.clone(), working, piece.at)?,
                (None, _) => {}
            }
            match &mut slot.bounce {
                Some(bounce) => {
                    ops::store_range(&slot.value, here.clone(), bounce, here.start)?;
                    slot.leaving.push(*piece);
                }
                None => ops::store_range(&slot.value, here, &mut param.value, piece.at)?,
            }
            updated += 1;
        }
        Ok(updated)
    }

    /// Waits until every value is where it lies, but for copies that its tensor knows of.
    ///
    /// # Errors
    /// A copy failed.
    pub fn land(&mut self, taking: &mut [Taking<'_>]) -> Result<()> {
        self.slots.iter_mut().try_for_each(|slot| slot.land(taking))
    }
}

impl Slot {
    /// Brings what is on its way back to where it lies.
    fn land(&mut self, taking: &mut [Taking<'_>]) -> Result<()> {
        let Some(bounce) = self.bounce.as_ref().filter(|_| !self.leaving.is_empty()) else {
            return Ok(());
        };
        bounce.arrive()?;
        for (t, piece) in here(&self.leaving, taking) {
            let from = &bounce.as_slice::<f32>()[piece.state_at..][..piece.len];
            t.param.value.as_mut_slice::<f32>()[piece.at..][..piece.len].copy_from_slice(from);
        }
        self.leaving.clear();
        Ok(())
    }
}
