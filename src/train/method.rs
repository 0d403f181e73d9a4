//! From the flags of a run to its tuning method, and to words.

use std::path::Path;
use std::str::FromStr;

use crate::checkpoint::{AdapterConfig, LM_HEAD, Patterns};
use crate::config::{Method, RunConfig};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::tune::{
    self, FreezeModules, LoraConfig, LoraInit, LoraTarget, PrefixConfig, SavedModule, Tuning,
};

/// What trains.
///
/// # Errors
/// A name that is none: exit code 2.
pub(super) fn tuning(config: &RunConfig) -> Result<Tuning> {
    Ok(match config.method {
        Method::Lora | Method::Qlora => Tuning::Lora(LoraConfig {
            r: config.lora_r,
            alpha: config.alpha(),
            dropout: config.lora_dropout,
            rslora: config.rslora,
            targets: targets(&config.lora_target)?,
            layers: config.lora_layers.clone(),
            rank_pattern: patterns("--lora-rank-pattern", &config.lora_rank_pattern)?,
            alpha_pattern: patterns("--lora-alpha-pattern", &config.lora_alpha_pattern)?,
            dora: config.dora,
            init: config.lora_init.parse::<LoraInit>().map_err(usage)?,
            modules_to_save: config
                .modules_to_save
                .iter()
                .map(|name| name.parse::<SavedModule>().map_err(usage))
                .collect::<Result<_>>()?,
        }),
        Method::Ptuning => Tuning::PTuning(PrefixConfig {
            pre_seq_len: config.pre_seq_len,
            projection: config.prefix_projection,
            dropout: config.prefix_dropout,
        }),
        Method::Freeze => Tuning::Freeze {
            layers: config.trainable_layers,
            modules: match config.trainable_modules.as_str() {
                "mlp" => FreezeModules::Mlp,
                "attention" => FreezeModules::Attention,
                _ => FreezeModules::All,
            },
        },
        Method::Full => Tuning::Full,
    })
}

fn usage(error: Error) -> Error {
    Error::Usage(error.to_string())
}

fn targets(list: &str) -> Result<Vec<LoraTarget>> {
    if list == "all" {
        return Ok(LoraTarget::ALL.to_vec());
    }
    let names = list.split(',').map(str::trim);
    let parsed: Result<Vec<LoraTarget>> = names.map(str::parse).collect();
    let mut targets = parsed.map_err(usage)?;
    targets.sort_unstable();
    targets.dedup();
    Ok(targets)
}

/// `PATTERN=VALUE`, in order.
fn patterns<T: Copy + FromStr>(flag: &str, list: &[String]) -> Result<Patterns<T>> {
    let pair = |text: &String| {
        let parts = text.rsplit_once('=');
        let value =
            parts.and_then(|(pattern, value)| Some((pattern.to_string(), value.trim().parse().ok()?)));
        value.ok_or_else(|| {
            Error::Usage(format!(
                "{flag}: found {text}, expected PATTERN=VALUE, e.g. mlp.dense_4h_to_h=4"
            ))
        })
    };
    let pairs: Vec<(String, T)> = list.iter().map(pair).collect::<Result<_>>()?;
    Patterns::new(pairs).map_err(usage)
}

/// The patterns of an adapter as a run's configuration spells them.
fn spelled<T: Copy + std::fmt::Display>(patterns: &Patterns<T>) -> Vec<String> {
    patterns
        .pairs()
        .map(|(pattern, value)| format!("{pattern}={value}"))
        .collect()
}

