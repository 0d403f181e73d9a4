//! How the state of many parameters is cut into pages, and which pages move between host and device: from sizes alone.
//!
//! Every step updates every page once, in the same order. Under such an order a cache that evicts what was used least
//! recently never hits: it has always just thrown away what comes next. The best that any rule can do is to keep as many
//! pages as fit for good and to let the others pass through what is left (Belady 1966: evict what is needed farthest in the
//! future). So pages of the budget stay on the device for good, all but a few slots, through which the others move: while
//! one is updated, the next arrive and the last leaves. (To go through the pages back and forth, with eviction of what was
//! used least recently, hits as often; but an update in the backward pass always comes from the same side.)

use super::state::Format;
use crate::error::{Error, Result};

/// Bytes of a page that moves, at most: copies of such a size run at the link's full rate.
const PAGE: u64 = 32 << 20;
/// Pages are not made smaller than this for the sake of keeping more of them on the device, unless there is little of
/// everything.
const SMALL_PAGE: u64 = 1 << 20;
/// Of so many pages some can be kept.
const MANY_PAGES: u64 = 32;
/// Elements of a page that stays, at most.
const RESIDENT: usize = 1 << 24;
/// Elements that boundaries within a parameter are multiples of.
const BLOCK: usize = 256;
/// Pages that share the device's slots: one that arrives, one that is updated, one that leaves. Where the budget is too
/// small for three, two do with less overlap.
const SLOTS: [usize; 2] = [3, 2];

/// What is to be known of a parameter.
#[derive(Debug, Clone)]
pub(super) struct Need {
    /// Parameters that are updated together.
    pub group: String,
    pub elements: usize,
    pub format: Format,
    /// Does its value lie on the host, to be updated on the device?
    pub master: bool,
}

/// A range of a parameter in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The parameter's number.
    pub param: usize,
    /// The first element in the parameter.
    pub at: usize,
    pub len: usize,
    /// The first element in the page.
    pub state_at: usize,
}

/// State of one format of some parameters, in their order.
#[derive(Debug)]
pub(super) struct PagePlan {
    pub lane: usize,
    pub elements: usize,
    pub pieces: Vec<Piece>,
    /// Does it move? Else it stays where it is updated.
    pub moves: bool,
}

/// Pages of one format.
#[derive(Debug)]
pub(super) struct Lane {
    pub format: Format,
    pub master: bool,
    /// How many pages that move are on the device at a time.
    pub slots: usize,
    /// The most elements of a page that moves.
    pub elements: usize,
}

/// Slots for values on their way through the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct ValueSlots {
    pub slots: usize,
    /// The most elements of a page of masters.
    pub elements: usize,
}

#[derive(Debug)]
pub(super) struct Layout {
    pub lanes: Vec<Lane>,
    /// In the order of the parameters within each lane.
    pub pages: Vec<PagePlan>,
    pub values: ValueSlots,
}

/// The parameters of a lane, before they are cut.
struct Kin {
    format: Format,
    master: bool,
    params: Vec<usize>,
    elements: usize,
}

/// Sizes that a budget allows.
struct Sizes {
    /// Bytes of a page at most.
    page: u64,
    slots: usize,
    /// Lanes with pages that move.
    moving: Vec<usize>,
}

impl Layout {
    /// Pages that stay, but for values of masters.
    pub fn resident(needs: &[Need]) -> Self {
        let sizes = Sizes {
            page: PAGE,
            slots: SLOTS[0],
            moving: Vec::new(),
        };
        Self::cut(needs, &kin(needs), &sizes)
    }

    /// Pages of which as many stay as `budget` bytes of the device allow beside the slots of the others; without a budget, it is
    /// what three slots of full pages take.
    ///
    /// # Errors
    /// The budget is too small for two slots of the smallest pages.
    pub fn paged(needs: &[Need], budget: Option<u64>) -> Result<Self> {
        let kin = kin(needs);
        let ring = usize::from(kin.iter().any(|kin| kin.master));
        let all: Vec<usize> = (0..kin.len()).filter(|&i| kin[i].format.bytes(1) > 0).collect();
        let default = ((all.len() + ring) * SLOTS[0]) as u64 * PAGE;
        let budget = budget.unwrap_or(default);
        let sizes = Sizes::within(budget, &kin, all, ring)?;
        let mut layout = Self::cut(needs, &kin, &sizes);
        layout.keep_what_fits(budget);
        Ok(layout)
    }

