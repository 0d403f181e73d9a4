//! Dot products with rows of a stored weight: how a token is generated, when every weight is read once for one row of x.
//!
//! `Σ x_k w_k` in 64 lanes: element k is added to lane k mod 64 by one fused multiplication and addition, rounded once;
//! eight neighbouring lanes are then added up, and the sums of the eight groups ([`fold`]). So the bits are the same in vectors of every width,
//! and those of a matrix that was decoded before. Sixteen lanes, as in other sums, would wait for their own additions: four
//! accumulators of AVX-512 hide that latency.
//!
//! 4-bit rows are decoded in registers, a block of 64 at a time. Its 32 bytes are 8 words of 8 nibbles; shifting all words by
//! the same count brings one nibble of each to where the shuffle of the table reads its index. So a vector holds elements that lie
//! 8 apart, and x is brought into that order once, before the rows ([`Spread`]).

use pulp::{Simd, WithSimd};

use super::weight::{Codes4, Elements};

/// Lanes of the sum, and elements of a 4-bit block.
const LANES: usize = crate::quant::BLOCK;

/// `Σ x_k w_k` of two slices of one length.
pub fn dense(x: &[f32], w: &[f32]) -> f32 {
    pulp::Arch::new().dispatch(Dense { x, w })
}

/// A row of x in the order in which blocks of 4 bits are decoded in registers.
pub struct Spread {
    width: Width,
    x: Vec<f32>,
}

/// Vectors that a table of 16 is looked up in.
#[derive(Clone, Copy)]
enum Width {
    #[cfg(target_arch = "x86_64")]
    Sixteen(pulp::x86::V4),
    #[cfg(target_arch = "x86_64")]
    Eight(pulp::x86::V3),
}

impl Width {
    #[cfg(target_arch = "x86_64")]
    fn widest() -> Option<Self> {
        let eight = || pulp::x86::V3::try_new().map(Self::Eight);
        pulp::x86::V4::try_new().map(Self::Sixteen).or_else(eight)
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn widest() -> Option<Self> {
        None
    }

    /// Which element of a block comes at `place` of its vectors, one after the other.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
    fn element(self, place: usize) -> usize {
        match self {
            // Vector j: byte j of each word, the low nibbles and then the high ones. The even element has the high nibble.
            #[cfg(target_arch = "x86_64")]
            Self::Sixteen(_) => 8 * (place % 8) + 2 * (place / 16) + usize::from(place % 16 < 8),
            // Vector q: nibble q of each word.
            #[cfg(target_arch = "x86_64")]
            Self::Eight(_) => 8 * (place % 8) + ((place / 8) ^ 1),
        }
    }
}

impl Spread {
    /// `x` for products with rows of `w`, which has `x.len()` columns; `None` where rows are better decoded into memory: they are
    /// not of whole blocks, or not in 4 bits, or the processor has no such shuffle.
    pub fn new<T>(x: &[f32], w: Elements<'_, T>) -> Option<Self> {
        let whole = matches!(w, Elements::Codes4(_)) && x.len().is_multiple_of(LANES);
        let width = Width::widest().filter(|_| whole)?;
        Some(Self::of(width, x))
    }

    fn of(width: Width, x: &[f32]) -> Self {
        let (blocks, _) = x.as_chunks::<LANES>();
        let spread = |block: &[f32; LANES]| std::array::from_fn::<f32, LANES, _>(|i| block[width.element(i)]);
        let x = blocks.iter().flat_map(spread).collect();
        Self { width, x }
    }

