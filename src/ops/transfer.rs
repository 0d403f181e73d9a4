//! Copies between host and device that run beside the kernels.
//!
//! A copy starts after everything that was asked of the device before it, and the program goes on at once. Order is kept by the
//! two tensors: whoever touches one of them next waits by itself for as much as it must, a kernel on the device, the program
//! where it reads or writes the host tensor's elements, and whoever drops either of them.
//!
//! | while the copy is under way | may be read | may be written |
//! |---|---|---|
//! | its source | at once | when it is over |
//! | its destination | when it is over | when it is over |
//!
//! So a copy costs time only to those who need its result too early; the art is to ask for it early. Copies of one direction
//! follow each other; the two directions do not wait for each other, unless a tensor is part of both.

use std::ops::Range;

use super::mismatch;
use crate::error::Result;
use crate::tensor::{Device, Tensor};

/// `to = from`, from host memory to a device. Out of page-locked memory ([`Tensor::zeros_pinned`]) the copy runs by itself;
/// out of other memory it goes through buffers in between, and the call returns when `from` has been read. On the CPU a plain
/// copy.
///
/// # Errors
/// Types or numbers of elements differ, `from` is not on the host, or the copy cannot be asked for. That it failed later is
/// said by the next call that waits for it.
pub fn fetch(from: &Tensor, to: &mut Tensor) -> Result<()> {
    check("fetch", from, to)?;
    fetch_range(from, 0..from.elements(), to, 0)
}

/// [`fetch`] of a range: `to[at..] = from[range]`.
///
/// # Errors
/// As [`fetch`], and when a range lies outside its tensor.
pub fn fetch_range(from: &Tensor, range: Range<usize>, to: &mut Tensor, at: usize) -> Result<()> {
    check_ranges("fetch", from, &range, to, at)?;
    if from.device() != Device::Cpu {
        let found = format!("from on {}", from.device());
        return Err(mismatch("fetch", found, "from on the host"));
    }
    to.fetch_from(at, from, range)
}

/// `to = from`, from a device to page-locked host memory ([`Tensor::zeros_pinned`]). On the CPU a plain copy.
///
/// # Errors
/// Types or numbers of elements differ, `to` is not page-locked memory of `from`'s device, or the copy cannot be asked for.
/// That it failed later is said by the next call that waits for it.
pub fn store(from: &Tensor, to: &mut Tensor) -> Result<()> {
    check("store", from, to)?;
    store_range(from, 0..from.elements(), to, 0)
}

/// [`store`] of a range: `to[at..] = from[range]`.
///
/// # Errors
/// As [`store`], and when a range lies outside its tensor.
pub fn store_range(from: &Tensor, range: Range<usize>, to: &mut Tensor, at: usize) -> Result<()> {
    check_ranges("store", from, &range, to, at)?;
    if to.device() != Device::Cpu {
        let found = format!("to on {}", to.device());
        return Err(mismatch("store", found, "to on the host"));
    }
    from.store_to(range, to, at)
}

fn check_ranges(
    operation: &'static str,
    from: &Tensor,
    range: &Range<usize>,
    to: &Tensor,
    at: usize,
) -> Result<()> {
    let within = |end: Option<usize>, tensor: &Tensor| end.is_some_and(|end| end <= tensor.elements());
    if from.dtype() == to.dtype()
        && range.start <= range.end
        && within(Some(range.end), from)
        && within(at.checked_add(range.len()), to)
    {
        return Ok(());
    }
    Err(mismatch(
        operation,
        format!("{range:?} of from {from:?}"),
        format!("as many elements of the same type from {at} of to {to:?}"),
    ))
}

fn check(operation: &'static str, from: &Tensor, to: &Tensor) -> Result<()> {
    if from.dtype() == to.dtype() && from.elements() == to.elements() {
        return Ok(());
    }
    Err(mismatch(
        operation,
        format!("from {from:?}"),
        format!("as many elements of the same type as to {to:?}"),
    ))
}
