//! Singular value decompositions, exact and of low rank; the only door to nalgebra.

use nalgebra::DMatrix;

use crate::error::{Error, Result};
use crate::ops;
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

/// `U diag(s) Vᵀ`, the largest singular values first.
#[derive(Debug, Clone)]
pub struct Factors {
    /// `U [m, r]`, its columns orthonormal, F32 (F64 of [`product_svd`]).
    pub u: Tensor,
    /// The singular values, descending.
    pub s: Vec<f64>,
    /// `Vᵀ [r, n]`, its rows orthonormal, as U.
    pub vt: Tensor,
}

/// A row-major F32 tensor as a matrix in f64.
fn matrix(tensor: &Tensor) -> DMatrix<f64> {
    let (m, n) = tensor.shape().rows_and_columns();
    let values = tensor.as_slice::<f32>().iter().map(|&x| f64::from(x));
    DMatrix::from_row_iterator(m, n, values)
}

fn tensor(matrix: &DMatrix<f64>) -> Tensor {
    let (m, n) = matrix.shape();
    let values: Vec<f32> = (0..m * n).map(|i| matrix[(i / n, i % n)] as f32).collect();
    Tensor::from_slice(&values, [m, n])
}

fn check(operation: &'static str, w: &Tensor, rank: usize) -> Result<()> {
    let (m, n) = w.shape().rows_and_columns();
    if w.dtype() == DType::F32 && (1..=m.min(n)).contains(&rank) {
        return Ok(());
    }
    Err(Error::Shape {
        operation,
        found: format!("rank {rank} of {} {}", w.dtype(), w.shape()),
        expected: "a rank from 1 to the lesser extent, of float32".into(),
    })
}

/// Up to this lesser extent a matrix is decomposed directly: ten times the work, at which nobody looks yet.
const DIRECT: usize = 256;
/// Singular values below this part of the largest are not taken from the squares, of which f64 keeps 16 digits.
const SQUARABLE: f64 = 1e-5;

/// The `rank` largest singular triples of `w [m, n]` (F32, on the host), in f64.
///
/// Larger matrices go by the eigenvectors of `op(W)ᵀ op(W)`, a square of the lesser extent: a singular value `s_i` is then
/// off by about `1e-16 s_1² / s_i`, far less than F32 shows, in a tenth of the time. A linear of ChatGLM-6B takes minutes on
/// one core; [`low_rank`] takes a second.
///
/// # Errors
/// The rank is 0 or above the lesser extent; a number is not finite.
pub fn svd(w: &Tensor, rank: usize) -> Result<Factors> {
    check("svd", w, rank)?;
    let (m, n) = w.shape().rows_and_columns();
    if m.min(n) > DIRECT
        && let Some(factors) = by_squares(w, rank)?
    {
        return Ok(factors);
    }
    decompose(matrix(w), rank)
}

/// [`svd`] by eigenvectors, or nothing where it would lose digits.
fn by_squares(w: &Tensor, rank: usize) -> Result<Option<Factors>> {
    let (m, n) = w.shape().rows_and_columns();
    let (wide, least) = (m < n, m.min(n));
    let w = w.to_dtype(DType::F64);
    let mut square = Tensor::zeros(DType::F64, [least, least]);
    ops::matmul(1.0, (&w, !wide), (&w, wide), 0.0, &mut square)?;
    let square = DMatrix::from_row_slice(least, least, square.as_slice::<f64>());
    if square.iter().any(|x| !x.is_finite()) {
        return Ok(None);
    }
    let eigen = square.symmetric_eigen();
    let mut order: Vec<usize> = (0..least).collect();
    order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
    let s: Vec<f64> = order
        .iter()
        .take(rank)
        .map(|&i| eigen.eigenvalues[i].max(0.0).sqrt())
        .collect();
    if s[rank - 1] <= SQUARABLE * s[0] {
        return Ok(None);
    }
    // The side of the lesser extent, as columns; the other one is what W makes of it.
    let near: Vec<f64> = (0..least * rank)
        .map(|i| eigen.eigenvectors[(i / rank, order[i % rank])])
        .collect();
    let near = Tensor::from_slice(&near, [least, rank]);
    let mut far = Tensor::zeros(DType::F64, [m.max(n), rank]);
    ops::matmul(1.0, (&w, wide), (&near, false), 0.0, &mut far)?;
    for row in far.as_mut_slice::<f64>().chunks_exact_mut(rank) {
        row.iter_mut().zip(&s).for_each(|(x, s)| *x /= s);
    }
    let (u, v) = if wide { (near, far) } else { (far, near) };
    let (extent, v) = (v.extent(0), v.as_slice::<f64>());
    let vt: Vec<f64> = (0..rank * extent)
        .map(|i| v[i % extent * rank + i / extent])
        .collect();
    Ok(Some(Factors {
        u: u.to_dtype(DType::F32),
        s,
        vt: Tensor::from_slice(&vt, [rank, extent]).to_dtype(DType::F32),
    }))
}

