//! Counter-based random numbers: the value at a counter depends on nothing but `(seed, stream, counter)`.
//!
//! Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011). A dropout mask is regenerated
//! in the backward pass instead of being stored, resuming needs no generator state, and a GPU thread computes the very
//! same value as the CPU.

use rayon::prelude::*;

const M0: u32 = 0xD251_1F53;
const M1: u32 = 0xCD9E_8D57;
const W0: u32 = 0x9E37_79B9;
const W1: u32 = 0xBB67_AE85;

/// One Philox4x32-10 block: 128 random bits for a 128-bit counter and a 64-bit key.
#[inline]
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let p0 = u64::from(M0) * u64::from(counter[0]);
        let p1 = u64::from(M1) * u64::from(counter[2]);
        counter = [
            (p1 >> 32) as u32 ^ counter[1] ^ key[0],
            p1 as u32,
            (p0 >> 32) as u32 ^ counter[3] ^ key[1],
            p0 as u32,
        ];
        key = [key[0].wrapping_add(W0), key[1].wrapping_add(W1)];
    }
    counter
}

/// A named source of random numbers: the same `(seed, stream)` always gives the same sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    seed: u64,
    stream: u64,
}

impl Stream {
    /// The stream number `stream` of `seed`.
    pub const fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream }
    }

    /// The seed, the Philox key.
    pub const fn seed(self) -> u64 {
        self.seed
    }

    /// The stream number, the upper half of the Philox counter.
    pub const fn stream(self) -> u64 {
        self.stream
    }

    /// 32 random bits at `index`: word `index % 4` of block `index / 4`.
    #[inline]
    pub fn bits(self, index: u64) -> u32 {
        self.block(index / 4)[(index % 4) as usize]
    }

    /// The 4 words of block `block`.
    #[inline]
    pub fn block(self, block: u64) -> [u32; 4] {
        philox(
            [
                block as u32,
                (block >> 32) as u32,
                self.stream as u32,
                (self.stream >> 32) as u32,
            ],
            [self.seed as u32, (self.seed >> 32) as u32],
        )
    }

    /// Fills `bytes` with random bits: byte `i` is byte `i % 4` (the lowest first) of the word [`Stream::bits`] at `i / 4`.
    pub fn fill(self, bytes: &mut [u8]) {
        const GRAIN: usize = 1 << 16;
        bytes.par_chunks_mut(GRAIN).enumerate().for_each(|(i, grain)| {
            for (j, sixteen) in grain.chunks_mut(16).enumerate() {
                let words = self.block((i * (GRAIN / 16) + j) as u64);
                for (byte, k) in sixteen.iter_mut().zip(0..) {
                    *byte = (words[k / 4] >> (8 * (k % 4))) as u8;
                }
            }
        });
    }

    /// A number in `[0, 1)` with 24 random bits, exact in f32.
    #[inline]
    pub fn uniform(self, index: u64) -> f32 {
        (self.bits(index) >> 8) as f32 * (1.0 / 16_777_216.0)
    }

    /// A standard normal number (Box-Muller on the uniforms `2 index` and `2 index + 1`).
    pub fn normal(self, index: u64) -> f32 {
        let u = (f64::from(self.bits(2 * index)) + 0.5) / 4_294_967_296.0;
        let v = (f64::from(self.bits(2 * index + 1)) + 0.5) / 4_294_967_296.0;
        ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
    }

    /// Fills `out` with `f(self, i)` for its indices, in parallel.
    pub fn generate(self, out: &mut [f32], f: impl Fn(Self, u64) -> f32 + Sync) {
        const GRAIN: usize = 1 << 14;
        out.par_chunks_mut(GRAIN).enumerate().for_each(|(i, grain)| {
            for (x, index) in grain.iter_mut().zip((i * GRAIN) as u64..) {
                *x = f(self, index);
            }
        });
    }

    /// A number below `bound` at `index`, for shuffling (multiply-shift; the bias is below `bound / 2^32`).
    #[inline]
    pub fn below(self, index: u64, bound: usize) -> usize {
        ((u64::from(self.bits(index)) * bound as u64) >> 32) as usize
    }

    /// Fisher-Yates: the permutation of `0..n` that belongs to this stream.
    pub fn permutation(self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below((n - i) as u64, i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the reference implementation (Random123, `kat_vectors`, philox4x32 10 rounds).
    #[test]
    fn philox_known_answers() {
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn bytes_are_those_of_the_words() {
        let s = Stream::new(3, 4);
        let mut bytes = vec![0; (1 << 16) + 7];
        s.fill(&mut bytes);
        for i in [0, 1, 5, 65_535, 65_536, 65_542] {
            let word = s.bits(i as u64 / 4).to_le_bytes();
            assert_eq!(bytes[i], word[i % 4], "byte {i}");
        }
    }

    #[test]
    fn a_permutation_holds_every_index_once_and_depends_on_the_stream() {
        let a = Stream::new(7, 0).permutation(100);
        let mut sorted = a.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_ne!(a, Stream::new(7, 1).permutation(100));
        assert_ne!(a, Stream::new(8, 0).permutation(100));
        assert_eq!(a, Stream::new(7, 0).permutation(100));
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let s = Stream::new(1, 2);
        let n = 100_000;
        let mean = (0..n).map(|i| f64::from(s.uniform(i))).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
        let (mut m, mut v) = (0.0, 0.0);
        for i in 0..n {
            let x = f64::from(s.normal(i));
            m += x;
            v += x * x;
        }
        assert!(
            (m / n as f64).abs() < 0.02 && (v / n as f64 - 1.0).abs() < 0.03,
            "{m} {v}"
        );
    }
}
