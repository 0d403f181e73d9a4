//! `bench files`: merging, and writing each format, beside a plain read of the base and a plain write of as many bytes.
//!
//! Plain is what the disk gives to one program that reads the files in their order in pieces of 8 MiB, and then writes a file of the
//! result's size and waits until it is on the disk. Whoever reads, computes and writes at once may be faster than that. Before each
//! measurement the system forgets what it has cached of the base; both are measured in each round, now one first, now the other.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use super::inputs::Numbers;
use super::measure::median;
use crate::checkpoint::quantized::is_quantized_linear;
use crate::checkpoint::shards::{Part, Pieces, SHARD_BYTES, write_shards};
use crate::checkpoint::{Checkpoint, LM_HEAD, evict, write_adapter};
use crate::error::{Error, Result};
use crate::export::merged::{Held, Into, Merged};
use crate::export::{Progress, bnb, ggml, huggingface, thudm};
use crate::model::ModelConfig;
use crate::model::tune::{LoraConfig, Merger, Strength};
use crate::quant::{GgmlType, QuantType, ThudmBits};
use crate::rng::Stream;
use crate::tensor::{DType, Device, Tensor};

/// Bytes of a plain read or write.
const BLOCK: usize = 8 << 20;

/// What to measure.
#[derive(Debug, Clone)]
pub struct FilesSettings {
    /// The sizes of the base.
    pub config: ModelConfig,
    /// The disk: a folder where the base and the results are written, and removed.
    pub place: PathBuf,
    /// The SentencePiece model, which GGML files hold; without it those are left out.
    pub tokenizer: Option<PathBuf>,
    /// Rank of the adapters.
    pub rank: usize,
    /// Rounds, in each of which every way is measured once, and plain reading and writing beside it.
    pub rounds: usize,
}

/// One way to write a model.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Way {
    Merge(Into),
    Requantize,
    Bnb,
    Thudm(ThudmBits),
    Ggml(GgmlType),
}

const NF4: Into = Into::Dequantized {
    quant_type: QuantType::Nf4,
    double_quant: true,
};

impl Way {
    fn all(ggml: bool) -> Vec<Self> {
        let mut ways = vec![
            Way::Merge(Into::Original),
            Way::Merge(NF4),
            Way::Requantize,
            Way::Bnb,
            Way::Thudm(ThudmBits::Eight),
            Way::Thudm(ThudmBits::Four),
        ];
        if ggml {
            ways.extend(GgmlType::ALL.map(Way::Ggml));
        }
        ways
    }

    fn name(self) -> String {
        match self {
            Way::Merge(Into::Original) => "merge, original".into(),
            Way::Merge(_) => "merge, dequantized".into(),
            Way::Requantize => "merge, requantized".into(),
            Way::Bnb => "export, bnb nf4".into(),
            Way::Thudm(bits) => format!("export, thudm-int{}", bits.number()),
            Way::Ggml(kind) => format!("export, ggml {kind}"),
        }
    }
}

/// What one way took.
#[derive(Debug, Clone)]
pub struct FilesReport {
    /// Which.
    pub way: String,
    /// Bytes of the base, and of the result.
    pub bytes: [u64; 2],
    /// Seconds of each round.
    pub seconds: Vec<f64>,
    /// Seconds of a plain read and a plain write of as many bytes, of each round.
    pub plain: Vec<f64>,
}

/// Measures; `done` is called with each report.
///
/// # Errors
/// The disk is full, or cannot be written.
pub fn files(settings: &FilesSettings, done: &mut dyn FnMut(&FilesReport)) -> Result<Vec<FilesReport>> {
    let bench = Bench::new(settings)?;
    let mut reports: Vec<(Way, FilesReport)> = Way::all(settings.tokenizer.is_some())
        .into_iter()
        .map(|way| {
            let report = FilesReport {
                way: way.name(),
                bytes: [0; 2],
                seconds: Vec::new(),
                plain: Vec::new(),
            };
            (way, report)
        })
        .collect();
    let base = Checkpoint::open(&bench.path("base"))?;
    let read = sizes(base.files())?;
    for round in 0..settings.rounds.max(1) {
        for (way, report) in &mut reports {
            let mut plain = |bytes| -> Result<()> {
                report.plain.push(bench.plainly(&base, bytes)?);
                Ok(())
            };
            // Its size is known from the round before; in the first one the plain way goes second.
            let first = round % 2 == 1;
            if first {
                plain(report.bytes[1])?;
            }
            let (seconds, written) = bench.measure(&base, *way)?;
            if !first {
                plain(written)?;
            }
            report.seconds.push(seconds);
            report.bytes = [read, written];
        }
    }
    let reports: Vec<FilesReport> = reports.into_iter().map(|(_, report)| report).collect();
    reports.iter().for_each(done);
    Ok(reports)
}

