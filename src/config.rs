//! The configuration of a training run: `run.toml` and the flags of `glmtune train`, resolved and checked.
//!
//! Every flag is a key of the file (`--learning-rate` is `learning_rate`); flags override the file, the file overrides
//! the defaults. The resolved configuration is written beside the result, and repeats the run.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::schedule::Scheduler;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// LoRA on frozen 4-bit weights.
    #[default]
    Qlora,
    /// LoRA on the weights as the checkpoint stores them.
    Lora,
    /// P-Tuning v2: not yet.
    Ptuning,
    /// The last layers: not yet.
    Freeze,
    /// Every parameter: not yet.
    Full,
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
    pub rslora: bool,

    pub quant_type: String,
    pub no_double_quant: bool,
    pub cache_dir: Option<PathBuf>,

    pub learning_rate: f64,
    pub lr_scheduler: Scheduler,
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

    pub eval_data: Option<PathBuf>,
    pub val_ratio: Option<f64>,
    pub val_size: Option<usize>,
    /// `None`: at the end only.
    pub eval_steps: Option<u64>,
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
            rslora: false,
            quant_type: "nf4".into(),
            no_double_quant: false,
            cache_dir: None,
            learning_rate: 2e-4,
            lr_scheduler: Scheduler::Cosine,
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
            seed: 42,
            max_source_length: None,
            max_target_length: None,
            max_length: None,
            over_length: "cut".into(),
            first_target: "sop".into(),
            prompt_column: None,
            response_column: None,
            history_column: None,
            eval_data: None,
            val_ratio: None,
            val_size: None,
            eval_steps: None,
            save_steps: 100,
            save_total_limit: 3,
            logging_steps: 1,
            preview: false,
            resume: false,
            overwrite: false,
        }
    }
}

