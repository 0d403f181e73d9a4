//! GGML's block types, as chatglm.cpp's files hold them.
//!
//! A row is cut into blocks of 32 elements. `d` and `m` are float16, `q` are whole numbers, bytes are in this order:
//!
//! | type | bytes | block | value | largest error |
//! |---|---|---|---|---|
//! | `q4_0` | 18 | `d`; byte j: code j low, code j + 16 high | `(q - 8) d` | `d / 2`; `d` at the end away from the largest |
//! | `q4_1` | 20 | `d`, `m`; codes as `q4_0` | `q d + m` | `d / 2` |
//! | `q5_0` | 22 | `d`; u32 of fifth bits, bit j of code j; codes as `q4_0` | `(q - 16) d` | as `q4_0` |
//! | `q5_1` | 24 | `d`, `m`; fifth bits; codes | `q d + m` | `d / 2` |
//! | `q8_0` | 34 | `d`; 32 signed codes | `q d` | `d / 2` |
//!
//! The errors are before `d` and `m` are rounded to float16, which adds `2⁻¹¹` of the largest value. `q4_0` and `q5_0` give the
//! element of the largest magnitude the code 0 (so `d` has the other sign), `q4_1` and `q5_1` the smallest; `q8_0` has
//! `d = max|x| / 127`.
//!
//! Two programs quantise, and do not round alike: ggml's C code (`quantize_row_*_reference` in ggml-quants.c) multiplies by
//! `1 / d` in float32 and adds a half before it cuts off; `chatglm_cpp/convert.py`, which writes every file that users have
//! (chatglm.cpp itself only reads), divides by `d`, rounds halves to even, and computes in the type that torch holds the weight
//! in: float16 for ChatGLM-6B, so that each step is rounded to float16. This is `convert.py`'s arithmetic to the bit for float16
//! and float32 weights; bfloat16, which it never meets, is computed in float32. On normal weights the mean error of all three
//! is the same within 0.1 % (q4_0 0.0859 of the standard deviation, q8_0 0.0054). Decoding is ggml's `dequantize_row_*`.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::blockwise::Stored;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Elements of a block.
const BLOCK: usize = 32;
/// Blocks handled by one task.
const TASK: usize = 1024;

/// How a tensor of a GGML file is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum GgmlType {
    F32,
    F16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
}

