//! The optimizer's update, the gradient norm, and the search for what is no number.

use super::{check_device, check_elements, mismatch, on_device};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};
use crate::{cpu, cuda};

pub use crate::cpu::optim::AdamwFactors as AdamW;
pub use crate::cuda::optim::AdamwSlot;

/// One AdamW step (Loshchilov and Hutter 2019) on `p`, `m` and `v` in place, with the gradient `g`; all F32.
///
/// # Errors
/// Shapes or types do not fit.
pub fn adamw(p: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, factors: &AdamW) -> Result<()> {
    let decayed = true;
    adamw_all(&mut [AdamwSlot { p, g, m, v, decayed }], factors)
}

/// [`adamw`] on every slot, on a CUDA device in one launch. The factor of a slot that is not decayed is 1.
///
/// # Errors
/// Shapes or types do not fit, or the slots are on several devices.
pub fn adamw_all(slots: &mut [AdamwSlot<'_>], factors: &AdamW) -> Result<()> {
    let Some(device) = slots.first().map(|slot| slot.g.device()) else {
        return Ok(());
    };
    for slot in slots.iter() {
        for (name, tensor) in [("p", &*slot.p), ("g", slot.g), ("m", &*slot.m), ("v", &*slot.v)] {
            check_device("adamw", name, tensor, device)?;
            check_elements("adamw", name, tensor, DType::F32, slot.g.elements())?;
        }
    }
    match device {
        Device::Cpu => {
            for slot in slots {
                let decay = if slot.decayed { factors.decay } else { 1.0 };
                cpu::optim::adamw(
                    slot.p.as_mut_slice(),
                    slot.g.as_slice(),
                    slot.m.as_mut_slice(),
                    slot.v.as_mut_slice(),
                    &AdamW { decay, ..*factors },
                );
            }
            Ok(())
        }
        Device::Cuda(ordinal) => {
            let all = cuda::optim::AdamwFactors {
                clip: factors.clip,
                one_minus_beta1: factors.one_minus_beta1,
                beta2: factors.beta2,
                one_minus_beta2: factors.one_minus_beta2,
                step_size: factors.step_size,
                sqrt_correction2: factors.sqrt_correction2,
                epsilon: factors.epsilon,
                reserved: 0,
            };
            cuda::optim::adamw(ordinal, slots, factors.decay, all)
        }
    }
}

/// `Σ x²` in f64.
///
/// # Errors
/// `x` is not F32.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    sum_of_squares_all(&[x])
}

/// `Σ x²` over all elements of all tensors in f64, for the gradient norm.
///
/// # Errors
/// A tensor is not F32, or they are on several devices.
pub fn sum_of_squares_all(tensors: &[&Tensor]) -> Result<f64> {
    let Some(device) = tensors.first().map(|x| x.device()) else {
        return Ok(0.0);
    };
    for x in tensors {
        check_device("sum_of_squares", "x", x, device)?;
        check_elements("sum_of_squares", "x", x, DType::F32, x.elements())?;
    }
    match device {
        Device::Cpu => Ok(tensors
            .iter()
            .fold(0.0, |sum, x| sum + cpu::optim::sum_of_squares(x.as_slice()))),
        Device::Cuda(ordinal) => cuda::optim::sum_of_squares(ordinal, tensors),
    }
}

/// `x = 0`, of all tensors; on a CUDA device in one launch.
///
/// # Errors
/// The tensors are on several devices, or on a CUDA device and not F32.
pub fn zero_all(tensors: &mut [&mut Tensor]) -> Result<()> {
    let Some(device) = tensors.first().map(|x| x.device()) else {
        return Ok(());
    };
    for x in tensors.iter() {
        check_device("zero", "x", x, device)?;
        if device != Device::Cpu {
            check_elements("zero", "x", x, DType::F32, x.elements())?;
        }
    }
    match device {
        Device::Cpu => tensors.iter_mut().try_for_each(|x| x.zero()),
        Device::Cuda(ordinal) => cuda::optim::zero(ordinal, tensors),
    }
}

/// The index of the first element that is NaN or infinite, and how many there are; nothing when all are finite.
///
/// # Errors
/// `x` is not of a type that this device computes in.
pub fn non_finite(x: &Tensor) -> Result<Option<(usize, usize)>> {
    Ok(
        on_device!("non_finite", x, T => cpu::optim::non_finite(x.as_slice::<T>()), cuda => cuda::optim::non_finite(x)),
    )
}
