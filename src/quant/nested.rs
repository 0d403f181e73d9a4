//! Double quantisation: the block scales themselves in 8 bits.
//!
//! bitsandbytes' CPU kernel does not search the nearest of the 256 values: it looks the value up in a table of 65,536
//! steps from -1 to 1 (`build_quantize_lut` and `norm_to_lut_index` of csrc/cpu_ops.cpp), whose steps are coarser than the
//! map near zero. The same table is built here, so the codes are equal, not merely close.

use std::sync::LazyLock;

use super::NESTED_BLOCK;
use super::code::DYNAMIC;

const STEPS: usize = 65_536;

static NEAREST: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let midpoints: Vec<f32> = DYNAMIC.windows(2).map(|w| 0.5 * (w[0] + w[1])).collect();
    let mut code = 0;
    (0..STEPS)
        .map(|i| {
            let value = -1.0 + (2.0 * i as f32) / (STEPS - 1) as f32;
            while code < midpoints.len() && midpoints[code] < value {
                code += 1;
            }
            code as u8
        })
        .collect()
});

/// The code of `value` in [-1, 1].
fn code(value: f32) -> u8 {
    // Compilers contract the C++ expression to a fused multiply-add on the machines bitsandbytes is built for.
    let step = ((value.clamp(-1.0, 1.0) + 1.0) * 0.5).mul_add((STEPS - 1) as f32, 0.5);
    NEAREST[step as usize]
}

/// Block scales in 8 bits: `absmax[b] ~ map[codes[b]] * scales[b / 256] + offset`.
pub(super) struct Nested {
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
    pub offset: f32,
}

/// Quantises the scales of a tensor's blocks.
pub(super) fn quantize(absmax: &[f32]) -> Nested {
    let offset = sum(absmax) / absmax.len() as f32;
    let mut codes = Vec::with_capacity(absmax.len());
    let mut scales = Vec::with_capacity(absmax.len().div_ceil(NESTED_BLOCK));
    for block in absmax.chunks(NESTED_BLOCK) {
        let largest = block.iter().fold(0f32, |m, x| m.max((x - offset).abs()));
        scales.push(largest);
        if largest == 0.0 {
            // As bitsandbytes: code 0 (-1), not 127 (0); the scale 0 makes them the same.
            codes.resize(codes.len() + block.len(), 0);
        } else {
            let reciprocal = 1.0 / largest;
            codes.extend(block.iter().map(|x| code((x - offset) * reciprocal)));
        }
    }
    Nested {
        codes,
        scales,
        offset,
    }
}

/// The scales that quantised weights are multiplied by: `map[codes[b]] * scales[b / 256] + offset`, in two roundings.
pub(super) fn dequantize(codes: &[u8], scales: &[f32], offset: f32, map: &[f32]) -> Vec<f32> {
    let mut absmax = Vec::with_capacity(codes.len());
    for (block, scale) in codes.chunks(NESTED_BLOCK).zip(scales) {
        absmax.extend(block.iter().map(|&c| map[usize::from(c)] * scale + offset));
    }
    absmax
}

/// The lanes of one vector of PyTorch's sum.
const LANES: usize = 8;
/// How many vectors it adds side by side.
const ROWS: usize = 4;
/// How many levels its cascade has.
const LEVELS: usize = 4;

/// `torch.sum` of a contiguous f32 tensor by one thread, in PyTorch's order of additions (ATen's cascade sum), so that
/// the offset, being stored, is PyTorch's to the bit.
fn sum(values: &[f32]) -> f32 {
    if values.len() < LANES {
        return cascade::<1>(values)[0];
    }
    let (vectors, tail) = values.as_chunks::<LANES>();
    let tail = tail.iter().fold(0.0, |a, x| a + x);
    cascade::<LANES>(vectors.as_flattened())
        .iter()
        .fold(tail, |a, x| a + x)
}

/// Adds vectors of `L` values: four running sums side by side, carried to the next of four levels every `step` rows.
fn cascade<const L: usize>(values: &[f32]) -> [f32; L] {
    let (vectors, _) = values.as_chunks::<L>();
    let (rows, rest) = vectors.as_chunks::<ROWS>();
    let mut level = [[[0f32; L]; ROWS]; LEVELS];
    let power = (ceil_log2(rows.len()) / LEVELS).max(4);
    let step = 1usize << power;
    let whole = rows.len() / step * step;
    for (i, row) in rows.iter().enumerate() {
        accumulate(level[0].as_flattened_mut(), row.as_flattened());
        let done = i + 1;
        if done > whole || !done.is_multiple_of(step) {
            continue;
        }
        for j in 1..LEVELS {
            let lower = std::mem::replace(&mut level[j - 1], [[0.0; L]; ROWS]);
            accumulate(level[j].as_flattened_mut(), lower.as_flattened());
            if done & ((step - 1) << (j * power)) != 0 {
                break;
            }
        }
    }
    let [mut total, upper @ ..] = level;
    for level in &upper {
        accumulate(total.as_flattened_mut(), level.as_flattened());
    }
    let [mut partial, others @ ..] = total;
    for vector in rest.iter().chain(&others) {
        accumulate(&mut partial, vector);
    }
    partial
}

fn accumulate(into: &mut [f32], from: &[f32]) {
    for (into, from) in into.iter_mut().zip(from) {
        *into += from;
    }
}

fn ceil_log2(x: usize) -> usize {
    if x <= 2 {
        1
    } else {
        (usize::BITS - (x - 1).leading_zeros()) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_adds_everything_once() {
        for n in [0, 1, 7, 8, 31, 32, 33, 511, 512, 513, 4096, 100_003] {
            let values: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
            let exact: f32 = (0..n).map(|i| (i % 7) as u32).sum::<u32>() as f32;
            assert_eq!(sum(&values), exact, "{n} values");
        }
    }

    #[test]
    fn every_value_of_the_map_down_to_the_table_step_finds_itself() {
        for (i, &value) in DYNAMIC.iter().enumerate() {
            if value.abs() > 1e-3 {
                assert_eq!(usize::from(code(value)), i, "{value}");
            }
        }
        assert_eq!((code(-1.0), code(1.0)), (0, 255));
    }

    #[test]
    fn equal_scales_need_no_codes() {
        let nested = quantize(&[0.5; 300]);
        assert_eq!(
            (nested.offset, nested.scales, nested.codes),
            (0.5, vec![0.0; 2], vec![0; 300])
        );
    }
}
