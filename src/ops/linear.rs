//! Products with weights and between dense matrices.

use super::{WeightRef, check, check_device, check_elements, check_sums, mismatch, on_device, weight};
use crate::cpu;
use crate::cpu::real::Real;
use crate::cuda;
use crate::cuda::gemm::Matrix;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

/// `y [M, N] = x [M, K] Wᵀ + bias + alpha * residual [M, N]`. Without a residual `y` may be of the type of sums: logits.
///
/// # Errors
/// Shapes or types do not fit.
pub fn linear(
    x: &Tensor,
    w: WeightRef<'_>,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    y: &mut Tensor,
) -> Result<()> {
    product(x, w, bias, residual, None, y)
}

/// [`linear`], and with a 4-bit weight on a device [`linear_adapted`].
fn product(
    x: &Tensor,
    w: WeightRef<'_>,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    adapter: Option<Adapter<'_>>,
    y: &mut Tensor,
) -> Result<()> {
    let (m, k) = x.shape().rows_and_columns();
    let (n, wk) = w.extents();
    check("linear", &[("x", x, m, wk)])?;
    debug_assert_eq!(k, wk);
    if residual.is_none() && y.dtype() == x.dtype().accumulator() {
        check_sums("linear", "y", y, m * n, x)?;
    } else {
        check("linear", &[("x", x, m, k), ("y", y, m, n)])?;
    }
    w.check_device("linear", x.device())?;
    if let Some(b) = bias {
        check_sums("linear", "bias", b, n, x)?;
    }
    if let Some((_, r)) = residual {
        check("linear", &[("y", y, m, n), ("residual", r, m, n)])?;
    }
    on_device!("linear", x, T => {
        let residual = residual.map(|(alpha, r)| (T::of(alpha), r.as_slice::<T>()));
        let w = weight("linear", w)?;
        cpu::linear::forward(x.as_slice::<T>(), w, 0..n, bias.map(Tensor::as_slice), residual, y.as_mut_slice());
    }, cuda => match w {
        WeightRef::Dense(w) => cuda::gemm::linear(x, Matrix::Dense(w), bias, residual, y),
        WeightRef::Int8(w) => cuda::gemm::linear(x, Matrix::Int8(w), bias, residual, y),
        WeightRef::Quant(w) => cuda::nf4_linear::linear(x, w, bias, residual, adapter.map(cuda_adapter), y),
    });
    Ok(())
}

/// A low-rank addition to a product.
#[derive(Debug, Clone, Copy)]
pub struct Adapter<'a> {
    /// What it is multiplied by.
    pub scale: f64,
    /// `[M, r]`, of the compute type.
    pub u: &'a Tensor,
    /// B `[N, r]` of the product with x, A `[r, K]` of the one with dy; of the type of sums.
    pub matrix: &'a Tensor,
}

impl Adapter<'_> {
    /// Up to this rank the addition is a step of a 4-bit product on a device; beyond, a product of its own loses nothing.
    const FUSED_RANK: usize = 64;

    /// Checks for a product of `m` rows and `columns` columns, on the side of `transposed` (B); can it be fused with `w`?
    fn check(
        &self,
        operation: &'static str,
        w: WeightRef<'_>,
        [m, columns]: [usize; 2],
        transposed: bool,
        of: &Tensor,
    ) -> Result<bool> {
        let rank = self.u.shape().rows_and_columns().1;
        let extents = if transposed {
            (columns, rank)
        } else {
            (rank, columns)
        };
        check_device(operation, "u", self.u, of.device())?;
        check_elements(operation, "u", self.u, of.dtype(), m * rank)?;
        check_sums(operation, "adapter", self.matrix, columns * rank, of)?;
        if self.matrix.shape().rows_and_columns() != extents {
            let found = format!("adapter {}", self.matrix.shape());
            return Err(mismatch(
                operation,
                found,
                format!("adapter [{}, {}]", extents.0, extents.1),
            ));
        }
        let quantized = matches!(w, WeightRef::Quant(_));
        Ok(quantized && of.device() != Device::Cpu && rank <= Self::FUSED_RANK)
    }
}

/// [`linear`] plus `scale * u Bᵀ`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn linear_adapted(
    x: &Tensor,
    w: WeightRef<'_>,
    bias: Option<&Tensor>,
    residual: Option<(f64, &Tensor)>,
    adapter: Adapter<'_>,
    y: &mut Tensor,
) -> Result<()> {
    let (m, n) = (x.shape().rows_and_columns().0, w.extents().0);
    if !adapter.check("linear_adapted", w, [m, n], true, x)? {
        linear(x, w, bias, residual, y)?;
        return matmul(adapter.scale, (adapter.u, false), (adapter.matrix, true), 1.0, y);
    }
    product(x, w, bias, residual, Some(adapter), y)
}

/// `dx [M, K] = dy [M, N] W + alpha * residual [M, K]`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn linear_backward_input(
    dy: &Tensor,
    w: WeightRef<'_>,
    residual: Option<(f64, &Tensor)>,
    dx: &mut Tensor,
) -> Result<()> {
    backward_product(dy, w, residual, None, dx)
}

