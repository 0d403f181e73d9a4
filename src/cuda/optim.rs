//! Launches of `cuda/optim.cu` and `cuda/optim_8bit.cu`: all parameters in one launch, by tables of chunks that lie in
//! scratch memory.

use super::sys::{
    Adamw, Adamw8bit, Adamw8bitChunk, AdamwChunk, CountNonFinite, FloatChunk, GLM_BLOCK_8BIT, GLM_CHUNK,
    GLM_NON_FINITE_BLOCKS, GLM_OPTIM_THREADS, Lion, MomentumChunk, NonFinite, Sgd, SumOfSquares, ZeroChunks,
};
use super::{Grid, SCRATCH, blocks, check_scratch, device, launch, launch_named, ordinal};
use crate::error::Result;
use crate::tensor::Tensor;

pub(crate) use super::sys::{AdamwFactors, LionFactors, Maps8bit};

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
    /// `1 - lr * weight_decay`, or 1 for a parameter that is not decayed.
    pub decay: f32,
    /// `lr / (1 - beta1^t)`.
    pub step_size: f32,
}

/// What an AdamW step with moments in 8 bits does to one parameter.
#[derive(Debug)]
pub struct Adamw8bitSlot<'a> {
    /// The parameter, F32.
    pub p: &'a mut Tensor,
    /// Its gradient, F32.
    pub g: &'a Tensor,
    /// Its first moment in codes of the signed map, U8.
    pub m: &'a mut Tensor,
    /// Its second moment in codes of the unsigned map, U8.
    pub v: &'a mut Tensor,
    /// The scale of every 256 first moments, F32 `[ceil(n / 256)]`.
    pub m_absmax: &'a mut Tensor,
    /// The scale of every 256 second moments, F32 `[ceil(n / 256)]`.
    pub v_absmax: &'a mut Tensor,
    /// `1 - lr * weight_decay`, or 1 for a parameter that is not decayed.
    pub decay: f32,
    /// `lr / (1 - beta1^t)`.
    pub step_size: f32,
}

/// What a step of stochastic gradient descent does to one parameter; all F32.
#[derive(Debug)]
pub struct SgdSlot<'a> {
    /// The parameter.
    pub p: &'a mut Tensor,
    /// Its gradient.
    pub g: &'a Tensor,
    /// Its momentum, if there is any.
    pub m: Option<&'a mut Tensor>,
    /// The learning rate.
    pub rate: f32,
    /// The share of the parameter that is added to its gradient.
    pub weight_decay: f32,
}

/// What a Lion step does to one parameter; all F32.
#[derive(Debug)]
pub struct LionSlot<'a> {
    /// The parameter.
    pub p: &'a mut Tensor,
    /// Its gradient.
    pub g: &'a Tensor,
    /// Its momentum.
    pub m: &'a mut Tensor,
    /// The learning rate.
    pub rate: f32,
    /// `1 - lr * weight_decay`, or 1 for a parameter that is not decayed.
    pub decay: f32,
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

fn float(x: &mut Tensor) -> *mut f32 {
    x.device_ptr_mut().cast()
}

/// Launches `kernel` over a table of chunks that lies `before` bytes into the scratch memory, in as many pieces as it takes;
/// `params` makes the kernel's parameters of the address of the scratch memory and of the table.
///
/// # Safety
/// Every pointer in the table and in what `params` makes is good for what the kernel does with it.
// SAFETY: as above.
unsafe fn launch_chunks<C: Copy, P: Copy>(
    ordinal: u8,
    kernel: &'static str,
    table: &[C],
    (before, shared_bytes): (&[u8], usize),
    params: impl Fn(*const std::ffi::c_void, *const C) -> P,
) -> Result<()> {
    let scratch = device(ordinal)?.scratch()?;
    for table in table.chunks((SCRATCH - before.len()) / size_of::<C>()) {
        if !before.is_empty() {
            scratch.upload(kernel, 0, before)?;
        }
        scratch.upload(kernel, before.len(), bytes_of(table))?;
        let base = scratch.pointer();
        let params = params(base, base.wrapping_byte_add(before.len()).cast());
        let grid = grid(blocks(kernel, table.len(), 1)?, shared_bytes);
        // SAFETY: the caller's promise; the table lies in the scratch memory.
        unsafe { launch_named(ordinal, kernel, kernel, grid, &params)? };
    }
    Ok(())
}

