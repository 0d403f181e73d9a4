//! Products with weight matrices: `y = x Wᵀ + b + α r` and `dx = α r + dy W`, with the weight decoded tile by tile.

use std::cell::RefCell;
use std::ops::Range;

use super::dot::{self, Spread};
use super::matrix::{Mat, MatMut, gemm};
use super::panel::{WIDTH, transpose};
use super::parallel;
use super::real::{Real, sum2, vectorized};
use super::weight::{Elements, Weight};
use crate::tensor::DType;

/// Rows of a panel: with [`WIDTH`] columns of f32 it takes 128 KiB of the second-level cache.
const DEPTH: usize = 512;

/// Up to this many rows of `x`, dot products with decoded rows beat packing for a matrix product.
const FEW_ROWS: usize = 4;

/// Rough nanoseconds of `flops` floating-point operations on one core.
fn nanoseconds(flops: usize) -> usize {
    flops / 40
}

/// Runs `f` on this thread's tile buffer of `len` elements.
fn with_tile<T: Real, R>(len: usize, f: impl FnOnce(&mut [T]) -> R) -> R {
    thread_local! {
        static TILE_MEMORY: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    }
    TILE_MEMORY.with_borrow_mut(|memory| {
        let words = (len * size_of::<T>()).div_ceil(8);
        if memory.len() < words {
            memory.resize(words, 0);
        }
        f(&mut bytemuck::cast_slice_mut::<u64, T>(&mut memory[..words])[..len])
    })
}

/// Fills `y [M, N]` with `bias + alpha * residual`, either of which may be missing.
fn fill<T: Real>(bias: Option<&[T]>, residual: Option<(T, &[T])>, y: &mut [T], n: usize) {
    parallel::rows(y, n, n / 4, |first, rows| {
        vectorized(
            #[inline(always)]
            || {
                for (i, y) in rows.chunks_exact_mut(n).enumerate() {
                    match (bias, residual) {
                        (None, None) => y.fill(T::ZERO),
                        (Some(b), None) => y.copy_from_slice(b),
                        (None, Some((alpha, r))) => {
                            let r = &r[(first + i) * n..][..n];
                            for (y, &r) in y.iter_mut().zip(r) {
                                *y = alpha * r;
                            }
                        }
                        (Some(b), Some((alpha, r))) => {
                            let r = &r[(first + i) * n..][..n];
                            for ((y, &r), &b) in y.iter_mut().zip(r).zip(b) {
                                *y = b + alpha * r;
                            }
                        }
                    }
                }
            },
        );
    });
}

/// `y [M, N] = x [M, K] Wᵀ + bias + alpha * residual`.
pub fn forward<T: Real>(
    x: &[T],
    weight: Weight<'_, T>,
    rows: Range<usize>,
    bias: Option<&[T]>,
    residual: Option<(T, &[T])>,
    y: &mut [T],
) {
    let (n, k) = (rows.len(), weight.columns);
    if n == 0 {
        return;
    }
    let m = y.len() / n;
    fill(bias, residual, y, n);
    let spread = match m {
        1 => narrow(x).and_then(|x| Spread::new(x, weight.elements)),
        _ => None,
    };
    let x = Mat::contiguous(x, m, k);
    let strips: Vec<_> = MatMut::contiguous(y, m, n)
        .split_columns(WIDTH)
        .into_iter()
        .enumerate()
        .collect();
    parallel::items(strips, nanoseconds(2 * m * n * k), |(i, mut y)| {
        let first = rows.start + i * WIDTH;
        let strip = first..first + y.column_count();
        if m <= FEW_ROWS {
            return few_rows(x, weight, strip, &mut y, m, spread.as_ref());
        }
        let depth = DEPTH.min(k);
        with_tile((WIDTH + strip.len()) * depth, |memory| {
            let (panel, tile) = memory.split_at_mut(WIDTH * depth);
            for start in (0..k).step_by(depth) {
                let part = start..(start + depth).min(k);
                if let Elements::Own(w) = weight.elements {
                    transpose(
                        &w[strip.start * k + part.start..],
                        strip.len(),
                        part.len(),
                        k,
                        panel,
                    );
                } else {
                    let tile = &mut tile[..strip.len() * part.len()];
                    weight.decode(strip.clone(), part.clone(), tile);
                    transpose(tile, strip.len(), part.len(), part.len(), panel);
                }
                let w = Mat::new(panel, part.len(), strip.len(), WIDTH);
                gemm(T::ONE, x.columns(part), w, T::ONE, &mut y);
            }
        });
    });
}

/// The few-rows case of [`forward`]: each weight row is decoded once and multiplied with every row of `x`; with the only row in
/// registers, where that can be.
fn few_rows<T: Real>(
    x: Mat<'_, T>,
    weight: Weight<'_, T>,
    strip: Range<usize>,
    y: &mut MatMut<'_, T>,
    m: usize,
    spread: Option<&Spread>,
) {
    const CHUNK: usize = 4096;
    let k = weight.columns;
    with_tile(CHUNK.min(k), |tile| {
        for (column, row) in strip.enumerate() {
            for start in (0..k).step_by(CHUNK) {
                let part = start..(start + CHUNK).min(k);
                if let (Some(spread), Elements::Codes4(w)) = (spread, weight.elements) {
                    let first = (row * k + part.start) / crate::quant::BLOCK;
                    y.row(0)[column] += T::of_f32(spread.dot(part, &w, first));
                    continue;
                }
                let tile = &mut tile[..part.len()];
                let w: &[T] = match weight.elements {
                    Elements::Own(w) => &w[row * k + part.start..row * k + part.end],
                    _ => {
                        weight.decode(row..row + 1, part.clone(), tile);
                        tile
                    }
                };
                for i in 0..m {
                    y.row(i)[column] += product(x.row(i, part.clone()), w);
                }
            }
        }
    });
}