/// Keys that may change when a run is resumed: they move files or say how often something is reported, and change no
/// number of the training. What lies at `model` and `data` is compared by content instead, `device` and `dtype` by what
/// they came to.
const FREE_ON_RESUME: [&str; 12] = [
    "model",
    "data",
    "device",
    "dtype",
    "output",
    "cache_dir",
    "eval_data",
    "eval_steps",
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
        table.extend(toml::Table::try_from(flags).map_err(|e| too_large(flags, &e))?);
        let mut config: Self = table
            .try_into()
            .map_err(|e| Error::Usage(format!("{}; see `glmtune train --help`", one_line(&e))))?;
        config.check()?;
        if config
            .max_source_length
            .or(config.max_target_length)
            .or(config.max_length)
            .is_none()
        {
            config.max_length = Some(1024);
        }
        for path in [&mut config.model, &mut config.data, &mut config.output] {
            *path = std::path::absolute(&*path).map_err(Error::io(&*path, "resolve"))?;
        }
        for path in [&mut config.eval_data, &mut config.cache_dir]
            .into_iter()
            .flatten()
        {
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

    /// LoRA's alpha: as given, else twice the rank.
    pub fn alpha(&self) -> f64 {
        self.lora_alpha.unwrap_or(2.0 * self.lora_r as f64)
    }

    fn check(&self) -> Result<()> {
        for (flag, path) in [
            ("--model", &self.model),
            ("--data", &self.data),
            ("--output", &self.output),
        ] {
            if path.as_os_str().is_empty() {
                return Err(Error::Usage(format!(
                    "{flag} is missing; give it, or a --config file that has it"
                )));
            }
        }
        let method = match self.method {
            Method::Qlora | Method::Lora => None,
            Method::Ptuning => Some("ptuning"),
            Method::Freeze => Some("freeze"),
            Method::Full => Some("full"),
        };
        if let Some(name) = method {
            return Err(Error::Usage(format!(
                "--method {name} is not there yet; use qlora or lora"
            )));
        }
        let named = [
            ("--quant-type", &self.quant_type, &["nf4", "fp4"][..]),
            (
                "--over-length",
                &self.over_length,
                &["cut", "drop", "error", "official"],
            ),
            ("--first-target", &self.first_target, &["sop", "answer"]),
        ];
        for (flag, found, expected) in named {
            if !expected.contains(&found.as_str()) {
                return Err(Error::Usage(format!(
                    "{flag}: found {found}, expected {}",
                    expected.join(" or ")
                )));
            }
        }
        if self.resume && self.overwrite {
            return Err(Error::Usage(
                "--resume continues a run, --overwrite replaces it: give one of them".into(),
            ));
        }
        let given = [
            self.eval_data.is_some(),
            self.val_ratio.is_some(),
            self.val_size.is_some(),
        ];
        if given.iter().filter(|&&g| g).count() > 1 {
            return Err(Error::Usage(
                "--eval-data, --val-ratio and --val-size each choose the evaluation data: give one of them"
                    .into(),
            ));
        }
        if self.eval_steps.is_some() && !given.contains(&true) {
            return Err(Error::Usage(
                "--eval-steps needs evaluation data: add --eval-data, --val-ratio or --val-size".into(),
            ));
        }
        if self.prompt_column.is_some() && self.prompt_column == self.response_column {
            return Err(Error::Usage(
                "--prompt-column and --response-column name the same column: a model learns nothing from echoing".into(),
            ));
        }
        let whole = [
            ("--lora-r", self.lora_r as u64),
            ("--micro-batch-size", self.micro_batch_size as u64),
            (
                "--gradient-accumulation-steps",
                self.gradient_accumulation_steps as u64,
            ),
            ("--max-steps", self.max_steps.unwrap_or(1)),
            ("--eval-steps", self.eval_steps.unwrap_or(1)),
            ("--val-size", self.val_size.unwrap_or(1) as u64),
            ("--save-steps", self.save_steps),
            ("--save-total-limit", self.save_total_limit as u64),
            ("--logging-steps", self.logging_steps),
        ];
        for (flag, value) in whole {
            if value == 0 {
                return Err(out_of_range(flag, 0.0, "a whole number from 1"));
            }
        }
        // Dropout numbers the micro-batches of a step in 16 bits.
        for (flag, value) in [
            ("--micro-batch-size", self.micro_batch_size),
            ("--gradient-accumulation-steps", self.gradient_accumulation_steps),
        ] {
            if value > 1 << 16 {
                return Err(out_of_range(flag, value as f64, "at most 65536"));
            }
        }
        if i64::try_from(self.seed).is_err() {
            return Err(out_of_range(
                "--seed",
                self.seed as f64,
                "a whole number below 2^63",
            ));
        }
        type Range = (&'static str, fn(f64) -> bool);
        let positive: Range = ("a number above 0", |x| x > 0.0);
        let not_negative: Range = ("a number from 0", |x| x >= 0.0);
        let below_one: Range = ("a number from 0 and below 1", |x| (0.0..1.0).contains(&x));
        let real = [
            ("--lora-alpha", self.alpha(), positive),
            ("--lora-dropout", self.lora_dropout, below_one),
            ("--learning-rate", self.learning_rate, positive),
            ("--warmup-ratio", self.warmup_ratio, below_one),
            (
                "--epochs",
                self.epochs,
                ("a number above 0 and up to a million", |x| x > 0.0 && x <= 1e6),
            ),
            ("--max-grad-norm", self.max_grad_norm, not_negative),
            ("--weight-decay", self.weight_decay, not_negative),
            ("--adam-beta1", self.adam_beta1, below_one),
            ("--adam-beta2", self.adam_beta2, below_one),
            ("--adam-epsilon", self.adam_epsilon, positive),
            ("--val-ratio", self.val_ratio.unwrap_or(0.0), below_one),
        ];
        for (flag, value, (expected, within)) in real {
            if !(value.is_finite() && within(value)) {
                return Err(out_of_range(flag, value, expected));
            }
        }
        Ok(())
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
        map
    }
}

fn out_of_range(flag: &str, found: f64, expected: &str) -> Error {
    Error::Usage(format!("{flag}: found {found}, expected {expected}"))
}

/// The keys of a file, each of its type; `learning-rate` is as good as `learning_rate`.
fn read_table(path: &Path) -> Result<toml::Table> {
    let text = std::fs::read(path).map_err(Error::io(path, "read"))?;
    let text = String::from_utf8(text).map_err(|e| {
        let found = format!("text that is not UTF-8 (byte {})", e.utf8_error().valid_up_to());
        file_error(path.display(), found)
    })?;
    let parsed: toml::Table = text.parse().map_err(|e: toml::de::Error| {
        let before = e
            .span()
            .and_then(|span| text.get(..span.start))
            .unwrap_or_default();
        let line = 1 + before.matches('\n').count();
        file_error(
            format!("{}:{line}", path.display()),
            e.message().replace('\n', " "),
        )
    })?;
    let table = parsed
        .into_iter()
        .map(|(key, value)| (key.replace('-', "_"), value))
        .collect();
    parse(&table, path)?;
    Ok(table)
}

/// What the table of a file says, so that a wrong key is the file's and not the command line's.
fn parse(table: &toml::Table, path: &Path) -> Result<RunConfig> {
    table
        .clone()
        .try_into()
        .map_err(|e| file_error(path.display(), one_line(&e)))
}

fn file_error(place: impl std::fmt::Display, found: String) -> Error {
    let remedy = "mend the file; `glmtune train --help` lists every flag";
    Error::input(place, found, "the flags of `glmtune train` as keys", remedy)
}

/// What the TOML reader says over several lines, without its list of all keys.
fn one_line(error: &toml::de::Error) -> String {
    let text = error.to_string().trim().replace('\n', " ");
    match text.split_once(", expected one of") {
        Some((unknown, _)) if unknown.starts_with("unknown field") => unknown.to_string(),
        _ => text
            .replace("usize", "a whole number")
            .replace("u64", "a whole number"),
    }
}

/// TOML's whole numbers end at 2^63, and its writer does not say which one was too large.
fn too_large(flags: &impl Serialize, error: &toml::ser::Error) -> Error {
    let flags = serde_json::to_value(flags).unwrap_or_default();
    let large = |value: &serde_json::Value| value.is_u64() && !value.is_i64();
    let found = flags
        .as_object()
        .and_then(|map| map.iter().find(|(_, value)| large(value)));
    Error::Usage(match found {
        Some((key, value)) => format!(
            "--{}: found {value}, expected a whole number below 2^63",
            key.replace('_', "-")
        ),
        None => error.to_string(),
    })
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
        assert_eq!(
            (config.learning_rate, config.lora_r, config.epochs),
            (1e-3, 16, 3.0)
        );
        assert_eq!((config.lr_scheduler, config.alpha()), (Scheduler::Linear, 32.0));
        assert!(config.model.is_absolute());
    }

    #[test]
    fn a_written_configuration_reads_back_the_same() {
        let mut config = RunConfig::resolve(None, &flags(REQUIRED)).unwrap();
        config.learning_rate = 0.1 + 0.2;
        config.lora_alpha = Some(7.5);
        config.val_size = Some(3);
        config.loss_reduction = LossReduction::MicroBatch;
        let again = RunConfig::resolve(None, &flags(&config.to_toml())).unwrap();
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
            ("method = 'full'", "--method full is not there yet"),
            ("method = 'fully'", "fully"),
            ("resume = true\noverwrite = true", "give one of them"),
            ("val_ratio = 0.1\nval_size = 3", "give one of them"),
            ("eval_steps = 5", "needs evaluation data"),
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