impl GgmlType {
    /// Every type, the most exact first.
    pub const ALL: [GgmlType; 7] = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::Q8_0,
        GgmlType::Q5_1,
        GgmlType::Q5_0,
        GgmlType::Q4_1,
        GgmlType::Q4_0,
    ];

    /// GGML's name: `q4_0`.
    pub const fn name(self) -> &'static str {
        match self {
            GgmlType::F32 => "f32",
            GgmlType::F16 => "f16",
            GgmlType::Q4_0 => "q4_0",
            GgmlType::Q4_1 => "q4_1",
            GgmlType::Q5_0 => "q5_0",
            GgmlType::Q5_1 => "q5_1",
            GgmlType::Q8_0 => "q8_0",
        }
    }

    /// GGML's number, as files have it.
    pub const fn id(self) -> i32 {
        match self {
            GgmlType::F32 => 0,
            GgmlType::F16 => 1,
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q5_0 => 6,
            GgmlType::Q5_1 => 7,
            GgmlType::Q8_0 => 8,
        }
    }

    /// The type of this number.
    pub fn from_id(id: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.id() == id)
    }

    /// Elements that are stored together: 32, of floats 1.
    pub const fn block(self) -> usize {
        match self {
            GgmlType::F32 | GgmlType::F16 => 1,
            _ => BLOCK,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            GgmlType::F32 => 4,
            GgmlType::F16 => 2,
            GgmlType::Q4_0 => 18,
            GgmlType::Q4_1 => 20,
            GgmlType::Q5_0 => 22,
            GgmlType::Q5_1 => 24,
            GgmlType::Q8_0 => 34,
        }
    }

    /// Bytes of so many elements, a multiple of [`GgmlType::block`].
    pub const fn bytes(self, elements: usize) -> usize {
        elements / self.block() * self.block_bytes()
    }

    /// Appends an F32, F16 or BF16 tensor to `out`: the rows of a weight from `first_row` on. The bytes do not depend on the
    /// number of threads.
    ///
    /// # Errors
    /// An element is NaN or infinite, or what is kept of it in float16 would be (both named by `place` and indices); a tensor of
    /// another type.
    ///
    /// # Panics
    /// Its rows are not whole blocks.
    pub fn encode(self, place: &str, source: &Tensor, first_row: usize, out: &mut Vec<u8>) -> Result<()> {
        match source.dtype() {
            DType::F32 => self.encode_elements::<f32>(place, source, first_row, out),
            DType::F16 => self.encode_elements::<f16>(place, source, first_row, out),
            DType::BF16 => self.encode_elements::<bf16>(place, source, first_row, out),
            other => Err(Error::input(
                place,
                other,
                "float32, float16 or bfloat16",
                "give the checkpoint with the original weights",
            )),
        }
    }

    fn encode_elements<T: Arithmetic>(
        self,
        place: &str,
        source: &Tensor,
        first_row: usize,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let (_, columns) = source.shape().rows_and_columns();
        assert!(columns.is_multiple_of(self.block()));
        let elements = source.as_slice::<T>();
        let start = out.len();
        out.resize(start + self.bytes(elements.len()), 0);
        let arch = pulp::Arch::new();
        // Floats are handled in pieces of 32 too, of which the last may be shorter.
        let bytes = self.block_bytes() * BLOCK / self.block();
        let bad = elements
            .par_chunks(TASK * BLOCK)
            .zip(out[start..].par_chunks_mut(TASK * bytes))
            .enumerate()
            .filter_map(|(task, (elements, out))| {
                let bad = arch.dispatch(Encode {
                    kind: self,
                    elements,
                    out,
                    bytes,
                })?;
                Some(task * TASK + bad)
            })
            .min();
        let Some(block) = bad else { return Ok(()) };
        let first = block * BLOCK;
        let mut wide = vec![0f32; elements.len().min(first + BLOCK) - first];
        T::widen(&elements[first..first + wide.len()], &mut wide);
        Err(self.refusal(place, columns, first_row * columns + first, &wide))
    }

    /// Why a block cannot be stored.
    fn refusal(self, place: &str, columns: usize, first: usize, block: &[f32]) -> Error {
        let at = |i: usize| format!("{place}[{}, {}]", (first + i) / columns, (first + i) % columns);
        if let Some(i) = block.iter().position(|x| !x.is_finite()) {
            let remedy = "the checkpoint is damaged: download or convert it again";
            return Error::input(at(i), block[i], "a finite weight", remedy);
        }
        let magnitude = |i: &usize| block[*i].abs();
        let largest = (0..block.len())
            .max_by(|i, j| magnitude(i).total_cmp(&magnitude(j)))
            .unwrap_or(0);
        let expected = format!("a weight that {self} can hold (its float16 ends at 65504)");
        Error::input(at(largest), block[largest], expected, "export it as f32")
    }

    /// The numbers that `bytes` stand for; writes every element of `out`.
    ///
    /// # Panics
    /// `bytes` are not those of `out.len()` elements.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert!(out.len().is_multiple_of(self.block()));
        assert_eq!(bytes.len(), self.bytes(out.len()));
        let per_block = self.block_bytes() * BLOCK / self.block();
        out.par_chunks_mut(TASK * BLOCK)
            .zip(bytes.par_chunks(TASK * per_block))
            .for_each(|(out, bytes)| {
                for (out, bytes) in out.chunks_mut(BLOCK).zip(bytes.chunks(per_block)) {
                    self.decode_block(bytes, out);
                }
            });
    }

    fn decode_block(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            GgmlType::F32 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *out = f32::from_le_bytes(*b);
                }
            }
            GgmlType::F16 => {
                for (out, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = f16::from_le_bytes(*b).to_f32();
                }
            }
            GgmlType::Q4_0 => {
                let d = half_at(bytes, 0);
                four_bits(&bytes[2..], 0, out, |q| f32::from(q as i8 - 8) * d);
            }
            GgmlType::Q4_1 => {
                let (d, m) = (half_at(bytes, 0), half_at(bytes, 2));
                four_bits(&bytes[4..], 0, out, |q| f32::from(q) * d + m);
            }
            GgmlType::Q5_0 => {
                let d = half_at(bytes, 0);
                four_bits(&bytes[6..], fifth_bits(&bytes[2..6]), out, |q| {
                    f32::from(q as i8 - 16) * d
                });
            }
            GgmlType::Q5_1 => {
                let (d, m) = (half_at(bytes, 0), half_at(bytes, 2));
                four_bits(&bytes[8..], fifth_bits(&bytes[4..8]), out, |q| {
                    f32::from(q) * d + m
                });
            }
            GgmlType::Q8_0 => {
                let d = half_at(bytes, 0);
                for (out, &q) in out.iter_mut().zip(&bytes[2..]) {
                    *out = f32::from(q as i8) * d;
                }
            }
        }
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn half_at(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[i], bytes[i + 1]]).to_f32()
}

