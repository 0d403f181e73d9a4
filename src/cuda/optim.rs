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

/// A range of a parameter, and where in the state tensors of its slot its state lies.
#[derive(Debug)]
pub struct Span<'a> {
    /// The parameter, F32.
    pub p: &'a mut Tensor,
    /// Its gradient, F32.
    pub g: &'a Tensor,
    /// The first element in `p`.
    pub p_at: usize,
    /// The first element in `g`.
    pub g_at: usize,
    /// The first element in the state.
    pub state_at: usize,
    /// How many elements there are.
    pub len: usize,
    /// The learning rate; in AdamW `lr / (1 - beta1^t)`.
    pub rate: f32,
    /// `1 - lr * weight_decay`, or 1 for a parameter that is not decayed; in SGD the share of the parameter that is added
    /// to its gradient.
    pub decay: f32,
}

impl<'a> Span<'a> {
    /// All of a parameter, whose state is all that there is.
    pub fn whole(p: &'a mut Tensor, g: &'a Tensor, rate: f32, decay: f32) -> Self {
        let len = g.elements();
        Self {
            p,
            g,
            p_at: 0,
            g_at: 0,
            state_at: 0,
            len,
            rate,
            decay,
        }
    }
}

/// What an AdamW step does to the parameters that share two tensors of moments.
#[derive(Debug)]
pub struct AdamwSlot<'a> {
    /// First moments, F32.
    pub m: &'a mut Tensor,
    /// Second moments, F32.
    pub v: &'a mut Tensor,
    /// The parameters.
    pub spans: Vec<Span<'a>>,
}

/// What an AdamW step with moments in 8 bits does to the parameters that share their tensors. Ranges of the state and of
/// the gradients begin at blocks of 256.
#[derive(Debug)]
pub struct Adamw8bitSlot<'a> {
    /// First moments in codes of the signed map, U8.
    pub m: &'a mut Tensor,
    /// Second moments in codes of the unsigned map, U8.
    pub v: &'a mut Tensor,
    /// The scale of every 256 first moments, F32 `[ceil(n / 256)]`.
    pub m_absmax: &'a mut Tensor,
    /// The scale of every 256 second moments, F32 `[ceil(n / 256)]`.
    pub v_absmax: &'a mut Tensor,
    /// The parameters.
    pub spans: Vec<Span<'a>>,
}

/// What a step of stochastic gradient descent does to the parameters that share a tensor of momentum.
#[derive(Debug)]
pub struct SgdSlot<'a> {
    /// Momentum, F32, if there is any.
    pub m: Option<&'a mut Tensor>,
    /// The parameters.
    pub spans: Vec<Span<'a>>,
}

/// What a Lion step does to the parameters that share a tensor of momentum.
#[derive(Debug)]
pub struct LionSlot<'a> {
    /// Momentum, F32.
    pub m: &'a mut Tensor,
    /// The parameters.
    pub spans: Vec<Span<'a>>,
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

/// The chunks of a span: where they begin in it, their elements, their parameter and their gradient.
fn span_chunks(span: &mut Span<'_>) -> impl Iterator<Item = (usize, u32, *mut f32, *const f32)> + use<> {
    let p = float(span.p).wrapping_add(span.p_at);
    let g = span.g.device_ptr().cast::<f32>().wrapping_add(span.g_at);
    chunks(span.len).map(move |(first, n)| (first, n, p.wrapping_add(first), g.wrapping_add(first)))
}