/// `x` itself, if the compute type is f32.
fn narrow<T: Real>(x: &[T]) -> Option<&[f32]> {
    bytemuck::try_cast_slice(x)
        .ok()
        .filter(|_| T::DTYPE == DType::F32)
}

fn product<T: Real>(x: &[T], w: &[T]) -> T {
    match (narrow(x), narrow(w)) {
        (Some(x), Some(w)) => T::of_f32(dot::dense(x, w)),
        _ => vectorized(
            #[inline(always)]
            || sum2(x, w, |a, b| a * b),
        ),
    }
}

/// `dx [M, K] = dy [M, N] W + alpha * residual`, for weight rows `rows` (N of them).
pub fn backward_input<T: Real>(
    dy: &[T],
    weight: Weight<'_, T>,
    rows: Range<usize>,
    residual: Option<(T, &[T])>,
    dx: &mut [T],
) {
    let (n, k) = (rows.len(), weight.columns);
    let m = dx.len() / k.max(1);
    fill(None, residual, dx, k);
    accumulate_input(dy, weight, rows, n, m, dx);
}

/// `dx [M, K] += dy [M, N] W`.
pub fn accumulate_input<T: Real>(
    dy: &[T],
    weight: Weight<'_, T>,
    rows: Range<usize>,
    n: usize,
    m: usize,
    dx: &mut [T],
) {
    let k = weight.columns;
    let dy = Mat::contiguous(dy, m, n);
    // Wide weights are read a kilobyte at a time: shorter pieces of far-apart rows would wait for memory.
    let width = if k >= 16 * WIDTH { 4 * WIDTH } else { WIDTH };
    let depth = (DEPTH * WIDTH / width).min(n).max(1);
    let strips: Vec<_> = MatMut::contiguous(dx, m, k)
        .split_columns(width)
        .into_iter()
        .enumerate()
        .collect();
    parallel::items(strips, nanoseconds(2 * m * n * k), |(i, mut dx)| {
        let strip = i * width..i * width + dx.column_count();
        with_tile(strip.len() * depth, |tile| {
            for start in (0..n).step_by(depth) {
                let part = start..(start + depth).min(n);
                let tile = &mut tile[..strip.len() * part.len()];
                weight.decode(
                    rows.start + part.start..rows.start + part.end,
                    strip.clone(),
                    tile,
                );
                let tile = Mat::contiguous(tile, part.len(), strip.len());
                for from in (0..strip.len()).step_by(WIDTH) {
                    let panel = from..(from + WIDTH).min(strip.len());
                    let w = tile.columns(panel.clone());
                    gemm(
                        T::ONE,
                        dy.columns(part.clone()),
                        w,
                        T::ONE,
                        &mut dx.columns(panel),
                    );
                }
            }
        });
    });
}

/// `c [M, N] = alpha * op(a) op(b) + beta * c` for contiguous row-major operands; `op` transposes when its flag is set.
pub fn matmul<T: Real>(
    alpha: T,
    (a, transpose_a): (&[T], bool),
    (b, transpose_b): (&[T], bool),
    beta: T,
    c: &mut [T],
    (m, n, k): (usize, usize, usize),
) {
    let a = if transpose_a {
        Mat::contiguous(a, k, m).t()
    } else {
        Mat::contiguous(a, m, k)
    };
    let b = if transpose_b {
        Mat::contiguous(b, n, k).t()
    } else {
        Mat::contiguous(b, k, n)
    };
    let strips: Vec<_> = MatMut::contiguous(c, m, n)
        .split_columns(WIDTH)
        .into_iter()
        .enumerate()
        .collect();
    parallel::items(strips, nanoseconds(2 * m * n * k), |(i, mut c)| {
        let strip = i * WIDTH..i * WIDTH + c.column_count();
        let b = b.columns(strip.clone());
        if m < 2 * FEW_ROWS {
            return gemm(alpha, a, b, beta, &mut c);
        }
        let depth = DEPTH.min(k).max(1);
        with_tile(WIDTH * depth, |panel| {
            let mut beta = beta;
            for start in (0..k.max(1)).step_by(depth) {
                let part = start..(start + depth).min(k);
                b.rows(part.clone()).copy_to_panel(panel);
                let b = Mat::new(panel, part.len(), strip.len(), WIDTH);
                gemm(alpha, a.columns(part), b, beta, &mut c);
                beta = T::ONE;
            }
        });
    });
}

/// `db [N] += Σ_m dy [M, N]`: the gradient of a bias.
pub fn accumulate_column_sums<T: Real>(dy: &[T], n: usize, db: &mut [T]) {
    const STRIP: usize = 256;
    let m = dy.len() / n.max(1);
    parallel::rows(db, 1, m / 4, |first, db| {
        for start in (0..db.len()).step_by(STRIP) {
            let width = STRIP.min(db.len() - start);
            let db = &mut db[start..start + width];
            for row in dy.chunks_exact(n) {
                for (db, &dy) in db.iter_mut().zip(&row[first + start..]) {
                    *db += dy;
                }
            }
        }
    });
}
