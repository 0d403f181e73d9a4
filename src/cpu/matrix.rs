//! Strided matrices over slices, and their product through the `gemm` crate: the only pointers on the CPU side.

use std::marker::PhantomData;
use std::ops::Range;

use super::panel::{WIDTH, transpose};
use super::real::Real;

/// A read-only matrix: element `(i, j)` is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

/// The number of elements from the first to the last of a strided matrix, both included.
fn span(rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> usize {
    if rows == 0 || columns == 0 {
        0
    } else {
        (rows - 1) * row_stride + (columns - 1) * column_stride + 1
    }
}

impl<'a, T> Mat<'a, T> {
    /// `rows x columns` elements whose rows start `row_stride` apart. Panics when they do not lie inside `data`.
    pub fn new(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(
            span(rows, columns, row_stride, 1) <= data.len(),
            "matrix outside its data"
        );
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    /// A contiguous row-major matrix.
    pub fn contiguous(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self::new(data, rows, columns, columns)
    }

    /// The transposed matrix, by strides.
    pub fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// The number of columns.
    pub fn column_count(&self) -> usize {
        self.columns
    }

    /// Copies the matrix into rows of [`WIDTH`], of which it takes the first columns.
    pub fn copy_to_panel(&self, panel: &mut [T])
    where
        T: Real,
    {
        assert!(self.columns <= WIDTH && self.rows * WIDTH <= panel.len());
        if self.column_stride == 1 {
            for (i, row) in panel.chunks_exact_mut(WIDTH).take(self.rows).enumerate() {
                row[..self.columns].copy_from_slice(&self.data[i * self.row_stride..][..self.columns]);
            }
        } else {
            assert_eq!(self.row_stride, 1, "one of the strides is 1");
            transpose(self.data, self.columns, self.rows, self.column_stride, panel);
        }
    }

    /// Elements `range` of row `i`. Panics when rows are not contiguous.
    pub fn row(&self, i: usize, range: Range<usize>) -> &'a [T] {
        assert!(i < self.rows && range.end <= self.columns && self.column_stride == 1);
        &self.data[i * self.row_stride..][range]
    }

    /// Rows `range` only.
    pub fn rows(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.rows);
        let start = (range.start * self.row_stride).min(self.data.len());
        Self {
            data: &self.data[start..],
            rows: range.len(),
            ..self
        }
    }

    /// Columns `range` only.
    pub fn columns(self, range: Range<usize>) -> Self {
        self.t().rows(range).t()
    }
}

/// A matrix to write, with contiguous rows.
pub struct MatMut<'a, T> {
    data: *mut T,
    rows: usize,
    columns: usize,
    row_stride: usize,
    borrow: PhantomData<&'a mut T>,
}

// SAFETY: a `MatMut` is an exclusive borrow of its elements, like `&mut [T]`; `split_columns` keeps pieces disjoint.
unsafe impl<T: Send> Send for MatMut<'_, T> {}

impl<'a, T> MatMut<'a, T> {
    /// `rows x columns` elements whose rows start `row_stride` apart. Panics when they overlap or leave `data`.
    pub fn new(data: &'a mut [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(columns <= row_stride || rows <= 1, "rows overlap");
        assert!(
            span(rows, columns, row_stride, 1) <= data.len(),
            "matrix outside its data"
        );
        Self {
            data: data.as_mut_ptr(),
            rows,
            columns,
            row_stride,
            borrow: PhantomData,
        }
    }

    /// A contiguous row-major matrix.
    pub fn contiguous(data: &'a mut [T], rows: usize, columns: usize) -> Self {
        Self::new(data, rows, columns, columns)
    }

    /// The number of columns.
    pub fn column_count(&self) -> usize {
        self.columns
    }

