//! The optimizer's update and the gradient norm.

use super::check_elements;
use crate::cpu;
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};

pub use crate::cpu::optim::AdamwFactors as AdamW;

/// One AdamW step (Loshchilov and Hutter 2019) on `p`, `m` and `v` in place, with the gradient `g`; all F32.
///
/// # Errors
/// Shapes or types do not fit.
pub fn adamw(p: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, factors: &AdamW) -> Result<()> {
    for (name, tensor) in [("p", &*p), ("g", g), ("m", &*m), ("v", &*v)] {
        check_elements("adamw", name, tensor, DType::F32, g.elements())?;
    }
    match p.device() {
        Device::Cpu => {
            cpu::optim::adamw(
                p.as_mut_slice(),
                g.as_slice(),
                m.as_mut_slice(),
                v.as_mut_slice(),
                factors,
            );
        }
    }
    Ok(())
}

/// `Σ x²` in f64, for the gradient norm.
///
/// # Errors
/// `x` is not F32.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    check_elements("sum_of_squares", "x", x, DType::F32, x.elements())?;
    match x.device() {
        Device::Cpu => Ok(cpu::optim::sum_of_squares(x.as_slice())),
    }
}
