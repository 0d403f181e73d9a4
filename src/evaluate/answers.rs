//! Answers to the questions of samples, in batches, and their scores.

use std::cmp::Reverse;
use std::ops::ControlFlow;

use serde_json::{Map, Value};

use super::text::{self, TextScores};
use crate::data::collate;
use crate::data::sample::Sample;
use crate::error::{Error, Result};
use crate::generate::speed::Speed;
use crate::generate::{GenerationConfig, generate};
use crate::model::Model;
use crate::tokenizer::{Tokenizer, is_python_space};

/// What is asked, and what should be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The prompt's ids, `[gMASK] <sop>` included.
    pub ids: Vec<u32>,
    /// Index of the first `<sop>`.
    pub context: usize,
    /// Index of the first `[gMASK]`.
    pub mask: usize,
    /// The prompt as text.
    pub prompt: String,
    /// The right answer.
    pub reference: String,
    /// Where the record came from.
    pub place: String,
}

impl Question {
    /// The question of a sample: the very ids that training shows the model before the answer.
    ///
    /// Both texts are decoded from ids, as the official script does: the tokenizer makes full-width punctuation half-width,
    /// and an answer is compared with what a model can write. A cut sample has a cut reference.
    pub fn of(tokenizer: &Tokenizer, sample: &Sample) -> Self {
        // `[gMASK] <sop>` ends the prompt; a `<sop>` alone may stand written out in its text.
        let (prompt, answer) = sample.ids.split_at((sample.mask + 2).min(sample.ids.len()));
        let answer = answer.strip_suffix(&[tokenizer.special().eop]).unwrap_or(answer);
        Self {
            ids: prompt.to_vec(),
            context: sample.context,
            mask: sample.mask,
            prompt: tokenizer.decode(&prompt[..sample.mask.min(prompt.len())]),
            reference: tokenizer.decode(answer),
            place: sample.place.clone(),
        }
    }
}

/// How to answer.
#[derive(Debug, Clone)]
pub struct AnswerOptions {
    /// Greedy or sampled, and how long.
    pub generation: GenerationConfig,
    /// Questions answered at once.
    pub batch_size: usize,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// The prompt as text.
    pub prompt: String,
    /// The right answer.
    pub reference: String,
    /// The model's answer.
    pub prediction: String,
    /// Against the reference.
    pub scores: TextScores,
    /// Is it the reference, white space at the ends aside?
    pub exact_match: bool,
    /// Did the model end it itself, with `<eop>`?
    pub ended: bool,
}

impl Prediction {
    /// The answer to `question`, scored.
    pub fn new(question: &Question, prediction: String, ended: bool) -> Self {
        Self {
            prompt: question.prompt.clone(),
            reference: question.reference.clone(),
            scores: text::score(&prediction, &question.reference),
            exact_match: same(&prediction, &question.reference),
            prediction,
            ended,
        }
    }

    /// One object of a predictions file: the texts, and the scores by their official names.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut object = Map::new();
        for (key, text) in [
            ("prompt", &self.prompt),
            ("reference", &self.reference),
            ("prediction", &self.prediction),
        ] {
            object.insert(key.to_string(), text.as_str().into());
        }
        for (name, score) in self.scores.named() {
            object.insert(name.to_string(), score.into());
        }
        object.insert("exact_match".to_string(), self.exact_match.into());
        object.insert("ended".to_string(), self.ended.into());
        object
    }
}

/// Equal but for white space at the ends.
pub(super) fn same(a: &str, b: &str) -> bool {
    a.trim_matches(is_python_space) == b.trim_matches(is_python_space)
}

/// Means over all predictions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TextMetrics {
    /// Mean scores, each from 0 to 100.
    pub scores: TextScores,
    /// The share of exact matches, from 0 to 1.
    pub exact_match: f64,
    /// The number of empty answers: they score 0 and are part of the means.
    pub empty: usize,
    /// The share of answers that the model did not end itself, from 0 to 1.
    pub unended: f64,
    /// The number of predictions.
    pub predictions: usize,
}

