//! The machine: program, processor, memory, cards, drivers, and which of the embedded kernels run there.

use super::{Finding, Level};
use crate::compute;
use crate::cuda::{self, Description, Loaded};

/// A card with less of its memory free than this share is shared with another program.
const MOSTLY_FREE: f64 = 0.6;
/// Host memory that merging, quantising and training on a card stay below.
const ENOUGH: u64 = 4_000_000_000;

pub(super) fn look(findings: &mut Vec<Finding>) {
    let threads = rayon::current_num_threads();
    findings.push(Finding::fine("program", "program", program()));
    findings.push(Finding::fine("cpu", "CPU", format!("{threads} threads")));
    if let Some((total, available)) = host_memory() {
        findings.push(memory(total, available));
    }
    match cuda::device_count() {
        Err(error) => findings.push(Finding::of("cuda", Level::Warns, "CUDA", &error)),
        Ok(count) => {
            for ordinal in 0..u8::try_from(count).unwrap_or(u8::MAX) {
                device(ordinal, findings);
            }
        }
    }
    findings.push(
        match compute::choose("auto", "auto").and_then(compute::describe) {
            Ok(choice) => Finding::fine("auto", "auto", format!("--device auto computes on: {choice}")),
            Err(error) => Finding::of("auto", Level::Stops, "auto", &error),
        },
    );
}

fn program() -> String {
    let built = if cuda::emulated() {
        "with an emulated CUDA device, for tests"
    } else if cfg!(feature = "cuda") {
        "with CUDA"
    } else {
        "without CUDA"
    };
    format!("glmtune {}, built {built}", env!("CARGO_PKG_VERSION"))
}

/// "13.4 GB", "1.9 MB".
pub(super) fn gb(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes >= 1e8 => format!("{:.1} GB", bytes / 1e9),
        bytes => format!("{:.1} MB", bytes / 1e6),
    }
}

/// Bytes in all and bytes that programs could still get; nothing where the system does not say.
fn host_memory() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let of = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace()
            .next()?
            .parse::<u64>()
            .ok()?
            .checked_mul(1024)
    };
    Some((of("MemTotal:")?, of("MemAvailable:")?))
}

fn memory(total: u64, available: u64) -> Finding {
    let found = format!("{} of {} free", gb(available), gb(total));
    if available < ENOUGH {
        let remedy = "close other programs before a run: it may need 2 to 4 GB";
        return Finding::warns("memory", "memory", found, remedy);
    }
    Finding::fine("memory", "memory", found)
}

fn device(ordinal: u8, findings: &mut Vec<Finding>) {
    let what = format!("cuda:{ordinal}");
    let described = cuda::describe(ordinal).and_then(|card| Ok((card, cuda::memory_info(ordinal)?)));
    let (card, (free, total)) = match described {
        Ok(described) => described,
        Err(error) => {
            findings.push(Finding::of("cuda.device", Level::Warns, what, &error));
            return;
        }
    };
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let ((major, minor), (cuda_major, cuda_minor)) = (card.capability, card.driver_version);
    findings.push(Finding::fine(
        "cuda.device",
        what.as_str(),
        format!(
            "{}, compute capability {major}.{minor}, {} multiprocessors, {:.1} of {:.1} GB free, driver for CUDA {cuda_major}.{cuda_minor}",
            card.name,
            card.multiprocessors,
            gb(free),
            gb(total)
        ),
    ));
    if (free as f64) < MOSTLY_FREE * total as f64 {
        findings.push(Finding::warns(
            "cuda.memory",
            &what,
            format!(
                "other programs hold {:.1} of its {:.1} GB",
                gb(total - free),
                gb(total)
            ),
            "close them: `nvidia-smi` names them",
        ));
    }
    if !cuda::emulated() {
        findings.extend(driver(&what, &card));
    }
    findings.push(match cuda::loaded(ordinal) {
        Ok(loaded) => kernels(&loaded),
        Err(error) => Finding::of("cuda.kernels", Level::Stops, "kernels", &error),
    });
}

/// Our PTX is labelled 8.0, which drivers take from R525 (CUDA 12.0) on; the machine code of sm_120 needs R570 (CUDA 12.8).
fn driver(what: &str, card: &Description) -> Option<Finding> {
    let (needed, release) = match card.capability.0 {
        12.. => ((12, 8), "R570"),
        _ => ((12, 0), "R525"),
    };
    if card.driver_version >= needed {
        return None;
    }
    let (major, minor) = card.driver_version;
    Some(Finding::stops(
        "cuda.driver",
        what,
        format!(
            "a driver for CUDA {major}.{minor}; expected: {}.{} for this card",
            needed.0, needed.1
        ),
        format!("install NVIDIA driver {release} or newer, or compute with --device cpu"),
    ))
}

/// "85 kernels: machine code for sm_90 (gemm, nf4), PTX for compute_80 (optim)".
fn kernels(loaded: &[Loaded]) -> Finding {
    let mut codes: Vec<&str> = loaded.iter().map(|unit| unit.code.as_str()).collect();
    codes.sort_unstable();
    codes.dedup();
    let parts = codes.iter().map(|code| {
        let units = loaded.iter().filter(|unit| unit.code == *code);
        let names: Vec<&str> = units.map(|unit| unit.unit.as_str()).collect();
        format!("{code} ({})", names.join(", "))
    });
    let parts: Vec<String> = parts.collect();
    let count: usize = loaded.iter().map(|unit| unit.kernels).sum();
    Finding::fine(
        "cuda.kernels",
        "kernels",
        format!("{count}: {}", parts.join(", ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_by_the_code_that_was_loaded() {
        let unit = |unit: &str, code: &str| Loaded {
            unit: unit.into(),
            code: code.into(),
            kernels: 2,
        };
        let loaded = [unit("a", "sm_90"), unit("b", "PTX"), unit("c", "sm_90")];
        assert_eq!(kernels(&loaded).found, "6: PTX (b), sm_90 (a, c)");
    }

    #[test]
    fn an_old_driver_is_named_with_the_one_that_the_card_needs() {
        let card = |capability, driver_version| Description {
            name: "a card".into(),
            capability,
            total_bytes: 24_000_000_000,
            driver_version,
            multiprocessors: 82,
        };
        assert!(driver("cuda:0", &card((8, 6), (12, 0))).is_none());
        assert!(driver("cuda:0", &card((12, 0), (12, 8))).is_none());
        let line = driver("cuda:0", &card((8, 6), (11, 8))).unwrap().line();
        assert!(line.starts_with("✗ cuda:0") && line.contains("CUDA 11.8") && line.contains("R525"));
        let line = driver("cuda:0", &card((12, 0), (12, 4))).unwrap().line();
        assert!(line.contains("R570"), "{line}");
        assert_eq!(memory(16_000_000_000, 1_000_000_000).level, Level::Warns);
        assert_eq!(memory(16_000_000_000, 9_000_000_000).level, Level::Fine);
    }
}