/// As [`crate::ops::adamw`], of slots on device `ordinal`.
pub(crate) fn adamw(ordinal: u8, slots: &mut [AdamwSlot<'_>], factors: AdamwFactors) -> Result<()> {
    let mut table = Vec::new();
    for slot in slots {
        let g: *const f32 = slot.g.device_ptr().cast();
        let [p, m, v] = [&mut *slot.p, &mut *slot.m, &mut *slot.v].map(float);
        table.extend(chunks(slot.g.elements()).map(|(first, n)| AdamwChunk {
            p: p.wrapping_add(first),
            g: g.wrapping_add(first),
            m: m.wrapping_add(first),
            v: v.wrapping_add(first),
            n,
            decay: slot.decay,
            step_size: slot.step_size,
            reserved: 0,
        }));
    }
    let params = |_, chunks| Adamw { chunks, factors };
    // SAFETY: ops has checked that the four tensors of a slot are on this device and of one length, which the chunks do
    // not leave.
    unsafe { launch_chunks(ordinal, "adamw", &table, (&[], 0), params) }
}

/// As [`crate::ops::adamw_8bit`], of slots on device `ordinal`.
pub(crate) fn adamw_8bit(
    ordinal: u8,
    slots: &mut [Adamw8bitSlot<'_>],
    maps: &Maps8bit,
    factors: AdamwFactors,
) -> Result<()> {
    let mut table = Vec::new();
    for slot in slots {
        let g: *const f32 = slot.g.device_ptr().cast();
        let [m, v] = [&mut *slot.m, &mut *slot.v].map(|x| x.device_ptr_mut().cast::<u8>());
        let [p, m_absmax, v_absmax] = [&mut *slot.p, &mut *slot.m_absmax, &mut *slot.v_absmax].map(float);
        table.extend(chunks(slot.g.elements()).map(|(first, n)| Adamw8bitChunk {
            p: p.wrapping_add(first),
            g: g.wrapping_add(first),
            m: m.wrapping_add(first),
            v: v.wrapping_add(first),
            m_absmax: m_absmax.wrapping_add(first / GLM_BLOCK_8BIT as usize),
            v_absmax: v_absmax.wrapping_add(first / GLM_BLOCK_8BIT as usize),
            n,
            decay: slot.decay,
            step_size: slot.step_size,
            reserved: 0,
        }));
    }
    let maps = bytes_of(std::slice::from_ref(maps));
    let params = |base: *const std::ffi::c_void, chunks| Adamw8bit {
        chunks,
        maps: base.cast(),
        factors,
    };
    // SAFETY: ops has checked that the tensors of a slot are on this device, of one length and with a scale for each block;
    // chunks begin at blocks and do not leave them. The maps lie where the scratch memory begins.
    unsafe { launch_chunks(ordinal, "adamw_8bit", &table, (maps, maps.len()), params) }
}

/// As [`crate::ops::sgd`], of slots on device `ordinal`.
pub(crate) fn sgd(ordinal: u8, slots: &mut [SgdSlot<'_>], clip: f32, momentum: f32) -> Result<()> {
    let mut table = Vec::new();
    for slot in slots {
        let m = slot.m.as_deref_mut().map_or(std::ptr::null_mut(), float);
        let (rate, decay) = (slot.rate, slot.weight_decay);
        table.extend(momentum_chunks(slot.p, slot.g, m, rate, decay));
    }
    let params = |_, chunks| Sgd {
        chunks,
        clip,
        momentum,
    };
    // SAFETY: ops has checked that the tensors of a slot are on this device and of one length, which the chunks do not
    // leave; a chunk without momentum has a null pointer, as the kernel allows.
    unsafe { launch_chunks(ordinal, "sgd", &table, (&[], 0), params) }
}

/// As [`crate::ops::lion`], of slots on device `ordinal`.
pub(crate) fn lion(ordinal: u8, slots: &mut [LionSlot<'_>], factors: LionFactors) -> Result<()> {
    let mut table = Vec::new();
    for slot in slots {
        let m = float(slot.m);
        table.extend(momentum_chunks(slot.p, slot.g, m, slot.rate, slot.decay));
    }
    let params = |_, chunks| Lion { chunks, factors };
    // SAFETY: ops has checked that the three tensors of a slot are on this device and of one length, which the chunks do
    // not leave.
    unsafe { launch_chunks(ordinal, "lion", &table, (&[], 0), params) }
}

/// The chunks of a parameter with one moment, which may be null.
fn momentum_chunks(
    p: &mut Tensor,
    g: &Tensor,
    m: *mut f32,
    rate: f32,
    decay: f32,
) -> impl Iterator<Item = MomentumChunk> {
    let p = float(p);
    let first_g: *const f32 = g.device_ptr().cast();
    chunks(g.elements()).map(move |(first, n)| MomentumChunk {
        p: p.wrapping_add(first),
        g: first_g.wrapping_add(first),
        m: if m.is_null() { m } else { m.wrapping_add(first) },
        n,
        rate,
        decay,
        reserved: 0,
    })
}

/// The chunks of one tensor.
fn float_chunks(x: *mut f32, n: usize) -> impl Iterator<Item = FloatChunk> {
    chunks(n).map(move |(first, n)| FloatChunk {
        x: x.wrapping_add(first),
        n,
        reserved: 0,
    })
}

/// As [`crate::ops::sums_of_squares`], of tensors on device `ordinal`.
pub(crate) fn sums_of_squares(ordinal: u8, tensors: &[&Tensor]) -> Result<Vec<f64>> {
    let operation = "sums_of_squares";
    let mut table = Vec::new();
    let counts: Vec<usize> = tensors
        .iter()
        .map(|x| {
            let before = table.len();
            table.extend(float_chunks(x.device_ptr().cast_mut().cast(), x.elements()));
            table.len() - before
        })
        .collect();
    // The table, then the chunks' sums.
    let at = size_of_val(table.as_slice());
    let mut partials = vec![0f64; table.len()];
    check_scratch(operation, at + size_of_val(partials.as_slice()))?;
    let scratch = device(ordinal)?.scratch()?;
    scratch.upload(operation, 0, bytes_of(&table))?;
    let base = scratch.pointer();
    let params = SumOfSquares {
        partials: base.wrapping_byte_add(at).cast(),
        chunks: base.cast(),
    };
    let shared_bytes = GLM_OPTIM_THREADS as usize * size_of::<f64>();
    let grid = grid(blocks(operation, table.len(), 1)?, shared_bytes);
    // SAFETY: ops has checked that the tensors are F32 and on this device; their chunks lie within them, and everything
    // else within the scratch memory.
    unsafe { launch_named(ordinal, operation, "sum_of_squares", grid, &params)? };
    scratch.download(operation, at, bytemuck::cast_slice_mut(&mut partials))?;
    let mut partials = partials.into_iter();
    Ok(counts
        .into_iter()
        .map(|count| partials.by_ref().take(count).sum())
        .collect())
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
