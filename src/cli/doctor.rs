//! `glmtune doctor`: what this program can compute on here, one line for each finding.

use clap::Args;
use serde_json::{Value, json};

use crate::compute;
use crate::cuda::{self, Loaded};
use crate::error::{Error, Result};

/// Say what this program can compute on here, and what is in the way
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
struct Finding {
    what: String,
    found: String,
    /// The one thing to do, when something is in the way.
    remedy: Option<String>,
}

impl Finding {
    fn fine(what: impl Into<String>, found: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            found: found.into(),
            remedy: None,
        }
    }

    fn wrong(what: impl Into<String>, error: &Error) -> Self {
        let (found, remedy) = match error {
            Error::Input {
                found,
                expected,
                remedy,
                ..
            } => (format!("{found}; expected: {expected}"), remedy.clone()),
            other => (other.to_string(), "run it again with GLMTUNE_SYNC=1".to_string()),
        };
        Self {
            what: what.into(),
            found,
            remedy: Some(remedy),
        }
    }

    fn line(&self) -> String {
        let remedy = self.remedy.as_ref().map(|remedy| format!("; {remedy}"));
        format!("{:<9} {}{}", self.what, self.found, remedy.unwrap_or_default())
    }

    fn json(&self) -> Value {
        json!({ "what": self.what, "found": self.found, "remedy": self.remedy })
    }
}

/// Runs `glmtune doctor`. What it finds is its output, not its exit code.
///
/// # Errors
/// None so far.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let findings = findings();
    if args.json {
        let findings: Vec<Value> = findings.iter().map(Finding::json).collect();
        println!("{:#}", json!({ "findings": findings }));
    } else {
        for finding in &findings {
            println!("{}", finding.line());
        }
    }
    Ok(())
}

fn findings() -> Vec<Finding> {
    let threads = rayon::current_num_threads();
    let mut findings = vec![
        Finding::fine("program", program()),
        Finding::fine("CPU", format!("{threads} threads")),
    ];
    match cuda::device_count() {
        Err(error) => findings.push(Finding::wrong("CUDA", &error)),
        Ok(count) => {
            for ordinal in 0..u8::try_from(count).unwrap_or(u8::MAX) {
                device(ordinal, &mut findings);
            }
        }
    }
    findings.push(
        match compute::choose("auto", "auto").and_then(compute::describe) {
            Ok(choice) => Finding::fine("auto", format!("--device auto computes on: {choice}")),
            Err(error) => Finding::wrong("auto", &error),
        },
    );
    findings
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

fn device(ordinal: u8, findings: &mut Vec<Finding>) {
    let what = format!("cuda:{ordinal}");
    let described = cuda::describe(ordinal).and_then(|card| Ok((card, cuda::memory_info(ordinal)?)));
    let (card, (free, total)) = match described {
        Ok(described) => described,
        Err(error) => {
            findings.push(Finding::wrong(what, &error));
            return;
        }
    };
    let gb = |bytes: u64| bytes as f64 / 1e9;
    let ((major, minor), (cuda_major, cuda_minor)) = (card.capability, card.driver_version);
    findings.push(Finding::fine(
        what.as_str(),
        format!(
            "{}, compute capability {major}.{minor}, {} multiprocessors, {:.1} of {:.1} GB free, driver for CUDA {cuda_major}.{cuda_minor}",
            card.name,
            card.multiprocessors,
            gb(free),
            gb(total)
        ),
    ));
    findings.push(match cuda::loaded(ordinal) {
        Ok(loaded) => kernels(&loaded),
        Err(error) => Finding::wrong("kernels", &error),
    });
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
    Finding::fine("kernels", format!("{count}: {}", parts.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_one_line_with_the_one_thing_to_do() {
        let error = Error::input("--device cuda:0", "no driver", "one", "install it");
        let line = Finding::wrong("CUDA", &error).line();
        assert_eq!(line, "CUDA      no driver; expected: one; install it");
        let unit = |unit: &str, code: &str| Loaded {
            unit: unit.into(),
            code: code.into(),
            kernels: 2,
        };
        let loaded = [unit("a", "sm_90"), unit("b", "PTX"), unit("c", "sm_90")];
        assert_eq!(kernels(&loaded).found, "6: PTX (b), sm_90 (a, c)");
    }
}
