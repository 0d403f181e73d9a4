//! The optimizers' updates, the gradient norm, and the search for what is no number.

use super::{check_device, check_elements, mismatch, on_device};
use crate::cpu::optim::AdamwStep;
use crate::cpu::optim_8bit::{self, Codes};
use crate::error::Result;
use crate::tensor::{DType, Device, Tensor};
use crate::{cpu, cuda};

pub use crate::cpu::optim::{AdamwFactors as AdamW, LionFactors as Lion, SgdFactors as Sgd};
pub use crate::cuda::optim::{Adamw8bitSlot, AdamwSlot, LionSlot, SgdSlot};

/// Moments that share one scale in [`adamw_8bit`].
pub const BLOCK_8BIT: usize = optim_8bit::BLOCK;

/// All `tensors` are of the gradient's length and on `device`, and F32 but for `codes`.
fn check_slot(
    operation: &'static str,
    device: Device,
    g: &Tensor,
    tensors: &[(&str, &Tensor)],
    codes: &[(&str, &Tensor)],
) -> Result<()> {
    let g = [("g", g)];
    let floats = g.iter().chain(tensors).map(|(name, t)| (name, t, DType::F32));
    let codes = codes.iter().map(|(name, t)| (name, t, DType::U8));
    for (name, tensor, dtype) in floats.chain(codes) {
        check_device(operation, name, tensor, device)?;
        check_elements(operation, name, tensor, dtype, g[0].1.elements())?;
    }
    Ok(())
}

impl AdamW {
    fn for_cuda(&self) -> cuda::optim::AdamwFactors {
        cuda::optim::AdamwFactors {
            clip: self.clip,
            one_minus_beta1: self.one_minus_beta1,
            beta2: self.beta2,
            one_minus_beta2: self.one_minus_beta2,
            sqrt_correction2: self.sqrt_correction2,
            epsilon: self.epsilon,
        }
    }
}

