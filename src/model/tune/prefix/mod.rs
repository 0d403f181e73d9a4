//! P-Tuning v2: how a prefix starts, how it is read and written.

mod folder;

use std::path::Path;

use serde_json::json;

pub(super) use folder::is_folder;

use self::folder::Folder;
use crate::checkpoint::{refuse_non_finite, write_torch_bin};
use crate::error::{Error, Result};
use crate::model::{Model, ModelConfig, config};
use crate::nn::{PREFIX_ENCODER, Param, PrefixEncoder, Projection};
use crate::rng::Stream;
use crate::tensor::{DType, Device, Shape, Tensor, check_memory};

/// A prefix of keys and values (Liu et al. 2022), as the official `ptuning` scripts train it.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefixConfig {
    /// P, its length in positions.
    pub pre_seq_len: usize,
    /// Through two linears with a tanh between them, instead of an embedding alone?
    pub projection: bool,
    /// Probability that an element of a key or value is dropped in training; the official code has 0.1.
    pub dropout: f64,
}

impl Default for PrefixConfig {
    fn default() -> Self {
        Self {
            pre_seq_len: 128,
            projection: false,
            dropout: 0.1,
        }
    }
}

/// As the official trainer names the file.
const WEIGHTS: &str = "pytorch_model.bin";
/// Streams of random numbers that no adapter draws from.
const STREAM: u64 = 1 << 32;

/// The encoder's tensors by their names behind `transformer.prefix_encoder.`, in the official order.
fn shapes(config: &ModelConfig, length: usize, projection: bool) -> Vec<(&'static str, Shape)> {
    let (hidden, columns) = (config.hidden_size, 2 * config.num_layers * config.hidden_size);
    if !projection {
        return vec![("embedding.weight", [length, columns].into())];
    }
    vec![
        ("embedding.weight", [length, hidden].into()),
        ("trans.0.weight", [hidden, hidden].into()),
        ("trans.0.bias", [hidden].into()),
        ("trans.2.weight", [columns, hidden].into()),
        ("trans.2.bias", [columns].into()),
    ]
}

/// An encoder of parameters in the order of [`shapes`].
fn encoder(params: Vec<Param>, dropout: f64) -> Result<PrefixEncoder> {
    let mut params = params.into_iter();
    let Some(embedding) = params.next() else {
        return Err(Error::input(
            "prefix encoder",
            "no tensor",
            "an embedding",
            "this is a bug",
        ));
    };
    let projection = match (params.next(), params.next(), params.next(), params.next()) {
        (Some(inner), Some(inner_bias), Some(outer), Some(outer_bias)) => Some(Projection {
            inner,
            inner_bias,
            outer,
            outer_bias,
        }),
        _ => None,
    };
    Ok(PrefixEncoder {
        embedding,
        projection,
        dropout: dropout as f32,
    })
}

/// Adds a new prefix, as PyTorch starts these modules: a normal embedding; linears uniform in `±1/sqrt(in)`, biases too.
///
/// # Errors
/// The length is 0, dropout is not in 0..1, or there is not enough memory.
pub(super) fn apply(model: &mut Model, config: &PrefixConfig, seed: u64) -> Result<()> {
    let PrefixConfig {
        pre_seq_len,
        projection,
        dropout,
    } = *config;
    if pre_seq_len == 0 {
        let remedy = "give a length such as 128";
        return Err(Error::input("--pre-seq-len", 0, "at least 1", remedy));
    }
    if !(0.0..1.0).contains(&dropout) {
        let expected = "a probability in 0..1";
        return Err(Error::input(
            "--prefix-dropout",
            dropout,
            expected,
            "use 0 to 0.1",
        ));
    }
    let (device, dtype) = (model.device(), model.dtype().accumulator());
    let shapes = shapes(model.config(), pre_seq_len, projection);
    let elements: u128 = shapes
        .iter()
        .map(|(_, s)| s.extents().iter().map(|&e| e as u128).product::<u128>())
        .sum();
    // Value, gradient and the two moments of the optimizer.
    let bytes = 4 * dtype.size() as u128 * elements;
    let remedy = "give a shorter one; 64 to 256 are usual";
    if device == Device::Cpu {
        check_memory(&format!("--pre-seq-len {pre_seq_len}"), bytes, remedy)?;
    }
    let hidden = model.config().hidden_size;
    let mut params = Vec::with_capacity(shapes.len());
    for ((name, shape), number) in shapes.into_iter().zip(STREAM..) {
        let stream = Stream::new(seed, number);
        let bound = 1.0 / (hidden as f32).sqrt();
        let mut values = Tensor::zeros(DType::F32, shape);
        match name {
            _ if values.is_planned() => {}
            "embedding.weight" => stream.generate(values.as_mut_slice(), |s, i| s.normal(i)),
            _ => stream.generate(values.as_mut_slice(), |s, i| (2.0 * s.uniform(i) - 1.0) * bound),
        }
        params.push(Param::trainable(in_sums(values, dtype).into_device(device)?)?);
    }
    model.prefix = Some(encoder(params, dropout)?);
    Ok(())
}