fn decompose(w: DMatrix<f64>, rank: usize) -> Result<Factors> {
    let (u, mut s, vt) = svd_of(w)?;
    s.truncate(rank);
    Ok(Factors {
        u: tensor(&u.columns(0, rank).into_owned()),
        s,
        vt: tensor(&vt.rows(0, rank).into_owned()),
    })
}

/// About the `rank` largest singular triples of `w [m, n]`, by a random start from `stream` and `iterations` subspace
/// iterations: see [`low_rank_from`].
///
/// # Errors
/// As [`low_rank_from`].
pub fn low_rank(w: &Tensor, rank: usize, iterations: usize, stream: Stream) -> Result<Factors> {
    let (m, n) = w.shape().rows_and_columns();
    let least = m.min(n);
    let sketch: Vec<f32> = (0..(least * rank) as u64).map(|i| stream.normal(i)).collect();
    low_rank_from(w, &Tensor::from_slice(&sketch, [least, rank]), iterations)
}

/// About the `rank` largest singular triples of `w [m, n]` (F32, on the host), from the start `sketch [min(m, n), rank]`.
///
/// Halko, Martinsson and Tropp (2009), algorithms 4.4 and 5.1, without oversampling, as `torch.svd_lowrank`: with `m >= n`,
/// else on the transpose, `Q = orth(W sketch)`, then `iterations` times `Q = orth(W orth(Wᵀ Q))`; the decomposition is that
/// of the small matrix `Qᵀ W`. Each iteration shrinks what lies outside of the wanted subspace by the square of the ratio of
/// the neighbouring singular values.
///
/// # Errors
/// The rank is 0 or above the lesser extent; `w` is not finite.
pub fn low_rank_from(w: &Tensor, sketch: &Tensor, iterations: usize) -> Result<Factors> {
    let (m, n) = w.shape().rows_and_columns();
    let rank = sketch.shape().rows_and_columns().1;
    check("low_rank", w, rank)?;
    let wide = m < n;
    // op(W) x, with op the transpose if the matrix is wide, and back.
    let times = |x: &Tensor, back: bool| -> Result<Tensor> {
        let mut y = Tensor::zeros(DType::F32, [if wide != back { n } else { m }, rank]);
        ops::matmul(1.0, (w, wide != back), (x, false), 0.0, &mut y)?;
        Ok(y)
    };
    let orthonormal = |x: Tensor| tensor(&matrix(&x).qr().q());
    let mut q = orthonormal(times(sketch, false)?);
    for _ in 0..iterations {
        q = orthonormal(times(&orthonormal(times(&q, true)?), false)?);
    }
    // (Qᵀ op(W))ᵀ, tall as well.
    let small = decompose(matrix(&times(&q, true)?), rank)?;
    let mut left = Tensor::zeros(DType::F32, [q.extent(0), rank]);
    ops::matmul(1.0, (&q, false), (&small.vt, true), 0.0, &mut left)?;
    let transposed = |x: &Tensor| tensor(&matrix(x).transpose());
    let (u, vt) = if wide {
        (small.u, transposed(&left))
    } else {
        (left, transposed(&small.u))
    };
    Ok(Factors { u, s: small.s, vt })
}

/// One of the terms `s B A` of a sum: its scale, `B [m, r]` and `A [r, n]`, F32 on the host.
pub type Term<'a> = (f64, &'a Tensor, &'a Tensor);

/// The factors of the sum of `terms`: `[s₁ B₁, s₂ B₂, ..] [m, R]` and `[A₁; A₂; ..]ᵀ [n, R]`, with R the sum of the ranks.
fn stacked(terms: &[Term]) -> Result<(DMatrix<f64>, DMatrix<f64>)> {
    let extents = |&(_, b, a): &Term| (b.extent(0), a.extent(1));
    let Some((m, n)) = terms.first().map(extents) else {
        return Err(Error::Shape {
            operation: "sum of products",
            found: "no product".into(),
            expected: "at least one".into(),
        });
    };
    let total: usize = terms.iter().map(|(_, b, _)| b.extent(1)).sum();
    let (mut left, mut right) = (DMatrix::zeros(m, total), DMatrix::zeros(n, total));
    let mut from = 0;
    for term in terms {
        let &(scale, b, a) = term;
        let r = b.extent(1);
        if extents(term) != (m, n) || a.extent(0) != r || b.dtype() != DType::F32 || a.dtype() != DType::F32 {
            return Err(Error::Shape {
                operation: "sum of products",
                found: format!("{} {} and {} {}", b.dtype(), b.shape(), a.dtype(), a.shape()),
                expected: format!("float32 [{m}, r] and [r, {n}], as the first one"),
            });
        }
        left.columns_mut(from, r).copy_from(&(matrix(b) * scale));
        right.columns_mut(from, r).copy_from(&matrix(a).transpose());
        from += r;
    }
    Ok((left, right))
}

