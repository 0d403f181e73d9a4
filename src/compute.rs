//! `--device` and `--dtype`: what was asked for, and what this machine makes of it.

use crate::cuda;
use crate::error::{Error, Result};
use crate::tensor::{Compute, DType, Device};

/// The most bytes of tensors that `device` has held so far; `None` for the CPU, whose memory the system counts.
pub fn peak_device_bytes(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => None,
        Device::Cuda(_) => Some(cuda::held_bytes().1),
    }
}

/// Bytes of device memory that kernels share as scratch.
pub const SCRATCH: u64 = cuda::SCRATCH as u64;

pub use crate::cuda::Description;

/// A device as a plan sees it.
#[derive(Debug, Clone)]
pub struct Card {
    /// What it is.
    pub description: Description,
    /// Bytes that it would still give.
    pub free: u64,
    /// Is it a part of this program?
    pub emulated: bool,
}

/// The card of `device`, opened by now; `None` for the CPU.
///
/// # Errors
/// It does not answer.
pub fn card(device: Device) -> Result<Option<Card>> {
    let Device::Cuda(ordinal) = device else {
        return Ok(None);
    };
    Ok(Some(Card {
        description: cuda::describe(ordinal)?,
        free: cuda::memory_info(ordinal)?.0,
        emulated: cuda::emulated(),
    }))
}

/// Is the CUDA device of this program a part of it?
pub const fn emulated() -> bool {
    cuda::emulated()
}

/// Where and in which type to compute.
///
/// `device`: `auto` (the first CUDA device, else the CPU), `cpu`, `cuda` or `cuda:N`. `dtype`: `auto` (bf16 on cards of
/// compute capability 8.0 and up, fp16 on older ones, fp32 on the CPU), `fp32`, `bf16` or `fp16`.
///
/// An emulated device is for tests: `auto` never takes it.
///
/// # Errors
/// No such choice, no such device, or a device that cannot compute in that type.
pub fn choose(device: &str, dtype: &str) -> Result<Compute> {
    let device = choose_device(device)?;
    let dtype = match (parse_dtype(dtype)?, device) {
        (None, Device::Cpu) => DType::F32,
        (None, Device::Cuda(ordinal)) => {
            if cuda::describe(ordinal)?.capability.0 >= 8 {
                DType::BF16
            } else {
                DType::F16
            }
        }
        (Some(DType::F32), Device::Cpu) => DType::F32,
        (Some(dtype), Device::Cpu) => {
            return Err(Error::input(
                "--dtype",
                format!("{dtype} on the CPU"),
                "fp32",
                "leave --dtype out, or compute on a card with --device cuda",
            ));
        }
        (Some(DType::BF16), Device::Cuda(ordinal)) => {
            let card = cuda::describe(ordinal)?;
            if card.capability.0 < 8 {
                return Err(Error::input(
                    "--dtype",
                    format!(
                        "bf16 on {} (compute capability {}.{})",
                        card.name, card.capability.0, card.capability.1
                    ),
                    "a card of compute capability 8.0 or more",
                    "use --dtype fp16",
                ));
            }
            DType::BF16
        }
        (Some(dtype), Device::Cuda(_)) => dtype,
    };
    Ok(Compute { device, dtype })
}

fn choose_device(asked: &str) -> Result<Device> {
    match asked {
        "cpu" => Ok(Device::Cpu),
        "auto" if cuda::emulated() => Ok(Device::Cpu),
        "auto" => Ok(cuda::describe(0).map_or(Device::Cpu, |_| Device::Cuda(0))),
        _ => {
            let number = match asked.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|n| n.parse().ok()),
                None => None,
            };
            let Some(ordinal) = number else {
                return Err(Error::Usage(format!(
                    "--device: found {asked}, expected auto, cpu, cuda or cuda:N"
                )));
            };
            cuda::describe(ordinal)?;
            Ok(Device::Cuda(ordinal))
        }
    }
}

/// `None` for `auto`.
fn parse_dtype(asked: &str) -> Result<Option<DType>> {
    match asked {
        "auto" => Ok(None),
        "fp32" | "float32" => Ok(Some(DType::F32)),
        "bf16" | "bfloat16" => Ok(Some(DType::BF16)),
        "fp16" | "float16" => Ok(Some(DType::F16)),
        _ => Err(Error::Usage(format!(
            "--dtype: found {asked}, expected auto, fp32, bf16 or fp16"
        ))),
    }
}

/// One line on what will compute, for people: `NVIDIA GeForce RTX 4090 (cuda:0, 23.6 of 24.0 GB free), bf16`.
///
/// # Errors
/// The device does not answer.
pub fn describe(compute: Compute) -> Result<String> {
    let dtype = match compute.dtype {
        DType::F16 => "fp16",
        DType::BF16 => "bf16",
        DType::F64 => "fp64",
        _ => "fp32",
    };
    let Device::Cuda(ordinal) = compute.device else {
        return Ok(format!("CPU, {dtype}"));
    };
    let (free, total) = cuda::memory_info(ordinal)?;
    let gb = |bytes: u64| bytes as f64 / 1e9;
    Ok(format!(
        "{} (cuda:{ordinal}, {:.1} of {:.1} GB free), {dtype}",
        cuda::describe(ordinal)?.name,
        gb(free),
        gb(total)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_computes_in_fp32_only() {
        let compute = choose("cpu", "auto").unwrap();
        assert_eq!(compute, Compute::cpu(DType::F32));
        let message = choose("cpu", "bf16").unwrap_err().to_string();
        assert!(
            message.contains("--dtype: found bfloat16 on the CPU, expected fp32"),
            "{message}"
        );
    }

    #[test]
    fn what_is_no_device_or_type_is_a_wrong_command_line() {
        for (device, dtype) in [
            ("gpu", "auto"),
            ("cuda:x", "auto"),
            ("cuda0", "auto"),
            ("cpu", "int8"),
        ] {
            assert_eq!(
                choose(device, dtype).unwrap_err().exit_code(),
                2,
                "{device} {dtype}"
            );
        }
    }
}