fn in_sums(tensor: Tensor, dtype: DType) -> Tensor {
    if tensor.dtype() == dtype {
        tensor
    } else {
        tensor.to_dtype(dtype)
    }
}

/// The prefix of an official folder, each tensor checked, in the order of [`shapes`]: the length is that of the embedding, the
/// projection is there if its tensors are, dropout is the official one.
///
/// # Errors
/// A tensor is unknown, missing, mis-shaped or not finite; each is named.
fn read(config: &ModelConfig, dir: &Path) -> Result<(PrefixConfig, Vec<Tensor>)> {
    let mut folder = Folder::read(dir)?;
    folder.leave_others(config)?;
    let kind = folder.kind()?;
    let mut tensors = Vec::new();
    for (name, shape) in shapes(config, kind.pre_seq_len, kind.projection) {
        let place = folder.place(name);
        let remedy = "this prefix belongs to another base model: give --model the base it was trained on";
        let Some(tensor) = folder.encoder.remove(name) else {
            return Err(Error::input(place, "nothing", "a tensor", remedy));
        };
        if tensor.shape() != shape || kind.pre_seq_len == 0 || !tensor.dtype().is_float() {
            let found = format!("{} {}", tensor.dtype(), tensor.shape());
            return Err(Error::input(place, found, format!("floats {shape}"), remedy));
        }
        refuse_non_finite(&place, &tensor)?;
        tensors.push(tensor);
    }
    if let Some(name) = folder.encoder.keys().next() {
        let expected = "embedding.weight, trans.0 and trans.2";
        let remedy = "this is no prefix of the official code";
        let place = folder.place(&name.escape_debug().to_string());
        return Err(Error::input(place, "an unknown tensor", expected, remedy));
    }
    Ok((kind, tensors))
}

/// Does the prefix of an official folder fit a base of this configuration?
///
/// # Errors
/// It does not: see [`load`].
pub(super) fn check(config: &ModelConfig, dir: &Path) -> Result<PrefixConfig> {
    read(config, dir).map(|(kind, _)| kind)
}

/// Puts the prefix of an official folder into the model.
///
/// # Errors
/// A tensor is unknown, missing, mis-shaped or not finite; each is named.
pub(super) fn load(model: &mut Model, dir: &Path, trainable: bool) -> Result<PrefixConfig> {
    let (config, tensors) = read(model.config(), dir)?;
    let (device, dtype) = (model.device(), model.dtype().accumulator());
    let mut params = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let value = tensor.to_dtype(dtype).into_device(device)?;
        params.push(match trainable {
            true => Param::trainable(value)?,
            false => Param::frozen(value),
        });
    }
    model.prefix = Some(encoder(params, config.dropout)?);
    Ok(config)
}

/// Length and projection of the prefix in an official folder, without a model to compare it with.
///
/// # Errors
/// The file cannot be read, or has no embedding of a prefix.
pub(super) fn kind(dir: &Path) -> Result<PrefixConfig> {
    Folder::read(dir)?.kind()
}

