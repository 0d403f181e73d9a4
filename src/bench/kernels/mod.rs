//! `bench kernels`: every operation at the shapes of a model, against what the device can do at most.

mod attention;
mod pointwise;
mod products;

use super::inputs::Numbers;
use super::measure::{Protocol, Stopwatch};
use super::report::{Ceilings, HEADING, KernelReport, Row, Work, machine};
use crate::cuda;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::ops;
use crate::tensor::{Compute, DType, Device, Tensor};

/// What to measure.
#[derive(Debug, Clone)]
pub struct KernelSettings {
    /// Where, and in which type.
    pub compute: Compute,
    /// Whose shapes.
    pub config: ModelConfig,
    /// Numbers of rows of activations.
    pub rows: Vec<usize>,
    /// Lengths of sequences, for attention.
    pub lengths: Vec<usize>,
    /// Which groups; empty for all.
    pub only: Vec<String>,
    /// How long and how often.
    pub protocol: Protocol,
}

type Group = fn(&mut Bench<'_>) -> Result<()>;

/// Every group of cases, in the order in which they are measured.
const GROUPS: [(&str, Group); 12] = [
    ("dequantize", products::dequantize),
    ("nf4", products::nf4),
    ("dense", products::dense),
    ("lora", products::lora),
    ("head", products::head),
    ("attention", attention::attention),
    ("norm", pointwise::norm),
    ("gelu", pointwise::gelu),
    ("rope", pointwise::rope),
    ("embedding", pointwise::embedding),
    ("dropout", pointwise::dropout),
    ("adamw", pointwise::adamw),
];

/// Measures, and hands every line of the table to `say` as soon as there is one. A case that cannot be measured is a line that
/// says why.
///
/// # Errors
/// No such group, or a device that has stopped working.
pub fn kernels(settings: &KernelSettings, say: &mut dyn FnMut(&str)) -> Result<KernelReport> {
    let names: Vec<&str> = GROUPS.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = settings.only.iter().find(|name| !names.contains(&name.as_str())) {
        return Err(Error::Usage(format!(
            "--only: found {unknown}, expected some of {}",
            names.join(", ")
        )));
    }
    let mut bench = Bench {
        settings,
        watch: Stopwatch::new(settings.compute.device, settings.protocol)?,
        numbers: Numbers::new(settings.protocol.rotate_bytes.clamp(1 << 12, 1 << 20)),
        report: KernelReport {
            machine: machine(settings.compute)?,
            ceilings: Ceilings::default(),
            rows: Vec::new(),
        },
        say,
    };
    (bench.say)(HEADING);
    bench.ceilings()?;
    for (name, group) in GROUPS {
        if settings.only.is_empty() || settings.only.iter().any(|only| only == name) {
            bench.attempt(name, group)?;
        }
    }
    Ok(bench.report)
}

/// A run under way.
struct Bench<'a> {
    settings: &'a KernelSettings,
    watch: Stopwatch,
    numbers: Numbers,
    report: KernelReport,
    say: &'a mut dyn FnMut(&str),
}

