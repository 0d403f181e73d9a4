//! Pages on their way: fetched ahead of their update, written back behind it.
//!
//! The order of a step is that of the step before; the first step goes by the order of the parameters. A slot whose page has
//! been updated and written back at once asks for the page that is needed next and is not on its way yet. Whoever touches a
//! slot next waits for its copies by itself ([`crate::ops::fetch`]), so nothing here waits: a wrong guess of the order costs time,
//! never a number.
//!
//! State in a file moves through page-locked pages in between. The system is asked early to read what comes next, and writes
//! to the disk behind our back.

use super::layout::Lane;
use super::pages::Page;
use crate::error::Result;
use crate::ops;
use crate::tensor::{Device, Tensor};

/// Pages ahead of those in slots that the system begins to read from the disk.
const READ_AHEAD: usize = 2;

/// A place on the device for one page after the other.
#[derive(Debug)]
struct Slot {
    state: Vec<Tensor>,
    /// The page that is here, or on its way here.
    holds: Option<usize>,
    /// Is it newer here than where it lies?
    changed: bool,
    /// Of a file: page-locked memory on the way back, and the page in it that the file does not have yet.
    bounce: Vec<Tensor>,
    leaving: Option<usize>,
}

/// The pages of one lane that move.
#[derive(Debug)]
pub(super) struct Motion {
    slots: Vec<Slot>,
    /// The pages in the order of a step.
    order: Vec<usize>,
    /// Those that this step has been through.
    seen: Vec<usize>,
}

impl Motion {
    /// Makes the slots that `lane` has; `order` is what a step is expected to be.
    ///
    /// # Errors
    /// The device or the host has no room.
    pub fn new(lane: &Lane, order: Vec<usize>, device: Device, on_disk: bool) -> Result<Self> {
        let parts = lane.format.parts();
        let tensors = |make: &dyn Fn(&super::state::Part) -> Result<Tensor>| {
            parts.iter().map(make).collect::<Result<Vec<_>>>()
        };
        let mut slots = Vec::new();
        for _ in 0..lane.slots {
            let state =
                tensors(&|part| Tensor::zeros_on(device, part.dtype, [part.elements(lane.elements)]))?;
            let bounce = if on_disk {
                tensors(&|part| Tensor::zeros_pinned(device, part.dtype, [part.elements(lane.elements)]))?
            } else {
                Vec::new()
            };
            slots.push(Slot {
                state,
                holds: None,
                changed: false,
                bounce,
                leaving: None,
            });
        }
        Ok(Self {
            slots,
            seen: Vec::with_capacity(order.len()),
            order,
        })
    }

