//! Is every value in its range, and do the flags go together?

use super::{Method, RunConfig};
use crate::error::{Error, Result};
use crate::optim::OptimizerKind;
use crate::schedule::Scheduler;

impl RunConfig {
    pub(super) fn check(&self) -> Result<()> {
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
        let stored = "stored".to_string();
        let named = [
            (
                "--load-in",
                self.load_in.as_ref().unwrap_or(&stored),
                &["4bit", "stored"][..],
            ),
            ("--quant-type", &self.quant_type, &["nf4", "fp4"]),
            (
                "--over-length",
                &self.over_length,
                &["cut", "drop", "error", "official"],
            ),
            ("--first-target", &self.first_target, &["sop", "answer"]),
            (
                "--trainable-modules",
                &self.trainable_modules,
                &["all", "mlp", "attention"],
            ),
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
            self.val_ratio.is_some_and(|ratio| ratio > 0.0),
            self.val_size.is_some(),
        ];
        if given.iter().filter(|&&g| g).count() > 1 {
            return Err(Error::Usage(
                "--eval-data, --val-ratio and --val-size each choose the evaluation data: give one of them"
                    .into(),
            ));
        }
        self.check_evaluation(given.contains(&true))?;
        self.check_method()?;
        if self.prompt_column.is_some() && self.prompt_column == self.response_column {
            return Err(Error::Usage(
                "--prompt-column and --response-column name the same column: a model learns nothing from echoing".into(),
            ));
        }
        let whole = [
            ("--lora-r", self.lora_r as u64),
            ("--pre-seq-len", self.pre_seq_len as u64),
            ("--trainable-layers", self.trainable_layers.unsigned_abs()),
            ("--max-bad-steps", self.max_bad_steps),
            ("--eval-max-new-tokens", self.eval_max_new_tokens as u64),
            ("--forgetting-tokens", self.forgetting_tokens as u64),
            (
                "--early-stopping-patience",
                self.early_stopping_patience.unwrap_or(1),
            ),
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
            ("--prefix-dropout", self.prefix_dropout, below_one),
            (
                "--loraplus-lr-ratio",
                self.loraplus_lr_ratio.unwrap_or(1.0),
                positive,
            ),
            ("--neftune-alpha", self.neftune_alpha, not_negative),
            ("--learning-rate", self.rate(), positive),
            ("--min-lr-ratio", self.min_lr_ratio, below_one),
            ("--lr-power", self.lr_power, positive),
            ("--momentum", self.momentum, below_one),
            ("--replay-ratio", self.replay_ratio, below_one),
            (
                "--early-stopping-threshold",
                self.early_stopping_threshold,
                not_negative,
            ),
            ("--eval-epochs", self.eval_epochs.unwrap_or(1.0), positive),
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

    /// Flags that ask for evaluations, when there is data for them or not.
    fn check_evaluation(&self, has_data: bool) -> Result<()> {
        let wants = [
            ("--eval-steps", self.eval_steps.is_some() && !self.forgetting),
            ("--eval-epochs", self.eval_epochs.is_some() && !self.forgetting),
            ("--eval-samples", self.eval_samples > 0),
            (
                "--early-stopping-patience",
                self.early_stopping_patience.is_some(),
            ),
            ("--save-best", self.save_best),
        ];
        if let Some((flag, _)) = wants.into_iter().find(|&(_, given)| given && !has_data) {
            return usage(format!(
                "{flag} needs evaluation data: add --eval-data, --val-ratio or --val-size"
            ));
        }
        if self.eval_steps.is_some() && self.eval_epochs.is_some() {
            return usage("--eval-steps and --eval-epochs both say how often: give one of them");
        }
        let metric = self.metric_for_best_model;
        if metric.generates() && self.eval_samples == 0 {
            return usage(format!(
                "--metric-for-best-model {} is measured on generated answers: add --eval-samples N",
                metric.name()
            ));
        }
        if self.keeps_best() && self.eval_steps.is_none() && self.eval_epochs.is_none() {
            return usage(
                "--save-best and --early-stopping-patience compare evaluations: add --eval-steps N or --eval-epochs N",
            );
        }
        Ok(())
    }

    /// Flags of one method, given with another, change nothing: that is said instead.
    fn check_method(&self) -> Result<()> {
        let default = RunConfig::default();
        let lora = matches!(self.method, Method::Lora | Method::Qlora);
        let name = self.method.name();
        let of_lora = [
            ("--dora", self.dora),
            ("--rslora", self.rslora),
            ("--lora-init", self.lora_init != default.lora_init),
            ("--lora-layers", !self.lora_layers.is_empty()),
            ("--lora-rank-pattern", !self.lora_rank_pattern.is_empty()),
            ("--lora-alpha-pattern", !self.lora_alpha_pattern.is_empty()),
            ("--modules-to-save", !self.modules_to_save.is_empty()),
            ("--loraplus-lr-ratio", self.loraplus_lr_ratio.is_some()),
        ];
        if let Some((flag, _)) = of_lora.into_iter().find(|&(_, given)| given && !lora) {
            return usage(format!("{flag} belongs to --method lora or qlora, not to {name}"));
        }
        if self.prefix_projection && self.method != Method::Ptuning {
            return usage(format!(
                "--prefix-projection belongs to --method ptuning, not to {name}"
            ));
        }
        let stored = match self.method {
            Method::Qlora => Some(("stored", "lora")),
            Method::Lora => Some(("4bit", "qlora")),
            _ => None,
        };
        if let Some((how, other)) = stored.filter(|(how, _)| self.load_in.as_deref() == Some(how)) {
            return usage(format!(
                "--load-in {how} with --method {name} is what --method {other} does"
            ));
        }
        if self.load_in.as_deref() == Some("4bit") && matches!(self.method, Method::Freeze | Method::Full) {
            return usage(format!(
                "--load-in 4bit: weights in 4 bits do not train; --method {name} needs them as stored"
            ));
        }
        if self.adapter.is_some() && matches!(self.method, Method::Freeze | Method::Full) {
            return usage(format!(
                "--adapter is what --method lora, qlora or ptuning goes on from; for {name} merge it first: --merge-adapters"
            ));
        }
        if self.dora && self.lora_init != default.lora_init {
            return usage("--dora starts from the base's own directions: leave --lora-init out");
        }
        if self.lr_scheduler == Scheduler::Polynomial && self.min_lr_ratio == 0.0 && self.rate() <= 1e-7 {
            return usage(
                "--lr-scheduler polynomial ends at 1e-7: give a higher --learning-rate, or --min-lr-ratio",
            );
        }
        if self.min_lr_ratio > 0.0 && !self.lr_scheduler.has_minimum() {
            return usage("--min-lr-ratio belongs to --lr-scheduler cosine or polynomial");
        }
        if self.lr_power != default.lr_power && !self.lr_scheduler.has_power() {
            return usage("--lr-power belongs to --lr-scheduler polynomial");
        }
        Ok(())
    }
}

/// Flags that only some methods heed.
const OF_METHODS: [(&str, &[Method]); 17] = {
    const LORA: &[Method] = &[Method::Lora, Method::Qlora];
    [
        ("lora_r", LORA),
        ("lora_alpha", LORA),
        ("lora_dropout", LORA),
        ("lora_target", LORA),
        ("lora_layers", LORA),
        ("lora_rank_pattern", LORA),
        ("lora_alpha_pattern", LORA),
        ("rslora", LORA),
        ("dora", LORA),
        ("lora_init", LORA),
        ("modules_to_save", LORA),
        ("loraplus_lr_ratio", LORA),
        ("pre_seq_len", &[Method::Ptuning]),
        ("prefix_projection", &[Method::Ptuning]),
        ("prefix_dropout", &[Method::Ptuning]),
        ("trainable_layers", &[Method::Freeze]),
        ("trainable_modules", &[Method::Freeze]),
    ]
};

/// What an adapter that training goes on from has decided already.
const OF_ADAPTER: [&str; 12] = [
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "lora_layers",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "rslora",
    "dora",
    "lora_init",
    "modules_to_save",
    "pre_seq_len",
];

impl RunConfig {
    /// Flags given on the command line that would change nothing: that is said instead. A file may hold keys of every method.
    pub(super) fn check_flags(&self, given: &[String]) -> Result<()> {
        let is_given = |key: &str| given.iter().any(|name| name == key);
        let flag = |key: &str| format!("--{}", key.replace('_', "-"));
        let name = self.method.name();
        for (key, methods) in OF_METHODS {
            if is_given(key) && !methods.contains(&self.method) {
                let names: Vec<&str> = methods.iter().map(|method| method.name()).collect();
                let names = names.join(" or ");
                return usage(format!(
                    "{} belongs to --method {names}, not to {name}",
                    flag(key)
                ));
            }
        }
        if self.adapter.is_some()
            && let Some(key) = OF_ADAPTER.into_iter().find(|key| is_given(key))
        {
            return usage(format!("{} is that of --adapter: leave it out", flag(key)));
        }
        if is_given("replay_ratio") && self.replay.is_none() {
            return usage("--replay-ratio is a share of --replay FILE: give the file");
        }
        if self.replay.is_some() && self.replay_ratio == 0.0 {
            return usage("--replay with --replay-ratio 0 mixes nothing in: leave both out");
        }
        if !self.in_four_bits()
            && let Some(key) = ["quant_type", "no_double_quant"]
                .into_iter()
                .find(|key| is_given(key))
        {
            return usage(format!(
                "{} is about weights in 4 bits: --method {name} holds them as stored",
                flag(key)
            ));
        }
        if is_given("eval_max_new_tokens") && self.eval_samples == 0 {
            return usage("--eval-max-new-tokens is about generated answers: add --eval-samples N");
        }
        if is_given("metric_for_best_model") && !self.keeps_best() {
            return usage(
                "--metric-for-best-model chooses the best: add --save-best or --early-stopping-patience N",
            );
        }
        if is_given("early_stopping_threshold") && self.early_stopping_patience.is_none() {
            return usage("--early-stopping-threshold belongs to --early-stopping-patience");
        }
        if is_given("momentum") && self.optim != OptimizerKind::Sgd {
            return usage("--momentum belongs to --optim sgd");
        }
        if is_given("forgetting_tokens") && !self.forgetting {
            return usage("--forgetting-tokens belongs to --forgetting");
        }
        Ok(())
    }
}

fn usage(message: impl Into<String>) -> Result<()> {
    Err(Error::Usage(message.into()))
}

fn out_of_range(flag: &str, found: f64, expected: &str) -> Error {
    Error::Usage(format!("{flag}: found {found}, expected {expected}"))
}
