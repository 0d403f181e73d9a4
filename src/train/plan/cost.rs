//! How long a step takes, by formula: it ranks layouts, and predicts no clock.
//!
//! Per layer, with M rows, h the width, i the inner width, `pairs` the visible pairs of query and key, s bytes of a value:
//!
//! | part | operations or bytes |
//! |---|---|
//! | products forward | `2 M (4 h² + 2 h i)`, at 60 % of the peak, or the bytes of the matrices where M is small |
//! | attention forward | `4 h pairs`, at 35 % |
//! | elementwise forward | `(10 h + 2 i) M s` bytes, at 80 % of the bandwidth |
//! | backward | products once, twice where matrices train; attention 2.5 times; elementwise twice |
//! | computed again | none: `(4 h + 2 i) M s` bytes; smart: QKV and FC1, `2 M (3 h² + h i)`; full: all but FC2 |
//! | to the host | what an offloaded layer keeps, beside its forward pass; back, beside its backward pass |
//! | streamed | the layer's matrices, beside both passes |
//!
//! Copies cost what they take beyond the computation that they run beside. The head's products are three for each labelled row (a
//! fourth when the logits do not fit at once); a head in 8 or 4 bits is decoded, a streamed one copied, once for each.

use super::card::Card;
use super::layout::{Layout, StateOn};
use crate::model::{HeadStorage, LayerPolicy, ModelConfig, Recompute};

/// What a step works on.
#[derive(Debug, Clone)]
pub struct Shape {
    /// The sizes of the model.
    pub model: ModelConfig,
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of each.
    pub length: usize,
    /// Bytes of a value of the compute type.
    pub value: f64,
    /// Bytes of the matrices of a layer, as they are streamed.
    pub layer_bytes: f64,
    /// Do the matrices train?
    pub dense: bool,
    /// Bytes of the optimizer's state, f32 weights in it included where they lie elsewhere.
    pub state_bytes: f64,
    /// Logits that are held at once.
    pub logits: usize,
    /// Is the gradient norm clipped?
    pub clips: bool,
}

/// Seconds of a step.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Cost {
    /// What every layout computes.
    pub compute: f64,
    /// What is computed again.
    pub again: f64,
    /// Copies that nothing hides.
    pub copies: f64,
    /// The optimizer.
    pub optimizer: f64,
}

impl Cost {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.compute + self.again + self.copies + self.optimizer
    }

    fn add(&mut self, other: Cost, times: f64) {
        self.compute += times * other.compute;
        self.again += times * other.again;
        self.copies += times * other.copies;
        self.optimizer += times * other.optimizer;
    }
}

const PRODUCTS: f64 = 0.6;
const ATTENTION: f64 = 0.35;
const ELEMENTWISE: f64 = 0.8;
/// Of a layer's forward pass: some 20 launches of 3 microseconds.
const LAUNCHES: f64 = 60e-6;

/// Rates in operations and bytes of a second.
struct Rates {
    products: f64,
    attention: f64,
    memory: f64,
    bus: f64,
}

/// The cost of one optimizer step.
pub fn step(shape: &Shape, layout: &Layout, card: &Card) -> Cost {
    let rates = Rates {
        products: PRODUCTS * card.tflops * 1e12,
        attention: ATTENTION * card.tflops * 1e12,
        memory: ELEMENTWISE * card.bandwidth * 1e9,
        bus: card.bus * 1e9,
    };
    let micro = layout.micro_batch.clamp(1, shape.batch.max(1));
    let mut cost = Cost::default();
    let mut backward = 0.0;
    let mut one = Cost::default();
    for &policy in &layout.layers {
        let (layer, back) = layer(shape, micro, policy, layout.stream, &rates);
        one.add(layer, 1.0);
        backward += back;
    }
    let forward = one.compute + one.again - backward;
    one.add(head(shape, micro, layout.head, &rates), 1.0);
    cost.add(one, shape.batch.div_ceil(micro) as f64);
    if layout.in_backward && shape.clips {
        // The norm needs a backward pass of its own, and offloaded activations are gone after it.
        cost.again += backward;
        if layout.layers.iter().filter(|layer| layer.offload).count() > 2 {
            cost.again += forward;
        }
    }
    cost.optimizer = 2.0 * shape.state_bytes / rates.memory;
    if layout.state != StateOn::Device {
        // There and back. Little of it is hidden: a few pages ahead of an update, and a few behind.
        let moved = (shape.state_bytes - layout.optimizer_vram.unwrap_or(0) as f64).max(0.0);
        cost.copies += 2.0 * moved / rates.bus * if layout.state == StateOn::Disk { 8.0 } else { 1.0 };
    }
    cost
}

