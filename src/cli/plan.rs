//! `glmtune plan`.

use std::path::Path;

use serde_json::{Value, json};

use super::train::TrainArgs;
use crate::bench::model_config;
use crate::compute;
use crate::config::RunConfig;
use crate::error::{Error, Result};
use crate::model::{LoadedFrom, ModelConfig};
use crate::tensor::{Compute, DType, Device};
use crate::train::plan::{self, Asked, Candidate, Card, Fit, Limits, Plan, Work};

/// The flags of `glmtune plan`: those of `glmtune train`, and the card.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  glmtune plan --config chatglm-6b --vram 8GB --max-length 2048
  glmtune plan --model chatglm-6b --method full --optim adamw_8bit --card 'RTX 3090'
--config takes the sizes of chatglm-6b, or a run.toml; of --model only config.json is read.")]
pub struct PlanArgs {
    #[command(flatten)]
    train: TrainArgs,
    /// Plan for this card: RTX 2080 Ti, RTX 3060, RTX 4060 Ti, RTX 3090, RTX 4090, RTX 5090, A100 or H100 [default: the card of this
    /// machine, else RTX 3060]
    #[arg(long, value_name = "NAME", help_heading = "Memory")]
    card: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print what fits, by method, card and length, as a Markdown table
    #[arg(long, exclusive = true)]
    tables: bool,
}

/// Runs `glmtune plan`.
///
/// # Errors
/// A flag is wrong, the model's `config.json` cannot be read, or nothing fits.
pub fn run(args: PlanArgs) -> Result<()> {
    if args.tables {
        print!("{}", plan::tables(&ModelConfig::chatglm_6b())?);
        return Ok(());
    }
    let asked_card = match &args.card {
        Some(name) => Some(Card::named(name).ok_or_else(|| {
            let names = Card::names().join(", ");
            Error::Usage(format!("--card: found {name}, expected one of {names}"))
        })?),
        None => None,
    };
    let (config, model) = resolve(args.train)?;
    let there = compute::choose(&config.device, &config.dtype);
    let compute = match (&asked_card, there) {
        (None, Ok(compute)) if compute.device != Device::Cpu || config.device == "cpu" => Some(compute),
        (None, Err(error)) if config.device != "auto" || error.exit_code() == 2 => return Err(error),
        (Some(_), _) if config.device == "cpu" => {
            return Err(Error::Usage(
                "--card is a card, and --device cpu is none: give one of them".into(),
            ));
        }
        _ => None,
    };
    // Without a card at hand, one that people have.
    let planned = Compute {
        device: Device::Cuda(0),
        dtype: match config.dtype.as_str() {
            "fp16" | "float16" => DType::F16,
            "fp32" | "float32" => DType::F32,
            _ => DType::BF16,
        },
    };
    let device = compute.map_or(planned.device, |compute| compute.device);
    let asked = Asked::of(&config, device)?;
    let (limits, card) = match compute {
        Some(compute) => plan::limits(&config, compute.device)?,
        None => {
            let card = asked_card.or_else(|| Card::named("RTX 3060"));
            let memory = card.as_ref().map_or(0, |card| card.memory);
            let vram = config
                .vram
                .as_deref()
                .map(|text| plan::parse_bytes("--vram", text));
            let device = vram.transpose()?.unwrap_or(memory);
            (Limits { device, host: None }, card)
        }
    };
    let work = work(&config, &model, compute.unwrap_or(planned), compute.is_none())?;
    let Some(card) = card else {
        let layout = asked.plain(&work)?;
        let plan = Plan::of(&work, &layout)?;
        return show(args.json, plan.json(), || {
            format!("on the CPU: {layout}\n{}", plan.table())
        });
    };
    let fit = plan::fit(&work, &asked, limits, &card)?;
    let chosen = &fit.ladder[0];
    let plan = Plan::of(&work, &chosen.layout)?;
    let mut as_json = plan.json();
    as_json["chosen"] = chosen.json();
    let others = fit.alternatives.iter();
    let others = others.map(|(other, fits)| json!({ "layout": other.json(), "fits": fits }));
    as_json["alternatives"] = others.collect();
    show(args.json, as_json, || text(&work, &fit, limits, &card, &plan))
}

