//! `glmtune synth`: a checkpoint of random weights with the official names, shapes and files.
//!
//! It is what the memory and speed of loading, quantising and training are shown on without the real 13 GB.

use std::io::Write;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::checkpoint::{LM_HEAD, SafetensorsWriter, TorchBinWriter, atomic};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::rng::Stream;
use crate::tensor::{DType, Shape};

/// Flags of `glmtune synth`; the defaults are ChatGLM-6B's own sizes.
#[derive(Debug, Clone, clap::Args)]
pub struct SynthArgs {
    /// Folder to write; it must be empty or new
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Rows of the embedding
    #[arg(long, default_value_t = 130_528)]
    pub vocab_size: usize,
    /// Width of the model
    #[arg(long, default_value_t = 4096)]
    pub hidden_size: usize,
    /// Width inside the MLP [default: 4 x hidden size]
    #[arg(long)]
    pub inner_hidden_size: Option<usize>,
    /// Number of blocks
    #[arg(long, default_value_t = 28)]
    pub num_layers: usize,
    /// Attention heads
    #[arg(long, default_value_t = 32)]
    pub num_heads: usize,
    /// Longest sequence
    #[arg(long, default_value_t = 2048)]
    pub max_sequence_length: usize,
    /// Number of files [default: one per 1.9 GB]
    #[arg(long)]
    pub shards: Option<usize>,
    /// File format
    #[arg(long, value_enum, default_value_t = Format::Bin)]
    pub format: Format,
    /// Type of the weights: float16, bfloat16 or float32 (LayerNorm is always float32)
    #[arg(long, default_value = "float16", value_parser = parse_dtype)]
    pub dtype: DType,
    /// Seed of the random weights
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Tokenizer to copy into the folder as ice_text.model
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
}

/// How the weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// torch zip files, as the official ones
    Bin,
    /// safetensors
    Safetensors,
}

fn parse_dtype(text: &str) -> std::result::Result<DType, String> {
    [DType::F16, DType::BF16, DType::F32]
        .into_iter()
        .find(|dtype| dtype.name() == text)
        .ok_or_else(|| "one of float16, bfloat16, float32".to_string())
}

/// One tensor to write.
struct Spec {
    name: String,
    dtype: DType,
    shape: Shape,
    fill: Fill,
}

enum Fill {
    /// LayerNorm weights.
    One,
    /// LayerNorm biases.
    Zero,
    /// Uniform with this standard deviation; the number selects the stream, so that `lm_head` can equal the embedding.
    Random { stream: u64, std: f32 },
    /// `1 / 10000^(2i/r)` for the rotary width `r`.
    InverseFrequencies,
}

/// Writes the checkpoint, shard by shard and piece by piece: host memory stays at a few MB.
///
/// # Errors
/// Sizes that do not fit together, a folder that is not empty, a disk that is full.
pub fn run(args: SynthArgs) -> Result<()> {
    let config = config(&args);
    config.check(Path::new("synth"))?;
    let dir = &args.output;
    std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    if std::fs::read_dir(dir)
        .map_err(Error::io(dir, "list"))?
        .next()
        .is_some()
    {
        let remedy = "choose another --output, or empty it first";
        return Err(Error::input(
            dir.display(),
            "a folder that is not empty",
            "an empty or new folder",
            remedy,
        ));
    }
    let specs = specs(&config);
    let total: usize = specs.iter().map(Spec::bytes).sum();
    let count = args.shards.unwrap_or(total.div_ceil(1_900_000_000));
    if count == 0 || count > specs.len() {
        return Err(Error::Usage(format!(
            "--shards {count}: give 1 to {} (one tensor each)",
            specs.len()
        )));
    }
    let shards = split(specs, count, total);
    let count = shards.len();
    let mut weight_map = Map::new();
    let (stem, suffix) = match args.format {
        Format::Bin => ("pytorch_model", "bin"),
        Format::Safetensors => ("model", "safetensors"),
    };
    for (i, shard) in shards.iter().enumerate() {
        let name = format!("{stem}-{:05}-of-{count:05}.{suffix}", i + 1);
        write_shard(&dir.join(&name), shard, &args)?;
        weight_map.extend(
            shard
                .iter()
                .map(|spec| (spec.name.clone(), Value::from(name.as_str()))),
        );
    }
    let tensors = weight_map.len();
    weight_map.sort_keys();
    let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    atomic::write(
        &dir.join(format!("{stem}.{suffix}.index.json")),
        format!("{index:#}\n").as_bytes(),
    )?;
    if let Some(tokenizer) = &args.tokenizer {
        let bytes = std::fs::read(tokenizer).map_err(Error::io(tokenizer, "read"))?;
        atomic::write(&dir.join("ice_text.model"), &bytes)?;
    }
    // Last, so that a folder with a config is a whole one.
    config.write(dir)?;
    println!(
        "{}: {tensors} tensors, {:.2} GB in {count} files",
        dir.display(),
        total as f64 / 1e9
    );
    Ok(())
}

