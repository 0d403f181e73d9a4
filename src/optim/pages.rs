//! The memory of the state: pages where they lie, and the updates of parameters that go through them.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

use super::layout::{Layout, Piece};
use super::motion::Motion;
use super::state::{Format, Rule};
use super::values::Values;
use super::{StateMemory, StatePlace, Traffic};
use crate::checkpoint::ScratchFile;
use crate::error::{Error, Result};
use crate::nn::Param;
use crate::ops::{self, Span};
use crate::tensor::{DType, Device, Tensor};

/// The scratch file of [`StatePlace::Disk`].
const FILE: &str = "optimizer-state.scratch";

/// A page, where it lies between its updates.
#[derive(Debug)]
pub(super) struct Page {
    lane: usize,
    /// In the order of the parameters; a parameter has one at most.
    pub pieces: Vec<Piece>,
    /// The parts of the lane's format.
    pub state: Vec<Tensor>,
    moves: bool,
    /// Pieces that have been updated in this step.
    updated: usize,
}

/// Pages of one format.
#[derive(Debug)]
struct Lane {
    format: Format,
    master: bool,
    motion: Motion,
}

/// The state of many parameters.
#[derive(Debug)]
pub(super) struct Pages {
    lanes: Vec<Lane>,
    pages: Vec<Page>,
    /// The pages of each parameter.
    of_param: Vec<Vec<usize>>,
    values: Values,
    _file: Option<ScratchFile>,
}

/// A parameter that takes a step.
pub(super) struct Taking<'a> {
    pub number: usize,
    pub param: &'a mut Param,
    /// See [`Span`].
    pub rate: f32,
    pub decay: f32,
}

impl Pages {
    /// Makes all the memory that `layout` asks for; everything in it is 0. `pinned_values` and `waiting`:
    /// see [`Values::new`].
    ///
    /// # Errors
    /// A device, the host or the disk has no room.
    pub fn new(
        layout: Layout,
        device: Device,
        place: &StatePlace,
        pinned_values: bool,
        waiting: Option<DType>,
    ) -> Result<Self> {
        let moves = layout.pages.iter().any(|page| page.moves);
        let mut file = match place {
            StatePlace::Disk(folder) if moves || device == Device::Cpu => Some(create(folder)?),
            _ => None,
        };
        let on_disk = file.is_some();
        let mut pages = Vec::new();
        let mut of_param: Vec<Vec<usize>> = Vec::new();
        let mut order: Vec<Vec<usize>> = layout.lanes.iter().map(|_| Vec::new()).collect();
        for plan in layout.pages {
            let parts = layout.lanes[plan.lane].format.parts().iter();
            let state = parts.map(|part| {
                let shape = [part.elements(plan.elements)];
                match &mut file {
                    Some(file) if plan.moves || device == Device::Cpu => file.tensor(part.dtype, shape),
                    _ if plan.moves => Tensor::zeros_pinned(device, part.dtype, shape),
                    _ => Tensor::zeros_on(device, part.dtype, shape),
                }
            });
            for piece in &plan.pieces {
                if of_param.len() <= piece.param {
                    of_param.resize_with(piece.param + 1, Vec::new);
                }
                of_param[piece.param].push(pages.len());
            }
            if plan.moves {
                order[plan.lane].push(pages.len());
            }
            pages.push(Page {
                lane: plan.lane,
                pieces: plan.pieces,
                state: state.collect::<Result<_>>()?,
                moves: plan.moves,
                updated: 0,
            });
        }
        let mut lanes = Vec::new();
        for (lane, order) in layout.lanes.into_iter().zip(order) {
            lanes.push(Lane {
                format: lane.format,
                master: lane.master,
                motion: Motion::new(&lane, order, device, on_disk)?,
            });
        }
        let mut all = Self {
            lanes,
            pages,
            of_param,
            values: Values::new(layout.values, device, pinned_values, waiting)?,
            _file: file,
        };
        all.begin()?;
        Ok(all)
    }

