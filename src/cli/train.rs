//! `glmtune train`.

use std::path::{Path, PathBuf};

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
    /// qlora: LoRA on 4-bit weights; lora: LoRA on the weights as stored; ptuning: P-Tuning v2; freeze: some layers' own
    /// weights; full: every weight [default: qlora]
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

    /// How much of the card to use, e.g. 12GB: the fastest layout that fits is chosen [default: what is free]
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    vram: Option<String>,
    /// What layers keep for the backward pass. none: all that products made; smart: without QKV and FC1; full: their input; a
    /// list such as full:20,none:8 goes from the first layer to the last; +offload behind one keeps it in host memory.
    /// Gradients are the same under each [default: auto]
    #[arg(long, value_name = "POLICY", help_heading = "Memory")]
    recompute: Option<String>,
    /// The head's matrix: compute (in the compute type), int8, nf4, or stream (copied in chunks from host memory, the same numbers as
    /// compute) [default: auto]
    #[arg(long, value_name = "FORM", help_heading = "Memory")]
    head_storage: Option<String>,
    /// Keep the layers' matrices in host memory and copy them ahead of their use: auto, on or off [default: auto]
    #[arg(long, value_name = "WHEN", num_args = 0..=1, default_missing_value = "on", help_heading = "Memory")]
    stream_weights: Option<String>,
    /// Where the optimizer's state lies, with full tuning the f32 weights too: auto, device, host (paged) or disk [default: auto]
    #[arg(long, value_name = "PLACE", help_heading = "Memory")]
    optimizer_state: Option<String>,
    /// Device memory for its pages, e.g. 500MB [default: 96 MiB for each kind of state]
    #[arg(long, value_name = "SIZE", help_heading = "Memory")]
    optimizer_vram: Option<String>,
    /// Update each layer in the backward pass, so that gradients of one layer are held at a time: auto, on or off [default: auto]
    #[arg(long, value_name = "WHEN", num_args = 0..=1, default_missing_value = "on", help_heading = "Memory")]
    optimizer_in_backward: Option<String>,

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
    /// Only these layers, from 0, e.g. 14,15,16 [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "LoRA")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    lora_layers: Vec<usize>,
    /// Ranks of single linears, by the ends of their names, as PEFT's rank_pattern, e.g. mlp.dense_4h_to_h=4
    #[arg(long, value_name = "PATTERN=R", help_heading = "LoRA")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    lora_rank_pattern: Vec<String>,
    /// Alphas of single linears, as PEFT's alpha_pattern
    #[arg(long, value_name = "PATTERN=ALPHA", help_heading = "LoRA")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    lora_alpha_pattern: Vec<String>,
    /// Scale by alpha / sqrt(r) (rank-stabilised LoRA)
    #[arg(long, help_heading = "LoRA")]
    #[serde(skip_serializing_if = "is_false")]
    rslora: bool,
    /// Split the update into magnitude and direction (DoRA)
    #[arg(long, help_heading = "LoRA")]
    #[serde(skip_serializing_if = "is_false")]
    dora: bool,
    /// How A and B start: kaiming (B zero), pissa (principal singular vectors of the weight), pissa_niter_N (the same by N
    /// rounds of a fast method) [default: kaiming]
    #[arg(long, value_name = "HOW", help_heading = "LoRA")]
    lora_init: Option<String>,
    /// Train these whole and save them with the adapter: some of word_embeddings,lm_head,input_layernorm,
    /// post_attention_layernorm,final_layernorm
    #[arg(long, value_name = "LIST", value_delimiter = ',', help_heading = "LoRA")]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    modules_to_save: Vec<String>,
    /// The learning rate of B is this many times that of A (LoRA+)
    #[arg(long, value_name = "RATIO", help_heading = "LoRA")]
    loraplus_lr_ratio: Option<f64>,

    /// Length of the prefix [default: 128]
    #[arg(long, value_name = "N", help_heading = "P-Tuning v2")]
    pre_seq_len: Option<usize>,
    /// Compute the prefix with a two-layer network
    #[arg(long, help_heading = "P-Tuning v2")]
    #[serde(skip_serializing_if = "is_false")]
    prefix_projection: bool,
    /// Dropout on the prefix's keys and values [default: 0.1]
    #[arg(long, value_name = "P", help_heading = "P-Tuning v2")]
    prefix_dropout: Option<f64>,

    /// The last N layers train; a negative number: the first N [default: 3]
    #[arg(long, value_name = "N", help_heading = "Freeze")]
    trainable_layers: Option<i64>,
    /// What of them: all, mlp or attention [default: all]
    #[arg(long, value_parser = ["all", "mlp", "attention"], hide_possible_values = true, help_heading = "Freeze")]
    trainable_modules: Option<String>,

    /// Go on training this adapter (LoRA or prefix) instead of a new one
    #[arg(long, value_name = "DIR", help_heading = "Incremental learning")]
    adapter: Option<PathBuf>,
    /// Merge these adapters into the base first, one after the other
    #[arg(
        long,
        value_name = "DIRS",
        value_delimiter = ',',
        help_heading = "Incremental learning"
    )]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    merge_adapters: Vec<PathBuf>,

    /// Hold the frozen weights of ptuning in 4bit or as stored [default: 4bit]
    #[arg(long, value_name = "HOW", help_heading = "Quantisation")]
    load_in: Option<String>,
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

    /// adamw, adamw_8bit (block-wise 8-bit state), sgd or lion [default: adamw]
    #[arg(long, value_name = "NAME", help_heading = "Optimisation")]
    optim: Option<String>,
    /// Highest learning rate [default: 2e-4; ptuning 2e-2, freeze 5e-5, full 1e-4]
    #[arg(long, value_name = "LR", help_heading = "Optimisation")]
    learning_rate: Option<f64>,
    /// cosine, linear, constant, constant_with_warmup, cosine_with_restarts, polynomial or inverse_sqrt [default: cosine]
    #[arg(long, value_name = "NAME", help_heading = "Optimisation")]
    lr_scheduler: Option<String>,
    /// Cosine and polynomial end at this share of the highest rate [default: 0]
    #[arg(long, value_name = "SHARE", help_heading = "Optimisation")]
    min_lr_ratio: Option<f64>,
    /// Power of the polynomial schedule [default: 1]
    #[arg(long, value_name = "POWER", help_heading = "Optimisation")]
    lr_power: Option<f64>,
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
    /// Momentum of sgd [default: 0.9]
    #[arg(long, value_name = "MU", help_heading = "Optimisation")]
    momentum: Option<f64>,
    /// Noise on the embeddings in training, in units of 1 / sqrt(length * width) (NEFTune); 0 turns it off [default: 0]
    #[arg(long, value_name = "ALPHA", help_heading = "Optimisation")]
    neftune_alpha: Option<f64>,
    /// A step whose loss or gradient is no number is left out; after N of them in a row the run stops [default: 3]
    #[arg(long, value_name = "N", help_heading = "Optimisation")]
    max_bad_steps: Option<u64>,
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
    /// General records mixed in, so that the model forgets less
    #[arg(long, value_name = "FILE", help_heading = "Data")]
    replay: Option<PathBuf>,
    /// Their share of the samples of an epoch [default: 0.1]
    #[arg(long, value_name = "SHARE", help_heading = "Data")]
    replay_ratio: Option<f64>,
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
    /// Evaluate every N passes over the data (a part of one is fine)
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    eval_epochs: Option<f64>,
    /// Answer this many of the evaluation prompts at each evaluation: BLEU-4, ROUGE, exact match, samples.jsonl [default: 0]
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    eval_samples: Option<usize>,
    /// Most tokens of such an answer [default: 128]
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    eval_max_new_tokens: Option<usize>,
    /// loss, token_accuracy, exact_match, bleu-4, rouge-1, rouge-2 or rouge-l: what "best" means [default: loss]
    #[arg(long, value_name = "METRIC", help_heading = "Evaluation")]
    metric_for_best_model: Option<String>,
    /// Stop after N evaluations without a better one; the result is the best checkpoint
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    early_stopping_patience: Option<u64>,
    /// By how much the metric must be better to count [default: 0]
    #[arg(long, value_name = "AMOUNT", help_heading = "Evaluation")]
    early_stopping_threshold: Option<f64>,
    /// Keep the checkpoint with the best evaluation; it becomes the result
    #[arg(long, help_heading = "Evaluation")]
    #[serde(skip_serializing_if = "is_false")]
    save_best: bool,
    /// Measure what the model forgets: general prompts answered before and after, KL to the base at each evaluation
    #[arg(long, help_heading = "Evaluation")]
    #[serde(skip_serializing_if = "is_false")]
    forgetting: bool,
    /// Tokens of each of those answers [default: 24]
    #[arg(long, value_name = "N", help_heading = "Evaluation")]
    forgetting_tokens: Option<usize>,

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
    /// Takes `--config` away if it is one that `known` knows.
    pub(super) fn take_config(&mut self, known: impl Fn(&Path) -> bool) -> Option<PathBuf> {
        self.config.take_if(|path| known(path))
    }

    /// [`TrainArgs::resolve`] for who reads no data and writes nothing: what is not given there stays empty.
    pub(super) fn resolve_without_files(mut self) -> Result<RunConfig> {
        const NONE: &str = "-";
        let given = self.model.is_some() || self.config.is_some();
        for path in [&mut self.model, &mut self.data, &mut self.output] {
            path.get_or_insert_with(|| NONE.into());
        }
        let mut config = RunConfig::resolve(self.config.as_deref(), &self)?;
        if !given {
            config.model = PathBuf::new();
        }
        Ok(config)
    }

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