/// [`linear_backward_input`] plus `scale * u A`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn linear_backward_input_adapted(
    dy: &Tensor,
    w: WeightRef<'_>,
    residual: Option<(f64, &Tensor)>,
    adapter: Adapter<'_>,
    dx: &mut Tensor,
) -> Result<()> {
    let (m, k) = (dy.shape().rows_and_columns().0, w.extents().1);
    if !adapter.check("linear_backward_input_adapted", w, [m, k], false, dy)? {
        linear_backward_input(dy, w, residual, dx)?;
        return matmul(
            adapter.scale,
            (adapter.u, false),
            (adapter.matrix, false),
            1.0,
            dx,
        );
    }
    backward_product(dy, w, residual, Some(adapter), dx)
}

fn cuda_adapter(adapter: Adapter<'_>) -> cuda::nf4_linear::Adapter<'_> {
    let Adapter { scale, u, matrix } = adapter;
    cuda::nf4_linear::Adapter { scale, u, matrix }
}

/// [`linear_backward_input`], and with a 4-bit weight on a device [`linear_backward_input_adapted`].
fn backward_product(
    dy: &Tensor,
    w: WeightRef<'_>,
    residual: Option<(f64, &Tensor)>,
    adapter: Option<Adapter<'_>>,
    dx: &mut Tensor,
) -> Result<()> {
    let (m, _) = dy.shape().rows_and_columns();
    let (n, k) = w.extents();
    check("linear_backward_input", &[("dy", dy, m, n)])?;
    check("linear_backward_input", &[("dx", dx, m, k)])?;
    check_device("linear_backward_input", "dx", dx, dy.device())?;
    check_elements("linear_backward_input", "dx", dx, dy.dtype(), m * k)?;
    w.check_device("linear_backward_input", dy.device())?;
    if let Some((_, r)) = residual {
        check(
            "linear_backward_input",
            &[("dx", dx, m, k), ("residual", r, m, k)],
        )?;
    }
    on_device!("linear_backward_input", dy, T => {
        let residual = residual.map(|(alpha, r)| (T::of(alpha), r.as_slice::<T>()));
        let w = weight("linear_backward_input", w)?;
        cpu::linear::backward_input(dy.as_slice::<T>(), w, 0..n, residual, dx.as_mut_slice());
    }, cuda => match w {
        WeightRef::Dense(w) => cuda::gemm::linear_backward_input(dy, Matrix::Dense(w), residual, dx),
        WeightRef::Int8(w) => cuda::gemm::linear_backward_input(dy, Matrix::Int8(w), residual, dx),
        WeightRef::Quant(w) => {
            cuda::nf4_linear::linear_backward_input(dy, w, residual, adapter.map(cuda_adapter), dx)
        },
    });
    Ok(())
}

/// A dense operand of [`matmul`]: the matrix, and whether it is used transposed.
pub type Operand<'a> = (&'a Tensor, bool);

/// `c [M, N] = alpha * op(a) op(b) + beta * c`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn matmul(alpha: f64, a: Operand<'_>, b: Operand<'_>, beta: f64, c: &mut Tensor) -> Result<()> {
    let extents = |(x, transposed): Operand<'_>| {
        let (rows, columns) = x.shape().rows_and_columns();
        if transposed {
            (columns, rows)
        } else {
            (rows, columns)
        }
    };
    let ((m, k), (bk, n)) = (extents(a), extents(b));
    let fits = bk == k && c.shape().rows_and_columns() == (m, n);
    if !fits {
        let shapes = |(x, transposed): Operand<'_>| {
            format!("{}{}", x.shape(), if transposed { " transposed" } else { "" })
        };
        let found = format!("{} times {} into {}", shapes(a), shapes(b), c.shape());
        return Err(mismatch("matmul", found, "[M, K] times [K, N] into [M, N]"));
    }
    // On a device each of the three is of the compute type or of the type of sums; see crate::cuda::gemm
    // for which kernels there are.
    for (name, x) in [("a", a.0), ("b", b.0)] {
        check_device("matmul", name, x, c.device())?;
        if c.device() == Device::Cpu {
            check_elements("matmul", name, x, c.dtype(), x.elements())?;
        }
    }
    on_device!("matmul", c, T => cpu::linear::matmul(
        T::of(alpha),
        (a.0.as_slice::<T>(), a.1),
        (b.0.as_slice(), b.1),
        T::of(beta),
        c.as_mut_slice(),
        (m, n, k),
    ), cuda => cuda::gemm::matmul(alpha, a, b, beta, c));
    Ok(())
}

/// `db [N]` is added `Σ_m dy [M, N]`: the gradient of a bias.
///
/// # Errors
/// Shapes or types do not fit.
pub fn accumulate_column_sums(dy: &Tensor, db: &mut Tensor) -> Result<()> {
    let (_, n) = dy.shape().rows_and_columns();
    check_sums("accumulate_column_sums", "db", db, n, dy)?;
    on_device!("accumulate_column_sums", dy, T => {
        cpu::linear::accumulate_column_sums(dy.as_slice::<T>(), n, db.as_mut_slice());
    }, cuda => crate::cuda::norm::accumulate_column_sums(dy, db));
    Ok(())
}
