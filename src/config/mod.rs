//! The configuration of a training run: `run.toml` and the flags of `glmtune train`, resolved and checked.
//!
//! Every flag is a key of the file (`--learning-rate` is `learning_rate`); flags override the file, the file overrides
//! the defaults. The resolved configuration is written beside the result, and repeats the run.

mod check;
mod file;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::optim::OptimizerKind;
use crate::schedule::Scheduler;
use file::{one_line, parse, read_table, too_large};

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// LoRA on frozen 4-bit weights.
    #[default]
    Qlora,
    /// LoRA on the weights as the checkpoint stores them.
    Lora,
    /// P-Tuning v2: keys and values of a prefix in every layer.
    Ptuning,
    /// Some layers' own weights.
    Freeze,
    /// Every parameter.
    Full,
}

impl Method {
    /// The flag's value.
    pub const fn name(self) -> &'static str {
        match self {
            Method::Qlora => "qlora",
            Method::Lora => "lora",
            Method::Ptuning => "ptuning",
            Method::Freeze => "freeze",
            Method::Full => "full",
        }
    }

    /// The learning rate when none is given: QLoRA and LoRA as QLoRA's authors, P-Tuning and full tuning as THUDM's scripts
    /// (`ptuning/train.sh`, `ds_train_finetune.sh`), freeze as ChatGLM-Efficient-Tuning.
    pub const fn learning_rate(self) -> f64 {
        match self {
            Method::Qlora | Method::Lora => 2e-4,
            Method::Ptuning => 2e-2,
            Method::Freeze => 5e-5,
            Method::Full => 1e-4,
        }
    }
}

/// How the gradients of the micro-batches of one step are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossReduction {
    /// Every supervised token of the step counts the same: the loss does not depend on how the step is cut.
    #[default]
    Token,
    /// The mean of each micro-batch's own mean, as the Hugging Face Trainer up to 4.45.
    MicroBatch,
}

/// A number of an evaluation that runs can be compared by. Names as in `metrics.jsonl`, without `eval_`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Metric {
    /// Nats per supervised token.
    #[default]
    #[serde(rename = "loss")]
    Loss,
    /// Share of supervised tokens that are the most probable one.
    #[serde(rename = "token_accuracy")]
    TokenAccuracy,
    /// Share of generated answers that equal the reference.
    #[serde(rename = "exact_match")]
    ExactMatch,
    /// Of generated answers.
    #[serde(rename = "bleu-4")]
    Bleu4,
    /// Of generated answers.
    #[serde(rename = "rouge-1")]
    Rouge1,
    /// Of generated answers.
    #[serde(rename = "rouge-2")]
    Rouge2,
    /// Of generated answers.
    #[serde(rename = "rouge-l")]
    RougeL,
}

impl Metric {
    /// Every metric with its name.
    pub const ALL: [(Metric, &'static str); 7] = [
        (Metric::Loss, "loss"),
        (Metric::TokenAccuracy, "token_accuracy"),
        (Metric::ExactMatch, "exact_match"),
        (Metric::Bleu4, "bleu-4"),
        (Metric::Rouge1, "rouge-1"),
        (Metric::Rouge2, "rouge-2"),
        (Metric::RougeL, "rouge-l"),
    ];

    /// The name.
    pub fn name(self) -> &'static str {
        Self::ALL
            .into_iter()
            .find(|(metric, _)| *metric == self)
            .map_or("", |(_, name)| name)
    }

    /// Does it need generated answers?
    pub const fn generates(self) -> bool {
        !matches!(self, Metric::Loss | Metric::TokenAccuracy)
    }

    /// Is `new` better than `old` by more than `threshold`?
    pub fn improves(self, new: f64, old: f64, threshold: f64) -> bool {
        match self {
            Metric::Loss => new < old - threshold,
            _ => new > old + threshold,
        }
    }
}

/// The limit of a sample's length when none is given.
pub const DEFAULT_MAX_LENGTH: usize = 1024;