    fn cut(needs: &[Need], kin: &[Kin], sizes: &Sizes) -> Self {
        let mut layout = Self {
            lanes: Vec::new(),
            pages: Vec::new(),
            values: ValueSlots::default(),
        };
        for (lane, kin) in kin.iter().enumerate() {
            let moves = sizes.moving.contains(&lane);
            let mut most = if moves {
                elements_in(sizes.page, kin.format.bytes(BLOCK))
            } else {
                RESIDENT
            };
            if kin.master {
                most = most.min(elements_in(sizes.page, VALUE_BLOCK));
            }
            let before = layout.pages.len();
            layout.cut_lane(needs, lane, kin, most, moves);
            let pages = &layout.pages[before..];
            let elements = pages.iter().map(|page| page.elements).max().unwrap_or(0);
            if kin.master {
                layout.values.slots = sizes.slots;
                layout.values.elements = layout.values.elements.max(elements);
            }
            layout.lanes.push(Lane {
                format: kin.format,
                master: kin.master,
                slots: if moves { sizes.slots } else { 0 },
                elements: if moves { elements } else { 0 },
            });
        }
        layout
    }

    /// Parameters one after the other. A group that fills pages begins and ends with one, so that groups which are updated
    /// at different times share no page.
    fn cut_lane(&mut self, needs: &[Need], lane: usize, kin: &Kin, most: usize, moves: bool) {
        let of_group = |group: &str| -> usize {
            let own = kin.params.iter().filter(|&&i| needs[i].group == group);
            own.map(|&i| needs[i].elements).sum()
        };
        let mut page = PagePlan {
            lane,
            elements: 0,
            pieces: Vec::new(),
            moves,
        };
        let mut group: Option<(&str, bool)> = None;
        for &param in &kin.params {
            let need = &needs[param];
            if group.is_none_or(|(name, _)| name != need.group) {
                let fills = of_group(&need.group) >= most;
                if fills || group.is_some_and(|(_, filled)| filled) {
                    self.close(&mut page);
                }
                group = Some((&need.group, fills));
            }
            let mut at = 0;
            while at < need.elements {
                let state_at = page.elements.next_multiple_of(kin.format.alignment());
                // A boundary within a parameter is one of blocks.
                let room = most.saturating_sub(state_at);
                let left = need.elements - at;
                let len = if left <= room { left } else { room / BLOCK * BLOCK };
                if len == 0 {
                    self.close(&mut page);
                    continue;
                }
                page.pieces.push(Piece {
                    param,
                    at,
                    len,
                    state_at,
                });
                page.elements = state_at + len;
                at += len;
            }
        }
        self.close(&mut page);
    }

    /// Ends a page that has begun.
    fn close(&mut self, page: &mut PagePlan) {
        if !page.pieces.is_empty() {
            let (lane, moves) = (page.lane, page.moves);
            let next = PagePlan {
                lane,
                elements: 0,
                pieces: Vec::new(),
                moves,
            };
            self.pages.push(std::mem::replace(page, next));
        }
    }

    /// Lets pages stay, from the first on, in what the slots leave of the budget.
    fn keep_what_fits(&mut self, budget: u64) {
        let mut left = budget.saturating_sub(self.device_bytes());
        for page in self.pages.iter_mut().filter(|page| page.moves) {
            let bytes = self.lanes[page.lane].format.bytes(page.elements);
            if bytes <= left {
                page.moves = false;
                left -= bytes;
            }
        }
        for (i, lane) in self.lanes.iter_mut().enumerate() {
            let moving = |pages: &[PagePlan]| pages.iter().filter(|p| p.lane == i && p.moves).count();
            // As many as there are slots need not move.
            if lane.slots > 0 && moving(&self.pages) <= lane.slots {
                for page in self.pages.iter_mut().filter(|page| page.lane == i) {
                    page.moves = false;
                }
                (lane.slots, lane.elements) = (0, 0);
            }
        }
    }

    /// Bytes on the device: pages that stay, slots, and values on their way.
    pub fn device_bytes(&self) -> u64 {
        let stay = self.pages.iter().filter(|page| !page.moves);
        let stay: u64 = stay
            .map(|page| self.lanes[page.lane].format.bytes(page.elements))
            .sum();
        let slots = self.lanes.iter();
        let slots: u64 = slots
            .map(|lane| lane.slots as u64 * lane.format.bytes(lane.elements))
            .sum();
        stay + slots + (self.values.slots * self.values.elements) as u64 * VALUE
    }
}