/// The configuration of a run that goes on training an adapter: its form is the adapter's, whatever the flags' defaults say.
///
/// # Errors
/// The folder holds no adapter, or one of another kind than the method's.
pub(super) fn inherit(config: &RunConfig) -> Result<RunConfig> {
    let mut config = config.clone();
    let written = config.output.join("run.toml");
    if config.resume && written.exists() {
        // What was chosen for the run's first start decides its numbers: it stays.
        let before = RunConfig::read(&written)?;
        if config.auto_micro_batch {
            config.micro_batch_size = before.micro_batch_size;
            config.gradient_accumulation_steps = before.gradient_accumulation_steps;
            config.auto_micro_batch = false;
        }
        if config.head_storage == "auto" {
            // A run from before there was a choice.
            config.head_storage = match before.head_storage.as_str() {
                "auto" => "compute".into(),
                _ => before.head_storage,
            };
        }
        if config.optimizer_state == "auto" {
            config.optimizer_state = before.optimizer_state;
        }
    }
    let Some(dir) = config.adapter.clone() else {
        return Ok(config);
    };
    if config.resume && written.exists() {
        // The run has its own copy of the adapter by now: the one it began from may be gone.
        let before = RunConfig::read(&written)?;
        return Ok(RunConfig {
            lora_r: before.lora_r,
            lora_alpha: before.lora_alpha,
            lora_dropout: before.lora_dropout,
            lora_target: before.lora_target,
            lora_layers: before.lora_layers,
            lora_rank_pattern: before.lora_rank_pattern,
            lora_alpha_pattern: before.lora_alpha_pattern,
            rslora: before.rslora,
            dora: before.dora,
            lora_init: before.lora_init,
            modules_to_save: before.modules_to_save,
            pre_seq_len: before.pre_seq_len,
            prefix_projection: before.prefix_projection,
            ..config
        });
    }
    let of = |kind: &str, method: &str| {
        Error::input(
            dir.display(),
            kind,
            format!("what --method {} trains", config.method.name()),
            format!("use --method {method}"),
        )
    };
    match (tune::adapter_kind(&dir)?, config.method) {
        (tune::Loaded::Lora(adapter), Method::Lora | Method::Qlora) => {
            config.lora_r = adapter.r;
            config.lora_alpha = Some(adapter.lora_alpha);
            config.lora_dropout = adapter.lora_dropout;
            let (targets, layers) = adapter.grid().ok_or_else(|| no_grid(&dir, &adapter))?;
            config.lora_target = targets.join(",");
            config.lora_layers = layers;
            config.lora_rank_pattern = spelled(&adapter.rank_pattern);
            config.lora_alpha_pattern = spelled(&adapter.alpha_pattern);
            config.rslora = adapter.use_rslora;
            config.dora = adapter.use_dora;
            config.lora_init = "kaiming".into();
            let last = |name: &String| name.rsplit('.').next().unwrap_or(name).to_string();
            config.modules_to_save = adapter.modules_to_save.iter().map(last).collect();
        }
        (tune::Loaded::Prefix(prefix), Method::Ptuning) => {
            config.pre_seq_len = prefix.pre_seq_len;
            config.prefix_projection = prefix.projection;
        }
        (tune::Loaded::Lora(_), _) => return Err(of("a LoRA adapter", "lora or qlora")),
        (tune::Loaded::Prefix(_), _) => return Err(of("a P-Tuning prefix", "ptuning")),
    }
    Ok(config)
}

/// An adapter whose layers differ in the linears that carry it: no flags describe a run of it.
fn no_grid(dir: &Path, adapter: &AdapterConfig) -> Error {
    Error::input(
        dir.join("adapter_config.json").display(),
        format!(
            "target_modules {}, not the same ones in each layer",
            adapter.targets_in_words()
        ),
        "the same modules in every layer that has some",
        "such an adapter can be used, but not trained on: merge it with --merge-adapters",
    )
}

/// The method in words.
pub(super) fn words(config: &RunConfig) -> String {
    let lora = || {
        let kind = match (config.dora, config.rslora) {
            (true, _) => "DoRA",
            (false, true) => "rsLoRA",
            (false, false) => "LoRA",
        };
        let init = match config.lora_init.as_str() {
            "kaiming" => String::new(),
            other => format!(", {other}"),
        };
        format!("{kind} r {}, alpha {}{init}", config.lora_r, config.alpha())
    };
    match config.method {
        Method::Qlora => format!("Q{} on {}", lora(), config.quant_type),
        Method::Lora => lora(),
        Method::Ptuning => format!(
            "P-Tuning v2, prefix of {}{}",
            config.pre_seq_len,
            if config.prefix_projection {
                " with projection"
            } else {
                ""
            }
        ),
        Method::Freeze => format!(
            "freeze: the {} {} layer{} ({})",
            if config.trainable_layers > 0 {
                "last"
            } else {
                "first"
            },
            config.trainable_layers.unsigned_abs(),
            if config.trainable_layers.unsigned_abs() == 1 {
                ""
            } else {
                "s"
            },
            config.trainable_modules
        ),
        Method::Full => "full-parameter tuning".to_string(),
    }
}

/// Elements that train, tensors that train, elements of the base.
pub(super) fn counts(model: &Model) -> (usize, usize, usize) {
    let (mut trained, mut tensors, mut separate_head) = (0usize, 0usize, false);
    model.for_each_param(&mut |name, param| {
        separate_head |= name == LM_HEAD;
        if param.trains() {
            trained += param.value.elements();
            tensors += 1;
        }
    });
    let names = model.config().tensors();
    let base = names
        .iter()
        .filter(|(name, _)| separate_head || name != LM_HEAD)
        .map(|(_, shape)| shape.elements())
        .sum();
    (trained, tensors, base)
}

/// What is trained, in one line.
pub(super) fn describe(config: &RunConfig, model: &Model, total_steps: u64, steps_per_epoch: u64) -> String {
    let (trained, tensors, base) = counts(model);
    let per_step = config.micro_batch_size * config.gradient_accumulation_steps;
    format!(
        "{}: {trained} parameters in {tensors} tensors train ({:.3} % of {base}); {total_steps} steps of up to {per_step} samples, \
         {steps_per_epoch} a pass",
        words(config),
        100.0 * trained as f64 / base as f64,
    )
}