    /// Asks for the first pages of a step.
    fn begin(&mut self) -> Result<()> {
        for lane in &mut self.lanes {
            lane.motion.begin(&mut self.pages)?;
        }
        Ok(())
    }

    /// Updates parameters, sorted by number, each at most once a step.
    ///
    /// # Errors
    /// Shapes do not fit, a gradient is missing, or a copy fails.
    pub fn update(&mut self, rule: &Rule, taking: &mut [Taking<'_>]) -> Result<()> {
        let pages: BTreeSet<usize> = (taking.iter())
            .filter_map(|t| self.of_param.get(t.number))
            .flatten()
            .copied()
            .collect();
        let masters = pages.iter().copied();
        let masters = masters.filter(|&page| self.lanes[self.pages[page].lane].master);
        let mut masters = masters.collect::<Vec<_>>().into_iter();
        for page in masters.by_ref().take(self.values.slots()) {
            self.values.ask(page, &self.pages[page].pieces, taking)?;
        }
        for &number in &pages {
            let lane = &mut self.lanes[self.pages[number].lane];
            let slot = if self.pages[number].moves {
                Some(lane.motion.enter(&mut self.pages, number)?)
            } else {
                None
            };
            let (format, master, page) = (lane.format, lane.master, &mut self.pages[number]);
            let state = match slot {
                Some(slot) => lane.motion.state_mut(slot),
                None => &mut page.state,
            };
            page.updated += if master {
                self.values.update(number, &page.pieces, taking, |span| {
                    rule.apply(format, state, vec![span])
                })?
            } else {
                in_place(&page.pieces, taking, |spans| rule.apply(format, state, spans))?
            };
            if master && let Some(next) = masters.next() {
                self.values.ask(next, &self.pages[next].pieces, taking)?;
            }
            let page = &mut self.pages[number];
            let whole = page.updated == page.pieces.len();
            if whole {
                page.updated = 0;
            }
            if let Some(slot) = slot.filter(|_| whole) {
                let motion = &mut self.lanes[self.pages[number].lane].motion;
                motion.leave(&mut self.pages, slot)?;
            }
        }
        self.values.land(taking)
    }

    /// Ends a step, whole or broken off, and asks for the first pages of the next.
    ///
    /// # Errors
    /// A copy cannot be asked for.
    pub fn end(&mut self) -> Result<()> {
        self.pages.iter_mut().for_each(|page| page.updated = 0);
        for lane in &mut self.lanes {
            lane.motion.end(&mut self.pages)?;
        }
        Ok(())
    }

    /// The pages of parameter `number`, in the order of its elements, with its piece in each.
    pub fn pieces_of(&self, number: usize) -> impl Iterator<Item = (usize, Piece)> {
        let pages = self.of_param.get(number).into_iter().flatten();
        pages.filter_map(move |&page| {
            let pieces = &self.pages[page].pieces;
            let at = pieces.binary_search_by_key(&number, |piece| piece.param).ok()?;
            Some((page, pieces[at]))
        })
    }

    /// The state of page `number` as it is now, on the host.
    ///
    /// # Errors
    /// A copy failed.
    pub fn read(&self, number: usize) -> Result<Vec<Cow<'_, Tensor>>> {
        let page = &self.pages[number];
        let moved = self.lanes[page.lane].motion.newest(number);
        let parts = moved.unwrap_or(&page.state).iter();
        let parts = parts.map(|part| match part.device() {
            Device::Cpu => part.arrive().map(|()| Cow::Borrowed(part)),
            Device::Cuda(_) => part.to_device(Device::Cpu).map(Cow::Owned),
        });
        parts.collect()
    }