/// Bytes of a value on its way, with those of its rounded copy, which may have to be written to host memory too.
const VALUE: u64 = 4 + 2;
/// Bytes of the values of [`BLOCK`] elements.
const VALUE_BLOCK: u64 = VALUE * BLOCK as u64;

/// The elements, in whole blocks of `block` bytes, that fit `bytes`.
fn elements_in(bytes: u64, block: u64) -> usize {
    usize::try_from(bytes / block.max(1))
        .map_or(RESIDENT, |blocks| blocks.saturating_mul(BLOCK).min(RESIDENT))
}

/// Parameters by format, in the order in which formats first appear.
fn kin(needs: &[Need]) -> Vec<Kin> {
    let mut all: Vec<Kin> = Vec::new();
    for (i, need) in needs.iter().enumerate() {
        let (format, master) = (need.format, need.master);
        let known = all
            .iter()
            .position(|kin| (kin.format, kin.master) == (format, master));
        let at = known.unwrap_or_else(|| {
            all.push(Kin {
                format,
                master,
                params: Vec::new(),
                elements: 0,
            });
            all.len() - 1
        });
        let kin = &mut all[at];
        kin.params.push(i);
        kin.elements = kin.elements.next_multiple_of(format.alignment()) + need.elements;
    }
    all
}

impl Sizes {
    /// Of `budget` bytes; `ring` is 1 when there are slots for values beside those of lanes, else 0.
    fn within(budget: u64, kin: &[Kin], mut moving: Vec<usize>, ring: usize) -> Result<Self> {
        let bytes = |i: usize| kin[i].format.bytes(kin[i].elements);
        let mut left = budget;
        loop {
            let shares = moving.len() + ring;
            let widest = moving.iter().map(|&i| kin[i].format.bytes(BLOCK)).max();
            let widest = widest.unwrap_or(0).max(ring as u64 * VALUE_BLOCK);
            let total: u64 = moving.iter().map(|&i| bytes(i)).sum();
            let small = SMALL_PAGE.min(total / MANY_PAGES);
            let (page, slots) = page_size(left, shares as u64, widest, small).ok_or_else(|| {
                let least = budget - left + (SLOTS[1] * shares) as u64 * widest;
                Error::input(
                    "--optimizer-vram",
                    format!("{budget} bytes"),
                    format!("at least {least} for two pages of each kind of state"),
                    "raise it, or leave it out",
                )
            })?;
            let share = slots as u64 * page;
            let done = |moving| Self { page, slots, moving };
            if total + ring as u64 * share <= left {
                return Ok(done(Vec::new()));
            }
            // A lane that would fit its slots needs none.
            let Some(small) = moving.iter().position(|&i| bytes(i) <= share) else {
                return Ok(done(moving));
            };
            left -= bytes(moving.remove(small));
        }
    }
}