/// The cost of a layer for a micro-batch, and of its backward pass alone.
fn layer(shape: &Shape, micro: usize, policy: LayerPolicy, stream: bool, rates: &Rates) -> (Cost, f64) {
    let (h, i) = (
        shape.model.hidden_size as f64,
        shape.model.inner_hidden_size as f64,
    );
    let rows = (micro * shape.length) as f64;
    let length = shape.length as f64;
    // A quarter of the tokens is context.
    let pairs = micro as f64 * length * length * (0.5 + 0.5 / 16.0);
    // Few rows take as long as reading the matrices does.
    let whole = 4.0 * h * h + 2.0 * h * i;
    let read = |matrices: f64| shape.layer_bytes * matrices / whole / rates.memory;
    let products = |matrices: f64| (2.0 * rows * matrices / rates.products).max(read(matrices));
    let elementwise = |values: f64| values * rows * shape.value / rates.memory;
    let attention = 4.0 * h * pairs / rates.attention;

    let forward = products(whole) + attention + elementwise(10.0 * h + 2.0 * i) + LAUNCHES;
    let gradients = if shape.dense { 2.0 } else { 1.0 };
    let backward =
        gradients * products(whole) + 2.5 * attention + elementwise(20.0 * h + 4.0 * i) + 2.0 * LAUNCHES;
    let again = match policy.recompute {
        Recompute::None => elementwise(4.0 * h + 2.0 * i),
        Recompute::Smart => products(3.0 * h * h + h * i) + elementwise(10.0 * h + 2.0 * i),
        Recompute::Full => products(4.0 * h * h + h * i) + attention + elementwise(10.0 * h + 2.0 * i),
    };
    let (hidden, inner) = (shape.model.hidden_size, shape.model.inner_hidden_size);
    let kept = policy.recompute.values(hidden, inner) as f64 * rows * shape.value;
    let copied = if policy.offload { kept / rates.bus } else { 0.0 };
    let streamed = if stream {
        shape.layer_bytes / rates.bus
    } else {
        0.0
    };
    // One goes down while the other comes up; on the way back both come up.
    let copies = (copied.max(streamed) - forward).max(0.0) + (copied + streamed - backward - again).max(0.0);
    let cost = Cost {
        compute: forward + backward,
        again,
        copies,
        optimizer: 0.0,
    };
    (cost, backward + again)
}

fn head(shape: &Shape, micro: usize, storage: HeadStorage, rates: &Rates) -> Cost {
    let (h, v) = (shape.model.hidden_size as f64, shape.model.vocab_size as f64);
    // A quarter of the tokens is context, which has no labels.
    let rows = 0.75 * (micro * shape.length) as f64;
    let passes = if rows * v > shape.logits as f64 { 3.0 } else { 2.0 };
    let gradients = if shape.dense { 1.0 } else { 0.0 };
    let products = 2.0 * rows * h * v * (passes + gradients) / rates.products;
    let softmax = 4.0 * rows * v * 4.0 / rates.memory;
    let matrix = h * v * shape.value;
    let (again, copies) = match storage {
        HeadStorage::Compute => (0.0, 0.0),
        HeadStorage::Int8 => (passes * 1.5 * matrix / rates.memory, 0.0),
        HeadStorage::Nf4 => (passes * 1.25 * matrix / rates.memory, 0.0),
        HeadStorage::Stream => (0.0, (passes * matrix / rates.bus - products - softmax).max(0.0)),
    };
    Cost {
        compute: products + softmax,
        again,
        copies,
        optimizer: 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(length: usize) -> Shape {
        Shape {
            model: ModelConfig::chatglm_6b(),
            batch: 1,
            length,
            value: 2.0,
            layer_bytes: 104e6,
            dense: false,
            state_bytes: 0.0,
            logits: 1 << 24,
            clips: true,
        }
    }

    fn of(length: usize, recompute: Recompute, offload: bool, stream: bool, card: &str) -> Cost {
        let mut layout = Layout::plain(1, 28);
        layout.layers = vec![LayerPolicy { recompute, offload }; 28];
        layout.stream = stream;
        step(&shape(length), &layout, &Card::named(card).unwrap())
    }

    /// By operations alone smart costs 1.24 times and full 1.44 times as much as keeping everything, at 2048 tokens.
    #[test]
    fn recomputing_costs_what_its_operations_say() {
        let total = |recompute| of(2048, recompute, false, false, "RTX 4090").total();
        let none = total(Recompute::None);
        let (smart, full) = (total(Recompute::Smart) / none, total(Recompute::Full) / none);
        assert!((1.18..1.28).contains(&smart), "{smart}");
        assert!((1.28..1.46).contains(&full), "{full}");
    }

    /// 82 KB a token and layer take 3.3 microseconds on a bus of 25 GB/s, less than an RTX 3060 computes; on twice that bus an H100 is
    /// faster still.
    #[test]
    fn copies_cost_what_nothing_hides() {
        let copies = |card| of(2048, Recompute::None, true, false, card).copies;
        assert_eq!(copies("RTX 3060"), 0.0);
        assert!(copies("H100") > 0.0);
        // Streaming is hidden from some number of tokens on.
        assert!(of(128, Recompute::Full, false, true, "RTX 3060").copies > 0.0);
        assert_eq!(of(2048, Recompute::Full, false, true, "RTX 3060").copies, 0.0);
    }

    #[test]
    fn a_streamed_head_is_hidden_by_long_batches_only() {
        let head = |length, storage| {
            let mut layout = Layout::plain(1, 28);
            layout.head = storage;
            step(&shape(length), &layout, &Card::named("RTX 3060").unwrap())
        };
        assert!(head(64, HeadStorage::Stream).copies > 0.0);
        assert_eq!(head(2048, HeadStorage::Stream).copies, 0.0);
        assert!(head(64, HeadStorage::Nf4).total() < head(64, HeadStorage::Stream).total());
    }
}