/// The resolved configuration of `glmtune train`. Field names are the keys of `run.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(
    missing_docs,
    reason = "each is the flag of the same name, documented in cli/train.rs"
)]
pub struct RunConfig {
    pub model: PathBuf,
    pub data: PathBuf,
    pub output: PathBuf,
    pub method: Method,
    pub device: String,
    pub dtype: String,

    pub lora_r: usize,
    /// `None`: twice `lora_r`.
    pub lora_alpha: Option<f64>,
    pub lora_dropout: f64,
    pub lora_target: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lora_layers: Vec<usize>,
    /// Each `PATTERN=RANK`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lora_rank_pattern: Vec<String>,
    /// Each `PATTERN=ALPHA`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lora_alpha_pattern: Vec<String>,
    pub rslora: bool,
    pub dora: bool,
    pub lora_init: String,
    pub modules_to_save: Vec<String>,
    pub loraplus_lr_ratio: Option<f64>,
    /// 0 turns the noise off.
    pub neftune_alpha: f64,

    pub pre_seq_len: usize,
    pub prefix_projection: bool,
    pub prefix_dropout: f64,

    /// The last n layers, or the first |n| when negative.
    pub trainable_layers: i64,
    pub trainable_modules: String,

    pub adapter: Option<PathBuf>,
    pub merge_adapters: Vec<PathBuf>,

    pub load_in: Option<String>,
    pub quant_type: String,
    pub no_double_quant: bool,
    pub cache_dir: Option<PathBuf>,

    /// Bytes such as `12GB`; `None`: what is free. Never written to `run.toml`: it is about the machine, not about the run.
    #[serde(skip_serializing)]
    pub vram: Option<String>,
    pub recompute: String,
    pub head_storage: String,
    pub stream_weights: String,
    pub optimizer_state: String,
    pub optimizer_vram: Option<String>,
    pub optimizer_in_backward: String,

    pub optim: OptimizerKind,
    /// `None`: that of the method, [`Method::learning_rate`].
    pub learning_rate: Option<f64>,
    pub lr_scheduler: Scheduler,
    pub min_lr_ratio: f64,
    pub lr_power: f64,
    /// Overrides `warmup_ratio`.
    pub warmup_steps: Option<u64>,
    pub warmup_ratio: f64,
    pub epochs: f64,
    /// Overrides `epochs`.
    pub max_steps: Option<u64>,
    pub micro_batch_size: usize,
    pub gradient_accumulation_steps: usize,
    pub loss_reduction: LossReduction,
    /// 0 turns clipping off.
    pub max_grad_norm: f64,
    pub weight_decay: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    pub momentum: f64,
    pub max_bad_steps: u64,
    pub seed: u64,

    pub max_source_length: Option<usize>,
    pub max_target_length: Option<usize>,
    /// 1024 when none of the three limits is given.
    pub max_length: Option<usize>,
    pub over_length: String,
    pub first_target: String,
    pub prompt_column: Option<String>,
    pub response_column: Option<String>,
    pub history_column: Option<String>,
    pub replay: Option<PathBuf>,
    pub replay_ratio: f64,

    pub eval_data: Option<PathBuf>,
    pub val_ratio: Option<f64>,
    pub val_size: Option<usize>,
    /// `None`, and no `eval_epochs`: before the first and after the last step only.
    pub eval_steps: Option<u64>,
    pub eval_epochs: Option<f64>,
    /// Answers generated at each evaluation.
    pub eval_samples: usize,
    pub eval_max_new_tokens: usize,
    pub metric_for_best_model: Metric,
    pub early_stopping_patience: Option<u64>,
    pub early_stopping_threshold: f64,
    pub save_best: bool,
    pub forgetting: bool,
    pub forgetting_tokens: usize,

    pub save_steps: u64,
    pub save_total_limit: usize,
    pub logging_steps: u64,
    pub preview: bool,