    /// The dot product of elements `part` of x with as many of the flattened weight from block `first` on.
    pub fn dot(&self, part: std::ops::Range<usize>, w: &Codes4<'_>, first: usize) -> f32 {
        let x = &self.x[part];
        fold_groups(match self.width {
            #[cfg(target_arch = "x86_64")]
            Width::Sixteen(simd) => sixteen(simd, x, w, first),
            #[cfg(target_arch = "x86_64")]
            Width::Eight(simd) => eight(simd, x, w, first),
        })
    }
}

#[cfg(target_arch = "x86_64")]
fn sixteen(simd: pulp::x86::V4, x: &[f32], w: &Codes4<'_>, first: usize) -> [f32; 8] {
    simd.vectorize(
        #[inline(always)]
        || {
            let f = simd.avx512f;
            let table = pulp::cast(*w.table);
            let mut sums = [f._mm512_setzero_ps(); 4];
            for (scale, x, codes) in w.blocks(first, x) {
                let scale = f._mm512_set1_ps(scale);
                let words = f._mm512_broadcast_i64x4(pulp::cast(*codes));
                let words = f._mm512_mask_srli_epi32::<4>(words, 0xff00, words);
                // Of each index the shuffle reads the lowest four bits.
                let indices = [
                    words,
                    f._mm512_srli_epi32::<8>(words),
                    f._mm512_srli_epi32::<16>(words),
                    f._mm512_srli_epi32::<24>(words),
                ];
                let (x, _) = x.as_chunks::<16>();
                for ((sum, x), indices) in sums.iter_mut().zip(x).zip(indices) {
                    let decoded = f._mm512_mul_ps(f._mm512_permutexvar_ps(indices, table), scale);
                    *sum = f._mm512_fmadd_ps(decoded, pulp::cast(*x), *sum);
                }
            }
            // The high half of each vector holds even lanes, the low half odd ones.
            let [a, b, c, d] = sums;
            let [odd, even]: [[f32; 8]; 2] =
                pulp::cast(f._mm512_add_ps(f._mm512_add_ps(a, c), f._mm512_add_ps(b, d)));
            std::array::from_fn(|i| even[i] + odd[i])
        },
    )
}

/// The table in two registers: looked up in both, and chosen by the highest bit of the nibble, shifted to where the choice reads.
#[cfg(target_arch = "x86_64")]
fn eight(simd: pulp::x86::V3, x: &[f32], w: &Codes4<'_>, first: usize) -> [f32; 8] {
    simd.vectorize(
        #[inline(always)]
        || {
            let (f, i) = (simd.avx, simd.avx2);
            let [low, high]: [[f32; 8]; 2] = pulp::cast(*w.table);
            let (low, high) = (pulp::cast(low), pulp::cast(high));
            let mut sums = [f._mm256_setzero_ps(); 8];
            for (scale, x, codes) in w.blocks(first, x) {
                let scale = f._mm256_set1_ps(scale);
                let words = pulp::cast(*codes);
                let indices = [
                    words,
                    i._mm256_srli_epi32::<4>(words),
                    i._mm256_srli_epi32::<8>(words),
                    i._mm256_srli_epi32::<12>(words),
                    i._mm256_srli_epi32::<16>(words),
                    i._mm256_srli_epi32::<20>(words),
                    i._mm256_srli_epi32::<24>(words),
                    i._mm256_srli_epi32::<28>(words),
                ];
                let (x, _) = x.as_chunks::<8>();
                for ((sum, x), indices) in sums.iter_mut().zip(x).zip(indices) {
                    let low = i._mm256_permutevar8x32_ps(low, indices);
                    let high = i._mm256_permutevar8x32_ps(high, indices);
                    let choice = pulp::cast(i._mm256_slli_epi32::<28>(indices));
                    let decoded = f._mm256_mul_ps(f._mm256_blendv_ps(low, high, choice), scale);
                    *sum = simd.fma._mm256_fmadd_ps(decoded, pulp::cast(*x), *sum);
                }
            }
            let [a, b, c, d, e, g, h, i] = sums;
            let add = |x, y| f._mm256_add_ps(x, y);
            let (even, odd) = (add(add(b, g), add(d, i)), add(add(a, e), add(c, h)));
            pulp::cast(add(even, odd))
        },
    )
}

struct Dense<'a> {
    x: &'a [f32],
    w: &'a [f32],
}

