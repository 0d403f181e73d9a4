//! Launches of `cuda/optim.cu`: all parameters in one launch, by tables of chunks that lie in scratch memory.

use super::sys::{
    Adamw, AdamwChunk, CountNonFinite, FloatChunk, GLM_CHUNK, GLM_NON_FINITE_BLOCKS, GLM_OPTIM_THREADS,
    NonFinite, SumOfSquares, SumPartials, ZeroChunks,
};
use super::{Grid, SCRATCH, blocks, check_scratch, device, launch, launch_named, ordinal};
use crate::error::Result;
use crate::tensor::Tensor;

pub(crate) use super::sys::AdamwFactors;

/// What an AdamW step does to one parameter; all F32.
#[derive(Debug)]
pub struct AdamwSlot<'a> {
    /// The parameter.
    pub p: &'a mut Tensor,
    /// Its gradient.
    pub g: &'a Tensor,
    /// Its first moment.
    pub m: &'a mut Tensor,
    /// Its second moment.
    pub v: &'a mut Tensor,
    /// Does weight decay apply to it?
    pub decayed: bool,
}

fn grid(blocks: u32, shared_bytes: usize) -> Grid {
    Grid {
        blocks: [blocks, 1, 1],
        threads: GLM_OPTIM_THREADS,
        shared_bytes: shared_bytes as u32,
    }
}

/// `(first element, elements)` of the chunks of `n` elements.
fn chunks(n: usize) -> impl Iterator<Item = (usize, u32)> {
    let most = GLM_CHUNK as usize;
    (0..n)
        .step_by(most)
        .map(move |first| (first, (n - first).min(most) as u32))
}

/// The bytes of a table, as the device reads them.
fn bytes_of<T: Copy>(table: &[T]) -> &[u8] {
    // SAFETY: the structs of kernels.h are plain C without padding, so every byte is initialised.
    unsafe { std::slice::from_raw_parts(table.as_ptr().cast(), size_of_val(table)) }
}