    /// Gives every page another state: `fill` writes the parts of a page, which are on the host.
    ///
    /// # Errors
    /// A copy fails.
    pub fn write(&mut self, mut fill: impl FnMut(&[Piece], &mut [Tensor])) -> Result<()> {
        for lane in &mut self.lanes {
            lane.motion.forget();
        }
        for page in &mut self.pages {
            if page.state.iter().all(|part| part.device() == Device::Cpu) {
                fill(&page.pieces, &mut page.state);
                continue;
            }
            let host = page.state.iter();
            let mut host: Vec<Tensor> = host
                .map(|part| Tensor::zeros(part.dtype(), part.shape()))
                .collect();
            fill(&page.pieces, &mut host);
            for (part, host) in page.state.iter_mut().zip(&host) {
                part.copy_from(host)?;
            }
        }
        self.begin()
    }

    /// Bytes of state, wherever they lie.
    pub fn bytes(&self) -> usize {
        let state = self.pages.iter().flat_map(|page| &page.state);
        state.map(Tensor::byte_len).sum()
    }

    /// What the state and its motion hold.
    pub fn memory(&self) -> StateMemory {
        let mut memory = StateMemory::default();
        let pages = self.pages.iter().flat_map(|page| &page.state);
        let lanes = self.lanes.iter().flat_map(|lane| lane.motion.tensors());
        for tensor in pages.chain(lanes).chain(self.values.tensors()) {
            let bytes = tensor.owned_bytes() as u64;
            match tensor.device() {
                Device::Cuda(_) => memory.device += bytes,
                Device::Cpu if tensor.is_scratch() => memory.disk += bytes,
                Device::Cpu => memory.host += bytes,
            }
        }
        memory
    }

    /// What a step moves, but for rounded copies: every page that moves and every value of a master, once in each direction.
    pub fn traffic(&self) -> Traffic {
        let mut bytes = 0;
        for page in &self.pages {
            if page.moves {
                bytes += page.state.iter().map(|part| part.byte_len() as u64).sum::<u64>();
            }
            if self.lanes[page.lane].master {
                bytes += page.pieces.iter().map(|piece| 4 * piece.len as u64).sum::<u64>();
            }
        }
        Traffic {
            fetched: bytes,
            stored: bytes,
        }
    }
}

fn create(folder: &Path) -> Result<ScratchFile> {
    ScratchFile::create(&folder.join(FILE))
}

/// Updates those pieces of a page whose parameters take the step now, where their values lie; the result is their number.
fn in_place(
    pieces: &[Piece],
    taking: &mut [Taking<'_>],
    apply: impl FnOnce(Vec<Span<'_>>) -> Result<()>,
) -> Result<usize> {
    let mut spans = Vec::new();
    for (t, piece) in here(pieces, taking) {
        // A gradient beside a value of the same parameter.
        let Param { value, grad, .. } = &mut *t.param;
        let g = grad.as_ref().ok_or_else(|| no_gradient(piece))?;
        spans.push(Span {
            p: value,
            g,
            p_at: piece.at,
            g_at: piece.at,
            state_at: piece.state_at,
            len: piece.len,
            rate: t.rate,
            decay: t.decay,
        });
    }
    let updated = spans.len();
    apply(spans)?;
    for (t, piece) in here(pieces, taking) {
        if let Some(working) = &mut t.param.working {
            ops::round_into(&t.param.value, piece.at..piece.at + piece.len, working, piece.at)?;
        }
    }
    Ok(updated)
}

pub(super) fn no_gradient(piece: &Piece) -> Error {
    Error::Shape {
        operation: "Optimizer::step",
        found: format!("no gradient of parameter {}", piece.param),
        expected: "a gradient of every parameter that takes the step".into(),
    }
}

/// The parameters that have a piece here, with it; both are sorted by the parameter's number.
pub(super) fn here<'t, 'a>(
    pieces: &'t [Piece],
    taking: &'t mut [Taking<'a>],
) -> impl Iterator<Item = (&'t mut Taking<'a>, &'t Piece)> {
    taking.iter_mut().filter_map(|t| {
        let at = pieces.binary_search_by_key(&t.number, |piece| piece.param).ok()?;
        Some((t, &pieces[at]))
    })
}
