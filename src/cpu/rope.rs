//! Rotary position embedding in two dimensions (Su et al. 2021; GLM's 2-D form).

use super::parallel;
use super::real::{Real, vectorized};

/// Rotates the q and k parts of `qkv [M, heads, 3 d]` in place, or back when `inverse` (the backward pass).
///
/// The first half of each head turns by the position, the second by the block position: within a half of
/// `r = d / 2` elements, `(x_i, x_{i + r/2})` turns by `position * inv_freq_i`. `tables` holds, for every position, the
/// `r/2` cosines and then the `r/2` sines.
pub fn rotate<T: Real>(
    qkv: &mut [T],
    positions: &[i32],
    tables: &[T],
    heads: usize,
    head_dim: usize,
    inverse: bool,
) {
    let width = heads * 3 * head_dim;
    let half = head_dim / 2;
    let quarter = half / 2;
    let sign = if inverse { -T::ONE } else { T::ONE };
    parallel::rows(qkv, width, width / 2, |first, rows| {
        vectorized(
            #[inline(always)]
            || {
                for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                    for axis in 0..2 {
                        let position = positions[2 * (first + i) + axis] as usize;
                        let (cos, sin) = tables[position * half..][..half].split_at(quarter);
                        for head in row.chunks_exact_mut(3 * head_dim) {
                            for part in head[..2 * head_dim].chunks_exact_mut(head_dim) {
                                let (a, b) = part[axis * half..][..half].split_at_mut(quarter);
                                for (((a, b), &cos), &sin) in a.iter_mut().zip(b.iter_mut()).zip(cos).zip(sin)
                                {
                                    let sin = sign * sin;
                                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                                }
                            }
                        }
                    }
                }
            },
        );
    });
}
