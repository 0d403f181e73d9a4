//! Rows of matrices by number.

use super::parallel;
use super::real::Real;
use super::weight::Weight;

/// `y[i] = weight[ids[i]]`.
pub fn gather<T: Real>(weight: Weight<'_, T>, ids: &[i32], y: &mut [T]) {
    let n = weight.columns;
    parallel::rows(y, n, n / 4, |first, rows| {
        for (row, &id) in rows.chunks_exact_mut(n).zip(&ids[first..]) {
            weight.decode(id as usize..id as usize + 1, 0..n, row);
        }
    });
}

/// `y[i] = convert(w[ids[i]])`, rows of `n`.
pub fn gather_converted<S: Copy + Sync, D: Send>(
    w: &[S],
    ids: &[i32],
    n: usize,
    y: &mut [D],
    convert: impl Fn(S) -> D + Sync,
) {
    parallel::rows(y, n, n / 4, |first, rows| {
        for (row, &id) in rows.chunks_exact_mut(n).zip(&ids[first..]) {
            for (y, &w) in row.iter_mut().zip(&w[id as usize * n..][..n]) {
                *y = convert(w);
            }
        }
    });
}

/// `dweight[ids[i]] += dy[i]`, in order.
pub fn scatter_add<T: Real>(dy: &[T], ids: &[i32], n: usize, dweight: &mut [T]) {
    for (dy, &id) in dy.chunks_exact(n).zip(ids) {
        for (dw, &dy) in dweight[id as usize * n..][..n].iter_mut().zip(dy) {
            *dw += dy;
        }
    }
}

/// `y[i] = x[rows[i]]`.
pub fn gather_rows<T: Real>(x: &[T], rows: &[i32], n: usize, y: &mut [T]) {
    for (y, &row) in y.chunks_exact_mut(n).zip(rows) {
        y.copy_from_slice(&x[row as usize * n..][..n]);
    }
}

/// `y = 0`, then `y[rows[i]] = x[i]`; `rows` are distinct.
pub fn scatter_rows<T: Real>(x: &[T], rows: &[i32], n: usize, y: &mut [T]) {
    y.fill(T::ZERO);
    for (x, &row) in x.chunks_exact(n).zip(rows) {
        y[row as usize * n..][..n].copy_from_slice(x);
    }
}