impl TextMetrics {
    /// The means of `predictions`; `None` when there are none.
    pub fn of(predictions: &[Prediction]) -> Option<Self> {
        let scores = TextScores::mean(predictions.iter().map(|p| p.scores))?;
        let count = |what: fn(&Prediction) -> bool| predictions.iter().filter(|p| what(p)).count();
        let share = |count: usize| count as f64 / predictions.len() as f64;
        Some(Self {
            scores,
            exact_match: share(count(|p| p.exact_match)),
            empty: count(|p| text::is_empty(&p.prediction)),
            unended: share(count(|p| !p.ended)),
            predictions: predictions.len(),
        })
    }
}

/// Answers every question and returns the answers in the order of the questions.
///
/// Batches take the questions by length, the longest first: padding is small, and what does not fit into memory shows at
/// once. An answer does not depend on its batch: the random numbers of question i are those of stream i. `done` is called
/// after every batch with the number of questions answered so far.
///
/// # Errors
/// As [`generate`]; a batch of 0.
pub fn answer(
    model: &Model,
    tokenizer: &Tokenizer,
    questions: &[Question],
    options: &AnswerOptions,
    done: &mut dyn FnMut(usize, &Speed),
) -> Result<Vec<Prediction>> {
    if options.batch_size == 0 {
        return Err(Error::input(
            "--batch-size",
            0,
            "at least 1",
            "answer one question at once",
        ));
    }
    let special = tokenizer.special();
    let mut order: Vec<usize> = (0..questions.len()).collect();
    order.sort_by_key(|&i| Reverse(questions[i].ids.len()));
    let mut answers: Vec<Option<Prediction>> = vec![None; questions.len()];
    let mut speed = Speed::default();
    let mut answered = 0;
    for batch in order.chunks(options.batch_size) {
        let prompts: Vec<Vec<u32>> = batch.iter().map(|&i| questions[i].ids.clone()).collect();
        let numbers: Vec<u64> = batch.iter().map(|&i| i as u64).collect();
        let padded = collate::left_pad(&prompts, &special);
        let generated = generate(model, &padded, &numbers, &options.generation, &mut |_, _| {
            ControlFlow::Continue(())
        })?;
        speed.add(&generated.speed);
        for (&i, ids) in batch.iter().zip(&generated.sequences) {
            let answer = ids.strip_suffix(&[special.eop]);
            let text = tokenizer.decode(answer.unwrap_or(ids));
            answers[i] = Some(Prediction::new(&questions[i], text, answer.is_some()));
        }
        answered += batch.len();
        done(answered, &speed);
    }
    Ok(answers.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prediction(prediction: &str, reference: &str, ended: bool) -> Prediction {
        let question = Question {
            ids: Vec::new(),
            context: 0,
            mask: 0,
            prompt: "问".to_string(),
            reference: reference.to_string(),
            place: String::new(),
        };
        Prediction::new(&question, prediction.to_string(), ended)
    }

    #[test]
    fn means_count_empty_answers() {
        let all = [
            prediction("好的好的", "好的好的", true),
            prediction(" 好的好的\n", "好的好的", true),
            prediction(" ", "好的好的", true),
            prediction("坏", "好的好的", false),
        ];
        let metrics = TextMetrics::of(&all).unwrap();
        assert_eq!(
            (metrics.exact_match, metrics.empty, metrics.unended),
            (0.5, 1, 0.25)
        );
        assert_eq!(metrics.scores.rouge1, 50.0);
        assert_eq!(TextMetrics::of(&[]), None);
    }

    #[test]
    fn a_line_of_predictions_has_texts_and_official_names() {
        let line = prediction("一", "一", true).to_json();
        let keys: Vec<&str> = line.keys().map(String::as_str).collect();
        let names = [
            "prompt",
            "reference",
            "prediction",
            "rouge-1",
            "rouge-2",
            "rouge-l",
            "bleu-4",
            "exact_match",
            "ended",
        ];
        assert_eq!(keys, names);
    }
}
