//! What a run measures at each evaluation: loss and token accuracy, generated answers, and what was forgotten.

use serde_json::{Map, Value};

use super::{Inputs, Trainer};
use crate::config::{Metric, RunConfig};
use crate::data::batch::Batch;
use crate::error::Result;
use crate::evaluate::{
    AnswerOptions, Forgetting, LossMetrics, Prediction, Question, Reference, TextMetrics, answer,
};
use crate::generate::GenerationConfig;
use crate::report::Sample;
use crate::tokenizer::Tokenizer;

/// What is asked at each evaluation.
pub(super) struct Evaluation {
    tokenizer: Tokenizer,
    questions: Vec<Question>,
    options: AnswerOptions,
    /// How the base answered the general prompts.
    reference: Option<Reference>,
}

/// The numbers of one evaluation.
#[derive(Debug, Clone, Default)]
pub(super) struct Evaluated {
    pub loss: Option<LossMetrics>,
    predictions: Vec<Prediction>,
    text: Option<TextMetrics>,
    forgetting: Option<Forgetting>,
}

impl Evaluation {
    pub fn new(
        config: &RunConfig,
        inputs: &Inputs,
        tokenizer: Tokenizer,
        reference: Option<Reference>,
    ) -> Self {
        let samples = inputs.evaluation().iter().take(config.eval_samples);
        Self {
            questions: samples.map(|sample| Question::of(&tokenizer, sample)).collect(),
            options: AnswerOptions {
                generation: GenerationConfig::greedy(config.eval_max_new_tokens),
                batch_size: config.micro_batch_size,
            },
            tokenizer,
            reference,
        }
    }

    /// Is there anything to measure?
    pub fn is_empty(&self, inputs: &Inputs) -> bool {
        !inputs.has_evaluation() && self.reference.is_none()
    }

    /// Measures the model as it is. `going_on` is asked between the parts; what it cuts off stays unmeasured.
    pub fn run(
        &self,
        trainer: &mut Trainer,
        inputs: &Inputs,
        going_on: &dyn Fn() -> bool,
    ) -> Result<Evaluated> {
        let mut evaluated = Evaluated::default();
        if inputs.has_evaluation() {
            let batches = inputs.evaluation_batches().take_while(|_: &Batch| going_on());
            evaluated.loss = Some(trainer.evaluate(batches)?);
        }
        if !self.questions.is_empty() && going_on() {
            let predictions = answer(
                trainer.model(),
                &self.tokenizer,
                &self.questions,
                &self.options,
                &mut |_, _| (),
            )?;
            evaluated.text = TextMetrics::of(&predictions);
            evaluated.predictions = predictions;
        }
        if let Some(reference) = self.reference.as_ref().filter(|_| going_on()) {
            evaluated.forgetting = Some(reference.compare(trainer.model(), &self.tokenizer)?);
        }
        Ok(evaluated)
    }
}

impl Evaluated {
    /// The number that runs are compared by.
    pub fn metric(&self, metric: Metric) -> Option<f64> {
        let text = self.text.as_ref();
        match metric {
            Metric::Loss => self.loss.map(|l| l.loss),
            Metric::TokenAccuracy => self.loss.map(|l| l.token_accuracy),
            Metric::ExactMatch => text.map(|t| t.exact_match),
            Metric::Bleu4 => text.map(|t| t.scores.bleu4),
            Metric::Rouge1 => text.map(|t| t.scores.rouge1),
            Metric::Rouge2 => text.map(|t| t.scores.rouge2),
            Metric::RougeL => text.map(|t| t.scores.rouge_l),
        }
    }

    /// The keys of `metrics.jsonl`; empty when nothing was measured.
    pub fn row(&self) -> Map<String, Value> {
        let mut row = Map::new();
        let mut put = |key: &str, value: Value| row.insert(format!("eval_{key}"), value);
        if let Some(loss) = &self.loss {
            put("loss", loss.loss.into());
            put("perplexity", loss.perplexity().into());
            put("token_accuracy", loss.token_accuracy.into());
        }
        if let Some(text) = &self.text {
            put("bleu-4", text.scores.bleu4.into());
            put("rouge-1", text.scores.rouge1.into());
            put("rouge-2", text.scores.rouge2.into());
            put("rouge-l", text.scores.rouge_l.into());
            put("exact_match", text.exact_match.into());
            put("empty", text.empty.into());
        }
        if let Some(forgetting) = &self.forgetting {
            put("kl", forgetting.kl_mean.into());
            put("base_agreement", forgetting.top1_agreement.into());
        }
        row
    }

    /// The line for the log.
    pub fn text(&self) -> String {
        let mut parts = Vec::new();
        if let Some(loss) = &self.loss {
            parts.push(format!(
                "loss {:.4}, token accuracy {:.1} %",
                loss.loss,
                100.0 * loss.token_accuracy
            ));
        }
        if let Some(t) = &self.text {
            parts.push(format!(
                "BLEU-4 {:.2}, ROUGE-1/2/L {:.2}/{:.2}/{:.2}, exact {:.1} % of {}{}",
                t.scores.bleu4,
                t.scores.rouge1,
                t.scores.rouge2,
                t.scores.rouge_l,
                100.0 * t.exact_match,
                t.predictions,
                match t.empty {
                    0 => String::new(),
                    n => format!(" ({n} empty)"),
                }
            ));
        }
        if let Some(forgetting) = &self.forgetting {
            parts.push(format!(
                "KL to the base {:.4}, same first choice {:.1} %",
                forgetting.kl_mean,
                100.0 * forgetting.top1_agreement
            ));
        }
        parts.join("; ")
    }

    /// The lines of `samples.jsonl`.
    pub fn samples(&self, step: u64) -> Vec<Sample> {
        let asked = self.predictions.iter().map(|p| Sample {
            step,
            prompt: p.prompt.clone(),
            reference: Some(p.reference.clone()),
            prediction: p.prediction.clone(),
            ..Sample::default()
        });
        let general = self.forgetting.iter().flat_map(|forgetting| {
            let kl = forgetting.kl_per_probe.iter();
            forgetting
                .answers
                .iter()
                .zip(kl)
                .map(|((prompt, before, after), &kl)| Sample {
                    step,
                    suite: Some("forgetting".into()),
                    prompt: prompt.clone(),
                    prediction: after.clone(),
                    base: Some(before.clone()),
                    kl: Some(kl),
                    ..Sample::default()
                })
        });
        asked.chain(general).collect()
    }
}