    /// Every tensor of the slots.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.slots
            .iter()
            .flat_map(|slot| slot.state.iter().chain(&slot.bounce))
    }

    /// The parts of the page in `slot`.
    pub fn state_mut(&mut self, slot: usize) -> &mut [Tensor] {
        &mut self.slots[slot].state
    }

    /// The parts of `page` where they are newer than where it lies.
    pub fn newest(&self, page: usize) -> Option<&Vec<Tensor>> {
        let changed = self
            .slots
            .iter()
            .find(|slot| slot.changed && slot.holds == Some(page));
        let leaving = || self.slots.iter().find(|slot| slot.leaving == Some(page));
        changed
            .map(|slot| &slot.state)
            .or_else(|| leaving().map(|slot| &slot.bounce))
    }

    /// The slot of `page`, which is about to be updated there.
    ///
    /// # Errors
    /// A copy cannot be asked for, or one failed.
    pub fn enter(&mut self, pages: &mut [Page], page: usize) -> Result<usize> {
        let slot = match self.slot_of(page) {
            Some(slot) => slot,
            None => {
                let slot = self.victim(page);
                self.write_back(pages, slot)?;
                self.fetch(pages, slot, page)?;
                slot
            }
        };
        self.slots[slot].changed = true;
        Ok(slot)
    }

    /// Writes the page in `slot` back, which this step does not touch any more, and lets the next one come.
    ///
    /// # Errors
    /// As [`Motion::enter`].
    pub fn leave(&mut self, pages: &mut [Page], slot: usize) -> Result<()> {
        self.write_back(pages, slot)?;
        let Some(left) = self.slots[slot].holds else {
            return Ok(());
        };
        self.seen.push(left);
        let next = self
            .after(left)
            .take(self.slots.len())
            .find(|&page| self.slot_of(page).is_none());
        match next {
            Some(next) => self.fetch(pages, slot, next),
            None => Ok(()),
        }
    }

    /// Asks for the first pages of a step.
    ///
    /// # Errors
    /// As [`Motion::enter`].
    pub fn begin(&mut self, pages: &mut [Page]) -> Result<()> {
        let first: Vec<usize> = self.order.iter().copied().take(self.slots.len()).collect();
        for &page in &first {
            if self.slot_of(page).is_some() {
                continue;
            }
            let free = |slot: &Slot| slot.holds.is_none_or(|held| !first.contains(&held));
            if let Some(slot) = self.slots.iter().position(free) {
                self.write_back(pages, slot)?;
                self.fetch(pages, slot, page)?;
            }
        }
        Ok(())
    }

    /// Ends a step: the next is expected to be as this one was.
    ///
    /// # Errors
    /// As [`Motion::enter`].
    pub fn end(&mut self, pages: &mut [Page]) -> Result<()> {
        if self.seen.len() == self.order.len() {
            std::mem::swap(&mut self.order, &mut self.seen);
        }
        self.seen.clear();
        self.begin(pages)
    }

    /// What is in slots is no longer true.
    pub fn forget(&mut self) {
        for slot in &mut self.slots {
            (slot.holds, slot.changed, slot.leaving) = (None, false, None);
        }
        self.seen.clear();
    }

    fn slot_of(&self, page: usize) -> Option<usize> {
        self.slots.iter().position(|slot| slot.holds == Some(page))
    }

    /// The pages after `page`, round and round, `page` itself left out.
    fn after(&self, page: usize) -> impl Iterator<Item = usize> {
        let at = self.order.iter().position(|&other| other == page).unwrap_or(0);
        let (before, rest) = self.order.split_at(at);
        rest.iter().skip(1).chain(before).copied()
    }

    /// The slot to give up for `page`: an empty one, else that whose page is needed last; one whose page waits for the rest of
    /// its updates only when there is no other.
    fn victim(&self, page: usize) -> usize {
        let rank = |slot: &Slot| match slot.holds {
            None => usize::MAX,
            Some(_) if slot.changed => 0,
            Some(held) => 1 + self.after(page).position(|other| other == held).unwrap_or(0),
        };
        let slots = self.slots.iter().enumerate();
        slots.max_by_key(|(_, slot)| rank(slot)).map_or(0, |(i, _)| i)
    }

    fn fetch(&mut self, pages: &mut [Page], slot: usize, page: usize) -> Result<()> {
        // Its way back may not be over.
        if let Some(other) = self.slots.iter().position(|slot| slot.leaving == Some(page)) {
            self.slots[other].land(pages)?;
        }
        for (to, from) in self.slots[slot].state.iter_mut().zip(&pages[page].state) {
            to.resize(from.shape())?;
            ops::fetch(from, to)?;
        }
        self.slots[slot].holds = Some(page);
        for next in self.after(page).take(READ_AHEAD) {
            pages[next].state.iter().for_each(Tensor::will_be_read);
        }
        Ok(())
    }

    fn write_back(&mut self, pages: &mut [Page], slot: usize) -> Result<()> {
        let slot = &mut self.slots[slot];
        let Some(page) = slot.holds.filter(|_| slot.changed) else {
            return Ok(());
        };
        slot.land(pages)?;
        let way = if slot.bounce.is_empty() {
            &mut pages[page].state
        } else {
            slot.leaving = Some(page);
            &mut slot.bounce
        };
        for (from, to) in slot.state.iter().zip(way) {
            to.resize(from.shape())?;
            ops::store(from, to)?;
        }
        slot.changed = false;
        Ok(())
    }
}

impl Slot {
    /// Brings what is on its way back to the file.
    fn land(&mut self, pages: &mut [Page]) -> Result<()> {
        let Some(page) = self.leaving.take() else {
            return Ok(());
        };
        for (from, to) in self.bounce.iter().zip(&mut pages[page].state) {
            from.arrive()?;
            to.copy_from(from)?;
        }
        Ok(())
    }
}
