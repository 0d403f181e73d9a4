//! Weight matrices in the form they are stored in, decoded tile by tile inside the products that read them.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::real::Real;

/// How many elements share one scale in 4-bit weights.
const BLOCK: usize = crate::quant::BLOCK;

/// Scales of 4-bit blocks.
#[derive(Clone, Copy)]
pub enum BlockScales<'a> {
    /// One f32 a block.
    Flat(&'a [f32]),
    /// `code[codes[b]] * nested[b / 256] + offset` for block `b` (double quantisation).
    Nested {
        /// One byte a block.
        codes: &'a [u8],
        /// The 256 values of the 8-bit map.
        code: &'a [f32],
        /// One f32 for every 256 blocks.
        nested: &'a [f32],
        /// Mean of the block maxima.
        offset: f32,
    },
}

impl BlockScales<'_> {
    #[inline(always)]
    fn get(&self, block: usize) -> f32 {
        match self {
            BlockScales::Flat(absmax) => absmax[block],
            BlockScales::Nested {
                codes,
                code,
                nested,
                offset,
            } => code[codes[block] as usize] * nested[block / crate::quant::NESTED_BLOCK] + offset,
        }
    }
}

/// A 4-bit matrix: element `e` of the row-major flattened weight is `table[nibble(e)] * scale(e / 64)`, even `e` in the
/// high nibble.
#[derive(Clone, Copy)]
pub struct Codes4<'a> {
    /// Two elements a byte.
    pub codes: &'a [u8],
    /// One scale every 64 elements.
    pub scales: BlockScales<'a>,
    /// The 16 values of the code.
    pub table: &'static [f32; 16],
}

/// An 8-bit matrix: element (i, k) is `codes[i, k] * scales[i]`, rounded to f32.
#[derive(Clone, Copy)]
pub struct Codes8<'a> {
    /// One element a byte.
    pub codes: &'a [i8],
    /// One scale a row.
    pub scales: &'a [f32],
}

