//! The code books: what the 16 nibbles and the 256 bytes of double quantisation stand for.

use std::sync::LazyLock;

/// NF4: quantiles of the normal distribution scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E), ascending.
pub static NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// FP4: sign, 2 bits of exponent, 1 of mantissa, divided by the largest value (12); not ascending, and both 0 and 8
/// mean zero.
pub static FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    0.5,
    2.0 / 12.0,
    0.25,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -0.5,
    -2.0 / 12.0,
    -0.25,
];

/// Whole numbers in two's complement: what the nibbles of THUDM's `chatglm-6b-int4` mean.
pub static INT4: [f32; 16] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0,
];

/// A table in ascending order with the midpoints between neighbours: what quantising needs.
pub(crate) struct Ranks {
    /// `order[rank]` is the code of the table's `rank`-th smallest value.
    pub order: [u8; 16],
    /// `midpoints[r]` lies half-way between rank `r` and `r + 1`, rounded to f32 as bitsandbytes does; a value belongs
    /// to the rank that counts the midpoints strictly below it, so a tie goes to the lower code.
    pub midpoints: [f32; 15],
}

impl Ranks {
    fn of(table: &[f32; 16]) -> Self {
        let mut order: [u8; 16] = std::array::from_fn(|i| i as u8);
        // Stable, so that of FP4's two zeros nibble 0 stands for what rounds up to zero, nibble 8 for what rounds down.
        order.sort_by(|&a, &b| table[usize::from(a)].total_cmp(&table[usize::from(b)]));
        let value = |rank: usize| table[usize::from(order[rank])];
        Self {
            order,
            midpoints: std::array::from_fn(|r| (value(r) + value(r + 1)) / 2.0),
        }
    }
}

pub(super) static NF4_RANKS: LazyLock<Ranks> = LazyLock::new(|| Ranks::of(&NF4));
pub(super) static FP4_RANKS: LazyLock<Ranks> = LazyLock::new(|| Ranks::of(&FP4));

/// bitsandbytes' signed dynamic 8-bit map (`create_dynamic_map`), ascending: seven decades, decade `e` cut into `2^e`
/// equal parts between 0.1 and 1 of which the middles are taken, with both signs, plus 0 and 1.
pub(super) static DYNAMIC: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic(true));

/// The unsigned map: as [`DYNAMIC`], with twice as many parts in place of the signs.
pub(super) static DYNAMIC_UNSIGNED: LazyLock<[f32; 256]> = LazyLock::new(|| dynamic(false));

fn dynamic(signed: bool) -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for exponent in 0..7 {
        let parts = if signed { 1usize } else { 2 } << exponent;
        let scale = 10f64.powi(exponent - 6) as f32;
        let boundary = linspace(0.1, 1.0, parts + 1);
        for pair in boundary.windows(2) {
            let value = scale * ((pair[0] + pair[1]) / 2.0);
            values.push(value);
            if signed {
                values.push(-value);
            }
        }
    }
    values.sort_by(f32::total_cmp);
    values
        .try_into()
        .expect("2 + 2 * (1 + 2 + ... + 64) = 256 values")
}

/// `torch.linspace` in f32: counted from the start in the first half and from the end in the second, with the fused
/// multiply-add that its compiler makes of it.
fn linspace(start: f32, end: f32, steps: usize) -> Vec<f32> {
    let step = (end - start) / (steps - 1) as f32;
    (0..steps)
        .map(|i| {
            if i < steps / 2 {
                step.mul_add(i as f32, start)
            } else {
                (-step).mul_add((steps - 1 - i) as f32, end)
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn midpoints_ascend_and_order_is_a_permutation() {
        for ranks in [&*NF4_RANKS, &*FP4_RANKS] {
            assert!(ranks.midpoints.windows(2).all(|w| w[0] < w[1]));
            let mut codes = ranks.order;
            codes.sort_unstable();
            assert_eq!(codes, std::array::from_fn::<u8, 16, _>(|i| i as u8));
        }
    }

    #[test]
    fn dynamic_maps_are_ascending_and_the_signed_one_is_odd_but_for_one() {
        assert!(DYNAMIC.windows(2).all(|w| w[0] < w[1]));
        assert_eq!((DYNAMIC[127], DYNAMIC[255]), (0.0, 1.0));
        for i in 0..127 {
            assert_eq!(DYNAMIC[i], -DYNAMIC[254 - i]);
        }
        assert!(DYNAMIC_UNSIGNED.windows(2).all(|w| w[0] < w[1]));
        assert_eq!((DYNAMIC_UNSIGNED[0], DYNAMIC_UNSIGNED[255]), (0.0, 1.0));
    }
}
