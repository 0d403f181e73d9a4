//! Panels: pieces of a matrix copied so that the matrix product reads them in order.
//!
//! The product's inner loop wants its right-hand side as rows of [`WIDTH`] neighbouring outputs. A weight `[out, in]` is
//! stored the other way round, so its pieces are transposed here, in registers; left to the `gemm` crate, this packing
//! took a third of the time of a training step.

use super::real::Real;
use crate::tensor::DType;

/// Columns of a panel: the widest tile of the `gemm` crate's kernels (4 vectors of 16 f32).
pub const WIDTH: usize = 64;

/// `dst[c * WIDTH + r] = src[r * stride + c]` for `rows <= WIDTH` rows of `columns`; the rest of each `dst` row is left.
pub fn transpose<T: Real>(src: &[T], rows: usize, columns: usize, stride: usize, dst: &mut [T]) {
    assert!(rows <= WIDTH && (rows == 0 || (rows - 1) * stride + columns <= src.len()));
    assert!(columns * WIDTH <= dst.len());
    if T::DTYPE == DType::F32
        && let (Ok(src), Ok(dst)) = (bytemuck::try_cast_slice(src), bytemuck::try_cast_slice_mut(dst))
    {
        return transpose_f32(src, rows, columns, stride, dst);
    }
    scalar(src, 0..rows, 0..columns, stride, dst);
}

