//! The optimizers' updates, the gradient norm, and the search for what is no number.

use std::ops::Range;

use half::{bf16, f16};

use super::{check_device, check_elements, mismatch, on_device};
use crate::cpu::optim::AdamwStep;
use crate::cpu::optim_8bit::{self, Codes};
use crate::error::Result;
use crate::tensor::{DType, Device, Element, Tensor};
use crate::{cpu, cuda};

pub use crate::cpu::optim::{AdamwFactors as AdamW, LionFactors as Lion, SgdFactors as Sgd};
pub use crate::cuda::optim::{Adamw8bitSlot, AdamwSlot, LionSlot, SgdSlot, Span};

/// Moments that share one scale in [`adamw_8bit`].
pub const BLOCK_8BIT: usize = optim_8bit::BLOCK;

/// Where a slot computes; nothing when there is no slot with a span.
fn device_of<'a>(mut spans: impl Iterator<Item = &'a Span<'a>>) -> Option<Device> {
    spans.next().map(|span| span.g.device())
}

/// State tensors lie on `device`; F32 and U8 as they are named, and all as long as the first.
fn check_state(
    operation: &'static str,
    device: Device,
    floats: &[(&str, &Tensor)],
    codes: &[(&str, &Tensor)],
) -> Result<()> {
    let floats = floats.iter().map(|(name, t)| (name, t, DType::F32));
    let codes = codes.iter().map(|(name, t)| (name, t, DType::U8));
    let mut elements = None;
    for (name, tensor, dtype) in floats.chain(codes) {
        check_device(operation, name, tensor, device)?;
        let elements = *elements.get_or_insert(tensor.elements());
        check_elements(operation, name, tensor, dtype, elements)?;
    }
    Ok(())
}

/// Spans lie within their parameters, gradients and the `state` elements of their slot.
fn check_spans(operation: &'static str, device: Device, spans: &[Span<'_>], state: usize) -> Result<()> {
    for span in spans {
        for (name, tensor, at) in [("p", &*span.p, span.p_at), ("g", span.g, span.g_at)] {
            check_device(operation, name, tensor, device)?;
            check_elements(operation, name, tensor, DType::F32, tensor.elements())?;
            check_range(operation, name, at, span.len, tensor.elements())?;
        }
        check_range(operation, "state", span.state_at, span.len, state)?;
    }
    Ok(())
}

fn check_range(operation: &'static str, name: &str, at: usize, len: usize, elements: usize) -> Result<()> {
    if at.checked_add(len).is_some_and(|end| end <= elements) {
        return Ok(());
    }
    let found = format!("{len} elements from {at} of {name}");
    Err(mismatch(operation, found, format!("at most {elements}")))
}

/// A span's part of its parameter and of its gradient.
fn values<'s>(span: &'s mut Span<'_>) -> (&'s mut [f32], &'s [f32]) {
    let p = &mut span.p.as_mut_slice()[span.p_at..][..span.len];
    (p, &span.g.as_slice()[span.g_at..][..span.len])
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