    /// Continue the run in `output`; never written to `run.toml`.
    #[serde(skip_serializing)]
    pub resume: bool,
    /// Replace what is in `output`; never written to `run.toml`.
    #[serde(skip_serializing)]
    pub overwrite: bool,
    /// Is the cut of a step into micro-batches free, since neither flag was given? Not a key.
    #[serde(skip)]
    pub auto_micro_batch: bool,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            model: PathBuf::new(),
            data: PathBuf::new(),
            output: PathBuf::new(),
            method: Method::Qlora,
            device: "auto".into(),
            dtype: "auto".into(),
            lora_r: 8,
            lora_alpha: None,
            lora_dropout: 0.0,
            lora_target: "all".into(),
            lora_layers: Vec::new(),
            lora_rank_pattern: Vec::new(),
            lora_alpha_pattern: Vec::new(),
            rslora: false,
            dora: false,
            lora_init: "kaiming".into(),
            modules_to_save: Vec::new(),
            loraplus_lr_ratio: None,
            neftune_alpha: 0.0,
            pre_seq_len: 128,
            prefix_projection: false,
            prefix_dropout: 0.1,
            trainable_layers: 3,
            trainable_modules: "all".into(),
            adapter: None,
            merge_adapters: Vec::new(),
            load_in: None,
            quant_type: "nf4".into(),
            no_double_quant: false,
            cache_dir: None,
            vram: None,
            recompute: "auto".into(),
            head_storage: "auto".into(),
            stream_weights: "auto".into(),
            optimizer_state: "auto".into(),
            optimizer_vram: None,
            optimizer_in_backward: "auto".into(),
            optim: OptimizerKind::Adamw,
            learning_rate: None,
            lr_scheduler: Scheduler::Cosine,
            min_lr_ratio: 0.0,
            lr_power: 1.0,
            warmup_steps: None,
            warmup_ratio: 0.03,
            epochs: 3.0,
            max_steps: None,
            micro_batch_size: 2,
            gradient_accumulation_steps: 8,
            loss_reduction: LossReduction::Token,
            max_grad_norm: 1.0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            momentum: 0.9,
            max_bad_steps: 3,
            seed: 42,
            max_source_length: None,
            max_target_length: None,
            max_length: None,
            over_length: "cut".into(),
            first_target: "sop".into(),
            prompt_column: None,
            response_column: None,
            history_column: None,
            replay: None,
            replay_ratio: 0.1,
            eval_data: None,
            val_ratio: None,
            val_size: None,
            eval_steps: None,
            eval_epochs: None,
            eval_samples: 0,
            eval_max_new_tokens: 128,
            metric_for_best_model: Metric::Loss,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
            save_best: false,
            forgetting: false,
            forgetting_tokens: 24,
            save_steps: 100,
            save_total_limit: 3,
            logging_steps: 1,
            preview: false,
            resume: false,
            overwrite: false,
            auto_micro_batch: false,
        }
    }
}

/// Keys that may change when a run is resumed: they move files or say how often something is reported, and change no
/// number of the training. What lies at `model` and `data` is compared by content instead, `device` and `dtype` by what
/// they came to.
const FREE_ON_RESUME: [&str; 30] = [
    "vram",
    "recompute",
    "stream_weights",
    "optimizer_state",
    "optimizer_vram",
    "optimizer_in_backward",
    "model",
    "adapter",
    "merge_adapters",
    "data",
    "replay",
    "device",
    "dtype",
    "output",
    "cache_dir",
    "eval_data",
    "eval_steps",
    "eval_epochs",
    "eval_samples",
    "eval_max_new_tokens",
    "metric_for_best_model",
    "early_stopping_patience",
    "early_stopping_threshold",
    "save_best",
    "forgetting",
    "max_bad_steps",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "preview",
];

