//! The order of the samples: which ones make up which micro-batch of which optimizer step, from the step alone.

use std::cell::RefCell;

use crate::error::{Error, Result};
use crate::rng::Stream;

/// What the random streams of this file are numbered from, apart from those of dropout and initialisation.
const SHUFFLE: u64 = 0x5348_5546 << 32;
const SPLIT: u64 = 0x5350_4c54 << 32;

/// Deals out the samples, shuffled anew in every epoch.
///
/// A step is `grad_accum` micro-batches of `micro_batch` samples; the last step of an epoch takes what is left, so each
/// sample is seen once an epoch. Everything follows from the seed and the number of the step, so a resumed run goes on
/// exactly where it stopped.
#[derive(Debug)]
pub struct Loader {
    samples: usize,
    micro_batch: usize,
    grad_accum: usize,
    seed: u64,
    shuffle: bool,
    /// The order of the epoch last asked for.
    order: RefCell<Option<(u64, Vec<usize>)>>,
}

impl Loader {
    /// `samples`, `micro_batch` and `grad_accum` are taken as at least 1 sample each where they are 0; an empty data
    /// set is refused when it is read.
    pub fn new(samples: usize, micro_batch: usize, grad_accum: usize, seed: u64) -> Self {
        Self {
            samples,
            micro_batch: micro_batch.max(1),
            grad_accum: grad_accum.max(1),
            seed,
            shuffle: true,
            order: RefCell::new(None),
        }
    }

    /// The samples in the order of the file, in every epoch.
    pub fn sequential(self) -> Self {
        Self {
            shuffle: false,
            ..self
        }
    }

    /// Optimizer steps in an epoch, the last of which may be smaller.
    pub fn steps_per_epoch(&self) -> u64 {
        self.samples
            .div_ceil(self.micro_batch.saturating_mul(self.grad_accum))
            .max(1) as u64
    }

    /// The epoch of step `step`, both counted from 0.
    pub fn epoch(&self, step: u64) -> u64 {
        step / self.steps_per_epoch()
    }

    /// The samples of every micro-batch of step `step`, counted from 0 over all epochs.
    pub fn step(&self, step: u64) -> Vec<Vec<usize>> {
        let (epoch, within) = (self.epoch(step), step % self.steps_per_epoch());
        let mut cached = self.order.borrow_mut();
        let order = match cached.take() {
            Some((of, order)) if of == epoch => order,
            _ if self.shuffle => {
                Stream::new(self.seed, SHUFFLE.wrapping_add(epoch)).permutation(self.samples)
            }
            _ => (0..self.samples).collect(),
        };
        let size = self.micro_batch.saturating_mul(self.grad_accum);
        let from = (within as usize).saturating_mul(size).min(self.samples);
        let to = from.saturating_add(size).min(self.samples);
        let step = order[from..to]
            .chunks(self.micro_batch)
            .map(<[usize]>::to_vec)
            .collect();
        *cached = Some((epoch, order));
        step
    }
}

/// How much is held back for validation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Validation {
    /// So many samples.
    Count(usize),
    /// This part of the samples, rounded, but at least one.
    Ratio(f64),
}

/// Splits `samples` indices into training and validation, both in ascending order; which ones depends on the seed.
///
/// # Errors
/// Nothing left to train on; a ratio that is none.
pub fn split(samples: usize, validation: Validation, seed: u64) -> Result<(Vec<usize>, Vec<usize>)> {
    let count = match validation {
        Validation::Count(count) => count,
        Validation::Ratio(0.0) => 0,
        Validation::Ratio(ratio) if ratio > 0.0 && ratio < 1.0 => {
            ((samples as f64 * ratio).round() as usize).max(1)
        }
        Validation::Ratio(ratio) => {
            return Err(Error::Usage(format!(
                "validation ratio {ratio}, expected at least 0 and less than 1"
            )));
        }
    };
    if count >= samples {
        return Err(Error::input(
            "validation split",
            format!("{count} of {samples} samples held back"),
            "some left to train on",
            "hold back fewer, or give more data",
        ));
    }
    let mut order = Stream::new(seed, SPLIT).permutation(samples);
    let mut held_back = order.split_off(samples - count);
    order.sort_unstable();
    held_back.sort_unstable();
    Ok((order, held_back))
}
