//! The fastest layout that fits: every choice is costed by formula, and what is chosen is planned to the byte.

use std::cmp::Ordering;

use super::card::Card;
use super::cost::{self, Cost, Shape};
use super::layout::{Layout, Policies, StateOn};
use super::{Plan, Work};
use crate::error::{Error, Result};
use crate::model::tune::Tuning;
use crate::model::workspace::logits_elements;
use crate::model::{EmbeddingPlace, HeadStorage, LayerPolicy, Linears, Recompute};
use crate::tensor::ledger::Pool;

/// What was asked for; `None` is left to the search.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Asked {
    /// Sequences of a micro-batch.
    pub micro_batch: Option<usize>,
    /// What layers keep.
    pub policies: Option<Policies>,
    /// The head.
    pub head: Option<HeadStorage>,
    /// Streamed weights.
    pub stream: Option<bool>,
    /// The optimizer's state.
    pub state: Option<StateOn>,
    /// Bytes of device memory for its pages.
    pub optimizer_vram: Option<u64>,
    /// The update in the backward pass.
    pub in_backward: Option<bool>,
}

/// How much memory there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the card, the driver's own included.
    pub device: u64,
    /// Bytes of host memory, if known.
    pub host: Option<u64>,
}

impl Limits {
    fn hold(&self, candidate: &Candidate) -> bool {
        candidate.device <= self.device && self.host.is_none_or(|host| candidate.host <= host)
    }
}

/// A layout, what it takes and what it costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// The choices.
    pub layout: Layout,
    /// Bytes of the card.
    pub device: u64,
    /// Bytes of host memory.
    pub host: u64,
    /// Seconds of a step, predicted.
    pub cost: Cost,
}

impl Candidate {
    fn of(work: &Work, layout: Layout, card: &Card) -> Result<Self> {
        let plan = Plan::of(work, &layout)?;
        let of_state = ["optimizer", "masters"];
        let state_bytes = plan.lines.iter().filter(|line| of_state.contains(&line.account));
        let state_bytes = state_bytes.map(|line| line.bytes).sum::<u64>() as f64;
        let cost = cost::step(&shape(work, &layout, state_bytes), &layout, card);
        Ok(Self {
            device: plan.device(),
            host: plan.host(),
            layout,
            cost,
        })
    }

    /// What layouts are ranked by. A head in fewer bits changes the numbers of the run: it has to be worth it.
    /// Moving things has a price beside its copies, and of two that cost the same to a percent the smaller one is better: the model
    /// is not that exact.
    fn rank(&self) -> i64 {
        let layout = &self.layout;
        let offloads = layout.layers.iter().any(|layer| layer.offload);
        let moves = [
            (layout.rounds_the_head(), 1.1),
            (offloads, 1.02),
            (layout.stream, 1.02),
            (layout.head == HeadStorage::Stream, 1.02),
            (layout.state != StateOn::Device, 1.02),
        ];
        let factor: f64 = moves
            .iter()
            .filter(|(is, _)| *is)
            .map(|(_, factor)| factor)
            .product();
        ((self.cost.total() * factor).ln() * 100.0).round() as i64
    }
}

/// What a step of `work` costs in `layout`, predicted.
///
/// # Errors
/// The layout does not fit the model.
pub fn cost_of(work: &Work, layout: &Layout, card: &Card) -> Result<Cost> {
    Candidate::of(work, layout.clone(), card).map(|candidate| candidate.cost)
}

fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    let key = |c: &Candidate| (c.rank(), c.host, c.device);
    key(a).cmp(&key(b))
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    /// The fastest layout that fits, then others that take less and less memory: where to go when the card has less than it said.
    pub ladder: Vec<Candidate>,
    /// The chosen layout with other things kept by its layers, and whether they fit: what the alternatives would cost.
    pub alternatives: Vec<(Candidate, bool)>,
}