/// As [`crate::ops::adamw_all`], of slots on device `ordinal`.
pub(crate) fn adamw(
    ordinal: u8,
    slots: &mut [AdamwSlot<'_>],
    decay: f32,
    factors: AdamwFactors,
) -> Result<()> {
    let mut table = Vec::new();
    for slot in slots {
        let p: *mut f32 = slot.p.device_ptr_mut().cast();
        let g: *const f32 = slot.g.device_ptr().cast();
        let m: *mut f32 = slot.m.device_ptr_mut().cast();
        let v: *mut f32 = slot.v.device_ptr_mut().cast();
        let decay = if slot.decayed { decay } else { 1.0 };
        table.extend(chunks(slot.g.elements()).map(|(first, n)| AdamwChunk {
            p: p.wrapping_add(first),
            g: g.wrapping_add(first),
            m: m.wrapping_add(first),
            v: v.wrapping_add(first),
            n,
            decay,
        }));
    }
    let scratch = device(ordinal)?.scratch()?;
    for table in table.chunks(SCRATCH / size_of::<AdamwChunk>()) {
        scratch.upload("adamw", 0, bytes_of(table))?;
        let params = Adamw {
            chunks: scratch.pointer().cast(),
            factors,
        };
        let grid = grid(blocks("adamw", table.len(), 1)?, 0);
        // SAFETY: ops has checked that the four tensors of a slot are on this device and of one length, which the chunks
        // do not leave.
        unsafe { launch_named(ordinal, "adamw", "adamw", grid, &params)? };
    }
    Ok(())
}

/// The chunks of one tensor.
fn float_chunks(x: *mut f32, n: usize) -> impl Iterator<Item = FloatChunk> {
    chunks(n).map(move |(first, n)| FloatChunk {
        x: x.wrapping_add(first),
        n,
        reserved: 0,
    })
}

/// As [`crate::ops::sum_of_squares_all`], of tensors on device `ordinal`.
pub(crate) fn sum_of_squares(ordinal: u8, tensors: &[&Tensor]) -> Result<f64> {
    let operation = "sum_of_squares";
    let table: Vec<FloatChunk> = tensors
        .iter()
        .flat_map(|x| float_chunks(x.device_ptr().cast_mut().cast(), x.elements()))
        .collect();
    // The table, the chunks' sums, their sum.
    let partials = size_of_val(table.as_slice());
    let total = partials + table.len() * size_of::<f64>();
    check_scratch(operation, total + size_of::<f64>())?;
    let scratch = device(ordinal)?.scratch()?;
    scratch.upload(operation, 0, bytes_of(&table))?;
    let base = scratch.pointer();
    let squares = SumOfSquares {
        partials: base.wrapping_byte_add(partials).cast(),
        chunks: base.cast(),
    };
    let sum = SumPartials {
        sum: base.wrapping_byte_add(total).cast(),
        partials: squares.partials,
        n: table.len() as u64,
    };
    let shared_bytes = GLM_OPTIM_THREADS as usize * size_of::<f64>();
    let chunks = grid(blocks(operation, table.len(), 1)?, shared_bytes);
    // SAFETY: ops has checked that the tensors are F32 and on this device; their chunks lie within them, and everything
    // else within the scratch memory.
    unsafe {
        launch_named(ordinal, operation, "sum_of_squares", chunks, &squares)?;
        launch_named(ordinal, operation, "sum_partials", grid(1, shared_bytes), &sum)?;
    }
    let mut bytes = [0; 8];
    scratch.download(operation, total, &mut bytes)?;
    Ok(f64::from_ne_bytes(bytes))
}

/// As [`crate::ops::zero_all`], of tensors on device `ordinal`.
pub(crate) fn zero(ordinal: u8, tensors: &mut [&mut Tensor]) -> Result<()> {
    let table: Vec<FloatChunk> = tensors
        .iter_mut()
        .flat_map(|x| float_chunks(x.device_ptr_mut().cast(), x.elements()))
        .collect();
    let scratch = device(ordinal)?.scratch()?;
    for table in table.chunks(SCRATCH / size_of::<FloatChunk>()) {
        scratch.upload("zero_chunks", 0, bytes_of(table))?;
        let params = ZeroChunks {
            chunks: scratch.pointer().cast(),
        };
        let grid = grid(blocks("zero_chunks", table.len(), 1)?, 0);
        // SAFETY: ops has checked that the tensors are F32 and on this device; their chunks lie within them.
        unsafe { launch_named(ordinal, "zero_chunks", "zero_chunks", grid, &params)? };
    }
    Ok(())
}

/// As [`crate::ops::non_finite`].
pub(crate) fn non_finite(x: &Tensor) -> Result<Option<(usize, usize)>> {
    let operation = "count_non_finite";
    let scratch = device(ordinal(x))?.scratch()?;
    let params = CountNonFinite {
        found: scratch.pointer().cast(),
        x: x.device_ptr(),
        n: x.elements() as u64,
    };
    let shared_bytes = GLM_OPTIM_THREADS as usize * size_of::<NonFinite>();
    // SAFETY: x has n elements; the scratch memory holds what every block finds.
    unsafe {
        launch(
            ordinal(x),
            operation,
            x.dtype(),
            grid(GLM_NON_FINITE_BLOCKS, shared_bytes),
            &params,
        )?;
    }
    // (first, count) of every part, in order.
    let mut found = [[0u64; 2]; GLM_NON_FINITE_BLOCKS as usize];
    scratch.download(operation, 0, bytemuck::cast_slice_mut(&mut found))?;
    let first = found.iter().find(|[_, count]| *count > 0);
    let count: u64 = found.iter().map(|[_, count]| count).sum();
    Ok(first.map(|[first, _]| (*first as usize, count as usize)))
}