/// Writes the prefix of any folder that [`load`] reads as the official trainer does, with the `config.json` of `base`, else its
/// own.
///
/// # Errors
/// As [`load`], but for what only a model can tell; there is no `config.json`.
pub(super) fn rewrite(from: &Path, base: Option<&Path>, dir: &Path) -> Result<PrefixConfig> {
    let folder = Folder::read(from)?;
    let kind = folder.kind()?;
    let names: Vec<&str> = match kind.projection {
        false => vec!["embedding.weight"],
        true => vec![
            "embedding.weight",
            "trans.0.weight",
            "trans.0.bias",
            "trans.2.weight",
            "trans.2.bias",
        ],
    };
    let mut tensors = Vec::new();
    for name in &names {
        let Some(tensor) = folder
            .encoder
            .get(*name)
            .filter(|tensor| tensor.dtype().is_float())
        else {
            let remedy = "the folder is not whole: copy it again";
            return Err(Error::input(
                folder.place(name),
                "nothing",
                "a tensor of floats",
                remedy,
            ));
        };
        refuse_non_finite(&folder.place(name), tensor)?;
        tensors.push((format!("{PREFIX_ENCODER}.{name}"), tensor.to_dtype(DType::F32)));
    }
    if let Some(name) = folder.encoder.keys().find(|name| !names.contains(&name.as_str())) {
        let place = folder.place(&name.escape_debug().to_string());
        return Err(Error::input(
            place,
            "an unknown tensor",
            names.join(", "),
            "this is no prefix of the official code",
        ));
    }
    write(&tensors, &kind, base.unwrap_or(from), dir)?;
    Ok(kind)
}

fn write(tensors: &[(String, Tensor)], kind: &PrefixConfig, base: &Path, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir, "create"))?;
    let borrowed: Vec<(String, &Tensor)> = tensors.iter().map(|(n, t)| (n.clone(), t)).collect();
    write_torch_bin(&dir.join(WEIGHTS), &borrowed)?;
    let keys = [
        ("pre_seq_len", json!(kind.pre_seq_len)),
        ("prefix_projection", json!(kind.projection)),
    ];
    config::copy(base, dir, &keys)
}

/// [`load`], to train on with the dropout of `config`.
///
/// # Errors
/// As [`load`]; the prefix in the folder is another one than `config` describes.
pub(super) fn restore(model: &mut Model, config: &PrefixConfig, dir: &Path) -> Result<()> {
    let found = load(model, dir, true)?;
    if (found.pre_seq_len, found.projection) != (config.pre_seq_len, config.projection) {
        let describe = |c: &PrefixConfig| {
            let how = if c.projection { "with" } else { "without" };
            format!("a prefix of {} {how} a projection", c.pre_seq_len)
        };
        let remedy = "go on with the settings that the run began with";
        return Err(Error::input(
            dir.display(),
            describe(&found),
            describe(config),
            remedy,
        ));
    }
    if let Some(prefix) = &mut model.prefix {
        prefix.dropout = config.dropout as f32;
    }
    Ok(())
}

/// Writes the prefix as the official trainer does: its tensors in F32 as `pytorch_model.bin`, and the base's `config.json`
/// with `pre_seq_len` and `prefix_projection`.
///
/// # Errors
/// The model has no prefix, or the folder cannot be written.
pub(super) fn save(model: &Model, base: &Path, dir: &Path) -> Result<()> {
    let Some(prefix) = &model.prefix else {
        let found = "a model without a prefix";
        return Err(Error::input(dir.display(), found, "a prefix", "train one first"));
    };
    let mut tensors = Vec::new();
    model.try_for_each_param(&mut |name, param| {
        if name.starts_with(PREFIX_ENCODER) {
            let value = param.value.to_device(Device::Cpu)?;
            tensors.push((name.to_string(), in_sums(value, DType::F32)));
        }
        Ok(())
    })?;
    let kind = PrefixConfig {
        pre_seq_len: prefix.len(),
        projection: prefix.projection.is_some(),
        ..PrefixConfig::default()
    };
    write(&tensors, &kind, base, dir)
}