fn fifth_bits(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |all, &b| all << 8 | u32::from(b))
}

/// `out[j] = value(code j)` for the 32 codes of 16 bytes and, above them, the bits of `fifth`.
fn four_bits(codes: &[u8], fifth: u32, out: &mut [f32], value: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(BLOCK / 2);
    for (j, ((low, high), &byte)) in low.iter_mut().zip(high).zip(codes).enumerate() {
        let bit = |j: usize| ((fifth >> j) as u8 & 1) << 4;
        *low = value(byte & 15 | bit(j));
        *high = value(byte >> 4 | bit(j + BLOCK / 2));
    }
}

/// The type that a weight is quantised in: that in which it is stored.
pub(super) trait Arithmetic: Stored {
    /// The nearest number of this type, of two the even one: what an operation of this type makes of the exact result.
    fn rounded(x: f32) -> f32;
}

impl Arithmetic for f32 {
    #[inline(always)]
    fn rounded(x: f32) -> f32 {
        x
    }
}

impl Arithmetic for bf16 {
    #[inline(always)]
    fn rounded(x: f32) -> f32 {
        x
    }
}

impl Arithmetic for f16 {
    /// In f32 throughout, so that loops vectorise. Rounding an operation's f32 result once more is exact: f32 has more than
    /// twice the digits of f16.
    #[inline(always)]
    fn rounded(x: f32) -> f32 {
        let bits = x.to_bits();
        // Eleven digits stay: the half of the last one is added, less one unit where that makes a tie even.
        let normal = f32::from_bits(bits.wrapping_add(0xfff + (bits >> 13 & 1)) & !0x1fff);
        // Below 2⁻¹⁴ the last digit stays at 2⁻²⁴, which is that of an f32 between 0.5 and 1.
        let magnitude = f32::from_bits(bits & 0x7fff_ffff);
        let small = f32::from_bits(((magnitude + 0.5) - 0.5).to_bits() | bits & 0x8000_0000);
        let within = if magnitude < 6.103_515_6e-5 { small } else { normal };
        // From half-way to the number that would follow 65504 on.
        if magnitude >= 65520.0 {
            x * f32::INFINITY
        } else {
            within
        }
    }
}

/// Some blocks for one thread, in the widest vectors of the machine; the number of the first one that cannot be stored.
struct Encode<'a, T> {
    kind: GgmlType,
    elements: &'a [T],
    out: &'a mut [u8],
    /// Of 32 elements.
    bytes: usize,
}

impl<T: Arithmetic> WithSimd for Encode<'_, T> {
    type Output = Option<usize>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Option<usize> {
        let mut bad = None;
        let mut x = [0f32; BLOCK];
        let blocks = self.elements.chunks(BLOCK).zip(self.out.chunks_mut(self.bytes));
        for (i, (elements, out)) in blocks.enumerate() {
            let x = &mut x[..elements.len()];
            T::widen(elements, x);
            if !encode_block::<T>(self.kind, x, out) && bad.is_none() {
                bad = Some(i);
            }
        }
        bad
    }
}

/// False when an element, or what is kept in float16, is not finite.
#[inline(always)]
fn encode_block<T: Arithmetic>(kind: GgmlType, x: &[f32], out: &mut [u8]) -> bool {
    match kind {
        GgmlType::F32 => {
            for (out, x) in out.chunks_exact_mut(4).zip(x) {
                out.copy_from_slice(&x.to_le_bytes());
            }
            return x.iter().fold(true, |all, x| all & x.is_finite());
        }
        GgmlType::F16 => {
            let mut halves = [f16::ZERO; BLOCK];
            let halves = &mut halves[..x.len()];
            halves.convert_from_f32_slice(x);
            for (out, half) in out.chunks_exact_mut(2).zip(halves.iter()) {
                out.copy_from_slice(&half.to_le_bytes());
            }
            return halves.iter().fold(true, |all, half| all & half.is_finite());
        }
        _ => {}
    }
    let Ok(x) = <&[f32; BLOCK]>::try_from(x) else {
        return false;
    };
    let finite = x.iter().fold(true, |all, x| all & x.is_finite());
    let kept = match kind {
        GgmlType::Q4_0 => {
            let (d, q) = from_largest::<T>(x, 8.0);
            pack(&q, &mut out[2..]);
            put_half(d, out)
        }
        GgmlType::Q5_0 => {
            let (d, q) = from_largest::<T>(x, 16.0);
            pack(&q, &mut out[6..]);
            out[2..6].copy_from_slice(&fifths(&q).to_le_bytes());
            put_half(d, out)
        }
        GgmlType::Q4_1 => {
            let (d, m, q) = from_smallest::<T>(x, 15.0);
            pack(&q, &mut out[4..]);
            put_half(d, out) & put_half(m, &mut out[2..])
        }
        GgmlType::Q5_1 => {
            let (d, m, q) = from_smallest::<T>(x, 31.0);
            pack(&q, &mut out[8..]);
            out[4..8].copy_from_slice(&fifths(&q).to_le_bytes());
            put_half(d, out) & put_half(m, &mut out[2..])
        }
        _ => {
            let d = T::rounded(largest_magnitude(x) / 127.0);
            for (out, x) in out[2..].iter_mut().zip(x) {
                *out = nearest(T::rounded(x / d), -128.0, 127.0) as i8 as u8;
            }
            put_half(d, out)
        }
    };
    finite & kept
}