/// A singular value decomposition of `sum s B A`, without the sum ever being made: with thin QR decompositions of the stacked factors,
/// `left = Q R` and `right = P S`, it is `Q (U D Vᵀ) Pᵀ` where `U D Vᵀ` is that of the core `R Sᵀ`. O((m + n) R² + R³), all in
/// f64, so that even the difference of two nearly equal products has all its digits. `u` and `vt` are in F64; there are
/// `min(m, n, R)` triples.
///
/// # Errors
/// No term; shapes do not fit; a number is not finite.
pub fn product_svd(terms: &[Term]) -> Result<Factors> {
    let (left, right) = stacked(terms)?;
    let (left, right) = (left.qr(), right.qr());
    let (u, s, vt) = svd_of(left.r() * right.r().transpose())?;
    let wide = |matrix: DMatrix<f64>| {
        let (m, n) = matrix.shape();
        // nalgebra's matrices lie column by column.
        Tensor::from_slice(matrix.transpose().as_slice(), [m, n])
    };
    Ok(Factors {
        u: wide(left.q() * u),
        s,
        vt: wide(vt * right.q().transpose()),
    })
}

/// The singular values of `sum s B A`, descending, and so its norms: see [`product_svd`].
///
/// # Errors
/// As [`product_svd`].
pub fn product_spectrum(terms: &[Term]) -> Result<Vec<f64>> {
    let (left, right) = stacked(terms)?;
    Ok(svd_of(left.qr().r() * right.qr().r().transpose())?.1)
}

/// The Frobenius product `<s B A, s' B' A'> = s s' tr((Bᵀ B') (A' Aᵀ))`, by way of two matrices of the ranks' size.
///
/// # Errors
/// Shapes do not fit.
pub fn product_inner(x: Term, y: Term) -> Result<f64> {
    stacked(&[x, y])?;
    let left = matrix(x.1).tr_mul(&matrix(y.1));
    let right = matrix(x.2) * matrix(y.2).transpose();
    Ok(x.0 * y.0 * left.dot(&right))
}

type Triples = (DMatrix<f64>, Vec<f64>, DMatrix<f64>);