fn shape(work: &Work, layout: &Layout, state_bytes: f64) -> Shape {
    let (h, i) = (work.model.hidden_size, work.model.inner_hidden_size);
    let matrices = (4 * h * h + 2 * h * i) as f64;
    let dense = matches!(work.tuning, Tuning::Full);
    let value = work.compute.dtype.size() as f64;
    Shape {
        model: work.model.clone(),
        batch: work.batch,
        length: work.length,
        value,
        layer_bytes: match work.from.linears {
            Linears::FourBit { double_quant: true } => matrices * 4.127 / 8.0,
            Linears::FourBit { double_quant: false } | Linears::RowInt4 => matrices * 4.5 / 8.0,
            Linears::RowInt8 => matrices,
            Linears::Dense => matrices * value,
        },
        dense,
        state_bytes,
        logits: logits_elements(layout.micro_batch * work.length, work.model.vocab_size),
        clips: work.options.max_grad_norm > 0.0,
    }
}

/// What layers can keep, from the fastest to the smallest.
const RUNGS: [LayerPolicy; 6] = {
    const fn rung(recompute: Recompute, offload: bool) -> LayerPolicy {
        LayerPolicy { recompute, offload }
    }
    [
        rung(Recompute::None, false),
        rung(Recompute::None, true),
        rung(Recompute::Smart, false),
        rung(Recompute::Smart, true),
        rung(Recompute::Full, false),
        rung(Recompute::Full, true),
    ]
};

/// Does the embedding train, or the head?
fn tables_train(tuning: &Tuning) -> bool {
    match tuning {
        Tuning::Full => true,
        Tuning::Lora(config) => !config.modules_to_save.is_empty(),
        Tuning::Freeze { .. } | Tuning::PTuning(_) => false,
    }
}

/// The choices but for what layers keep.
fn outlines(work: &Work, asked: &Asked) -> Vec<Layout> {
    let layers = work.model.num_layers;
    let either = |asked: Option<bool>, possible: bool| match asked {
        Some(one) => vec![one],
        None if possible => vec![false, true],
        None => vec![false],
    };
    let micros = match asked.micro_batch {
        Some(one) => vec![one],
        None => (1..=work.batch.min(64))
            .filter(|n| work.batch.is_multiple_of(*n))
            .collect(),
    };
    let heads = match asked.head {
        Some(one) => vec![one],
        None if tables_train(&work.tuning) => vec![HeadStorage::Compute],
        None => vec![
            HeadStorage::Compute,
            HeadStorage::Stream,
            HeadStorage::Int8,
            HeadStorage::Nf4,
        ],
    };
    let states = match asked.state {
        Some(one) => vec![one],
        None => vec![StateOn::Device, StateOn::Host],
    };
    let full = matches!(work.tuning, Tuning::Full);
    let mut outlines = Vec::new();
    for &micro_batch in &micros {
        for &head in &heads {
            for &stream in &either(asked.stream, true) {
                for &state in &states {
                    // The update in the backward pass takes a step in one micro-batch.
                    let in_backward = match (asked.in_backward, micro_batch == work.batch) {
                        (Some(true), true) => vec![true],
                        (Some(true), false) => vec![],
                        (None, true) if full => vec![false, true],
                        _ => vec![false],
                    };
                    for in_backward in in_backward {
                        // A matrix that is on the device as the head serves as the embedding, too.
                        let shared = head == HeadStorage::Compute && !work.from.separate_head;
                        let embedding = match shared || tables_train(&work.tuning) {
                            true => EmbeddingPlace::Device,
                            false => EmbeddingPlace::Host,
                        };
                        outlines.push(Layout {
                            head,
                            embedding,
                            stream,
                            state,
                            optimizer_vram: asked.optimizer_vram,
                            in_backward,
                            ..Layout::plain(micro_batch, layers)
                        });
                    }
                }
            }
        }
    }
    outlines
}

/// The outline with `few` layers, the first, keeping as `small` says, the others as `large`.
fn mixed(outline: &Layout, small: LayerPolicy, few: usize, large: LayerPolicy) -> Layout {
    let mut layout = outline.clone();
    for (i, policy) in layout.layers.iter_mut().enumerate() {
        *policy = if i < few { small } else { large };
    }
    layout
}

