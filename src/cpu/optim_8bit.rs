//! AdamW on moments in 8 bits, block-wise (Dettmers et al. 2022, arXiv 2110.02861).

use std::sync::LazyLock;

use rayon::prelude::*;

use super::optim::{AdamwFactors, AdamwStep};
use crate::quant::{nested_map, unsigned_map};

/// Moments that share one scale.
pub const BLOCK: usize = 256;
/// Blocks per parallel task.
const TASK: usize = 64;

/// What 256 codes mean, and how to find the nearest.
#[derive(Debug)]
pub struct Map {
    /// The values, ascending.
    pub values: &'static [f32; 256],
    /// Half-way between each value and the next, rounded to f32.
    pub midpoints: [f32; 255],
}

/// bitsandbytes' signed dynamic map: first moments.
pub static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::of(nested_map()));
/// bitsandbytes' unsigned dynamic map: second moments.
pub static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::of(unsigned_map()));

impl Map {
    fn of(values: &'static [f32; 256]) -> Self {
        let midpoints = std::array::from_fn(|i| 0.5 * (values[i] + values[i + 1]));
        Self { values, midpoints }
    }

    /// The code of the value nearest to `x`: as many as there are midpoints below it, so that of two equally near
    /// values the lower one is taken.
    #[inline(always)]
    pub fn nearest(&self, x: f32) -> u8 {
        let mut code = 0;
        for half in [128, 64, 32, 16, 8, 4, 2, 1] {
            code += if self.midpoints[code + half - 1] < x {
                half
            } else {
                0
            };
        }
        code as u8
    }

    /// `codes = nearest(values / absmax)`; the result is absmax, the largest magnitude. A block of zeros gets the code of 0.
    fn quantize(&self, values: &[f32], codes: &mut [u8]) -> f32 {
        let absmax = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let scale = if absmax > 0.0 { absmax } else { 1.0 };
        for (code, &value) in codes.iter_mut().zip(values) {
            *code = self.nearest(value / scale);
        }
        absmax
    }
}

/// A moment in 8 bits: element i is `map[codes[i]] absmax[i / 256]`.
#[derive(Debug)]
pub struct Codes<'a> {
    /// `[n]`.
    pub codes: &'a mut [u8],
    /// `[ceil(n / 256)]`.
    pub absmax: &'a mut [f32],
}

/// One AdamW step ([`super::optim::adamw`]) on moments that are dequantised before it and quantised again after it;
/// `p` sees them before they are rounded.
///
/// All slices are of one length but the scales. Blocks are independent: the bits do not depend on the number of threads.
pub fn adamw_8bit(p: &mut [f32], g: &[f32], m: Codes<'_>, v: Codes<'_>, step: AdamwStep, f: &AdamwFactors) {
    let (n, blocks) = (p.len(), p.len().div_ceil(BLOCK));
    assert!(
        [g.len(), m.codes.len(), v.codes.len()] == [n; 3] && [m.absmax.len(), v.absmax.len()] == [blocks; 2],
        "adamw_8bit: slices of different lengths"
    );
    let (signed, unsigned) = (&*SIGNED, &*UNSIGNED);
    let moments = (m
        .codes
        .par_chunks_mut(TASK * BLOCK)
        .zip(m.absmax.par_chunks_mut(TASK)))
    .zip(
        v.codes
            .par_chunks_mut(TASK * BLOCK)
            .zip(v.absmax.par_chunks_mut(TASK)),
    );
    p.par_chunks_mut(TASK * BLOCK)
        .zip(g.par_chunks(TASK * BLOCK))
        .zip(moments)
        .for_each(|((p, g), ((m_codes, m_absmax), (v_codes, v_absmax)))| {
            let m_blocks = m_codes.chunks_mut(BLOCK).zip(m_absmax);
            let v_blocks = v_codes.chunks_mut(BLOCK).zip(v_absmax);
            let values = p.chunks_mut(BLOCK).zip(g.chunks(BLOCK));
            for ((p, g), ((m_codes, m_absmax), (v_codes, v_absmax))) in values.zip(m_blocks.zip(v_blocks)) {
                let (mut m, mut v) = ([0f32; BLOCK], [0f32; BLOCK]);
                let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
                for i in 0..p.len() {
                    m[i] = signed.values[usize::from(m_codes[i])] * *m_absmax;
                    v[i] = unsigned.values[usize::from(v_codes[i])] * *v_absmax;
                    f.step(&mut p[i], g[i], &mut m[i], &mut v[i], step);
                }
                *m_absmax = signed.quantize(m, m_codes);
                *v_absmax = unsigned.quantize(v, v_codes);
            }
        });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_those_of_bitsandbytes() {
        let goldens = include_str!("../../tests/goldens/optimizers.json");
        let goldens: serde_json::Value = serde_json::from_str(goldens).unwrap();
        for (key, map) in [("signed_map", &*SIGNED), ("unsigned_map", &*UNSIGNED)] {
            let want: Vec<f32> = serde_json::from_value(goldens[key].clone()).unwrap();
            assert_eq!(map.values[..], want, "{key}");
        }
    }

    #[test]
    fn the_nearest_value_is_found_and_of_two_the_lower() {
        for map in [&*SIGNED, &*UNSIGNED] {
            for (i, &value) in map.values.iter().enumerate() {
                assert_eq!(usize::from(map.nearest(value)), i);
            }
            for (i, &middle) in map.midpoints.iter().enumerate() {
                assert_eq!(usize::from(map.nearest(middle)), i);
                assert_eq!(usize::from(map.nearest(middle.next_up())), i + 1);
            }
            assert_eq!(map.nearest(2.0), 255);
            assert_eq!(map.values[usize::from(map.nearest(0.0))], 0.0);
        }
    }

    #[test]
    fn a_block_of_zeros_is_zero() {
        for map in [&*SIGNED, &*UNSIGNED] {
            let mut codes = [9; 3];
            assert_eq!(map.quantize(&[0.0, -0.0, 0.0], &mut codes), 0.0);
            assert!(codes.iter().all(|&code| map.values[usize::from(code)] == 0.0));
        }
    }
}