fn svd_of(w: DMatrix<f64>) -> Result<Triples> {
    let (m, n) = w.shape();
    let diverged = || Error::Shape {
        operation: "svd",
        found: format!("a matrix [{m}, {n}] whose singular values cannot be found"),
        expected: "finite numbers".into(),
    };
    if w.iter().any(|x| !x.is_finite()) {
        return Err(diverged());
    }
    let svd = w.try_svd(true, true, f64::EPSILON, 0).ok_or_else(diverged)?;
    match (svd.u, svd.v_t) {
        (Some(u), Some(vt)) => Ok((u, svd.singular_values.iter().copied().collect(), vt)),
        _ => Err(diverged()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: [usize; 2], seed: u64) -> Tensor {
        let stream = Stream::new(seed, 0);
        let values: Vec<f32> = (0..(shape[0] * shape[1]) as u64)
            .map(|i| stream.normal(i))
            .collect();
        Tensor::from_slice(&values, shape)
    }

    fn product(f: &Factors) -> DMatrix<f64> {
        let s = DMatrix::from_diagonal(&nalgebra::DVector::from_vec(f.s.clone()));
        matrix(&f.u) * s * matrix(&f.vt)
    }

    /// A matrix with the singular values `0.5^i`, i < 12.
    fn decaying(m: usize, n: usize) -> Tensor {
        let (u, v) = (
            matrix(&random([m, 12], 1)).qr().q(),
            matrix(&random([n, 12], 2)).qr().q(),
        );
        let s = nalgebra::DVector::from_fn(12, |i, _| 0.5f64.powi(i as i32));
        tensor(&(u * DMatrix::from_diagonal(&s) * v.transpose()))
    }

    #[test]
    fn a_whole_decomposition_gives_the_matrix_back() {
        for (m, n) in [(5, 5), (17, 6), (6, 17), (1, 4)] {
            let w = random([m, n], 3);
            let f = svd(&w, m.min(n)).unwrap();
            assert!((product(&f) - matrix(&w)).norm() < 1e-5, "{m} x {n}");
            assert!(f.s.is_sorted_by(|a, b| a >= b), "{:?}", f.s);
        }
    }

    #[test]
    fn a_large_matrix_is_decomposed_as_a_small_one() {
        for (m, n) in [(DIRECT + 9, DIRECT + 3), (DIRECT + 1, DIRECT + 40)] {
            let w = random([m, n], 4);
            let (by_squares, direct) = (svd(&w, 5).unwrap(), decompose(matrix(&w), 5).unwrap());
            assert!(
                (product(&by_squares) - product(&direct)).norm() < 1e-4,
                "{m} x {n}"
            );
            let off = by_squares
                .s
                .iter()
                .zip(&direct.s)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f64::max);
            assert!(off < 1e-10, "{off}");
            // Of a matrix of rank 12 the 13th triple is noise: the direct way is taken.
            let poor = svd(&decaying(m, n), 13).unwrap();
            assert!(poor.s[12] < 1e-6 && (product(&poor) - matrix(&decaying(m, n))).norm() < 1e-5);
        }
    }

    #[test]
    fn iterations_find_the_subspace_that_the_exact_decomposition_has() {
        for (m, n) in [(40, 25), (25, 40)] {
            let w = decaying(m, n);
            let exact = svd(&w, 4).unwrap();
            let best = (product(&exact) - matrix(&w)).norm();
            assert!((best - (0..8).map(|i| 0.25f64.powi(4 + i)).sum::<f64>().sqrt()).abs() < 1e-6);
            let f = low_rank(&w, 4, 8, Stream::new(5, 5)).unwrap();
            assert!((product(&f) - product(&exact)).norm() < 1e-5, "{m} x {n}");
            // Without iterations it is worse, but not by much.
            let rough = low_rank(&w, 4, 0, Stream::new(5, 5)).unwrap();
            let off = (product(&rough) - matrix(&w)).norm();
            assert!(off > 1.01 * best && off < 10.0 * best, "{off} {best}");
        }
    }

    #[test]
    fn a_sum_of_products_has_the_singular_values_of_the_dense_one() {
        let sizes = [(19, 11, [2, 3]), (7, 30, [4, 6]), (6, 5, [4, 4])];
        for (m, n, ranks) in sizes {
            let factors: Vec<(f64, Tensor, Tensor)> = ranks
                .iter()
                .zip([0.5, -2.0])
                .enumerate()
                .map(|(i, (&r, s))| (s, random([m, r], 20 + i as u64), random([r, n], 30 + i as u64)))
                .collect();
            let terms: Vec<Term> = factors.iter().map(|(s, b, a)| (*s, b, a)).collect();
            let dense = terms.iter().fold(DMatrix::zeros(m, n), |sum, (s, b, a)| {
                sum + matrix(b) * matrix(a) * *s
            });
            let want = dense.clone().svd(false, false).singular_values;
            let f = product_svd(&terms).unwrap();
            let k = m.min(n).min(ranks.iter().sum());
            assert_eq!((f.s.len(), f.u.extent(1), f.vt.extent(0)), (k, k, k));
            for (got, want) in f.s.iter().zip(want.iter()) {
                assert!((got - want).abs() < 1e-12, "{m} x {n}: {got} {want}");
            }
            assert_eq!(product_spectrum(&terms).unwrap(), f.s);
            let wide = |t: &Tensor| {
                let (m, n) = t.shape().rows_and_columns();
                DMatrix::from_row_slice(m, n, t.as_slice::<f64>())
            };
            let s = DMatrix::from_diagonal(&nalgebra::DVector::from_vec(f.s.clone()));
            assert!((wide(&f.u) * s * wide(&f.vt) - dense).norm() < 1e-12);
            let inner = product_inner(terms[0], terms[1]).unwrap();
            let each = |i: usize| matrix(terms[i].1) * matrix(terms[i].2) * terms[i].0;
            assert!((inner - each(0).dot(&each(1))).abs() < 1e-11);
            // What is left of a product less itself is the rounding of f64.
            let (s, b, a) = terms[0];
            assert!(product_spectrum(&[(s, b, a), (-s, b, a)]).unwrap()[0] < 1e-13);
        }
        let (b, a) = (random([4, 2], 1), random([3, 5], 2));
        assert!(product_svd(&[(1.0, &b, &a)]).is_err() && product_svd(&[]).is_err());
    }

    #[test]
    fn what_cannot_be_decomposed_is_refused() {
        let mut w = random([4, 3], 1);
        assert!(svd(&w, 4).is_err() && svd(&w, 0).is_err());
        w.as_mut_slice::<f32>()[5] = f32::NAN;
        assert!(svd(&w, 1).is_err() && low_rank(&w, 1, 1, Stream::new(0, 0)).is_err());
    }
}
