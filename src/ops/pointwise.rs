//! Normalisation, activation and dropout.

use super::{check, check_elements, mismatch, on_device};
use crate::cpu;
use crate::cpu::real::Real;
use crate::error::Result;
use crate::rng::Stream;
use crate::tensor::{DType, Device, Tensor};

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
    check(
        "layer_norm",
        &[("x", x, m, w.elements()), ("y", y, m, n), ("stats", stats, m, 2)],
    )?;
    check_elements("layer_norm", "bias", b, w.dtype(), n)?;
    check_elements("layer_norm", "weight", w, x.dtype(), n)?;
    on_device!("layer_norm", x, T => cpu::norm::forward(
        x.as_slice::<T>(),
        w.as_slice(),
        b.as_slice(),
        T::of(eps),
        y.as_mut_slice(),
        stats.as_mut_slice(),
    ));
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
        &[
            ("x", x, m, n),
            ("dy", dy, m, n),
            ("dx", dx, m, n),
            ("stats", stats, m, 2),
        ],
    )?;
    check_elements("layer_norm_backward_input", "weight", w, x.dtype(), n)?;
    on_device!("layer_norm_backward_input", x, T => cpu::norm::backward_input(
        dy.as_slice::<T>(),
        x.as_slice(),
        w.as_slice(),
        stats.as_slice(),
        dx.as_mut_slice(),
    ));
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
        &[("x", x, m, n), ("dy", dy, m, n), ("stats", stats, m, 2)],
    )?;
    check_elements("layer_norm_backward_parameters", "dw", dw, x.dtype(), n)?;
    check_elements("layer_norm_backward_parameters", "db", db, x.dtype(), n)?;
    on_device!("layer_norm_backward_parameters", x, T => cpu::norm::accumulate_parameters(
        dy.as_slice::<T>(),
        x.as_slice(),
        stats.as_slice(),
        dw.as_mut_slice(),
        db.as_mut_slice(),
    ));
    Ok(())
}

/// `y = 0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn gelu(x: &Tensor, y: &mut Tensor) -> Result<()> {
    check_elements("gelu", "y", y, x.dtype(), x.elements())?;
    on_device!("gelu", x, T => cpu::activation::gelu(x.as_slice::<T>(), y.as_mut_slice()));
    Ok(())
}

/// The gradient of [`gelu`] in place: `d` holds dy and becomes dx.
///
/// # Errors
/// Shapes or types do not fit.
pub fn gelu_backward(x: &Tensor, d: &mut Tensor) -> Result<()> {
    check_elements("gelu_backward", "d", d, x.dtype(), x.elements())?;
    on_device!("gelu_backward", x, T => cpu::activation::gelu_backward(x.as_slice::<T>(), d.as_mut_slice()));
    Ok(())
}

/// Inverted dropout: `y = mask x / (1 - p)`, where element `i` is kept when the stream's uniform `i` is at least `p`.
/// Its gradient is the same operation on dy.
///
/// # Errors
/// Shapes or types do not fit.
pub fn dropout(x: &Tensor, p: f32, stream: Stream, y: &mut Tensor) -> Result<()> {
    check_elements("dropout", "y", y, x.dtype(), x.elements())?;
    on_device!("dropout", x, T => cpu::activation::dropout(x.as_slice::<T>(), p, stream, false, y.as_mut_slice()));
    Ok(())
}

/// `y += mask x / (1 - p)`: [`dropout`] added to what is there.
///
/// # Errors
/// Shapes or types do not fit.
pub fn accumulate_dropout(x: &Tensor, p: f32, stream: Stream, y: &mut Tensor) -> Result<()> {
    check_elements("accumulate_dropout", "y", y, x.dtype(), x.elements())?;
    on_device!("accumulate_dropout", x, T => {
        cpu::activation::dropout(x.as_slice::<T>(), p, stream, true, y.as_mut_slice());
    });
    Ok(())
}
