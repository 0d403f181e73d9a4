//! The figures, as a table for people and as JSON.

use serde_json::{Map, Value, json};

use super::measure::Times;
use crate::compute;
use crate::cuda;
use crate::error::Result;
use crate::tensor::{Compute, Device};

/// One measured case, or the reason why it was not.
#[derive(Debug, Clone)]
pub struct Row {
    /// What was measured: a group of cases.
    pub group: &'static str,
    /// Which case.
    pub case: String,
    /// Its extents by letter: M rows, N outputs, K inputs, S tokens, ...
    pub shape: Vec<(&'static str, usize)>,
    /// Bytes that must be moved, and operations that must be done.
    pub work: Work,
    /// The times, or what went wrong.
    pub times: std::result::Result<Times, String>,
}

/// What a call must at least do.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Bytes read and written, each operand once.
    pub bytes: f64,
    /// Floating-point operations, two for a multiply-add; 0 where bandwidth alone decides.
    pub flops: f64,
}

/// What the device was seen to do at most.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Ceilings {
    /// Bytes a second of a copy within the device, read and written.
    pub copy: Option<f64>,
    /// Operations a second of our own dense product of square matrices.
    pub gemm: Option<f64>,
}

/// Everything that `bench kernels` found.
#[derive(Debug, Clone)]
pub struct KernelReport {
    /// Where it was measured.
    pub machine: Value,
    /// The ceilings that shares refer to.
    pub ceilings: Ceilings,
    /// The cases in order.
    pub rows: Vec<Row>,
}

/// The device and the program, for JSON.
///
/// # Errors
/// The device does not answer.
pub fn machine(compute: Compute) -> Result<Value> {
    let mut machine = json!({
        "program": concat!("glmtune ", env!("CARGO_PKG_VERSION")),
        "compute": compute::describe(compute)?,
        "device": compute.device.to_string(),
        "dtype": compute.dtype.name(),
        "emulated": compute.device != Device::Cpu && cuda::emulated(),
    });
    if let Device::Cuda(ordinal) = compute.device {
        let card = cuda::describe(ordinal)?;
        machine["card"] = json!({
            "name": card.name,
            "capability": format!("{}.{}", card.capability.0, card.capability.1),
            "multiprocessors": card.multiprocessors,
            "total_bytes": card.total_bytes,
            "driver_cuda": format!("{}.{}", card.driver_version.0, card.driver_version.1),
        });
    }
    Ok(machine)
}

impl Row {
    /// Bytes and operations a second.
    fn rates(&self) -> Option<(f64, f64)> {
        let seconds = self.times.as_ref().ok()?.us * 1e-6;
        Some((self.work.bytes / seconds, self.work.flops / seconds))
    }

    fn shape_text(&self) -> String {
        let parts: Vec<String> = self.shape.iter().map(|(k, v)| format!("{k} {v}")).collect();
        parts.join(" ")
    }

    /// One line of the table.
    pub fn line(&self, ceilings: &Ceilings) -> String {
        let head = format!("{:<11} {:<18} {:<26}", self.group, self.case, self.shape_text());
        let times = match &self.times {
            Ok(times) => times,
            Err(why) => return format!("{head} {why}"),
        };
        let spread = 100.0 * (times.max_us - times.min_us) / times.us;
        let (bytes, flops) = self.rates().unwrap_or_default();
        let share = |rate: f64, ceiling: Option<f64>| match ceiling {
            Some(ceiling) if rate > 0.0 => format!("{:.0} %", 100.0 * rate / ceiling),
            _ => String::new(),
        };
        let rate = |value: f64, unit: f64| match value / unit {
            0.0 => String::new(),
            small if small < 10.0 => format!("{small:.3}"),
            large => format!("{large:.1}"),
        };
        format!(
            "{head} {:>11.2} {:>6.1} % {:>9} {:>6} {:>9} {:>6} {:>9.2}",
            times.us,
            spread,
            rate(bytes, 1e9),
            share(bytes, ceilings.copy),
            rate(flops, 1e12),
            share(flops, ceilings.gemm),
            times.host_us
        )
    }

    fn json(&self, ceilings: &Ceilings) -> Value {
        let shape: Map<String, Value> = self
            .shape
            .iter()
            .map(|(k, v)| (k.to_string(), json!(v)))
            .collect();
        let mut row = json!({ "group": self.group, "case": self.case, "shape": shape });
        match (&self.times, self.rates()) {
            (Ok(times), Some((bytes, flops))) => {
                let fields = json!({
                    "us": times.us,
                    "us_min": times.min_us,
                    "us_max": times.max_us,
                    "host_us": times.host_us,
                    "repeats": times.repeats,
                    "calls": times.calls,
                    "bytes": self.work.bytes,
                    "flops": self.work.flops,
                    "gb_s": bytes / 1e9,
                    "tflop_s": flops / 1e12,
                    "of_copy": ceilings.copy.map(|ceiling| bytes / ceiling),
                    "of_gemm": ceilings.gemm.map(|ceiling| flops / ceiling),
                });
                if let (Value::Object(row), Value::Object(fields)) = (&mut row, fields) {
                    row.extend(fields);
                }
            }
            (Err(why), _) => row["error"] = json!(why),
            (Ok(_), None) => {}
        }
        row
    }
}

/// The head of the table.
pub const HEADING: &str = "group       case               shape                               us   spread      GB/s of copy   TFLOP/s of GEMM   host us";

impl KernelReport {
    /// For `--json`.
    pub fn json(&self) -> Value {
        json!({
            "machine": self.machine,
            "ceilings": {
                "copy_gb_s": self.ceilings.copy.map(|rate| rate / 1e9),
                "gemm_tflop_s": self.ceilings.gemm.map(|rate| rate / 1e12),
            },
            "cases": self.rows.iter().map(|row| row.json(&self.ceilings)).collect::<Vec<_>>(),
        })
    }

    /// How many cases could not be measured.
    pub fn failures(&self) -> usize {
        self.rows.iter().filter(|row| row.times.is_err()).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(times: std::result::Result<Times, String>) -> Row {
        Row {
            group: "nf4",
            case: "forward".into(),
            shape: vec![("M", 1), ("N", 12_288), ("K", 4096)],
            work: Work {
                bytes: 26e6,
                flops: 100e6,
            },
            times,
        }
    }

    #[test]
    fn a_row_shows_rates_and_their_shares() {
        let times = Times {
            us: 10.0,
            min_us: 9.5,
            max_us: 10.5,
            host_us: 3.25,
            repeats: 7,
            calls: 28,
        };
        let ceilings = Ceilings {
            copy: Some(3000e9),
            gemm: None,
        };
        let line = row(Ok(times)).line(&ceilings);
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(
            words,
            "nf4 forward M 1 N 12288 K 4096 10.00 10.0 % 2600.0 87 % 10.0 3.25"
                .split(' ')
                .collect::<Vec<_>>()
        );
        let json = row(Ok(times)).json(&ceilings);
        assert_eq!(json["gb_s"], 2600.0);
        assert_eq!(json["shape"]["N"], 12_288);
        assert!(json["of_gemm"].is_null());
        let failed = row(Err("no room".into()));
        assert!(failed.line(&ceilings).ends_with("no room"));
        assert_eq!(failed.json(&ceilings)["error"], "no room");
    }
}
