//! The layouts that a run tries: the fastest that fits first, then smaller ones, should the card have less than it said.

use super::plan::{self, Answers, Asked, Layout, Plan, Work};
use super::run::{options, total_steps};
use super::{Inputs, method};
use crate::checkpoint::Checkpoint;
use crate::config::{Method, RunConfig};
use crate::error::Result;
use crate::evaluate::probe_extents;
use crate::model::{HeadStorage, LoadedFrom};
use crate::tensor::Compute;
use crate::tokenizer::Tokenizer;

pub(super) struct Ladder {
    pub work: Work,
    pub rungs: Vec<Layout>,
    /// What to tell the user.
    pub text: String,
}

impl Ladder {
    /// For a run on `source`; on the CPU there is one rung.
    ///
    /// # Errors
    /// Nothing fits, or what was asked for makes no sense.
    pub fn of(
        config: &RunConfig,
        (source, tokenizer): (&Checkpoint, &Tokenizer),
        compute: Compute,
        inputs: &Inputs,
    ) -> Result<Self> {
        let stored = LoadedFrom::of(source)?;
        let from = match config.in_four_bits() {
            true => stored.in_four_bits(!config.no_double_quant),
            false => stored,
        };
        let asked = Asked::of(config, compute.device)?;
        let (limits, card) = plan::limits(config, compute.device)?;
        let mut answers = plan::answers(config, inputs.longest_prompt());
        if config.forgetting {
            let (size, prompt) = probe_extents(tokenizer);
            let capacity = prompt.saturating_add(config.forgetting_tokens);
            answers.push(Answers {
                size,
                in_micro_batches: false,
                prompt,
                capacity,
            });
        }
        let work = Work {
            model: source.config().clone(),
            from,
            tuning: method::tuning(config)?,
            compute,
            options: options(config, total_steps(config, inputs.steps_per_epoch())),
            batch: config.micro_batch_size * config.gradient_accumulation_steps,
            length: inputs.longest(),
            samples: inputs.most(),
            folder: config.output.clone(),
            answers,
            context: plan::context(compute.device),
        };
        let Some(card) = card else {
            let layout = asked.plain(&work)?;
            return Ok(Self {
                work,
                rungs: vec![layout],
                text: String::new(),
            });
        };
        let fit = plan::fit(&work, &asked, limits, &card)?;
        let mut text = fit.text(&work, &card.name);
        text.push_str(&Plan::of(&work, &fit.ladder[0].layout)?.table());
        Ok(Self {
            work,
            rungs: fit.ladder.into_iter().map(|rung| rung.layout).collect(),
            text,
        })
    }
}

impl Asked {
    /// Everything where it computes, but for what was asked.
    ///
    /// # Errors
    /// The policies are not for as many layers as the model has.
    pub fn plain(&self, work: &Work) -> Result<Layout> {
        let layers = work.model.num_layers;
        let in_backward = self.in_backward.unwrap_or(false);
        // The update in the backward pass takes a step in one micro-batch.
        let usual = if in_backward {
            work.batch
        } else {
            work.batch.min(2)
        };
        let plain = Layout::plain(self.micro_batch.unwrap_or(usual), layers);
        Ok(Layout {
            layers: match &self.policies {
                Some(policies) => policies.layers(layers)?,
                None => plain.layers,
            },
            head: self.head.unwrap_or(HeadStorage::Compute),
            state: self.state.unwrap_or_default(),
            in_backward,
            ..plain
        })
    }
}

impl Layout {
    /// `config` with what was left to the search filled in: what decides the numbers of the run stands in its `run.toml`.
    pub(super) fn settle(&self, config: &RunConfig) -> RunConfig {
        let batch = config.micro_batch_size * config.gradient_accumulation_steps;
        RunConfig {
            micro_batch_size: self.micro_batch,
            gradient_accumulation_steps: batch / self.micro_batch.max(1),
            head_storage: plan::head_name(self.head).into(),
            // Weights that train whole are read from rounded copies where the state is elsewhere; products of few rows sum these in another
            // order.
            optimizer_state: match config.method {
                Method::Full | Method::Freeze => self.state.name().into(),
                _ => config.optimizer_state.clone(),
            },
            auto_micro_batch: false,
            ..config.clone()
        }
    }
}