/// As [`crate::ops::adamw`], of slots on device `ordinal`.
pub(crate) fn adamw(ordinal: u8, slots: &mut [AdamwSlot<'_>], factors: AdamwFactors) -> Result<()> {
    let mut table = Vec::new();
    for slot in slots {
        let [m, v] = [&mut *slot.m, &mut *slot.v].map(float);
        for span in &mut slot.spans {
            let (at, decay, step_size) = (span.state_at, span.decay, span.rate);
            table.extend(span_chunks(span).map(|(first, n, p, g)| AdamwChunk {
                p,
                g,
                m: m.wrapping_add(at + first),
                v: v.wrapping_add(at + first),
                n,
                decay,
                step_size,
                reserved: 0,
            }));
        }
    }
    let params = |_, chunks| Adamw { chunks, factors };
    // SAFETY: ops has checked that the tensors of a slot are on this device and that its spans lie within them, which the
    // chunks do not leave.
    unsafe { launch_chunks(ordinal, "adamw", &table, (&[], 0), params) }
}

/// As [`crate::ops::adamw_8bit`], of slots on device `ordinal`.
pub(crate) fn adamw_8bit(
    ordinal: u8,
    slots: &mut [Adamw8bitSlot<'_>],
    maps: &Maps8bit,
    factors: AdamwFactors,
) -> Result<()> {
    const BLOCK: usize = GLM_BLOCK_8BIT as usize;
    let mut table = Vec::new();
    for slot in slots {
        let [m, v] = [&mut *slot.m, &mut *slot.v].map(|x| x.device_ptr_mut().cast::<u8>());
        let [m_absmax, v_absmax] = [&mut *slot.m_absmax, &mut *slot.v_absmax].map(float);
        for span in &mut slot.spans {
            let (at, decay, step_size) = (span.state_at, span.decay, span.rate);
            table.extend(span_chunks(span).map(|(first, n, p, g)| Adamw8bitChunk {
                p,
                g,
                m: m.wrapping_add(at + first),
                v: v.wrapping_add(at + first),
                m_absmax: m_absmax.wrapping_add((at + first) / BLOCK),
                v_absmax: v_absmax.wrapping_add((at + first) / BLOCK),
                n,
                decay,
                step_size,
                reserved: 0,
            }));
        }
    }
    let maps = bytes_of(std::slice::from_ref(maps));
    let params = |base: *const std::ffi::c_void, chunks| Adamw8bit {
        chunks,
        maps: base.cast(),
        factors,
    };
    // SAFETY: ops has checked that the tensors of a slot are on this device, that its spans lie within them and begin at
    // blocks, and that there is a scale for each block; chunks begin at blocks and do not leave their spans. The maps lie
    // where the scratch memory begins.
    unsafe { launch_chunks(ordinal, "adamw_8bit", &table, (maps, maps.len()), params) }
}

/// As [`crate::ops::sgd`], of slots on device `ordinal`.
pub(crate) fn sgd(ordinal: u8, slots: &mut [SgdSlot<'_>], clip: f32, momentum: f32) -> Result<()> {
    let mut table = Vec::new();
    for slot in slots {
        let m = slot.m.as_deref_mut().map_or(std::ptr::null_mut(), float);
        for span in &mut slot.spans {
            table.extend(momentum_chunks(span, m));
        }
    }
    let params = |_, chunks| Sgd {
        chunks,
        clip,
        momentum,
    };
    // SAFETY: ops has checked that the tensors of a slot are on this device and that its spans lie within them, which the
    // chunks do not leave; a chunk without momentum has a null pointer, as the kernel allows.
    unsafe { launch_chunks(ordinal, "sgd", &table, (&[], 0), params) }
}

/// As [`crate::ops::lion`], of slots on device `ordinal`.
pub(crate) fn lion(ordinal: u8, slots: &mut [LionSlot<'_>], factors: LionFactors) -> Result<()> {
    let mut table = Vec::new();
    for slot in slots {
        let m = float(slot.m);
        for span in &mut slot.spans {
            table.extend(momentum_chunks(span, m));
        }
    }
    let params = |_, chunks| Lion { chunks, factors };
    // SAFETY: ops has checked that the tensors of a slot are on this device and that its spans lie within them, which the
    // chunks do not leave.
    unsafe { launch_chunks(ordinal, "lion", &table, (&[], 0), params) }
}

/// The chunks of a span with one moment, which may be null.
fn momentum_chunks(span: &mut Span<'_>, m: *mut f32) -> impl Iterator<Item = MomentumChunk> + use<> {
    let (at, rate, decay) = (span.state_at, span.rate, span.decay);
    span_chunks(span).map(move |(first, n, p, g)| MomentumChunk {
        p,
        g,
        m: if m.is_null() {
            m
        } else {
            m.wrapping_add(at + first)
        },
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
