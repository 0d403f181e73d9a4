//! The prefix of P-Tuning v2: keys and values of a layer out of the encoder's table.

use super::parallel;
use super::real::Real;
use crate::rng::Stream;

/// The extents of a table and of what is taken out of it.
#[derive(Debug, Clone, Copy)]
pub struct Extents {
    /// Sequences B, each with dropout of its own.
    pub size: usize,
    /// Positions P.
    pub length: usize,
    /// Heads.
    pub heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Columns of the table.
    pub columns: usize,
    /// The first column that is meant.
    pub first: usize,
}

/// Inverted dropout of elements by their number.
struct Mask<T> {
    dropout: Option<(f32, Stream)>,
    scale: T,
    /// The block of the generator at hand: elements lie side by side.
    block: (u64, [u32; 4]),
}

impl<T: Real> Mask<T> {
    fn new(dropout: Option<(f32, Stream)>) -> Self {
        let p = dropout.map_or(0.0, |(p, _)| f64::from(p));
        Self {
            dropout,
            scale: T::of(1.0 / (1.0 - p)),
            block: (u64::MAX, [0; 4]),
        }
    }

    fn apply(&mut self, x: T, i: usize) -> T {
        let Some((p, stream)) = self.dropout else {
            return x;
        };
        let i = i as u64;
        if self.block.0 != i / 4 {
            self.block = (i / 4, stream.block(i / 4));
        }
        let uniform = (self.block.1[(i % 4) as usize] >> 8) as f32 * (1.0 / 16_777_216.0);
        if uniform >= p { x * self.scale } else { T::ZERO }
    }
}

/// `y [B, heads, P, d]` out of `table [P, columns]`, behind dropout over `[B, P, columns]`.
pub fn heads<T: Real>(table: &[T], e: Extents, dropout: Option<(f32, Stream)>, y: &mut [T]) {
    let d = e.head_dim;
    parallel::rows(y, d, 8 * d, |first, rows| {
        let mut mask = Mask::new(dropout);
        for (row, y) in rows.chunks_exact_mut(d).enumerate() {
            let row = first + row;
            let (b, h, p) = (row / e.length / e.heads, row / e.length % e.heads, row % e.length);
            let column = e.first + h * d;
            let from = &table[p * e.columns + column..][..d];
            let number = (b * e.length + p) * e.columns + column;
            for (i, (y, &x)) in y.iter_mut().zip(from).enumerate() {
                *y = mask.apply(x, number + i);
            }
        }
    });
}

/// The gradient of [`heads`]: `d_table [P, columns]` is added that of every sequence, in their order.
pub fn accumulate_heads<T: Real>(dy: &[T], e: Extents, dropout: Option<(f32, Stream)>, d_table: &mut [T]) {
    let d = e.head_dim;
    parallel::rows(d_table, e.columns, 8 * e.size * e.heads * d, |first, rows| {
        let mut mask = Mask::new(dropout);
        for (row, sums) in rows.chunks_exact_mut(e.columns).enumerate() {
            let p = first + row;
            for b in 0..e.size {
                for h in 0..e.heads {
                    let column = e.first + h * d;
                    let number = (b * e.length + p) * e.columns + column;
                    let from = &dy[((b * e.heads + h) * e.length + p) * d..][..d];
                    for (i, (sum, &x)) in sums[column..][..d].iter_mut().zip(from).enumerate() {
                        *sum += mask.apply(x, number + i);
                    }
                }
            }
        }
    });
}

/// `y = tanh(x)`.
pub fn tanh<T: Real>(x: &[T], y: &mut [T]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = x.tanh();
    }
}

/// The gradient of [`tanh`] in place, from its output: `d *= 1 - y²`.
pub fn tanh_backward<T: Real>(y: &[T], d: &mut [T]) {
    for (d, &y) in d.iter_mut().zip(y) {
        *d *= T::ONE - y * y;
    }
}