/// The layouts of one outline that may be worth it: for every pair of rungs the mixture with as few small layers as fit.
fn mixtures(work: &Work, outline: &Layout, limits: Limits, card: &Card) -> Result<Vec<Candidate>> {
    let layers = outline.layers.len();
    let pure = |rung| Candidate::of(work, mixed(outline, rung, layers, rung), card);
    let largest = pure(RUNGS[0])?;
    if limits.hold(&largest) {
        return Ok(vec![largest]);
    }
    let rest = RUNGS[1..].iter().map(|&rung| pure(rung));
    let pure: Vec<Candidate> = std::iter::once(Ok(largest)).chain(rest).collect::<Result<_>>()?;
    let mut found = Vec::new();
    for (large, from) in pure.iter().zip(RUNGS) {
        for (small, to) in pure.iter().zip(RUNGS) {
            let pair = small.device < large.device && large.cost.total() <= small.cost.total();
            if !pair || limits.hold(large) || !limits.hold(small) {
                continue;
            }
            // Memory is a straight line but for the buffers that the first offloaded layer brings: start there, then step.
            let each = (large.device - small.device) as f64 / layers as f64;
            let over = large.device.saturating_sub(limits.device) as f64;
            let start = ((over / each).ceil() as usize).min(layers);
            for few in start..=layers {
                let candidate = Candidate::of(work, mixed(outline, to, few, from), card)?;
                if limits.hold(&candidate) {
                    found.push(candidate);
                    break;
                }
            }
        }
    }
    found.extend(pure.into_iter().filter(|candidate| limits.hold(candidate)));
    Ok(found)
}

/// The fastest layout within `limits` that does what was asked.
///
/// # Errors
/// Nothing fits: what would take least, and what to change.
pub fn fit(work: &Work, asked: &Asked, limits: Limits, card: &Card) -> Result<Fit> {
    let fixed = match &asked.policies {
        Some(policies) => Some(policies.layers(work.model.num_layers)?),
        None => None,
    };
    // What an outline costs at best needs no plan: it has no limits.
    let at_best = |layout: Layout| {
        let cost = cost::step(&shape(work, &layout, 0.0), &layout, card);
        Candidate {
            layout,
            device: 0,
            host: 0,
            cost,
        }
    };
    let mut outlines: Vec<Candidate> = outlines(work, asked).into_iter().map(at_best).collect();
    outlines.sort_by(by_rank);
    let mut fitting: Vec<Candidate> = Vec::new();
    let mut refused = None;
    for Candidate {
        layout: outline,
        cost,
        ..
    } in &outlines
    {
        if fitting.iter().any(|found| found.cost.total() <= cost.total()) {
            continue;
        }
        let found = match &fixed {
            Some(layers) => {
                let layout = Layout {
                    layers: layers.clone(),
                    ..outline.clone()
                };
                Candidate::of(work, layout, card).map(|candidate| vec![candidate])
            }
            None => mixtures(work, outline, limits, card),
        };
        // Not everything goes with everything: what the constructors refuse is no choice.
        match found {
            Ok(found) => fitting.extend(found.into_iter().filter(|candidate| limits.hold(candidate))),
            Err(error) => refused = Some(error),
        }
    }
    fitting.sort_by(by_rank);
    let smallest = match smallest(work, asked, fixed.clone()) {
        Some(layout) => Candidate::of(work, layout, card),
        None => Err(Error::Usage(
            "the memory flags contradict each other: --optimizer-in-backward takes a step in one micro-batch"
                .into(),
        )),
    };
    let Some(chosen) = fitting.first().cloned() else {
        return Err(match (smallest, refused) {
            (Ok(smallest), _) => nothing_fits(work, asked, &smallest, limits),
            (Err(_), Some(error)) | (Err(error), None) => error,
        });
    };
    let mut alternatives = Vec::new();
    for rung in RUNGS {
        let layout = mixed(&chosen.layout, rung, chosen.layout.layers.len(), rung);
        if layout != chosen.layout {
            let candidate = Candidate::of(work, layout, card)?;
            let fits = limits.hold(&candidate);
            alternatives.push((candidate, fits));
        }
    }
    if fixed.is_none() {
        let in_host = |c: &Candidate| limits.host.is_none_or(|host| c.host <= host);
        fitting.extend(
            alternatives
                .iter()
                .map(|(candidate, _)| candidate.clone())
                .filter(in_host),
        );
        fitting.sort_by(by_rank);
    }
    fitting.extend(
        smallest
            .ok()
            .filter(|c| limits.host.is_none_or(|host| c.host <= host)),
    );
    // Each rung of the ladder takes noticeably less than the one before.
    let mut ladder = vec![chosen];
    for candidate in fitting {
        if candidate.device as f64 <= 0.95 * ladder[ladder.len() - 1].device as f64 {
            ladder.push(candidate);
        }
    }
    Ok(Fit { ladder, alternatives })
}