fn scalar<T: Copy>(
    src: &[T],
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    stride: usize,
    dst: &mut [T],
) {
    for r in rows {
        let row = &src[r * stride..][..columns.end];
        for c in columns.clone() {
            dst[c * WIDTH + r] = row[c];
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn transpose_f32(src: &[f32], rows: usize, columns: usize, stride: usize, dst: &mut [f32]) {
    scalar(src, 0..rows, 0..columns, stride, dst);
}

#[cfg(target_arch = "x86_64")]
fn transpose_f32(src: &[f32], rows: usize, columns: usize, stride: usize, dst: &mut [f32]) {
    use pulp::x86::{V3, V4};
    let edge = match (V4::try_new(), V3::try_new()) {
        (Some(simd), _) => {
            simd.vectorize(
                #[inline(always)]
                || blocks::<16>(src, rows, columns, stride, dst, |block| transpose_16(simd, block)),
            );
            16
        }
        (None, Some(simd)) => {
            simd.vectorize(
                #[inline(always)]
                || blocks::<8>(src, rows, columns, stride, dst, |block| transpose_8(simd, block)),
            );
            8
        }
        (None, None) => return scalar(src, 0..rows, 0..columns, stride, dst),
    };
    let (whole_rows, whole_columns) = (rows / edge * edge, columns / edge * edge);
    scalar(src, 0..whole_rows, whole_columns..columns, stride, dst);
    scalar(src, whole_rows..rows, 0..columns, stride, dst);
}

/// Transposes every whole `N x N` block with `turn`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn blocks<const N: usize>(
    src: &[f32],
    rows: usize,
    columns: usize,
    stride: usize,
    dst: &mut [f32],
    turn: impl Fn(&mut [[f32; N]; N]),
) {
    for r in (0..rows / N * N).step_by(N) {
        for c in (0..columns / N * N).step_by(N) {
            let mut block = [[0.0; N]; N];
            for (i, row) in block.iter_mut().enumerate() {
                row.copy_from_slice(&src[(r + i) * stride + c..][..N]);
            }
            turn(&mut block);
            for (i, row) in block.iter().enumerate() {
                dst[(c + i) * WIDTH + r..][..N].copy_from_slice(row);
            }
        }
    }
}

/// 16 x 16 in four rounds of shuffles: pairs of elements, pairs of pairs, then 128-bit lanes twice.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose_16(simd: pulp::x86::V4, block: &mut [[f32; 16]; 16]) {
    use std::arch::x86_64::__m512;
    let f = simd.avx512f;
    let low_pd =
        |a, b| f._mm512_castpd_ps(f._mm512_unpacklo_pd(f._mm512_castps_pd(a), f._mm512_castps_pd(b)));
    let high_pd =
        |a, b| f._mm512_castpd_ps(f._mm512_unpackhi_pd(f._mm512_castps_pd(a), f._mm512_castps_pd(b)));
    let r: [__m512; 16] = pulp::cast(*block);
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = f._mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = f._mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    // u[4 i + j]: column 4 g + j of rows 4 i .. 4 i + 4, in lane g.
    let mut u = t;
    for i in 0..4 {
        u[4 * i] = low_pd(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = high_pd(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = low_pd(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = high_pd(t[4 * i + 1], t[4 * i + 3]);
    }
    for j in 0..4 {
        // Lanes 0 and 2, then lanes 1 and 3, of two registers.
        t[j] = f._mm512_shuffle_f32x4::<0x88>(u[j], u[j + 4]);
        t[j + 4] = f._mm512_shuffle_f32x4::<0xdd>(u[j], u[j + 4]);
        t[j + 8] = f._mm512_shuffle_f32x4::<0x88>(u[j + 8], u[j + 12]);
        t[j + 12] = f._mm512_shuffle_f32x4::<0xdd>(u[j + 8], u[j + 12]);
    }
    for j in 0..8 {
        u[j] = f._mm512_shuffle_f32x4::<0x88>(t[j], t[j + 8]);
        u[j + 8] = f._mm512_shuffle_f32x4::<0xdd>(t[j], t[j + 8]);
    }
    *block = pulp::cast(u);
}

/// 8 x 8 in three rounds of shuffles.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose_8(simd: pulp::x86::V3, block: &mut [[f32; 8]; 8]) {
    use std::arch::x86_64::__m256;
    let f = simd.avx;
    let r: [__m256; 8] = pulp::cast(*block);
    let mut t = r;
    for i in 0..4 {
        t[2 * i] = f._mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = f._mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let mut u = t;
    for i in 0..2 {
        u[4 * i] = f._mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
        u[4 * i + 1] = f._mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
        u[4 * i + 2] = f._mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
        u[4 * i + 3] = f._mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
    }
    for j in 0..4 {
        t[j] = f._mm256_permute2f128_ps::<0x20>(u[j], u[j + 4]);
        t[j + 4] = f._mm256_permute2f128_ps::<0x31>(u[j], u[j + 4]);
    }
    *block = pulp::cast(t);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check<T: Real>(rows: usize, columns: usize, stride: usize) {
        let src: Vec<T> = (0..64 * stride).map(|i| T::of(i as f64)).collect();
        let mut dst = vec![T::of(-1.0); columns * WIDTH];
        transpose(&src, rows, columns, stride, &mut dst);
        for c in 0..columns {
            for r in 0..WIDTH {
                let want = if r < rows {
                    src[r * stride + c]
                } else {
                    T::of(-1.0)
                };
                assert!(dst[c * WIDTH + r] == want, "{rows} x {columns} at ({r}, {c})");
            }
        }
    }

    #[test]
    fn every_size_around_the_blocks_is_transposed() {
        for rows in [0, 1, 7, 8, 15, 16, 17, 48, 63, 64] {
            for columns in [1, 8, 15, 16, 31, 33, 100] {
                check::<f32>(rows, columns, columns + 3);
                check::<f64>(rows, columns, columns);
            }
        }
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn both_vector_widths_transpose_whole_blocks() {
        if let Some(simd) = pulp::x86::V3::try_new() {
            let mut block: [[f32; 8]; 8] =
                std::array::from_fn(|i| std::array::from_fn(|j| (8 * i + j) as f32));
            transpose_8(simd, &mut block);
            assert!((0..64).all(|e| block[e % 8][e / 8] == e as f32));
        }
        if let Some(simd) = pulp::x86::V4::try_new() {
            let mut block: [[f32; 16]; 16] =
                std::array::from_fn(|i| std::array::from_fn(|j| (16 * i + j) as f32));
            transpose_16(simd, &mut block);
            assert!((0..256).all(|e| block[e % 16][e / 16] == e as f32));
        }
    }
}
