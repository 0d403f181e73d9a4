//! 4-bit quantisation in blocks of 64: the loops over elements.
//!
//! The arithmetic is bitsandbytes' CPU back end to the bit: a full block is multiplied by the reciprocal of its
//! largest magnitude, the tail block divided by it; magnitudes below 1e-38 count as 1e-38 there.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::BLOCK;
use super::code::Ranks;
use crate::tensor::Element;

/// Blocks handled by one task: 64 Ki elements, small enough to balance two threads, large enough to hide the hand-over.
const TASK: usize = 1024;
/// What bitsandbytes divides by in place of a smaller magnitude.
const SMALLEST: f32 = 1e-38;

/// An element type that weights are stored in.
pub(super) trait Stored: Element {
    /// `out[i] = source[i]`, exactly.
    fn widen(source: &[Self], out: &mut [f32]);
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(source: &[f32], out: &mut [f32]) {
        out.copy_from_slice(source);
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn widen(source: &[f16], out: &mut [f32]) {
        source.convert_to_f32_slice(out);
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(source: &[bf16], out: &mut [f32]) {
        for (o, x) in out.iter_mut().zip(source) {
            *o = f32::from_bits(u32::from(x.to_bits()) << 16);
        }
    }
}

/// Quantises `source`: `codes` gets two nibbles a byte (the even element in the high one), `absmax` the largest
/// magnitude of each block of 64. A block with NaN or infinity gets an absmax that is not finite and codes that mean
/// nothing. Both outputs are written whole.
pub(super) fn quantize<T: Stored>(source: &[T], ranks: &Ranks, codes: &mut [u8], absmax: &mut [f32]) {
    assert_eq!(codes.len(), source.len().div_ceil(2));
    assert_eq!(absmax.len(), source.len().div_ceil(BLOCK));
    let arch = pulp::Arch::new();
    source
        .par_chunks(TASK * BLOCK)
        .zip(codes.par_chunks_mut(TASK * BLOCK / 2))
        .zip(absmax.par_chunks_mut(TASK))
        .for_each(|((source, codes), absmax)| {
            arch.dispatch(Task {
                source,
                ranks,
                codes,
                absmax,
            })
        });
}

/// Some blocks for one thread, in the widest vectors of the machine.
struct Task<'a, T> {
    source: &'a [T],
    ranks: &'a Ranks,
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
}

impl<T: Stored> WithSimd for Task<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        quantize_blocks(simd, self.source, self.ranks, self.codes, self.absmax);
    }
}

#[inline(always)]
fn quantize_blocks<S: Simd, T: Stored>(
    simd: S,
    source: &[T],
    ranks: &Ranks,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    let midpoints = ranks.midpoints.map(|m| simd.splat_f32s(m));
    for ((source, codes), absmax) in source.chunks(BLOCK).zip(codes.chunks_mut(BLOCK / 2)).zip(absmax) {
        let mut x = [0f32; BLOCK];
        T::widen(source, &mut x[..source.len()]);
        let largest = largest_magnitude(&x);
        if source.len() == BLOCK {
            let reciprocal = 1.0 / largest.max(SMALLEST);
            x.iter_mut().for_each(|x| *x *= reciprocal);
            *absmax = largest;
        } else {
            // NaN must survive into absmax: f32::max would drop it.
            let divisor = if largest < SMALLEST { SMALLEST } else { largest };
            x.iter_mut().for_each(|x| *x /= divisor);
            *absmax = divisor;
        }
        let rank = ranks_of(simd, &x, &midpoints);
        for (byte, pair) in codes.iter_mut().zip(rank.chunks_exact(2)) {
            *byte = ranks.order[pair[0] as usize & 15] << 4 | ranks.order[pair[1] as usize & 15];
        }
    }
}

/// The largest |x|; compared as integers, so NaN counts as larger than infinity and is never lost.
#[inline(always)]
fn largest_magnitude(x: &[f32; BLOCK]) -> f32 {
    let mut lanes = [0i32; 16];
    for chunk in x.chunks_exact(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = (*lane).max((x.to_bits() & 0x7fff_ffff) as i32);
        }
    }
    f32::from_bits(lanes.into_iter().max().unwrap_or(0) as u32)
}

/// For each value the number of midpoints below it.
#[inline(always)]
fn ranks_of<S: Simd>(simd: S, x: &[f32; BLOCK], midpoints: &[S::f32s; 15]) -> [u32; BLOCK] {
    let mut rank = [0u32; BLOCK];
    let (zero, one) = (simd.splat_u32s(0), simd.splat_u32s(1));
    // 64 is a multiple of every vector's lanes: nothing is left over.
    for (x, rank) in S::as_simd_f32s(x).0.iter().zip(S::as_mut_simd_u32s(&mut rank).0) {
        let mut below = zero;
        for m in midpoints {
            below = simd.add_u32s(below, simd.select_u32s(simd.less_than_f32s(*m, *x), one, zero));
        }
        *rank = below;
    }
    rank
}

/// `out[i] = table[code[i]] * absmax[i / 64]`; writes every element of `out`.
pub(super) fn dequantize(codes: &[u8], absmax: &[f32], table: &[f32; 16], out: &mut [f32]) {
    assert_eq!(codes.len(), out.len().div_ceil(2));
    assert_eq!(absmax.len(), out.len().div_ceil(BLOCK));
    out.par_chunks_mut(TASK * BLOCK)
        .zip(codes.par_chunks(TASK * BLOCK / 2))
        .zip(absmax.par_chunks(TASK))
        .for_each(|((out, codes), absmax)| {
            for ((out, codes), scale) in out.chunks_mut(BLOCK).zip(codes.chunks(BLOCK / 2)).zip(absmax) {
                for (pair, byte) in out.chunks_mut(2).zip(codes) {
                    pair[0] = table[usize::from(byte >> 4)] * scale;
                    if let Some(odd) = pair.get_mut(1) {
                        *odd = table[usize::from(byte & 15)] * scale;
                    }
                }
            }
        });
}