/// A folder with a base and an adapter, removed when this is dropped.
struct Bench<'a> {
    settings: &'a FilesSettings,
    dir: PathBuf,
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        // Nobody is there to be told.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl<'a> Bench<'a> {
    fn new(settings: &'a FilesSettings) -> Result<Self> {
        let dir = settings
            .place
            .join(format!("glmtune-bench-{}", std::process::id()));
        let bench = Self { settings, dir };
        let base = bench.path("base");
        fs::create_dir_all(&base).map_err(Error::io(&base, "create"))?;
        let config = &settings.config;
        config.write(&base)?;
        if let Some(tokenizer) = &settings.tokenizer {
            let to = base.join("ice_text.model");
            fs::copy(tokenizer, &to).map_err(Error::io(tokenizer, "copy"))?;
        }
        let parts: Vec<Part> = config
            .tensors()
            .into_iter()
            .filter(|(name, _)| name != LM_HEAD)
            .map(|(name, shape)| Part {
                name,
                dtype: DType::F16,
                shape,
            })
            .collect();
        let quiet = &mut |_: u64, _: u64, _: &str| Ok(());
        write_shards(&base, &parts, DType::F16, SHARD_BYTES, &mut Random(0), quiet)?;
        bench.write_adapter()?;
        Ok(bench)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn write_adapter(&self) -> Result<()> {
        let (numbers, r) = (Numbers::new(1 << 16), self.settings.rank);
        let mut tensors = Vec::new();
        for (name, shape) in self.settings.config.tensors() {
            if !is_quantized_linear(&name) {
                continue;
            }
            let (out, input) = shape.rows_and_columns();
            let stem = name.trim_end_matches(".weight");
            for (part, extents) in [("lora_A", [r, input]), ("lora_B", [out, r])] {
                let name = format!("base_model.model.{stem}.{part}.weight");
                tensors.push((name, numbers.tensor(Device::Cpu, DType::F32, extents, 0.01)?));
            }
        }
        let config = LoraConfig {
            r,
            ..LoraConfig::default()
        };
        let named: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
        write_adapter(&self.path("adapter"), &config.peft(Path::new("base")), &named)
    }

    /// Seconds, and bytes of the result.
    fn measure(&self, base: &Checkpoint, way: Way) -> Result<(f64, u64)> {
        let (folder, out) = (base.dir(), self.path("out"));
        fs::create_dir_all(&out).map_err(Error::io(&out, "create"))?;
        forget(base.files())?;
        let adapter = self.path("adapter");
        let strength = Strength {
            dir: &adapter,
            factor: 1.0,
        };
        let progress: &mut Progress<'_> = &mut |_, _, _| Ok(());
        let start = Instant::now();
        let merged = |into: Into, progress: &mut Progress<'_>| -> Result<()> {
            let merger = Merger::open(base.config(), &[strength])?;
            let held = Held::new(base, into, Vec::new())?;
            let merged = Merged::new(&held, &merger, None);
            match way {
                Way::Requantize => bnb::write(&merged, folder, &out, QuantType::Nf4, true, progress),
                _ => huggingface::write(&merged, folder, &out, None, SHARD_BYTES, progress),
            }
        };
        match way {
            Way::Merge(into) => merged(into, progress)?,
            Way::Requantize => merged(NF4, progress)?,
            Way::Bnb => bnb::write(base, folder, &out, QuantType::Nf4, true, progress)?,
            Way::Thudm(bits) => thudm::write(base, folder, &out, bits, progress)?,
            Way::Ggml(kind) => {
                ggml::write(base, folder, &out.join("model.bin"), kind, progress)?.commit()?;
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let written = fs::read_dir(&out).map_err(Error::io(&out, "list"))?.flatten();
        let files: Vec<PathBuf> = written.map(|entry| entry.path()).collect();
        let bytes = sizes(&files)?;
        fs::remove_dir_all(&out).map_err(Error::io(&out, "remove"))?;
        Ok((seconds, bytes))
    }

    /// Seconds to read the base and to write `bytes`.
    fn plainly(&self, base: &Checkpoint, bytes: u64) -> Result<f64> {
        forget(base.files())?;
        let mut block = vec![0; BLOCK];
        let start = Instant::now();
        for path in base.files() {
            let mut file = File::open(path).map_err(Error::io(path, "open"))?;
            while file.read(&mut block).map_err(Error::io(path, "read"))? > 0 {}
        }
        let path = self.path("plain");
        let mut file = File::create(&path).map_err(Error::io(&path, "create"))?;
        let mut left = bytes;
        while left > 0 {
            let now = left.min(BLOCK as u64);
            file.write_all(&block[..now as usize])
                .map_err(Error::io(&path, "write"))?;
            left -= now;
        }
        file.sync_all().map_err(Error::io(&path, "write"))?;
        let seconds = start.elapsed().as_secs_f64();
        fs::remove_file(&path).map_err(Error::io(&path, "remove"))?;
        Ok(seconds)
    }
}

/// Random signs and mantissas between 2^-7 and 2^-6, of which no disk makes less.
struct Random(u64);

impl Pieces for Random {
    fn piece(&mut self, part: &Part, rows: Range<usize>) -> Result<Tensor> {
        let mut extents = part.shape.extents().to_vec();
        extents[0] = rows.len();
        let mut piece = Tensor::zeros(DType::F16, crate::tensor::Shape::new(&extents));
        self.0 += 1;
        Stream::new(3, self.0).fill(piece.bytes_mut());
        for bits in bytemuck::cast_slice_mut::<u8, u16>(piece.bytes_mut()) {
            *bits = (*bits & 0x83ff) | (8 << 10);
        }
        Ok(piece)
    }
}

fn forget(files: &[PathBuf]) -> Result<()> {
    files.iter().try_for_each(|path| evict(path))
}

/// The median.
fn middle(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    median(&sorted)
}

fn sizes(files: &[PathBuf]) -> Result<u64> {
    files
        .iter()
        .map(|path| Ok(fs::metadata(path).map_err(Error::io(path, "look at"))?.len()))
        .sum()
}

impl FilesReport {
    /// Plain over measured, round by round: 1 is as fast as a plain read and write one after the other.
    pub fn ratios(&self) -> Vec<f64> {
        self.plain
            .iter()
            .zip(&self.seconds)
            .map(|(plain, s)| plain / s)
            .collect()
    }

    /// For people.
    pub fn line(&self) -> String {
        let [read, written] = self.bytes.map(|bytes| bytes as f64 / 1e9);
        let ratios = self.ratios();
        let (least, most) = ratios
            .iter()
            .fold((f64::INFINITY, 0f64), |(a, b), &x| (a.min(x), b.max(x)));
        let rate = |seconds: &[f64]| (read + written) / middle(seconds);
        format!(
            "{:<20} {read:.2} GB read, {written:.2} GB written: {:.2} GB/s, plainly {:.2} GB/s: ratio {:.2} ({least:.2} to {most:.2})",
            self.way,
            rate(&self.seconds),
            rate(&self.plain),
            middle(&ratios)
        )
    }

    /// For `--json`.
    pub fn json(&self) -> Value {
        json!({
            "way": self.way,
            "bytes_read": self.bytes[0],
            "bytes_written": self.bytes[1],
            "seconds": self.seconds,
            "plain_seconds": self.plain,
            "ratio": middle(&self.ratios()),
        })
    }
}