/// Extents by letter.
type Extents<'a> = &'a [(&'static str, usize)];

impl Bench<'_> {
    fn compute(&self) -> Compute {
        self.settings.compute
    }

    fn config(&self) -> &ModelConfig {
        &self.settings.config
    }

    /// Bytes of `n` elements of the compute type.
    fn bytes(&self, n: usize) -> f64 {
        (n * self.settings.compute.dtype.size()) as f64
    }

    /// `(out, in)` of the four linears of a block.
    fn linears(&self) -> [(usize, usize); 4] {
        let (h, inner) = (self.config().hidden_size, self.config().inner_hidden_size);
        [(3 * h, h), (h, h), (inner, h), (h, inner)]
    }

    /// The numbers of rows for which only bandwidth counts: one token, and whole batches.
    fn pointwise_rows(&self) -> Vec<usize> {
        let rows = self.settings.rows.iter().copied();
        rows.filter(|&m| m == 1 || m >= 512).collect()
    }

    fn copies(&self, bytes: usize) -> usize {
        self.settings.protocol.copies(bytes)
    }

    /// `n` tensors made by `make`, to rotate among.
    fn several<T>(n: usize, make: impl FnMut(usize) -> Result<T>) -> Result<Vec<T>> {
        (0..n).map(make).collect()
    }

    /// Measures one case, and goes on when it fails.
    fn case(
        &mut self,
        group: &'static str,
        case: &str,
        shape: Extents<'_>,
        work: Work,
        copies: usize,
        mut call: impl FnMut(usize) -> Result<()> + Send,
    ) -> Result<()> {
        let watch = &mut self.watch;
        let times = ops::pass(self.settings.compute.device, || watch.times(copies, &mut call));
        if times.is_err() {
            self.check_device()?;
        }
        self.push(Row {
            group,
            case: case.to_string(),
            shape: shape.to_vec(),
            work,
            times: times.map_err(|error| error.to_string()),
        });
        Ok(())
    }

    /// Runs some cases; when their operands cannot be made, a line says so and the next ones come.
    fn attempt(&mut self, group: &'static str, f: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if let Err(error) = f(self) {
            self.check_device()?;
            self.push(Row {
                group,
                case: "operands".to_string(),
                shape: Vec::new(),
                work: Work::default(),
                times: Err(error.to_string()),
            });
        }
        Ok(())
    }

    fn push(&mut self, row: Row) {
        (self.say)(&row.line(&self.report.ceilings));
        self.report.rows.push(row);
    }

    /// After a failed kernel a device answers every call with the same error: then there is no use in going on.
    fn check_device(&self) -> Result<()> {
        match self.settings.compute.device {
            Device::Cpu => Ok(()),
            Device::Cuda(ordinal) => cuda::synchronize(ordinal),
        }
    }

    /// What shares refer to: a copy, and our own product of square matrices.
    fn ceilings(&mut self) -> Result<()> {
        let Compute { device, dtype } = self.compute();
        self.attempt("ceiling", |bench| {
            let bytes = (2 * bench.settings.protocol.rotate_bytes).max(1 << 16);
            let from = bench.numbers.tensor(device, DType::F32, [bytes / 4], 1.0)?;
            let mut to = Tensor::zeros_on(device, DType::F32, [bytes / 4])?;
            let work = Work {
                bytes: 2.0 * bytes as f64,
                flops: 0.0,
            };
            bench.case("ceiling", "copy", &[("bytes", bytes)], work, 1, |_| {
                to.copy_from(&from)
            })
        })?;
        self.report.ceilings.copy = self.last_rate(|work| work.bytes);
        let side = match device {
            Device::Cpu => self.settings.protocol.side.min(1024),
            Device::Cuda(_) => self.settings.protocol.side,
        };
        self.attempt("ceiling", |bench| {
            let x = bench.numbers.tensor(device, dtype, [side, side], 1.0)?;
            let w = bench.numbers.tensor(device, dtype, [side, side], 0.02)?;
            let mut y = bench.compute().zeros([side, side])?;
            let work = Work {
                bytes: bench.bytes(3 * side * side),
                flops: 2.0 * (side as f64).powi(3),
            };
            let weight = ops::WeightRef::Dense(&w);
            let shape = [("M", side), ("N", side), ("K", side)];
            bench.case("ceiling", "dense product", &shape, work, 1, |_| {
                ops::linear(&x, weight, None, None, &mut y)
            })
        })?;
        self.report.ceilings.gemm = self.last_rate(|work| work.flops);
        Ok(())
    }

    /// The rate that the last case reached.
    fn last_rate(&self, amount: impl FnOnce(&Work) -> f64) -> Option<f64> {
        let row = self.report.rows.last()?;
        let times = row.times.as_ref().ok()?;
        Some(amount(&row.work) / (times.us * 1e-6))
    }
}
