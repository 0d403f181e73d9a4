//! `glmtune train`.

use std::path::PathBuf;

use serde::Serialize;

use crate::config::RunConfig;
use crate::error::Result;
use crate::train;

/// The flags of `glmtune train`. Each is also a key of the `--config` file, with `_` for `-`; what is not given stays out
/// of the table, so that file and defaults show through.
#[derive(Debug, Default, clap::Args, Serialize)]
#[command(
    allow_negative_numbers = true,
    after_help = "Example:
  glmtune train --model chatglm-6b --data alpaca.json --output out/alpaca --val-size 100
Stop with Ctrl-C (the step is finished and saved), go on with:
  glmtune train --output out/alpaca --resume"
)]
pub struct TrainArgs {
    /// Folder of the base checkpoint (Hugging Face layout, .bin or .safetensors)
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Training records: .json or .jsonl
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Folder for the adapter, checkpoints, metrics.jsonl and run.toml
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// qlora: LoRA on 4-bit weights; lora: LoRA on the weights as stored (ptuning, freeze, full: not yet) [default: qlora]
    #[arg(long, value_parser = ["qlora", "lora", "ptuning", "freeze", "full"], hide_possible_values = true)]
    method: Option<String>,
    /// Where to compute: auto (the first CUDA device, else the CPU), cpu, cuda or cuda:N [default: auto]
    #[arg(long, value_name = "DEVICE", help_heading = "Machine")]
    device: Option<String>,
    /// Compute type on a CUDA device: auto (bf16, fp16 before compute capability 8.0), bf16, fp16 or fp32 [default: auto]
    #[arg(long, value_name = "TYPE", help_heading = "Machine")]
    dtype: Option<String>,
    /// Read flags from this file first, e.g. the run.toml of an earlier run; flags given here override it
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Continue the run in --output from its last checkpoint, bit-exactly
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    resume: bool,
    /// Replace what an earlier run left in --output
    #[arg(long)]
    #[serde(skip_serializing_if = "is_false")]
    overwrite: bool,

    /// Rank of the update [default: 8]
    #[arg(long, value_name = "R", help_heading = "LoRA")]
    lora_r: Option<usize>,
    /// The update is scaled by alpha / r [default: 2 r]
    #[arg(long, value_name = "ALPHA", help_heading = "LoRA")]
    lora_alpha: Option<f64>,
    /// Dropout on the input of the update [default: 0]
    #[arg(long, value_name = "P", help_heading = "LoRA")]
    lora_dropout: Option<f64>,
    /// `all`, or some of query_key_value,dense,dense_h_to_4h,dense_4h_to_h [default: all]
    #[arg(long, value_name = "LIST", help_heading = "LoRA")]
    lora_target: Option<String>,
    /// Scale by alpha / sqrt(r) (rank-stabilised LoRA)
    #[arg(long, help_heading = "LoRA")]
    #[serde(skip_serializing_if = "is_false")]
    rslora: bool,

    /// 4-bit code: nf4 or fp4 [default: nf4]
    #[arg(long, value_parser = ["nf4", "fp4"], hide_possible_values = true, help_heading = "Quantisation")]
    quant_type: Option<String>,
    /// Keep the block scales in f32 instead of quantising them too
    #[arg(long, help_heading = "Quantisation")]
    #[serde(skip_serializing_if = "is_false")]
    no_double_quant: bool,
    /// Where the 4-bit copy of the checkpoint is kept
    #[arg(long, value_name = "DIR", help_heading = "Quantisation")]
    cache_dir: Option<PathBuf>,