/// `d = x_largest / -n`, `q = round(x / d + n)` from 0 to `2n - 1`.
#[inline(always)]
fn from_largest<T: Arithmetic>(x: &[f32; BLOCK], n: f32) -> (f32, [u8; BLOCK]) {
    let magnitude = largest_magnitude(x);
    // The first of those that are as large.
    let largest = x.iter().find(|x| x.abs() == magnitude).copied().unwrap_or(0.0);
    let d = T::rounded(largest / -n);
    let mut q = [0; BLOCK];
    for (q, x) in q.iter_mut().zip(x) {
        *q = nearest(T::rounded(T::rounded(x / d) + n), 0.0, 2.0 * n - 1.0) as u8;
    }
    (d, q)
}

/// `m = min x`, `d = (max x - m) / n`, `q = round((x - m) / d)` from 0 to n.
#[inline(always)]
fn from_smallest<T: Arithmetic>(x: &[f32; BLOCK], n: f32) -> (f32, f32, [u8; BLOCK]) {
    let (mut low, mut high) = ([f32::INFINITY; 16], [f32::NEG_INFINITY; 16]);
    for chunk in x.chunks_exact(16) {
        for ((low, high), &x) in low.iter_mut().zip(&mut high).zip(chunk) {
            *low = if x < *low { x } else { *low };
            *high = if x > *high { x } else { *high };
        }
    }
    let m = low.into_iter().fold(f32::INFINITY, f32::min);
    let high = high.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let d = T::rounded(T::rounded(high - m) / n);
    let mut q = [0; BLOCK];
    for (q, x) in q.iter_mut().zip(x) {
        *q = nearest(T::rounded(T::rounded(x - m) / d), 0.0, n) as u8;
    }
    (d, m, q)
}

#[inline(always)]
fn largest_magnitude(x: &[f32; BLOCK]) -> f32 {
    let mut lanes = [0f32; 16];
    for chunk in x.chunks_exact(16) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = lane.max(x.abs());
        }
    }
    lanes.into_iter().fold(0.0, f32::max)
}

/// The nearest whole number from `low` to `high`, of two the even one. In a block without extent `d` is 0 and `x / d` not a
/// number: the code is 0.
#[inline(always)]
pub(super) fn nearest(x: f32, low: f32, high: f32) -> i32 {
    // 1.5 * 2²³: above it an f32 has no digits behind the point. Clamped first, so that the sum is exact enough.
    const WHOLE: f32 = 12_582_912.0;
    let clamped = x.max(low - 1.0).min(high + 1.0);
    let whole = (clamped + WHOLE) - WHOLE;
    let number = if x.is_nan() { 0.0 } else { whole };
    number.max(low).min(high) as i32
}

/// Code j into the low, code j + 16 into the high half of byte j.
#[inline(always)]
fn pack(q: &[u8; BLOCK], out: &mut [u8]) {
    let (low, high) = q.split_at(BLOCK / 2);
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        *out = low & 15 | high << 4;
    }
}

/// The fifth bit of code j as bit j.
#[inline(always)]
fn fifths(q: &[u8; BLOCK]) -> u32 {
    (0..BLOCK).fold(0, |bits, j| bits | u32::from(q[j] >> 4 & 1) << j)
}

#[inline(always)]
fn put_half(x: f32, out: &mut [u8]) -> bool {
    let half = f16::from_f32(x);
    out[..2].copy_from_slice(&half.to_le_bytes());
    half.is_finite()
}

#[cfg(test)]
mod tests;
