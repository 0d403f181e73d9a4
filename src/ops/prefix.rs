//! The prefix of P-Tuning v2: keys and values of a layer out of the encoder's table, and the tanh of its projection.

use super::{check_device, check_elements, check_sums, mismatch, on_device};
use crate::cpu::prefix::Extents;
use crate::error::Result;
use crate::rng::Stream;
use crate::tensor::{DType, Device, Tensor};
use crate::{cpu, cuda};

/// Of a table `[P, n heads d]` and what is taken out of it, `[heads, P, d]` or `[B, heads, P, d]`, number `index` of n.
fn extents(operation: &'static str, table: &Tensor, index: usize, heads: &Tensor) -> Result<Extents> {
    let (length, columns) = table.shape().rows_and_columns();
    let shape = heads.shape();
    let (size, count, positions, head_dim) = match *shape.extents() {
        [h, p, d] => (1, h, p, d),
        [b, h, p, d] => (b, h, p, d),
        _ => (0, 0, 0, 0),
    };
    let width = count * head_dim;
    if width == 0 || positions != length || !columns.is_multiple_of(width) || (index + 1) * width > columns {
        return Err(mismatch(
            operation,
            format!("number {index} of a table {} as {shape}", table.shape()),
            "a table [P, n heads d] and [B, heads, P, d]",
        ));
    }
    Ok(Extents {
        size,
        length,
        heads: count,
        head_dim,
        columns,
        first: index * width,
    })
}

/// Keys or values of one layer out of a prefix's table, `y [B, heads, P, d]` (or `[heads, P, d]`: for all sequences).
///
/// `table [P, n heads d]` is of the type of sums; a row holds, for each of n keys and values, head after head. Number
/// `index` of the n is taken. With dropout `(p, stream)`, element `i` of `[B, P, n heads d]` is kept when the stream's
/// uniform `i` is at least `p`, and divided by `1 - p` then: each sequence has a mask of its own.
///
/// # Errors
/// Shapes or types do not fit.
pub fn prefix_heads(
    table: &Tensor,
    index: usize,
    dropout: Option<(f32, Stream)>,
    y: &mut Tensor,
) -> Result<()> {
    let e = extents("prefix_heads", table, index, y)?;
    check_sums("prefix_heads", "table", table, e.length * e.columns, y)?;
    on_device!("prefix_heads", y, T => {
        cpu::prefix::heads(table.as_slice::<T>(), e, dropout, y.as_mut_slice());
    }, cuda => cuda::prefix::heads(table, index, dropout, y));
    Ok(())
}

/// The gradient of [`prefix_heads`]: `d_table` is added to. All are of the type of sums.
///
/// # Errors
/// Shapes or types do not fit.
pub fn prefix_heads_backward(
    dy: &Tensor,
    index: usize,
    dropout: Option<(f32, Stream)>,
    d_table: &mut Tensor,
) -> Result<()> {
    const OPERATION: &str = "prefix_heads_backward";
    let e = extents(OPERATION, d_table, index, dy)?;
    check_elements(OPERATION, "dy", dy, dy.dtype().accumulator(), dy.elements())?;
    check_sums(OPERATION, "d_table", d_table, e.length * e.columns, dy)?;
    on_device!("prefix_heads_backward", dy, T => {
        cpu::prefix::accumulate_heads(dy.as_slice::<T>(), e, dropout, d_table.as_mut_slice());
    }, cuda => cuda::prefix::heads_backward(dy, index, dropout, d_table));
    Ok(())
}

/// `y = tanh(x)`, both of the type of sums.
///
/// # Errors
/// Shapes or types do not fit.
pub fn tanh(x: &Tensor, y: &mut Tensor) -> Result<()> {
    check_sums("tanh", "y", y, x.elements(), x)?;
    check_elements("tanh", "x", x, y.dtype(), x.elements())?;
    on_device!("tanh", x, T => cpu::prefix::tanh(x.as_slice::<T>(), y.as_mut_slice()), cuda => cuda::prefix::tanh(x, y));
    Ok(())
}

/// The gradient of [`tanh`] in place, from its output `y`: `d` holds dy and becomes dx, `d *= 1 - y²`.
///
/// # Errors
/// Shapes or types do not fit.
pub fn tanh_backward(y: &Tensor, d: &mut Tensor) -> Result<()> {
    check_device("tanh_backward", "d", d, y.device())?;
    check_sums("tanh_backward", "d", d, y.elements(), y)?;
    check_elements("tanh_backward", "y", y, d.dtype(), y.elements())?;
    on_device!("tanh_backward", y, T => {
        cpu::prefix::tanh_backward(y.as_slice::<T>(), d.as_mut_slice());
    }, cuda => cuda::prefix::tanh_backward(y, d));
    Ok(())
}