/// Bytes of a page, of which `shares` times some slots fit `budget`, and the number of these slots; a page holds `widest` at
/// least.
///
/// Where pages do not become `small` by it, slots take a quarter of the budget at most: what stays does not have to be moved.
fn page_size(budget: u64, shares: u64, widest: u64, small: u64) -> Option<(u64, usize)> {
    if shares == 0 {
        return Some((PAGE, SLOTS[0]));
    }
    SLOTS.into_iter().find_map(|slots| {
        let most = budget / (slots as u64 * shares);
        let page = (most / 4).max(small).max(widest).min(PAGE).min(most);
        (page >= widest).then_some((page, slots))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs(format: Format, elements: &[usize]) -> Vec<Need> {
        let need = |(i, &elements): (usize, &usize)| Need {
            group: format!("layers.{i}"),
            elements,
            format,
            master: false,
        };
        elements.iter().enumerate().map(need).collect()
    }

    /// Pieces cover every parameter once and in order, do not overlap, and begin where they may.
    fn check(layout: &Layout, needs: &[Need]) {
        let mut covered = vec![0; needs.len()];
        for page in &layout.pages {
            let mut end = 0;
            for piece in &page.pieces {
                assert_eq!(piece.at, covered[piece.param]);
                assert!(piece.at.is_multiple_of(BLOCK) && piece.len > 0);
                let alignment = needs[piece.param].format.alignment();
                assert!(piece.state_at >= end && piece.state_at.is_multiple_of(alignment));
                covered[piece.param] += piece.len;
                end = piece.state_at + piece.len;
            }
            assert_eq!(end, page.elements);
            let lane = &layout.lanes[page.lane];
            assert!(!page.moves || (page.elements <= lane.elements && lane.slots >= 2));
        }
        let want: Vec<usize> = needs.iter().map(|need| need.elements).collect();
        assert_eq!(covered, want);
    }

    #[test]
    fn every_element_has_one_place_and_the_budget_holds() {
        let sizes = [5000, 1, 255, 256, 257, 100_000, 3, 70_001];
        for format in [Format::Adamw, Format::Adamw8bit, Format::Lion, Format::Sgd] {
            for master in [false, true] {
                let mut needs = needs(format, &sizes);
                needs.iter_mut().for_each(|need| need.master = master);
                check(&Layout::resident(&needs), &needs);
                let block = format.bytes(BLOCK).max(u64::from(master) * VALUE_BLOCK);
                let least = (2 * (u64::from(format != Format::Sgd) + u64::from(master))) * block;
                for budget in [least, least + 1, 3 * least, 50_000, 500_000, 1 << 30] {
                    if budget < least {
                        continue;
                    }
                    let layout = Layout::paged(&needs, Some(budget)).unwrap();
                    check(&layout, &needs);
                    let held = layout.device_bytes();
                    assert!(held <= budget, "{format:?} {master} {budget}: {held}");
                }
                if least > 0 {
                    let error = Layout::paged(&needs, Some(least - 1)).unwrap_err().to_string();
                    assert!(error.contains(&format!("at least {least}")), "{error}");
                }
            }
        }
    }

    #[test]
    fn a_budget_for_everything_moves_nothing_and_more_budget_moves_less() {
        let needs = needs(Format::Adamw, &[1_000_000; 12]);
        let total = 8 * 12_000_000;
        let moved = |budget: u64| -> usize {
            let layout = Layout::paged(&needs, Some(budget)).unwrap();
            let moving = layout.pages.iter().filter(|page| page.moves);
            moving.map(|page| page.elements).sum()
        };
        assert_eq!(moved(total), 0);
        assert!(moved(total - 1) > 0);
        // Most of a budget holds pages that stay: in a quarter of it the others move.
        assert!(moved(total / 2) <= 12_000_000 * 2 / 3, "{}", moved(total / 2));
        assert!(moved(total / 4) > moved(total / 2));
        assert_eq!(moved(4096), 12_000_000);
    }

    #[test]
    fn small_groups_share_pages_and_large_ones_do_not() {
        let small = Layout::resident(&needs(Format::Adamw, &[1000; 40]));
        assert_eq!(small.pages.len(), 1);
        // 32 KiB of state are 4096 elements of AdamW: a group of 10,000 is three pages.
        let needs = needs(Format::Adamw, &[100, 10_000, 10_000, 100, 100]);
        let kin = kin(&needs);
        let sizes = Sizes {
            page: 32 << 10,
            slots: 3,
            moving: vec![0],
        };
        let layout = Layout::cut(&needs, &kin, &sizes);
        check(&layout, &needs);
        let params = |page: &PagePlan| page.pieces.iter().map(|piece| piece.param).collect::<Vec<_>>();
        let pages: Vec<Vec<usize>> = layout.pages.iter().map(params).collect();
        let want: [&[usize]; 8] = [&[0], &[1], &[1], &[1], &[2], &[2], &[2], &[3, 4]];
        assert_eq!(pages, want);
    }

    #[test]
    fn a_kind_of_state_that_fits_its_slots_stays() {
        let mut needs = needs(Format::Adamw8bit, &[1 << 24; 8]);
        needs.push(Need {
            group: "embedding".into(),
            elements: 4096,
            format: Format::Adamw,
            master: false,
        });
        let layout = Layout::paged(&needs, Some(64 << 20)).unwrap();
        check(&layout, &needs);
        assert_eq!(layout.lanes[1].slots, 0);
        assert!(layout.pages.iter().any(|page| page.moves));
        assert!(layout.device_bytes() <= 64 << 20);
    }
}
