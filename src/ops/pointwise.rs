//! Normalisation, activation and dropout.

use super::{check, check_device, check_elements, check_sums, mismatch, on_device};
use crate::cpu::activation::Dropped;
use crate::cpu::real::Real;
use crate::error::Result;
use crate::rng::Stream;
use crate::tensor::{DType, Device, Tensor};
use crate::{cpu, cuda};

/// LayerNorm of each row of `x [M, N]`: `y = (x - mean) rstd w + b`; `stats [M, 2]` keeps mean and `rstd`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn layer_norm(
    x: &Tensor,
    w: &Tensor,
    b: &Tensor,
    eps: f64,
    y: &mut Tensor,
    stats: &mut Tensor,
) -> Result<()> {
    let (m, n) = x.shape().rows_and_columns();
    check("layer_norm", &[("x", x, m, w.elements()), ("y", y, m, n)])?;
    check_sums("layer_norm", "stats", stats, 2 * m, x)?;
    check_sums("layer_norm", "bias", b, n, x)?;
    check_sums("layer_norm", "weight", w, n, x)?;
    on_device!("layer_norm", x, T => cpu::norm::forward(
        x.as_slice::<T>(),
        w.as_slice(),
        b.as_slice(),
        T::of(eps),
        y.as_mut_slice(),
        stats.as_mut_slice(),
    ), cuda => cuda::norm::layer_norm(x, w, b, eps, y, stats));
    Ok(())
}

/// The gradient of [`layer_norm`] over `x`: `dx [M, N]` is written.
///
/// # Errors
/// Shapes or types do not fit.
pub fn layer_norm_backward_input(
    dy: &Tensor,
    x: &Tensor,
    w: &Tensor,
    stats: &Tensor,
    dx: &mut Tensor,
) -> Result<()> {
    let (m, n) = x.shape().rows_and_columns();
    check(
        "layer_norm_backward_input",
        &[("x", x, m, n), ("dy", dy, m, n), ("dx", dx, m, n)],
    )?;
    check_sums("layer_norm_backward_input", "stats", stats, 2 * m, x)?;
    check_sums("layer_norm_backward_input", "weight", w, n, x)?;
    on_device!("layer_norm_backward_input", x, T => cpu::norm::backward_input(
        dy.as_slice::<T>(),
        x.as_slice(),
        w.as_slice(),
        stats.as_slice(),
        dx.as_mut_slice(),
    ), cuda => cuda::norm::layer_norm_backward_input(dy, x, w, stats, dx));
    Ok(())
}

/// The gradient of [`layer_norm`] over weight and bias: `dw [N]` and `db [N]` are added to.
///
/// # Errors
/// Shapes or types do not fit.
pub fn layer_norm_backward_parameters(
    dy: &Tensor,
    x: &Tensor,
    stats: &Tensor,
    dw: &mut Tensor,
    db: &mut Tensor,
) -> Result<()> {
    let (m, n) = x.shape().rows_and_columns();
    check(
        "layer_norm_backward_parameters",
        &[("x", x, m, n), ("dy", dy, m, n)],
    )?;
    check_sums("layer_norm_backward_parameters", "stats", stats, 2 * m, x)?;
    check_sums("layer_norm_backward_parameters", "dw", dw, n, x)?;
    check_sums("layer_norm_backward_parameters", "db", db, n, x)?;
    on_device!("layer_norm_backward_parameters", x, T => cpu::norm::accumulate_parameters(
        dy.as_slice::<T>(),
        x.as_slice(),
        stats.as_slice(),
        dw.as_mut_slice(),
        db.as_mut_slice(),
    ), cuda => cuda::norm::layer_norm_backward_parameters(dy, x, stats, dw, db));
    Ok(())
}

/// `tensor` is as `like` is: number, type and device.
fn check_same(operation: &'static str, name: &str, tensor: &Tensor, like: &Tensor) -> Result<()> {
    check_device(operation, name, tensor, like.device())?;
    check_elements(operation, name, tensor, like.dtype(), like.elements())
}