impl RunConfig {
    /// Merges the flags (what they serialise to: the keys given on the command line) over `file` over the defaults, and checks the
    /// result. Paths become absolute, so that `run.toml` repeats the run from any folder.
    ///
    /// # Errors
    /// The file cannot be read or holds an unknown key or a wrong type; a required key is missing; a value is out of
    /// its range.
    pub fn resolve(file: Option<&Path>, flags: &impl Serialize) -> Result<Self> {
        let mut table = match file {
            Some(path) => read_table(path)?,
            None => toml::Table::new(),
        };
        let given = toml::Table::try_from(flags).map_err(|e| too_large(flags, &e))?;
        let named: Vec<String> = given.keys().cloned().collect();
        table.extend(given);
        let cut = ["micro_batch_size", "gradient_accumulation_steps"];
        let auto_micro_batch = !cut.into_iter().any(|key| table.contains_key(key));
        let mut config: Self = table
            .try_into()
            .map_err(|e| Error::Usage(format!("{}; see `glmtune train --help`", one_line(&e))))?;
        config.auto_micro_batch = auto_micro_batch;
        config.check()?;
        config.check_flags(&named)?;
        if config
            .max_source_length
            .or(config.max_target_length)
            .or(config.max_length)
            .is_none()
        {
            config.max_length = Some(DEFAULT_MAX_LENGTH);
        }
        for path in [&mut config.model, &mut config.data, &mut config.output] {
            *path = std::path::absolute(&*path).map_err(Error::io(&*path, "resolve"))?;
        }
        let optional = [
            &mut config.eval_data,
            &mut config.cache_dir,
            &mut config.adapter,
            &mut config.replay,
        ];
        for path in optional.into_iter().flatten().chain(&mut config.merge_adapters) {
            *path = std::path::absolute(&*path).map_err(Error::io(&*path, "resolve"))?;
        }
        Ok(config)
    }

    /// Reads a `run.toml` as it stands.
    ///
    /// # Errors
    /// The file cannot be read, or holds an unknown key or a wrong type.
    pub fn read(path: &Path) -> Result<Self> {
        parse(&read_table(path)?, path)
    }

    /// The highest learning rate: as given, else that of the method.
    pub fn rate(&self) -> f64 {
        self.learning_rate.unwrap_or_else(|| self.method.learning_rate())
    }

    /// Does the result come from the best checkpoint and not from the last step?
    pub fn keeps_best(&self) -> bool {
        self.save_best || self.early_stopping_patience.is_some()
    }

    /// Are the frozen weights held in 4 bits? Always for QLoRA; for P-Tuning unless `load_in` says otherwise, as THUDM's
    /// script trains it.
    pub fn in_four_bits(&self) -> bool {
        match self.method {
            Method::Qlora => true,
            Method::Ptuning => self.load_in.as_deref() != Some("stored"),
            Method::Lora | Method::Freeze | Method::Full => false,
        }
    }

    /// LoRA's alpha: as given, else twice the rank.
    pub fn alpha(&self) -> f64 {
        self.lora_alpha.unwrap_or(2.0 * self.lora_r as f64)
    }

    /// The text of `run.toml`.
    pub fn to_toml(&self) -> String {
        let body = toml::to_string(self).unwrap_or_else(|e| panic!("a RunConfig is always TOML: {e}"));
        format!("# Repeat this run: glmtune train --config run.toml --output ANOTHER_FOLDER\n{body}")
    }