/// The elements of a weight matrix, row-major.
#[derive(Clone, Copy)]
pub enum Elements<'a, T> {
    /// Already in the compute type.
    Own(&'a [T]),
    /// 32-bit floats under another compute type.
    F32(&'a [f32]),
    /// Half floats.
    F16(&'a [f16]),
    /// bfloat16.
    BF16(&'a [bf16]),
    /// 4-bit codes.
    Codes4(Codes4<'a>),
    /// 8-bit codes.
    Codes8(Codes8<'a>),
}

/// A weight matrix `[rows, columns]` = `[out_features, in_features]`.
#[derive(Clone, Copy)]
pub struct Weight<'a, T> {
    /// The stored elements.
    pub elements: Elements<'a, T>,
    /// Output features N.
    pub rows: usize,
    /// Input features K.
    pub columns: usize,
}

impl<T: Real> Weight<'_, T> {
    /// Decodes `rows x columns` into the row-major `out`.
    pub fn decode(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [T]) {
        let width = columns.len();
        for (row, out) in rows.zip(out.chunks_exact_mut(width.max(1))) {
            let at = row * self.columns + columns.start;
            match self.elements {
                Elements::Own(w) => copy(&w[at..at + width], out),
                Elements::F32(w) => convert(&w[at..at + width], out, |x| x),
                Elements::F16(w) => half_to(&w[at..at + width], out),
                Elements::BF16(w) => convert(&w[at..at + width], out, bf16::to_f32),
                Elements::Codes4(w) => w.decode(at, out),
                Elements::Codes8(w) => {
                    let scale = w.scales[row];
                    super::real::vectorized(
                        #[inline(always)]
                        || convert(&w.codes[at..at + width], out, |code| f32::from(code) * scale),
                    );
                }
            }
        }
    }
}

/// Copies by the cache line: pieces are short, and a call to `memmove` for each would take as long as the copy.
#[inline(always)]
fn copy<T: Copy>(from: &[T], to: &mut [T]) {
    let (from, from_rest) = from.as_chunks::<16>();
    let (to, to_rest) = to.as_chunks_mut::<16>();
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from;
    }
    to_rest.copy_from_slice(from_rest);
}

#[inline(always)]
fn convert<S: Copy, T: Real>(from: &[S], to: &mut [T], f: impl Fn(S) -> f32) {
    for (to, &from) in to.iter_mut().zip(from) {
        *to = T::of_f32(f(from));
    }
}

/// f16 to the compute type, with the conversion instruction of the processor where there is one.
fn half_to<T: Real>(from: &[f16], to: &mut [T]) {
    if T::DTYPE == crate::tensor::DType::F32
        && let Ok(to) = bytemuck::try_cast_slice_mut::<T, f32>(to)
    {
        #[cfg(target_arch = "x86_64")]
        if let Some(simd) = pulp::x86::V4::try_new() {
            return simd.vectorize(
                #[inline(always)]
                || {
                    let (from, from_rest) = from.as_chunks::<16>();
                    let (to, to_rest) = to.as_chunks_mut::<16>();
                    for (to, from) in to.iter_mut().zip(from) {
                        *to = pulp::cast(simd.avx512f._mm512_cvtph_ps(pulp::cast(*from)));
                    }
                    from_rest.convert_to_f32_slice(to_rest);
                },
            );
        }
        return from.convert_to_f32_slice(to);
    }
    convert(from, to, f16::to_f32);
}

impl Codes4<'_> {
    /// Elements `at..at + out.len()` of the flattened weight.
    fn decode<T: Real>(&self, at: usize, out: &mut [T]) {
        let whole = if at.is_multiple_of(BLOCK) {
            out.len() / BLOCK * BLOCK
        } else {
            0
        };
        let (blocks, rest) = out.split_at_mut(whole);
        if whole > 0 {
            self.decode_blocks(at / BLOCK, blocks);
        }
        for (i, out) in rest.iter_mut().enumerate() {
            let e = at + whole + i;
            let byte = self.codes[e / 2];
            let nibble = if e.is_multiple_of(2) { byte >> 4 } else { byte & 15 };
            *out = T::of_f32(self.table[nibble as usize] * self.scales.get(e / BLOCK));
        }
    }

    /// Whole blocks from number `first` on.
    fn decode_blocks<T: Real>(&self, first: usize, out: &mut [T]) {
        #[cfg(target_arch = "x86_64")]
        if T::DTYPE == crate::tensor::DType::F32
            && let Ok(out) = bytemuck::try_cast_slice_mut::<T, f32>(out)
            && let Some(simd) = pulp::x86::V4::try_new()
        {
            return self.decode_blocks_v4(simd, first, out);
        }
        super::real::vectorized(
            #[inline(always)]
            || {
                for (scale, out, codes) in self.blocks_mut(first, out) {
                    for (pair, &byte) in out.chunks_exact_mut(2).zip(codes) {
                        pair[0] = T::of_f32(self.table[(byte >> 4) as usize] * scale);
                        pair[1] = T::of_f32(self.table[(byte & 15) as usize] * scale);
                    }
                }
            },
        );
    }

    /// [`Self::decode_blocks`] with the whole table in one register.
    #[cfg(target_arch = "x86_64")]
    fn decode_blocks_v4(&self, simd: pulp::x86::V4, first: usize, out: &mut [f32]) {
        simd.vectorize(
            #[inline(always)]
            || {
                let table = pulp::cast(*self.table);
                for (scale, out, codes) in self.blocks_mut(first, out) {
                    let scale = simd.avx512f._mm512_set1_ps(scale);
                    let (out, _) = out.as_chunks_mut::<16>();
                    let (codes, _) = codes.as_chunks::<8>();
                    for (out, codes) in out.iter_mut().zip(codes) {
                        let indices = spread(simd, u64::from_le_bytes(*codes));
                        let values = simd.avx512f._mm512_permutexvar_ps(indices, table);
                        *out = pulp::cast(simd.avx512f._mm512_mul_ps(values, scale));
                    }
                }
            },
        );
    }

    /// Scale, output and codes of each whole block from number `first` on.
    #[inline(always)]
    fn blocks_mut<'b, T>(
        &'b self,
        first: usize,
        out: &'b mut [T],
    ) -> impl Iterator<Item = (f32, &'b mut [T], &'b [u8])> {
        let codes = self.codes[first * BLOCK / 2..].chunks_exact(BLOCK / 2);
        let blocks = out.chunks_exact_mut(BLOCK).zip(codes).enumerate();
        blocks.map(move |(i, (out, codes))| (self.scales.get(first + i), out, codes))
    }

    /// [`Self::blocks_mut`] to read beside the elements of another vector.
    #[inline(always)]
    pub(super) fn blocks<'b>(
        &'b self,
        first: usize,
        x: &'b [f32],
    ) -> impl Iterator<Item = (f32, &'b [f32; BLOCK], &'b [u8; BLOCK / 2])> {
        let (codes, _) = self.codes[first * BLOCK / 2..].as_chunks();
        let (x, _) = x.as_chunks();
        let blocks = x.iter().zip(codes).enumerate();
        blocks.map(move |(i, (x, codes))| (self.scales.get(first + i), x, codes))
    }
}

/// Sixteen nibbles of `word` as sixteen 32-bit indices: the high nibble of byte 0, its low nibble, byte 1, ...
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn spread(simd: pulp::x86::V4, word: u64) -> std::arch::x86_64::__m512i {
    const SHIFTS: [u32; 16] = [4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24];
    let (low, high) = (word as u32, (word >> 32) as u32);
    let halves: [u32; 16] = [
        low, low, low, low, low, low, low, low, high, high, high, high, high, high, high, high,
    ];
    // Of each index the shuffle of the table reads the lowest four bits.
    simd.avx512f
        ._mm512_srlv_epi32(pulp::cast(halves), pulp::cast(SHIFTS))
}