fn config(args: &SynthArgs) -> ModelConfig {
    let vocab = args.vocab_size;
    // The published vocabularies keep their ids; a toy's specials lie at the end in the same order.
    let mask = match vocab {
        130_528 => 130_000,
        150_528 => 150_000,
        _ => u32::try_from(vocab.saturating_sub(16)).unwrap_or(u32::MAX),
    };
    let after_mask = |n: u32| mask.saturating_add(n);
    ModelConfig {
        vocab_size: vocab,
        hidden_size: args.hidden_size,
        inner_hidden_size: args
            .inner_hidden_size
            .unwrap_or(args.hidden_size.saturating_mul(4)),
        num_layers: args.num_layers,
        num_attention_heads: args.num_heads,
        max_sequence_length: args.max_sequence_length,
        mask_token_id: mask,
        gmask_token_id: after_mask(1),
        bos_token_id: after_mask(4),
        eos_token_id: after_mask(5),
        torch_dtype: args.dtype,
        ..ModelConfig::chatglm_6b()
    }
}

fn specs(config: &ModelConfig) -> Vec<Spec> {
    let mut out = Vec::new();
    for (stream, (name, shape)) in config.tensors().into_iter().enumerate() {
        let weight = name.ends_with(".weight");
        let (dtype, fill) = if name.contains("layernorm") {
            (DType::F32, if weight { Fill::One } else { Fill::Zero })
        } else {
            // Inputs of every linear have a variance near 1 (they follow a LayerNorm): this keeps the outputs there.
            let std = if weight {
                (shape.extents()[1] as f32).sqrt().recip()
            } else {
                0.02
            };
            // The embedding is tensor 0, and the head equals it.
            let stream = if name == LM_HEAD { 0 } else { stream as u64 };
            (config.torch_dtype, Fill::Random { stream, std })
        };
        let layer = name
            .strip_suffix(".attention.query_key_value.weight")
            .map(str::to_string);
        if let Some(layer) = layer {
            out.push(Spec {
                name: format!("{layer}.attention.rotary_emb.inv_freq"),
                dtype: DType::F16,
                shape: Shape::new(&[config.head_dim() / 4]),
                fill: Fill::InverseFrequencies,
            });
        }
        out.push(Spec {
            name,
            dtype,
            shape,
            fill,
        });
    }
    out
}

/// Fills each file up to its share of the bytes, in model order: a block may lie in two files, as in the official ones.
fn split(specs: Vec<Spec>, count: usize, total: usize) -> Vec<Vec<Spec>> {
    let mut shards: Vec<Vec<Spec>> = Vec::with_capacity(count);
    let (mut before, mut left) = (0, specs.len());
    for spec in specs {
        let is_full = before >= total / count * shards.len();
        // The last files get one tensor each when the bytes ran out before the files did.
        if shards.len() < count && (is_full || left == count - shards.len()) {
            shards.push(Vec::new());
        }
        before += spec.bytes();
        left -= 1;
        if let Some(last) = shards.last_mut() {
            last.push(spec);
        }
    }
    shards
}