    /// The keys that decide the numbers of a run: what a resumed run must have in common with the one it continues.
    pub fn decisive(&self) -> serde_json::Map<String, serde_json::Value> {
        let value = serde_json::to_value(self).unwrap_or_else(|e| panic!("a RunConfig is always JSON: {e}"));
        let serde_json::Value::Object(mut map) = value else {
            panic!("a RunConfig is an object")
        };
        map.retain(|key, value| !FREE_ON_RESUME.contains(&key.as_str()) && !value.is_null());
        // One name for both spellings of the same run.
        map.insert("lora_alpha".into(), self.alpha().into());
        map.insert("learning_rate".into(), self.rate().into());
        // A streamed head has the bits of one in the compute type.
        if matches!(self.head_storage.as_str(), "auto" | "compute" | "stream") {
            map.remove("head_storage");
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(text: &str) -> toml::Table {
        text.parse().unwrap()
    }

    fn message(text: &str) -> String {
        RunConfig::resolve(None, &flags(text)).unwrap_err().to_string()
    }

    const REQUIRED: &str = "model = 'm'\ndata = 'd.json'\noutput = 'o'\n";

    #[test]
    fn flags_override_the_file_and_the_file_overrides_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("run.toml");
        std::fs::write(
            &file,
            format!("{REQUIRED}learning-rate = 1e-3\nlora_r = 4\nlr_scheduler = 'linear'\n"),
        )
        .unwrap();
        let config = RunConfig::resolve(Some(&file), &flags("lora_r = 16")).unwrap();
        assert_eq!((config.rate(), config.lora_r, config.epochs), (1e-3, 16, 3.0));
        assert_eq!((config.lr_scheduler, config.alpha()), (Scheduler::Linear, 32.0));
        assert!(config.model.is_absolute());
    }

    #[test]
    fn a_written_configuration_reads_back_the_same() {
        let mut config = RunConfig::resolve(None, &flags(REQUIRED)).unwrap();
        config.learning_rate = Some(0.1 + 0.2);
        config.lora_alpha = Some(7.5);
        config.val_size = Some(3);
        config.loss_reduction = LossReduction::MicroBatch;
        // What is written has been settled.
        config.auto_micro_batch = false;
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("run.toml");
        std::fs::write(&file, config.to_toml()).unwrap();
        let again = RunConfig::resolve(Some(&file), &flags("")).unwrap();
        assert_eq!(config, again);
        assert_eq!(config.decisive(), again.decisive());
    }

    #[test]
    fn what_is_wrong_is_named_in_one_line() {
        assert!(message("data = 'd'").contains("--model is missing"));
        for (extra, expected) in [
            ("learnin_rate = 1.0", "learnin_rate"),
            (
                "learning_rate = -1.0",
                "--learning-rate: found -1, expected a number above 0",
            ),
            ("learning_rate = nan", "--learning-rate: found NaN"),
            ("lora_r = 0", "--lora-r: found 0"),
            ("lora_r = 'x'", "invalid type"),
            ("method = 'fully'", "fully"),
            ("resume = true\noverwrite = true", "give one of them"),
            ("val_ratio = 0.1\nval_size = 3", "give one of them"),
            ("eval_steps = 5", "needs evaluation data"),
            (
                "method = 'full'\nlora_r = 4",
                "--lora-r belongs to --method lora or qlora, not to full",
            ),
            (
                "trainable_layers = 2",
                "--trainable-layers belongs to --method freeze, not to qlora",
            ),
            (
                "adapter = 'a'\nlora_alpha = 3.0",
                "--lora-alpha is that of --adapter: leave it out",
            ),
            ("replay_ratio = 0.3", "give the file"),
            ("momentum = 0.5", "--momentum belongs to --optim sgd"),
            ("method = 'freeze'\nadapter = 'a'", "--merge-adapters"),
            (
                "eval_steps = 5\neval_epochs = 1.0\nval_size = 1",
                "give one of them",
            ),
            (
                "metric_for_best_model = 'bleu-4'\nval_size = 1",
                "add --eval-samples",
            ),
            (
                "lr_scheduler = 'constant'\nmin_lr_ratio = 0.1",
                "--min-lr-ratio belongs to",
            ),
            ("method = 'full'\nload_in = '4bit'", "do not train"),
        ] {
            let message = message(&format!("{REQUIRED}{extra}"));
            assert!(message.contains(expected), "{extra}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn paths_and_reports_may_change_on_resume_numbers_may_not() {
        let a = RunConfig::resolve(None, &flags(REQUIRED)).unwrap();
        let mut b = RunConfig {
            save_steps: 7,
            output: "elsewhere".into(),
            resume: true,
            ..a.clone()
        };
        assert_eq!(a.decisive(), b.decisive());
        b.seed = 1;
        assert_ne!(a.decisive(), b.decisive());
    }
}