/// `y = 0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn gelu(x: &Tensor, y: &mut Tensor) -> Result<()> {
    check_same("gelu", "y", y, x)?;
    on_device!("gelu", x, T => cpu::activation::gelu(x.as_slice::<T>(), y.as_mut_slice()), cuda => cuda::pointwise::gelu(x, y));
    Ok(())
}

/// The gradient of [`gelu`] in place: `d` holds dy and becomes dx.
///
/// # Errors
/// Shapes or types do not fit.
pub fn gelu_backward(x: &Tensor, d: &mut Tensor) -> Result<()> {
    check_same("gelu_backward", "d", d, x)?;
    on_device!("gelu_backward", x, T => cpu::activation::gelu_backward(x.as_slice::<T>(), d.as_mut_slice()), cuda => cuda::pointwise::gelu_backward(x, d));
    Ok(())
}

/// Inverted dropout: `y = mask x / (1 - p)`, where element `i` is kept when the stream's uniform `i` is at least `p`.
/// Its gradient is the same operation on dy.
///
/// # Errors
/// Shapes or types do not fit.
pub fn dropout(x: &Tensor, p: f32, stream: Stream, y: &mut Tensor) -> Result<()> {
    check_same("dropout", "y", y, x)?;
    on_device!("dropout", x, T => cpu::activation::dropout(x.as_slice::<T>(), p, stream, Dropped::Write, y.as_mut_slice()), cuda => cuda::pointwise::dropout(x, p, stream, false, y));
    Ok(())
}

/// `y += mask x / (1 - p)`: [`dropout`] added to what is there.
///
/// # Errors
/// Shapes or types do not fit.
pub fn accumulate_dropout(x: &Tensor, p: f32, stream: Stream, y: &mut Tensor) -> Result<()> {
    check_same("accumulate_dropout", "y", y, x)?;
    on_device!("accumulate_dropout", x, T => {
        cpu::activation::dropout(x.as_slice::<T>(), p, stream, Dropped::Accumulate, y.as_mut_slice());
    }, cuda => cuda::pointwise::dropout(x, p, stream, true, y));
    Ok(())
}

/// `y = x - mask x / (1 - p)`: what [`dropout`] took away from x.
///
/// # Errors
/// Shapes or types do not fit.
pub fn dropout_rest(x: &Tensor, p: f32, stream: Stream, y: &mut Tensor) -> Result<()> {
    check_same("dropout_rest", "y", y, x)?;
    on_device!("dropout_rest", x, T => {
        cpu::activation::dropout(x.as_slice::<T>(), p, stream, Dropped::Rest, y.as_mut_slice());
    }, cuda => cuda::pointwise::dropout_rest(x, p, stream, y));
    Ok(())
}

/// `y += bound (2 u - 1)` with the stream's uniforms `u`, one an element: noise in `[-bound, bound)` (NEFTune, Jain et al.
/// 2023).
///
/// # Errors
/// No kernel for the type.
pub fn accumulate_noise(bound: f64, stream: Stream, y: &mut Tensor) -> Result<()> {
    on_device!("accumulate_noise", y, T => {
        cpu::activation::accumulate_noise(bound, stream, y.as_mut_slice::<T>());
    }, cuda => cuda::pointwise::accumulate_noise(bound, stream, y));
    Ok(())
}

/// `y = x` in the floating-point type of `y`, rounded to nearest even.
///
/// # Errors
/// Shapes or types do not fit.
pub fn cast(x: &Tensor, y: &mut Tensor) -> Result<()> {
    check_device("cast", "y", y, x.device())?;
    check_elements("cast", "y", y, y.dtype(), x.elements())?;
    if x.dtype() == y.dtype() {
        return y.copy_from(x);
    }
    match x.device() {
        Device::Cpu if x.dtype().is_float() && y.dtype().is_float() => y.copy_from(&x.to_dtype(y.dtype())),
        Device::Cpu => Err(mismatch(
            "cast",
            format!("{} into {}", x.dtype(), y.dtype()),
            "floating-point types",
        )),
        Device::Cuda(_) => cuda::pointwise::cast(x, y),
    }
}