    /// Highest learning rate [default: 2e-4]
    #[arg(long, value_name = "LR", help_heading = "Optimisation")]
    learning_rate: Option<f64>,
    /// cosine, linear, constant, constant_with_warmup, cosine_with_restarts or polynomial [default: cosine]
    #[arg(long, value_name = "NAME", help_heading = "Optimisation")]
    lr_scheduler: Option<String>,
    /// Steps over which the learning rate rises from 0; overrides --warmup-ratio
    #[arg(long, value_name = "N", help_heading = "Optimisation")]
    warmup_steps: Option<u64>,
    /// Warm-up as a share of all steps [default: 0.03]
    #[arg(long, value_name = "SHARE", help_heading = "Optimisation")]
    warmup_ratio: Option<f64>,
    /// Passes over the data [default: 3]
    #[arg(long, value_name = "N", help_heading = "Optimisation")]
    epochs: Option<f64>,
    /// Optimizer steps; overrides --epochs
    #[arg(long, value_name = "N", help_heading = "Optimisation")]
    max_steps: Option<u64>,
    /// Sequences computed at once: memory grows with it [default: 2]
    #[arg(long, value_name = "N", help_heading = "Optimisation")]
    micro_batch_size: Option<usize>,
    /// Micro-batches per optimizer step [default: 8]
    #[arg(long, value_name = "N", help_heading = "Optimisation")]
    gradient_accumulation_steps: Option<usize>,
    /// Mean over all supervised tokens of a step (token), or of the micro-batches' own means (micro-batch) [default: token]
    #[arg(long, value_parser = ["token", "micro-batch"], hide_possible_values = true, help_heading = "Optimisation")]
    loss_reduction: Option<String>,
    /// Clip the global gradient norm to this; 0 turns clipping off [default: 1]
    #[arg(long, value_name = "NORM", help_heading = "Optimisation")]
    max_grad_norm: Option<f64>,
    /// AdamW's decoupled weight decay [default: 0]
    #[arg(long, value_name = "WD", help_heading = "Optimisation")]
    weight_decay: Option<f64>,
    /// [default: 0.9]
    #[arg(long, value_name = "BETA", help_heading = "Optimisation")]
    adam_beta1: Option<f64>,
    /// [default: 0.999]
    #[arg(long, value_name = "BETA", help_heading = "Optimisation")]
    adam_beta2: Option<f64>,
    /// [default: 1e-8]
    #[arg(long, value_name = "EPS", help_heading = "Optimisation")]
    adam_epsilon: Option<f64>,
    /// Seed of the shuffling, the adapter's start and dropout [default: 42]
    #[arg(long, value_name = "N", help_heading = "Optimisation")]
    seed: Option<u64>,

    /// Most tokens of prompt and history, [gMASK] included
    #[arg(long, value_name = "N", help_heading = "Data")]
    max_source_length: Option<usize>,
    /// Most tokens of the answer, <sop> and <eop> included
    #[arg(long, value_name = "N", help_heading = "Data")]
    max_target_length: Option<usize>,
    /// Most tokens of both together [default: 1024 if no other limit is given]
    #[arg(long, value_name = "N", help_heading = "Data")]
    max_length: Option<usize>,
    /// What happens to longer records. cut: oldest turns go first, then the beginning of the question and the end of the
    /// answer; drop: a record that is still too long is left out; error: the run stops; official: as THUDM's script.
    /// Every cut is reported [default: cut]
    #[arg(long, value_name = "POLICY", help_heading = "Data")]
    over_length: Option<String>,
    /// The first supervised token: sop, as THUDM's script, or answer [default: sop]
    #[arg(long, value_name = "TOKEN", help_heading = "Data")]
    first_target: Option<String>,
    /// Column of the prompt [default: found by name]
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    prompt_column: Option<String>,
    /// Column of the answer [default: found by name]
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    response_column: Option<String>,
    /// Column of the earlier turns [default: found by name]
    #[arg(long, value_name = "NAME", help_heading = "Data")]
    history_column: Option<String>,
    /// Print three samples as the model sees them before training
    #[arg(long, help_heading = "Data")]
    #[serde(skip_serializing_if = "is_false")]
    preview: bool,

    /// Records to evaluate on
    #[arg(long, value_name = "FILE", help_heading = "Evaluation")]
    eval_data: Option<PathBuf>,
    /// Set this share of --data aside to evaluate on
    #[arg(long, value_name = "SHARE", help_heading = "Evaluation")]
    val_ratio: Option<f64>,
    /// Set this many records of --data aside to evaluate on
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    val_size: Option<usize>,
    /// Evaluate every N steps [default: before the first and after the last step only]
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    eval_steps: Option<u64>,

    /// Save a checkpoint every N steps [default: 100]
    #[arg(long, value_name = "N", help_heading = "Saving and reporting")]
    save_steps: Option<u64>,
    /// Keep the newest N checkpoints [default: 3]
    #[arg(long, value_name = "N", help_heading = "Saving and reporting")]
    save_total_limit: Option<usize>,
    /// Write a line of metrics every N steps [default: 1]
    #[arg(long, value_name = "N", help_heading = "Saving and reporting")]
    logging_steps: Option<u64>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the signature serde asks for")]
fn is_false(flag: &bool) -> bool {
    !flag
}

impl TrainArgs {
    /// Merges the flags with the `--config` file and the defaults.
    fn resolve(self) -> Result<RunConfig> {
        let mut file = self.config.clone();
        if let (None, true, Some(output)) = (&file, self.resume, &self.output) {
            // `--output OUT --resume` is enough: the folder knows the rest.
            file = Some(output.join("run.toml")).filter(|path| path.exists());
        }
        RunConfig::resolve(file.as_deref(), &self)
    }
}

/// Runs `glmtune train`.
///
/// # Errors
/// Whatever [`train::run`] meets; the first Ctrl-C ends in [`crate::error::Error::Interrupted`] after everything is saved.
pub fn run(args: TrainArgs) -> Result<()> {
    let config = args.resolve()?;
    let interrupt = train::Interrupt::listen()?;
    train::run(&config, &interrupt).map(|_| ())
}