/// The layout that takes least of the card, of those that do what was asked; `None` when nothing can do all of it.
fn smallest(work: &Work, asked: &Asked, fixed: Option<Vec<LayerPolicy>>) -> Option<Layout> {
    // The update in the backward pass saves the gradients of all layers but one, and takes a step in one micro-batch.
    let full = matches!(work.tuning, Tuning::Full);
    let in_backward = asked.in_backward == Some(true) || (full && asked.in_backward.is_none());
    let one = if in_backward { work.batch } else { 1 };
    let least = Asked {
        micro_batch: asked.micro_batch.or(Some(one)),
        head: asked
            .head
            .or((!tables_train(&work.tuning)).then_some(HeadStorage::Stream)),
        stream: asked.stream.or(Some(true)),
        state: asked.state.or(Some(StateOn::Host)),
        in_backward: asked.in_backward,
        policies: None,
        optimizer_vram: asked.optimizer_vram,
    };
    // The last of them has everything on.
    let outline = outlines(work, &least).pop()?;
    let last = RUNGS[RUNGS.len() - 1];
    let layers = fixed.unwrap_or_else(|| vec![last; work.model.num_layers]);
    Some(Layout { layers, ..outline })
}

fn nothing_fits(work: &Work, asked: &Asked, least: &Candidate, limits: Limits) -> Error {
    let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    let host_only = least.device <= limits.device;
    let found = format!(
        "{} for sequences of {} tokens; the smallest layout ({}) takes {} of the card and {} of host memory",
        gb(limits.device),
        work.length,
        least.layout,
        gb(least.device),
        gb(least.host)
    );
    if host_only {
        let expected = format!("{} of host memory", gb(least.host));
        let remedy = "close other programs, give the machine more memory, or use --optimizer-state disk";
        return Error::input("memory", found, expected, remedy);
    }
    let least_layout = least.layout.clone();
    let shorter = largest_by(work.length, |length| {
        let work = Work {
            length,
            ..work.clone()
        };
        Plan::of(&work, &least_layout).is_ok_and(|plan| plan.device() <= limits.device)
    });
    let mut remedies = Vec::new();
    if shorter > 0 {
        remedies.push(format!("--max-length {shorter} fits"));
    }
    if asked != &Asked::default() {
        remedies.push("leave the memory flags out, so that glmtune chooses".to_string());
    }
    if work.from.linears == Linears::Dense {
        remedies.push("--method qlora holds the weights in 4 bits".to_string());
    }
    remedies.push("close what else uses the card".to_string());
    let expected = format!("at least {}", gb(least.device));
    Error::input("memory of the card", found, expected, remedies.join("; "))
}

/// The largest number up to `most` for which `fits`, which does so for all smaller ones too; 0 when none does.
fn largest_by(most: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0, most + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

/// The most sequences of this length, and the longest sequence of this micro-batch, that fit in `layout`.
pub fn largest(work: &Work, layout: &Layout, limits: Limits) -> (usize, usize) {
    let fits = |work: &Work, layout: &Layout| {
        Plan::of(work, layout).is_ok_and(|plan| {
            let candidate_host = plan.tensors(Pool::Host) + plan.tensors(Pool::Pinned);
            plan.device() <= limits.device && limits.host.is_none_or(|host| candidate_host <= host)
        })
    };
    let batch = largest_by(4096, |micro_batch| {
        let layout = Layout {
            micro_batch,
            ..layout.clone()
        };
        fits(work, &layout)
    });
    let length = largest_by(1 << 20, |length| {
        let work = Work {
            length,
            ..work.clone()
        };
        fits(&work, layout)
    });
    (batch, length)
}

/// The longest sequence that fits with everything moved off the card, alone in a micro-batch; 0 when none does.
pub fn longest(work: &Work, limits: Limits) -> usize {
    let work = Work {
        batch: 1,
        ..work.clone()
    };
    smallest(&work, &Asked::default(), None).map_or(0, |layout| largest(&work, &layout, limits).1)
}