impl WithSimd for Dense<'_> {
    type Output = f32;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f32 {
        // As many as 64 lanes take in vectors of one lane; of wider ones the first few, which then are registers.
        let mut sums = [simd.splat_f32s(0.0); LANES];
        let count = LANES / S::F32_LANES;
        let (x, x_rest) = self.x.as_chunks::<LANES>();
        let (w, w_rest) = self.w.as_chunks::<LANES>();
        for (x, w) in x.iter().zip(w) {
            let (x, w) = (S::as_simd_f32s(x).0, S::as_simd_f32s(w).0);
            for i in 0..count {
                sums[i] = simd.mul_add_f32s(x[i], w[i], sums[i]);
            }
        }
        let mut lanes = [0f32; LANES];
        S::as_mut_simd_f32s(&mut lanes).0.copy_from_slice(&sums[..count]);
        for (lane, (x, w)) in lanes.iter_mut().zip(x_rest.iter().zip(w_rest)) {
            *lane = x.mul_add(*w, *lane);
        }
        fold(lanes)
    }
}

/// The sum of all lanes: of each eight neighbours, then of the eight groups.
#[inline(always)]
fn fold(lanes: [f32; LANES]) -> f32 {
    let (groups, _) = lanes.as_chunks::<8>();
    fold_groups(std::array::from_fn(|i| {
        let [a, b, c, d, e, f, g, h] = groups[i];
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }))
}

#[inline(always)]
fn fold_groups(g: [f32; 8]) -> f32 {
    ((g[0] + g[4]) + (g[2] + g[6])) + ((g[1] + g[5]) + (g[3] + g[7]))
}

#[cfg(test)]
mod tests {
    use super::super::weight::{BlockScales, Weight};
    use super::*;
    use crate::quant::QuantType;

    fn numbers(n: usize, step: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * step).sin()).collect()
    }

    /// The definition, lane by lane.
    fn definition(x: &[f32], w: &[f32]) -> f32 {
        let mut lanes = [0f32; LANES];
        for (i, (x, w)) in x.iter().zip(w).enumerate() {
            lanes[i % LANES] = x.mul_add(*w, lanes[i % LANES]);
        }
        fold(lanes)
    }

    #[test]
    fn a_dot_product_has_the_bits_of_its_definition_in_vectors_of_every_width() {
        for n in [0, 1, 63, 64, 65, 200, 512, 1000] {
            let (x, w) = (numbers(n, 0.37), numbers(n, 0.11));
            let want = definition(&x, &w).to_bits();
            assert_eq!(dense(&x, &w).to_bits(), want, "{n}");
            let task = || Dense { x: &x, w: &w };
            assert_eq!(
                Simd::vectorize(pulp::Scalar::new(), task()).to_bits(),
                want,
                "{n}"
            );
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = pulp::x86::V3::try_new() {
                assert_eq!(Simd::vectorize(simd, task()).to_bits(), want, "{n}");
            }
        }
    }

    #[test]
    fn a_4_bit_row_has_the_bits_of_the_decoded_one() {
        let (rows, columns) = (3, 192);
        let codes: Vec<u8> = (0..rows * columns / 2).map(|i| (i * 89 + 3) as u8).collect();
        let absmax: Vec<f32> = (0..rows * columns / 64).map(|i| 0.3 + i as f32).collect();
        let w = Codes4 {
            codes: &codes,
            scales: BlockScales::Flat(&absmax),
            table: QuantType::Nf4.table(),
        };
        let elements = Elements::Codes4(w);
        let weight: Weight<'_, f32> = Weight {
            elements,
            rows,
            columns,
        };
        let x = numbers(columns, 0.23);
        #[allow(unused_mut)]
        let mut spreads = vec![Spread::new(&x, elements)];
        #[cfg(target_arch = "x86_64")]
        spreads.push(pulp::x86::V3::try_new().map(|simd| Spread::of(Width::Eight(simd), &x)));
        for row in 0..rows {
            let mut decoded = vec![0f32; columns];
            weight.decode(row..row + 1, 0..columns, &mut decoded);
            for part in [0..columns, 64..columns] {
                let want = definition(&x[part.clone()], &decoded[part.clone()]);
                for spread in spreads.iter().flatten() {
                    let found = spread.dot(part.clone(), &w, (row * columns + part.start) / LANES);
                    assert_eq!(found.to_bits(), want.to_bits(), "row {row}");
                }
            }
        }
        assert!(Spread::new(&x[..100], elements).is_none());
        assert!(Spread::new(&x, Elements::Own(&x)).is_none());
    }
}