    /// Row `i`.
    pub fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows);
        // SAFETY: `new` checked that row `i < rows` with `columns` elements lies inside the borrowed data, and the
        // matrix is borrowed exclusively by `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.data.wrapping_add(i * self.row_stride), self.columns) }
    }

    /// Rows `range`, borrowed again.
    pub fn rows(&mut self, range: Range<usize>) -> MatMut<'_, T> {
        assert!(range.start <= range.end && range.end <= self.rows);
        MatMut {
            data: self.data.wrapping_add(range.start * self.row_stride),
            rows: range.len(),
            columns: self.columns,
            row_stride: self.row_stride,
            borrow: PhantomData,
        }
    }

    /// Columns `range`, borrowed again.
    pub fn columns(&mut self, range: Range<usize>) -> MatMut<'_, T> {
        assert!(range.start <= range.end && range.end <= self.columns);
        MatMut {
            data: self.data.wrapping_add(range.start),
            rows: self.rows,
            columns: range.len(),
            row_stride: self.row_stride,
            borrow: PhantomData,
        }
    }

    /// Disjoint blocks of `width` columns (the last may be narrower), to write from different threads.
    pub fn split_columns(self, width: usize) -> Vec<MatMut<'a, T>> {
        assert!(width > 0);
        (0..self.columns)
            .step_by(width)
            .map(|start| MatMut {
                data: self.data.wrapping_add(start),
                rows: self.rows,
                columns: width.min(self.columns - start),
                row_stride: self.row_stride,
                borrow: PhantomData,
            })
            .collect()
    }
}

/// `dst = alpha * a b + beta * dst` on one thread; `beta = 0` does not read `dst`, so garbage there is harmless.
///
/// The result does not depend on how callers cut `dst` into blocks only as far as the `gemm` crate's kernels agree;
/// callers therefore cut at places that do not depend on the number of threads.
pub fn gemm<T: Real>(alpha: T, a: Mat<'_, T>, b: Mat<'_, T>, beta: T, dst: &mut MatMut<'_, T>) {
    assert_eq!(a.rows, dst.rows, "gemm rows");
    assert_eq!(b.columns, dst.columns, "gemm columns");
    assert_eq!(a.columns, b.rows, "gemm depth");
    if dst.rows == 0 || dst.columns == 0 {
        return;
    }
    // Callers hand over panels in the order they are read: the crate must not copy them once more.
    static NO_PACKING: std::sync::Once = std::sync::Once::new();
    NO_PACKING.call_once(|| gemm::set_lhs_packing_threshold_single_thread(1 << 20));
    // SAFETY: `Mat::new`, `MatMut::new` and the slicing methods keep every element `(i, j)` below the extents inside
    // the borrowed slices, the extents agree (asserted above), `dst` is borrowed exclusively and its rows do not
    // overlap (asserted in `MatMut::new`); strides fit isize because slices do.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.columns,
            a.columns,
            dst.data,
            1,
            dst.row_stride as isize,
            beta != T::ZERO,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gemm_is_the_triple_loop_for_every_stride_and_ignores_garbage_when_beta_is_zero() {
        for (m, n, k) in [(1, 1, 1), (3, 5, 7), (17, 33, 9), (64, 65, 63), (2, 40, 0)] {
            let a: Vec<f64> = (0..m * (k + 2)).map(|i| (i as f64 * 0.37).sin()).collect();
            let b: Vec<f64> = (0..n * (k + 1)).map(|i| (i as f64 * 0.11).cos()).collect();
            let mut c = vec![f64::NAN; m * (n + 3)];
            let am = Mat::new(&a, m, k, k + 2);
            let bm = Mat::new(&b, n, k, k + 1).t();
            gemm(2.0, am, bm, 0.0, &mut MatMut::new(&mut c, m, n, n + 3));
            for i in 0..m {
                for j in 0..n {
                    let want: f64 = (0..k)
                        .map(|l| a[i * (k + 2) + l] * b[j * (k + 1) + l])
                        .sum::<f64>()
                        * 2.0;
                    assert!((c[i * (n + 3) + j] - want).abs() <= 1e-12, "{m} {n} {k}");
                }
                if i + 1 < m {
                    assert!(
                        c[i * (n + 3) + n..(i + 1) * (n + 3)].iter().all(|x| x.is_nan()),
                        "wrote past the row"
                    );
                }
            }
        }
    }
}