/// Tokens of a sequence, at most.
const LONGEST: usize = 1 << 20;
/// Tokens of a question of the forgetting meter, without a tokenizer to count them: more than the longest has.
const PROBE: usize = 64;

/// The configuration, with what planning does not ask for filled in, and the model's sizes.
fn resolve(mut train: TrainArgs) -> Result<(RunConfig, ModelConfig)> {
    let known = |path: &Path| path.to_str().is_some_and(|name| model_config(name).is_ok());
    let named = train.take_config(known);
    let config = train.resolve_without_files()?;
    let model = match (named, config.model.as_os_str().is_empty()) {
        (Some(name), _) => model_config(&name.display().to_string())?,
        (None, true) => ModelConfig::chatglm_6b(),
        (None, false) => ModelConfig::read(&config.model)?,
    };
    Ok((config, model))
}

fn work(config: &RunConfig, model: &ModelConfig, compute: Compute, hypothetical: bool) -> Result<Work> {
    let stored = LoadedFrom {
        dtype: model.torch_dtype,
        linears: model.linears(),
        separate_head: !model.tie_word_embeddings,
    };
    let from = match config.in_four_bits() {
        true => stored.in_four_bits(!config.no_double_quant),
        false => stored,
    };
    // As the data of a run is cut.
    let longest = model.max_sequence_length;
    let length = match (
        config.max_length,
        config.max_source_length,
        config.max_target_length,
    ) {
        (Some(most), ..) => most,
        (None, Some(source), Some(target)) => source.saturating_add(target).min(longest),
        _ => longest,
    };
    if length == 0 || length > LONGEST {
        return Err(Error::Usage(format!(
            "--max-length: found {length}, expected 1 to {LONGEST}"
        )));
    }
    let prompt = length.saturating_sub(config.eval_max_new_tokens).max(1);
    let mut answers = plan::answers(config, prompt);
    if config.forgetting {
        answers.push(plan::Answers {
            size: 4,
            in_micro_batches: false,
            prompt: PROBE,
            capacity: PROBE.saturating_add(config.forgetting_tokens),
        });
    }
    Ok(Work {
        model: model.clone(),
        from,
        tuning: plan::tuning(config)?,
        compute,
        options: plan::options(config),
        batch: config.micro_batch_size * config.gradient_accumulation_steps,
        length,
        samples: usize::MAX,
        folder: config.output.clone(),
        answers,
        context: if hypothetical {
            plan::CONTEXT
        } else {
            plan::context(compute.device)
        },
    })
}

fn show(as_json: bool, value: Value, text: impl FnOnce() -> String) -> Result<()> {
    if as_json {
        println!("{value:#}");
    } else {
        print!("{}", text());
    }
    Ok(())
}

fn text(work: &Work, fit: &Fit, limits: Limits, card: &Card, plan: &Plan) -> String {
    let chosen: &Candidate = &fit.ladder[0];
    let (batch, length) = plan::largest(work, &chosen.layout, limits);
    let longest = plan::longest(work, limits);
    format!(
        "{} layers of {}, sequences of {} tokens, {} a step; {} with {:.2} GB to use\n{}{}\
         in this layout a micro-batch of {batch} x {} tokens fits, or one of {} x {length}; with everything moved off the \
         card 1 x {longest}\n",
        work.model.num_layers,
        work.model.hidden_size,
        work.length,
        work.batch,
        card.name,
        limits.device as f64 / 1e9,
        fit.text(work, &card.name),
        plan.table(),
        work.length,
        chosen.layout.micro_batch,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_names_every_buffer() {
        let (config, model) = resolve(TrainArgs::default()).unwrap();
        let compute = Compute {
            device: Device::Cuda(0),
            dtype: DType::BF16,
        };
        let work = work(&config, &model, compute, true).unwrap();
        let layout = Asked::default().plain(&work).unwrap();
        let plan = Plan::of(&work, &layout).unwrap();
        let json = plan.json();
        let buffers = json["buffers"].as_array().unwrap();
        let named = |account: &str| buffers.iter().any(|line| line["account"] == json!(account));
        for account in [
            "weights",
            "what trains",
            "gradients",
            "optimizer",
            "activations",
            "logits",
        ] {
            assert!(named(account), "{account}: {json}");
        }
        assert_eq!(json["context_bytes"], json!(plan::CONTEXT));
    }
}