/// One AdamW step (Loshchilov and Hutter 2019) on `p`, `m` and `v` of every slot in place, as `torch.optim.AdamW`; on a
/// CUDA device in one launch, with the CPU's bits:
///
/// `g = clip g; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g g;
/// p = decay p - step_size m / (sqrt(v) / sqrt_correction2 + eps)`.
///
/// # Errors
/// Shapes or types do not fit, or the slots are on several devices.
pub fn adamw(slots: &mut [AdamwSlot<'_>], factors: &AdamW) -> Result<()> {
    let Some(device) = slots.first().map(|slot| slot.g.device()) else {
        return Ok(());
    };
    for s in slots.iter() {
        check_slot("adamw", device, s.g, &[("p", s.p), ("m", s.m), ("v", s.v)], &[])?;
    }
    if let Device::Cuda(ordinal) = device {
        return cuda::optim::adamw(ordinal, slots, factors.for_cuda());
    }
    for s in slots {
        let step = AdamwStep {
            decay: s.decay,
            size: s.step_size,
        };
        let (m, v) = (s.m.as_mut_slice(), s.v.as_mut_slice());
        cpu::optim::adamw(s.p.as_mut_slice(), s.g.as_slice(), m, v, step, factors);
    }
    Ok(())
}

/// [`adamw`] on moments in 8 bits (Dettmers et al. 2022): `m = map[codes] absmax` in blocks of [`BLOCK_8BIT`], with
/// bitsandbytes' dynamic maps, signed for the first and unsigned for the second moment.
///
/// A moment is dequantised, updated, used for `p`, and then quantised: its block's absmax is the largest magnitude, its code
/// that of the value nearest to `moment / absmax`, of two equally near ones the lower. On a CUDA device in one launch,
/// with the CPU's bits.
///
/// # Errors
/// Shapes or types do not fit, or the slots are on several devices.
pub fn adamw_8bit(slots: &mut [Adamw8bitSlot<'_>], factors: &AdamW) -> Result<()> {
    const OPERATION: &str = "adamw_8bit";
    let Some(device) = slots.first().map(|slot| slot.g.device()) else {
        return Ok(());
    };
    for s in slots.iter() {
        check_slot(OPERATION, device, s.g, &[("p", s.p)], &[("m", s.m), ("v", s.v)])?;
        for (name, absmax) in [("m_absmax", &*s.m_absmax), ("v_absmax", &*s.v_absmax)] {
            check_device(OPERATION, name, absmax, device)?;
            let blocks = s.g.elements().div_ceil(BLOCK_8BIT);
            check_elements(OPERATION, name, absmax, DType::F32, blocks)?;
        }
    }
    if let Device::Cuda(ordinal) = device {
        let [m, v] = [&*optim_8bit::SIGNED, &*optim_8bit::UNSIGNED];
        let padded =
            |midpoints: &[f32; 255]| std::array::from_fn(|i| midpoints.get(i).copied().unwrap_or(0.0));
        let maps = cuda::optim::Maps8bit {
            m: *m.values,
            m_midpoints: padded(&m.midpoints),
            v: *v.values,
            v_midpoints: padded(&v.midpoints),
        };
        return cuda::optim::adamw_8bit(ordinal, slots, &maps, factors.for_cuda());
    }
    for s in slots {
        let step = AdamwStep {
            decay: s.decay,
            size: s.step_size,
        };
        let m = Codes {
            codes: s.m.as_mut_slice(),
            absmax: s.m_absmax.as_mut_slice(),
        };
        let v = Codes {
            codes: s.v.as_mut_slice(),
            absmax: s.v_absmax.as_mut_slice(),
        };
        optim_8bit::adamw_8bit(s.p.as_mut_slice(), s.g.as_slice(), m, v, step, factors);
    }
    Ok(())
}

/// One step of stochastic gradient descent on `p` and `m` of every slot in place, as `torch.optim.SGD`; on a CUDA device
/// in one launch, with the CPU's bits: `g = clip g + weight_decay p; m = momentum m + g; p -= rate m`, or `p -= rate g`
/// without `m`.
///
/// # Errors
/// Shapes or types do not fit, or the slots are on several devices.
pub fn sgd(slots: &mut [SgdSlot<'_>], factors: &Sgd) -> Result<()> {
    let Some(device) = slots.first().map(|slot| slot.g.device()) else {
        return Ok(());
    };
    for s in slots.iter() {
        check_slot("sgd", device, s.g, &[("p", s.p)], &[])?;
        if let Some(m) = s.m.as_deref() {
            check_slot("sgd", device, s.g, &[("m", m)], &[])?;
        }
    }
    if let Device::Cuda(ordinal) = device {
        return cuda::optim::sgd(ordinal, slots, factors.clip, factors.momentum);
    }
    for s in slots {
        let m = s.m.as_deref_mut().map(Tensor::as_mut_slice);
        let (p, g) = (s.p.as_mut_slice(), s.g.as_slice());
        cpu::optim::sgd(p, g, m, s.rate, s.weight_decay, factors);
    }
    Ok(())
}

/// One Lion step (Chen et al. 2023) on `p` and `m` of every slot in place; on a CUDA device in one launch, with the CPU's
/// bits: `g = clip g; p = decay p - rate sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g`.
///
/// # Errors
/// Shapes or types do not fit, or the slots are on several devices.
pub fn lion(slots: &mut [LionSlot<'_>], factors: &Lion) -> Result<()> {
    let Some(device) = slots.first().map(|slot| slot.g.device()) else {
        return Ok(());
    };
    for s in slots.iter() {
        check_slot("lion", device, s.g, &[("p", s.p), ("m", s.m)], &[])?;
    }
    if let Device::Cuda(ordinal) = device {
        let factors = cuda::optim::LionFactors {
            clip: factors.clip,
            beta1: factors.beta1,
            one_minus_beta1: factors.one_minus_beta1,
            beta2: factors.beta2,
            one_minus_beta2: factors.one_minus_beta2,
            reserved: 0,
        };
        return cuda::optim::lion(ordinal, slots, factors);
    }
    for s in slots {
        let (p, g, m) = (s.p.as_mut_slice(), s.g.as_slice(), s.m.as_mut_slice());
        cpu::optim::lion(p, g, m, s.rate, s.decay, factors);
    }
    Ok(())
}

/// `Σ x²` in f64.
///
/// # Errors
/// `x` is not F32.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    sum_of_squares_all(&[x])
}

/// `Σ x²` over all elements of all tensors in f64, for the gradient norm: the sum of [`sums_of_squares`], in order.
///
/// # Errors
/// A tensor is not F32, or they are on several devices.
pub fn sum_of_squares_all(tensors: &[&Tensor]) -> Result<f64> {
    Ok(sums_of_squares(tensors)?.into_iter().fold(0.0, |sum, x| sum + x))
}

/// `Σ x²` of each tensor in f64; on a CUDA device by one launch and one copy to the host.
///
/// The order of the additions depends on the tensors' lengths only.
///
/// # Errors
/// A tensor is not F32, or they are on several devices.
pub fn sums_of_squares(tensors: &[&Tensor]) -> Result<Vec<f64>> {
    let Some(device) = tensors.first().map(|x| x.device()) else {
        return Ok(Vec::new());
    };
    for x in tensors {
        check_device("sums_of_squares", "x", x, device)?;
        check_elements("sums_of_squares", "x", x, DType::F32, x.elements())?;
    }
    match device {
        Device::Cpu => Ok(tensors
            .iter()
            .map(|x| cpu::optim::sum_of_squares(x.as_slice()))
            .collect()),
        Device::Cuda(ordinal) => cuda::optim::sums_of_squares(ordinal, tensors),
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