fn write_shard(path: &Path, shard: &[Spec], args: &SynthArgs) -> Result<()> {
    let headers: Vec<_> = shard.iter().map(|s| (s.name.clone(), s.dtype, s.shape)).collect();
    match args.format {
        Format::Bin => {
            let mut writer = TorchBinWriter::create(path, &headers)?;
            for spec in shard {
                writer.write_from(&spec.name, |w| spec.write(w, args.seed))?;
            }
            writer.finish()
        }
        Format::Safetensors => {
            let mut writer = SafetensorsWriter::create(path, &headers, &Default::default())?;
            for spec in shard {
                writer.write_from(&spec.name, |w| spec.write(w, args.seed))?;
            }
            writer.finish()
        }
    }
}

/// Values made at a time: 16 MB of f32.
const PIECE: usize = 1 << 22;
/// Values made by one thread at a time; a multiple of 8, so that pieces start on a block of the generator.
const GRAIN: usize = 1 << 16;

impl Spec {
    fn bytes(&self) -> usize {
        self.shape.elements() * self.dtype.size()
    }

    fn write(&self, out: &mut dyn Write, seed: u64) -> std::io::Result<()> {
        let elements = self.shape.elements();
        let mut values = vec![0f32; elements.min(PIECE)];
        let mut bytes = vec![0u8; values.len() * self.dtype.size()];
        for start in (0..elements).step_by(PIECE) {
            let n = PIECE.min(elements - start);
            let chunks = values[..n].par_chunks_mut(GRAIN);
            let packed = bytes[..n * self.dtype.size()].par_chunks_mut(GRAIN * self.dtype.size());
            chunks.zip(packed).enumerate().for_each(|(i, (values, packed))| {
                self.fill(values, start + i * GRAIN, seed);
                pack(values, self.dtype, packed);
            });
            out.write_all(&bytes[..n * self.dtype.size()])?;
        }
        Ok(())
    }

    fn fill(&self, values: &mut [f32], first: usize, seed: u64) {
        match self.fill {
            Fill::One => values.fill(1.0),
            Fill::Zero => values.fill(0.0),
            Fill::InverseFrequencies => {
                let width = 2.0 * self.shape.elements() as f64;
                for (i, v) in values.iter_mut().enumerate() {
                    *v = 10_000f64.powf(-2.0 * (first + i) as f64 / width) as f32;
                }
            }
            Fill::Random { stream, std } => {
                // 16 random bits a value: eight values from one Philox block. A uniform distribution of width
                // `sqrt(12) std` has the standard deviation `std`.
                let step = 12f32.sqrt() * std / 65_536.0;
                let stream = Stream::new(seed, stream);
                for (i, eight) in values.chunks_mut(8).enumerate() {
                    let block = stream.block((first / 8 + i) as u64);
                    for (j, v) in eight.iter_mut().enumerate() {
                        let bits = (block[j / 2] >> (16 * (j % 2))) & 0xffff;
                        *v = (bits as f32 - 32_767.5) * step;
                    }
                }
            }
        }
    }
}

fn pack(values: &[f32], dtype: DType, out: &mut [u8]) {
    let mut halves = [0u16; 1024];
    let size = dtype.size();
    for (values, out) in values
        .chunks(halves.len())
        .zip(out.chunks_mut(halves.len() * size))
    {
        let halves = &mut halves[..values.len()];
        match dtype {
            DType::F16 => bytemuck::cast_slice_mut::<u16, f16>(halves).convert_from_f32_slice(values),
            DType::BF16 => bytemuck::cast_slice_mut::<u16, bf16>(halves).convert_from_f32_slice(values),
            _ => {
                out.copy_from_slice(bytemuck::cast_slice(values));
                continue;
            }
        }
        out.copy_from_slice(bytemuck::cast_slice(halves));
    }
}
