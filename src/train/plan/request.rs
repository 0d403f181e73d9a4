//! From the flags of a run to what is to be planned.

use super::card::Card;
use super::fit::{Asked, Limits};
use super::layout::{StateOn, parse_bytes};
use super::{Answers, CONTEXT};
use crate::compute;
use crate::config::{LossReduction, RunConfig};
use crate::error::{Error, Result};
use crate::model::tune::Tuning;
use crate::tensor::Device;
use crate::train::{Options, method, run};

/// Bytes of a card that are left to whatever comes and goes beside, unless `--vram` says how much to use.
const LEFT_FREE: u64 = 256_000_000;

fn unknown(flag: &str, found: &str, expected: &str) -> Error {
    Error::Usage(format!("{flag}: found {found}, expected {expected}"))
}

/// `auto`, `on` or `off`.
fn switch(flag: &str, text: &str) -> Result<Option<bool>> {
    match text {
        "auto" => Ok(None),
        "on" => Ok(Some(true)),
        "off" => Ok(Some(false)),
        _ => Err(unknown(flag, text, "auto, on or off")),
    }
}

impl Asked {
    /// What the flags fix.
    ///
    /// # Errors
    /// A value is none of its flag, or has no meaning on the CPU.
    pub fn of(config: &RunConfig, device: Device) -> Result<Self> {
        let asked = Self {
            // The mean of means depends on the cut.
            micro_batch: (!config.auto_micro_batch || config.loss_reduction == LossReduction::MicroBatch)
                .then_some(config.micro_batch_size),
            policies: match config.recompute.as_str() {
                "auto" => None,
                text => Some(text.parse()?),
            },
            head: match config.head_storage.as_str() {
                "auto" => None,
                name => Some(name.parse()?),
            },
            stream: switch("--stream-weights", &config.stream_weights)?,
            state: match config.optimizer_state.as_str() {
                "auto" => None,
                "device" => Some(StateOn::Device),
                "host" => Some(StateOn::Host),
                "disk" => Some(StateOn::Disk),
                other => {
                    return Err(unknown("--optimizer-state", other, "auto, device, host or disk"));
                }
            },
            optimizer_vram: match &config.optimizer_vram {
                Some(text) => Some(parse_bytes("--optimizer-vram", text)?),
                None => None,
            },
            in_backward: switch("--optimizer-in-backward", &config.optimizer_in_backward)?,
        };
        let vram = config.vram.as_deref().map(|text| parse_bytes("--vram", text));
        if let Some(bytes) = vram.transpose()?.filter(|&bytes| bytes < 1_000_000) {
            let found = format!("{bytes} bytes");
            return Err(unknown("--vram", &found, "an amount of memory such as 12GB"));
        }
        let whole = config.micro_batch_size * config.gradient_accumulation_steps;
        if asked.in_backward == Some(true)
            && asked.micro_batch.is_some_and(|micro_batch| micro_batch != whole)
        {
            return Err(Error::Usage(
                "--optimizer-in-backward updates each layer as soon as its gradients are there: a step is one micro-batch; raise \
                 --micro-batch-size and give --gradient-accumulation-steps 1"
                    .into(),
            ));
        }
        if asked.optimizer_vram.is_some() && matches!(asked.state, None | Some(StateOn::Device)) {
            return Err(Error::Usage(
                "--optimizer-vram is for pages of --optimizer-state host or disk: add one of them".into(),
            ));
        }
        if device == Device::Cpu {
            let of_a_card = [
                ("--vram", config.vram.is_some()),
                ("--stream-weights", asked.stream == Some(true)),
                ("+offload", config.recompute.contains("+offload")),
                ("--optimizer-state host", asked.state == Some(StateOn::Host)),
                ("--optimizer-vram", asked.optimizer_vram.is_some()),
            ];
            if let Some((flag, _)) = of_a_card.into_iter().find(|&(_, given)| given) {
                return Err(Error::Usage(format!(
                    "{flag} is about the memory of a card, and this run computes on the CPU: leave it out"
                )));
            }
        }
        Ok(asked)
    }
}

/// What `config` trains.
///
/// # Errors
/// A name of the configuration is none.
pub fn tuning(config: &RunConfig) -> Result<Tuning> {
    method::tuning(config)
}

/// How `config` trains; the length of the run is left open.
pub fn options(config: &RunConfig) -> Options {
    run::options(config, 1)
}

/// What a run generates to evaluate itself on prompts of up to `longest_prompt` tokens.
pub fn answers(config: &RunConfig, longest_prompt: usize) -> Vec<Answers> {
    let asked = config.eval_samples > 0;
    let answers = asked.then(|| Answers {
        size: config.eval_samples,
        in_micro_batches: true,
        prompt: longest_prompt,
        capacity: longest_prompt.saturating_add(config.eval_max_new_tokens),
    });
    answers.into_iter().collect()
}

/// What the driver takes of `device` for itself.
pub fn context(device: Device) -> u64 {
    match device {
        Device::Cuda(_) if !compute::emulated() => CONTEXT,
        _ => 0,
    }
}

/// How much memory a run may use, and the card it computes on.
///
/// # Errors
/// The device does not answer; `--vram` is no amount of memory.
pub fn limits(config: &RunConfig, device: Device) -> Result<(Limits, Option<Card>)> {
    let asked = match &config.vram {
        Some(text) => Some(parse_bytes("--vram", text)?),
        None => None,
    };
    let host = available_host_bytes();
    let Some(there) = compute::card(device)? else {
        let device = u64::MAX;
        return Ok((Limits { device, host: None }, None));
    };
    // The driver has taken its part of an open card already, which a budget counts.
    let free = there.free + context(device);
    let left = if there.emulated { 0 } else { LEFT_FREE };
    let device = asked.map_or(free.saturating_sub(left), |asked| asked.min(free));
    let card = Card::of(&there.description);
    Ok((Limits { device, host }, Some(card)))
}

/// What programs can still be given, where the system tells: nine tenths of `MemAvailable`.
fn available_host_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some((kilobytes << 10) / 10 * 9)
}