/// One AdamW step (Loshchilov and Hutter 2019) on the spans of every slot in place, as `torch.optim.AdamW`; on a CUDA
/// device in one launch, with the CPU's bits:
///
/// `g = clip g; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g g;
/// p = decay p - rate m / (sqrt(v) / sqrt_correction2 + eps)`.
///
/// # Errors
/// Shapes or types do not fit, or the slots are on several devices.
pub fn adamw(slots: &mut [AdamwSlot<'_>], factors: &AdamW) -> Result<()> {
    const OPERATION: &str = "adamw";
    let Some(device) = device_of(slots.iter().flat_map(|slot| &slot.spans)) else {
        return Ok(());
    };
    for s in slots.iter() {
        check_state(OPERATION, device, &[("m", s.m), ("v", s.v)], &[])?;
        check_spans(OPERATION, device, &s.spans, s.m.elements())?;
    }
    if let Device::Cuda(ordinal) = device {
        return cuda::optim::adamw(ordinal, slots, factors.for_cuda());
    }
    for s in slots {
        for span in &mut s.spans {
            let (state, step) = (span.state_at..span.state_at + span.len, adamw_step(span));
            let (m, v) = (
                &mut s.m.as_mut_slice()[state.clone()],
                &mut s.v.as_mut_slice()[state],
            );
            let (p, g) = values(span);
            cpu::optim::adamw(p, g, m, v, step, factors);
        }
    }
    Ok(())
}

fn adamw_step(span: &Span<'_>) -> AdamwStep {
    AdamwStep {
        decay: span.decay,
        size: span.rate,
    }
}

/// [`adamw`] on moments in 8 bits (Dettmers et al. 2022): `m = map[codes] absmax` in blocks of [`BLOCK_8BIT`], with
/// bitsandbytes' dynamic maps, signed for the first and unsigned for the second moment. A span's blocks begin with it.
///
/// A moment is dequantised, updated, used for `p`, and then quantised: its block's absmax is the largest magnitude, its code
/// that of the value nearest to `moment / absmax`, of two equally near ones the lower. On a CUDA device in one launch,
/// with the CPU's bits.
///
/// # Errors
/// Shapes or types do not fit, the slots are on several devices, or a span's state does not begin at a block.
pub fn adamw_8bit(slots: &mut [Adamw8bitSlot<'_>], factors: &AdamW) -> Result<()> {
    const OPERATION: &str = "adamw_8bit";
    let Some(device) = device_of(slots.iter().flat_map(|slot| &slot.spans)) else {
        return Ok(());
    };
    for s in slots.iter() {
        check_state(OPERATION, device, &[], &[("m", s.m), ("v", s.v)])?;
        let blocks = s.m.elements().div_ceil(BLOCK_8BIT);
        for (name, absmax) in [("m_absmax", &*s.m_absmax), ("v_absmax", &*s.v_absmax)] {
            check_device(OPERATION, name, absmax, device)?;
            check_elements(OPERATION, name, absmax, DType::F32, blocks)?;
        }
        check_spans(OPERATION, device, &s.spans, s.m.elements())?;
        if let Some(span) = s.spans.iter().find(|s| !s.state_at.is_multiple_of(BLOCK_8BIT)) {
            let found = format!("a state from element {}", span.state_at);
            return Err(mismatch(OPERATION, found, format!("a multiple of {BLOCK_8BIT}")));
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
        for span in &mut s.spans {
            let step = adamw_step(span);
            let state = span.state_at..span.state_at + span.len;
            let blocks = state.start / BLOCK_8BIT..state.end.div_ceil(BLOCK_8BIT);
            let m = Codes {
                codes: &mut s.m.as_mut_slice()[state.clone()],
                absmax: &mut s.m_absmax.as_mut_slice()[blocks.clone()],
            };
            let v = Codes {
                codes: &mut s.v.as_mut_slice()[state],
                absmax: &mut s.v_absmax.as_mut_slice()[blocks],
            };
            let (p, g) = values(span);
            optim_8bit::adamw_8bit(p, g, m, v, step, factors);
        }
    }
    Ok(())
}

/// One step of stochastic gradient descent on the spans of every slot in place, as `torch.optim.SGD`; on a CUDA device
/// in one launch, with the CPU's bits: `g = clip g + decay p; m = momentum m + g; p -= rate m`, or `p -= rate g` without
/// `m`.
///
/// # Errors
/// Shapes or types do not fit, or the slots are on several devices.
pub fn sgd(slots: &mut [SgdSlot<'_>], factors: &Sgd) -> Result<()> {
    const OPERATION: &str = "sgd";
    let Some(device) = device_of(slots.iter().flat_map(|slot| &slot.spans)) else {
        return Ok(());
    };
    for s in slots.iter() {
        let m = s.m.as_deref();
        check_state(OPERATION, device, m.map(|m| ("m", m)).as_slice(), &[])?;
        check_spans(
            OPERATION,
            device,
            &s.spans,
            m.map_or(usize::MAX, Tensor::elements),
        )?;
    }
    if let Device::Cuda(ordinal) = device {
        return cuda::optim::sgd(ordinal, slots, factors.clip, factors.momentum);
    }
    for s in slots {
        for span in &mut s.spans {
            let m = s.m.as_deref_mut().map(Tensor::as_mut_slice);
            let m = m.map(|m| &mut m[span.state_at..][..span.len]);
            let (rate, weight_decay) = (span.rate, span.decay);
            let (p, g) = values(span);
            cpu::optim::sgd(p, g, m, rate, weight_decay, factors);
        }
    }
    Ok(())
}

/// One Lion step (Chen et al. 2023) on the spans of every slot in place; on a CUDA device in one launch, with the CPU's
/// bits: `g = clip g; p = decay p - rate sign(beta1 m + (1 - beta1) g); m = beta2 m + (1 - beta2) g`.
///
/// # Errors
/// Shapes or types do not fit, or the slots are on several devices.
pub fn lion(slots: &mut [LionSlot<'_>], factors: &Lion) -> Result<()> {
    const OPERATION: &str = "lion";
    let Some(device) = device_of(slots.iter().flat_map(|slot| &slot.spans)) else {
        return Ok(());
    };
    for s in slots.iter() {
        check_state(OPERATION, device, &[("m", s.m)], &[])?;
        check_spans(OPERATION, device, &s.spans, s.m.elements())?;
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
        for span in &mut s.spans {
            let m = &mut s.m.as_mut_slice()[span.state_at..][..span.len];
            let (rate, decay) = (span.rate, span.decay);
            let (p, g) = values(span);
            cpu::optim::lion(p, g, m, rate, decay, factors);
        }
    }
    Ok(())
}

/// `to[at..] = from[range]`, rounded to nearest even: how a 16-bit copy follows a range of its parameter.
///
/// # Errors
/// `from` is not F32, `to` is not F16 or BF16, they are on two devices, or a range lies outside.
pub fn round_into(from: &Tensor, range: Range<usize>, to: &mut Tensor, at: usize) -> Result<()> {
    const OPERATION: &str = "round_into";
    check_device(OPERATION, "to", to, from.device())?;
    check_elements(OPERATION, "from", from, DType::F32, from.elements())?;
    check_range(OPERATION, "from", range.start, range.len(), from.elements())?;
    check_range(OPERATION, "to", at, range.len(), to.elements())?;
    match (from.device(), to.dtype()) {
        (Device::Cpu, DType::F16) => round_on_cpu(from, range, to, at, f16::from_f32),
        (Device::Cpu, DType::BF16) => round_on_cpu(from, range, to, at, bf16::from_f32),
        (Device::Cuda(_), DType::F16 | DType::BF16) => cuda::pointwise::round_into(from, range, to, at),
        (_, other) => Err(mismatch(OPERATION, other, "float16 or bfloat16")),
    }
}

fn round_on_cpu<T: Element>(
    from: &Tensor,
    range: Range<usize>,
    to: &mut Tensor,
    at: usize,
    round: fn(f32) -> T,
) -> Result<()> {
    let to = &mut to.as_mut_slice::<T>()[at..][..range.len()];
    cpu::optim::round_into(&from.as_slice()[range], to, round);
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
    x.arrive()?;
    Ok(
        on_device!("non_finite", x, T => cpu::optim::non_finite(x.as_slice::<T>()), cuda => cuda::optim::non_finite(x)),
    )
}
